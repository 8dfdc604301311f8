"""Notebook 07's exercises: right answers are praised, slips are named, nothing is given away."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from dicom_peers import write_phantom
from judged import is_open, is_right, is_wrong

from medctkit.deploy.answer import answer, write_answer
from medctkit.findings import FINDINGS

ASKED, STALE = ["north", "south", "north", "south", "north"], [1, 2, 4]  # started anew, with south, before request 2
SCORES = np.random.default_rng(0).random((5, 18))


def log():
    given = SCORES + 1e-7
    given[STALE, 3] += 0.2
    bank = SimpleNamespace(scores=lambda volumes, adapters: SCORES)
    return pd.DataFrame(given, columns=FINDINGS).assign(adapter=ASKED), bank, "volumes"


def equal(export, model, volumes, batches=(1, 2, 3), tolerance=1e-6):
    for n in batches:
        try:
            found = export(volumes[:n])
        except RuntimeError:
            return False
        own = model(volumes[:n])
        if found.shape != own.shape or not np.abs(found - own).max() <= tolerance:
            return False
    return True


def with_nan(export, model, volumes):
    return equal(export, model, volumes) or bool(np.isnan(export(volumes[:2])).any())


BEFORE, THRESHOLDS = np.full((3, 18), 0.5), np.full(18, 0.52)
AFTER = BEFORE.copy()
AFTER[0, 2], AFTER[1, 3], AFTER[2, 4] = 0.1, 0.54, 0.6  # the first is below its threshold, before and after
FLIPS = (["a", "b", "c"], THRESHOLDS, BEFORE, AFTER)


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        ("07.1", ([0, 3], *log()), "answered rightly"),
        ("07.1", (range(5), *log()), "rounding"),
        ("07.1", ([1, 3], *log()), "not asked of north"),
        ("07.1", ([1, 2, 5], *log()), "no request 5"),
        ("07.1", (np.isin(range(5), STALE), *log()), "number of a request, a single number; got bool"),
        ("07.1", ([0, 1], *log()), "1 of yours were answered rightly, 2 stale ones are missing"),
        ("07.2", (lambda e, m, v: equal(e, m, v, (2,)),), "fixed at 2"),
        ("07.2", (lambda e, m, v: equal(e, m, v, (5,)),), "fixed at 5"),
        ("07.2", (lambda e, m, v: np.allclose(e(v[:1]), m(v[:1])),), "Got: 1 Expected: 2"),
        ("07.2", (lambda e, m, v: equal(e, m, v, (1,)),), "change each other"),
        ("07.2", (lambda e, m, v: equal(e, m, v, tolerance=0),), "rounding"),
        ("07.2", (lambda e, m, v: equal(e, m, v, tolerance=1e-2),), "off by 0.001"),
        ("07.2", (with_nan,), "NaN"),
        ("07.2", (lambda e, m, v: 0.5,), "does not say True"),
        ("07.3", (("a", FINDINGS[2]), *FLIPS), "largest change of all"),
        ("07.3", (("a", FINDINGS[0]), *FLIPS), "stays on its side"),
        ("07.3", (("b", FINDINGS[3]), *FLIPS), "another answer flips with 0.100"),
        ("07.3", (("d", FINDINGS[3]), *FLIPS), "no 'd'"),
        ("07.3", ((2, 4), *FLIPS), "no '4'"),
    ],
)
def test_what_is_wrong_is_said(name, answer, said):
    is_wrong(name, *answer, because=said)


def test_right_answers_are_praised():
    assert "up to 0.20" in is_right("07.1", STALE, *log())
    assert "medctkit export" in is_right("07.2", equal)
    assert "one of 2 of 54 answers" in is_right("07.3", ("c", FINDINGS[4]), *FLIPS)
    is_open("07.2", lambda e, m, v: None)


def complaints(report, digests=("base", "adapter", "vocabulary")):
    texts = [str(element.value) for element in report.iterall() if element.keyword == "TextValue"]
    missing = not all(any(text.startswith(f"{name}: ") for text in texts) for name in digests)
    final, verified = report.PreliminaryFlag == "FINAL", report.VerificationFlag == "VERIFIED"
    return ["final"] * final + ["verified"] * verified + ["no digest"] * missing


@pytest.mark.slow
def test_what_is_wrong_with_a_report(tmp_path):
    from pydicom import dcmread

    facts = {"version": "1", "base": "b", "adapter": "a", "vocabulary": "v", "prompts": "paper"}
    picture = np.zeros((4, 4, 3), np.uint8)
    made = answer(write_phantom(tmp_path / "study")[1], dict.fromkeys(FINDINGS, 0.5), facts, picture)
    report = dcmread(write_answer(made, tmp_path)[0])
    assert "archive" in is_right("07.4", complaints, report)
    is_wrong("07.4", lambda r: "final", report, because="as it was answered you say ['final']; expected nothing")
    is_wrong("07.4", lambda r: [], report, because="a final report you say nothing")
    is_wrong("07.4", lambda r: complaints(r, ("base",)), report, because="the digest of the adapter")
