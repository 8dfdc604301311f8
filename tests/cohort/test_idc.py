"""Imaging Data Commons: rows of the index that idc-index ships, its own client, phantoms in buckets on loopback.

`make test-open` installs idc-index in a layer of its own.
"""

import shutil
from collections import namedtuple
from pathlib import Path

import highdicom
import numpy as np
import pandas as pd
import pytest
from open_imitations import buckets
from scan_files import write_dicom, write_drawing
from typer.testing import CliRunner

import medctkit
from medctkit import cli
from medctkit.attention.localisation import find_regions
from medctkit.cohort import idc
from medctkit.cohort.manifest import load_manifest, volume_from_row
from medctkit.cohort.nodules import nodule_mask
from medctkit.cohort.open_data import fetch
from medctkit.course import worlds
from medctkit.phantom import generate
from medctkit.scans.preprocessing import PreprocessConfig

idc_index_data = pytest.importorskip("idc_index_data", reason="make test-open installs idc-index, and runs this")
pytestmark = pytest.mark.open
# Of LIDC-IDRI: a nodule that four drew, none that anyone drew, one that one reader drew.
PATIENTS = {"LIDC-IDRI-0001": 4, "LIDC-IDRI-0028": 0, "LIDC-IDRI-0022": 1}
SHAPE = (64, 40, 40)
SHIPPED = str(idc_index_data.IDC_INDEX_PARQUET_FILEPATH)


@pytest.fixture(scope="module")
def shipped():
    return pd.read_parquet(SHIPPED, filters=[("collection_id", "==", "lidc_idri")])


@pytest.fixture(scope="module")
def world(shipped, tmp_path_factory):
    """Rows of three patients as the index has them, but for sizes; their files in buckets; and the phantoms."""
    folder = tmp_path_factory.mktemp("idc")
    rows = shipped[shipped["PatientID"].isin(PATIENTS) & shipped["Modality"].isin(["CT", "SEG"])].copy()
    phantoms = {}
    for number, (patient, _) in enumerate(PATIENTS.items()):
        of = rows[(rows["PatientID"] == patient) & (rows["Modality"] == "CT")].iloc[0]
        study = phantoms[patient] = generate(number, findings=["Lung nodule"], shape=SHAPE)
        bucket, (dz, dy, dx) = folder / of.aws_bucket / of.crdc_series_uuid, study.volume.spacing
        tags = dict(SeriesInstanceUID=of.SeriesInstanceUID, StudyInstanceUID=of.StudyInstanceUID, PatientID=patient)
        tags |= dict(PixelSpacing=[dy, dx], SliceThickness=dz, FrameOfReferenceUID=highdicom.UID(), PatientName="")
        tags |= dict(PatientBirthDate="", PatientSex="", AccessionNumber="", StudyDate="", StudyTime="", StudyID="")
        tags |= dict(ReferringPhysicianName="", PositionReferenceIndicator="", InstanceNumber=1)
        write_dicom(bucket, study.volume.hu, step=(0, 0, dz), origin=(-100, -90, 5), **tags)
        files = sorted(bucket.glob("*.dcm"))
        drawings = rows[(rows["PatientID"] == patient) & (rows["analysis_result_id"] == "dicom_lidc_idri_nodules")]
        for i, drawn in enumerate(drawings.itertuples()):
            mask = study.masks["Lung nodule"].copy()
            mask[:, ::2] &= i < 2  # two of four drew all of it, the others every second row
            write_drawing(folder / drawn.aws_bucket / drawn.crdc_series_uuid, files, mask, drawn.SeriesDescription)
    kept = [(folder / row.aws_bucket / row.crdc_series_uuid).is_dir() for row in rows.itertuples()]
    rows = rows[kept]
    for at, row in rows.iterrows():
        sizes = [f.stat().st_size for f in (folder / row["aws_bucket"] / row["crdc_series_uuid"]).iterdir()]
        rows.loc[at, ["instanceCount", "series_size_MB"]] = len(sizes), sum(sizes) / 1e6
    return folder, rows, phantoms


@pytest.fixture
def served(world, tmp_path, monkeypatch):
    """The client of idc-index on those rows and buckets, its table of CT series fetched already."""
    folder, rows, _ = world
    data = tmp_path / "share" / "idc_index_data" / idc_index_data.__version__
    data.mkdir(parents=True)
    scans = rows.loc[rows["Modality"] == "CT", ["SeriesInstanceUID"]].assign(SliceThickness=2.5)
    kinds = dict(
        ImageType=[["ORIGINAL", "PRIMARY", "AXIAL"]] * len(scans), ConvolutionKernel=[["STANDARD"]] * len(scans)
    )
    scans.assign(**kinds).to_parquet(data / "ct_index.parquet")
    rows.to_parquet(tmp_path / "index.parquet")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(idc_index_data, "IDC_INDEX_PARQUET_FILEPATH", tmp_path / "index.parquet")
    with buckets(folder) as server:
        monkeypatch.setattr("idc_index.index.aws_endpoint_url", server.url)
        yield server


def test_a_chest_series_is_chosen_by_thickness_kernel_and_number_of_slices():
    def series(
        uid, patient="a", thickness=2.5, kernel="STANDARD", n=130, kind=("ORIGINAL", "PRIMARY", "AXIAL"), **more
    ):
        row = dict(SeriesInstanceUID=uid, PatientID=patient, SliceThickness=thickness, ConvolutionKernel=[kernel])
        return row | dict(instanceCount=n, ImageType=list(kind), Modality="CT", analysis_result_id=None) | more

    table = pd.DataFrame(
        [
            *(series("sharp", thickness=1.0, kernel="LUNG"), series("thick", thickness=5.0), series("few", n=20)),
            *(series("scout", kind=("ORIGINAL", "PRIMARY", "LOCALIZER")), series("soft"), series("soft, more", n=140)),
            *(series("b70f", "b", kernel="B70f"), series("b31f", "b", kernel="B31f", thickness=3.0)),
            *(
                series("odd", "c", kernel="XYZ"),
                series("fc51", "c", kernel="FC51"),
                series("segmented", "d", Modality="SEG"),
            ),
            series("derived", "e", analysis_result_id="someone's"),
        ]
    )
    assert list(idc.chest_series(table)["SeriesInstanceUID"]) == ["soft, more", "b31f", "odd"]


