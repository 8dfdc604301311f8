"""What every lesson has: a picture and a promise first, the code that is no lesson folded."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

from medctkit import FINDINGS, metrics

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
LESSONS = [nbformat.read(path, as_version=4).cells for path in NOTEBOOKS]
each_lesson = pytest.mark.parametrize("cells", LESSONS, ids=lambda cells: cells[0].source[2:4])


@each_lesson
def test_the_first_screen_is_a_promise_and_a_picture(cells):
    title, promise, picture, *_ = re.split(r"\n\n", cells[0].source)
    assert title.startswith("# ") and "ou will" in promise and re.match(r"!\[\w.{30,}\]\(images/", picture)
    assert "fterwards you can" in cells[0].source


@each_lesson
def test_imports_are_folded(cells):
    for cell in cells:
        imports = len(re.findall(r"^(?:import|from) ", cell.source, re.M))
        if cell.cell_type == "code" and imports > 5:
            assert cell.metadata["jupyter"]["source_hidden"], cell.source


@each_lesson
def test_every_question_has_a_fold_out_answer(cells):
    """One block of HTML: with an empty line in it, nbconvert shows the answer below an empty fold."""
    for cell in cells:
        if "Think about" in cell.source:
            questions = re.findall(r"^\*\*\d\.\*\* ", cell.source, re.M)
            answers = re.findall(r"<details><summary>.+?</summary>(?:\n[^\n]+)+\n</details>", cell.source)
            assert len(answers) == len(questions) > 1


@each_lesson
def test_the_end_says_what_was_built_how_far_one_is_and_where_to_go(cells):
    built, far, where = cells[-3:]
    assert built.source.startswith("## What you built\n\n- ") and "progress(output_dir)" in far.source
    assert where.source.startswith("**Next:** ") and "](" in where.source


def test_the_map_in_notebook_00_leads_to_every_other():
    (course,) = (cell.source for cell in LESSONS[0] if "## The course" in cell.source)
    assert re.findall(r"^\| \[.+\]\((\d\d_\w+\.ipynb)\) \|", course, re.M) == [path.name for path in NOTEBOOKS[1:]]


def test_the_bootstrap_of_notebook_04_leaves_unknown_labels_out_as_the_package_does():
    names = {"np": np, "FINDINGS": FINDINGS}
    for name in ("auroc", "bootstrap"):
        source = next(cell.source for cell in LESSONS[4] if cell.source.startswith(f"def {name}("))
        exec(source.split("\n\n\n")[0], names)
    rng = np.random.default_rng(0)
    labels, scores, patients = rng.integers(0, 2, (40, 18)).astype(float), rng.random((40, 18)), np.arange(40) // 2
    labels[:6, 0], labels[:, 2:] = np.nan, np.nan
    expected = metrics.mean_draws(labels, scores, patients, resamples=20)[1:]
    np.testing.assert_allclose(names["bootstrap"](labels, scores, patients, 20), expected)
