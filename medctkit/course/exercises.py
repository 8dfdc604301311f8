"""Exercises of the course: an answer is judged, and what is wrong with it is said.

A notebook's exercise ends with `check("01.1", answer)`. What is right is decided by a function registered under that
name with `checks`, in the module of `CHECKS`; it computes what it compares with from the package.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from html import escape
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import FunctionType
from typing import Any

from medctkit.common.atomic import write_text

# Where the checks of a notebook are. They import this module, so that they are imported by name, when asked for.
CHECKS = {
    "00": "checks_data",
    "01": "checks_data",
    "02": "checks_lora",
    "03": "checks_training",
    "04": "checks_evaluation",
    "05": "checks_evaluation",
    "06": "checks_training",
    "07": "checks_deploy",
}
STRICT = "MEDCTKIT_STRICT_EXERCISES"
_HINTS = {  # what numpy and torch say of sizes, and what to look at then
    r"cannot be multiplied|not aligned|matmul": "In a matrix product the order matters: the left factor has as many "
    "columns as the right one has rows.",
    r"broadcast|must match the size": "Number by number, sizes must be equal, or 1. Print both shapes: is a product in "
    "the wrong order, or an axis lost?",
}
_REGISTERED: dict[str, Callable[..., str]] = {}
_SOLVED: set[str] = set()  # in this kernel
_LOOKS = {"right": ("#009E73", "Right."), "wrong": ("#D55E00", "Not yet."), "open": ("#56B4E9", "Not done yet.")}


class Wrong(Exception):
    """Raised by a check: what is wrong with the answer, said to the person who gave it."""


class NotDone(Exception):
    """The answer still has a `...` in it."""


class NotSolved(AssertionError):
    """An exercise that isn't solved, where the course runs strictly."""


@dataclass(frozen=True)
class Verdict:
    """What became of an answer."""

    name: str  # of the exercise, such as "01.1"
    state: str  # "right", "wrong" or "open"
    text: str  # praise, or what is wrong; plain text, with `code` in backticks

    def __repr__(self) -> str:
        return f"Exercise {self.name}: {_LOOKS[self.state][1]} {self.text}"

    def _repr_html_(self) -> str:
        colour, word = _LOOKS[self.state]
        text = re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escape(self.text, quote=False)).replace("\n", "<br>")
        return (
            f'<div role="status" style="border-left: 6px solid {colour}; padding: 0.4em 0.8em; margin: 0.3em 0">'
            f"<b>Exercise {escape(self.name)}: {word}</b> {text}</div>"
        )


