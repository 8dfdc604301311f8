"""What a PACS is told about a CT: a structured report, a picture, and where the model looked.

The report follows DICOM's template TID 1500: for each finding its probability, and which algorithm said so, with the
digests of base model, adapter and vocabulary. It is *preliminary* and *unverified*, and says that it is for research
only. Findings have codes of the kit's own (scheme 99MEDCTKIT), for CT-RATE's 18 names are wider or narrower than the
nearest codes of SNOMED.

UIDs are made from patient, slices, model and scores, so that an answer that is given twice is one answer.
"""

import io
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medctkit.common.atomic import replace_all
from medctkit.scans.archives import unpacked
from medctkit.scans.dicom_files import Slice, chosen_series, is_dicom, load
from medctkit.scans.heat_map import HeatMap

SCHEME, MAKER, NAME = "99MEDCTKIT", "medctkit", "MedCT-VLM zero-shot classifier"
NOTICE = "Research use only, not for diagnosis"
TOP_SHARE = 0.05  # of a map's cells
# Of the patient and the study: said again as the scanner said it, whatever that is. Without those of the second line an
# object is valid too.
_EMPTY_OR_COPIED = """PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber StudyID
    ReferringPhysicianName""".split()
_COPIED = [*_EMPTY_OR_COPIED, *"SpecificCharacterSet IssuerOfPatientID StudyDescription".split()]
_NEEDED = "StudyInstanceUID SeriesInstanceUID SOPInstanceUID SOPClassUID".split()
_GEOMETRY = """FrameOfReferenceUID ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness Rows Columns
    NumberOfFrames SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence""".split()


def answer(
    path: str | os.PathLike,
    scores: Mapping[str, float],
    facts: Mapping[str, str],
    picture: np.ndarray,
    heat_map: HeatMap | None = None,
    series: str | None = None,
) -> list[Dataset]:
    """DICOM objects that belong beside a CT series: report, secondary capture and, of a map, a segmentation.

    Args:
        path: the study, as `read_volume` takes it; `series` says which of several.
        scores: probability of each finding.
        facts: as `facts_of` gives them.
        picture: RGB (h, w, 3) uint8, without the patient's name.
        heat_map: what spoke for a finding, which is its name. Segmented are the voxels in its highest 5 %. There is no
            segmentation if none of them lies in the scan, or if the slices have no frame of reference.
        series: see `path`.

    Raises:
        ValueError: no DICOM, or one without the UIDs that an answer must refer to; see also `chosen_series`.
    """
    path = Path(path).expanduser()
    if path.is_file() and not is_dicom(path):
        with unpacked(path) as folder:
            return answer(folder, scores, facts, picture, heat_map, series)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's and highdicom's, of unusual values, which are the scanner's
        slices, _ = chosen_series(path, series)
        slices = list({tuple(s.required("ImagePositionPatient", 3).round(2)): s for s in slices}.values())  # no copies
        said, sources = _sources(slices)
        about = (said.get(name) for name in _EMPTY_OR_COPIED)
        uid = partial(_uid, *about, *sorted(s.SOPInstanceUID for s in sources), *facts.items(), *scores.items())
        found = [_report(sources, scores, facts, uid), _capture(sources[0], picture, facts, uid)]
        if heat_map is not None and "FrameOfReferenceUID" in sources[0]:
            found += _segmentation(slices, sources, heat_map, facts, uid)
    for made in found:
        for name in _COPIED:
            if name in said:
                made[name] = said[name]
    return found


def refuse_other_than_dicom(path: str | os.PathLike) -> None:
    """Refuse a `path` that no answer can be given for, before it is scored: a ValueError."""
    path = Path(path).expanduser()
    if path.is_file() and not is_dicom(path) and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path.name} is no DICOM, and an answer refers to DICOM slices: give their folder or its .zip"
        )


