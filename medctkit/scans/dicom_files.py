"""DICOM files of a folder: which are slices of a scan, and of which series.

A file counts as DICOM by its contents, not by its name, and what is left out is counted.
"""

import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medctkit.scans.stored import damaged, decode, is_web_page

if TYPE_CHECKING:
    from pydicom import Dataset

_MOST_BYTES = 64 << 20  # of a file; one slice of 4096 x 4096 has 32 MiB
# where a file without preamble starts: first element, with a type in letters or (implicit) a short length
_BARE = re.compile(rb"[\x02\x08]\x00[\x00-\x2f]\x00(?:UL|UI|OB|CS|SH|LO|DA|TM|UN|.\x00\x00\x00)", re.DOTALL)
_USED = """SOPClassUID Modality ImageType SamplesPerPixel PhotometricInterpretation Rows Columns BitsAllocated
    BitsStored HighBit PixelRepresentation LossyImageCompression LossyImageCompressionRatio PixelData""".split()
_NAMES = ("SeriesInstanceUID", "SeriesNumber", "SeriesDescription")
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_SUFFIXES = (".dcm", ".dicom", ".ima")
_DEFLATED, _EXPLICIT = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"
_CT_IMAGE, _SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.7"
_PAGES = {"SCREEN SAVE", "DOSE_INFO", "CSA REPORT"}  # in ImageType: text as a picture, by GE and Siemens


@dataclass(frozen=True)
class Slice:
    """A file and its header, without the pixels."""

    path: Path
    name: str  # path inside the folder
    header: "Dataset"

    def text(self, tag: str) -> str:
        """A tag as text, several values with / between them; empty where the header has none."""
        value = decode(lambda: self.header.get(tag), self.name)
        values = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        return "/".join("" if value is None else str(value).strip() for value in values)

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

    def required(self, tag: str, count: int = 1) -> np.ndarray:
        """The same, shape (count,), of a tag that every slice of a scan has."""
        numbers = self.numbers(tag, count)
        if numbers is None:
            raise damaged(f"it has no {tag}", self.name)
        return numbers


def is_dicom(path: Path) -> bool:
    """Whether a file starts as a DICOM file does, with its preamble of 128 bytes or without."""
    with open(path, "rb") as file:
        head = file.read(132)
    return head[128:132] == b"DICM" or head.startswith(b"DICM") or _BARE.match(head) is not None


def load(path: Path, name: str) -> "Dataset | None":
    """A whole DICOM file (of more than 64 MiB: its start), or None where it is none; `name` is for errors."""
    if not is_dicom(path):
        return None
    with open(path, "rb") as file:
        # pydicom would ask for as many bytes as a damaged header says; of bytes in memory there are no more
        data = file.read(min(path.stat().st_size, _MOST_BYTES))
    return decode(lambda: _parse(data), name)


def _parse(data: bytes) -> "Dataset | None":
    import pydicom

    bare = data[128:132] != b"DICM"
    if data.startswith(b"DICM"):
        data = bytes(128) + data
    elif bare and data.startswith(b"\x02\x00"):
        data = bytes(128) + b"DICM" + data
    end_of_meta = 144 + int.from_bytes(data[140:144], "little")
    if _DEFLATED in data[132:end_of_meta]:
        # inflated here, with a limit; the header then is that of the inflated file
        whole = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[end_of_meta:], _MOST_BYTES)
        data = data[:end_of_meta].replace(_DEFLATED, _EXPLICIT) + whole
    dataset = pydicom.dcmread(BytesIO(data), force=True)
    dataset.buffer = None  # or each header would keep the bytes of its whole file
    if not dataset.file_meta.get("TransferSyntaxUID"):
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # DICOM's default
    for tag in _USED:
        dataset.get(tag)  # pydicom decodes a value when it is asked for: let it fail here, not later
    dataset.file_meta.get("MediaStorageSOPClassUID")
    return None if bare and not ("SOPClassUID" in dataset or "Modality" in dataset) else dataset


