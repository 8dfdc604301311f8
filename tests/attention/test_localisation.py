"""Maps against masks: scores that are right, chance that is chance, controls and sanity checks that can fail."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from tiny import tiny_data, tiny_model, tiny_tokenizer

from medctkit.attention import localisation as loc
from medctkit.findings import FINDINGS
from medctkit.phantom.study import generate
from medctkit.scans.preprocessing import PreprocessConfig

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
CONFIG = PreprocessConfig((45.0, 11.25, 11.25), (8, 32, 32), antialias=True)


def some_regions(n=60, seed=0, grid=(2, 4, 4)):
    rng = np.random.default_rng(seed)
    shares = rng.random((n, *grid)) * (rng.random((n, *grid)) < 0.3)
    shares[:, 0, 0, 0] += 0.01
    patients = np.array([f"p{i // 3}" for i in range(n)])
    return loc.Regions(np.arange(n) // 2, rng.integers(0, 18, n), patients, shares)


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_scores_are_those_of_all_voxels(seed):
    """Patches of 10 voxels each, some of them in the mask: the same as one score for each voxel."""
    rng = np.random.default_rng(seed)
    maps = np.round(rng.random((1, 2, 2, 3)), 1) + 0.01  # with ties
    inside = rng.integers(0, 11, (1, 2, 2, 3))
    inside[0, 0, 0, 0] = 5
    found = loc.score_maps(maps, inside / 10)
    voxels = np.repeat(maps.ravel(), 10)
    truth = (np.arange(10) < inside.reshape(-1, 1)).ravel()
    assert found["AUPRC"][0] == pytest.approx(average_precision_score(truth, voxels))
    assert found["in-mask mass"][0] == pytest.approx(voxels[truth].sum() / voxels.sum())
    best = np.flatnonzero(maps.ravel() == maps.max())
    assert found["pointing game"][0] == pytest.approx((inside.ravel()[best] > 0).mean())


def test_a_perfect_map_wins_and_chance_is_what_random_maps_get():
    regions = some_regions(400)
    perfect = loc.score_maps(regions.shares, regions.shares)
    assert perfect["pointing game"].min() == 1
    drawn = [
        loc.score_maps(np.random.default_rng(9 + i).random(regions.shares.shape), regions.shares) for i in range(5)
    ]
    for score in ("pointing game", "in-mask mass"):
        random = np.mean([d[score].mean() for d in drawn])
        assert random == pytest.approx(drawn[0][f"{score} by chance"].mean(), rel=0.1)
        assert perfect[score].mean() > 1.5 * random
    flat = loc.score_maps(np.ones(regions.shares.shape), regions.shares)
    for score in loc.SCORES:
        np.testing.assert_allclose(flat[score], flat[f"{score} by chance"])


def test_the_table_counts_findings_alike_and_resamples_patients():
    regions = some_regions()
    table = loc.localisation_table(regions, {"perfect": regions.shares, "flat": np.ones(regions.shares.shape)})
    scores = loc.score_maps(regions.shares, regions.shares)["AUPRC"]
    by_hand = pd.Series(scores).groupby(regions.finding).mean()
    row = table[(table["finding"] == "mean") & (table["method"] == "perfect") & (table["score"] == "AUPRC")].iloc[0]
    assert row["value"] == pytest.approx(by_hand.mean()) and row["low"] <= row["value"] <= row["high"]
    assert row["regions"] == 60
    first = table[(table["finding"] == FINDINGS[regions.finding[0]]) & (table["method"] == "perfect")]
    assert first[first["score"] == "AUPRC"]["value"].iloc[0] == pytest.approx(by_hand[regions.finding[0]])
    twice = loc.Regions(*(np.concatenate([part, part]) for part in vars(regions).values()))
    again = loc.localisation_table(twice, {"perfect": twice.shares})
    width = again["high"] - again["low"]
    once = table[table["method"] == "perfect"]["high"] - table[table["method"] == "perfect"]["low"]
    np.testing.assert_allclose(width, once, rtol=1e-5, atol=1e-7)  # the same patients twice are no new facts


def test_a_difference_is_paired():
    regions, rng = some_regions(), np.random.default_rng(1)
    worse = regions.shares + 0.5 * rng.random(regions.shares.shape)
    found = loc.paired_difference(regions, worse, regions.shares).set_index("score")
    assert (found["low"] > 0)["in-mask mass"]
    same = loc.paired_difference(regions, worse, worse)
    assert (same[["value", "low", "high"]] == 0).all(axis=None)


def test_the_share_of_a_patch_goes_the_way_of_the_scan():
    study = generate(4, findings=["Pleural effusion"], shape=(32, 64, 64))
    mask = study.masks["Pleural effusion"]
    shares = loc.patch_shares(mask, study.volume, CONFIG, (2, 2, 2))
    voxels = CONFIG.shape[0] * CONFIG.shape[1] * CONFIG.shape[2] / 8
    mm3 = shares.sum() * voxels * np.prod(CONFIG.spacing)
    assert mm3 == pytest.approx(mask.sum() * np.prod(study.volume.spacing), rel=0.02)
    turned = study.volume.reoriented("LAS")  # the model sees it canonical, and the mask with it
    as_volume = type(study.volume)(mask.astype(np.uint8), study.volume.spacing).reoriented("LAS")
    assert np.allclose(loc.patch_shares(as_volume.hu, turned, CONFIG, (2, 2, 2)), shares)
    covered = loc.patch_shares(np.ones(mask.shape), study.volume, CONFIG, (2, 2, 2))
    assert covered.max() == pytest.approx(1) and (shares <= covered + 1e-6).all()
    with pytest.raises(ValueError, match=r"the mask has shape \(2, 2, 2\), the volume \(32, 64, 64\)"):
        loc.patch_shares(np.ones((2, 2, 2)), study.volume, CONFIG, (2, 2, 2))


def test_regions_are_the_masks_of_the_rows_own_phantoms():
    from medctkit.cohort.manifest import load_manifest

    rows = load_manifest(ROOT / "data_manifest.csv").head(3).to_dict("records")
    regions = loc.find_regions(rows, CONFIG, (2, 2, 2), progress=False)
    for index, row in enumerate(rows):
        here = regions.finding[regions.study == index]
        assert {FINDINGS[k] for k in here} <= {name for name in FINDINGS if row[name] == 1}
        assert set(regions.patients[regions.study == index]) <= {row["patient"]}
    assert len(regions.study) > 0 and (regions.shares.max((1, 2, 3)) > 0).all()


def test_what_has_no_mask_is_refused():
    with pytest.raises(ValueError, match="study x is a real scan: only phantoms know where their findings are"):
        loc.find_regions([{"study": "x", "path": "scan.nii.gz"}], CONFIG, (2, 2, 2), progress=False)
    shares = np.full((1, 2, 2, 2), 0.5)
    with pytest.raises(ValueError, match=r"maps of shape \(1, 2, 2, 3\) and shares of shape \(1, 2, 2, 2\)"):
        loc.score_maps(np.ones((1, 2, 2, 3)), shares)
    for wrong in (-1.0, 0.0, np.nan):
        with pytest.raises(ValueError, match="maps must be finite, not negative, and not all 0"):
            loc.score_maps(np.full((1, 2, 2, 2), wrong), shares)


def test_shuffling_destroys_a_map_and_touches_only_what_it_should():
    torch.manual_seed(0)
    model = tiny_model().unload().eval()
    blind = loc.shuffled(model, ["to_visual_latent"], seed=3)
    for (name, before), after in zip(model.named_parameters(), blind.parameters(), strict=True):
        same = name != "to_visual_latent.weight"
        assert torch.equal(before, after) == same, name
        torch.testing.assert_close(before.flatten().sort()[0], after.flatten().sort()[0])
    data = tiny_data(4)
    rng = np.random.default_rng(0)
    regions = loc.Regions(
        np.array([0, 1, 2, 3]), np.array([1, 5, 7, 7]), np.array(list("abcd")), rng.random((4, 2, 2, 2))
    )
    table = loc.sanity_check(model, tiny_tokenizer(), data, regions, progress=False)
    assert list(table.index) == ["nothing", "projection", "+ temporal attention", "+ spatial attention", "+ patches"]
    assert table.loc["nothing", ["relevance", "rollout"]].tolist() == pytest.approx([1, 1])
    assert table.loc["projection", "rollout"] == pytest.approx(1)  # it does not know the projection
    assert table.loc["+ patches", "relevance"] < 0.9


def test_the_controls_are_the_maps_of_all_other_findings():
    model, data, words = tiny_model().eval(), tiny_data(2), tiny_tokenizer()
    regions = loc.Regions(
        np.array([0, 1, 1]), np.array([0, 3, 17]), np.array(["a", "b", "b"]), np.ones((3, 2, 2, 2))
    )  # fmt: skip
    kinds = {"stating": ["{finding} seen"], "denying": ["no {finding}"]}
    every = loc.relevance_of_regions(model, words, data, regions, kinds, every=True, progress=False)
    own, others = loc.own_and_others(every, regions)
    asked = loc.relevance_of_regions(model, words, data, regions, kinds, progress=False)
    np.testing.assert_allclose(own, asked, rtol=1e-4, atol=1e-6)
    moved = loc.Regions(regions.study, np.array([9, 12, 3]), regions.patients, regions.shares)
    again = loc.relevance_of_regions(model, words, data, moved, kinds, progress=False)
    np.testing.assert_allclose(others[[0, 1, 2], [8, 11, 3]], again, rtol=1e-4, atol=1e-6)
    assert others.shape == (3, 17, 2, 2, 2) and not np.allclose(own, again, atol=1e-3)
    shares = np.random.default_rng(0).random((3, 2, 2, 2))
    together, single = loc.score_maps(others, shares), [loc.score_maps(others[:, i], shares) for i in range(17)]
    np.testing.assert_allclose(together["AUPRC"], np.mean([s["AUPRC"] for s in single], axis=0))


def test_contrast_and_rollout_know_no_prompt():
    model, data = tiny_model().eval(), tiny_data(2)
    regions = loc.Regions(np.array([0, 0, 1]), np.array([0, 3, 3]), np.array(["a", "a", "b"]), np.ones((3, 2, 2, 2)))
    for maps in (loc.contrast_of_regions(data, regions, (2, 2, 2)), loc.rollout_of_regions(model, data, regions)):
        np.testing.assert_array_equal(maps[0], maps[1])
        np.testing.assert_allclose(maps.sum((1, 2, 3)), 1, rtol=1e-5)
