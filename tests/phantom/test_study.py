"""Phantoms: findings where they belong and nothing else, numbers like those of real scans, fast enough."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medctkit.findings import FINDINGS, PREVALENCE
from medctkit.phantom.registry import REGISTRY, Finding
from medctkit.phantom.scan import BLUR
from medctkit.phantom.study import HOSPITALS, draw_labels, generate

SHAPE = (48, 80, 80)
SEEDS = range(3)
IN_LUNG = (
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Mosaic attenuation pattern",
    "Consolidation",
    "Interlobular septal thickening",
    "Pleural effusion",
    "Bronchiectasis",
)
# they say that they move or press lung outside their masks
PRESSES = ("Atelectasis", "Pleural effusion", "Pulmonary fibrotic sequela")


def drawn(seed, findings, shape=SHAPE, **more):
    return generate(seed, findings=findings, shape=shape, **more)


@pytest.fixture(scope="module")
def healthy():
    return {seed: drawn(seed, []) for seed in SEEDS}


@pytest.fixture(scope="module")
def pairs(healthy):
    """For each finding a few studies with it alone, and the same patients without."""
    return {name: [(drawn(seed, [name]), healthy[seed]) for seed in SEEDS] for name in FINDINGS}


@pytest.mark.parametrize("name", FINDINGS)
def test_outside_what_a_finding_changes_the_scan_is_the_healthy_patients(pairs, name):
    for sick, twin in pairs[name]:
        mask, change = sick.masks[name], np.abs(sick.volume.hu.astype(int) - twin.volume.hu)
        assert list(sick.masks) == [name] and mask.shape == SHAPE and mask.any()
        assert not change[~sick.changed].any() and not twin.changed.any()
        assert (mask <= sick.changed).mean() > 0.999
        assert change[mask].mean() > 3 * change[~mask].mean() + 5
        if name not in PRESSES:  # soft edges and the scanner's blur reach no farther than some voxels
            near = ndimage.binary_dilation(mask, iterations=3 + BLUR)
            assert change[~near].sum() < 0.03 * change.sum()


@pytest.mark.parametrize("name", IN_LUNG)
def test_lung_findings_lie_in_the_lung(pairs, name):
    for sick, twin in pairs[name]:
        if name == "Atelectasis":
            continue  # it lifts the diaphragm into what was lung
        assert (twin.volume.hu[sick.masks[name]] < -300).mean() > 0.7


def test_a_one_sided_effusion_leaves_the_other_side_alone():
    sides = set()
    for seed in range(12):
        sick, twin = drawn(seed, ["Pleural effusion"], (32, 64, 64)), drawn(seed, [], (32, 64, 64))
        side = sick.details["Pleural effusion"]["side"]
        if side == "bilateral":
            continue
        sides.add(side)
        other = slice(0, 26) if side == "left" else slice(38, 64)
        change = sick.volume.hu.astype(int) - twin.volume.hu
        assert not change[:, :, other].any() and np.abs(change).max() > 500
    assert sides == {"left", "right"}


def test_atelectasis_takes_volume(healthy):
    """Less air in the lungs, by more than the mask holds."""

    def air(study):
        return (study.volume.hu < -600).sum()

    lost = [air(healthy[s]) - air(drawn(s, ["Atelectasis"])) for s in SEEDS]
    masks = [drawn(s, ["Atelectasis"]).masks["Atelectasis"].sum() for s in SEEDS]
    assert sum(lost) > sum(masks)


def behind(voxels):
    """Where any of voxels (d, h, w) lies farther back in the same row."""
    return np.flip(np.cumsum(np.flip(voxels, 1), 1), 1) > 0


def test_fluid_of_a_patient_on_the_back_lies_behind_the_air():
    for seed in range(4):
        sick = drawn(seed, ["Pleural effusion"])
        lung = (sick.volume.hu < -700) & behind(sick.volume.hu > -300)
        fluid = sick.masks["Pleural effusion"]
        assert (fluid & behind(lung)).sum() < 0.01 * fluid.sum()


@pytest.mark.parametrize("hospital", HOSPITALS)
def test_a_consolidation_is_as_dense_as_water_at_any_hospital(hospital):
    """And darker where air stays in its bronchi; a hospital whose disease is milder does not see it paler."""
    for seed in range(3):
        sick = drawn(seed, ["Consolidation"], (80, 160, 160), hospital=hospital)
        core = ndimage.binary_erosion(sick.masks["Consolidation"], iterations=3)
        assert np.median(sick.volume.hu[core]) > -20, (seed, np.median(sick.volume.hu[core]))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [  # share of the scan from the feet, front and right
        ("Cardiomegaly", (0.3, 0.25, 0.4), (0.7, 0.6, 0.75)),
        ("Pericardial effusion", (0.25, 0.25, 0.4), (0.7, 0.65, 0.75)),
        ("Hiatal hernia", (0.2, 0.35, 0.4), (0.6, 0.7, 0.65)),
        ("Coronary artery wall calcification", (0.35, 0.2, 0.4), (0.75, 0.55, 0.75)),
        ("Arterial wall calcification", (0.4, 0.3, 0.4), (0.9, 0.7, 0.7)),
        ("Lymphadenopathy", (0.5, 0.2, 0.1), (0.95, 0.7, 0.9)),
        ("Pleural effusion", (0.2, 0.5, 0.1), (0.8, 0.9, 0.9)),
    ],
)
def test_findings_lie_where_anatomy_puts_them(pairs, name, low, high):
    for sick, _ in pairs[name]:
        centre = np.argwhere(sick.masks[name]).mean(axis=0) / SHAPE
        assert (centre > low).all() and (centre < high).all(), centre


@pytest.mark.parametrize("name", FINDINGS)
def test_the_smallest_shape_has_every_finding(name):
    study = drawn(1, [name], (8, 8, 8))
    assert study.volume.hu.shape == study.masks[name].shape == (8, 8, 8) and study.masks[name].any()


def test_all_findings_at_once_at_both_hospitals():
    for hospital in ("source", "target"):
        study = generate(5, hospital, FINDINGS, (32, 64, 64))
        assert set(study.masks) == set(FINDINGS) and study.volume.hu.min() >= -1024


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_on_any_number_of_cores():
    code = (
        "import hashlib; from medctkit.phantom.study import generate;"
        "s = generate(4, 'target', shape=(24, 48, 48));"
        "print(hashlib.sha256(s.volume.hu.tobytes() + s.report.encode()).hexdigest())"
    )
    run = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | dict(OMP_NUM_THREADS=n, NUMBA_NUM_THREADS=n),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in ("1", "2")
    ]
    assert run[0] == run[1] and len(run[0]) > 60


def test_a_patient_keeps_body_sex_and_age_over_scans_and_resolutions():
    one, two = (drawn(seed, [], patient="P3") for seed in (1, 2))
    fine = drawn(1, [], (60, 120, 120), patient="P3")
    assert (one.sex, one.age) == (two.sex, two.age) == (fine.sex, fine.age) and one.sex in "FM" and 20 <= one.age <= 92
    low = ndimage.zoom(fine.volume.hu.astype(float), np.divide(SHAPE, fine.volume.hu.shape), order=1)
    assert np.corrcoef(low.ravel(), one.volume.hu.ravel())[0, 1] > 0.97
    people = [drawn(seed, [], (8, 8, 8)) for seed in range(60)]
    assert 0.25 < np.mean([p.sex == "F" for p in people]) < 0.7 and np.std([p.age for p in people]) > 8


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


def test_a_finding_can_be_added():
    def cube(body, rng):
        share = np.zeros(body.shape)
        share[10:12, 20:24, 20:24] = 1
        body.hu[share > 0] = 900
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


def test_scans_of_one_patient_resemble_each_other():
    first = np.array([list(draw_labels(0, f"p{s}").values()) for s in range(3000)])
    second = np.array([list(draw_labels(1, f"p{s}").values()) for s in range(3000)])
    agreement = (first & second).sum() / first.sum()
    assert 1.5 * np.mean(list(PREVALENCE.values())) < agreement < 0.9


def test_hospitals_differ_as_scanners_do():
    def heart(hospital, seed):
        """Upper quartile of the soft tissue in the middle of the chest, HU."""
        hu = drawn(seed, [], hospital=hospital).volume.hu[16:34, 14:56, 22:60]
        return np.percentile(hu[(hu > -50) & (hu < 400)], 75)

    blood = {h: np.mean([heart(h, seed) for seed in range(6)]) for h in HOSPITALS}
    assert blood["target"] > blood["source"] + 40  # contrast medium
    spacing = {h: drawn(0, [], hospital=h).volume.spacing for h in HOSPITALS}
    assert spacing["target"][1] > spacing["source"][1]  # field of view


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


def test_emphysema_is_dark_and_consolidation_dense(pairs):
    for name, sign in (("Emphysema", -1), ("Consolidation", 1), ("Lung opacity", 1), ("Pleural effusion", 1)):
        for sick, healthy in pairs[name]:
            mask = sick.masks[name]
            difference = sick.volume.hu[mask].astype(int) - healthy.volume.hu[mask]
            assert sign * difference.mean() > 15


# --- numbers of real scans ----------------------------------------------------------------------------------
# Lowest and highest of four public scans (Chest Imaging Platform ct-64; TotalSegmentator's aorta and example crops;
# SuperElastix 3DCT_lung_baseline_small), measured by `numbers` below; MEDCTKIT_REAL_CT points to them.
REAL = {
    "lung median": (-952, -797),
    "lung 5 to 95 %": (150, 400),
    "vessels in lung": (0.010, 0.055),
    "fat": (-115, -98),
    "soft tissue": (40, 75),
    "noise": (3.6, 32.0),
    "noise at 1 pixel": (-0.14, 0.36),
    "noise at 2 pixels": (-0.09, 0.05),
    "noise at 3 pixels": (-0.19, 0.03),
}


def numbers(hu, spacing):
    """What a scan (d, h, w) measures: HU of lung, fat and soft tissue, spread and correlation of noise in a slice."""
    hu = hu.astype(np.float32)
    smooth = ndimage.gaussian_filter(hu, 1.0)
    lung = ndimage.binary_opening((smooth > -975) & (smooth < -600), iterations=2)
    pieces, count = ndimage.label(lung)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1) * np.prod(spacing)
    sizes[0] = 0
    lung = ndimage.binary_closing(np.isin(pieces, np.flatnonzero(sizes > 250e3)), iterations=3)
    air = hu[ndimage.binary_erosion(lung, iterations=max(1, int(6 / spacing[2])))]
    fat = ndimage.binary_erosion((smooth > -150) & (smooth < -70))
    even = (smooth > 20) & (smooth < 100) & (ndimage.gaussian_gradient_magnitude(hu, 2.0) < 6)
    even = ndimage.binary_erosion(even, iterations=2)
    weight, blur = even.astype(np.float32), (0, 3, 3)
    mean = ndimage.gaussian_filter(hu * weight, blur) / np.maximum(ndimage.gaussian_filter(weight, blur), 1e-3)
    rest = (hu - mean) * weight
    out = {
        "lung median": np.median(air),
        "lung 5 to 95 %": np.ptp(np.percentile(air, [5, 95])),
        "vessels in lung": (air > -500).mean(),
        "fat": np.median(hu[fat]),
        "soft tissue": np.median(hu[even]),
        "noise": rest[even].std(),
    }
    for k in (1, 2, 3):
        a, b, both = rest[:, :, k:], rest[:, :, :-k], even[:, :, k:] & even[:, :, :-k]
        correlation = (a * b)[both].mean() / np.sqrt((a[both] ** 2).mean() * (b[both] ** 2).mean())
        out[f"noise at {k} pixel{'s' * (k > 1)}"] = correlation
    return out


@pytest.mark.slow
@pytest.mark.parametrize("hospital", HOSPITALS)
def test_phantoms_measure_like_real_scans(hospital):
    """Each number of most phantoms lies within the spread of the real scans, and the mean of all of them does."""
    found = []
    for seed in range(4):
        study = generate(seed, hospital, [], (107, 180, 180))
        hu, spacing = study.volume.hu, study.volume.spacing
        found.append(numbers(hu, spacing))
        if study.contrast:  # the one real scan with contrast medium ends above the liver, which takes most of it up
            found[-1]["soft tissue"] = numbers(hu[44:], spacing)["soft tissue"]
    for name, (low, high) in REAL.items():
        values = np.array([row[name] for row in found])
        inside = (values >= low) & (values <= high)
        assert low <= values.mean() <= high and inside.mean() >= 0.5, (name, values)


@pytest.mark.skipif("MEDCTKIT_REAL_CT" not in os.environ, reason="MEDCTKIT_REAL_CT names no folder with real scans")
@pytest.mark.parametrize(
    "scan",
    ["cip_ct64/ct-64.nrrd", "totalseg_aorta_cropped/ct_cropped.nii.gz", "totalseg_example/example_ct.nii.gz",
     "elastix_lung/3DCT_lung_baseline_small.mha"],
)  # fmt: skip
def test_real_scans_measure_as_written_here(scan):
    from medctkit.scans.volumes import read_volume

    volume = read_volume(os.path.join(os.environ["MEDCTKIT_REAL_CT"], scan)).reoriented()
    for name, value in numbers(volume.hu, volume.spacing).items():
        low, high = REAL[name]
        assert low - 0.02 * abs(low) - 0.02 <= value <= high + 0.02 * abs(high) + 0.02, (name, value)
