"""DICOM files of a folder: which are slices of a scan, and of which series.

A file counts as DICOM by its contents, not by its name, and what is left out is counted.
"""

import io
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset, uid

from medctkit.common.text import stand_in
from medctkit.scans.limits import most_unpacked
from medctkit.scans.stored import damaged, decode, files_below

# where a file without preamble starts: first element, with a type in letters or (implicit) a short length
_BARE = re.compile(rb"[\x02\x08]\x00[\x00-\x2f]\x00(?:UL|UI|OB|CS|SH|LO|DA|TM|UN|.\x00\x00\x00)", re.DOTALL)
_NAMES = ("SeriesInstanceUID", "SeriesNumber", "SeriesDescription")
# what tells the slices of one scan from those of another under the same SeriesInstanceUID
MARKS = """PatientID PatientName PatientBirthDate PatientSex StudyInstanceUID StudyDate StudyTime AccessionNumber
    StationName FrameOfReferenceUID SOPClassUID SeriesNumber AcquisitionNumber AcquisitionUID IrradiationEventUID
    StackID TemporalPositionIdentifier TemporalPositionIndex NominalPercentageOfCardiacPhase KVP
    ConvolutionKernel SliceThickness ImageType""".split()
OF_SHOTS = {"AcquisitionNumber", "AcquisitionUID", "IrradiationEventUID"}  # one scan may have several, side by side
_FRAMES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_IN_FRAMES = {"FrameType": "ImageType", "FrameAcquisitionNumber": "AcquisitionNumber"}  # as a slice would call it
_OF_SLICES = """Modality SamplesPerPixel PhotometricInterpretation Rows Columns
    BitsAllocated BitsStored HighBit PixelRepresentation LossyImageCompression LossyImageCompressionRatio NumberOfFrames
    InstanceNumber ImagePositionPatient ImageOrientationPatient PixelSpacing RescaleSlope RescaleIntercept
    RescaleType ModalityLUTSequence PixelPaddingValue PixelPaddingRangeLimit DirectoryRecordSequence""".split()
_KEPT = [*_NAMES, *MARKS, *_IN_FRAMES, *_OF_SLICES]
_SUFFIXES = (".dcm", ".dicom", ".ima")
_DEFLATED, _EXPLICIT = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"
_CT_IMAGES = (uid.CTImageStorage, uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage)
_LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"  # a segmentation too
_MADE_OF_SCANS = {uid.ParametricMapStorage, uid.SegmentationStorage, _LABEL_MAP}
_PAGES = {"SCREEN SAVE", "DOSE_INFO", "CSA REPORT"}  # in ImageType: text as a picture, by GE and Siemens
_NO_PLACE, _LOCALIZER, _PAGE = "picture without a place in the patient", "localizer", "page of text (dose report)"
_CAPTURE = "secondary capture"
_NO_SLICES = (_NO_PLACE, _LOCALIZER, _PAGE)
_MOST_FRAMES = 2**14
_LARGEST_SLICE = 64 << 20  # bytes; one of 4096 x 4096 pixels has 32 MiB
_PIXEL_GROUP = (b"\xe0\x7f", b"\x7f\xe0")
_MOST_ODD = 20  # of that many slices of a series one may be a picture of something else