def write_answer(found: Sequence[Dataset], folder: str | os.PathLike) -> list[Path]:
    """Write DICOM objects to a folder, named by their kind: SR.dcm, OT.dcm, SEG.dcm; all of them or none.

    An earlier answer that lies there is taken away whole.

    Raises:
        ValueError: a file of such a name that is no answer of the kit, such as a slice of the scan.
    """
    folder, contents = Path(folder).expanduser(), {}
    for made in found:
        made.save_as(buffer := io.BytesIO(), enforce_file_format=True)
        contents[f"{made.Modality}.dcm"] = buffer.getvalue()
    there = [folder / f"{kind}.dcm" for kind in ("SR", "OT", "SEG") if (folder / f"{kind}.dcm").exists()]
    for path in there:
        header = load(path, path.name)
        if header is None or header.get("ManufacturerModelName") != NAME:
            raise ValueError(f"{path} is there, and no answer of {NAME}; give another folder")
    paths = replace_all(contents, folder)
    for path in set(there) - set(paths):
        path.unlink()
    return paths


def _uid(*origins: object) -> str:
    """A UID, the same for the same origins."""
    return generate_uid(entropy_srcs=[str(origin) for origin in origins])


def _sources(slices: Sequence[Slice]) -> tuple[Dataset, list[Dataset]]:
    """The whole header of one slice, and of each file what answers refer to, without what may be odd in it."""
    said, sources = Dataset(), dict[Path, Dataset]()
    for item in slices:
        if item.path in sources:
            continue
        whole = load(item.path, item.name)
        assert whole is not None
        if missing := [name for name in _NEEDED if not whole.get(name)]:
            raise ValueError(f"{item.name} has no {missing[0]}, without which no answer can refer to it; get it again")
        said = said or whole
        sources[item.path] = source = Dataset()
        for name in _EMPTY_OR_COPIED:
            setattr(source, name, None)
        for name in (*_NEEDED, *_GEOMETRY):
            if whole.get(name):
                source[name] = whole[name]
    return said, list(sources.values())


def _report(
    sources: list[Dataset], scores: Mapping[str, float], facts: Mapping[str, str], uid: Callable[[str], str]
) -> Dataset:
    """The structured report, TID 1500: for each finding a group (TID 1501) with its probability."""
    from highdicom import sr

    device = sr.DeviceObserverIdentifyingAttributes(
        _uid("device", *facts.items()), name=NAME, manufacturer_name=MAKER, model_name=NAME, serial_number=facts["base"]
    )
    observer = sr.ObserverContext(codes.DCM.Device, device)
    digests = [f"{name}: {value}" for name, value in facts.items() if name != "version"]
    algorithm = sr.AlgorithmIdentification(
        NAME, facts["version"], [*digests, NOTICE], codes.DCM.ArtificialIntelligence, MAKER
    )
    groups = [
        sr.MeasurementsAndQualitativeEvaluations(
            sr.TrackingIdentifier(uid(name), name),
            finding_type=_concept(name),
            algorithm_id=algorithm,
            measurements=[sr.Measurement(codes.DCM.Probability, float(score), codes.UCUM.NoUnits)],
            qualitative_evaluations=[sr.QualitativeEvaluation(_concept("Intended use"), _concept(NOTICE))],
        )
        for name, score in scores.items()
    ]
    content = sr.MeasurementReport(
        sr.ObservationContext(observer_device_context=observer), codes.SCT.ComputedTomography, groups
    )
    made = _made(facts, uid, "report")
    return sr.ComprehensiveSR(sources, content, is_complete=True, is_final=False, is_verified=False, **made)


def _capture(source: Dataset, picture: np.ndarray, facts: Mapping[str, str], uid: Callable[[str], str]) -> Dataset:
    """The picture as a secondary capture."""
    from highdicom.sc import SCImage

    made = SCImage.from_ref_dataset(
        source, picture, "RGB", 8, "PATIENT", patient_orientation=("L", "P"),
        transfer_syntax_uid=ExplicitVRLittleEndian, **_made(facts, uid, "picture"),
    )  # fmt: skip
    made.PatientOrientation, made.BodyPartExamined = [], "CHEST"  # the picture has several slices, and bars
    made.BurnedInAnnotation = "NO"  # none that tells who it is
    made.DerivationDescription = NOTICE
    return made


