"""How the reproduction report is written down: pieces of a page, as one self-contained HTML file and as Markdown."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Block:
    """A piece of the report: a heading, a paragraph, a table or a figure, with what has to be said about it."""

    kind: str
    text: str
    content: pd.DataFrame | Figure | None = None
    name: str = ""


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
.banner { background: #fff3cd; border-left: 6px solid #e69f00; padding: .7rem 1rem; font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 1.5rem; }
caption { text-align: left; color: #555; padding-bottom: .3rem; } img { max-width: 100%; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top; }
figure { margin: 1rem 0 2rem; } figcaption { color: #555; font-size: 13px; } code { background: #f3f3f3; }
td.verdict { font-weight: 600; white-space: nowrap; }
"""


def _code(text: str) -> str:
    """Escaped, with `...` as code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def to_html(page: Sequence[Block], pictures: dict[str, bytes]) -> str:
    """The report as one HTML page, figures inside."""
    out = []
    for block in page:
        text = _code(block.text)
        if block.kind == "title":
            out.append(f"<h1>{text}</h1>")
        elif block.kind == "heading":
            out.append(f"<h2>{text}</h2>")
        elif block.kind == "banner":
            out.append(f'<p class="banner" role="note">{text}</p>')
        elif block.kind == "text":
            out.append(f"<p>{text}</p>")
        elif block.kind == "figure":
            data = base64.b64encode(pictures[block.name]).decode()
            alt = html.escape(block.text, quote=True)
            out.append(
                f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
            )
        else:
            head = "".join(f'<th scope="col">{html.escape(str(c))}</th>' for c in block.content.columns)
            rows = "".join(
                "<tr>"
                + "".join(
                    f"<td{' class=verdict' if column == 'verdict' else ''}>{html.escape(str(value))}</td>"
                    for column, value in zip(block.content.columns, row, strict=True)
                )
                + "</tr>"
                for row in block.content.itertuples(index=False)
            )
            out.append(
                f'<div class="scroll"><table><caption>{text}</caption><thead><tr>{head}</tr></thead>'
                f"<tbody>{rows}</tbody></table></div>"
            )
    title = html.escape(page[0].text)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
        + "\n".join(out)
        + "\n</body></html>\n"
    )


def to_markdown(page: Sequence[Block]) -> str:
    """The report as Markdown; figures are linked."""

    def cell(value) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    out = []
    for block in page:
        if block.kind in ("title", "heading"):
            out.append(f"{'#' if block.kind == 'title' else '##'} {block.text}")
        elif block.kind == "banner":
            out.append(f"> **{block.text}**")
        elif block.kind == "text":
            out.append(block.text)
        elif block.kind == "figure":
            out.append(f"![{block.text.split('.')[0]}](report_figures/{block.name}.png)\n\n*{block.text}*")
        else:
            rows = [block.content.columns, ["---"] * len(block.content.columns), *block.content.itertuples(index=False)]
            out.append("\n".join(f"| {' | '.join(map(cell, row))} |" for row in rows) + f"\n\n*{block.text}*")
    return "\n\n".join(out) + "\n"
