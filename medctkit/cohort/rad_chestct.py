"""RAD-ChestCT (Draelos et al. 2021, 10.1016/j.media.2020.101857) from Zenodo: CT-CLIP's external test set.

A record says its licence and whether its files are open; this one's were seen to be given on request. Volumes are
.npz files of 0.8 mm, clipped to [-1000, 1000] HU, that run from the head down, from front to back and from the
patient's right to the left: IPL, by the data set's own program (rachellea/ct-volume-preprocessing).

Its labels come from reports by rules, for 84 abnormalities in 52 places each. `assets/rad_chestct_labels.csv` maps 16
of them, in any place, to CT-CLIP's names, with a source for each row; nobody published CT-CLIP's own map.
"""

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import urlopen

import pandas as pd
from tqdm.auto import tqdm

from medctkit.cohort.open_data import OpenPlan, manifest_row
from medctkit.cohort.selection import some_of
from medctkit.common.atomic import replacing
from medctkit.common.csv_tables import read_table

ZENODO, RECORD = "https://zenodo.org", "6406114"
TOKEN = "ZENODO_TOKEN"
SPLITS = {"imgtrain": "train", "imgvalid": "valid", "imgtest": "test"}
LABELS = tuple(csv.DictReader((files("medctkit") / "assets" / "rad_chestct_labels.csv").read_text().splitlines()))
SPACING, LIES = 0.8, "IPL"
SUMMARY, FINDINGS_OF = "Summary_3630.csv", "{}_Abnormality_and_Location_Labels.csv"


def plan_rad_chestct(
    destination: str | os.PathLike, patients: int | None = None, split: str | None = None, seed: int | None = None
) -> OpenPlan:
    """Show the licence, fetch the tables, and choose patients by them.

    Args:
        destination: gets `scans`, the tables, `manifest.csv` and `LICENCES.txt`.
        patients: how many, whole; None: all of the split.
        split: of the data set, "train", "valid" or "test"; None: all three.
        seed: draws the patients; None: the first by name.

    Raises:
        PermissionError: its files are given on request only, and there is no token, or one that is refused.
        ValueError: no such split, or not so many patients.
        OSError: no network, another record than expected, or no room.
    """
    if split is not None and split not in SPLITS.values():
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS.values())}")
    destination = Path(destination).expanduser().absolute()
    with _ask(f"{ZENODO}/api/records/{RECORD}") as answer:
        record = json.load(answer)
    told = record["metadata"]
    given = told.get("license", {}).get("id", "no licence stated")
    who = "; ".join(one["name"] for one in told["creators"])
    licence = f"{given} ({told.get('access_right')} access). {who}: {told['title']}. Zenodo, {record['doi']}"
    print(licence, flush=True)
    entries = {entry["key"]: entry for entry in record.get("files") or ()}
    if not entries:
        raise PermissionError(
            f"the files of {ZENODO}/records/{RECORD} are given on request: ask for them there, and put the token of "
            f"the link that you are sent into {TOKEN}"
        )
    wanted = {name: of for name, of in SPLITS.items() if split in (None, of)}
    tables = [SUMMARY, *(FINDINGS_OF.format(name) for name in wanted)]
    if lacking := [name for name in tables if name not in entries]:
        raise OSError(f"{ZENODO}/records/{RECORD} has no {', '.join(lacking)}; it is not the record that was read here")
    destination.mkdir(parents=True, exist_ok=True)
    if failed := _fetch_files(destination, [entries[name] for name in tables]):
        raise OSError("; ".join(failed.values()))
    summary = read_table(destination / SUMMARY, ["MRN_DEID", "NoteAcc_DEID", "Subset_Assigned"])
    summary = summary[summary["Subset_Assigned"].isin(wanted) & (summary["NoteAcc_DEID"] + ".npz").isin(entries)]
    chosen = summary[summary["MRN_DEID"].isin(some_of(sorted(summary["MRN_DEID"]), patients, seed))]
    tabled = [_labels(read_table(destination / name, ["NoteAcc_DEID"]), chosen["NoteAcc_DEID"]) for name in tables[1:]]
    labels = {study: of for some in tabled for study, of in some.items()}
    more = dict(spacing_d=SPACING, spacing_h=SPACING, spacing_w=SPACING, stored_as=LIES, licence=licence)
    rows, volumes = [], []
    for row in chosen.itertuples():
        study, where = row.NoteAcc_DEID, SPLITS[row.Subset_Assigned]
        path = str(destination / "scans" / f"{study}.npz")
        rows.append(manifest_row(study, row.MRN_DEID, where, "RAD-ChestCT", labels.get(study, {}), path=path, **more))
        volumes.append(entries[f"{study}.npz"])
    folder, total = destination / "scans", sum(entry["size"] for entry in volumes)
    there = sum(entry["size"] for entry in volumes if _is_there(folder, entry))
    what = f"RAD-ChestCT, {split or 'all'}"
    transfer = partial(_fetch_files, folder, volumes)
    return OpenPlan(destination, what, (licence,), pd.DataFrame(rows), total, there, transfer)


