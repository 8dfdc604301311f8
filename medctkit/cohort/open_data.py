"""Data that needs no account: what will be fetched, under which licence, and the manifest that it becomes.

Neither source has reports: a row's report says its known labels in the words of the paper's prompts. Labels that
nobody gave stay unknown.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medctkit.cohort.download import refuse_no_room
from medctkit.cohort.manifest import write_manifest
from medctkit.common.atomic import write_text
from medctkit.common.text import as_bytes, counted
from medctkit.findings import FINDINGS

LICENCES = "LICENCES.txt"


@dataclass(frozen=True)
class OpenPlan:
    """What `fetch` will do; made by `idc.plan_idc` or `rad_chestct.plan_rad_chestct`, refused where it has no room.

    Raises:
        OSError: the destination can't be written, or its disk has no room for what is missing.
    """

    destination: Path
    source: str  # in a few words
    licences: tuple[str, ...]  # each with whom to name
    table: pd.DataFrame  # the manifest; a row for each scan
    bytes_total: int
    bytes_there: int
    transfer: Callable[[], Mapping[str, str]]  # fetches what is missing; gives studies that did not come, and why

    def __post_init__(self) -> None:
        self.destination.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.destination).free
        refuse_no_room(self.destination, self.bytes_total - self.bytes_there, free)

    def __str__(self) -> str:
        labels = {name: self.table[name].dropna() for name in FINDINGS}
        known = ", ".join(f"{name} {int(of.sum())} of {len(of)}" for name, of in labels.items() if len(of))
        what = f"{self.source} -> {self.destination}: {counted(self.table, 'scan')} of "
        what += f"{counted(set(self.table['patient']), 'patient')}, {as_bytes(self.bytes_total)}; "
        return "\n".join([*self.licences, f"{what}{as_bytes(self.bytes_there)} there", f"labels: {known or 'none'}"])


def fetch(plan: OpenPlan) -> tuple[Path, Mapping[str, str]]:
    """Fetch what is missing, and write `LICENCES.txt` and `manifest.csv` of what is there, whole.

    Returns:
        The manifest, and of each study that is not in it, why.

    Raises:
        OSError: nothing came.
    """
    write_text(plan.destination / LICENCES, "\n".join(plan.licences) + "\n")
    failures = plan.transfer()
    whole = plan.table[~plan.table["study"].isin(failures)]
    if not len(whole):
        study, why = next(iter(failures.items()))
        raise OSError(f"none of {counted(plan.table, 'scan')} came whole; the first, {study}: {why}")
    return write_manifest(whole, plan.destination / "manifest.csv"), failures


def manifest_row(study: str, patient: str, split: str, hospital: str, labels: Mapping[str, int], **more: Any) -> dict:
    """A row of the manifest, of a scan without a report.

    `study`, `patient`, `split` and `hospital` are its cells, `labels` (1 or 0) as far as they are known, `more` others.
    """
    said = " ".join(f"{name} is {'' if there else 'not '}present." for name, there in labels.items())
    row: dict[str, Any] = dict(study=study, patient=patient, split=split, hospital=hospital, seed=None, scan=study)
    row |= dict(reconstruction=1, **{name: labels.get(name) for name in FINDINGS})
    return row | dict(report=said or "Chest CT.", checksum="", **more)


def split_of(patient: str) -> str:
    """Where a patient belongs: 60 % train, 10 % valid, 30 % test, by name, so that more patients move nobody."""
    share = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:4]) / 2**32
    return "train" if share < 0.6 else "valid" if share < 0.7 else "test"
