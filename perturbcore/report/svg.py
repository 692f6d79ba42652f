"""Drawings as inline SVG: colours come from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

WIDTH = 360


def number(value: float, digits: int = 3) -> str:
    """A number as the page prints it: fixed digits, a real minus sign, a dash where there is none."""
    if not np.isfinite(value):
        return "–"
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        return "≈ 0"
    return f"{value:.{digits}f}".replace("-", "−")


def _svg(height: float, alt: str, body: list[str], kind: str) -> Markup:
    head = f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(alt)}">'
    return Markup("".join([head, *body, "</svg>"]))


def _text(x: float, y: float, content: object, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(content)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high]."""
    raw = (high - low) / count or 1.0
    power = 10.0 ** np.floor(np.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    ticks = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step
    return [float(t) + 0.0 for t in ticks]


def _short(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def scatter(real: np.ndarray, predicted: np.ndarray, genes: Sequence[str], *, tone: str, alt: str) -> Markup:
    """Predicted against measured shift of every gene [G]; the strongest movers are named."""
    left, top, side = 34.0, 8.0, 318.0
    limit = 1.06 * max(float(np.nanmax(np.abs(real))), float(np.nanmax(np.abs(predicted))), 1e-6)

    def place(value: np.ndarray) -> np.ndarray:
        return (value / limit + 1) / 2 * side

    x, y = left + place(real), top + side - place(predicted)
    middle_x, middle_y = left + side / 2, top + side / 2
    body = [
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" class="frame"/>',
        _line(left, middle_y, left + side, middle_y, "grid"),
        _line(middle_x, top, middle_x, top + side, "grid"),
        _line(left, top + side, left + side, top, "ideal"),
    ]
    for tick in _ticks(-limit, limit):
        at = float(place(np.array(tick)))
        body += [
            _text(left + at, top + side + 14, _short(tick), "tick", "middle"),
            _text(left - 5, top + side - at + 3.5, _short(tick), "tick", "end"),
        ]
    body += [
        _text(left + side, top + side + 29, "measured Δ", "axis", "end"),
        _text(left + 6, top + 15, "predicted Δ", "axis"),
    ]
    finite = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(-np.abs(np.where(finite, real, 0)), kind="stable")
    named = [int(g) for g in order[:20] if finite[g] and real[g] != 0]
    rest = np.setdiff1d(np.flatnonzero(finite), named)
    # A dot is a line of no length with round ends: nine characters a gene keep the page small.
    dots = sorted({(round(float(x[g])), round(float(y[g]))) for g in rest})
    body.append(f'<path class="cloud {tone}" d="{"".join(f"M{a} {b}h0" for a, b in dots)}"/>')
    for g in named:
        hint = escape(f"{genes[g]}: measured {number(real[g], 2)}, predicted {number(predicted[g], 2)}")
        body.append(
            f'<circle cx="{x[g]:.1f}" cy="{y[g]:.1f}" r="3.6" class="mover {tone}"><title>{hint}</title></circle>'
        )
    taken: list[tuple[float, float, float]] = []
    for g in named:
        width = 6.2 * len(genes[g])
        before = x[g] > middle_x
        start = x[g] - 7 - width if before else x[g] + 7
        clear = all(abs(y[g] - v) > 11 or start > b or start + width < a for a, b, v in taken)
        if clear and start > left and start + width < left + side and not (y[g] < top + 22 and start < left + 80):
            taken.append((start, start + width, float(y[g])))
            body.append(_text(x[g] + (-7 if before else 7), y[g] + 3.5, genes[g], "gene", "end" if before else "start"))
    return _svg(top + side + 34, alt, body, "scatter")


def movers(
    real: np.ndarray,
    predicted: Mapping[str, np.ndarray],
    genes: Sequence[str],
    tones: Mapping[str, str],
    *,
    alt: str,
    count: int = 18,
) -> Markup:
    """Measured shift of the strongest movers as bars, predictions as dots upon them."""
    order = np.argsort(-np.abs(np.nan_to_num(real)), kind="stable")[:count]
    order = order[np.argsort(-real[order], kind="stable")]
    values = np.concatenate([real[order], *(p[order] for p in predicted.values()), [0.0]])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    pad = 0.05 * (high - low or 1.0)
    low, high = low - pad, high + pad
    left, right, row = 88.0, WIDTH - 6.0, 19.0

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    bottom = row * len(order) + 8
    body = [_line(at(t), 4, at(t), bottom, "zero" if t == 0 else "grid") for t in _ticks(low, high)]
    body += [_text(at(t), bottom + 14, _short(t), "tick", "middle") for t in _ticks(low, high)]
    for i, g in enumerate(order):
        y = 8 + row * (i + 0.5)
        a, b = sorted((at(0), at(float(real[g]))))
        body.append(_text(left - 8, y + 4, genes[g][:13], "gene", "end"))
        hint = escape(f"{genes[g]}: measured {number(float(real[g]), 2)}")
        body.append(
            f'<rect x="{a:.1f}" y="{y - 5:.1f}" width="{b - a:.1f}" height="10" class="measured"><title>{hint}</title></rect>'
        )
        for model, values_of in predicted.items():
            if np.isfinite(values_of[g]):
                hint = escape(f"{genes[g]}: {model} predicts {number(float(values_of[g]), 2)}")
                body.append(
                    f'<circle cx="{at(float(values_of[g])):.1f}" cy="{y:.1f}" r="4" class="dot {tones[model]}"><title>{hint}</title></circle>'
                )
    return _svg(bottom + 22, alt, body, "movers")


def network(
    hops: Mapping[str, int], edges: Sequence[tuple[str, str]], shift: Mapping[str, float], *, alt: str
) -> Markup:
    """Selected genes in columns by their distance from the perturbed one; colour is the measured shift."""
    columns = [[gene for gene, h in hops.items() if min(h, 2) == depth] for depth in range(3)]
    columns = [column for column in columns if column]
    tall = max(len(column) for column in columns)
    height = 22.0 * tall + 16
    span = (WIDTH - 40 - 70) / max(len(columns) - 1, 1)
    where: dict[str, tuple[float, float]] = {}
    for depth, column in enumerate(columns):
        gap = height / (len(column) + 1) if len(column) < tall / 2 else 22.0
        start = height / 2 - gap * (len(column) - 1) / 2
        where |= {gene: (40 + span * depth, start + gap * i) for i, gene in enumerate(column)}
    body = []
    for source, target in edges:
        if source in where and target in where and source != target:
            (x1, y1), (x2, y2) = where[source], where[target]
            bend = (x2 - x1) / 2 if x1 != x2 else 26
            body.append(
                f'<path class="edge" d="M{x1:.0f} {y1:.0f}C{x1 + bend:.0f} {y1:.0f} {x2 - bend if x1 != x2 else x2 + 26:.0f} {y2:.0f} {x2:.0f} {y2:.0f}"/>'
            )
    largest = max((abs(v) for v in shift.values() if np.isfinite(v)), default=0.0) or 1.0
    for gene, (x, y) in where.items():
        value = shift.get(gene, np.nan)
        if hops[gene] == 0:
            kind, strength = "target", 1.0
        elif np.isfinite(value):
            kind, strength = ("up" if value > 0 else "down"), 0.25 + 0.75 * min(abs(value) / largest, 1.0)
        else:
            kind, strength = "unmeasured", 1.0
        hint = escape(f"{gene}: measured Δ {number(value, 2)}")
        body += [
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="6" class="under"/>',
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="6" class="node {kind}" fill-opacity="{strength:.2f}"><title>{hint}</title></circle>',
            _text(x + 10, y + 4, gene[:13], "gene halo"),
        ]
    return _svg(height, alt, body, "network")


def curve(
    steps: np.ndarray, lines: Mapping[str, np.ndarray], *, tones: Mapping[str, str], best: float | None, alt: str
) -> Markup:
    """One or more series over training steps; `best` marks the step whose weights were kept."""
    left, right, top, bottom = 44.0, WIDTH - 8.0, 10.0, 168.0
    values = np.concatenate([v[np.isfinite(v)] for v in lines.values()])
    low, high = float(values.min()), float(values.max())
    pad = 0.06 * (high - low or 1.0)
    low, high = low - pad, high + pad
    first, last = float(steps.min()), float(steps.max())

    def at(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
        xs = left + (x - first) / ((last - first) or 1) * (right - left)
        ys = bottom - (y - low) / (high - low) * (bottom - top)
        return list(zip(xs.tolist(), ys.tolist(), strict=True))

    body = []
    for tick in _ticks(low, high):
        y = at(np.array([first]), np.array([tick]))[0][1]
        body += [_line(left, y, right, y, "grid"), _text(left - 6, y + 3.5, _short(tick), "tick", "end")]
    for tick in _ticks(first, last):
        x = at(np.array([tick]), np.array([low]))[0][0]
        body.append(_text(x, bottom + 15, _short(tick), "tick", "middle"))
    if best is not None and first <= best <= last:
        x = at(np.array([best]), np.array([low]))[0][0]
        body += [
            _line(x, top, x, bottom, "ideal"),
            _text(x - 4 if x > 200 else x + 4, top + 8, "kept", "tick", "end" if x > 200 else "start"),
        ]
    for name, series in lines.items():
        ok = np.isfinite(series)
        points = at(steps[ok], series[ok])
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        body.append(f'<path class="series {tones[name]}" d="M{path}"/>')
        if len(points) == 1:
            body.append(
                f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3.6" class="mover {tones[name]}"/>'
            )
    return _svg(bottom + 22, alt, body, "curve")
