"""Phantoms: every finding where it belongs, deterministic, with the prevalences of CT-RATE."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medctkit.findings import FINDINGS, PREVALENCE
from medctkit.phantom.registry import REGISTRY, Finding
from medctkit.phantom.study import HOSPITALS, TRAINING_SHAPE, draw_labels, generate

IN_LUNG = (
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Mosaic attenuation pattern",
    "Consolidation",
    "Interlobular septal thickening",
)


def centre_mm(study, name):
    """Centre of a finding's mask, (z, y, x) in mm from the middle of the scan."""
    place = np.argwhere(study.masks[name]).mean(axis=0)
    return (place - (np.array(study.volume.hu.shape) - 1) / 2) * study.volume.spacing


@pytest.fixture(scope="module")
def pairs():
    """For each finding a few seeds with the finding alone, and the same seeds healthy."""
    seeds = range(4)
    healthy = {s: generate(s, findings=[]) for s in seeds}
    return {name: [(generate(s, findings=[name]), healthy[s]) for s in seeds] for name in FINDINGS}


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_has_a_mask_and_changes_the_scan_where_the_mask_is(pairs, name):
    for sick, healthy in pairs[name]:
        mask = sick.masks[name]
        assert list(sick.masks) == [name] and mask.shape == TRAINING_SHAPE and mask.any()
        change = np.abs(sick.volume.hu.astype(int) - healthy.volume.hu)
        assert change[mask].mean() > 3 * change[~mask].mean() + 5


@pytest.mark.parametrize("name", IN_LUNG)
def test_lung_findings_lie_in_the_lung(pairs, name):
    for sick, healthy in pairs[name]:
        # partial volume makes a rim of the lung denser than the lung itself
        assert (healthy.volume.hu[sick.masks[name]] < -300).mean() > 0.75


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [  # z up, y back, x left; mm
        ("Cardiomegaly", (-70, -50, -10), (0, 20, 40)),
        ("Pericardial effusion", (-80, -50, -15), (10, 30, 45)),
        ("Hiatal hernia", (-110, 15, -30), (0, 75, 50)),
        ("Coronary artery wall calcification", (-80, -90, -40), (20, 40, 80)),
        ("Pleural effusion", (-150, 0, -130), (40, 110, 130)),
        ("Arterial wall calcification", (-180, -40, -40), (90, 90, 60)),
        ("Lymphadenopathy", (-10, -80, -175), (110, 60, 175)),
    ],
)
def test_findings_lie_where_anatomy_puts_them(pairs, name, low, high):
    for sick, _ in pairs[name]:
        centre = centre_mm(sick, name)
        assert (centre > np.array(low) - 15).all() and (centre < np.array(high) + 15).all(), centre


def test_emphysema_is_dark_and_consolidation_dense(pairs):
    for name, sign in (("Emphysema", -1), ("Consolidation", 1), ("Lung opacity", 1), ("Pleural effusion", 1)):
        for sick, healthy in pairs[name]:
            mask = sick.masks[name]
            difference = sick.volume.hu[mask].astype(int) - healthy.volume.hu[mask]
            assert sign * difference.mean() > 15


def test_all_findings_at_once_and_none():
    everything = generate(5, "target", FINDINGS)
    assert set(everything.masks) == set(FINDINGS) and sum(everything.labels.values()) == 18
    nothing = generate(5, "target", [])
    assert not nothing.masks and sum(nothing.labels.values()) == 0


@given(seed=st.integers(0, 10**6), hospital=st.sampled_from(sorted(HOSPITALS)))
@settings(max_examples=8, deadline=None)
def test_the_same_seed_gives_the_same_bytes(seed, hospital):
    first, second = generate(seed, hospital), generate(seed, hospital)
    assert first.volume.hu.tobytes() == second.volume.hu.tobytes()
    assert first.report == second.report and first.labels == second.labels
    assert first.volume.hu.dtype == np.int16 and first.volume.hu.min() >= -1024


def test_a_patient_keeps_anatomy_and_a_reconstruction_keeps_everything_but_the_picture():
    one = generate(11, "target", patient="P7")
    again = generate(11, "target", patient="P7", reconstruction=1)
    assert one.labels == again.labels and one.report == again.report
    assert not np.array_equal(one.volume.hu, again.volume.hu)
    assert np.corrcoef(one.volume.hu.ravel(), again.volume.hu.ravel())[0, 1] > 0.98