@dataclass(frozen=True)
class Slice:
    """A slice, which is a file or one of its frames, and its header without the pixels."""

    path: Path
    name: str  # path inside the folder
    header: Dataset
    frame: int = 0

    def text(self, tag: str) -> str:
        """A tag as text, several values with / between them; empty where the header has none."""
        value = decode(lambda: self.header.get(tag), self.name)
        values = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        texts = (f"{v:g}" if isinstance(v, float) else "" if v is None else str(v).strip() for v in values)
        return "/".join(texts)

    def numbers(self, tag: str, count: int = 1) -> np.ndarray | None:
        """Finite numbers of a tag, shape (count,); None where the header has none."""
        value = decode(lambda: self.header.get(tag), self.name)
        if value is None or (isinstance(value, str | bytes) and not value.strip()):
            return None
        try:
            numbers = np.atleast_1d(np.array(value, dtype=float))
        except (TypeError, ValueError, OverflowError):
            numbers = np.array([])
        if numbers.shape != (count,) or not np.isfinite(numbers).all():
            raise damaged(f"{tag} is {value!r}, expected {count} number(s)", self.name)
        return numbers

    def required(self, tag: str, count: int = 1, way_out: str = "") -> np.ndarray:
        """The same, shape (count,), of a tag that every slice of a scan has."""
        numbers = self.numbers(tag, count)
        if numbers is None:
            raise damaged(f"it has no {tag}{way_out}", self.name)
        return numbers

    @property
    def modality(self) -> str:
        """Modality, or what the class of the file says where that is missing."""
        return self.text("Modality") or ("CT" if self.text("SOPClassUID") in _CT_IMAGES else "")

    @property
    def series(self) -> tuple:
        """What the slices of a series have in common."""
        uid, *names = (self.text(tag) for tag in _NAMES)
        return (uid,) if uid else (self.path.parent, *names)


