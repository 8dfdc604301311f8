"""NRRD and MetaImage files, read by SimpleITK.

SimpleITK would follow a header to any file of this machine, make room for whatever sizes it claims, end the process at
a number of axes, and pass over a checksum. So the few lines that it goes by are looked at first.
"""

import math
import os
import re
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from medctkit.scans.geometry import ras_affine
from medctkit.scans.limits import check_claim
from medctkit.scans.stored import NO_ORIENTATION, Stored, check_bytes, check_shape, check_steps, damaged, decode

_MOST_HEADER = 2**20  # bytes
_MM = {"mm", "millimeter", "millimeters", "millimetre", "millimetres"}
_AXES = ("NDims", "dimension"), ("DimSize", "sizes")  # in MetaImage, where others may be comments, and NRRD
_DATA_FILE = ("ElementDataFile", "data file", "datafile")
_SPACING = ("spacings", "space directions", "ElementSpacing", "ElementSize")
_NUMBERS = {"spacings", "ElementSpacing", "ElementSize", "Offset", "Position", "Origin"}  # with blanks between them
_NUMBERS |= {"TransformMatrix", "Rotation", "Orientation"}
_SKIPS = ("line skip", "lineskip", "byte skip", "byteskip", "HeaderSize")


def read_itk(path: Path, spacing: Sequence[float] | None, stored_as: str | None = None) -> Stored:
    """Read a .nrrd, .nhdr, .mha or .mhd file.

    `spacing` (d, h, w) in mm takes the place of the header's; `stored_as`: the caller knows how the scan lies.
    """
    import SimpleITK as sitk

    fields, end = _header(path)
    if re.search("[\ud800-\udfff]", str(path)):  # how Python keeps bytes of a name; SimpleITK ends the process there
        raise ValueError("its path is not UTF-8, which SimpleITK can't open; rename it, or copy it to another folder")
    axes, sizes = (next((fields[name] for name in names if name in fields), "") for names in _AXES)
    three = r"[+-]?\d+(\s+[+-]?\d+){2}"
    if not re.fullmatch({"3": three, "4": rf"{three}\s+1"}.get(axes, "(?!)"), sizes):  # MetaIO survives these
        raise ValueError(f"{axes}-D, shape ({sizes}): a CT volume has three axes; save the one to read")
    for name in fields:
        if name in _NUMBERS and "," in fields[name] and (spacing is None or name not in _SPACING):
            found = f"its header has {name} {fields[name]}, of which SimpleITK reads what stands before a comma"
            raise ValueError(f"{found}; write points" + ", or pass spacing=(d, h, w) in mm" * (name in _SPACING))
    voxels, start = _voxel_file(path, fields, end)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("MetaImageIO" if "DimSize" in fields else "NrrdImageIO")  # and no other that knows these bytes
    reader.SetFileName(str(path))
    decode(reader.ReadImageInformation)
    shape = reader.GetSize()[:3]  # (x, y, z, 1) is how some programs save a single volume
    check_shape(shape)
    reader.SetExtractSize([*shape, 0][: reader.GetDimension()])
    kind = reader.GetPixelID()
    name = sitk.GetPixelIDValueAsString(kind)
    if reader.GetNumberOfComponents() != 1 or "complex" in name:
        raise ValueError(f"voxels of type {name} (colour or vectors): not a CT")
    if spacing is None:
        check_steps(reader.GetSpacing()[2::-1], blank=not any(name in fields for name in _SPACING))
        units = set(fields.get("space units", fields.get("units", "")).replace('"', " ").split()) - _MM
        if units:
            raise ValueError(f"its header has lengths in {sorted(units)}, expected mm; pass spacing=(d, h, w) in mm")
    itemsize = sitk.Image(1, 1, 1, kind).GetSizeOfPixelComponent()
    notes = _check_voxels(voxels, start, fields, shape, itemsize)
    image = decode(reader.Execute)
    along = np.reshape(image.GetDirection(), (3, 3)) * (image.GetSpacing() if spacing is None else spacing[::-1])
    known = any(name in fields for name in ("TransformMatrix", "Orientation", "Rotation"))
    known = known or bool(re.match("(?i)(left|right)-|[LR][AP]S", fields.get("space", "")))  # scanner-xyz says nothing
    letters = fields.get("AnatomicalOrientation", "RAI")
    if not known and stored_as is None and letters not in ("RAI", "???"):
        found = f"AnatomicalOrientation {letters} without a TransformMatrix, which some take for its opposite"
        raise ValueError(f"{found}; pass how the scan lies as stored_as=")
    hu = sitk.GetArrayViewFromImage(image).astype(np.float32)  # the array is (z, y, x) already
    notes += [] if known else [NO_ORIENTATION]
    return Stored(hu, ras_affine(along[:, ::-1], image.GetOrigin()), notes)  # the columns of along are x, y, z