def chosen_series(folder: Path, wanted: str | None = None) -> tuple[list[Slice], list[str]]:
    """The slices of the one series below a folder, in the order of their names, and notes on what was left out.

    Raises:
        ValueError: no series, several and none or more than one `wanted` (its UID, number or description), not a CT,
            or a damaged file.
    """
    found, left_out = _sorted_out(folder)
    listing = "".join(f"\n  {_described(slices)}" for slices in found)
    others = ", ".join(f"{kind} ({n})" for kind, n in sorted(left_out.items()))
    if not found:
        raise ValueError(f"no slice of a scan among its {left_out.total()} files: {others}; give the series' folder")
    name = str(wanted).strip()
    matches = [slices for slices in found if wanted is None or name in {slices[0].text(tag) for tag in _NAMES} - {""}]
    if len(matches) != 1:
        many = f"{len(matches) or 'no'} series in it" + ("" if wanted is None else f" called {name!r}")
        raise ValueError(f"{many}; choose one by series='its UID, number or description':{listing}")
    for item in matches[0]:
        if (modality := item.text("Modality")) != "CT":
            raise ValueError(f"{item.name} is of modality {modality or 'unknown'}, not a CT; choose or get a CT series")
    chosen = [f"series {_described(matches[0])}, chosen from {len(found)}"] if len(found) > 1 else []
    return matches[0], chosen + ([f"left out: {others}"] if others else [])


def _sorted_out(folder: Path) -> tuple[list[list[Slice]], Counter]:
    """Series of pictures (slices in the order of their names), and how many files of each other kind."""
    series, left_out, others = defaultdict[tuple, list[Slice]](list), Counter[str](), []
    for file in _files(folder):
        name = file.relative_to(folder).as_posix()
        header = load(file, name)
        if header is None:
            others.append((file, name))
            continue
        item = Slice(file, name, header)
        if kind := _kind_left_out(item):
            left_out[kind] += 1
        else:
            uid, *names = (item.text(tag) for tag in _NAMES)
            series[(uid,) if uid else (file.parent, *names)].append(item)
        for tag in _PIXELS:
            header.pop(tag, None)
    alike = {(item.path.parent, item.path.suffix) for slices in series.values() for item in slices}
    for file, name in others:
        _check_no_slice(file, name, (file.parent, file.suffix) in alike)
        left_out["file that is not DICOM"] += 1
    return list(series.values()), left_out


def _files(folder: Path) -> list[Path]:
    """All files below a folder; a subfolder that may not be read is an error, which os.walk would pass over."""

    def refuse(error: OSError) -> None:
        raise error

    files = sorted(Path(root, name) for root, _, names in os.walk(folder, onerror=refuse) for name in names)
    for file in files:
        if file.is_symlink() and not file.exists():
            raise ValueError(f"{file.name} is a link that leads nowhere; get the file itself, or take the link away")
    if not files:
        raise ValueError("the folder is empty; expected the slices of a DICOM series")
    return [file for file in files if file.is_file()]


def _kind_left_out(item: Slice) -> str:
    """What a DICOM file is that is no slice of a scan; empty for one that may be."""
    from pydicom.uid import UID

    header = item.header
    kind = item.text("SOPClassUID") or str(header.file_meta.get("MediaStorageSOPClassUID") or "")
    image_type = set(item.text("ImageType").split("/"))
    if "DirectoryRecordSequence" in header:
        return "DICOMDIR"
    if (kind + ".").startswith(_SECONDARY_CAPTURE + "."):
        return "secondary capture"
    if not any(tag in header for tag in _PIXELS):
        if kind in ("", _CT_IMAGE):
            raise damaged("it has no pixels", item.name)
        return UID(kind).name
    if "LOCALIZER" in image_type:
        return "localizer"
    return "page of text (dose report)" if image_type & _PAGES else ""


def _check_no_slice(path: Path, name: str, like_slices: bool) -> None:
    """Refuse a file that is not DICOM, but by its name or contents was to be a slice."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if path.name.startswith(".") or not (like_slices or path.suffix.lower() in _SUFFIXES):
        return  # a read-me, a viewer, macOS's ._ files
    if is_web_page(start):
        raise ValueError(f"{name} is a web page, not DICOM: its download failed or needs a login; get the file again")
    if path.suffix.lower() in _SUFFIXES or not start or b"\0" in start:  # a text without suffix may be a read-me
        raise damaged(f"{path.stat().st_size} bytes without a DICOM header; if it is no slice, take it away", name)


def _described(slices: list[Slice]) -> str:
    first = slices[0]
    tags = {"number": "SeriesNumber", "kernel": "ConvolutionKernel", "UID": "SeriesInstanceUID"}
    rest = "".join(f", {what} {first.text(tag) or 'not given'}" for what, tag in tags.items())
    modality, description = first.text("Modality") or "unknown modality", first.text("SeriesDescription")
    return f"{modality} {description!r}, {len(slices)} slices{rest}, such as {first.name}"
