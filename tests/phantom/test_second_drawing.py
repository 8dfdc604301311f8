"""The second drawing: findings where they belong and nothing else, numbers like those of real scans, fast enough."""

import os
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from medctkit.findings import FINDINGS
from medctkit.phantom.scan import BLUR
from medctkit.phantom.study import SCANNERS, generate

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
PRESSES = ("Atelectasis", "Pleural effusion")  # they say that they move or press lung outside their masks


def drawn(seed, findings, shape=SHAPE, **more):
    return generate(seed, findings=findings, shape=shape, drawing=2, **more)


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
        study = generate(5, hospital, FINDINGS, (32, 64, 64), drawing=2)
        assert set(study.masks) == set(FINDINGS) and study.volume.hu.min() >= -1024


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_cores():
    code = (
        "import hashlib; from medctkit.phantom.study import generate;"
        "s = generate(4, 'target', shape=(24, 48, 48), drawing=2);"
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


def test_a_drawing_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"drawing=3 is unknown; choose one of \[1, 2\]"):
        generate(0, drawing=3)


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


@pytest.mark.parametrize("hospital", SCANNERS[2])
def test_phantoms_measure_like_real_scans(hospital):
    """Each number of most phantoms lies within the spread of the real scans, and the mean of all of them does."""
    found = []
    for seed in range(4):
        study = generate(seed, hospital, [], (107, 180, 180), drawing=2)
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
