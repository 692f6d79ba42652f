"""Drawings as inline SVG: colours come from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

WIDTH = 360


def number(value: float, digits: int = 3) -> str:
    """A number as the page prints it: fixed digits, a real minus sign, a dash where there is none."""
    if not np.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def digits_for(values: Iterable[float]) -> int:
    """Digits after the point that tell values of this size apart: 3, more where all are below 0.1."""
    largest = max((abs(value) for value in values if np.isfinite(value)), default=1.0)
    return 3 if largest >= 0.1 or largest == 0 else min(2 - int(np.floor(np.log10(largest))), 8)


def _svg(height: float, alt: str, body: list[str], kind: str) -> Markup:
    head = f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(alt)}">'
    return Markup("".join([head, *body, "</svg>"]))


def _text(x: float, y: float, content: object, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(content)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _dot(x: float, y: float, radius: float, kind: str, hint: str = "", opacity: float = 1.0) -> str:
    faded = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"{faded}>{title}</circle>'


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
    x = left + (real / limit + 1) / 2 * side
    y = top + (1 - predicted / limit) / 2 * side
    middle = side / 2
    body = [
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" class="frame"/>',
        _line(left, top + middle, left + side, top + middle, "grid"),
        _line(left + middle, top, left + middle, top + side, "grid"),
        _line(left, top + side, left + side, top, "ideal"),
    ]
    for tick in _ticks(-limit, limit):
        at = (tick / limit + 1) / 2 * side
        body.append(_text(left + at, top + side + 14, _short(tick), "tick", "middle"))
        body.append(_text(left - 5, top + side - at + 3.5, _short(tick), "tick", "end"))
    body.append(_text(left + side, top + side + 29, "measured Δ", "axis", "end"))
    body.append(_text(left + 6, top + 15, "predicted Δ", "axis"))

    finite = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(-np.abs(np.where(finite, real, 0)), kind="stable")
    named = [int(g) for g in order[:20] if finite[g] and real[g] != 0]
    rest = np.setdiff1d(np.flatnonzero(finite), named)
    body.append(_cloud(x[rest], y[rest], f"cloud {tone}"))
    for g in named:
        hint = f"{genes[g]}: measured {number(real[g], 2)}, predicted {number(predicted[g], 2)}"
        body.append(_dot(float(x[g]), float(y[g]), 3.6, f"mover {tone}", hint))
    marks = [(float(x[g]), float(y[g])) for g in named]
    frame = (left + 1, left + side - 1)
    for g, (start, anchor) in _labels(marks, [genes[g] for g in named], frame, blocked=(left, left + 78, top + 20)):
        body.append(_text(start, marks[g][1] + 3.5, genes[named[g]], "gene", anchor))
    return _svg(top + side + 34, alt, body, "scatter")


def volcano(
    lfc: np.ndarray, fdr: np.ndarray, called: np.ndarray, genes: Sequence[str], *, alpha: float, tone: str, alt: str
) -> Markup:
    """Measured log2 fold change against −log10 FDR of every gene [G], marked by what the prediction calls.

    `called` [G] is True where the prediction finds the gene differentially expressed. Infinite fold changes stand at
    the edge of the frame, an FDR of 0 at its top; a gene without a test is left out.
    """
    left, top, side, rim = 34.0, 22.0, 318.0, 6.0
    tested = np.isfinite(fdr) & ~np.isnan(lfc)
    up = -np.log10(np.where(tested & (fdr > 0), fdr, 1.0))
    tallest = 1.08 * max(float(up.max(initial=0.0)), -2 * float(np.log10(alpha)))
    limit = 1.08 * max(float(np.abs(lfc[np.isfinite(lfc)]).max(initial=0.0)), 0.5)
    x = np.clip(left + (np.clip(lfc, -limit, limit) / limit + 1) / 2 * side, left + rim, left + side - rim)
    y = np.where(fdr == 0, top + rim, top + (1 - up / tallest) * side)
    middle, line = left + side / 2, top + (1 + float(np.log10(alpha)) / tallest) * side
    body = [
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" class="frame"/>',
        _line(middle, top, middle, top + side, "grid"),
        _line(left, line, left + side, line, "ideal"),
        _text(left + side - 5, line - 4, f"FDR {alpha:g}", "tick", "end"),
    ]
    body += [
        _text(middle + t / limit * side / 2, top + side + 14, _short(t), "tick", "middle")
        for t in _ticks(-limit, limit)
    ]
    body += [
        _text(left - 5, top + (1 - t / tallest) * side + 3.5, _short(t), "tick", "end") for t in _ticks(0, tallest)
    ]
    body.append(_text(left + side, top + side + 29, "measured log₂ fold change", "axis", "end"))
    body.append(_text(left, top - 7, "−log₁₀ FDR", "axis"))
    responds = fdr < alpha
    for chosen, kind in (
        (~responds & ~called, "cloud rest"),
        (responds & ~called, "called missed"),
        (responds & called, "called both"),
        (~responds & called, "called added"),
    ):
        at = np.flatnonzero(tested & chosen)
        if len(at):
            body.append(_cloud(x[at], y[at], f"{kind} {tone}"))
            if kind == "called added":  # a ring: the same dots once more, smaller, in the colour of the card
                body.append(_cloud(x[at], y[at], "called hole"))
    order = np.lexsort((-np.abs(lfc), np.where(tested, y, np.inf)))[:24]
    named = [int(g) for g in order if tested[g] and responds[g]]
    marks = [(float(x[g]), float(y[g])) for g in named]
    frame = (left + 1, left + side - 1)
    for g, (start, anchor) in _labels(
        marks, [genes[g] for g in named], frame, blocked=(left + side - 60, left + side, line + 4)
    ):
        body.append(_text(start, marks[g][1] + 3.5, genes[named[g]], "gene", anchor))
    return _svg(top + side + 34, alt, body, "volcano")


def _cloud(x: np.ndarray, y: np.ndarray, kind: str) -> str:
    """Dots as lines of no length with round ends, each placed from the one before: a few characters a gene."""
    at = (0, 0)
    steps = []
    for dot in sorted({(round(a), round(b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)}):
        steps.append(f"m{dot[0] - at[0]} {dot[1] - at[1]}h0")
        at = dot
    return f'<path class="{kind}" d="{"".join(steps).replace(" -", "-")}"/>'


def _labels(
    marks: Sequence[tuple[float, float]],
    names: Sequence[str],
    frame: tuple[float, float],
    blocked: tuple[float, float, float],
) -> list[tuple[int, tuple[float, str]]]:
    """Choose which marks can be named, right or left of themselves, without covering a mark or another name.

    `blocked` (from x, to x, down to y) is where the axis title stands. Names are in order of importance.
    """
    taken: list[tuple[float, float, float]] = [(blocked[0], blocked[1], blocked[2] - 8)]
    taken += [(x - 4, x + 4, y) for x, y in marks]
    placed = []
    for i, ((x, y), name) in enumerate(zip(marks, names, strict=True)):
        width = 6.6 * len(name)
        for start, anchor, at in ((x + 7, "start", x + 7), (x - 7 - width, "end", x - 7)):
            inside = frame[0] < start and start + width < frame[1]
            if inside and all(abs(y - v) > 10.5 or start > b or start + width < a for a, b, v in taken):
                taken.append((start, start + width, y))
                placed.append((i, (at, anchor)))
                break
    return placed


def bars(
    names: Sequence[str],
    bar: np.ndarray,
    dots: Mapping[str, np.ndarray],
    tones: Mapping[str, str],
    *,
    label: str,
    alt: str,
) -> Markup:
    """One value a gene [n] as bars, called `label`, others upon them as dots; what is not finite is left out."""
    values = np.concatenate([bar, *dots.values(), [0.0]])
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    pad = 0.05 * (high - low or 1.0)
    low, high = low - pad * (low < 0), high + pad
    left, right, row = 88.0, WIDTH - 6.0, 19.0

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    bottom = row * len(names) + 8
    body = [_line(at(t), 4, at(t), bottom, "zero" if t == 0 else "grid") for t in _ticks(low, high)]
    body += [_text(at(t), bottom + 14, _short(t), "tick", "middle") for t in _ticks(low, high)]
    for i, name in enumerate(names):
        y = 8 + row * (i + 0.5)
        body.append(_text(left - 8, y + 4, name[:13], "gene", "end"))
        if np.isfinite(bar[i]):
            start, end = sorted((at(0), at(float(bar[i]))))
            title = escape(f"{name}: {label} {number(float(bar[i]), 2)}")
            rectangle = f'<rect x="{start:.1f}" y="{y - 5:.1f}" width="{end - start:.1f}" height="10" class="measured">'
            body.append(f"{rectangle}<title>{title}</title></rect>")
        for model, guess in reversed(list(dots.items())):  # the first on top
            if np.isfinite(guess[i]):
                hint = f"{name}: {model} {number(float(guess[i]), 2)}"
                body.append(_dot(at(float(guess[i])), y, 4, f"dot {tones[model]}", hint))
    return _svg(bottom + 22, alt, body, "bars")


def network(
    hops: Mapping[str, int], edges: Sequence[tuple[str, str]], shift: Mapping[str, float], *, alt: str
) -> Markup:
    """Selected genes in columns by their distance from the perturbed one; colour is the measured shift."""
    columns = [[gene for gene, h in hops.items() if min(h, 2) == depth] for depth in range(3)]
    columns = [column for column in columns if column]
    row, tall = 22.0, max(len(column) for column in columns)
    height, span = row * tall + 16, (WIDTH - 118) / max(len(columns) - 1, 1)
    where: dict[str, tuple[float, float]] = {}
    for depth, column in enumerate(columns):
        gap = row if len(column) > tall / 2 else height / (len(column) + 1)
        start = height / 2 - gap * (len(column) - 1) / 2
        where |= {gene: (12 + span * depth, start + gap * i) for i, gene in enumerate(column)}
    body = []
    for source, target in edges:
        if source in where and target in where:
            (x1, y1), (x2, y2) = where[source], where[target]
            bend = (x1 + x2) / 2
            curve = f"M{x1:.0f} {y1:.0f}C{bend:.0f} {y1:.0f} {bend:.0f} {y2:.0f} {x2:.0f} {y2:.0f}"
            body.append(f'<path class="edge" d="{curve}"/>')
    largest = max((abs(shift[g]) for g in where if np.isfinite(shift.get(g, np.nan))), default=0.0) or 1.0
    for gene, (x, y) in where.items():
        value = shift.get(gene, np.nan)
        kind, strength = "unmeasured", 1.0
        if hops[gene] == 0:
            kind = "target"
        elif np.isfinite(value):
            kind, strength = ("up" if value > 0 else "down"), 0.2 + 0.8 * min(abs(value) / largest, 1.0)
        hint = f"{gene}: measured Δ {number(value, 2)}"
        body += [_dot(x, y, 6, "under"), _dot(x, y, 6, f"node {kind}", hint, strength)]
        body.append(_text(x + 10, y + 4, gene[:13], "gene halo"))
    return _svg(height, alt, body, "network")


def grid(
    rows: Sequence[str],
    columns: Sequence[str],
    values: np.ndarray,
    *,
    threshold: float | None,
    tone: str,
    label: str,
    alt: str,
) -> Markup:
    """Shares [R, C] from 0 to 1 as bars, a column of them for each context; those above the threshold are filled.

    A share that is not finite is left out; without a threshold all are filled.
    """
    left, top, row = 14 + 6.8 * max((len(name[:13]) for name in rows), default=0), 26.0, 17.0
    pitch = (WIDTH - left) / max(len(columns), 1)
    wide, bottom = min(pitch - 8, 96.0), top + row * len(rows)
    body = []
    for j, column in enumerate(columns):
        x = left + pitch * j
        room = int(pitch / 5.8)
        title = f"<title>{escape(column)}</title>" if len(column) > room else ""
        name = column if len(column) <= room else f"{column[: room - 1]}…"
        body.append(f'<text x="{x:.1f}" y="{top - 8:.1f}" class="tick">{escape(name)}{title}</text>')
        body.append(_line(x, top - 2, x, bottom, "zero"))
        if threshold is not None:
            body.append(_line(x + threshold * wide, top - 2, x + threshold * wide, bottom, "ideal"))
    for i, name in enumerate(rows):
        y = top + row * (i + 0.5)
        body.append(_text(left - 8, y + 4, name[:13], "gene", "end"))
        for j, value in enumerate(values[i].tolist()):
            if np.isfinite(value):
                kind = "kept" if threshold is None or value > threshold else "dropped"
                size = f'x="{left + pitch * j:.1f}" y="{y - 5:.1f}" width="{max(value * wide, 0.8):.1f}" height="10"'
                hint = escape(f"{name} in {columns[j]}: {label} {number(value, 2)}")
                body.append(f'<rect {size} class="{kind} {tone}"><title>{hint}</title></rect>')
    return _svg(bottom + 6, alt, body, "grid")


def curve(epochs: np.ndarray, values: np.ndarray, *, tone: str, best: float | None, alt: str) -> Markup:
    """One series over epochs [T], gaps skipped; `best` marks the epoch whose weights were kept."""
    left, right, top, bottom = 44.0, WIDTH - 8.0, 10.0, 168.0
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    pad = 0.06 * (high - low or 1.0)
    low, high = low - pad, high + pad
    first, last = float(epochs.min()), float(epochs.max())

    def across(epoch: float) -> float:
        return left + (epoch - first) / ((last - first) or 1.0) * (right - left)

    def up(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    body = []
    for tick in _ticks(low, high):
        body.append(_line(left, up(tick), right, up(tick), "grid"))
        body.append(_text(left - 6, up(tick) + 3.5, _short(tick), "tick", "end"))
    body += [_text(across(t), bottom + 15, _short(t), "tick", "middle") for t in _ticks(first, last)]
    if best is not None:
        side = ("end", -5) if across(best) > WIDTH / 2 else ("start", 5)
        body += [
            _line(across(best), top, across(best), bottom, "ideal"),
            _text(across(best) + side[1], bottom - 6, f"epoch {best:.0f} kept", "tick", side[0]),
        ]
    points = [(across(e), up(v)) for e, v in zip(epochs.tolist(), values.tolist(), strict=True) if np.isfinite(v)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    body += [f'<path class="series {tone}" d="M{path}"/>', _dot(*points[-1], 3.2, f"mover {tone}")]
    return _svg(bottom + 22, alt, body, "curve")
