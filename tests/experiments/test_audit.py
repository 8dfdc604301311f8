"""The defects of the public evaluation: shown where the answer is known by hand, and absent where not made."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medctkit.cohort.manifest import load_manifest, volume_from_row
from medctkit.experiments import audit
from medctkit.experiments.audit import Answers, Defect
from medctkit.findings import FINDINGS
from medctkit.metrics.scores import evaluate
from medctkit.model.base_model import load_mini_base
from medctkit.phantom.study import generate
from medctkit.scans.hounsfield import check_hu
from medctkit.scans.preprocessing import PreprocessConfig, preprocess
from medctkit.scans.volumes import CTVolume
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier

NAMES = ["a", "b", "c"]


def simulate(seed, n=80, effect=1.0, prevalence=0.3):
    """Labels (n, 3) and scores of patients of one study each."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 3)) < prevalence).astype(float)
    labels[0], labels[1] = 0, 1
    scores = 1 / (1 + np.exp(-rng.normal(size=(n, 3)) - effect * (labels - 0.5)))
    return Answers(labels, scores, np.arange(n), NAMES)


def of_one_finding(labels, scores):
    return Answers(np.array(labels)[:, None], np.array(scores)[:, None], np.arange(len(labels)), ["a"])


def numbers(defects):
    return {defect.quantity: (defect.public, defect.right) for defect in defects}


# --- from scores alone -----------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
@settings(max_examples=5, deadline=None)
def test_a_bootstrap_that_is_not_used_has_no_width_and_the_right_one_is_that_of_evaluate(seed):
    test = simulate(seed)
    (found,) = audit.unused_bootstrap(test, resamples=50, seed=seed)
    mean = evaluate(**vars(test), resamples=50, seed=seed).loc["mean"]
    assert found.public == 0
    assert found.right == mean["auroc_high"] - mean["auroc_low"] > 0
    (perfect,) = audit.unused_bootstrap(replace(test, scores=test.labels), resamples=50)
    assert (perfect.public, perfect.right) == (0, 0)


def test_thresholds_that_saw_the_test_labels_do_better_by_what_can_be_counted():
    # One finding. In validation 0.8 tells the classes apart; in test the scores sit lower, and 0.3 does.
    test, valid = (of_one_finding([0, 0, 1, 1], scores) for scores in ([0.1, 0.2, 0.3, 0.85], [0.1, 0.2, 0.8, 0.9]))
    assert numbers(audit.thresholds_on_test(test, valid)) == {
        "balanced accuracy": (1.0, 0.75),
        "accuracy": (1.0, 0.75),
        "F1 of the positive class": (1.0, pytest.approx(2 / 3)),
    }


@pytest.mark.parametrize(
    "defect",
    [
        lambda answers: audit.thresholds_on_test(answers, answers),
        lambda answers: audit.counted_by_volume(answers, 1),
    ],
    ids=["thresholds from studies like those of the test", "one volume of each patient"],
)
def test_where_nothing_is_wrong_both_ways_give_the_same(defect):
    assert all(public == right for public, right in numbers(defect(simulate(1))).values())


def test_findings_without_both_classes_in_validation_are_left_out():
    test, valid = simulate(2), simulate(3)
    valid.labels[:, 1] = 0
    keep = [0, 2]
    only = (Answers(x.labels[:, keep], x.scores[:, keep], x.patients, ["a", "c"]) for x in (test, valid))
    assert audit.thresholds_on_test(test, valid) == audit.thresholds_on_test(*only)
    assert audit.thresholds_on_test(test, replace(valid, labels=np.zeros((80, 3)))) == []
    with pytest.raises(ValueError, match=r"validation studies: .*study 4, finding 'b' is 7.0; expected 0, 1 or NaN"):
        valid.labels[4, 1] = 7
        audit.thresholds_on_test(test, valid)


@pytest.mark.slow
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.1, 0.3]))
@settings(max_examples=6, deadline=None)
def test_random_scores_look_better_than_a_coin_only_with_thresholds_from_the_test_labels(seed, prevalence):
    (found,) = audit.thresholds_on_noise(studies=60, prevalence=prevalence, repeats=400, seed=seed)
    assert found.public > 0.53
    assert abs(found.right - 0.5) < 0.03  # its standard error is below 0.008


def test_weighted_f1_counted_by_hand():
    test = of_one_finding([1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0, 0])
    found = numbers(audit.f1_weighted_by_class(test))
    present, absent = 2 * 1 / (2 + 2), 2 * 5 / (6 + 6)
    assert found["mean F1 of these answers"] == (pytest.approx((2 * present + 6 * absent) / 8), pytest.approx(present))
    # a model that always says no: six right, two patients missed
    always_no = "mean F1 of a model that always says no"
    assert found[always_no] == (pytest.approx(6 / 8 * 2 * 6 / (2 * 6 + 2)), 0)
    same = numbers(audit.f1_weighted_by_class(replace(test, scores=np.full((8, 1), 0.2))))
    assert same["mean F1 of these answers"] == same[always_no] == found[always_no]


