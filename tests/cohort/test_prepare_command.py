"""`medctkit prepare`: from CT-RATE's folder or a manifest to prepared volumes, failures told, nothing half written."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from ct_rate_imitation import write_ct_rate
from hub_imitation import HubImitation
from scan_files import MINI, chest, write_nifti
from typer.testing import CliRunner

from medctkit import cli
from medctkit.cohort import prepare as preparing
from medctkit.cohort.ct_rate import TABLES, volume_path
from medctkit.cohort.dataset import CTReportDataset
from medctkit.cohort.download import CT_RATE, download, plan_ct_rate
from medctkit.cohort.manifest import load_manifest, write_manifest
from medctkit.cohort.open_data import manifest_row

MANIFEST = Path(__file__).resolve().parents[2] / "data_manifest.csv"


def run(*arguments):
    return CliRunner().invoke(cli.app, ["prepare", *map(str, arguments)])


@pytest.fixture(scope="module")
def ct_rate(tmp_path_factory):
    root = tmp_path_factory.mktemp("ct-rate")
    write_ct_rate(root)
    return root


def own_manifest(folder, **columns):
    """A hospital's own two scans, one file each."""
    rows = [manifest_row(f"s{i}", f"p{i}", ("train", "test")[i - 1], "St. Elsewhere", {}) for i in (1, 2)]
    write_nifti(folder / "one.nii", chest())
    write_nifti(folder / "two.nii", chest() + 3)
    pd.DataFrame(rows).assign(path=["one.nii", "two.nii"], **columns).to_csv(folder / "own.csv", index=False)
    return folder / "own.csv"


def test_ct_rate_becomes_a_prepared_cohort_from_either_version(ct_rate, tmp_path):
    """Both versions of one volume, each read its own way, end in the same model input."""
    prepared = {}
    for version in (1, 2):
        out = tmp_path / str(version)
        result = run(ct_rate, out, "--model", "mini", "--version", version, "--workers", 1)
        assert result.exit_code == 0, result.output
        assert "dropped: not a chest" in result.output and "no patient is in two splits" in result.output
        manifest = load_manifest(out / "manifest.csv")
        dataset = CTReportDataset(manifest, MINI, out / "prepared")
        prepared[version] = {
            item["study"]: item["pixel_values"] for item in map(dataset.__getitem__, range(len(dataset)))
        }
        assert manifest["checksum"].str.fullmatch("[0-9a-f]{64}").all() and not (out / "failures.csv").exists()
        assert set(manifest["split"]) <= {"train", "valid", "test"}
        assert (manifest["split"] == "test").equals(manifest["patient"].str.startswith("valid_"))
    assert set(prepared[1]) == set(prepared[2]) and len(prepared[1]) == 7
    for study, pixels in prepared[1].items():
        assert (pixels - prepared[2][study]).abs().max() <= 2e-4


@pytest.mark.slow
def test_from_the_hub_to_a_prepared_cohort(ct_rate, tmp_path, cluster, monkeypatch):
    with HubImitation() as server:
        server.add(CT_RATE, ct_rate)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        plan, chosen = plan_ct_rate(tmp_path / "data", split="valid")
        assert not download(plan).failures
    result = run(tmp_path / "data", tmp_path / "out", "--model", "mini", "--scheduler", cluster.scheduler_address)
    assert result.exit_code == 0 and "3 of 3 volumes are prepared" in result.output, result.output
    manifest = load_manifest(tmp_path / "out" / "manifest.csv")
    assert set(manifest["patient"]) == set(chosen.patients) and set(manifest["split"]) == {"test"}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_where_it_was(tmp_path, how):
    table = load_manifest(MANIFEST).head(16)
    write_manifest(table, tmp_path / "phantoms.csv")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "medctkit.cli", "prepare", tmp_path / "phantoms.csv", out, "--model", "mini"]
    killed = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = []
    while len(list((out / "prepared").glob("*.safetensors"))) < 1 and killed.poll() is None:
        time.sleep(0.02)
        children = psutil.Process(killed.pid).children(recursive=True) or children
    killed.send_signal(how)
    assert killed.wait() == (130 if how == signal.SIGTERM else -how)
    psutil.wait_procs(children, timeout=30)
    assert not [child for child in children if child.is_running()], "workers outlive the run that started them"
    there = {path: path.stat().st_mtime_ns for path in (out / "prepared").glob("*.safetensors")}
    assert 1 <= len(there) < 16 and not (out / "manifest.csv").exists()
    again = run(tmp_path / "phantoms.csv", out, "--model", "mini", "--workers", 1)
    assert f"16 of 16 volumes are prepared, {16 - len(there)} of them now" in again.output, again.output
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in there.items())
    assert load_manifest(out / "manifest.csv")["study"].tolist() == table["study"].tolist()


