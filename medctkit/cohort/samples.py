"""Real chest CTs to look at: a small one that comes with the package, one of full resolution that anyone may fetch."""

import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from medctkit.cohort.idc import plan_idc
from medctkit.cohort.manifest import load_manifest, volume_from_row
from medctkit.cohort.open_data import LICENCES, fetch
from medctkit.common.digests import sha256_of
from medctkit.scans.volumes import CTVolume, read_volume

FILE = Path(str(files("medctkit") / "assets" / "sample_ct" / "ct-64.nrrd"))
SHA256 = "d264f0133c25c81a2d18383bb93be55eddda26278fc06d000f717d0dda8ece03"
ATTRIBUTION = (
    "Chest Imaging Platform, The Brigham and Women's Hospital, Inc., Testing/Data/Input/ct-64.nrrd; its licence "
    "(BSD-style, for research) lies beside the file"
)


def sample_ct(which: str = "small", folder: str | os.PathLike | None = None) -> CTVolume:
    """A real chest CT, in HU; where it is from, and its licence, stand last in its `provenance`.

    Args:
        which: "small", which comes with the package: a whole thorax of 64 x 64 x 79 voxels of 4 mm, for viewing, HU,
            orientation and pre-processing; too coarse to be read. "idc": one of full resolution, the first patient of
            LIDC-IDRI, 70 MB, fetched once; needs `pip install 'medctkit[open]'`, a network and no account.
        folder: where the latter is kept; by default `medctkit/idc` in the user's cache.

    Raises:
        ValueError: another name; a file that was changed.
        ModuleNotFoundError: idc-index is not installed.
        OSError: no network, or no room.
    """
    if which == "small":
        if sha256_of(FILE) != SHA256:
            raise ValueError(f"{FILE} is not the scan that came with the package; install medctkit again")
        volume, said = read_volume(FILE), ATTRIBUTION
    elif which == "idc":
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "medctkit", "idc")
        manifest = (cache if folder is None else Path(folder)).expanduser() / "manifest.csv"
        if not manifest.is_file():  # it is written last
            plan = plan_idc(manifest.parent, patients=1)
            print(plan)
            fetch(plan)
        volume = volume_from_row(load_manifest(manifest).iloc[0])
        said = (manifest.parent / LICENCES).read_text(encoding="utf-8").splitlines()[0]
    else:
        raise ValueError(f"which={which!r}: expected small or idc")
    return replace(volume, provenance=(*volume.provenance, said))
