"""Notebook 07's exercises: right answers are praised, slips are named, nothing is given away."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from dicom_peers import write_phantom
from judged import is_open, is_right, is_wrong

from medctkit.deploy.answer import answer, write_answer
from medctkit.findings import FINDINGS

ASKED = ["north", "south", "north", "south", "north"]
STALE = [1, 2, 4]  # it began with north, and began again with south before request 2


@pytest.fixture(scope="module")
def requests():
    right = np.random.default_rng(0).random((5, 18))
    given = right + 1e-7
    given[STALE, 3] += 0.2
    log = pd.DataFrame(given, columns=FINDINGS).assign(adapter=ASKED)
    return log, SimpleNamespace(scores=lambda volumes, adapters: right), "volumes"


@pytest.mark.parametrize(
    ("stale", "said"),
    [
        ([0, 3], "answered rightly"),
        (range(5), "rounding"),
        ([1, 3], "not asked of north"),
        ([1, 2, 5], "no request 5"),
        ([0, 1], "1 of yours were answered rightly, 2 stale ones are missing"),
        (["one"], "a single number"),
    ],
)
def test_stale_prompts(requests, stale, said):
    is_wrong("07.1", stale, *requests, because=said)
    assert "up to 0.20" in is_right("07.1", STALE, *requests)
    is_open("07.1", ..., *requests)


def careful(export, model, volumes, batches=(1, 2, 3), tolerance=1e-6):
    for n in batches:
        try:
            found = export(volumes[:n])
        except RuntimeError:
            return False
        own = model(volumes[:n])
        if found.shape != own.shape or not np.abs(found - own).max() <= tolerance:
            return False
    return True


def by_comparison(export, model, volumes):
    return careful(export, model, volumes) or bool(np.isnan(export(volumes[:2])).any())


@pytest.mark.parametrize(
    ("accepts", "said"),
    [
        (lambda e, m, v: careful(e, m, v, (2,)), "fixed at 2"),
        (lambda e, m, v: np.allclose(e(v[:1]), m(v[:1])), "Got: 1 Expected: 2"),
        (lambda e, m, v: careful(e, m, v, (1,)), "change each other"),
        (lambda e, m, v: careful(e, m, v, tolerance=0), "rounding"),
        (lambda e, m, v: careful(e, m, v, tolerance=1e-2), "off by 0.001"),
        (by_comparison, "NaN"),
        (lambda e, m, v: 1.0, "True or False"),
        (lambda e, m, v: True, "lets through"),
    ],
)
def test_a_check_of_an_export(accepts, said):
    is_wrong("07.2", accepts, because=said)


def test_a_check_that_holds():
    assert "medctkit export" in is_right("07.2", careful)
    is_open("07.2", lambda e, m, v: None)


def test_the_largest_flip():
    before = np.full((3, 18), 0.5)
    after, names, thresholds = before.copy(), ["a", "b", "c"], np.full(18, 0.52)
    after[0, 2], after[1, 3], after[2, 4] = 0.1, 0.54, 0.6  # the first stays below
    given = names, thresholds, before, after
    assert "one of 2 of 54 answers" in is_right("07.3", ("c", FINDINGS[4]), *given)
    for wrong, said in {
        ("a", FINDINGS[2]): "largest change of all",
        ("a", FINDINGS[0]): "stays on its side",
        ("b", FINDINGS[3]): "another answer flips with 0.100",
        ("d", FINDINGS[3]): "no 'd'",
        (2, 4): "no '4'",
    }.items():
        is_wrong("07.3", wrong, *given, because=said)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    from pydicom import dcmread

    folder = tmp_path_factory.mktemp("study")
    facts = {"version": "1", "base": "b", "adapter": "a", "vocabulary": "v", "prompts": "paper"}
    made = answer(write_phantom(folder)[1], dict.fromkeys(FINDINGS, 0.5), facts, np.zeros((4, 4, 3), np.uint8))
    return dcmread(write_answer(made, folder / "out")[0])


def complaints(report, digests=("base", "adapter", "vocabulary")):
    texts = [str(element.value) for element in report.iterall() if element.keyword == "TextValue"]
    if report.PreliminaryFlag != "PRELIMINARY":
        yield "final"
    if report.VerificationFlag != "UNVERIFIED":
        yield "verified"
    if not all(any(text.startswith(f"{name}: ") for text in texts) for name in digests):
        yield "no digest"


def test_what_is_wrong_with_a_report(report):
    assert "archive" in is_right("07.4", lambda r: list(complaints(r)), report)
    is_wrong("07.4", lambda r: "final", report, because="as it was answered you say ['final']; expected nothing")
    is_wrong("07.4", lambda r: [], report, because="a final report you say nothing")
    is_wrong("07.4", lambda r: set(complaints(r, ("base",))), report, because="the digest of the adapter")