def test_a_bad_volume_is_listed_and_the_exit_code_says_so(tmp_path):
    manifest = own_manifest(tmp_path, rescale_intercept=["", -1024])
    out = tmp_path / "out"
    result = run(manifest, out, "--model", "mini", "--workers", 1)
    assert result.exit_code == 1
    assert "1 of 2 volumes are prepared" in result.output and "1 failed or were left out, listed in" in result.output
    failures = pd.read_csv(out / "failures.csv")
    assert failures["study"].tolist() == ["s2"] and "rescale" in failures["message"][0]
    assert load_manifest(out / "manifest.csv")["study"].tolist() == ["s1"]
    own_manifest(tmp_path)  # mended
    result = run(manifest, out, "--model", "mini", "--workers", 1)
    assert result.exit_code == 0 and "2 of 2 volumes are prepared, 1 of them now" in result.output
    assert not (out / "failures.csv").exists()


def test_bad_rows_and_equal_volumes_are_left_out_and_listed(ct_rate, tmp_path):
    root, out = tmp_path / "ct-rate", tmp_path / "out"
    shutil.copytree(ct_rate, root)
    metadata = root / TABLES["train"]["metadata"]
    metadata.write_text(metadata.read_text().replace("[7.5, 7.5]", "[7.5]", 1))  # of train_1_a_1
    shutil.copy(*(root / volume_path(name, 1) for name in ("valid_1_a_2", "train_2_a_1")))
    result = run(root, out, "--model", "mini", "--version", 1, "--valid-share", 0, "--workers", 1)
    assert result.exit_code == 1 and "2 failed or were left out, listed in" in result.output, result.output
    failures = pd.read_csv(out / "failures.csv").set_index("study")["message"]
    assert "XYSpacing" in failures["train_1_a_1"] and "equal to valid_1_a_2" in failures["train_2_a_1"]
    kept = load_manifest(out / "manifest.csv")["study"].tolist()
    assert kept == ["train_1_a_2", "train_1_b_1", "valid_1_a_1", "valid_1_a_2", "valid_2_a_1"]
    again = run(root, out, "--model", "mini", "--version", 1, "--valid-share", 0, "--workers", 1)
    assert "0 of them now" in again.output and load_manifest(out / "manifest.csv")["study"].tolist() == kept


def test_where_everything_fails_the_rest_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "HOPELESS", 1)
    manifest = own_manifest(tmp_path, rescale_intercept=-8192)
    result = run(manifest, tmp_path / "out", "--model", "mini", "--workers", 1)
    assert result.exit_code == 1 and "As nothing else came through, 1 were not tried." in result.output
    assert not (tmp_path / "out" / "manifest.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv", "out"], "no manifest at nowhere.csv"),
        (["{manifest}", "out", "--version", "1"], "--version and --one-reconstruction are for CT-RATE's folder"),
        (["{manifest}", "out", "--model", "huge"], "huge: expected mini, colipri, released, or a folder"),
        (["{manifest}", "out", "--scheduler", "ftp://x"], "no dask scheduler answers at ftp://x"),
        (["{manifest}", "out", "--scheduler", "tcp://127.0.0.1:9", "--workers", "2"], "workers of its own"),
        (["{folder}", "out"], "CT-RATE|dataset"),
    ],
    ids=["no manifest", "version of a manifest", "unknown model", "no scheduler", "two kinds of workers", "no CT-RATE"],
)
def test_wrong_calls_say_what_to_do(tmp_path, monkeypatch, arguments, message):
    manifest = own_manifest(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = run(*(a.format(manifest=manifest, folder=tmp_path) for a in arguments))
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert any(part in result.output for part in message.split("|")), result.output


def test_stopping_by_keyboard_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*rest, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "prepare", interrupted)
    result = run(own_manifest(tmp_path), tmp_path / "out", "--model", "mini")
    assert result.exit_code == 130 and "the same command goes on from here" in result.output
