"""Phantom studies: a chest, its findings, a scanner and a report, all from one seed.

A phantom is a drawing with known truth, not a patient: every finding has its mask, the report says what was
painted, and the same seed gives the same study at any resolution. Two hospitals scan and report
differently, as hospitals do; the difference is what LoRA learns to bridge in the notebooks.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from medctkit.findings import FINDINGS
from medctkit.phantom.anatomy import Anatomy, Canvas
from medctkit.phantom.chest import Chest
from medctkit.phantom.patient import Patient
from medctkit.phantom.registry import REGISTRIES, REGISTRY, Finding, label_order
from medctkit.phantom.report_text import write_report
from medctkit.phantom.scan import draw, expose
from medctkit.phantom.tissue import Tissue
from medctkit.scans.geometry import CANONICAL, straight_affine
from medctkit.scans.volumes import CTVolume

FIELD_OF_VIEW = 360.0  # mm, that of the released pipeline: 240 slices of 1.5 mm, 480 pixels of 0.75 mm
TRAINING_SHAPE = (32, 64, 64)


@dataclass(frozen=True)
class Hospital:
    """How a hospital scans.

    Attributes:
        field_of_view: width of the reconstructed picture, mm.
        contrast: share of scans with intravenous contrast medium.
        thickness: slice thickness as a multiple of the slice spacing.
        sharpness: edge enhancement of the kernel; negative smooths.
        noise: standard deviation in soft tissue (HU) at 1.5 x 0.7 x 0.7 mm.
        grain: correlation length of the noise, in pixels.
        drift: standard deviation of the calibration offset, HU.
        table: shape of the table under the patient, "curved" or "flat".
        centre: (z, y, x) in mm of the patient's thorax from the middle of the scan, on average.
        spread: (z, y, x) standard deviation of that place over scans, mm.
        raised: height of the diaphragm above that of a full breath, mean and standard deviation over scans, mm.
        density: smallest and largest share of its density that disease of lungs and airways reaches; below 1, milder.
        case_mix: factors on the prevalence of findings; what is not named has 1.
        age: of its patients, mean, years.
    """

    field_of_view: float
    contrast: float
    thickness: float
    sharpness: float
    noise: float
    grain: float
    drift: float
    table: str
    centre: tuple[float, float, float]
    spread: tuple[float, float, float] = (5.0, 5.0, 6.0)
    raised: tuple[float, float] = (0.0, 0.0)
    density: tuple[float, float] = (1.0, 1.0)
    case_mix: Mapping[str, float] = field(default_factory=dict)
    age: float = 58.0


HOSPITALS = {
    "source": Hospital(360.0, 0.04, 1.0, 0.15, 22.0, 0.55, 2.0, "curved", (0.0, 8.0, 0.0)),
    "target": Hospital(430.0, 0.92, 2.0, 0.85, 34.0, 0.30, 6.0, "flat", (40.0, 28.0, 0.0)),
}
SCANNERS = {  # by drawing
    1: HOSPITALS,
    2: {
        "source": Hospital(
            360.0,
            0.04,
            1.0,
            0.15,
            17.0,
            0.80,
            2.0,
            "curved",
            (28.0, 4.0, 0.0),
            (9.0, 6.0, 7.0),
            (0.0, 6.0),
            (0.8, 1.1),
        ),
        "target": Hospital(
            400.0,
            0.92,
            2.0,
            0.70,
            26.0,
            0.65,
            6.0,
            "flat",
            (26.0, 10.0, 0.0),
            (9.0, 6.0, 7.0),
            (16.0, 7.0),
            (0.5, 0.9),
            case_mix={
                "Pleural effusion": 1.6,
                "Consolidation": 1.4,
                "Medical material": 1.5,
                "Cardiomegaly": 1.4,
                "Pericardial effusion": 1.3,
                "Lung nodule": 0.75,
                "Emphysema": 0.75,
                "Mosaic attenuation pattern": 0.8,
            },
            age=64.0,
        ),
    },
}


@dataclass(frozen=True)
class PhantomStudy:
    """One phantom study.

    Attributes:
        volume: the scan, int16 Hounsfield units (d, h, w), orientation SPL.
        labels: 0 or 1 for each finding of the registry.
        masks: for each finding present, a boolean array (d, h, w) of the voxels it fills.
        report: the findings section of the radiology report.
        details: what is known about each finding present (side, place, size, ...).
        hospital: "source" or "target".
        seed: seed of the scan.
        patient: seed material of the patient.
        drawing: which of the drawings it is, 1 or 2.
        sex: "F" or "M"; "" in the first drawing.
        age: years; 0 in the first drawing.
        contrast: whether the scan has contrast medium.
        changed: in the second drawing a boolean array (d, h, w): what the findings changed, masks and what they press
            aside; outside it the scan is that of the same patient without findings, voxel for voxel.
    """

    volume: CTVolume
    labels: dict[str, int]
    masks: dict[str, np.ndarray]
    report: str
    details: dict[str, dict] = field(default_factory=dict)
    hospital: str = "source"
    seed: int = 0
    patient: str = ""
    drawing: int = 1
    sex: str = ""
    age: int = 0
    contrast: bool = False
    changed: np.ndarray | None = None


def named_rng(*key) -> np.random.Generator:
    """A generator for a named purpose: the same words give the same numbers on every machine."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest[:16], dtype=np.uint32))