def checks(name: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register the function that judges exercise `name`.

    It gets the answers in the order of the call of `check`, raises `Wrong` with what is wrong, and returns one or two
    sentences of praise and insight. A function among the answers may be called as it is: one that isn't written yet
    or that fails is dealt with here.

    Raises:
        ValueError: a name that isn't like "01.1", or is taken.
    """
    if not re.fullmatch(r"\d\d\.[1-9]", name):
        raise ValueError(f"exercise {name!r}: expected the notebook's number, a dot and a number, such as 01.1")

    def register(function: Callable[..., str]) -> Callable[..., str]:
        before = _REGISTERED.get(name)
        if before is not None and before.__qualname__ != function.__qualname__:
            raise ValueError(f"exercise {name} has two checks: {before.__qualname__} and {function.__qualname__}")
        _REGISTERED[name] = function
        return function

    return register


def judge(name: str, *answer: Any) -> Verdict:
    """Judge an answer, without showing anything; see `check`."""
    function = _check_of(name)
    try:
        signature(function).bind(*answer)
    except TypeError:
        wanted = ", ".join(signature(function).parameters)
        raise TypeError(
            f'exercise {name} is checked with check("{name}", {wanted}); it was called with {len(answer)} answers'
        ) from None
    if any(map(_is_open, answer)):
        return Verdict(name, "open", "Replace the `...` by your code and run the cell again.")
    try:
        return Verdict(name, "right", function(*map(_guarded, answer)))
    except NotDone as error:
        return Verdict(name, "open", str(error) or "Replace the `...` by your code and run the cell again.")
    except Wrong as error:
        return Verdict(name, "wrong", str(error))
    except Exception as error:  # whatever a student hands in: the lesson goes on
        kinds = ", ".join(type(value).__name__ for value in answer)
        said = f"The check could not work with your answer ({kinds}): {type(error).__name__}: {error}."
        return Verdict(name, "wrong", f"{said} Is it of the kind that the exercise asks for?")


def check(name: str, *answer: Any) -> None:
    """Show whether an answer is right, and if not, what is wrong: a box in a notebook, text elsewhere.

    Args:
        name: of the exercise: the notebook's number, a dot, and its number there, such as "01.1".
        answer: what the exercise asks for; `...` or None, or a function that returns it, is not done yet.

    Raises:
        NotSolved: the answer isn't right, and the environment variable MEDCTKIT_STRICT_EXERCISES is 1.
        ValueError: there is no such exercise.
        TypeError: more or fewer answers than the exercise has.
    """
    from IPython.display import display

    verdict = judge(name, *answer)
    if verdict.state != "right" and os.environ.get(STRICT) == "1":
        raise NotSolved(repr(verdict))
    if verdict.state == "right":
        _SOLVED.add(name)
    display(verdict)


def progress(folder: str | os.PathLike) -> None:
    """Print which exercises of the course are solved, a dot for each; `solved.txt` keeps them for the next notebook.

    Args:
        folder: of `solved.txt`, the notebooks' `output_dir`; made if it is not there.
    """
    for module in CHECKS.values():
        import_module(f"medctkit.course.{module}")
    file = Path(folder) / "solved.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    solved = _SOLVED | set(file.read_text(encoding="utf-8").split() if file.is_file() else ())
    write_text(file, "\n".join(sorted(solved)))
    marks = {name: "●" if name in solved else "○" for name in sorted(_REGISTERED)}
    print(f"{len(solved & marks.keys())} of {len(marks)} exercises of the course solved")
    print("   ".join(f"{number} {''.join(m for name, m in marks.items() if name[:2] == number)}" for number in CHECKS))


def _check_of(name: str) -> Callable[..., str]:
    module = CHECKS.get(str(name)[:2])
    if name not in _REGISTERED and module is not None:
        import_module(f"medctkit.course.{module}")
    if name not in _REGISTERED:
        known = sorted(other for other in _REGISTERED if other[:2] == str(name)[:2])
        raise ValueError(
            f"there is no exercise {name!r}; "
            + (f"this notebook has {', '.join(known)}" if known else f"notebooks with exercises: {', '.join(CHECKS)}")
        )
    return _REGISTERED[name]


def _is_open(value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return value is ... or value is None or any(item is ... for item in inside)


def _guarded(value: Any) -> Any:
    """A function of the student's that says so where it isn't written yet or fails; anything else as it is."""
    if not isinstance(value, FunctionType):
        return value

    @wraps(value)
    def called(*arguments: Any, **named: Any) -> Any:
        try:
            result = value(*arguments, **named)
        except Exception as error:
            hint = "".join(f". {hint}" for pattern, hint in _HINTS.items() if re.search(pattern, str(error)))
            raise Wrong(f"`{value.__name__}` stopped with {type(error).__name__}: {error}{hint}") from error
        if _is_open(result):
            said = "replace the `...` in it by your code, and `return` the result; to print it is not enough."
            raise NotDone(f"`{value.__name__}` gives nothing back yet: {said}")
        return result

    return called


def number(answer: Any, what: str, finite: bool = True) -> float:
    """An answer that should be a single number; raises `Wrong` and says `what` was expected if it isn't one."""
    try:
        value = answer.item() if hasattr(answer, "item") else answer
        found = None if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        found = None
    if found is None or (finite and not math.isfinite(found)):
        if math.prod(shape := tuple(getattr(answer, "shape", ()))) > 1:
            more = "Is a sum or a mean missing? With more axes than you expected, one size was spread over another."
            raise Wrong(f"Expected {what}, a single number; got numbers of shape {shape}. {more}")
        raise Wrong(f"Expected {what}, a single number; got {type(answer).__name__} {answer!r:.80}.")
    return found


def interval(answer: Any) -> tuple[float, float]:
    """The answer as the two ends of an interval; raises `Wrong` if it isn't one, or is the wrong way round."""
    if isinstance(answer, str) or not hasattr(answer, "__len__") or len(answer) != 2:
        raise Wrong("Expected the two ends of an interval, (low, high).")
    low, high = (number(end, "an end of the interval") for end in answer)
    if low > high:
        raise Wrong(f"The lower end, {low:.3f}, lies above the upper one, {high:.3f}.")
    return low, high


def close(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    """Whether two numbers, or two rows of them, are the same but for rounding; with a tolerance of 0, exactly."""
    import numpy as np

    return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance * 1e-2))


def expect(found: Any, right: Any, slips: Mapping[Any, str], otherwise: str, tolerance: float = 1e-4) -> None:
    """Raise `Wrong` unless `found` is right: with what is said of the slip that gives the same, or `otherwise`."""
    import numpy as np

    if not close(found, right, tolerance):
        if tolerance and any(close(found, np.round(right, digits), 1e-9) for digits in range(2, 7)):
            otherwise = "That is right but for rounding: give the number as it was computed, with all its digits."
        raise Wrong(next((said for slip, said in slips.items() if close(found, slip, tolerance)), otherwise))