def test_the_shipped_index_has_the_licences_and_readers_that_the_pages_tell_of(shipped):
    scans = shipped[shipped["Modality"] == "CT"]
    assert scans["PatientID"].nunique() == 1010 and set(scans["license_short_name"]) == {"CC BY 3.0"}
    assert round(scans["series_size_MB"].sum() / 1e3 / 1010, 2) == worlds.GIGABYTES_OF_A_PATIENT
    drawn = shipped[(shipped["analysis_result_id"] == idc.NODULES["lidc_idri"]) & (shipped["Modality"] == "SEG")]
    assert drawn["SeriesDescription"].str.extract(idc.NODULE)[0].notna().all()
    assert drawn["StudyInstanceUID"].isin(scans["StudyInstanceUID"]).all() and len(drawn) == 6859


def test_the_plan_tells_licence_attribution_size_and_labels_and_fetches_nothing(served, tmp_path):
    said = CliRunner().invoke(cli.app, ["download", str(tmp_path / "to"), "--source", "idc", "--dry-run"])
    assert said.exit_code == 0, said.output
    for part in ("CC BY 3.0. Armato III", "Fedorov, A., Hancock", "3 scans of 3 patients", "Lung nodule 1 of 2"):
        assert part in said.output
    assert not served.sent and not list((tmp_path / "to").rglob("*.dcm"))


def test_what_is_fetched_is_a_cohort_whose_nodules_the_localisation_measure_knows(served, world, tmp_path):
    said = CliRunner().invoke(cli.app, ["download", str(tmp_path / "to"), "--source", "idc"])
    assert said.exit_code == 0, said.output
    table = load_manifest(tmp_path / "to" / "manifest.csv").set_index("study", drop=False)
    assert dict(table["Lung nodule"].dropna()) == {"LIDC-IDRI-0001": 1, "LIDC-IDRI-0028": 0}
    assert table["Cardiomegaly"].isna().all() and set(table["licence"]) == {"CC BY 3.0"}
    assert "CC BY 3.0" in (tmp_path / "to" / "LICENCES.txt").read_text()
    row, phantom = table.loc["LIDC-IDRI-0001"].to_dict(), world[2]["LIDC-IDRI-0001"]
    volume = volume_from_row(row)
    np.testing.assert_allclose(volume.hu, phantom.volume.hu, atol=0.51)
    # two of four drew all of it, which is half of them
    np.testing.assert_array_equal(nodule_mask(row["masks"], volume), phantom.masks["Lung nodule"])
    config = PreprocessConfig(tuple(volume.spacing), (64, 40, 40))
    regions = find_regions([row], config, (8, 5, 5), progress=False)
    assert regions.shares.max() > 0
    healthy = table.loc["LIDC-IDRI-0028"].to_dict()
    everyone = find_regions([healthy, table.loc["LIDC-IDRI-0022"].to_dict(), row], config, (8, 5, 5), progress=False)
    assert list(everyone.study) == [2]  # what one reader drew is no nodule
    with pytest.raises(ValueError, match="LIDC-IDRI-0001 is a real scan: only phantoms know"):
        find_regions([row | {"masks": ""}], config, (8, 5, 5), progress=False)

    # run again, it fetches what is missing only; what can't be had is told, and the rest is a manifest
    gone = sorted(Path(row["path"]).glob("*.dcm"))[3]
    gone.unlink()
    served.sent.clear()
    fetch(idc.plan_idc(tmp_path / "to"))
    assert gone.is_file() and sum(n for name, n in served.sent.items() if name.endswith(".dcm")) == 1
    gone.unlink()
    served.answer.missing.add(gone.name)
    path, failures = fetch(idc.plan_idc(tmp_path / "to"))
    assert list(failures) == ["LIDC-IDRI-0001"] and "63 of 64 files" in failures["LIDC-IDRI-0001"]
    assert set(load_manifest(path)["patient"]) == set(PATIENTS) - {"LIDC-IDRI-0001"}


def test_what_does_not_fit_what_is_not_there_and_no_network_are_refused_first(served, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no collection 'lidc-idri'; perhaps lidc_idri"):
        idc.plan_idc(tmp_path, "lidc-idri")
    with pytest.raises(ValueError, match="4 patients were asked for; there are 3"):
        idc.plan_idc(tmp_path, patients=4)
    full = namedtuple("Usage", "total used free")(2, 1, 10**9)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(OSError, match="no room in .* to fetch and 1 GB to spare, but 1 GB free"):
            idc.plan_idc(tmp_path / "small")
    shutil.rmtree(tmp_path / "share")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="no table of CT series from https://github.com/ImagingDataCommons"):
        idc.plan_idc(tmp_path)


def test_one_scan_of_full_resolution_is_fetched_once(served, world, monkeypatch, capsys):
    volume = medctkit.sample_ct("idc")
    assert volume.shape == world[2]["LIDC-IDRI-0001"].volume.shape
    assert volume.provenance[-1].startswith("CC BY 3.0. Armato") and "CC BY 3.0. Armato" in capsys.readouterr().out
    monkeypatch.delattr(idc, "_client")  # which takes GB and seconds
    assert medctkit.sample_ct("idc").provenance == volume.provenance