def _header(path: Path) -> tuple[dict[str, str], int]:
    """Fields of an NRRD or MetaImage header, and where in the file it ends.

    As strict as the libraries that read the file afterwards: what is checked here must be what they will do. Names
    count in any case in NRRD (here in small letters) and as written in MetaImage.
    """
    with open(path, "rb") as file:
        start = file.read(_MOST_HEADER)
    if not start:
        raise damaged("it is empty")
    nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    if nrrd and not start.startswith(b"NRRD"):
        raise damaged(f"it is no NRRD file; it starts with {start[:4]!r}")
    fields: dict[str, str] = {}
    position = start.find(b"\n") + 1 if nrrd else 0
    while position < len(start):
        end = start.find(b"\n", position) + 1 or len(start)
        line, position = os.fsdecode(start[position:end]).strip(), end
        if nrrd and not line:
            return fields, position
        if line.startswith("#") or (nrrd and ":=" in line) or not line:  # comments and extra information
            continue
        name, *value = (part.strip() for part in re.split(":" if nrrd else "[=:]", line, maxsplit=1))
        name = name.lower() if nrrd else name
        if not value or name in fields or not name.isprintable():
            raise damaged(f"its header has the line {line[:40]!r}{' a second time' if name in fields else ''}")
        fields[name] = value[0]
        if name == "ElementDataFile" or (name in _DATA_FILE and value[0].startswith("LIST")):
            return fields, position
    if any(name in fields for name in _DATA_FILE):
        return fields, position
    raise damaged("its header has no end, or there are no voxels after it")


def _voxel_file(path: Path, fields: dict[str, str], end: int) -> tuple[Path, int]:
    """The file with the voxels, and where in it they start."""
    name = next((fields[name] for name in _DATA_FILE if name in fields), "LOCAL")
    if name.upper() == "LOCAL":
        return path, end
    if name.upper().startswith("LIST") or "%" in name:
        raise ValueError(f"its voxels are spread over several files ({name!r}); save the scan as one file")
    folder = os.path.abspath(path.parent)
    voxels = Path(os.path.abspath(os.path.join(folder, name)))
    if not voxels.is_relative_to(folder):
        raise ValueError(f"its voxels should be in {name!r}, outside its folder; put both files into one folder")
    if not voxels.is_file():
        raise ValueError(f"its voxels should be in {name!r} beside it, where there is no such file; copy both files")
    return voxels, 0


def _check_voxels(voxels: Path, start: int, fields: dict[str, str], shape: Sequence[int], itemsize: int) -> list[str]:
    """Compare the bytes that the header describes with those that the file holds; returns notes."""
    if "DimSize" not in fields:
        encoding = fields.get("encoding", "none").lower()
    elif fields.get("BinaryData", "True")[:1].upper() == "F":
        encoding = "text"
    else:
        encoding = "gzip" if fields.get("CompressedData", "")[:1].upper() == "T" else "raw"
    if encoding not in ("raw", "gzip", "gz"):
        raise ValueError(f"its voxels have the encoding {encoding!r}; save them as raw or gzip")
    size, claimed = max(voxels.stat().st_size - start, 0), math.prod(shape) * itemsize
    if encoding != "raw":
        check_claim(shape, itemsize, size)
        size, packed = _unpacked_size(voxels, start, claimed)
        told = fields.get("CompressedDataSize", "0")  # 0: to the end of a file of its own
        if "DimSize" in fields and not (told.isdecimal() and (int(told) >= packed or (int(told) == 0 and not start))):
            raise damaged(f"its header has CompressedDataSize {told}, and its compressed voxels are {packed} bytes")
    if size < claimed or all(fields.get(name, "0") == "0" for name in _SKIPS):  # else something else comes first
        return check_bytes(size, claimed, shape)
    return []


def _unpacked_size(path: Path, start: int, claimed: int) -> tuple[int, int]:
    """Bytes in a zlib or gzip stream, which ITK would read without looking at its checksum, and bytes of the stream."""
    unpack, total, read = zlib.decompressobj(wbits=47), 0, 0  # 47: either kind
    with open(path, "rb") as file:
        file.seek(start)
        while not unpack.eof and total <= claimed and (packed := file.read(1 << 14)):
            total, read = total + len(decode(partial(unpack.decompress, packed))), read + len(packed)
    if not unpack.eof and total <= claimed:
        raise damaged("its compressed voxels end too early")
    return total, read - len(unpack.unused_data)
