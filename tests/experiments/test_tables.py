"""Scores and tables for others to compute with."""

import numpy as np
import pandas as pd
import pytest

from medctkit.experiments import tables
from medctkit.experiments.tables import measure_base, scores_file, write_findings, write_scores
from medctkit.findings import FINDINGS
from medctkit.metrics.scores import evaluate


def test_scores_have_a_row_for_each_study_and_finding(tmp_path):
    rng = np.random.default_rng(0)
    labels = (rng.random((3, 18)) < 0.5).astype(float)
    labels[1, 4] = np.nan
    scores = {"base": rng.random((3, 18)), "adapted": rng.random((3, 18))}
    names = np.array(["s1", "s2", "s3"])
    found = pd.read_csv(write_scores(tmp_path / "scores.csv", names, np.array(["p", "p", "q"]), labels, scores))
    wide = found.pivot(index="study", columns="finding", values="adapted")[list(FINDINGS)]
    np.testing.assert_allclose(wide, scores["adapted"])
    assert found["label"].isna().sum() == 1 and found.query("study == 's3'")["patient"].eq("q").all()


def test_other_endings_and_parquet_without_pyarrow_are_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "find_spec", lambda _: None)
    for name in ("scores.xlsx", "scores.parquet"):
        with pytest.raises(ValueError, match=f"{name}: scores are written as .csv, or as .parquet after pip"):
            scores_file(tmp_path / name)
    monkeypatch.setattr(tables, "find_spec", lambda _: object())
    assert scores_file(tmp_path / "scores.parquet").suffix == ".parquet"


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_scored(few, origin, tmp_path, monkeypatch):
    monkeypatch.setattr(tables.ZeroShotClassifier, "embed", lambda *_: pytest.fail("it could not be written"))
    with pytest.raises(NotADirectoryError):
        measure_base(few, few / "out", origin, tmp_path / "scores.csv")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="is of a run, whose scores and tables would be replaced"):
        measure_base(few, tmp_path, origin, tmp_path / "scores.csv")


def test_tables_are_for_a_paper_and_a_finding_of_one_class_has_a_dash(tmp_path):
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 18)) < 0.5).astype(float)
    labels[:, 3] = 0
    table = evaluate(labels, rng.random((40, 18)), [f"p{i}" for i in range(40)], resamples=20)
    csv, tex = write_findings({"base": table, "adapted": table}, tmp_path)
    found = pd.read_csv(csv, index_col="finding")
    assert found.loc["mean", "adapted auroc_high"] == pytest.approx(table.loc["mean", "auroc_high"])
    text = tex.read_text()
    assert f"{FINDINGS[3]} & -- & -- \\\\" in text and text.count(" to ") == 2 * 18 and "nan" not in text