def _segmentation(
    slices: Sequence[Slice], sources: list[Dataset], heat_map: HeatMap, facts: Mapping[str, str], uid: Any
) -> list[Dataset]:
    """The highest cells of a map, as a binary segmentation of the slices; none where there is nothing to show."""
    import highdicom as hd

    low, _ = heat_map.limits
    least = max(np.quantile(heat_map.values, 1 - TOP_SHARE), np.nextafter(np.float32(low), np.float32(np.inf)))
    _agree(slices, sources)
    masks = np.stack([_values_on(item, heat_map) >= least for item in slices])
    if not masks.any():
        return []
    digests = {name: value for name, value in facts.items() if name != "version"}
    algorithm = hd.AlgorithmIdentificationSequence(
        NAME, codes.DCM.ArtificialIntelligence, facts["version"], MAKER, digests
    )
    what = codes.SCT.SpatialAndRelationalConcept, _concept("Relevance to a model")
    segment = hd.seg.SegmentDescription(1, heat_map.name[:64], *what, "AUTOMATIC", algorithm)
    made = hd.seg.Segmentation(
        sources, masks.astype(np.uint8), "BINARY", [segment], content_label="RELEVANCE",
        content_description=f"Highest {TOP_SHARE:.0%} of a map. {NOTICE}", **_made(facts, uid, "map"),
    )  # fmt: skip
    return [made]


def _agree(slices: Sequence[Slice], sources: list[Dataset]) -> None:
    """Let all sources say alike what slices have in common, which headers round, leave empty, or say of each frame."""
    import highdicom as hd

    axes, spacing = slices[0].required("ImageOrientationPatient", 6), slices[0].required("PixelSpacing", 2)
    along = [item.required("ImagePositionPatient", 3) @ np.cross(axes[:3], axes[3:]) for item in slices]
    given = slices[0].numbers("SliceThickness")
    thickness = float(given[0]) if given is not None and given[0] > 0 else np.ptp(along) / max(1, len(along) - 1)
    for source in sources:
        if "PerFrameFunctionalGroupsSequence" in source:
            shared = (source.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
            shared.PlaneOrientationSequence = hd.PlaneOrientationSequence("PATIENT", axes.tolist())
            shared.PixelMeasuresSequence = hd.PixelMeasuresSequence(spacing.tolist(), float(thickness))
            source.SharedFunctionalGroupsSequence = [shared]
        else:
            source.ImageOrientationPatient = slices[0].header.ImageOrientationPatient
            source.SliceThickness = f"{thickness:.9g}"


def _values_on(item: Slice, heat_map: HeatMap) -> np.ndarray:
    """Values (rows, columns) of a map at the pixels of a slice; NaN where it says nothing."""
    origin, spacing = item.required("ImagePositionPatient", 3), item.required("PixelSpacing", 2)
    along_row, along_column = item.required("ImageOrientationPatient", 6).reshape(2, 3)
    h, w = np.indices([int(item.required(name)[0]) for name in ("Rows", "Columns")])
    lps = origin + h[..., None] * spacing[0] * along_column + w[..., None] * spacing[1] * along_row
    return heat_map.at(lps * (-1, -1, 1))


def _concept(meaning: str) -> Any:
    """A code of the kit's own."""
    from highdicom.sr import CodedConcept

    return CodedConcept(re.sub(r"\W+", "-", meaning.lower()), SCHEME, meaning)


def _made(facts: Mapping[str, str], uid: Callable[[str], str], name: str) -> dict[str, Any]:
    """What all objects have in common; each is a series of its own."""
    return {
        "series_instance_uid": uid(f"series of the {name}"),
        "series_number": 9000 + ["report", "picture", "map"].index(name),
        "sop_instance_uid": uid(name),
        "instance_number": 1,
        "manufacturer": MAKER,
        "manufacturer_model_name": NAME,
        "device_serial_number": facts["base"],
        "software_versions": facts["version"],
        "series_description": f"{NOTICE}: {name}",
    }
