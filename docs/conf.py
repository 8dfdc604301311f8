"""Sphinx: the site is the notebooks as committed, the README, the pages in docs/ and the docstrings.

The source folder is the repository itself (`sphinx-build -c docs . OUT`), so that a link in a notebook is the
same link on a code host, in JupyterLab and on the site.
"""

import builtins
import json
import re
from importlib.metadata import version as version_of

project = "medctkit"
author = "the medctkit authors"
version = release = version_of("medctkit")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    # MathJax from a package, not from a CDN: the site reads offline.
    "sphinx-mathjax-offline",
]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "notebooks/*.ipynb", "medctkit/assets/mini/README.md"]
# Not looked through: what is large, or not ours.
exclude_patterns = [".*", "bench", "build", "data", "dist", "runs", "tests", "tools", "*.egg-info"]
exclude_patterns += ["**.ipynb_checkpoints"]

# Notebooks show what `make render` wrote into them; nothing runs here.
nb_execution_mode = "off"
# A widget needs a kernel, its picture does not: show that, and load no scripts for widgets, which come from a CDN.
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

# `name` in a docstring is a link where there is something of that name.
default_role = "py:obj"
# The fields of a data class are documented by autodoc; napoleon's list of attributes is no second place for them.
napoleon_use_ivar = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = "medctkit"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["static/index.html", "../notebooks/images/viewer.html", "../notebooks/stacks"]
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],
    "show_toc_level": 2,
    # above each notebook: open it in Colab, download it
    "repository_url": "https://github.com/medctkit/medctkit",
    "repository_branch": "main",
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "use_fullscreen_button": False,
}

# Looked at by `make docs-links` only, which needs a network.
linkcheck_ignore = [r"https://huggingface\.co/settings/"]  # asks for a login
linkcheck_timeout = 30
linkcheck_workers = 4

_CODE_OR_SIGN = re.compile(r"(``.+?``|`[^`]+`)|\||(?<=\w)_(?!\w)|\*(?=[\w.]+\))", re.S)


def docstring_is_prose(app, what, name, obj, options, lines: list[str]) -> None:
    """Keep what a docstring says where reStructuredText would read something else into it.

    A norm, |x|, a name with an underscore at its end, t_, and a shape that is unpacked, (1, *shape), are escaped. Of a
    property, the words before a colon are no type: napoleon looks for one in the first line only.
    """
    text = _CODE_OR_SIGN.sub(lambda found: found[1] or "\\" + found[0], "\n".join(lines))
    lines[:] = [""] * (what == "property") + text.split("\n")


def viewers_are_stacks(app, docname: str, source: list[str]) -> None:
    """A viewer needs a kernel: its stack of slices, at the root of the site, needs none."""
    from tools.offline_pages import frame_stack  # here, so that the tests can read this file alone

    if docname.startswith("notebooks/"):
        notebook = json.loads(source[0])
        for output in (output for cell in notebook["cells"] for output in cell.get("outputs", ())):
            frame_stack(output, "../")
        source[0] = json.dumps(notebook)


def figures_have_words(app, doctree) -> None:
    """A figure that a cell drew is named, for those who do not see it, after the section it stands in."""
    from docutils import nodes  # here, so that the tests can read this file without Sphinx

    for image in doctree.findall(nodes.image):
        section = image.parent
        while section is not None and not isinstance(section, nodes.section):
            section = section.parent
        if section is not None:
            image.setdefault("alt", f"Figure of the section: {section.next_node(nodes.title).astext()}")


def names_of_python_are_no_links(app, doctree) -> None:
    """`bytes` in a signature is Python's own, not the one attribute or other of ours that is called so."""
    from sphinx.addnodes import pending_xref

    for link in list(doctree.findall(pending_xref)):
        if link.get("refdomain") == "py" and hasattr(builtins, link["reftarget"]):
            link.replace_self(link.children)


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", docstring_is_prose, priority=400)  # before napoleon's 500
    app.connect("source-read", viewers_are_stacks)
    app.connect("doctree-read", figures_have_words)
    app.connect("doctree-read", names_of_python_are_no_links)
