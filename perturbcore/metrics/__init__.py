"""Metrics of predicted perturbation responses, differential expression and the evaluation that joins them."""

from perturbcore.metrics import delta as delta
from perturbcore.metrics import discrimination as discrimination
from perturbcore.metrics.comparison import Comparison
from perturbcore.metrics.de import DEGLabels, DETable, deg_labels, differential_expression, rank_sum
from perturbcore.metrics.registry import METRICS, Metric, register

__all__ = [
    "METRICS",
    "Comparison",
    "DEGLabels",
    "DETable",
    "Metric",
    "deg_labels",
    "differential_expression",
    "rank_sum",
    "register",
]
