"""The exercises of notebook 02: right answers pass, typical wrong ones are told what is wrong with them."""

import pytest

from medctkit.course.checks_lora import _trainable
from medctkit.course.exercises import judge


def merge(W, A, B, alpha, r):
    return W + alpha / r * B @ A


def not_written(*_):
    return ...


RIGHT = [
    ("02.1", (lambda n, m, r: r * (n + m),), "in times out"),
    ("02.2", (14,), "974,848 parameters"),
    ("02.3", (merge,), "One matrix as before"),
    ("02.4", (1_327_104 / 1_671_168,), "79.4%"),
]
WRONG = [
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
    ("02.4", (344_064 / 1_671_168,), "the vision encoder"),
    ("02.4", (79.4,), "per cent"),
    ("02.4", (1_327_104 / 438_148_761,), "a share of the whole model"),
    ("02.4", (3.857,), "between 0 and 1"),
    ("02.4", (0.5,), "Per rank"),
    ("02.4", ("most",), "a single number"),
]
OPEN = [("02.1", (not_written,)), ("02.2", (...,)), ("02.3", (not_written,)), ("02.4", (...,))]


@pytest.mark.parametrize(("name", "answer", "said"), RIGHT)
def test_a_right_answer_is_praised(name, answer, said):
    verdict = judge(name, *answer)
    assert verdict.state == "right", verdict
    assert said in verdict.text


@pytest.mark.parametrize(("name", "answer", "said"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, answer, said):
    verdict = judge(name, *answer)
    assert verdict.state == "wrong", verdict
    assert said in verdict.text


@pytest.mark.parametrize(("name", "answer"), OPEN)
def test_an_answer_that_is_not_there_is_not_done_yet(name, answer):
    assert judge(name, *answer).state == "open"


@pytest.mark.parametrize(("preset", "r", "parameters"), [("paper", 24, 1_671_168), ("text", 24, 1_327_104)])
def test_checks_count_as_the_notebook_does(preset, r, parameters):
    assert _trainable(preset, r) == parameters