def test_scans_of_a_patient_show_the_same_body():
    def width(seed, patient):
        study = generate(seed, "target", [], patient=patient)
        across = np.flatnonzero(study.volume.hu[16, 30] > -300)  # a row through the middle of the chest
        return (across[-1] - across[0]) * study.volume.spacing[2]

    widths = np.array([[width(seed, f"P{p}") for seed in (1, 2)] for p in range(8)])
    assert np.abs(widths[:, 0] - widths[:, 1]).max() <= 2 * 430 / 64
    assert widths[:, 0].std() > 10


def test_the_same_study_at_another_resolution():
    small, large = (
        generate(21, findings=["Pleural effusion"]),
        generate(21, findings=["Pleural effusion"], shape=(48, 96, 96)),
    )
    assert small.report == large.report
    assert np.allclose(centre_mm(small, "Pleural effusion"), centre_mm(large, "Pleural effusion"), atol=12)


def test_a_finding_can_be_added():
    def cube(chest, rng):
        share = np.zeros(chest.canvas.shape)
        share[10:12, 20:24, 20:24] = 1
        chest.canvas.hu[share > 0] = 900
        return share, dict(size_mm=12)

    says = {"present": ["A cube{size}."], "absent": ["No cube."]}
    entry = Finding("Cube", 0.3, cube, dict.fromkeys(HOSPITALS, says), group="devices", layer=10)
    registry = {**REGISTRY, "Cube": entry}
    drawn = [draw_labels(s, f"p{s}", registry) for s in range(400)]
    assert [tuple(labels)[-1] for labels in drawn] == ["Cube"] * 400
    assert 0.2 < np.mean([labels.pop("Cube") for labels in drawn]) < 0.4
    assert drawn == [draw_labels(s, f"p{s}") for s in range(400)]  # the 18 stay as they were
    studies = [generate(s, findings=["Cube"], registry=registry) for s in range(4)]
    assert all(s.masks["Cube"].sum() == 32 and (s.volume.hu[s.masks["Cube"]] > 500).all() for s in studies)
    assert any("A cube" in s.report for s in studies) and "Cube" not in generate(0).labels
    with pytest.raises(ValueError, match="Cube"):
        generate(0, findings=["Cube"])


def test_prevalences_are_those_of_ct_rate():
    labels = np.array([list(draw_labels(s, f"p{s}").values()) for s in range(6000)])
    expected = np.array([PREVALENCE[name] for name in FINDINGS])
    error = np.sqrt(expected * (1 - expected) / len(labels))
    assert (np.abs(labels.mean(axis=0) - expected) < 4 * error).all()


def test_scans_of_one_patient_resemble_each_other():
    first = np.array([list(draw_labels(0, f"p{s}").values()) for s in range(3000)])
    second = np.array([list(draw_labels(1, f"p{s}").values()) for s in range(3000)])
    agreement = (first & second).sum() / first.sum()
    assert 1.5 * np.mean(list(PREVALENCE.values())) < agreement < 0.9


def test_hospitals_differ_as_scanners_do():
    blood = {}
    for hospital, scanner in HOSPITALS.items():
        volumes = [generate(s, hospital, []).volume for s in range(6)]
        ventricle = np.array([-44, -24, 38]) + scanner.centre  # mm from the middle of the scan
        at = ventricle / volumes[0].spacing + (np.array(TRAINING_SHAPE) - 1) / 2
        blood[hospital] = np.mean([v.hu[tuple(at.round().astype(int))] for v in volumes])
    assert blood["target"] > blood["source"] + 60  # contrast medium
    spacing = {h: generate(0, h, []).volume.spacing for h in HOSPITALS}
    assert spacing["target"][1] > spacing["source"][1]  # field of view


@pytest.mark.parametrize("name", FINDINGS)
def test_the_smallest_shape_has_every_finding(name):
    study = generate(0, findings=[name], shape=(8, 8, 8))
    assert study.volume.hu.shape == study.masks[name].shape == (8, 8, 8) and study.masks[name].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(seed=1, hospital="mars"), r"hospital='mars' is unknown; choose one of \['source', 'target'\]"),
        (dict(seed=-1), "seed=-1: expected a whole number"),
        (dict(seed=1.5), "seed=1.5"),
        (dict(seed=1, findings=["Broken rib"]), r"unknown findings \['Broken rib'\]"),
        (dict(seed=1, findings="Emphysema"), "expected a list of names"),
        (dict(seed=1, shape=(4, 64, 64)), "each at least 8"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(**arguments)
