"""The whole round by way of a PACS: not one HU and not one score differs. `make test-pacs` installs what it needs."""

import json

import numpy as np
import orthanc
import pytest
from dicom_peers import PATIENT, values_of, wait_until, write_phantom
from ports import free_port
from pydicom import dcmread

from medctkit.deploy.answer import write_answer
from medctkit.deploy.gateway import Gateway, Limits, Peer
from medctkit.model.base_model import load_base
from medctkit.quickstart import answer_study, classify
from medctkit.scans.volumes import read_volume

pytestmark = [
    pytest.mark.pacs,
    pytest.mark.slow,
    pytest.mark.skipif(bool(orthanc.missing()), reason=orthanc.missing()),
    pytest.mark.usefixtures("one_thread", "on_the_cpu"),
]
GATEWAY = free_port()


@pytest.fixture(scope="module")
def pacs(tmp_path_factory):
    peers = {"gateway": ["MEDCTKIT", "127.0.0.1", GATEWAY]}
    with orthanc.running(tmp_path_factory.mktemp("orthanc"), peers) as server:
        yield server


@pytest.fixture(scope="module")
def base():
    return load_base()


def of_modality(folder):
    return {made.Modality: made for made in map(dcmread, folder.glob("*.dcm"))}


def test_dicomweb_round(pacs, base, tmp_path):
    """Phantom, series, STOW, QIDO, WADO, classify, answer, STOW, WADO, read back."""
    volume, sent = write_phantom(tmp_path / "sent", PatientID="ROUND-1")
    pacs.stow(sorted(sent.glob("*.dcm")))
    (found,) = pacs.find("studies", PatientID="ROUND-1")
    study = found["0020000D"]["Value"][0]
    fetched = pacs.get(study, tmp_path / "fetched")
    there = read_volume(fetched)
    assert np.abs(there.hu - volume.hu).max() == 0.0
    assert np.abs(there.affine - volume.affine).max() < 1e-9  # mm: DICOM has 16 characters for a number
    scores = list(classify(volume, base).scores.values())
    pacs.stow(write_answer(answer_study(fetched, base), tmp_path / "answer"))
    back = pacs.get(study, tmp_path / "back")
    made = of_modality(back)
    assert set(made) == {"CT", "SR", "OT", "SEG"}
    difference = np.subtract(values_of(made["SR"], "FloatingPointValue"), scores)
    assert np.abs(difference).max() == 0.0
    assert made["SR"].PatientName == PATIENT["PatientName"]
    assert np.array_equal(read_volume(back).hu, volume.hu)  # with its answers beside it


def test_gateway_round(pacs, base, tmp_path):
    """Orthanc sends a series to the gateway, which sends report and picture back."""
    volume, sent = write_phantom(tmp_path / "sent", PatientID="ROUND-2")
    pacs.stow(sorted(sent.glob("*.dcm")))
    (found,) = pacs.find("series", PatientID="ROUND-2", Modality="CT")
    study, series = (found[tag]["Value"][0] for tag in ("0020000D", "0020000E"))
    gateway = Gateway(
        tmp_path / "queue", lambda path: answer_study(path, base, with_map=False),
        Peer("127.0.0.1", pacs.dicom, "ORTHANC"), ["ORTHANC"], limits=Limits(quiet=0.5, retry=1),
    )  # fmt: skip
    (here,) = json.loads(pacs.ask("/tools/lookup", series.encode())[1])
    with gateway.serving(GATEWAY):
        pacs.ask("/modalities/gateway/store", here["ID"].encode())
        wait_until(lambda: len(pacs.find("series", StudyInstanceUID=study)) == 3)
    made = of_modality(pacs.get(study, tmp_path / "back"))
    assert set(made) == {"CT", "SR", "OT"}
    difference = np.subtract(values_of(made["SR"], "FloatingPointValue"), list(classify(volume, base).scores.values()))
    assert np.abs(difference).max() == 0.0
    assert {str(item.PatientID) for item in made.values()} == {"ROUND-2"}