def _labels(table: pd.DataFrame, studies: Sequence[str]) -> dict[str, dict[str, int]]:
    """Of some studies the findings that the map knows: columns are "abnormality*place", one place is enough."""
    table = table.set_index("NoteAcc_DEID").loc[lambda all_rows: all_rows.index.isin(studies)]
    found: dict[str, dict[str, int]] = {study: {} for study in table.index}
    for row in LABELS:
        names = row["rad_chestct"].split(";")
        columns = [column for column in table.columns if column.partition("*")[0] in names]
        if not columns:
            got = list(table.columns[:5])
            raise ValueError(f"the labels of RAD-ChestCT have no column {names[0]}*...; got {got} ...")
        present = (table[columns].apply(lambda column: column.astype(float)) > 0).any(axis=1)
        for study, there in present.items():
            found[str(study)] |= dict.fromkeys(row["finding"].split(";"), int(there))
    return found


def _fetch_files(folder: Path, entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Fetch files of the record, four at a time; by the name before its ending, why one did not come."""
    left = [entry for entry in entries if not _is_there(folder, entry)]
    folder.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}

    def provide(entry: Mapping[str, Any]) -> None:
        target, (kind, _, announced) = folder / entry["key"], entry["checksum"].partition(":")
        digest = hashlib.new(kind)
        try:
            with _ask(entry["links"]["self"]) as answer, replacing(target) as temporary:
                with open(temporary, "wb") as file:
                    while piece := answer.read(1 << 20):
                        digest.update(piece)
                        bar.update(file.write(piece))
                if digest.hexdigest() != announced:
                    raise OSError(f"{target.name} arrived damaged or not whole; run this again")
        except (OSError, HTTPException) as error:
            failures[target.stem] = str(error)

    total = sum(entry["size"] for entry in left)
    with tqdm(total=total, disable=not left, unit="B", unit_scale=True, desc="download") as bar:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(provide, left))
    return failures


def _is_there(folder: Path, entry: Mapping[str, Any]) -> bool:
    path = folder / entry["key"]
    return path.is_file() and path.stat().st_size == entry["size"]  # it has its name only after its digest was right


def _ask(address: str) -> Any:
    """Open an address of the record, with the token if there is one, which no message shows."""
    token = os.environ.get(TOKEN, "")
    # a link that was sent to someone has another kind of token than an account
    query = f"?{'token' if token.count('.') == 2 else 'access_token'}={quote(token)}" if token else ""
    try:
        return urlopen(address + query, timeout=60)
    except HTTPError as error:
        error.close()
        kind = PermissionError if error.code in (401, 403) else OSError
        raise kind(f"{address} answers {error.code}; see {ZENODO}/records/{RECORD}, and {TOKEN}") from None
    except (URLError, TimeoutError) as error:
        raise ConnectionError(f"no connection to {address} ({error}). Check the network and HTTPS_PROXY") from None
