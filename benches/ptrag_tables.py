"""The tables of `ptrag_settings`, from its values: one row for every screen, seed, setting and condition."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from perturbcore.benches.values import t_half_width
from perturbcore.metrics import METRICS as REGISTRY
from perturbcore.metrics.scores import corrected, draw_weights, interval, paired, weighted_mean

METRICS = {
    "pearson_profile_welch_deg": "Pearson, DEG profile",
    "spearman_profile_welch_deg": "Spearman, DEG profile",
    "pearson_delta_top50_disjoint": "Pearson Δ, DEG",
    "de_spearman_lfc_sig": "Spearman Δ, DEG",
    "pearson_delta_disjoint": "Pearson Δ",
    "mse_pca50": "MSE, PCA-50",
    "w1": "W1",
    "w2": "W2",
    "w2_half_sq": "W2²/2",
    "energy": "energy",
    "energy_half": "energy/2",
}
TESTED = [metric for metric in METRICS if metric != "energy_half"]  # half of another has its p-values
PLANTED = {
    "kept": "neighbours kept",
    "precision": "of them help",
    "recall": "of the helpers kept",
    "mass": "probability on helpers",
    "chance": "of those retrieved help",
}
BOOTSTRAP_SEED = 0


def by_condition(values: pd.DataFrame, simulated: Collection[str]) -> pd.DataFrame:
    """Return a row for every screen, setting and condition: the mean of a condition over its seeds.

    The conditions of a simulated screen are others for every seed, whatever their names.
    """
    drawn = values["seed"].where(values["screen"].isin(list(simulated)), -1)
    keys = ["screen", "setting", "drawn", "context", "perturbation"]
    return values.assign(drawn=drawn).groupby(keys, sort=False)[list(METRICS)].mean()


def means_table(values: pd.DataFrame, simulated: Collection[str]) -> str:
    """Return the lines of one screen: settings and baselines, the mean of each metric and its interval."""
    wide = by_condition(values, simulated)
    lines = ["| | " + " | ".join(f"{title} {_better(m)}" for m, title in METRICS.items()) + " |"]
    lines.append("|---" * (1 + len(METRICS)) + "|")
    for setting, rows in wide.groupby(level="setting", sort=False):
        cells = []
        for metric in METRICS:
            column = rows[metric].to_numpy(np.float64)
            cells.append(_mean(column))
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    seeds = values["seed"].nunique()
    n = wide.groupby(level="setting").size().max()
    return "\n".join([*lines, f"\n{n} conditions, {seeds} seed{'s' if seeds > 1 else ''}; 95 % bootstrap intervals."])


def _mean(column: np.ndarray) -> str:
    """The mean of the values of one metric, its interval, and how many have a value where some have none."""
    finite = column[np.isfinite(column)]
    if not len(finite):
        return "–"
    low, high = interval(weighted_mean(column, draw_weights(len(column), BOOTSTRAP_SEED)))
    bounds = f" [{short(low)}, {short(high)}]" if len(finite) > 1 else ""
    return f"{short(finite.mean())}{bounds}" + (f" (n {len(finite)})" if len(finite) < len(column) else "")


def compare_settings(values: pd.DataFrame, settings: Sequence[str], simulated: Collection[str]) -> pd.DataFrame:
    """Test the first setting against each other one, condition by condition, on every screen and metric.

    Returns [screen, setting, metric, and the fields of `metrics.scores.Paired`, fdr]: a difference is the first minus
    the other, and `fdr` is Wilcoxon's p after Benjamini and Hochberg over all rows.
    """
    rows, first = [], settings[0]
    for screen, here in by_condition(values, simulated).groupby(level="screen", sort=False):
        for metric in TESTED:
            wide = here[metric].unstack("setting")
            for setting in (name for name in settings[1:] if name in wide and first in wide):
                one, other = (wide[name].to_numpy(np.float64) for name in (first, setting))
                found = paired(one, other, BOOTSTRAP_SEED)._asdict()
                rows.append({"screen": screen, "setting": setting, "metric": metric, **found})
    table = pd.DataFrame(rows)
    return table.assign(fdr=corrected(table["p_value"].to_numpy(np.float64))) if rows else table


def tests_table(values: pd.DataFrame, settings: Sequence[str], simulated: Collection[str]) -> dict[str, str]:
    """Return the lines of every screen: the first setting minus each other one, with p-values and their correction."""
    found = compare_settings(values, settings, simulated)
    tables = {}
    for screen in dict.fromkeys(values["screen"]):
        here = found[found["screen"] == screen] if len(found) else found
        lines = [f"| {settings[0]} minus | " + " | ".join(f"{METRICS[m]} {_better(m)}" for m in TESTED) + " |"]
        lines.append("|---" * (1 + len(TESTED)) + "|")
        for setting, rows in here.groupby("setting", sort=False) if len(here) else ():
            cells = [_difference(row) for _, row in rows.iterrows()]
            lines.append(f"| {setting} | " + " | ".join(cells) + " |")
        note = f"p: Wilcoxon, Mann–Whitney; q: Benjamini–Hochberg over the {len(found)} Wilcoxon tests printed."
        tables[screen] = "\n".join([*lines, f"\n{note}"])
    return tables


def _difference(row: pd.Series) -> str:
    if not np.isfinite(row["difference"]):
        return "–"
    change = f"{row['difference']:+.3g} [{row['ci_low']:+.3g}, {row['ci_high']:+.3g}]"
    return f"{change}, p {_p(row['p_value'])}, {_p(row['p_mannwhitney'])}, q {_p(row['fdr'])}"


def _p(value: float) -> str:
    return "–" if not np.isfinite(value) else "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0")


def planted_table(values: pd.DataFrame) -> str:
    """Return the lines on which neighbours were kept, with t-intervals over seeds; nothing where none was planted."""
    columns = [name for name in PLANTED if name in values]
    known = values.dropna(subset="chance") if "chance" in values else values.iloc[:0]
    if known.empty:
        return ""
    lines = ["| | " + " | ".join(PLANTED[name] for name in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for setting, rows in known.groupby("setting", sort=False):
        of_seed = rows.groupby("seed")[columns].mean()
        cells = []
        for name in columns:
            seeds = of_seed[name].dropna()
            half = t_half_width(float(seeds.std()), len(seeds))
            bounds = f" [{short(seeds.mean() - half)}, {short(seeds.mean() + half)}]" if np.isfinite(half) else ""
            cells.append(f"{short(seeds.mean())}{bounds}" if len(seeds) else "–")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "\nMean over seeds of the mean over conditions; 95 % t-intervals."])


def short(value: float) -> str:
    """A value to three digits, without the zero before the point."""
    text = f"{value:.3g}" if abs(value) >= 1 else f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def _better(metric: str) -> str:
    return "↑" if REGISTRY[metric].higher_is_better else "↓"
