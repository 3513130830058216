"""A heat map as an SVG file: square matrices side by side, a number in every cell, so that colour is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as ET

from fedmerge.cli.output import printable

CELL, MARGIN, TITLE = 56, 150, 40  # pixels
MAX_LABEL_CHARS = 20
POSITIVE, NEGATIVE = (31, 119, 180), (214, 96, 20)  # distinct in every common form of colour blindness

Matrix = Sequence[Sequence[float | None]]


def heat_map(title: str, labels: Sequence[str], panels: Mapping[str, Matrix]) -> bytes:
    """Return an SVG document with one panel per square matrix of `panels`, by caption, values from -1 to 1 or None.

    Row and column `i` of every matrix belong to `labels[i]`.
    """
    side = MARGIN + CELL * len(labels)
    width, height = side * len(panels) + 60, TITLE + MARGIN + CELL * len(labels) + 20
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
    for position, (caption, matrix) in enumerate(panels.items()):
        panel = ET.SubElement(svg, "g", {"transform": f"translate({position * side} {TITLE})"})
        _text(panel, 8, -15, caption, anchor="start", weight="bold")
        for i, label in enumerate(labels):
            middle = MARGIN + CELL * i + CELL // 2
            _text(panel, MARGIN - 8, middle, _short(label), anchor="end")
            _text(panel, 0, 0, _short(label), anchor="start", transform=f"translate({middle} {MARGIN - 8}) rotate(-60)")
            for j, value in enumerate(matrix[i]):
                _cell(panel, MARGIN + CELL * j, MARGIN + CELL * i, value, f"{label}, {labels[j]}")
    document: bytes = ET.tostring(svg, encoding="utf-8", xml_declaration=True)
    return document


def _cell(panel: ET.Element, x: int, y: int, value: float | None, where: str) -> None:
    strength = min(1.0, abs(value or 0.0))
    colour = POSITIVE if (value or 0.0) >= 0 else NEGATIVE
    red, green, blue = (round(255 + (part - 255) * strength) for part in colour)
    group = ET.SubElement(panel, "g")
    ET.SubElement(group, "title").text = printable(where)
    sides = {"x": str(x), "y": str(y), "width": str(CELL), "height": str(CELL)}
    ET.SubElement(group, "rect", {**sides, "fill": f"rgb({red},{green},{blue})", "stroke": "white"})
    shown = "-" if value is None else f"{value:z.2f}"
    _text(group, x + CELL // 2, y + CELL // 2, shown, anchor="middle", fill="white" if strength > 0.7 else "black")


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