class _File(io.BufferedReader):
    """A file of which no more bytes are asked for than it has, whatever a damaged header says."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self._size if size is None or size < 0 else min(size, self._size))


def is_dicom(path: Path) -> bool:
    """Whether a file starts as a DICOM file does, with its preamble of 128 bytes or without."""
    with open(path, "rb") as file:
        head = file.read(132)
    return head[128:132] == b"DICM" or head.startswith(b"DICM") or _BARE.match(head) is not None


def load(path: Path, name: str, pixels: bool = True) -> Dataset | None:
    """A DICOM file, or None where it is none; without `pixels` only what a `Slice` needs. `name` is for errors."""
    if not is_dicom(path):
        return None
    with _File(path) as file:
        return decode(lambda: _parse(file, path.stat().st_size, pixels), name)


def _parse(file: _File, size: int, pixels: bool) -> Dataset | None:
    head = file.read(4096)
    bare = head[128:132] != b"DICM"
    missing = (128 if head.startswith(b"DICM") else 132 if head.startswith(b"\x02\0") else 0) * bare
    head = (bytes(128) + b"DICM")[:missing] + head
    end_of_meta = 144 + int.from_bytes(head[140:144], "little")
    file.seek(0)
    source: io.BufferedIOBase = file
    if _DEFLATED in head[132:end_of_meta]:
        # inflated here, with a limit; the header then is that of the inflated file
        file.seek(end_of_meta - missing)
        whole = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), most_unpacked(size, _LARGEST_SLICE))
        source = io.BytesIO(head[:end_of_meta].replace(_DEFLATED, _EXPLICIT) + whole)
    elif missing:
        source = io.BytesIO(head[:missing] + file.read())
    wanted = None if pixels else [*_KEPT, *_FRAMES]
    dataset = pydicom.dcmread(source, stop_before_pixels=not pixels, force=True, specific_tags=wanted)
    dataset.buffer = None  # or each header would keep the bytes of its whole file
    if not dataset.file_meta.get("TransferSyntaxUID"):
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # DICOM's default
    kind = dataset.file_meta.get("MediaStorageSOPClassUID")
    if kind and not dataset.get("SOPClassUID"):
        dataset.SOPClassUID = kind
    for tag in [*_KEPT, *_FRAMES]:
        dataset.get(tag)  # pydicom decodes a value when it is asked for: let it fail here, not later
    if not pixels and source.read(2) in _PIXEL_GROUP:
        dataset.PixelData = b""  # there are some, read when they are needed
    return None if bare and not ("SOPClassUID" in dataset or "Modality" in dataset) else dataset


def _slices(path: Path, name: str) -> list[Slice]:
    """The slice of a file or the frames of an enhanced one, each with the header of a slice; empty: not DICOM."""
    whole = load(path, name, pixels=False)
    if whole is None:
        return []
    shared, frames = (list(whole.pop(tag).value or []) if tag in whole else [] for tag in _FRAMES)
    if not frames:
        return [Slice(path, name, whole)]
    count = Slice(path, name, whole).required("NumberOfFrames")[0]
    if not len(frames) == count <= _MOST_FRAMES:
        raise damaged(f"NumberOfFrames is {count:.0f}, and {len(frames)} are described", name)
    del whole.NumberOfFrames
    return decode(
        lambda: [
            Slice(path, f"{name} (frame {i + 1})", _header_of_frame(whole, [*shared[:1], frame]), i)
            for i, frame in enumerate(frames)
        ],
        name,
    )


def _header_of_frame(whole: Dataset, groups: list[Dataset]) -> Dataset:
    """The header that a slice would have: what is said of all frames, and of one in `groups`, flat."""
    header = Dataset()
    header.update(whole)
    header.file_meta = whole.file_meta
    macros = (element.value[0] for group in groups for element in group if element.VR == "SQ" and element.value)
    for element in (element for macro in macros for element in macro):
        if element.keyword in _KEPT:
            header.add_new(_IN_FRAMES.get(element.keyword, element.keyword), element.VR, element.value)
    return header


def chosen_series(path: Path, wanted: str | None = None) -> tuple[list[Slice], list[str]]:
    """The slices of the one series in a file or below a folder, in the order of their names, and what was left out.

    Raises:
        ValueError: no series, several of CT and none or more than one `wanted` (its UID, number or description), not
            a CT, or a damaged file.
    """
    found, left_out = _sorted_out(path)
    listing = "".join(f"\n  {_to_choose(slices, found)}: {_described(slices)}" for slices in found)
    counts = sorted(Counter(kind for kind, *_ in left_out).items())
    others = ", ".join(f"{kind} ({n})" for kind, n in counts)
    if not found:
        such = f"{others}, such as {left_out[0][1]}; give the scan itself"
        why = ", captures are pictures, not measured values" * any(kind == _CAPTURE for kind, *_ in left_out)
        raise ValueError(f"no slice of a scan among its {len(left_out)} files: {such}{why}")
    name = str(wanted).strip()
    matches, many = found, f"{len(found)} series in it"
    if wanted is not None:
        matches = [slices for slices in found if name in {slices[0].text(tag) for tag in _NAMES} - {""}]
        many = f"{len(matches) or 'no'} series in it called {name!r}"
    matches = _of_ct(matches)
    if len(matches) != 1:
        raise ValueError(f"{many}; choose one by series='its UID, number or description':{listing}")
    slices = matches[0]
    for item in slices:
        if item.modality != "CT":
            what = f"of modality {item.modality or 'unknown'}, not a CT"
            raise ValueError(f"{item.name} is {what}; choose or get a CT series")
    _check_left_out(slices, left_out)
    chosen = [f"series {_described(slices)}, chosen from {len(found)}"] if len(found) > 1 else []
    return slices, chosen + ([f"left out: {others}"] if others else [])


_LeftOut = list[tuple[str, str, Slice | None]]  # kind, name, and header where it has one


def _sorted_out(path: Path) -> tuple[list[list[Slice]], _LeftOut]:
    """Series of pictures (slices in the order of their names), and the files of other kinds."""
    series, left_out, others = defaultdict[tuple, list[Slice]](list), _LeftOut(), []
    for file in _files(path):
        name = file.relative_to(path).as_posix() if file != path else file.name
        slices = _slices(file, name)
        if not slices:
            others.append((file, name))
        for item in slices:
            if kind := _kind_left_out(item):
                left_out.append((kind, name, item))
            else:
                series[item.series].append(item)
    alike = {(item.path.parent, item.path.suffix) for slices in series.values() for item in slices}
    for file, name in others:
        _check_no_slice(file, name, (file.parent, file.suffix) in alike)
        left_out.append(("file that is not DICOM", name, None))
    return list(series.values()), left_out


def _check_left_out(slices: list[Slice], left_out: _LeftOut) -> None:
    """Refuse a series of which something was left out that may be a slice with a broken header."""
    odd = [(kind, item) for kind, _, item in left_out if item and item.series == slices[0].series]
    for kind, item in odd:
        if kind not in _NO_SLICES and item.text("ImagePositionPatient"):
            found = f"{item.name} lies among the slices, and is a {kind} by its SOPClassUID {item.text('SOPClassUID')}"
            raise ValueError(f"{found}: a damaged header? Get the file again, or take it away if it is no slice")
    lost = [item.name for kind, item in odd if kind == _NO_PLACE]
    if len(lost) > max(1, len(slices) // _MOST_ODD):
        found = f"{len(lost)} of {len(slices) + len(lost)} slices have no ImagePositionPatient, such as {lost[0]}"
        raise ValueError(f"{found}; get them again, or take them away if they are no slices")


def _files(path: Path) -> list[Path]:
    """The file, or all files below a folder; a subfolder that may not be read is an error."""
    if path.is_file():
        return [path]
    files = files_below(path)
    for file in files:
        if file.is_symlink() and not file.exists():
            raise ValueError(f"{file.name} is a link that leads nowhere; get the file itself, or take the link away")
    if not files:
        raise ValueError("the folder is empty; expected the slices of a DICOM series")
    return [file for file in files if file.is_file()]


def _kind_left_out(item: Slice) -> str:
    """What a DICOM file is that is no slice of a scan; empty for one that may be."""
    kind, image_type = item.text("SOPClassUID"), set(item.text("ImageType").split("/"))
    if "DirectoryRecordSequence" in item.header:
        return "DICOMDIR"
    if f"{kind}.".startswith(f"{uid.SecondaryCaptureImageStorage}."):
        return _CAPTURE
    if kind in _MADE_OF_SCANS:
        return uid.UID(kind).name
    if "PixelData" not in item.header:
        if kind in ("", *_CT_IMAGES):
            raise damaged("it has no pixels", item.name)
        return uid.UID(kind).name
    if "LOCALIZER" in image_type:
        return _LOCALIZER
    if image_type & _PAGES:
        return _PAGE
    return "" if item.text("ImagePositionPatient") or item.text("ImageOrientationPatient") else _NO_PLACE


def _check_no_slice(path: Path, name: str, like_slices: bool) -> None:
    """Refuse a file that is not DICOM, but by its name or contents was to be a slice."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if path.name.startswith(".") or not (like_slices or path.suffix.lower() in _SUFFIXES):
        return  # a read-me, a viewer, macOS's ._ files
    if found := stand_in(start):
        raise ValueError(f"{name} is {found}")
    if path.suffix.lower() in _SUFFIXES or not start or b"\0" in start:  # a text without suffix may be a read-me
        raise damaged(f"{path.stat().st_size} bytes without a DICOM header; if it is no slice, take it away", name)


def _of_ct(found: list[list[Slice]]) -> list[list[Slice]]:
    return [slices for slices in found if any(item.modality == "CT" for item in slices)] or found


def _to_choose(slices: list[Slice], found: list[list[Slice]]) -> str:
    """What to write to get these and no others: by number, where that is enough."""
    number, uid = (slices[0].text(tag) for tag in ("SeriesNumber", "SeriesInstanceUID"))
    alike = _of_ct([each for each in found if each[0].text("SeriesNumber") == number])
    return f"series={number}" if number.isdigit() and alike == [slices] else f"series={uid!r}"


def _described(slices: list[Slice]) -> str:
    first = slices[0]
    tags = {"number": "SeriesNumber", "kernel": "ConvolutionKernel", "UID": "SeriesInstanceUID"}
    rest = "".join(f", {what} {first.text(tag) or 'not given'}" for what, tag in tags.items())
    modality, description = first.modality or "unknown modality", first.text("SeriesDescription")
    return f"{modality} {description!r}, {len(slices)} slices{rest}, such as {first.name}"
