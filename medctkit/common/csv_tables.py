"""CSV tables as people send them: read as text, with errors that name row, column and value.

Spreadsheets leave their marks: a byte order mark, semicolons, decimal commas, empty rows and columns. What
has one meaning is read; what has none or two is refused. Rows are counted as a spreadsheet shows them: the
header is row 1, and a text with line breaks in it stays one row. A text that a spreadsheet would run as a formula is
written with an apostrophe before it, which is taken off again when it is read.
"""

import csv
import io
import os
import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path

import pandas as pd

from medctkit.common.atomic import replacing
from medctkit.common.text import listed

_DELIMITERS = ",;\t"
_HEADER = 100_000  # characters that the header is looked for in
_DECIMAL_COMMA = r"([+-]?\d+),(\d+)"
_THOUSANDS = r"[+-]?[1-9]\d{0,2},\d{3}"  # 1,250 is 1250 to some and 1.25 to others
_FORMULA = re.compile(r"(?!'*[+-]?[\d.,]+(e[+-]?\d+)?$)'*\s*[=+@＝＋－＠\t\r-]", re.I)


def write_table(table: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write a CSV table, whole or not at all; `read_table` gives its texts back as they were.

    Raises:
        ValueError: a text that UTF-8 can't hold, such as a file's name in another encoding.
    """

    def escaped(cell: object) -> object:
        return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell

    # a lone carriage return would end the row for some readers
    table = table.replace(r"\r\n?", "\n", regex=True).rename(columns=escaped)
    texts = table.select_dtypes(exclude="number").map(escaped)
    with replacing(path) as temporary:
        try:
            table.assign(**texts).to_csv(temporary, index=False, lineterminator="\n")
        except UnicodeEncodeError as error:
            near = error.object[max(0, error.start - 60) : error.end + 20]
            raise ValueError(f"{path}: {near!a} is not UTF-8; rename the file or folder with this name") from None


def begins_with(path: str | os.PathLike, columns: Iterable[str]) -> bool:
    """Whether the first columns of a table that `write_table` wrote are these; False for anything else."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(",".join(columns))


def read_table(
    path: str | os.PathLike,
    required: Collection[str],
    optional: Collection[str] | None = None,
    wrong: dict[int, str] | None = None,
) -> pd.DataFrame:
    """Read a CSV table, separated by commas, semicolons or tabs, in UTF-8 (or UTF-16 with its mark).

    Args:
        path: the file.
        required: columns it must have.
        optional: further columns to keep where it has them; None: all.
        wrong: gets rows that can't be read, by their number, with what is wrong; they are left out then.

    Returns:
        Every cell as text, "" where empty; the index is the row in the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable text, a quote that is never closed, rows of unequal length, a required column
            that is missing or a column that is there twice. The message names the file and the row.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such table")
    text, broken = _decode(path)
    delimiter = max(_DELIMITERS, key=lambda mark: len(set(_header(text, mark)) & set(required)))
    rows = _rows(path, text, delimiter)
    if not rows:
        raise ValueError(f"{path}: the table is empty; expected a header with the columns {list(required)}")
    number, header = next(iter(rows.items()))
    found = {
        number: f"row {number} has {len(row)} cells, the header {len(header)}. A text with a {delimiter!r} in it needs "
        "quotes around it"
        for number, row in rows.items()
        if len(row) != len(header)
    } | (_broken_text(rows, header) if broken else {})
    if found and (wrong is None or number in found):
        raise ValueError(f"{path}: {found.get(number) or listed(found.values())}")
    if wrong is not None:
        wrong |= found
    del rows[number]
    header = [_unescaped(name.strip()) for name in header]
    check_columns(header, required, str(path))
    kept = [i for i, name in enumerate(header) if optional is None or name in required or name in optional]
    cells = [[_unescaped(row[i]) for i in kept] for n, row in rows.items() if n not in found]
    return pd.DataFrame(cells, index=[n for n in rows if n not in found], columns=[header[i] for i in kept], dtype=str)


def _unescaped(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell[1:]) else cell


def _decode(path: Path) -> tuple[str, bool]:
    """The text of a file, and whether there is anything in it that can't be text."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        # bytes that are no UTF-8 become lone surrogates, by which their cell is found
        return data.decode("utf-8-sig", errors="surrogateescape"), True
    return text, "\0" in text


def _header(text: str, delimiter: str) -> list[str]:
    reader = csv.reader(io.StringIO(text[:_HEADER], newline=""), delimiter=delimiter)
    return [name.strip() for name in next(reader, [])]


def _rows(path: Path, text: str, delimiter: str) -> dict[int, list[str]]:
    """By their numbers all rows that aren't empty, without the empty cells that a spreadsheet appends."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: dict[int, list[str]] = {}
    width = number = 0
    try:
        for number, row in enumerate(reader, 1):
            if not any(row):
                continue
            width = width or max(i for i, name in enumerate(row) if name) + 1
            rows[number] = row if any(row[width:]) else row[:width]
    except csv.Error as error:
        raise ValueError(
            f"{path} row {number + 1}: a quotation mark is never closed, or text follows after it ({error}); "
            "save the table as CSV again"
        ) from None
    return rows


def _broken_text(rows: dict[int, list[str]], header: list[str]) -> dict[int, str]:
    """By its number what is wrong with each row that has a cell of other bytes than text in UTF-8."""
    wrong: dict[int, str] = {}
    for number, row in rows.items():
        for i, cell in enumerate(row):
            found = cell.encode("utf-8", errors="surrogateescape")
            if "\0" in cell or found.decode("utf-8", errors="replace") != cell:
                column = header[i] if row is not header and i < len(header) else f"number {i + 1}"
                wrong.setdefault(
                    number,
                    f"row {number}, column {column!r}: got {found[:80]!r}, which is not text in UTF-8; "
                    "save the table as 'CSV UTF-8', so that no letter has to be guessed",
                )
    return wrong


def check_columns(found: Iterable[str], required: Collection[str], where: str) -> None:
    """Refuse a header with a column twice or without a required one.

    Raises:
        ValueError: names the columns, and the ones that may be meant.
    """
    found = list(found)
    missing = [name for name in required if name not in found]
    if missing:
        others = [name for name in found if name not in required]
        meant = {name: close[0] for name in missing if (close := get_close_matches(name, others, 1))}
        hint = "".join(f"; {other!r} may be meant for {name!r}" for name, other in meant.items())
        raise ValueError(f"{where} lacks the column(s) {missing}{hint}; expected {list(required)}")
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: the column(s) {twice} occur more than once; keep one of each")


def to_numbers(column: pd.Series) -> pd.Series:
    """Turn a column of text into numbers; a cell that isn't one keeps its text.

    A decimal comma is read where it can't be a thousands separator. Whole numbers become integers, also where
    they are written as "1.0"; empty cells become missing values.
    """
    text = column.str.strip()
    comma = text.str.fullmatch(_DECIMAL_COMMA) & ~text.str.fullmatch(_THOUSANDS)
    numbers = pd.to_numeric(text.where(~comma, text.str.replace(",", ".", regex=False)), errors="coerce").astype(float)
    wrong = numbers.isna() & (text != "")
    if wrong.any():
        return numbers.astype(object).mask(wrong, column).mask(text == "", None)
    whole = numbers.dropna()
    if len(whole) and (whole % 1 == 0).all() and (whole.abs() < 2**53).all():
        return numbers.astype("Int64" if len(whole) < len(numbers) else "int64")
    return numbers


def given(column: pd.Series) -> pd.Series:
    """Which cells hold anything but blanks (bool)."""
    return column.notna() & (column.astype(str).str.strip() != "")


def first_row(table: pd.DataFrame, keys: object) -> pd.Series:
    """For each row the row (text) in which its group begins: the first with the same keys, as `groupby` takes them."""
    return pd.Series(table.index.astype(str), index=table.index).groupby(keys).transform("first")


def wrong_cells(where: str, table: pd.DataFrame, rules: Iterable[tuple]) -> list[tuple[int, str]]:
    """The cells that a rule finds wrong, in the order of the rows: place of the row, and a text that begins `where`.

    `rules` are (column, wrong, expected): which rows are wrong (bool), and what was expected, one text or a series with
    a text for each row. The index of `table` holds the rows in the file.
    """
    found = []
    for column, wrong, expected in rules:
        cells = table[column].astype(object).to_numpy()
        for at in map(int, wrong.to_numpy(dtype=bool).nonzero()[0]):
            wanted = expected if isinstance(expected, str) else expected.iloc[at]
            text = f"{where} row {table.index[at]}, column {column!r}: got {cells[at]!r:.100}, expected {wanted}"
            found.append((at, text))
    return sorted(found, key=lambda cell: cell[0])


def refuse_wrong(where: str, table: pd.DataFrame, rules: Iterable[tuple]) -> None:
    """Refuse a table with wrong cells; see `wrong_cells`.

    Raises:
        ValueError: lists the first wrong rows, each with its column, its value and what was expected.
    """
    if found := wrong_cells(where, table, rules):
        raise ValueError(listed([text for _, text in found]))
