"""Free fixes undo what they are for and know no label; rivals learn what they should, and choose on validation."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from medctkit.experiments.compare import fixes, rivals
from medctkit.experiments.compare.data import HELD_OUT, held_out
from medctkit.experiments.compare.fixes import coral, hu_boxes, lung_centre, matched, recentred, registered
from medctkit.experiments.compare.rivals import RIVALS, best, logistic, ridge_map
from medctkit.experiments.compare.runs import PROBE, SETTINGS, Job, settings_of
from medctkit.findings import FINDINGS
from medctkit.training.objectives import joint_loss
from medctkit.zero_shot.embeddings import Changed

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")


# --- free fixes -----------------------------------------------------------------------------------------


def chest(emphysema=False):
    """A body in noisy air, with two lungs, one of them larger: (1, d, h, w)."""
    generator = torch.Generator().manual_seed(0)
    volume = -1 + 0.1 * torch.rand(1, 12, 24, 24, generator=generator)
    volume[:, 3:9, 6:18, 6:18] = 0.05
    volume[:, 4:8, 8:16, 8:11] = -0.97 if emphysema else -0.85
    volume[:, 4:8, 8:14, 13:15] = -0.8
    return volume


@pytest.mark.parametrize("by", [(0, 0, 0), (2, 0, 0), (-3, 4, -5), (1, -6, 6)])
def test_registration_undoes_a_shift_exactly(by):
    volume = chest()
    volume[volume < -0.9] = -1.0
    shifted = torch.roll(volume, by, (1, 2, 3))
    for centre in (lung_centre(volume), lung_centre(volume) + 0.5):  # halves are rounded alike wherever it lies
        assert torch.equal(registered(shifted, centre), registered(volume, centre))
    assert torch.equal(registered(shifted, lung_centre(volume)), volume)


def test_lungs_are_air_within_the_body_emphysema_too():
    places = np.argwhere((chest()[0] < -0.5).numpy())
    inside = places[((places >= [4, 8, 8]) & (places < [8, 16, 15])).all(1)]
    for volume in (chest(), chest(emphysema=True)):
        np.testing.assert_allclose(lung_centre(volume), inside.mean(0))


@pytest.mark.parametrize("value", [-1.0, 0.05, 1.0])
def test_a_scan_without_lungs_or_body_stays_as_it_is(value):
    volume = torch.full((1, 8, 9, 10), value)
    assert torch.equal(registered(volume, np.array([1.0, 2.0, 3.0])), volume)
    to = np.linspace(-0.9, 0.9, len(fixes.LEVELS))
    assert value > -1 or torch.equal(matched(volume, to), volume)


def test_matching_gives_the_quantiles_asked_for_and_its_own_change_nothing():
    volume, other = chest(), chest() * 0.7 + 0.1
    own, wanted = fixes.body_quantiles(volume), fixes.body_quantiles(other)
    assert not np.allclose(own, wanted, atol=0.05)
    torch.testing.assert_close(matched(volume, own), volume)
    torch.testing.assert_close(matched(other, wanted, of=wanted), other)
    assert torch.equal(matched(volume, wanted)[volume <= fixes.AIR], volume[volume <= fixes.AIR])
    smooth = torch.linspace(-0.9, 0.9, 24**3).reshape(1, 24, 24, 24)
    np.testing.assert_allclose(fixes.body_quantiles(matched(smooth, wanted)), wanted, atol=0.01)
    drift = matched(smooth + 0.05, fixes.body_quantiles(smooth), of=fixes.body_quantiles(smooth + 0.05))
    torch.testing.assert_close(drift, smooth, atol=1e-3, rtol=0)


def test_alignment_gives_mean_and_covariance_asked_for_and_to_itself_is_nothing():
    generator = torch.Generator().manual_seed(0)
    of = torch.randn(400, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 3
    to = torch.randn(300, 5, generator=generator) @ torch.randn(5, 5, generator=generator) - 1
    for align in (recentred, coral):
        torch.testing.assert_close(align(of, of, of), of, atol=1e-4, rtol=0)
        torch.testing.assert_close(align(of, of, to).mean(0), to.mean(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(coral(of, of, to, shrink=0).T), torch.cov(to.T), atol=1e-3, rtol=0)
    assert not torch.allclose(torch.cov(recentred(of, of, to).T), torch.cov(to.T), atol=0.1)


@pytest.mark.parametrize("place, hu, band", [((0, 0, 0), 650, 12), ((5, 7, 11), -1000, 0), ((2, 9, 3), 70, 8)])
def test_shares_of_boxes_sum_to_one_and_a_voxel_lands_in_its_band_and_box(place, hu, band):
    volume = torch.full((1, 8, 12, 12), 0.0)  # 4 x 4 x 4 boxes of 2 x 3 x 3 voxels
    volume[(0, *place)] = hu / 1000
    shares = hu_boxes(volume).reshape(len(fixes.BANDS) - 1, 4, 4, 4)
    np.testing.assert_allclose(shares.sum(0), 1, atol=1e-6)
    box = (place[0] // 2, place[1] // 3, place[2] // 3)
    assert fixes.BANDS[band] < hu <= fixes.BANDS[band + 1] or band == 0
    assert shares[(band, *box)] == pytest.approx(1 / 18) and shares[band].sum() == pytest.approx(1 / 18)


# --- rivals ---------------------------------------------------------------------------------------------


def drawn(n, seed, one_class=()):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, 18)).astype(float)
    labels[:, list(one_class)] = 0
    return rng.normal(size=(n, 5)) * [1, 10, 100, 1, 1] + labels[:, :5] * [2, 5, 0, 0, 0], labels


def test_logistic_is_scikit_learns_on_standardised_features_chosen_on_validation():
    (train, labels), (valid, truth), (test, _) = drawn(60, 0), drawn(50, 1), drawn(30, 2)
    found = logistic(train, labels, valid, truth, test, strengths=(1e-4, 1.0))
    by_hand = {}
    for strength in (1e-4, 1.0):
        x, *seen = ((split - train.mean(0)) / train.std(0) for split in (train, valid, test))
        models = [LogisticRegression(C=strength).fit(x, labels[:, k]) for k in range(18)]
        scores = [np.stack([m.predict_proba(split)[:, 1] for m in models], axis=1) for split in seen]
        by_hand[np.mean([roc_auc_score(truth[:, k], scores[0][:, k]) for k in range(18)])] = (strength, scores[1])
    strength, scores = by_hand[max(by_hand)]
    assert found.chosen == f"C = {strength:g}" and found.trained == 18 * 6 and found.one_class == ()
    np.testing.assert_allclose(found.test, scores, atol=1e-4)


def test_a_finding_of_one_class_in_training_scores_one_half_and_is_named():
    (train, labels), (valid, truth), (test, _) = drawn(20, 0, one_class=[3, 17]), drawn(30, 1), drawn(10, 2)
    found = logistic(train, labels, valid, truth, test, [1.0])
    assert found.one_class == (FINDINGS[3], FINDINGS[17])
    assert (found.test[:, [3, 17]] == 0.5).all() and (found.test[:, 4] != 0.5).all()
    with pytest.raises(ValueError, match="no finding has both positive and negative studies in the validation data"):
        logistic(train, labels, valid, 0 * truth, test, [1.0])


def test_a_label_that_is_unknown_is_left_out_and_the_others_of_its_finding_and_study_count():
    (train, labels), (valid, truth), (test, _) = drawn(60, 0), drawn(50, 1), drawn(30, 2)
    labels[:20, 0], labels[20:, 1], labels[20, 1] = np.nan, np.nan, 1 - labels[0, 1]
    found = logistic(train, labels, valid, truth, test, [1.0])
    x, seen = ((split - train.mean(0)) / train.std(0) for split in (train, test))
    for k, rows in enumerate((slice(20, None), slice(21), slice(None))):
        model = LogisticRegression(C=1.0).fit(x[rows], labels[rows, k])
        np.testing.assert_allclose(found.test[:, k], model.predict_proba(seen)[:, 1], atol=1e-4)
    assert found.one_class == ()


def test_rivals_learn_from_studies_with_unknown_labels(data):
    train = copy.copy(data.train)
    train.rows = [row | {FINDINGS[i % 18]: np.nan} for i, row in enumerate(train.rows)]
    for name in (PROBE, "ridge"):
        found = RIVALS[name].score(replace(data, train=train), range(len(train)))
        assert np.isfinite(found.test).all() and found.trained


def test_ridge_without_strength_recovers_a_linear_map_and_with_much_shrinks_to_nothing():
    generator = torch.Generator().manual_seed(0)
    images, matrix = torch.randn(50, 6, generator=generator), torch.randn(6, 6, generator=generator)
    torch.testing.assert_close(ridge_map(images, images @ matrix, 0.0), matrix)
    lengths = [ridge_map(images, images @ matrix, strength).norm() for strength in (0.0, 0.1, 1.0, 1e6)]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < 1e-3
    twice = torch.cat([images, images])
    torch.testing.assert_close(ridge_map(twice, twice @ matrix, 0.1), ridge_map(images, images @ matrix, 0.1))


def relabelled(data, *splits):
    """The same studies with every label of these splits turned round."""
    other = {}
    for split in splits:
        dataset = copy.copy(getattr(data, split))
        dataset.rows = [row | {name: 1 - row[name] for name in FINDINGS} for row in dataset.rows]
        other[split] = dataset
    return replace(data, **other)


@pytest.fixture(scope="module")
def others(data):
    """The same with other labels: of all studies for what is free, else of the test studies."""
    test, every = relabelled(data, "test", "home"), relabelled(data, "train", "valid", "test", "home")
    return {"none": every, "choose": test, "learn": test}


SLOW = {"best-free", "hu-boxes", "all-free", "intensities"}  # many combinations, many regressions


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in RIVALS])
def test_no_rival_looks_at_test_labels_nor_a_free_fix_at_any(name, data, others, monkeypatch):
    monkeypatch.setattr(rivals, "STRENGTHS", (1e-3, 1.0))
    rival, studies = RIVALS[name], range(len(data.train))
    found = rival.score(data, studies)
    assert found.valid.shape == (len(data.valid), 18) and found.test.shape == (len(data.test), 18)
    assert ((found.test >= 0) & (found.test <= 1)).all() and found.test.std() > 0
    assert bool(found.trained) == (rival.labels == "learn") and bool(found.chosen) == (rival.labels != "none")
    np.testing.assert_array_equal(rival.score(others[rival.labels], studies).test, found.test)


def test_the_best_is_chosen_by_validation_and_of_equals_the_first(data):
    labels = data.labels("valid")
    first = RIVALS["coral"].score(data, range(len(data.train)))
    right = replace(first, valid=labels, test=first.test + 1)
    assert best([first, right, replace(right, chosen="later")], labels) is right


# --- held out -------------------------------------------------------------------------------------------


def test_held_out_labels_are_unknown_and_no_loss_sees_them(data):
    item = data.train[0]
    hidden = held_out(item)["labels"].isnan().tolist()
    assert [name for name, gone in zip(FINDINGS, hidden, strict=True) if gone] == sorted(HELD_OUT, key=FINDINGS.index)
    assert not item["labels"].isnan().any(), "the study itself is as it was"

    places = [FINDINGS.index(name) for name in HELD_OUT]
    images, prompts = (torch.nn.functional.normalize(torch.randn(n, 8), dim=-1) for n in (4, 36))
    losses = []
    for flip in (False, True):
        batch = [dict(data.train[i]) for i in range(4)]
        for each in batch:
            each["labels"] = each["labels"].clone()
            each["labels"][places] = abs(each["labels"][places] - int(flip))
        labels = torch.stack([item["labels"] for item in Changed(batch, held_out)])
        losses.append(joint_loss(images, None, prompts, {"labels": labels}, torch.zeros(()), 0.0, 1.0)["loss"])
    assert torch.equal(*losses)
    settings = settings_of(Job("unseen", "lora", 16, variant="unseen"), replace(SETTINGS, contrastive_weight=1.0), {})
    assert settings["contrastive_weight"] == 0, "reports speak of them"
