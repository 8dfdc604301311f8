"""What adaptation cost at home: base and adapted model in the hospital that the base model comes from."""

import errno
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from typer.testing import CliRunner

from medctkit import cli_measure
from medctkit.cli import app
from medctkit.cohort.dataset import load_split
from medctkit.cohort.manifest import load_manifest
from medctkit.experiments.measure import measure
from medctkit.metrics.scores import compare, result_table
from medctkit.zero_shot.classifier import ZeroShotClassifier

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def measured(both, finished):
    """What was measured, and what was written of it."""
    found = measure(both, finished, audit_volumes=0, resamples=30)
    return found, json.loads((finished / "metrics.json").read_text())


@pytest.mark.slow
def test_what_adaptation_cost_at_home_is_measured_written_and_shown(both, origin, measured):
    found, written = measured
    assert written == found.summary and set(written) == {
        "base",
        "adapted",
        "difference",
        "without_a_look",
        "made_with",
        "home",
        "clinical",
    }
    home = written["home"]
    assert (home["hospital"], home["studies"]) == ("source", 20)
    for model in ("base", "adapted", "difference"):
        assert set(home[model]) == {"auroc", "ece", "brier"} and set(written[model]) == {
            "auroc",
            "accuracy",
            "macro_f1",
        }
        assert all(set(ends) == {"value", "low", "high"} for ends in home[model].values())
    base = origin.load()
    data = load_split(load_manifest(both), "source", "test", base.preprocess_config, both.parent / "prepared")
    classifier = ZeroShotClassifier(base.model, base.tokenizer)
    seen = classifier.embed(data, progress=False)
    scores = classifier.scores_from_embeddings(seen.embeddings)
    again = compare(seen.labels, scores, scores, seen.patients, resamples=2)
    assert again.attrs["gaps"].keys().isdisjoint(home["findings"]), "one class only"
    assert len(home["findings"]) == 18 - len(again.attrs["gaps"])
    assert home["base"]["brier"]["value"] == pytest.approx(
        np.mean([np.mean((scores[:, k] - seen.labels[:, k]) ** 2) for k in np.flatnonzero(seen.labels.any(0))]),
        abs=1e-4,
    )
    text = result_table(written)
    assert text.index("macro-F1") < text.index("20 test studies of hospital source") < text.index("Brier score")


@pytest.mark.slow
def test_nothing_is_said_of_home_where_there_are_no_such_studies_or_it_is_what_was_adapted_to(few, both, finished):
    measured = measure(few, finished, audit_volumes=0, resamples=2)
    assert measured.home is None and "home" not in measured.summary
    assert "at home" not in result_table(measured.summary)
    with pytest.raises(ValueError, match="no test studies of hospital 'north'; its hospitals are target"):
        measure(few, finished, audit_volumes=0, resamples=2, home="north")
    every = measure(both, finished, audit_volumes=0, resamples=2, home="target")
    assert every.home.hospital == "target" and "--home target" in every.made_with["command"]
    assert every.home.summary["base"]["auroc"] == every.summary["base"]["auroc"]


def test_what_is_embedded_already_is_taken_and_other_studies_are_refused(few, origin, finished, measured):
    base, table = origin.load(), load_manifest(few)
    known = {
        ("base", split): ZeroShotClassifier(base.model, base.tokenizer).embed(
            load_split(table, "target", split, base.preprocess_config, few.parent / "prepared"), progress=False
        )
        for split in ("valid", "test")
    }
    again = measure(few, finished, audit_volumes=0, resamples=2, known=known)
    np.testing.assert_array_equal(again.scores["base"], measured[0].scores["base"])
    with pytest.raises(ValueError, match="base embedding of test in `known`"):
        measure(few, finished, audit_volumes=0, resamples=2, known={("base", "test"): known["base", "valid"]})


def test_a_folder_that_takes_no_result_is_told_before_anything_is_scored(few, finished, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
    monkeypatch.setattr(ZeroShotClassifier, "embed", lambda *_: pytest.fail("it could not be written"))
    with pytest.raises(OSError, match="Read-only"):
        measure(few, finished)


def test_results_are_written_before_they_are_told(finished, measured, tmp_path, monkeypatch):
    folder, told = Path(shutil.copytree(finished, tmp_path / "run")), []

    def piped_into_head(text):
        told.append(text)
        if len(told) == 2:
            raise BrokenPipeError

    monkeypatch.setattr(cli_measure, "say", piped_into_head)
    monkeypatch.setattr("medctkit.experiments.measure.measure", lambda *_: measured[0])
    assert CliRunner().invoke(app, ["evaluate", str(folder)]).exit_code == 1
    assert all((folder / name).is_file() for name in ("scores.csv", "findings.csv", "findings.tex", "report.html"))
