"""The findings that are asked, learnt and measured: the 18 of CT-RATE, or a list of your own.

Names and order of `CT_RATE` are those of the zero-shot evaluation of CT-CLIP (arXiv 2403.17834) and of the label
columns of CT-RATE; shares are of scans positive in its training split. The table is a data file,
`assets/findings.csv`, so that it can be read without Python. Phantoms have these findings and no others.

`FINDINGS` is the list in use, from beginning to end of a process. It is CT-RATE's, unless the environment variable
`MEDCTKIT_FINDINGS` names a table of your own, see `read_findings`.
"""

import csv
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

VARIABLE = "MEDCTKIT_FINDINGS"
# What training says where a table has no wordings; the evaluation asks in other words.
STATED = ("{finding} is seen.", "{finding} is noted.", "There is {finding}.")
DENIED = ("No {finding} is seen.", "{finding} is not noted.", "There is no {finding}.")

_TABLE = list(csv.DictReader((files("medctkit") / "assets" / "findings.csv").read_text().splitlines()))
CT_RATE: tuple[str, ...] = tuple(row["finding"] for row in _TABLE)
CT_RATE_PREVALENCE: dict[str, float] = {row["finding"]: float(row["train_percent"]) / 100 for row in _TABLE}
GROUPS: dict[str, str] = {row["finding"]: row["group"] for row in _TABLE}  # of CT-RATE's
WINDOW: dict[str, str] = {row["finding"]: row["window"] for row in _TABLE}  # of CT-RATE's: the one that shows it


@dataclass(frozen=True)
class Listed:
    """A row of a table of findings: share of scans that have it (NaN: unknown), sentences that state and deny it."""

    prevalence: float
    stated: tuple[str, ...]
    denied: tuple[str, ...]


def read_findings(path: str | os.PathLike) -> dict[str, Listed]:
    """Read a table of findings of your own, by their names.

    It is CSV with commas, in UTF-8, with a column `finding`; as prompts put the names into sentences, words serve
    better than codes. If you like, `train_percent` says how many of 100 scans have it, from which predictive values are
    computed, and `stated` and `denied` how training says it, sentences with | between them. Other columns are not read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no text, no column `finding`, no row; a name that is empty, there twice (case and punctuation do
            not count) or `mean`; a number that is no percentage; a sentence that is a prompt of the evaluation.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such table of findings; {VARIABLE} names it")
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not CSV in UTF-8 ({error})") from None
    if not rows or "finding" not in rows[0]:
        raise ValueError(f"{path}: expected a header with the column 'finding', commas, and a row for each finding")
    found: dict[str, Listed] = {}
    known = {"mean": "the row of the means"}
    for number, row in enumerate(rows, 1):
        cells = {name: (cell or "").strip() for name, cell in row.items() if isinstance(name, str)}
        name, where = cells["finding"], f"{path}, finding {number} {cells['finding']!r}"
        key = re.sub(r"\W+", "-", name.lower())
        if not name or None in row:
            raise ValueError(f"{where}: expected a name, and no more cells than the header has; quote what has commas")
        if key in known:
            raise ValueError(f"{where} has the name of {known[key]}; each needs one of its own")
        known[key] = f"finding {number}"
        found[name] = Listed(
            _share(where, cells.get("train_percent", "")),
            *(_wordings(where, name, cells.get(side, ""), usual) for side, usual in _SIDES.items()),
        )
    return found


_SIDES = {"stated": STATED, "denied": DENIED}


def _share(where: str, cell: str) -> float:
    try:
        share = float(cell) / 100 if cell else math.nan
    except ValueError:
        share = -1
    if share < 0 or share > 1:
        raise ValueError(f"{where}: train_percent is {cell!r}; expected a number from 0 to 100, or nothing")
    return share


def _wordings(where: str, finding: str, cell: str, usual: Sequence[str]) -> tuple[str, ...]:
    own = [sentence.strip() for sentence in cell.split("|") if sentence.strip()]
    if asked := [sentence for sentence in own if is_asked(finding, sentence)]:
        raise ValueError(f"{where}: {asked[0]!r} is a prompt of the evaluation, which no training may see; reword it")
    return tuple(own or [sentence.replace("{finding}", finding) for sentence in usual])


def is_asked(finding: str, sentence: str) -> bool:
    """Whether a sentence is one of the two prompts that the evaluation asks of a finding."""
    prompts = f"{finding} is present".lower(), f"{finding} is not present".lower()
    return sentence.strip().rstrip(".").lower() in prompts


_own = read_findings(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else {}

FINDINGS: tuple[str, ...] = tuple(_own) or CT_RATE
PREVALENCE: dict[str, float] = {name: row.prevalence for name, row in _own.items()} or CT_RATE_PREVALENCE
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {n: (r.stated, r.denied) for n, r in _own.items()}
# What a result that is kept says of the list; nothing of CT-RATE's, which once was the only one.
FACTS: dict[str, list[str]] = {} if FINDINGS == CT_RATE else {"findings": list(FINDINGS)}


def refuse_other_findings(what: str, there: Sequence[str] = CT_RATE) -> None:
    """Refuse `what` was made with other findings, or in another order, than those in use: a ValueError has both."""
    if tuple(there) != FINDINGS:
        raise ValueError(
            f"{what}: made with the findings {', '.join(there)}; in use are {', '.join(FINDINGS)}. The environment "
            f"variable {VARIABLE} chooses them: a table of your own or, unset, CT-RATE's 18"
        )
