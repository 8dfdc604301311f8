"""Imaging Data Commons through idc-index: public buckets, no account; the index that the package ships is asked first.

One chest series for each patient, chosen by rule: slice thickness and number of slices within limits, never a
localizer, a soft kernel before a sharp one, then the thinnest slices, then the most.

Of LIDC-IDRI, the nodules of 3 mm and more that its readers drew are fetched too, as DICOM segmentations (Fedorov et
al. 2020, 10.1002/mp.14445): they give the label "Lung nodule" and, by `nodules`, the masks.
"""

import logging
import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd

from medctkit.cohort.nodules import LEAST_READERS, NODULE
from medctkit.cohort.open_data import OpenPlan, manifest_row, split_of
from medctkit.cohort.selection import some_of
from medctkit.common.extras import require

LIDC = "lidc_idri"
NODULES = {LIDC: "dicom_lidc_idri_nodules"}  # collection -> whose segmentations of nodules
THICKNESS, SLICES = (0.4, 3.0), (60, 1200)  # mm; of a chest
SOFT = re.compile(r"STANDARD|SOFT|BODY|[BI]R?[1-4]\d|FC[01]\d|[ABC]$")
SHARP = re.compile(r"LUNG|BONE|EDGE|DETAIL|[BI][LR]?[5-9]\d|FC[3-8]\d|[DEL]$|Y")
DETAILS = ["SeriesInstanceUID", "SliceThickness", "ConvolutionKernel", "ImageType"]


def plan_idc(
    destination: str | os.PathLike,
    collection: str = LIDC,
    patients: int | None = None,
    seed: int | None = None,
) -> OpenPlan:
    """Choose patients and their series by the index, before anything but a table of 20 MB is fetched.

    Args:
        destination: gets `scans`, `nodules`, `manifest.csv` and `LICENCES.txt`.
        collection: its name, such as "lidc_idri" or "nlst".
        patients: how many; None: all that have a series that fits.
        seed: draws them; None: the first by name.

    Raises:
        ModuleNotFoundError: idc-index is not installed.
        ValueError: no such collection, or not so many patients with a series that fits.
        OSError: no network, or no room.
    """
    destination, client = Path(destination).expanduser().absolute(), _client()
    rows = client.index[client.index["collection_id"] == collection]
    if rows.empty:
        near = get_close_matches(collection, sorted(set(client.index["collection_id"])))
        raise ValueError(f"Imaging Data Commons has no collection {collection!r}; perhaps {', '.join(near) or 'none'}")
    scans = chest_series(rows.merge(_details(client), on="SeriesInstanceUID"))
    if scans.empty:
        raise ValueError(f"{collection} has no CT of {SLICES} slices of {THICKNESS} mm; choose another collection")
    scans = scans[scans["PatientID"].isin(some_of(sorted(scans["PatientID"]), patients, seed))]
    whose = rows["analysis_result_id"] == NODULES.get(collection, "")
    drawn = rows[whose & (rows["Modality"] == "SEG") & rows["StudyInstanceUID"].isin(scans["StudyInstanceUID"])]
    scans = scans.assign(folder="scans/" + scans["PatientID"] + "/" + scans["SeriesInstanceUID"])
    drawn = drawn.assign(folder="nodules/" + drawn["StudyInstanceUID"] + "/" + drawn["SeriesInstanceUID"])
    nodule = drawn["SeriesDescription"].str.extract(NODULE)[0]
    readers = drawn.assign(nodule=nodule).groupby(["StudyInstanceUID", "nodule"]).size()
    most = readers.groupby("StudyInstanceUID").max()
    table = []
    for row in scans.itertuples():
        n = int(most.get(row.StudyInstanceUID, 0))
        known = collection in NODULES and n not in range(1, LEAST_READERS)  # one reader against three
        labels = {"Lung nodule": int(n > 0)} if known else {}
        masks = str(destination / "nodules" / row.StudyInstanceUID) if n else ""
        more = dict(path=str(destination / row.folder), masks=masks, licence=row.license_short_name, doi=row.source_DOI)
        table.append(manifest_row(row.PatientID, row.PatientID, split_of(row.PatientID), collection, labels, **more))
    series = pd.concat([scans, drawn])
    there = sum(int(row.series_size_MB * 1e6) for row in series.itertuples() if not _lacks(destination, row))
    return OpenPlan(
        destination,
        f"Imaging Data Commons {client.get_idc_version()}, {collection}",
        _licences(client, series),
        pd.DataFrame(table),
        int(series["series_size_MB"].sum() * 1e6),
        there,
        lambda: _transfer(client, destination, scans, drawn),
    )