def draw_labels(
    seed: int, patient: str, registry: Mapping[str, Finding] = REGISTRY, case_mix: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Draw the labels of a scan with the prevalences of the registry, by default the 18 of CT-RATE, times `case_mix`.

    Half of what decides a finding belongs to the patient, so that scans of one patient resemble each other,
    and a little is shared by all findings of a scan: some patients are simply sicker. What is added to the
    18 findings leaves their labels as they were.
    """
    names = label_order(registry)
    lasting = named_rng("labels", patient).normal(size=len(FINDINGS) + 1)
    passing = named_rng("labels", patient, seed).normal(size=len(FINDINGS))
    sickness, own = lasting[-1], dict(zip(FINDINGS, zip(lasting[:-1], passing, strict=True), strict=True))
    for name in names:
        if name not in own:
            own[name] = named_rng("labels", patient, name).normal(), named_rng("labels", patient, seed, name).normal()
    score = {n: np.sqrt(0.1) * sickness + np.sqrt(0.5) * own[n][0] + np.sqrt(0.4) * own[n][1] for n in names}
    share = {name: registry[name].prevalence * (case_mix or {}).get(name, 1.0) for name in names}
    return {name: int(score[name] < NormalDist().inv_cdf(share[name])) for name in names}


def person_of(patient: str, hospital: str) -> Patient:
    """The patient of that name in a hospital, "source" or "target": sex, age and build, as `generate` draws them."""
    return Patient.sample(named_rng("person", patient), SCANNERS[2][hospital].age)


def _check(seed, hospital, findings, shape, registry) -> None:
    if hospital not in HOSPITALS:
        raise ValueError(f"hospital={hospital!r} is unknown; choose one of {sorted(HOSPITALS)}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed={seed!r}: expected a whole number >= 0")
    if len(shape) != 3 or min(shape) < 8:
        raise ValueError(f"shape={tuple(shape)}: expected (d, h, w), each at least 8 voxels")
    if isinstance(findings, str):
        raise ValueError(f"findings={findings!r}: expected a list of names, for example [{findings!r}]")
    unknown = sorted(set(findings or ()) - set(registry))
    if unknown:
        raise ValueError(f"unknown findings {unknown}; the 18 names are in medctkit.FINDINGS")


def generate(
    seed: int,
    hospital: str = "source",
    findings: Iterable[str] | None = None,
    shape: tuple[int, int, int] = TRAINING_SHAPE,
    *,
    patient: str | None = None,
    reconstruction: int = 0,
    registry: Mapping[str, Finding] | None = None,
    drawing: int = 1,
) -> PhantomStudy:
    """Make one phantom study.

    Args:
        seed: seed of the scan: findings, contrast medium, position, noise, wording.
        hospital: "source" or "target".
        findings: names of the findings present; None draws them with the prevalences of CT-RATE.
        shape: voxels (d, h, w). The scan covers 360 mm from neck to upper abdomen whatever the shape.
        patient: names the patient, whose anatomy and lasting findings all scans share; None: the seed does.
        reconstruction: 0, 1, ...: the same scan with another kernel and other noise.
        registry: the findings that can be drawn; by default the 18.
        drawing: 1, that of the shipped model and manifest, or 2, drawn from the outlines of real chests, which covers
            320 mm. There the same seed with other `findings` is the same patient, scan and noise.

    Returns:
        The study; the same arguments give the same bytes.

    Raises:
        ValueError: unknown hospital, finding or drawing, negative seed, a shape below 8 voxels.
    """
    if drawing not in REGISTRIES:
        raise ValueError(f"drawing={drawing!r} is unknown; choose one of {sorted(REGISTRIES)}")
    registry = REGISTRIES[drawing] if registry is None else registry
    if findings is not None and not isinstance(findings, str):
        findings = set(findings)
    _check(seed, hospital, findings, shape, registry)
    patient = str(seed) if patient is None else str(patient)
    scanner = SCANNERS[drawing][hospital]
    labels = draw_labels(seed, patient, registry, scanner.case_mix)
    if findings is not None:
        labels = {name: int(name in findings) for name in labels}
    scan = named_rng("scan", patient, seed, hospital)
    z, y, x = (c + scan.normal(0, spread) for c, spread in zip(scanner.centre, scanner.spread, strict=True))
    contrast = bool(scan.random() < scanner.contrast)
    tissue = Tissue.sample(scan, contrast)
    noise = named_rng("noise", patient, seed, hospital, reconstruction)
    extra: dict[str, Any] = {"contrast": contrast}
    if drawing == 1:
        chest = _first(patient, seed, labels, shape, scanner, (z, y, x), tissue)
        spacing = FIELD_OF_VIEW / shape[0], scanner.field_of_view / shape[1], scanner.field_of_view / shape[2]
        masks, details = _painted(chest, labels, registry, patient, seed)
        hu = _scan(chest, scanner, scan, noise, reconstruction)
    else:
        breath = named_rng("breath", patient, seed, hospital)
        raised, density = breath.normal(*scanner.raised), breath.uniform(*scanner.density)
        person = person_of(patient, hospital).breathing(raised)
        tissue = replace(tissue, lung=tissue.lung + 0.8 * raised)  # less air, the same tissue
        body, masks, details, changed = draw(
            person,
            tissue,
            registry,
            labels,
            (int(shape[0]), int(shape[1]), int(shape[2])),
            scanner,
            (z, y, x),
            density,
            lambda name: named_rng(name, patient, seed),
        )
        spacing = body.spacing
        hu = expose(body, scanner, scan, noise, reconstruction)
        extra |= dict(drawing=drawing, sex=person.sex, age=person.age, changed=changed)
    words = named_rng("report", patient, seed, hospital)
    report = write_report(labels, details, hospital, words, registry, contrast if drawing > 1 else None)
    provenance = (
        f"phantom, seed {seed}, patient {patient}, {hospital} hospital, reconstruction {reconstruction}"
        + (f", drawing {drawing}" if drawing > 1 else ""),
    )
    affine = straight_affine(spacing, CANONICAL)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)  # the origin is the middle, as a scanner's isocentre
    volume = CTVolume(hu, spacing, CANONICAL, affine, provenance)
    return PhantomStudy(volume, labels, masks, report, details, hospital, int(seed), patient, **extra)


def _first(patient, seed, labels, shape, scanner, offset, tissue) -> Chest:
    """The chest of the first drawing, without findings but for what they change of it."""
    enlarged = named_rng("Cardiomegaly", patient, seed).uniform(1.2, 1.45) if labels.get("Cardiomegaly") else 1.0
    low = named_rng("low", patient, seed).uniform(4, 16) if labels.get("Emphysema") else 0.0
    width = scanner.field_of_view
    canvas = Canvas(tuple(shape), (FIELD_OF_VIEW / shape[0], width / shape[1], width / shape[2]), offset)
    return Chest(canvas, Anatomy.sample(named_rng("anatomy", patient)), tissue, heart_scale=enlarged, low=low)


def _painted(chest: Chest, labels, registry, patient, seed) -> tuple[dict, dict]:
    """Masks and details of the findings, painted into a chest of the first drawing."""
    masks, details = {}, {}
    for name, finding in sorted(registry.items(), key=lambda item: item[1].layer):
        if labels[name]:
            share, details[name] = finding.paint(chest, named_rng(name, patient, seed))
            # what is thinner than a voxel still gets a mask: its strongest voxels
            masks[name] = share > min(0.5, 0.5 * float(share.max()))
    return masks, details


def _table(chest: Chest, shape: str) -> None:
    """The table under the patient's back: a thin curved shell, or two flat boards."""
    c, a = chest.canvas, chest.anatomy
    back = a.depth + a.fat + 26
    if shape == "curved":
        bow = c.y - back - 4 + 0.0011 * c.x**2 + 0 * c.z
        inside = 190 - np.abs(c.x)
        for depth, value in ((0.0, -350.0), (22.0, -450.0)):
            c.paint(c.everywhere, np.minimum(c.occupancy(1.8 - np.abs(bow - depth)), c.occupancy(inside)), value)
    else:
        inside = 205 - np.abs(c.x)
        for depth, value in ((8.0, 60.0), (34.0, -120.0)):
            board = c.occupancy(3.2 - np.abs(c.y - back - depth) + 0 * c.z)
            c.paint(c.everywhere, np.minimum(board, c.occupancy(inside)) * (c.hu < -500), value)


def _scan(chest: Chest, scanner: Hospital, scan, noise_rng, reconstruction: int) -> np.ndarray:
    """What the scanner makes of the chest: slice thickness, kernel, noise, table; int16 HU (d, h, w)."""
    from scipy.ndimage import gaussian_filter, gaussian_filter1d

    c = chest.canvas
    _table(chest, scanner.table)
    dose = scan.lognormal(0, 0.15)
    drift = scan.normal(0, scanner.drift)
    sharpness = scanner.sharpness + (0.0, -0.7, 0.5)[reconstruction % 3]
    hu = c.hu
    if scanner.thickness > 1:
        hu = gaussian_filter1d(hu, 0.42 * scanner.thickness, axis=0, mode="nearest")
    soft = gaussian_filter(hu, (0, 0.8, 0.8), mode="nearest")
    hu = hu + min(sharpness, 1.0) * (hu - soft)
    # averaging over larger voxels lowers the noise, but not as far as independent photons would
    volume_ratio = np.prod(c.spacing) / (1.5 * 0.7 * 0.7)
    sigma = scanner.noise * dose * (1 + 0.6 * sharpness) * max(0.3, volume_ratio**-0.25)
    grain = noise_rng.standard_normal(c.shape, dtype=c.dtype)
    grain = gaussian_filter(grain, (0.3, scanner.grain, scanner.grain), mode="wrap")
    # more photons are lost through the shoulders and the middle of a large patient
    loss = 1 + 0.5 * np.clip((c.z - 60) / 80, 0, 1) + 0.25 * np.exp(-((c.x / 90) ** 2) - (c.y / 70) ** 2)
    hu = hu + (sigma / max(float(grain.std()), 1e-6)) * loss * grain + drift
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
