"""Answers are judged, and what is wrong is said to the person who gave it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from judged import is_open, is_right, is_wrong

from medctkit.course import exercises
from medctkit.course.exercises import NotSolved, Wrong, check, judge


@pytest.fixture(autouse=True)
def halves(monkeypatch):
    """Exercise 01.9: a function that halves."""
    monkeypatch.setattr(exercises, "_REGISTERED", {})

    @exercises.checks("01.9")
    def halves(half):
        found = half(8)
        if found != 4:
            raise Wrong(f"half of 8 came out as {found}: did you <divide> by 2 & nothing else?")
        return "Halving with `x / 2` is exact in binary."


def unwritten(x): ...  # your code


def divided(x):
    return x / 0


def test_an_answer_is_praised_or_told_what_is_wrong_or_not_there_and_never_stops_the_lesson():
    assert is_right("01.9", lambda x: x / 2) == "Halving with `x / 2` is exact in binary."
    is_wrong("01.9", lambda x: x, because="half of 8 came out as 8: did you <divide> by 2 & nothing else?")
    is_wrong("01.9", divided, because="`divided` stopped with ZeroDivisionError: division by zero")
    for answer in (3, "half", np.zeros(3), object()):
        is_wrong("01.9", answer, because=f"could not work with your answer ({type(answer).__name__})")
    for answer in (..., None, [1, ...], (..., 2), {"a": ...}):
        assert "Replace the `...`" in is_open("01.9", answer)
    for function in (unwritten, lambda x: print(x / 2)):
        assert "gives nothing back yet" in (said := is_open("01.9", function)) and "print it is not enough" in said
    with pytest.raises(TypeError, match=r'checked with check\("01.9", half\); it was called with 2 answers'):
        judge("01.9", 1, 2)


def test_sizes_that_do_not_fit_are_explained():
    a, b, w = np.ones((2, 9)), np.ones((6, 2)), np.ones((6, 9))
    for kind in (np.asarray, torch.from_numpy):
        a_, b_, w_ = map(kind, (a, b, w))
        is_wrong("01.9", lambda x: a_ @ b_, because="In a matrix product the order matters")  # noqa: B023
        is_wrong("01.9", lambda x: w_ + (b_ @ a_).T, because="is a product in the wrong order")  # noqa: B023
        with pytest.raises(Wrong, match=r"got numbers of shape \(2, 9\)\. Is a sum or a mean missing\? .* spread over"):
            exercises.number(a_, "a share")


def test_strict_raises_unless_right_and_else_everything_is_only_shown(monkeypatch, capsys):
    monkeypatch.setenv("MEDCTKIT_STRICT_EXERCISES", "1")
    check("01.9", lambda x: x / 2)
    assert "Exercise 01.9: Right. Halving" in capsys.readouterr().out
    for answer, said in ((lambda x: x, "Not yet. half of 8 came out as 8"), (..., "Not done yet.")):
        with pytest.raises(NotSolved, match=f"Exercise 01.9: {said}"):
            check("01.9", answer)
    monkeypatch.delenv("MEDCTKIT_STRICT_EXERCISES")
    check("01.9", lambda x: x)
    check("01.9", ...)
    assert capsys.readouterr().out.count("Exercise 01.9: Not") == 2


def test_progress_is_kept_from_notebook_to_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exercises, "import_module", lambda name: None)
    monkeypatch.setattr(exercises, "_SOLVED", set())
    exercises.checks("02.1")(lambda answer: "fine")
    folder = tmp_path / "out"
    for answer, said in ((lambda x: x, "0 of 2 "), (lambda x: x / 2, "1 of 2 ")):
        check("01.9", answer)
        exercises.progress(folder)
        assert said in capsys.readouterr().out
    exercises._SOLVED.clear()  # another kernel
    check("02.1", 1)
    exercises.progress(folder)
    shown = capsys.readouterr().out
    assert "2 of 2 exercises" in shown and "01 ●   02 ●" in shown


def test_the_box_in_a_notebook_takes_no_markup_from_the_text():
    page = judge("01.9", lambda x: x)._repr_html_()
    assert "&lt;divide&gt; by 2 &amp; nothing" in page and 'role="status"' in page
    assert "<code>x / 2</code>" in judge("01.9", lambda x: x / 2)._repr_html_()
    assert "Not yet." in page, "the state is said in words, not by colour alone"


def test_checks_are_imported_by_the_number_of_the_notebook_and_an_unknown_exercise_lists_those_there(monkeypatch):
    asked = []
    monkeypatch.setattr(exercises, "import_module", asked.append)
    for name, said in {
        "00.1": "notebooks with exercises: 00, 01",
        "01.7": "this notebook has 01.9",
        "02.1": "notebooks with",
        "05.1": "notebooks with",
        "06.1": "notebooks with",
        "88.1": "notebooks with exercises: 00, 01",
    }.items():
        with pytest.raises(ValueError, match=f"no exercise '{name}'; {said}"):
            judge(name, 1)
    topics = ("data", "data", "lora", "evaluation", "training")
    assert asked == [f"medctkit.course.checks_{topic}" for topic in topics]


def test_a_check_needs_the_number_of_a_notebook_and_of_an_exercise_that_has_none():
    for name in ("1.1", "01", "01.0", "01.10", "aa.1"):
        with pytest.raises(ValueError, match="expected the notebook's number, a dot and a number"):
            exercises.checks(name)
    with pytest.raises(ValueError, match="exercise 01.9 has two checks"):
        exercises.checks("01.9")(lambda answer: "fine")


def test_exercises_load_quickly_and_alone():
    code = "import sys, json; from medctkit.course import exercises; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert not {"torch", "numpy", "IPython", "medctkit.course.checks_data"} & set(json.loads(done.stdout))
