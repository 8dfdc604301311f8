"""Deletion, insertion, counterfactual and stability: on models and scans whose answer is known beforehand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_data, tiny_model, tiny_tokenizer

from medctkit.attention import faithfulness as faith
from medctkit.attention.localisation import Regions
from medctkit.findings import FINDINGS

pytestmark = pytest.mark.usefixtures("one_thread")
GRID, SIDE = (2, 4, 4), 4


class Looker:
    """A classifier that looks at one patch alone: the sharper it is, the likelier the finding."""

    def __init__(self, patch):
        self.part = tuple(slice(i * SIDE, (i + 1) * SIDE) for i in patch)

    def scores(self, volumes):
        spread = volumes[(slice(None), 0, *self.part)].flatten(1).std(1)
        return torch.sigmoid(8 * spread - 4).numpy()[:, None].repeat(18, 1)


class Data(list):
    """A data set of toy items with the rows of phantoms, or of real scans."""

    config = None

    def __init__(self, n, **row):
        super().__init__(tiny_data(n))
        self.rows = [{"study": str(i)} | row for i in range(n)]


def some_regions(findings, studies=None):
    n = len(findings)
    studies = np.arange(n) if studies is None else np.array(studies)
    return Regions(studies, np.array(findings), np.array([f"p{i}" for i in studies]), np.ones((n, 2, 2, 2)))


def test_a_map_of_the_patch_that_counts_wins_both_curves():
    patch, rng = (1, 2, 3), np.random.default_rng(0)
    pixels = torch.from_numpy(rng.choice([-1.0, 1.0], (1, *(g * SIDE for g in GRID))).astype(np.float32))
    right, wrong = np.zeros(GRID), np.ones(GRID)
    right[patch], wrong[patch] = 1, 0
    found = faith.curves(Looker(patch), pixels, 0, {"right": right, "wrong": wrong, "random": rng.random(GRID)})
    deletion, insertion = ({name: areas[i] for name, areas in found.items()} for i in (0, 1))
    assert deletion["right"] < deletion["random"] < deletion["wrong"]
    assert insertion["right"] > insertion["random"] > insertion["wrong"]
    sharp, flat = (Looker(patch).scores(pixels[None] * on)[0, 0] for on in (1, 0))
    assert deletion["right"] == pytest.approx(flat, abs=0.05) and insertion["right"] == pytest.approx(sharp, abs=0.05)


def test_some_of_each_takes_every_finding_that_there_is():
    regions = some_regions([3] * 9 + [5] * 2, range(11))
    chosen = faith.some_of_each(regions, 4)
    assert chosen.finding.tolist() == [3] * 4 + [5] * 2 and len(set(chosen.study)) == 6
    assert faith.some_of_each(regions, 4, seed=1).study.tolist() != chosen.study.tolist()


@pytest.fixture
def measured(monkeypatch):
    """The measures of two regions by a tiny model; the twin of a phantom is its scan with one patch made air."""
    model, data, asked = tiny_model().eval(), Data(3), []

    def twin(row):
        asked.append(row)
        changed = data[int(row["study"])]["pixel_values"].clone()
        changed[:, :4, :16, :16] = -1
        return SimpleNamespace(volume=changed)

    monkeypatch.setattr(faith, "study_from_row", twin)
    monkeypatch.setattr(faith, "preprocess", lambda volume, config: volume)
    kinds = {"stating": ["{finding} seen"], "denying": ["no {finding}"]}
    regions = some_regions([2, 7])
    return regions, faith.faithfulness(model, tiny_tokenizer(), data, regions, kinds, progress=False), asked


def test_each_region_is_measured_against_its_own_twin(measured):
    regions, values, asked = measured
    assert [[name for name in row if name in FINDINGS] for row in asked] == [[FINDINGS[2]], [FINDINGS[7]]]
    assert all(row[FINDINGS[k]] == 0 for row, k in zip(asked, (2, 7), strict=True))
    np.testing.assert_allclose(values["mass on what changed: chance"], 1 / 8, atol=0.002)  # one patch of eight
    for measure in ("deletion", "insertion"):
        columns = [name for name in values if name.startswith(f"{measure}: ")]
        assert len(columns) == 5 and values[columns].stack().between(0, 1).all()
    stable = values[[name for name in values if name.startswith("stability")]].stack()
    assert stable.between(-1, 1).all() and values["stability under noise: smoothed contrast"].min() > 0.5


def test_the_table_averages_over_findings_and_pairs_the_first_map_with_each_other(measured):
    regions, values, _ = measured
    table = faith.faithfulness_table(regions, values, resamples=50)
    first = table.groupby("measure", sort=False).head(1)
    assert first["difference"].isna().all() and set(first["map"]) == {"relevance", "own finding"}
    row = table.set_index(["measure", "map"]).loc[("deletion", "random")]
    expected = values[["deletion: relevance", "deletion: random"]].mean()
    assert row["value"] == pytest.approx(expected.iloc[1])
    assert row["difference"] == pytest.approx(expected.iloc[0] - expected.iloc[1])
    assert row["low"] <= row["value"] <= row["high"] and row["regions"] == 2


def test_a_measure_without_a_value_does_not_count():
    values = pd.DataFrame({"stability: relevance": [0.5, np.nan, 0.9], "stability: rollout": [1.0, 1.0, 1.0]})
    table = faith.faithfulness_table(some_regions([1, 1, 4]), values, resamples=20).set_index("map")
    assert table.loc["relevance", "value"] == pytest.approx(0.7) and table.loc["relevance", "regions"] == 2


def test_a_real_scan_has_no_counterfactual(monkeypatch):
    data = Data(2, path="scan.nii.gz")
    monkeypatch.setattr(faith, "study_from_row", lambda row: pytest.fail("nobody can draw it"))
    kinds = {"stating": ["{finding} seen"], "denying": ["no {finding}"]}
    found = faith.faithfulness(tiny_model().eval(), tiny_tokenizer(), data, some_regions([0, 1]), kinds, progress=False)
    assert not [name for name in found if "changed" in name or "fall" in name] and "deletion: relevance" in found
