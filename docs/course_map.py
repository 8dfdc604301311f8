"""The map of the course, from the table in each notebook's opening, so that no page tells other times than they do.

`python docs/course_map.py` writes it between the two marks of each page of `PAGES`.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/teaching.md",)
BEGIN, END = "<!-- map of the course: begin (python docs/course_map.py) -->", "<!-- map of the course: end -->"
COLUMNS = ("time", "memory", "GPU", "data")


def opening(notebook: Path) -> tuple[str, dict[str, str]]:
    """Title and table of a notebook's first cell.

    Args:
        notebook: the .ipynb file.

    Raises:
        ValueError: the first cell has no title, or no table with `COLUMNS` and one row.
    """
    source = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    title = re.match(r"# (.+)", source)
    rows = [[cell.strip() for cell in line.strip(" |").split("|")] for line in re.findall(r"^\|.*\|$", source, re.M)]
    if not title or len(rows) != 3 or rows[0] != list(COLUMNS) or len(rows[2]) != len(COLUMNS):
        raise ValueError(
            f"{notebook.name}: its first cell needs a title, `# ...`, and a table with the columns "
            f"{', '.join(COLUMNS)} and one row"
        )
    return title[1], dict(zip(COLUMNS, rows[2], strict=True))


def course_map(to_notebooks: str) -> str:
    """The map as a Markdown table, a row for each notebook in the order of the course.

    Args:
        to_notebooks: the folder of the notebooks, as a link from the page that shows the map.
    """
    lines = [f"| notebook | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        title, row = opening(notebook)
        lines.append(f"| [{title}]({to_notebooks}/{notebook.name}) | {' | '.join(row.values())} |")
    return "\n".join(lines)


def with_map(text: str) -> str:
    """The text of a page in docs/, with the map as it is now between its marks.

    Raises:
        ValueError: the marks are not there once each, in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r}, once each and in this order")
    return f"{before}{BEGIN}\n\n{course_map('../notebooks')}\n\n{END}{after}"


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(with_map(path.read_text(encoding="utf-8")), encoding="utf-8")
