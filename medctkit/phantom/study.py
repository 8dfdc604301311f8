"""Phantom studies: a chest, its findings, a scanner and a report, all from one seed.

A phantom is a drawing with known truth, not a patient: every finding has its mask, the report says what was
painted, and the same seed gives the same study at any resolution. Two hospitals scan and report
differently, as hospitals do; the difference is what LoRA learns to bridge in the notebooks.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np

from medctkit.findings import CT_RATE
from medctkit.phantom.patient import Patient
from medctkit.phantom.registry import REGISTRY, Finding, label_order
from medctkit.phantom.report_text import write_report
from medctkit.phantom.scan import draw, expose
from medctkit.phantom.tissue import Tissue
from medctkit.scans.geometry import CANONICAL, straight_affine
from medctkit.scans.volumes import CTVolume

TRAINING_SHAPE = (64, 96, 96)  # 5 x 3.75 x 3.75 mm at the source hospital


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
        sex: "F" or "M".
        age: years.
        contrast: whether the scan has contrast medium.
        changed: boolean (d, h, w): what the findings changed, masks and what they press aside; outside it the scan is
            that of the same patient without findings, voxel for voxel.
    """

    volume: CTVolume
    labels: dict[str, int]
    masks: dict[str, np.ndarray]
    report: str
    details: dict[str, dict]
    hospital: str
    seed: int
    patient: str
    sex: str
    age: int
    contrast: bool
    changed: np.ndarray


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
    lasting = named_rng("labels", patient).normal(size=len(CT_RATE) + 1)
    passing = named_rng("labels", patient, seed).normal(size=len(CT_RATE))
    sickness, own = lasting[-1], dict(zip(CT_RATE, zip(lasting[:-1], passing, strict=True), strict=True))
    for name in names:
        if name not in own:
            own[name] = named_rng("labels", patient, name).normal(), named_rng("labels", patient, seed, name).normal()
    score = {n: np.sqrt(0.1) * sickness + np.sqrt(0.5) * own[n][0] + np.sqrt(0.4) * own[n][1] for n in names}
    share = {name: registry[name].prevalence * (case_mix or {}).get(name, 1.0) for name in names}
    return {name: int(score[name] < NormalDist().inv_cdf(share[name])) for name in names}


def person_of(patient: str, hospital: str) -> Patient:
    """The patient of that name in a hospital, "source" or "target": sex, age and build, as `generate` draws them."""
    return Patient.sample(named_rng("person", patient), HOSPITALS[hospital].age)


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
        raise ValueError(f"unknown findings {unknown}; the 18 names are in medctkit.phantom.REGISTRY")


def generate(
    seed: int,
    hospital: str = "source",
    findings: Iterable[str] | None = None,
    shape: tuple[int, int, int] = TRAINING_SHAPE,
    *,
    patient: str | None = None,
    reconstruction: int = 0,
    registry: Mapping[str, Finding] = REGISTRY,
) -> PhantomStudy:
    """Make one phantom study.

    Args:
        seed: seed of the scan: findings, contrast medium, position, noise, wording.
        hospital: "source" or "target".
        findings: names of the findings present; None draws them with the prevalences of CT-RATE.
        shape: voxels (d, h, w). The scan covers 320 mm from neck to upper abdomen whatever the shape.
        patient: names the patient, whose anatomy and lasting findings all scans share; None: the seed does.
        reconstruction: 0, 1, ...: the same scan with another kernel and other noise.
        registry: the findings that can be drawn; by default the 18.

    Returns:
        The study; the same arguments give the same bytes, and other `findings` the same patient, scan and noise.

    Raises:
        ValueError: unknown hospital or finding, negative seed, a shape below 8 voxels.
    """
    if findings is not None and not isinstance(findings, str):
        findings = set(findings)
    _check(seed, hospital, findings, shape, registry)
    patient = str(seed) if patient is None else str(patient)
    scanner = HOSPITALS[hospital]
    labels = draw_labels(seed, patient, registry, scanner.case_mix)
    if findings is not None:
        labels = {name: int(name in findings) for name in labels}
    scan = named_rng("scan", patient, seed, hospital)
    z, y, x = (c + scan.normal(0, spread) for c, spread in zip(scanner.centre, scanner.spread, strict=True))
    contrast = bool(scan.random() < scanner.contrast)
    tissue = Tissue.sample(scan, contrast)
    noise = named_rng("noise", patient, seed, hospital, reconstruction)
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
    hu = expose(body, scanner, scan, noise, reconstruction)
    words = named_rng("report", patient, seed, hospital)
    report = write_report(labels, details, hospital, words, registry, contrast)
    provenance = (f"phantom, seed {seed}, patient {patient}, {hospital} hospital, reconstruction {reconstruction}",)
    affine = straight_affine(body.spacing, CANONICAL)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)  # the origin is the middle, as a scanner's isocentre
    return PhantomStudy(
        volume=CTVolume(hu, body.spacing, CANONICAL, affine, provenance),
        labels=labels,
        masks=masks,
        report=report,
        details=details,
        hospital=hospital,
        seed=int(seed),
        patient=patient,
        sex=person.sex,
        age=person.age,
        contrast=contrast,
        changed=changed,
    )
