"""Heat maps side by side, as SVG or PNG: a number in every cell, so that colour is not needed."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree as ET

from fedmerge.cli.output import printable

CELL, MARGIN, TITLE = 56, 150, 40  # pixels
MAX_LABEL_CHARS = 20
POSITIVE, NEGATIVE = (31, 119, 180), (214, 96, 20)  # distinct in every common form of colour blindness


class Panel(NamedTuple):
    """A matrix of values from -1 to 1, None where there is none, with names for its rows and columns."""

    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]


def svg_map(title: str, panels: Sequence[Panel]) -> bytes:
    """Return an SVG document with the `panels` beside each other."""
    width = sum(MARGIN + CELL * len(panel.columns) for panel in panels) + 60
    height = TITLE + MARGIN + CELL * max(len(panel.rows) for panel in panels) + 20
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width} {height}",
            "width": str(width),
            "height": str(height),
            "role": "img",
            "font-family": "sans-serif",
            "font-size": "12",
        },
    )
    ET.SubElement(svg, "title").text = printable(title)
    ET.SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    left = 0
    for panel in panels:
        group = ET.SubElement(svg, "g", {"transform": f"translate({left} {TITLE})"})
        _text(group, 8, -15, panel.caption, anchor="start", weight="bold")
        for j, column in enumerate(panel.columns):
            turned = f"translate({MARGIN + CELL * j + CELL // 2} {MARGIN - 8}) rotate(-60)"
            _text(group, 0, 0, _short(column), anchor="start", transform=turned)
        for i, row in enumerate(panel.rows):
            _text(group, MARGIN - 8, MARGIN + CELL * i + CELL // 2, _short(row), anchor="end")
            for j, value in enumerate(panel.values[i]):
                _cell(group, MARGIN + CELL * j, MARGIN + CELL * i, value, f"{row}, {panel.columns[j]}")
        left += MARGIN + CELL * len(panel.columns)
    document: bytes = ET.tostring(svg, encoding="utf-8", xml_declaration=True)
    return document


def png_map(title: str, panels: Sequence[Panel]) -> bytes:
    """Return a PNG picture with the `panels` beside each other, drawn by matplotlib (of the extra "plots")."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    ends = [tuple(part / 255 for part in colour) for colour in (NEGATIVE, (255, 255, 255), POSITIVE)]
    colours = LinearSegmentedColormap.from_list("agreement", ends)
    colours.set_bad("white")
    widths = [len(panel.columns) + MARGIN / CELL for panel in panels]
    height = max(len(panel.rows) for panel in panels) + MARGIN / CELL + 0.5
    inch = CELL / 96
    figure = Figure(figsize=(sum(widths) * inch * 1.3, height * inch * 1.3), dpi=120, layout="constrained")
    figure.suptitle(_plain(printable(title)))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0], panels, strict=True):
        numbers = [[math.nan if value is None else value for value in row] for row in panel.values]
        axes.imshow(numbers, cmap=colours, vmin=-1, vmax=1)
        axes.set_title(_plain(panel.caption), fontsize=10)
        axes.set_xticks(range(len(panel.columns)), [_plain(_short(label)) for label in panel.columns], rotation=60)
        axes.set_yticks(range(len(panel.rows)), [_plain(_short(label)) for label in panel.rows])
        axes.tick_params(labelsize=8, length=0, labeltop=True, labelbottom=False, top=False, bottom=False)
        for i, row in enumerate(panel.values):
            for j, value in enumerate(row):
                colour = "white" if abs(value or 0) > 0.7 else "black"
                axes.text(j, i, _shown(value), ha="center", va="center", color=colour, fontsize=8)
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        return file.getvalue()


def _plain(text: str) -> str:
    """Return `text` for matplotlib, to which a dollar sign begins a formula."""
    return printable(text).replace("$", r"\$")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:z.2f}"


def _cell(panel: ET.Element, x: int, y: int, value: float | None, where: str) -> None:
    strength = min(1.0, abs(value or 0.0))
    colour = POSITIVE if (value or 0.0) >= 0 else NEGATIVE
    red, green, blue = (round(255 + (part - 255) * strength) for part in colour)
    group = ET.SubElement(panel, "g")
    ET.SubElement(group, "title").text = printable(where)
    sides = {"x": str(x), "y": str(y), "width": str(CELL), "height": str(CELL)}
    ET.SubElement(group, "rect", {**sides, "fill": f"rgb({red},{green},{blue})", "stroke": "white"})
    fill = "white" if strength > 0.7 else "black"
    _text(group, x + CELL // 2, y + CELL // 2, _shown(value), anchor="middle", fill=fill)


def _text(
    parent: ET.Element,
    x: int,
    y: int,
    text: str,
    *,
    anchor: str,
    fill: str = "black",
    weight: str = "normal",
    transform: str | None = None,
) -> None:
    attributes = {"x": str(x), "y": str(y), "text-anchor": anchor, "dominant-baseline": "middle", "fill": fill}
    attributes |= {"font-weight": weight} | ({"transform": transform} if transform else {})
    ET.SubElement(parent, "text", attributes).text = printable(text)


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL_CHARS else f"...{label[3 - MAX_LABEL_CHARS :]}"
