"""Executed notebooks as pages that need neither a kernel nor a network: `make demo` hands them over.

Viewers become their stacks of slices, each a page of its own in a frame, here and on the documentation site; equations
are set by a MathJax that lies beside the pages; the cell for Colab is left out, and parameters are shown once, with the
values that were used.
"""

import html
import itertools
import json
import re
import shutil
from collections.abc import Collection, Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from medctkit.common.atomic import write_text
from medctkit.metrics.scores import BLIND, COLUMNS, ROWS
from tools.notebook_outputs import cleaned

STACK = "medctkit-stack"  # in an output's metadata: the file of its stack
INDEX = Path(__file__).with_name("demo.html")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|attachment:)([^)\s]+)\)")  # to a file; pictures are put in
_PAGE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_js_mathjax %}
<script>MathJax = {tex: {inlineMath: [["$", "$"], ["\\\\(", "\\\\)"]], processEscapes: true}}</script>
<script defer src="mathjax.js"></script>
{% endblock %}"""


def keep_stacks(folder: str, name: str) -> None:
    """In the kernel: from now on a viewer that is shown also leaves its stack in `folder`, and says so."""
    from medctkit.viewers import AttentionViewer, SliceViewer

    numbers = itertools.count(1)

    def keeping(kind: Any, slices: Any) -> None:
        shown = kind._repr_mimebundle_

        def with_stack(self: Any, **kwargs: Any) -> tuple:
            path = Path(folder) / f"{name}-stack-{next(numbers)}.html"
            return shown(self, **kwargs), {STACK: slices(self).to_html(path).name}

        kind._repr_mimebundle_ = with_stack

    keeping(SliceViewer, lambda viewer: viewer)
    keeping(AttentionViewer, lambda viewer: viewer.slices)


def with_stacks_kept(source: Path, folder: Path) -> Any:
    """A notebook whose first code begins by `keep_stacks`, for `execute`; cells keep their numbers."""
    import nbformat

    notebook = nbformat.read(source, as_version=4)
    root = str(Path(__file__).resolve().parents[1])
    code = f"import sys\nsys.path.append({root!r})\nfrom tools.offline_pages import keep_stacks\n"
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = f"{code}keep_stacks({str(folder)!r}, {source.stem!r})\n{first.source}"
    return notebook


def frame_stack(output: Any, folder: str = "") -> None:
    """Where a notebook's output is a viewer with a stack, put the stack in its place, which lies in `folder`."""
    if stack := output.get("metadata", {}).get(STACK):
        source, style = html.escape(folder + stack), "width:100%;height:800px;border:0"
        frame = f'<iframe src="{source}" title="a stack of slices" style="{style}"></iframe>'
        output["data"] = {"text/html": frame}


def write_page(
    source: Path, executed: Path, parameters: Mapping[str, Any], lessons: Collection[str] = ()
) -> tuple[Path, str | None]:
    """Write an executed notebook as a page beside it; of its links to files, those to other `lessons` stay.

    Returns:
        The page, and its first picture as a data URL; None if it has none.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    notebook = cleaned(nbformat.read(source, as_version=4), nbformat.read(executed, as_version=4))
    notebook.cells = [cell for cell in notebook.cells if "colab" not in cell.metadata.get("tags", ())]
    first = None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _LINK.sub(lambda found: _here(found[1], found[2], lessons), cell.source)
        if "parameters" in cell.metadata.get("tags", ()):
            for name, value in parameters.items():
                line = re.compile(rf"^{name} = [^#\n]*?(?=\s*(#|$))", re.M)
                cell.source = line.sub(lambda _, now=f"{name} = {value!r}": now, cell.source)
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            for kind in {"image/png", "image/jpeg"} & set(data) if first is None else ():
                first = f"data:{kind};base64,{data[kind].strip()}"
            frame_stack(output)
    folded = Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": {"hide-input"}})  # imports
    exporter = HTMLExporter(config=folded, raw_template=_PAGE, embed_images=True)
    resources = {"metadata": {"name": source.stem, "path": str(source.parent)}}
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    path = executed.with_suffix(".html")
    write_text(path, page)
    return path, first


def _here(text: str, target: str, lessons: Collection[str]) -> str:
    """A link as it stands in a folder that has the lessons' pages and nothing else of the repository."""
    name, mark, place = target.partition("#")
    return f"[{text}]({Path(name).stem}.html{mark}{place})" if name in lessons else text


def write_index(folder: Path, metrics: Mapping[str, Any], pages: Mapping[Path, str | None]) -> Path:
    """Write `index.html`, the one page to open, and MathJax beside it."""
    found = distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax/tex-svg.js")
    shutil.copyfile(Path(str(found)), folder / "mathjax.js")
    lessons = []
    for path, picture in pages.items():
        first = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
        text = next(("".join(cell["source"]) for cell in first if cell["cell_type"] == "markdown"), path.stem)
        lessons.append((path.name, text.strip().partition("\n")[0].lstrip("# "), picture))
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(INDEX.read_text(encoding="utf-8"))
    page = template.render(metrics=metrics, lessons=lessons, columns=COLUMNS, rows=ROWS, blind=BLIND)
    write_text(folder / "index.html", page)
    return folder / "index.html"
