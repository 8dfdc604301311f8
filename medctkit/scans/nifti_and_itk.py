"""One reader per file format.

Files are strangers: what a header claims is compared with what the file holds before anything of that size is
made in memory, and compressed voxels are checked by their checksum. Every reader gives float32 values (d, h, w)
that are the caller's to change, the affine from (d, h, w) to RAS mm, and notes for the provenance. Their argument
`spacing` is what the caller gave in place of the header's, or None.
"""

import gzip
import math
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medctkit.scans.dicom_series import decode
from medctkit.scans.geometry import (
    CANONICAL,
    checked_spacing,
    nearest_orientation,
    ras_affine,
    steps_of,
    straight_affine,
    with_spacing,
)

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
MOST_VOXELS = 2**30  # 4 GiB as float32: 1024 slices of 1024 x 1024 pixels
_MOST_HEADER = 2**20  # bytes of a text header
_GZIP_RATIO = 1032  # gzip can't make data smaller than this
_UNITS = {0: (1, ""), 1: (1000, "metres"), 2: (1, ""), 3: (0.001, "micrometres")}  # NIfTI code: mm, name
_MM = {"mm", "millimeter", "millimeters", "millimetre", "millimetres"}
_ASSUMED = f"the header does not say how the scan lies, {CANONICAL} assumed as in DICOM slices"

Read = tuple[np.ndarray, np.ndarray, list[str]]


def _damaged(reason: str) -> ValueError:
    return ValueError(f"can't be read: truncated or damaged; get the file again ({reason})")


