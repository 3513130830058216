"""A federation's course as one HTML file: metrics against rounds, bytes and hours, and a table. It loads nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from fedmerge.sim.results import FederationResult, RoundResult

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e; --line: #d1d9e0; --mark: #0969da; --paper: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --dim: #9198a1; --line: #3d444d; --mark: #58a6ff; --paper: #0d1117 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1140px; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem }
p { color: var(--dim); margin-top: .25rem; overflow-wrap: anywhere }
.charts { display: flex; flex-wrap: wrap; gap: 1rem }
svg { max-width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: var(--dim) }
.grid { stroke: var(--line); stroke-width: 1 } .curve { fill: none; stroke: var(--mark); stroke-width: 2 }
.dot { fill: var(--mark) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .75rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { color: var(--dim); font-weight: 600 }
"""


def page(result: FederationResult, name: str) -> str:
    """Return the file: for each metric of the merged models, the mean over nodes, a chart over each of three axes."""
    rounds = result.rounds
    sent = list(itertools.accumulate(each.sent_bytes for each in rounds))
    axes = {
        "round": [float(each.round) for each in rounds],
        "MB sent by all nodes": [num_bytes / 1e6 for num_bytes in sent],
        "hours": [each.published_s / 3600 for each in rounds],
    }
    if not rounds[-1].published_s:  # nobody was said to take any time
        del axes["hours"]
    metrics = list(dict.fromkeys(metric for each in rounds for metric in each.metrics))
    parts = [
        f"<h1>{escape(name)}</h1>",
        f"<p>{len(rounds)} rounds, {sum(each.num_deltas for each in rounds)} deltas of {len(result.nodes)} nodes, "
        f"version {escape(result.version)}</p>",
    ]
    if bad := [node for node in result.nodes if node.is_bad]:
        merged, sent_by_bad = sum(node.num_merged for node in bad), sum(node.num_deltas for node in bad)
        are = "is" if len(bad) == 1 else "are"
        parts.append(f"<p>{len(bad)} of the nodes {are} bad: {merged} of their {sent_by_bad} deltas were merged</p>")
    for metric in metrics:
        known = [index for index, each in enumerate(rounds) if metric in each.metrics]
        values = [rounds[index].metrics[metric] for index in known]
        charts = [_chart([xs[index] for index in known], values, label, metric) for label, xs in axes.items()]
        parts += [f"<h2>{escape(metric)}</h2>", '<div class="charts">', *charts, "</div>"]
    parts += ["<h2>Rounds</h2>", _table(rounds, sent, metrics)]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(name)}</title><style>{STYLE}</style></head><body>",
            *parts,
            "</body></html>\n",
        ]
    )


def _table(rounds: Sequence[RoundResult], sent: Sequence[int], metrics: Sequence[str]) -> str:
    headings = ["round", "published, hours", "deltas", "merged", "MB sent", "MB sent so far", *metrics]
    rows = [
        [
            str(each.round),
            f"{each.published_s / 3600:,.3f}",
            f"{each.num_deltas:,}",
            f"{each.num_merged:,}",
            f"{each.sent_bytes / 1e6:,.3f}",
            f"{so_far / 1e6:,.3f}",
            *(f"{each.metrics[metric]:.4g}" if metric in each.metrics else "" for metric in metrics),
        ]
        for each, so_far in zip(rounds, sent, strict=True)
    ]
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _chart(xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str) -> str:
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x_at(value: float) -> float:
        return LEFT + plot_width * _share(value, x_ticks)

    def y_at(value: float) -> float:
        return TOP + plot_height * (1 - _share(value, y_ticks))

    described = escape(f"{y_label} against {x_label}", quote=True)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img"']
    parts[0] += f' aria-label="{described}">'
    for value in y_ticks:
        y = y_at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for value in x_ticks:
        x = x_at(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:.6g}</text>')
    parts.append(
        f'<text x="{LEFT + plot_width / 2:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    points = [(x_at(x), y_at(y)) for x, y in zip(xs, ys, strict=True)]
    parts.append(f'<polyline class="curve" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    for (x, y), x_value, y_value in zip(points, xs, ys, strict=True):
        title = escape(f"{x_label} {x_value:.6g}: {y_value:.6g}")
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{title}</title></circle>')
    return "\n".join([*parts, "</svg>"])


def _share(value: float, marks: Sequence[float]) -> float:
    return (value - marks[0]) / (marks[-1] - marks[0])


def ticks(low: float, high: float) -> list[float]:
    """Return two to eight round numbers, evenly spaced, from at most `low` to at least `high`."""
    largest = max(abs(low), abs(high))
    spread = high - low
    if spread <= 1e-6 * max(largest, 1e-6):  # all the same, as far as labels can tell
        spread = largest if largest > 1e-6 else 1.0
    size = 10.0 ** math.floor(math.log10(spread / 4))
    step = size * next(factor for factor in (1, 2, 5, 10) if spread / (size * factor) <= 5)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
