"""Real chest CTs to look at: a small one that comes with the package, one of full resolution that anyone may fetch."""

import hashlib
import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from medctkit.cohort.idc import fetch_series
from medctkit.scans.volumes import CTVolume, read_volume

FILE = Path(str(files("medctkit") / "assets" / "sample_ct" / "ct-64.nrrd"))
SHA256 = "d264f0133c25c81a2d18383bb93be55eddda26278fc06d000f717d0dda8ece03"
ATTRIBUTION = (
    "Chest Imaging Platform, The Brigham and Women's Hospital, Inc., Testing/Data/Input/ct-64.nrrd; its licence "
    "(BSD-style, for research) lies beside the file"
)
# A patient of LIDC-IDRI: 133 slices of 512 x 512, 70 MB.
IDC_SERIES = "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192"


def sample_ct(which: str = "small", folder: str | os.PathLike | None = None) -> CTVolume:
    """A real chest CT, in HU; where it is from, and its licence, stand last in its `provenance`.

    Args:
        which: "small", which comes with the package: a whole thorax of 64 x 64 x 79 voxels of 4 mm, for viewing, HU,
            orientation and pre-processing; too coarse to be read. "idc": one of full resolution out of Imaging Data
            Commons, 70 MB, fetched once; needs `pip install 'medctkit[open]'`, a network and no account.
        folder: where the latter is kept; by default `medctkit/idc` in the user's cache.

    Raises:
        ValueError: another name; a file that was changed.
        ModuleNotFoundError: idc-index is not installed.
        OSError: no network, or no room.
    """
    if which == "small":
        if hashlib.sha256(FILE.read_bytes()).hexdigest() != SHA256:
            raise ValueError(f"{FILE} is not the scan that came with the package; install medctkit again")
        volume, said = read_volume(FILE), ATTRIBUTION
    elif which == "idc":
        cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        path, said = fetch_series(IDC_SERIES, Path(cache, "medctkit", "idc") if folder is None else Path(folder))
        volume = read_volume(path)
    else:
        raise ValueError(f"which={which!r}: expected small or idc")
    return replace(volume, provenance=(*volume.provenance, said))
