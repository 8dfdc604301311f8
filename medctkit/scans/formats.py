"""The file formats that can be read: one entry each, to which anyone may add (`docs/extending.md` shows how).

A program that reads scans in several processes registers its formats in a module that all of them import.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medctkit.common.text import stand_in
from medctkit.scans.itk import read_itk
from medctkit.scans.numpy_files import read_npz
from medctkit.scans.stored import NOT_ANALYZE, Stored


@dataclass(frozen=True)
class Reader:
    """How a file format is recognised and read.

    Args:
        name: as messages and provenance call it, such as "NIfTI file".
        suffixes: how the names of its files end, in small letters.
        read: function of the path, of the caller's spacing or None, and of those `choices` that the caller made. HU,
            size and orientation are checked afterwards. A ValueError says what was found and the way out; the path is
            added.
        folders: whether it reads folders too.
        choices: arguments of `read_volume` that it takes, by name, such as which of several scans to read.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[..., Stored]
    folders: bool = False
    choices: tuple[str, ...] = ()


READERS: dict[str, Reader] = {}


def register_reader(reader: Reader) -> None:
    """Add a format, in place of the one with its name if there is one; where suffixes agree the latest counts."""
    READERS.pop(reader.name, None)
    READERS[reader.name] = reader


# pydicom and nibabel are imported when there is something to read: a machine that only trains needs neither


def _dicom(*given: Any, **chosen: Any) -> Stored:
    from medctkit.scans.dicom_series import read_dicom

    return read_dicom(*given, **chosen)


def _nifti(*given: Any, **chosen: Any) -> Stored:
    from medctkit.scans.nifti import read_nifti

    return read_nifti(*given, **chosen)


register_reader(Reader("DICOM series", (".zip",), _dicom, True, ("series", "acquisition", "resample")))
register_reader(Reader("NRRD or MetaImage file", (".nrrd", ".nhdr", ".mha", ".mhd"), read_itk, choices=("stored_as",)))
register_reader(Reader("NumPy archive", (".npz",), read_npz, choices=("stored_as",)))
register_reader(Reader("NIfTI file", (".nii", ".nii.gz"), _nifti, choices=("stored_as",)))


def reader_of(path: Path) -> Reader:
    """The reader for the file or folder at `path`; refuses what is not there, may not be read, or is of no format."""
    if not path.exists():
        what = "this link leads nowhere" if path.is_symlink() else "there is no such file or folder"
        raise FileNotFoundError(f"{path}: {what}")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path}: no permission to read it; ask its owner, or copy it to a folder of your own")
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"{path}: neither a file nor a folder")
    name, latest_first = path.name.lower(), list(reversed(READERS.values()))
    named = next((reader for reader in latest_first if name.endswith(reader.suffixes)), None)
    if path.is_dir():
        if named and not named.folders:
            raise ValueError(f"{path}: a folder, in spite of its name; give the file in it")
        return named or READERS["DICOM series"]
    with open(path, "rb") as file:
        if found := stand_in(file.read(64)):
            raise ValueError(f"{path}: {found}")
    if named:
        return named
    if name.endswith((".hdr", ".img", ".hdr.gz", ".img.gz")):
        pair = "half of an Analyze or NIfTI pair (.hdr with .img); save a NIfTI pair as one .nii.gz"
        raise ValueError(f"{path}: {pair}. {NOT_ANALYZE}")
    from medctkit.scans.dicom_files import is_dicom

    if is_dicom(path):
        return READERS["DICOM series"]
    known = (", ".join(("a folder",) * r.folders + r.suffixes) + f" ({r.name})" for r in latest_first)
    raise ValueError(f"{path}: not a CT by its name; expected {', '.join(known)}")