def test_copies_of_volumes_narrow_the_interval_when_they_are_counted_as_patients():
    test = simulate(5, n=120)
    count, width = audit.counted_by_volume(replace(test, patients=test.patients // 2), reconstructions=4)
    assert (count.public, count.right) == (480, 60)
    # four times as many rows halve the standard error, and so the width
    assert 0.4 < width.public / width.right < 0.6


def test_bad_input_is_named():
    test = simulate(7)
    with pytest.raises(ValueError, match="no finding has both positive and negative studies, so nothing can be scored"):
        audit.f1_weighted_by_class(replace(test, labels=np.zeros((80, 3))))
    with pytest.raises(ValueError, match=r"scores: study 3, finding 'c' is 2.0; expected probabilities from 0 to 1"):
        test.scores[3, 2] = 2
        audit.audit(test, test)


# --- with a model, or scans ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return load_mini_base()


@pytest.fixture(scope="module")
def few(base):
    """The volumes of 24 studies, and what the mini model sees of them."""
    table = load_manifest(Path(__file__).parents[2] / "data_manifest.csv")
    rows = table[(table["hospital"] == "source") & (table["split"] == "test")].head(24)
    volumes = [volume_from_row(row) for row in rows.to_dict("records")]
    classifier = ZeroShotClassifier(base.model, base.tokenizer)
    items = [
        {"pixel_values": preprocess(volume, base.preprocess_config), "patient": row["patient"], "study": row["study"]}
        | {"labels": torch.tensor([float(row[f]) for f in FINDINGS])}
        for volume, row in zip(volumes, rows.to_dict("records"), strict=True)
    ]
    return volumes, classifier.embed(items, progress=False)


def test_the_audit_has_to_go_around_the_guard_that_read_volume_has():
    volume = generate(3, "target").volume
    check_hu(volume.hu)
    for intercept in audit.INTERCEPTS:
        spoiled = audit.rescaled_again(volume, intercept)
        assert np.array_equal(spoiled.hu, volume.hu.astype(np.float32) + intercept)
        assert spoiled.spacing == volume.spacing and np.array_equal(spoiled.affine, volume.affine)
        with pytest.raises(ValueError, match="not in HU"):
            check_hu(spoiled.hu)


@pytest.mark.slow
def test_double_rescale_blinds_the_model(base, few):
    volumes, seen = few
    found = numbers(audit.scans_prepared_otherwise(base, volumes, seen.labels))
    scores = ZeroShotClassifier(base.model, base.tokenizer).scores_from_embeddings(seen.embeddings)
    right = evaluate(seen.labels, scores, np.arange(24), resamples=1).loc["mean", "auroc"]
    assert found["mean AUROC of 24 scans, intercept -8192"] == (0.5, pytest.approx(right, abs=1e-3))
    assert found["mean AUROC of 24 scans, intercept -1024"][0] < right - 0.05
    assert found["mean AUROC of 24 scans, both intercepts as often as in CT-RATE"][0] < right - 0.05
    assert found["voxels at the lowest value, intercept -8192"][0] == 100
    lowest = [float((preprocess(v, base.preprocess_config) == -1).float().mean()) for v in volumes]
    public, honest = found["voxels at the lowest value, intercept -1024"]
    assert honest == pytest.approx(100 * np.mean(lowest), rel=1e-4) and public > 50 > honest
    assert found["spoiled scans that reach the model"] == (100, 0)


def test_clipping_after_resizing_lets_what_is_outside_the_scan_bleed_into_it():
    volume = CTVolume(np.array([-3000, 1000], np.int16)[:, None, None], (1, 1, 1))
    config = PreprocessConfig((2, 1, 1), (1, 1, 1))  # one voxel, halfway between the two
    assert preprocess(volume, config, check=False).item() == 0
    assert audit.clipped_after_resizing(volume, config).item() == -1


@given(st.integers(0, 10**6), st.floats(0.6, 3))
@settings(max_examples=15, deadline=None)
def test_the_order_of_clipping_does_not_matter_for_values_that_need_none(seed, step):
    hu = np.random.default_rng(seed).uniform(-1000, 1000, (7, 6, 5))
    volume, config = CTVolume(hu, (1.5, 1, 2)), PreprocessConfig((step, 1.2, 0.9), (6, 6, 6))
    expected = preprocess(volume, config, check=False)
    assert torch.allclose(audit.clipped_after_resizing(volume, config), expected, atol=1e-6)


def test_clip_order_measures_the_difference_of_the_two_inputs(base):
    twice = [generate(5, "target", ["Medical material"]).volume, generate(6, "target").volume]
    labels = np.repeat([[1.0], [0.0]], 18, axis=1)
    largest, mean = (f"{which} difference between training and evaluation" for which in ("largest", "mean"))
    found = numbers(audit.scans_prepared_otherwise(base, twice, labels))
    after, before = (
        torch.stack([way(v, base.preprocess_config) for v in twice])
        for way in (audit.clipped_after_resizing, preprocess)
    )
    off = 1000 * (after - before).abs()
    assert found[largest] == (pytest.approx(off.max().item()), 0) and found[largest][0] > 10
    assert found[mean][0] == pytest.approx(off.mean().item(), rel=1e-4)
    inside = [replace(v, hu=v.hu.clip(-1000, 1000)) for v in twice]
    assert numbers(audit.scans_prepared_otherwise(base, inside, labels))[largest][0] < 1e-3


def test_prompts_of_training_show_no_mismatch_and_others_move_the_scores(base, few):
    _, seen = few
    same = numbers(audit.prompt_mismatch(base, seen, "paper", "paper"))
    assert all(public == right for public, right in same.values())
    found = numbers(audit.prompt_mismatch(base, seen))
    scores = ZeroShotClassifier(base.model, base.tokenizer, "training-style").scores_from_embeddings(seen.embeddings)
    assert found["answers of 0.5 and above"][1] == pytest.approx(100 * (scores >= 0.5).mean())
    assert found["mean AUROC"][0] == same["mean AUROC"][0]
    assert all(public != right for public, right in found.values())


def test_the_vision_encoder_runs_once_or_once_for_each_finding(base, few):
    volume, hooks = few[0][0], len(base.model.visual_transformer._forward_hooks)
    (found,) = audit.encoder_per_finding(base, volume)
    assert (found.public, found.right, found.unit) == (18, 1, "passes")
    assert len(base.model.visual_transformer._forward_hooks) == hooks
    inputs = preprocess(volume, base.preprocess_config)[None]
    single = [ZeroShotClassifier(base.model, base.tokenizer, findings=[f]).scores(inputs).item() for f in FINDINGS]
    assert np.allclose(single, ZeroShotClassifier(base.model, base.tokenizer).scores(inputs)[0], atol=1e-5)


@pytest.mark.slow
def test_every_defect_is_found(base, few):
    volumes, seen = few
    first = [i for i in range(24) if i % 2]  # half for validation, half for the test
    part = lambda rows: Embedded(seen.embeddings[rows], seen.labels[rows], seen.patients[rows], seen.studies[rows])  # noqa: E731
    test, valid = part(first), part([i - 1 for i in first])
    classifier = ZeroShotClassifier(base.model, base.tokenizer)
    answers = [
        Answers(part.labels, classifier.scores_from_embeddings(part.embeddings), part.patients)
        for part in (test, valid)
    ]
    found = audit.audit(*answers, resamples=20)
    found += audit.prompt_mismatch(base, test)
    found += audit.audit_scans(base, [volumes[i] for i in first[:5]], test.labels)
    assert list(dict.fromkeys(defect.name for defect in found)) == list(audit.DEFECTS)
    assert all(np.isfinite([defect.public, defect.right]).all() for defect in found)
    assert {defect.source.split(",")[0].split(";")[0] for defect in found} == {audit.REPOSITORY}
    assert all(defect.public_way and defect.right_way and defect.why and defect.unit for defect in found)


def test_the_figure_shows_both_numbers_of_every_defect_and_touches_no_global_state(tmp_path):
    import matplotlib.pyplot as plt

    open_figures, texts = plt.get_fignums(), ("asks", "ask", "because", "here")
    defects = [
        Defect("first", "AUROC of it", "AUROC", 0.5, 0.75, *texts),
        Defect("first", "passes of it, which takes many words to say for one volume", "passes", 18, 1, *texts),
        Defect("second", "nothing at all", "HU", 0, 0, *texts),
    ]
    figure = audit.audit_figure(defects)
    figure.savefig(tmp_path / "audit.png")
    for axes in figure.axes:
        ends = axes.get_tightbbox().get_points()
        assert (ends >= 0).all() and (ends <= figure.bbox.size).all(), "cut off at the figure's edge"
    shown = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert shown == [["0.500", "0.750", "AUROC"], ["18", "1", "passes"], ["0.000", "0.000", "HU"]]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["first", "", "second"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["the right way", "the public way"]
    assert plt.get_fignums() == open_figures
    assert len(audit.audit_figure(defects[:1]).axes) == 1
