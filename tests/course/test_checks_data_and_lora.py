"""The exercises of notebooks 00 to 02: right answers pass, typical wrong ones are told what is wrong with them."""

import re

import numpy as np
import pandas as pd
import pytest
from judged import is_open, is_right

from medctkit.course import checks_data
from medctkit.course.checks_lora import _trainable
from medctkit.course.exercises import judge
from medctkit.scans.hounsfield import check_hu

TABLE = pd.DataFrame(
    [("Emphysema", 0.2, "present"), ("Atelectasis", 0.9, "absent"), ("Lung nodule", 0.4, "unknown")],
    columns=["finding", "score", "truth"],
)
COHORT = pd.DataFrame({"patient": ["a", "a", "b", "b", "c", "d", "d", "d"]})
IN_TEST = np.array([True, False, True, True, False, False, True, False])  # a and d lie on both sides


def share(present, absent):
    return np.mean([(p > a) + (p == a) / 2 for p in present for a in absent])


def changes_its_input(hu):
    hu[hu < -1000], hu[hu > 1000] = -1000, 1000
    return hu / 1000


def merge(W, A, B, alpha, r):
    return W + alpha / r * B @ A


def not_written(*_):
    return ...


RIGHT = [
    ("00.1", ("Atelectasis", TABLE), "Atelectasis, 0.90. It isn't there"),
    ("00.2", (share,), "AUROC"),
    ("01.1", ((50, 300),), "Muscle"),
    ("01.1", ([50.0, 300.0],), "Muscle"),
    ("01.2", (lambda hu: np.clip(hu, -1000, 1000) / 1000,), "Air is -1"),
    ("01.2", (lambda hu: np.clip(hu / 1000, -1, 1),), "Air is -1"),
    ("01.3", (-1312,), "yardstick"),
    ("01.3", (np.float64(-1310.0),), "yardstick"),
    ("01.4", (2, COHORT, IN_TEST), "2 of 4 patients"),
    ("02.1", (lambda n, m, r: r * (n + m),), "in times out"),
    ("02.2", (14,), "974,848 parameters"),
    ("02.3", (merge,), "One matrix as before"),
    ("02.3", (lambda *given: merge(*given).double(),), "One matrix as before"),
    ("02.3", (lambda *given: merge(*given).numpy(),), "One matrix as before"),
    ("02.4", (1_327_104 / 1_671_168,), "79.4%"),
]
WRONG = [
    ("00.1", (1, TABLE), "Give the name of the finding as a text"),
    ("00.1", ("Lung nodul", TABLE), "none of the 18 findings"),
    ("00.1", ("Lung nodule", TABLE), "has a score of 0.40, and 1 other findings have a higher one"),
    ("00.1", ("Lung nodule", TABLE.assign(place=range(len(TABLE)))), r"because its \*place\* is the highest"),
    ("00.2", (lambda p, a: sum(x > y for x in p for y in a),), "divide by the number of pairs"),
    ("00.2", (lambda p, a: share(a, p),), "is the order swapped"),
    ("00.2", (lambda p, a: np.mean([x > y for x in p for y in a]),), "equal scores counts half"),
    ("00.2", (lambda p, a: np.mean([x >= y for x in p for y in a]),), "equal scores counts half"),
    ("00.2", (lambda p, a: p.mean() - a.mean(),), "all 6 pairs are in the right order"),
    ("00.2", (lambda p, a: 0.5 + 0.5 * np.sign(p.mean() - a.mean()),), "scikit-learn gives 0"),
    ("00.2", (lambda p, a: round(share(p, a), 4),), "right but for rounding"),
    ("00.2", (lambda p, a: p > a,), "stopped with ValueError"),
    ("01.1", ((-100, 200),), "are the two ends"),
    ("01.1", ((50, 150),), "black up to -25 HU and white from 125 HU"),
    ("01.1", ((50, -300),), "above 0"),
    ("01.1", (300,), "Expected a pair"),
    ("01.1", (("50", "300"),), "a single number; got str '50'"),
    ("01.1", ((np.nan, 300),), "a single number; got float nan"),
    ("01.2", (lambda hu: hu / 1000,), "not clipped"),
    ("01.2", (lambda hu: np.clip(hu, -1000, 1000),), "still in HU"),
    ("01.2", (lambda hu: (np.clip(hu, -1000, 1000) + 1000) / 2000,), r"in \[0, 1\]"),
    ("01.2", (changes_its_input,), "changes the scan"),
    ("01.2", (lambda hu: np.clip(hu, -1024, 1000) / 1000,), "-2000 HU becomes -1.024; expected -1"),
    ("01.2", (lambda hu: hu.mean(),), "eight numbers"),
    ("01.3", (1312,), "the sign is not"),
    ("01.3", (-312,), "near 0 HU"),
    ("01.3", (-1024,), "the air around the patient lies at -71[0-9] HU"),
    ("01.3", ("minus 1312",), "a single number"),
    ("01.4", (5, COHORT, IN_TEST), "number of their scans"),
    ("01.4", (3, COHORT, IN_TEST), "only some of them"),
    ("01.4", (0.5, COHORT, IN_TEST), "not a share"),
    ("01.4", (4, COHORT, IN_TEST), "on how many of the two sides"),
    ("02.1", (lambda n, m, r: n * m,), "the frozen layer itself"),
    ("02.1", (lambda n, m, r: r * n * m,), "multiply everything"),
    ("02.1", (lambda n, m, r: r * n,), "one of the two matrices"),
    ("02.1", (lambda n, m, r: 2 * r * n,), "a square layer only"),
    ("02.1", (lambda n, m, r: r * (n + m) + m,), "no bias of its own"),
    ("02.1", (lambda n, m, r: n + m,), "A has shape"),
    ("02.1", (lambda n, m: n + m,), "stopped with TypeError"),
    ("02.2", (15,), "Rank 15 has 1,044,480 parameters, more than 1,000,000"),
    ("02.2", (8,), "so does rank 9"),
    ("02.2", (1_000_000 / 69_632,), "a whole number"),
    ("02.2", ("14",), "a single number; got str '14'"),
    ("02.3", (lambda W, A, B, alpha, r: W + B @ A,), "scaled by alpha / r"),
    ("02.3", (lambda W, A, B, alpha, r: W + r / alpha * B @ A,), "the other way round"),
    ("02.3", (lambda W, A, B, alpha, r: W + alpha * B @ A,), "divide by r too"),
    ("02.3", (lambda W, A, B, alpha, r: W + B @ A / r,), "alpha is missing"),
    ("02.3", (lambda W, A, B, alpha, r: alpha / r * B @ A,), "W is missing"),
    ("02.3", (lambda W, A, B, alpha, r: W,), "the update is missing"),
    ("02.3", (lambda W, A, B, alpha, r: W - alpha / r * B @ A,), "takes an adapter out"),
    ("02.3", (lambda W, A, B, alpha, r: W + A @ B,), "stopped with RuntimeError"),
    ("02.3", (lambda W, A, B, alpha, r: (W + B @ A).T,), "has the shape of W"),
    ("02.3", (lambda W, A, B, alpha, r: 2 * W + B @ A,), "differ by up to"),
    ("02.3", (lambda W, A, B, alpha, r: "W + BA",), "a tensor like W; got str"),
    ("02.4", (344_064 / 1_671_168,), "the vision encoder"),
    ("02.4", (79.4,), "per cent"),
    ("02.4", (1_327_104 / 438_148_761,), "a share of the whole model"),
    ("02.4", (3.857,), "between 0 and 1"),
    ("02.4", (0.5,), "Per rank"),
    ("02.4", ("most",), "a single number"),
]
OPEN = [("00.1", (..., TABLE)), ("01.1", ((..., ...),)), ("01.4", (..., COHORT, IN_TEST))]
OPEN += [(name, (not_written,)) for name in ("00.2", "01.2", "02.1", "02.3")]
OPEN += [(name, (...,)) for name in ("01.3", "02.2", "02.4")]


@pytest.mark.parametrize(("name", "answer", "said"), RIGHT)
def test_a_right_answer_is_praised(name, answer, said):
    assert said in is_right(name, *answer)


@pytest.mark.parametrize(("name", "answer", "said"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, answer, said):
    verdict = judge(name, *answer)
    assert verdict.state == "wrong", verdict
    assert re.search(said, verdict.text), verdict


@pytest.mark.parametrize(("name", "answer"), OPEN)
def test_an_answer_that_is_not_there_is_not_done_yet(name, answer):
    is_open(name, *answer)


def test_the_stored_values_are_a_chest_with_the_right_intercept_only():
    stored = checks_data.stored_values()
    check_hu(stored - 1312)
    with pytest.raises(ValueError, match="not in HU"):
        check_hu(stored)


@pytest.mark.parametrize(("preset", "r", "parameters"), [("paper", 24, 1_671_168), ("text", 24, 1_327_104)])
def test_checks_count_as_the_notebook_does(preset, r, parameters):
    assert _trainable(preset, r) == parameters
