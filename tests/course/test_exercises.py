"""Answers are judged, and what is wrong is said to the person who gave it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from medctkit.course import exercises
from medctkit.course.exercises import NotSolved, Wrong, check, judge


@pytest.fixture
def halves(monkeypatch):
    """Exercise 01.9: a function that halves."""
    monkeypatch.setattr(exercises, "_REGISTERED", {})

    @exercises.checks("01.9")
    def halves(half):
        found = half(8)
        if found != 4:
            raise Wrong(f"half of 8 came out as {found}: did you <divide> by 2 & nothing else?")
        return "Halving with `x / 2` is exact in binary."

    return halves


def test_a_right_answer_is_praised_and_a_wrong_one_is_told_what_is_wrong(halves):
    verdict = judge("01.9", lambda x: x / 2)
    assert (verdict.state, verdict.text) == ("right", "Halving with `x / 2` is exact in binary.")
    assert repr(verdict) == "Exercise 01.9: Right. Halving with `x / 2` is exact in binary."
    assert judge("01.9", lambda x: x).text == "half of 8 came out as 8: did you <divide> by 2 & nothing else?"


def unwritten(x): ...  # your code


@pytest.mark.parametrize("answer", [..., None, [1, ...], (..., 2), {"a": ...}])
def test_what_is_left_open_is_not_done_yet(halves, answer):
    verdict = judge("01.9", answer)
    assert verdict.state == "open" and "Replace the `...`" in verdict.text


def test_a_function_that_is_not_written_yet_is_named(halves):
    verdict = judge("01.9", unwritten)
    assert verdict.state == "open" and "`unwritten` gives nothing back yet" in verdict.text


def test_a_function_that_fails_is_told_where(halves):
    def divided(x):
        return x / 0

    assert judge("01.9", divided).text == "`divided` stopped with ZeroDivisionError: division by zero"


@pytest.mark.parametrize("answer", [3, "half", np.zeros(3), object()])
def test_an_answer_of_another_kind_never_stops_the_lesson(halves, answer):
    verdict = judge("01.9", answer)
    assert verdict.state == "wrong"
    assert f"could not work with your answer ({type(answer).__name__})" in verdict.text


def test_strict_raises_unless_right_and_else_everything_is_only_shown(halves, monkeypatch, capsys):
    monkeypatch.setenv("MEDCTKIT_STRICT_EXERCISES", "1")
    check("01.9", lambda x: x / 2)
    assert "Exercise 01.9: Right." in capsys.readouterr().out
    with pytest.raises(NotSolved, match="Exercise 01.9: Not yet. half of 8 came out as 8"):
        check("01.9", lambda x: x)
    with pytest.raises(NotSolved, match="Exercise 01.9: Not done yet."):
        check("01.9", ...)
    monkeypatch.delenv("MEDCTKIT_STRICT_EXERCISES")
    check("01.9", lambda x: x)
    check("01.9", ...)
    assert capsys.readouterr().out.count("Exercise 01.9: Not") == 2


def test_the_box_in_a_notebook_takes_no_markup_from_the_text(halves):
    page = judge("01.9", lambda x: x)._repr_html_()
    assert "&lt;divide&gt; by 2 &amp; nothing" in page and 'role="status"' in page
    assert "<code>x / 2</code>" in judge("01.9", lambda x: x / 2)._repr_html_()
    assert "Not yet." in page, "the state is said in words, not by colour alone"


def test_too_many_answers_say_what_was_expected(halves):
    with pytest.raises(TypeError, match=r'checked with check\("01.9", half\); it was called with 2 answers'):
        judge("01.9", 1, 2)


def test_an_unknown_exercise_lists_those_of_its_notebook(halves, monkeypatch):
    monkeypatch.setattr(exercises, "import_module", lambda name: None)
    with pytest.raises(ValueError, match="no exercise '01.7'; this notebook has 01.9"):
        judge("01.7", 1)
    with pytest.raises(ValueError, match="no exercise '88.1'; notebooks with exercises: 00, 01"):
        judge("88.1", 1)


def test_checks_are_imported_by_the_number_of_the_notebook(monkeypatch):
    asked = []
    monkeypatch.setattr(exercises, "_REGISTERED", {})
    monkeypatch.setattr(exercises, "import_module", asked.append)
    for name in ("00.1", "02.1", "05.1", "06.1"):
        with pytest.raises(ValueError):
            judge(name, 1)
    assert asked == [f"medctkit.course.checks_{topic}" for topic in ("data", "lora", "evaluation", "training")]


@pytest.mark.parametrize("name", ["1.1", "01", "01.0", "01.10", "aa.1"])
def test_a_check_needs_the_number_of_a_notebook_and_of_an_exercise(name):
    with pytest.raises(ValueError, match="expected the notebook's number, a dot and a number"):
        exercises.checks(name)


def test_no_exercise_has_two_checks(halves):
    with pytest.raises(ValueError, match="exercise 01.9 has two checks"):

        @exercises.checks("01.9")
        def other(answer):
            return "fine"


def test_exercises_load_quickly_and_alone():
    code = "import sys, json; from medctkit.course import exercises; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert not {"torch", "numpy", "IPython", "medctkit.course.checks_data"} & set(json.loads(done.stdout))
