"""Which volumes of CT-RATE to fetch: all, those of some patients, or those of a list."""

import hashlib
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from medctkit.cohort.ct_rate import parse_volume_name, volume_path
from medctkit.common.text import counted, listed


@dataclass(frozen=True)
class Selection:
    """Volumes to fetch."""

    files: tuple[str, ...]  # paths in the repository
    patients: tuple[str, ...]
    left_out: tuple[str, ...] = ()  # volumes that were asked for, but show no chest

    def __str__(self) -> str:
        text = f"{counted(self.patients, 'patient')}, {counted(self.files, 'volume')}"
        return text + (f"; left out, because not a chest: {counted(self.left_out, 'volume')}" if self.left_out else "")


def select(
    volumes: Iterable[str],
    *,
    patients: int | None = None,
    studies: Iterable[str] | None = None,
    version: int = 2,
    no_chest: Collection[str] = (),
    seed: int | None = None,
) -> Selection:
    """Choose volumes: all of them, those of some patients, or those of a list.

    Args:
        volumes: names of all volumes there are, as in CT-RATE's column VolumeName.
        patients: this many whole patients: the first by number, or, with a seed, drawn at random. The same
            seed gives the same patients, and more of them when asked for more.
        studies: names of patients (valid_1), scans (valid_1_a) or volumes (valid_1_a_1).
        version: 2 (HU) or 1 (stored values), of the data set.
        no_chest: volumes to leave out.
        seed: see `patients`.

    Raises:
        ValueError: more patients than there are, names that don't exist, or nothing left.
    """
    if patients is not None and studies is not None:
        raise ValueError("patients and studies were both given; choose by number or by name")
    if seed is not None and patients is None:
        raise ValueError("a seed draws patients: give their number")
    no_chest = {name.removesuffix(".nii.gz") for name in no_chest}
    names: dict[str, list[str]] = {}  # of a patient, scan or volume: its volumes
    for volume in sorted({name.removesuffix(".nii.gz") for name in volumes}, key=_natural):
        for name in (volume, volume.rpartition("_")[0], _patient(volume)):
            names.setdefault(name, []).append(volume)
    if studies is not None:
        asked = dict.fromkeys(name.removesuffix(".nii.gz") for name in studies)
        if not asked:
            raise ValueError("the list of studies is empty")
        unknown = [name for name in asked if name not in names]
        if unknown:
            shown = [", perhaps ".join([name, *get_close_matches(name, names, 1)]) for name in unknown[:5]]
            raise ValueError(
                f"{counted(unknown, 'name')} not in the data set; expected patients (valid_1), scans (valid_1_a) or "
                f"volumes (valid_1_a_1):\n{listed(shown + unknown[5:])}"
            )
        chosen = {volume for name in asked for volume in names[name]}
    else:
        there = [_patient(v) for found in names.values() for v in found if v not in no_chest]
        chosen = {volume for name in some_of(there, patients, seed) for volume in names[name]}
    files = sorted(chosen - no_chest, key=_natural)
    if not files:
        raise ValueError(f"nothing to fetch: {counted(chosen, 'volume')} asked for, none of which is a chest")
    return Selection(
        tuple(volume_path(volume, version) for volume in files),
        tuple(dict.fromkeys(map(_patient, files))),
        tuple(sorted(chosen & no_chest, key=_natural)),
    )


def some_of(patients: Iterable[str], number: int | None, seed: int | None) -> list[str]:
    """So many patients: the first, in the order given, or, with a seed, drawn at random; None: all.

    Raises:
        ValueError: more than there are, or less than one.
    """
    names = list(dict.fromkeys(patients))
    if number is not None and not 1 <= number <= len(names):
        raise ValueError(f"{number} patients were asked for; there are {len(names)}")
    if seed is not None:
        names.sort(key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return names[:number]


def read_names(path: str | os.PathLike) -> list[str]:
    """Names from a text file, one a line, or from the first column of a CSV file with the header VolumeName.

    Raises:
        ValueError: no text in UTF-8.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save the names as UTF-8, one a line") from None
    names = [line.partition("#")[0].partition(",")[0].strip(' "') for line in lines]
    return [name for name in names if name and name != "VolumeName"]


def study_names(values: Iterable[str]) -> list[str]:
    """Names from a command line: each value is a file with names, or names with commas between.

    Raises:
        FileNotFoundError: a value that looks like a file, and isn't there.
    """
    names = []
    for value in values:
        if os.path.isfile(os.path.expanduser(value)):  # Path.is_file fails on a long list of names
            names += read_names(value)
        elif "/" in value or value.endswith((".txt", ".csv")):
            raise FileNotFoundError(f"{value}: there is no such file of names")
        else:
            names += [name.strip() for name in value.split(",") if name.strip()]
    return names


def _patient(volume: str) -> str:
    return parse_volume_name(volume).patient


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