def chest_series(table: pd.DataFrame) -> pd.DataFrame:
    """One series for each patient, by the rule above, out of a `table` of the index's rows with `DETAILS`."""
    fits = (table["Modality"] == "CT") & table["analysis_result_id"].isna()
    fits &= table["SliceThickness"].between(*THICKNESS) & table["instanceCount"].between(*SLICES)
    table = table[fits & ~table["ImageType"].map(lambda kinds: "LOCALIZER" in _text(kinds))]
    hardness = [_hardness(_text(kernel)) for kernel in table["ConvolutionKernel"]]
    order = dict(PatientID=True, hardness=True, SliceThickness=True, instanceCount=False, SeriesInstanceUID=True)
    ordered = table.assign(hardness=hardness).sort_values(list(order), ascending=list(order.values()))
    return ordered.drop_duplicates("PatientID")


def _client() -> Any:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    require("open", "idc_index")
    from idc_index import IDCClient

    root.handlers[:], root.level = before  # its import sets up everyone's log
    logging.getLogger("idc_index").setLevel(logging.CRITICAL)  # it logs what we look for ourselves, and raise
    return IDCClient()


def _details(client: Any) -> pd.DataFrame:
    """The table with thickness, kernel and kind of every CT series, which is fetched once."""
    try:
        client.fetch_index("ct_index")
        return client.ct_index[DETAILS]
    except (OSError, AttributeError, ValueError) as error:
        told = client.indices_overview["ct_index"]
        raise ConnectionError(
            f"no table of CT series from {told['url']} ({type(error).__name__}). Check the network and "
            f"HTTPS_PROXY; delete a damaged one: {told['file_path']}"
        ) from None


def _licences(client: Any, series: pd.DataFrame) -> tuple[str, ...]:
    """Each licence that the index gives these series, with the citation of their source."""
    client.fetch_index("collections_index")
    client.fetch_index("analysis_results_index")
    found = client.analysis_results_index
    cited = {doi.lower(): text for doi, text in zip(found["source_DOI"], found["citation"], strict=True) if doi}
    for sources in client.collections_index["sources"]:
        cited |= {s["source_doi"].lower(): s["citation"] for s in sources if s["source_doi"]}
    pairs = series[["license_short_name", "source_DOI"]].drop_duplicates().itertuples(index=False)
    texts = ((name, cited.get(doi.lower()) or f"https://doi.org/{doi}") for name, doi in pairs)
    return tuple(f"{name}. {' '.join(unescape(re.sub('<[^>]+>', '', text)).split())}" for name, text in texts)


def _transfer(client: Any, destination: Path, scans: pd.DataFrame, drawn: pd.DataFrame) -> Mapping[str, str]:
    for series, layout in ((scans, "%PatientID/%SeriesInstanceUID"), (drawn, "%StudyInstanceUID/%SeriesInstanceUID")):
        lacking = [row.SeriesInstanceUID for row in series.itertuples() if _lacks(destination, row)]
        if lacking:
            to = destination / series["folder"].iloc[0].partition("/")[0]
            client.download_from_selection(str(to), seriesInstanceUID=lacking, dirTemplate=layout, use_s5cmd_sync=True)
    rows = [*drawn.itertuples(), *scans.itertuples()]
    return {row.PatientID: why for row in rows if (why := _lacks(destination, row))}


def _lacks(destination: Path, row: Any) -> str:
    """What of a series has not come; "" where all of it is there."""
    sizes = [file.stat().st_size for file in (destination / row.folder).glob("*.dcm")]
    lacking = int(row.series_size_MB * 1e6) - sum(sizes)
    if len(sizes) == row.instanceCount and abs(lacking) <= 1:
        return ""
    return f"{len(sizes)} of {row.instanceCount} files of {row.folder}, {lacking:,} bytes too few; run this again"


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, float) else " ".join(map(str, value)).upper()


def _hardness(kernel: str) -> int:
    return 0 if SOFT.match(kernel) else 2 if SHARP.match(kernel) else 1