def _check_claim(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of the voxels that a header describes."""
    voxels = math.prod(shape)
    if voxels < 1 or min(shape) < 1:
        raise _damaged(f"its header claims {tuple(shape)} voxels")
    if voxels > MOST_VOXELS:
        raise ValueError(
            f"its header claims {tuple(shape)} voxels, {voxels * 4 / 2**30:.3g} GiB: more than any CT; the header is "
            "damaged, or the scan has to be cut or made coarser first"
        )
    return voxels * itemsize


def _check_bytes(found: int, claimed: int) -> None:
    if found != claimed:
        raise _damaged(f"its header describes {claimed} bytes of voxels, and the file holds {found}")


# --- NIfTI


def read_nifti(path: Path, spacing: Sequence[float] | None) -> Read:
    """Read a NIfTI-1 or -2 file: the array (x, y, z) becomes (d, h, w) = (z, y, x), neither flipped nor turned.

    Raises:
        ValueError: see the messages.
    """
    packed = path.name.lower().endswith(".gz")
    _check_packing(path, packed)
    with gzip.open(path) if packed else open(path, "rb") as file:
        header = _nifti_header(decode(lambda: file.read(540)))
        shape, dtype = _nifti_array(header)
        claimed, offset = _check_claim(shape, dtype.itemsize), decode(header.get_data_offset)
        size = path.stat().st_size
        if not packed:
            _check_bytes(max(size - offset, 0), claimed)
        elif claimed > size * _GZIP_RATIO:
            raise _damaged(f"its header describes {claimed} bytes of voxels, too many for {size} compressed bytes")
        try:
            stored = header.raw_data_from_fileobj(file)
        except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
            raise _damaged((str(error).splitlines() or [type(error).__name__])[0]) from error
        if packed and decode(lambda: file.read(1)):  # the end of a compressed file is where its checksum is compared
            raise _damaged(f"it goes on after the {claimed} bytes of voxels that its header describes")
    notes = [f"{stored.ndim}-D with nothing along the axes after the third"] if stored.ndim > 3 else []
    # (x, y, z) -> d h w: the file runs along x first, so this is its own order; asarray: no memory map any more
    hu = np.asarray(stored).reshape(shape, order="F").transpose(2, 1, 0).astype(np.float32, order="C")
    slope, intercept = _nifti_scale(header)
    if (slope, intercept) != (1, 0):
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
            hu *= slope
            hu += intercept
        notes.append(f"value * {slope:g} + {intercept:g} of the NIfTI header applied")
    affine, about_affine = _nifti_affine(header, spacing)
    return hu, affine, notes + about_affine


def _check_packing(path: Path, packed: bool) -> None:
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise _damaged("it is empty")
    gzipped = start[:2] == b"\x1f\x8b"
    if packed and not gzipped:
        if _nifti_size(start):
            raise ValueError("not compressed, in spite of its name; rename it to .nii")
        raise ValueError(f"can't be read: not a compressed file, in spite of its name; it starts with {start!r}")
    if gzipped and not packed:
        raise ValueError("compressed, in spite of its name; rename it to .nii.gz")


def _nifti_size(start: bytes) -> int:
    """348 for the start of a NIfTI-1 (or Analyze) header, 540 for NIfTI-2, 0 for anything else."""
    return next((n for n in (348, 540) for order in ("little", "big") if start[:4] == n.to_bytes(4, order)), 0)


def _nifti_header(start: bytes):
    import nibabel as nib

    size = _nifti_size(start)
    if not size:
        raise _damaged(f"it has no NIfTI header; it starts with {start[:4]!r}")
    if len(start) < size:
        raise _damaged(f"its header ends after {len(start)} of {size} bytes")
    magic = start[344:348] if size == 348 else start[4:12]
    if magic[:3] in (b"ni1", b"ni2"):
        raise ValueError("the header of a NIfTI pair (.hdr with .img), without voxels; save the pair as one .nii.gz")
    if magic not in (b"n+1\0", b"n+2\0\r\n\x1a\n"):
        raise ValueError(
            f"an Analyze file or a damaged NIfTI header (its mark is {magic!r}). Analyze does not say which side is "
            "left; make a NIfTI from the DICOM slices, with dcm2niix for example"
        )
    return decode(lambda: (nib.Nifti1Header if size == 348 else nib.Nifti2Header)(start[:size], check=False))


def _nifti_array(header) -> tuple[tuple[int, ...], np.dtype]:
    """Shape (x, y, z) and type of the voxels."""
    n = int(header["dim"][0])
    shape = tuple(int(size) for size in header["dim"][1 : n + 1]) if 1 <= n <= 7 else ()
    if not shape or min(shape) < 1:
        raise _damaged(f"its header claims {n} axes of {shape} voxels")
    while len(shape) > 3 and shape[-1] == 1:  # (x, y, z, 1) is how some programs save a single volume
        shape = shape[:-1]
    if len(shape) != 3:
        raise ValueError(
            f"{len(shape)}-D, shape {shape}: a CT volume has three axes; save the one to read, "
            "for example nibabel.load(path).slicer[..., 0]"
        )
    try:
        dtype = header.get_data_dtype()
    except KeyError as error:
        raise _damaged(f"its header has the type of voxel {error}, which does not exist") from error
    if dtype.kind not in "iuf":
        raise ValueError(f"voxels of type {dtype} (colour or complex): not a CT")
    return shape, dtype


def _nifti_scale(header) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):  # how NIfTI says "not scaled"
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise _damaged(f"its header scales voxels with scl_slope {slope}, scl_inter {intercept}")
    return slope, intercept


def _nifti_affine(header, spacing: Sequence[float] | None) -> tuple[np.ndarray, list[str]]:
    """Affine from (d, h, w) to RAS mm, and notes."""
    to_mm, units = _UNITS.get(int(header["xyzt_units"]) & 7, (None, ""))
    if to_mm is None:
        raise _damaged(f"its header has the unit of length {int(header['xyzt_units']) & 7}, which does not exist")
    notes = [f"lengths in the header are {units}, turned into mm"] if units else []
    if spacing is not None:
        header["pixdim"][1:4] = np.divide(checked_spacing(spacing), to_mm)[::-1]
    pixdim = header["pixdim"][3:0:-1].astype(float)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise ValueError(
            f"the size of a voxel in its header (pixdim) is {tuple(pixdim.tolist())} (slices, rows, columns): expected "
            "lengths above 0; pass the right one as spacing=(d, h, w) in mm"
        )
    steps = tuple(round(step * to_mm, 6) for step in pixdim.tolist())
    forms = {name: _nifti_form(header, name, to_mm) for name in ("sform", "qform") if header[f"{name}_code"] > 0}
    if not forms:
        if spacing is None and steps == (1, 1, 1):
            raise ValueError("blank header, so the size of a voxel is unknown; pass spacing=(d, h, w) in mm")
        return straight_affine(steps, CANONICAL), [*notes, _ASSUMED]
    letters = {name: nearest_orientation(form) for name, form in forms.items()}
    if len(set(letters.values())) > 1:
        raise ValueError(
            f"the header contradicts itself: by its sform the scan lies {letters['sform']}, by its qform "
            f"{letters['qform']} (slices, rows, columns). Find out which is right and drop the other, for example "
            "image.set_sform(None, code=0) or image.set_qform(None, code=0) with nibabel"
        )
    affine = forms.get("sform", forms.get("qform"))
    if spacing is not None:
        affine = with_spacing(affine, spacing)
    elif not np.allclose(steps_of(affine), steps, rtol=1e-2):
        raise ValueError(
            f"the header contradicts itself: pixdim {steps} mm, affine {steps_of(affine)} mm (slices, "
            "rows, columns); pass the right one as spacing=(d, h, w)"
        )
    return affine, notes


def _nifti_form(header, name: str, to_mm: float) -> np.ndarray:
    """The sform or qform of a header, from (d, h, w) to mm."""
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            form = header.get_sform() if name == "sform" else header.get_qform()
    except Exception as error:  # numpy's and nibabel's, for quaternions that are none
        raise ValueError(f"the {name} in the header is unusable: {error}") from error
    return np.diag([to_mm, to_mm, to_mm, 1]) @ form[:, [2, 1, 0, 3]].astype(float)


# --- NRRD and MetaImage


def read_itk(path: Path, spacing: Sequence[float] | None) -> Read:
    """Read an NRRD or MetaImage file, with its voxels inside or in a file beside it.

    Raises:
        ValueError: see the messages.
    """
    import SimpleITK as sitk

    fields, offset = _text_header(path)
    shape = _itk_shape(fields)
    notes = _itk_notes(fields, spacing)
    voxels, offset = _voxel_file(path, fields, offset)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    decode(reader.ReadImageInformation)
    kind = reader.GetPixelID()
    if reader.GetNumberOfComponents() != 1 or kind not in _itk_bytes():
        raise ValueError(f"voxels of type {sitk.GetPixelIDValueAsString(kind)} (colour or vectors): not a CT")
    if reader.GetSize() != shape:
        raise _damaged(f"its header claims {shape} voxels and {reader.GetSize()} voxels")
    _check_voxels(voxels, offset, fields, _check_claim(shape, _itk_bytes()[kind]))
    image = decode(reader.Execute)
    axes = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()  # columns x, y, z
    affine = with_spacing(ras_affine(axes[:, ::-1], image.GetOrigin()), spacing)
    return sitk.GetArrayViewFromImage(image).astype(np.float32), affine, notes  # the array is (z, y, x) already


def _itk_bytes() -> dict[int, int]:
    """SimpleITK's numbers of the types of a voxel that may be a CT, and how many bytes each takes."""
    import SimpleITK as sitk

    sizes = {1: "Int8 UInt8", 2: "Int16 UInt16", 4: "Int32 UInt32 Float32", 8: "Int64 UInt64 Float64"}
    return {getattr(sitk, f"sitk{name}"): size for size, names in sizes.items() for name in names.split()}


def _text_header(path: Path) -> tuple[dict[str, str], int]:
    """Fields of an NRRD or MetaImage header, and where in the file it ends.

    As strict as the libraries that read the file afterwards: what is checked here must be what they will do. Names
    count in any case in NRRD (here in small letters) and as written in MetaImage.
    """
    with open(path, "rb") as file:
        start = file.read(_MOST_HEADER)
    if not start:
        raise _damaged("it is empty")
    nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    if nrrd and not start.startswith(b"NRRD"):
        raise _damaged(f"it is no NRRD file; it starts with {start[:4]!r}")
    fields, position = {}, start.find(b"\n") + 1 if nrrd else 0
    while 0 <= position < len(start):
        end = start.find(b"\n", position) + 1 or len(start)
        line, position = os.fsdecode(start[position:end]).strip(), end
        if nrrd and not line:
            return fields, position
        if line.startswith("#") or (nrrd and ":=" in line) or not line:  # comments and extra information
            continue
        name, *value = (part.strip() for part in re.split(":" if nrrd else "[=:]", line, maxsplit=1))
        name = name.lower() if nrrd else name
        if not value or name in fields or not name.isprintable():
            raise _damaged(f"its header has the line {line[:40]!r}{' a second time' if name in fields else ''}")
        fields[name] = value[0]
        if "ElementDataFile" in fields:
            return fields, position
    if _data_file(fields):
        return fields, position
    raise _damaged("its header has no end, or there are no voxels after it")


def _data_file(fields: dict[str, str]) -> str | None:
    return next((fields[name] for name in ("ElementDataFile", "data file", "datafile") if name in fields), None)


def _numbers(text: str, kind: type) -> tuple:
    try:
        return tuple(kind(word) for word in text.split())
    except ValueError:
        return ()


def _itk_shape(fields: dict[str, str]) -> tuple[int, int, int]:
    n = _numbers(fields.get("dimension", fields.get("NDims", "")), int)
    shape = _numbers(fields.get("sizes", fields.get("DimSize", "")), int)
    if len(n) != 1 or len(shape) != n[0]:
        raise _damaged(f"its header claims {n[0] if n else 'no'} axes of {shape} voxels")
    if len(shape) != 3:
        raise ValueError(f"{len(shape)}-D, shape {shape}: a CT volume has three axes; save the one to read")
    _check_claim(shape, 1)
    return shape


def _itk_notes(fields: dict[str, str], spacing: Sequence[float] | None) -> list[str]:
    """What the header leaves open; refuses sizes of a voxel that only a caller's spacing can mend."""
    nrrd = "sizes" in fields
    given = [name for name in (("spacings",) if nrrd else ("ElementSpacing", "ElementSize")) if name in fields]
    if spacing is None:
        if not given and "space directions" not in fields:
            raise ValueError("blank header, so the size of a voxel is unknown; pass spacing=(d, h, w) in mm")
        for name in given:
            steps = _numbers(fields[name], float)
            if len(steps) != 3 or not all(math.isfinite(step) and step > 0 for step in steps):
                raise ValueError(
                    f"the size of a voxel in its header is {fields[name]!r} (columns, rows, slices): expected three "
                    "lengths above 0; pass the right one as spacing=(d, h, w) in mm"
                )
        units = set(fields.get("space units", fields.get("units", "")).replace('"', " ").split()) - _MM
        if units:
            raise ValueError(f"lengths in its header are in {sorted(units)}, expected mm; pass spacing=(d, h, w) in mm")
    known = ("space",) if nrrd else ("TransformMatrix", "Orientation", "Rotation")
    return [] if any(name in fields for name in known) else [_ASSUMED]


def _voxel_file(path: Path, fields: dict[str, str], offset: int) -> tuple[Path, int]:
    """The file with the voxels, and where in it they start."""
    name = _data_file(fields)
    if name is None or name.upper() == "LOCAL":
        return path, offset
    if name.upper().startswith("LIST") or "%" in name:
        raise ValueError(f"its voxels are spread over several files ({name!r}); save the scan as one file")
    folder = os.path.abspath(path.parent)
    voxels = Path(os.path.abspath(os.path.join(folder, name)))
    if not voxels.is_relative_to(folder):
        raise ValueError(f"its voxels should be in {name!r}, outside its folder; put both files into one folder")
    if not voxels.is_file():
        raise ValueError(f"its voxels should be in {name!r} beside it, where there is no such file; copy both files")
    return voxels, 0


def _check_voxels(voxels: Path, offset: int, fields: dict[str, str], claimed: int) -> None:
    """Compare the bytes that the header describes with those that the file holds."""
    if "sizes" in fields:
        encoding = fields.get("encoding", "none").lower()
    elif fields.get("BinaryData", "True")[:1].upper() == "F":
        encoding = "text"
    else:
        encoding = "gzip" if fields.get("CompressedData", "")[:1].upper() == "T" else "raw"
    if encoding not in ("raw", "gzip", "gz"):
        raise ValueError(f"its voxels have the encoding {encoding!r}; save them as raw or gzip")
    size = max(voxels.stat().st_size - offset, 0)
    found = size if encoding == "raw" else _unpacked_size(voxels, offset, claimed)
    skips = ("line skip", "lineskip", "byte skip", "byteskip", "HeaderSize")
    if found > claimed and any(fields.get(name, "0") != "0" for name in skips):
        return  # something else comes first
    _check_bytes(found, claimed)


def _unpacked_size(path: Path, offset: int, claimed: int) -> int:
    """Bytes in a zlib or gzip stream, which ITK would read without looking at its checksum."""
    unpack, total = zlib.decompressobj(wbits=47), 0  # 47: either kind
    with open(path, "rb") as file:
        file.seek(offset)
        while not unpack.eof and total <= claimed and (packed := file.read(1 << 14)):
            total += len(decode(lambda packed=packed: unpack.decompress(packed)))
    if not unpack.eof and total <= claimed:
        raise _damaged("its compressed voxels end too early")
    return total
