"""docs/extending.md: each worked example runs as it stands."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
SECTIONS = {text.splitlines()[0]: text for text in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]}


@pytest.mark.parametrize("title", SECTIONS)
def test_the_worked_example_runs(title, tmp_path, monkeypatch):
    """The Python blocks of a section, one after the other, in an empty folder."""
    blocks = re.findall(r"^```python\n(.*?)^```", SECTIONS[title], flags=re.M | re.S)
    assert blocks, title
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, f"{PAGE.name}: {title}", "exec"), names)
