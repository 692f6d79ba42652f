"""Metrics of predicted perturbation responses, differential expression and the evaluation that joins them."""

from perturbcore.metrics import collapse as collapse
from perturbcore.metrics import deg as deg
from perturbcore.metrics import delta as delta
from perturbcore.metrics import discrimination as discrimination
from perturbcore.metrics import disjoint as disjoint
from perturbcore.metrics import profile as profile
from perturbcore.metrics import transport as transport
from perturbcore.metrics.comparison import Comparison
from perturbcore.metrics.de import DEGLabels, DETable, deg_labels, differential_expression, rank_sum
from perturbcore.metrics.edistance import edistance
from perturbcore.metrics.evaluate import evaluate
from perturbcore.metrics.registry import METRICS, Metric, register
from perturbcore.metrics.scores import ByGene, Paired, Scores
from perturbcore.metrics.summary import score
from perturbcore.metrics.verdict import BASELINES

__all__ = [
    "BASELINES",
    "METRICS",
    "ByGene",
    "Comparison",
    "DEGLabels",
    "DETable",
    "Metric",
    "Paired",
    "Scores",
    "deg_labels",
    "differential_expression",
    "edistance",
    "evaluate",
    "rank_sum",
    "register",
    "score",
]
