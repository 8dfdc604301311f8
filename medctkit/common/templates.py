"""Pages from templates: the files in `medctkit/assets/pages`, filled by Jinja. What is filled into HTML is escaped.

Templates know two filters: `code`, which escapes a text and makes `...` in backticks code, and `cell`, which keeps a
value on its line of Markdown, or in its cell of a table.
"""

import html
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from medctkit.common.text import markdown


def filled(template: str, **values: Any) -> str:
    """A template of that name, filled.

    Raises:
        jinja2.UndefinedError: a value that the template needs is not given.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("medctkit", "assets/pages"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    safe = environment.filters["safe"]
    environment.filters["code"] = lambda text: safe(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", html.escape(text)))
    environment.filters["cell"] = markdown
    return environment
