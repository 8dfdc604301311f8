"""What of CT-RATE to fetch, and the released weights, from the Hugging Face Hub.

CT-RATE is gated and must not be passed on: everyone fetches it with a token of their own, after accepting its
terms. `select` and `plan_ct_rate` choose, `preflight` checks, `download` fetches.
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from medctkit.cohort.ct_rate import TABLES, parse_volume_name, volume_path
from medctkit.cohort.hub.preflight import Plan, preflight
from medctkit.cohort.hub.repository import Repository
from medctkit.cohort.hub.transfer import Outcome, download
from medctkit.common.csv_tables import read_table
from medctkit.common.text import counted, listed

CT_RATE = "ibrahimhamamci/CT-RATE"
WEIGHTS = "models/CT-CLIP-Related"
TEXT_ENCODER = "microsoft/BiomedVLP-CXR-BERT-specialized"
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Selection:
    """Volumes to fetch.

    Args:
        files: their paths in the repository.
        patients: whose volumes they are.
        left_out: volumes that were asked for, but show no chest.
    """

    files: tuple[str, ...]
    patients: tuple[str, ...]
    left_out: tuple[str, ...] = ()

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
        _refuse_unknown([name for name in asked if name not in names], names)
        chosen = {volume for name in asked for volume in names[name]}
    else:
        there = list(dict.fromkeys(_patient(v) for found in names.values() for v in found if v not in no_chest))
        if patients is not None and not 1 <= patients <= len(there):
            raise ValueError(f"{patients} patients were asked for; there are {len(there)}")
        if seed is not None:
            there.sort(key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
        chosen = {volume for name in there[:patients] for volume in names[name]}
    files = sorted(chosen - no_chest, key=_natural)
    if not files:
        raise ValueError(f"nothing to fetch: {counted(chosen, 'volume')} asked for, none of which is a chest")
    return Selection(
        tuple(volume_path(volume, version) for volume in files),
        tuple(dict.fromkeys(map(_patient, files))),
        tuple(sorted(chosen & no_chest, key=_natural)),
    )


def read_names(path: str | os.PathLike) -> list[str]:
    """Names from a text file, one a line, or from the first column of a CSV file with the header VolumeName."""
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    names = [line.partition("#")[0].partition(",")[0].strip(' "') for line in lines]
    return [name for name in names if name and name != "VolumeName"]


def study_names(values: Iterable[str]) -> list[str]:
    """Names from a command line: each value is a file with names, or names with commas between.

    Raises:
        FileNotFoundError: a value that looks like a file, and isn't there.
    """
    names = []
    for value in values:
        if Path(value).is_file():
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


def _refuse_unknown(unknown: list[str], known: Iterable[str]) -> None:
    if unknown:
        meant = [get_close_matches(name, known, 1) for name in unknown[:5]]
        shown = [f"{name}, perhaps {close[0]}" if close else name for name, close in zip(unknown, meant, strict=False)]
        raise ValueError(
            f"{counted(unknown, 'name')} not in the data set; expected patients (valid_1), scans (valid_1_a) or "
            f"volumes (valid_1_a_1):\n{listed(shown + unknown[5:])}"
        )


# --- fetching ------------------------------------------------------------------------------------------------


def plan_ct_rate(
    destination: str | os.PathLike,
    *,
    patients: int | None = None,
    studies: Iterable[str] | None = None,
    split: str | None = None,
    version: int = 2,
    weights: Iterable[str] = (),
    keep_no_chest: bool = False,
    seed: int | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> tuple[Plan, Selection | None]:
    """Fetch the tables of CT-RATE, choose volumes by them, and find out whether these can be fetched.

    Args:
        destination: folder that becomes a part of CT-RATE, with its layout.
        patients: how many, of `split` ("valid" if it isn't given); see `select`.
        studies: names; see `select`.
        split: "train" or "valid"; alone it means all of it.
        version: see `select`.
        weights: names such as "CT-CLIP_v2.pt", to be fetched too.
        keep_no_chest: keep volumes that show no chest.
        seed: see `select`.
        token: see `preflight`.
        endpoint: see `preflight`.

    Returns:
        The plan of volumes and weights, and the choice behind it (None where it is only weights).

    Raises:
        ValueError: nothing chosen, too much, or names that don't exist.
        OSError: a table can't be fetched; see also `preflight`.
    """
    where = dict(token=token, endpoint=endpoint)
    weights = [f"{WEIGHTS}/{name}" for name in weights]
    if patients is None and studies is None and split is None:
        if not weights:
            raise ValueError("nothing was chosen: give patients, studies, split or weights")
        return preflight(CT_RATE, weights, destination, **where), None
    if split is not None and split not in TABLES:
        raise ValueError(f"split {split!r}: expected train or valid")
    studies = None if studies is None else list(studies)
    named = [name for name in TABLES if any(study.startswith(f"{name}_") for study in studies or ())]
    tables = [TABLES[name] for name in ([split] if split else named or ["valid"])]
    plan = preflight(CT_RATE, [path for table in tables for path in table.values()], destination, **where)
    _complete(download(plan))
    volumes, no_chest = [], []
    for table in tables:
        volumes += list(read_table(plan.destination / table["labels"], ["VolumeName"], [])["VolumeName"])
        no_chest += [] if keep_no_chest else read_names(plan.destination / table["no_chest"])
    chosen = select(volumes, patients=patients, studies=studies, version=version, no_chest=no_chest, seed=seed)
    return preflight(CT_RATE, [*chosen.files, *weights], destination, **where), chosen


def fetch_weights(
    destination: str | os.PathLike,
    name: str = "CT-CLIP_v2.pt",
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Path:
    """Fetch released weights (about 1.77 GB) from CT-RATE's repository; see `preflight`.

    Args:
        destination: folder; the weights lie in it at models/CT-CLIP-Related, as in the repository.
        name: CT-CLIP_v2.pt, CT_VocabFine_v2.pt or CT_LiPro_v2.pt.
        token: see `preflight`.
        endpoint: see `preflight`.

    Returns:
        Path of the file.

    Raises:
        OSError: it can't be fetched; see also `preflight`.
    """
    plan, _ = plan_ct_rate(destination, weights=[name], token=token, endpoint=endpoint)
    _complete(download(plan))
    return plan.destination / WEIGHTS / name


def plan_tokenizer(
    destination: str | os.PathLike, token: str | bool | None = None, endpoint: str | None = None
) -> Plan:
    """Find out whether the tokenizer of the released text encoder can be fetched.

    The encoder's weights are part of CT-CLIP's; of its repository's Python code nothing is fetched.

    Args:
        destination: folder; the files go into one in it, with the name of their repository.
        token: see `preflight`.
        endpoint: see `preflight`.

    Raises:
        OSError: see `preflight`.
    """
    repository = Repository(TEXT_ENCODER, "model", endpoint, token)
    entries = repository.ask(lambda api: list(api.list_repo_tree(TEXT_ENCODER, repo_type="model")), TEXT_ENCODER)
    there = {entry.path for entry in entries}
    names = [name for name in TOKENIZER_FILES if name in there or name == "vocab.txt"]
    folder = Path(destination) / TEXT_ENCODER.rpartition("/")[2]
    return preflight(TEXT_ENCODER, names, folder, repo_type="model", token=token, endpoint=endpoint)


def fetch_tokenizer(
    destination: str | os.PathLike, token: str | bool | None = None, endpoint: str | None = None
) -> Path:
    """Fetch what `plan_tokenizer` plans.

    Returns:
        Folder for `BertTokenizerFast.from_pretrained`.

    Raises:
        OSError: it can't be fetched; see also `preflight`.
    """
    plan = plan_tokenizer(destination, token, endpoint)
    _complete(download(plan))
    return plan.destination


def _complete(outcome: Outcome) -> None:
    if outcome.failures:
        raise OSError(str(outcome))
