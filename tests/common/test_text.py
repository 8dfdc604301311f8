"""Texts of others where they go: terminals, spreadsheets, Markdown."""

import csv
import io

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from medctkit.common.csv_tables import read_table, write_table
from medctkit.common.text import as_bytes, markdown, printable

FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0", "＝1+1", " =1+1", "'=1", "''-1+1"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_spreadsheet_runs_no_cell_and_reading_gives_it_back(tmp_path, text):
    table = pd.DataFrame({"name": [text], "@column": ["-1,5"], "n": [-1.5]})
    write_table(table, tmp_path / "t.csv")
    (header, row) = csv.reader(io.StringIO((tmp_path / "t.csv").read_text(), newline=""))
    assert row[0].startswith("'") and header[1] == "'@column" and row[1:] == ["-1,5", "-1.5"], "numbers stay numbers"
    found = read_table(tmp_path / "t.csv", ["name", "@column"])
    assert found["name"].tolist() == [text.replace("\r", "\n")] and found.columns[1] == "@column"


def test_a_text_that_utf_8_cannot_hold_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"t.csv: '.*M\\udcfcller.*' is not UTF-8; rename the file or folder"):
        write_table(pd.DataFrame({"a": ["/data/M\udcfcller"]}), tmp_path / "t.csv")
    assert not list(tmp_path.iterdir())


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1))
def test_any_text_comes_back_from_a_table(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("t") / "t.csv"
    write_table(pd.DataFrame({"a": [text], "b": ["x"]}), file)
    assert read_table(file, ["a"])["a"].tolist() == [text]
    written = next(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"), newline="")))["a"]
    assert written == text and text.strip()[:1] not in set("=@") or written == f"'{text}"


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "![x](http://a/b.png)"]
    + ["a | b", "a\n\n# b", "[x][y]\n\n[y]: http://a", "\\[x](http://a)", "<http://a.b>", "&lt;b&gt;", "a\\|b"],
)
def test_markdown_shows_what_was_written_and_no_more(text):
    page = f"| a |\n| --- |\n| {markdown(text)} |\n"
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(page)
    inline = [child for token in tokens if token.type == "inline" for child in token.children]
    assert {child.type for child in inline} <= {"text", "text_special"}
    assert "".join(child.content for child in inline[1:]) == " ".join(text.split())
    assert sum(token.type == "td_open" for token in tokens) == 1


def test_code_in_a_report_stays_code():
    assert markdown("`medctkit evaluate`, 95 % [0.60, 0.64]") == "`medctkit evaluate`, 95 % [0.60, 0.64]"


@pytest.mark.parametrize(
    ("n", "said"), [(999, "999 B"), (999_499, "999 kB"), (999_700_000, "1 GB"), (1_770_000_000, "1.77 GB")]
)
def test_sizes_have_three_digits(n, said):
    assert as_bytes(n) == said


@pytest.mark.parametrize("text", ["\x1b[31m", "\x9b1m", "\x07", "\u202e", "\u2066", "\udcff", "\r"])
def test_a_terminal_is_not_steered(text):
    assert printable(f"ü\n\t{text}.nii").isprintable() is False  # the line break and the tab
    assert printable(f"ü{text}.nii").isprintable() and printable(f"ü{text}.nii").endswith(".nii")


def test_a_report_quotes_names_without_running_them():
    from medctkit.experiments.report.page import Block, to_markdown

    table = pd.DataFrame({"hospital": ["<script>alert(1)</script>"]})
    page = to_markdown([Block("title", "<b>"), Block("table", "a [x](http://a)", table), Block("text", "<i>")])
    assert not {"<script>", "<b>", "<i>", "](http"} & set(
        part for part in ("<script>", "<b>", "<i>", "](http") if part in page
    )
