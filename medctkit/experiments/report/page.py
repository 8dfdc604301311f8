"""How the reproduction report is written down: pieces of a page, as one self-contained HTML file and as Markdown."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from medctkit.common.templates import filled


@dataclass(frozen=True)
class Block:
    """A piece of the report: a heading, a paragraph, a table or a figure, with what has to be said about it."""

    kind: str
    text: str
    content: Any = None  # a data frame, or what draws the figure
    name: str = ""


def with_ends(row: Mapping[str, float], column: str, sign: str = "") -> str:
    """A value and its 95 % interval, from columns x, x_low and x_high (or value, low and high)."""
    if row[column] is None or row[column] != row[column]:
        return "-"
    prefix = "" if column == "value" else f"{column}_"
    value, low, high = (f"{row[name]:{sign}.3f}" for name in (column, f"{prefix}low", f"{prefix}high"))
    return f"{value} [{low}, {high}]"


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def to_html(page: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    """The report as one HTML page, figures inside."""
    shown = {name: base64.b64encode(picture).decode() for name, picture in pictures.items()}
    return filled("report.html", page=page, pictures=shown)


def to_markdown(page: Sequence[Block]) -> str:
    """The report as Markdown; figures are linked."""
    return filled("report.md", page=page)
