"""Preparing a cohort: the same bytes however many workers, nothing lost, nothing done twice, failures told."""

import errno
import os
import shutil
import signal
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from scan_files import MINI, SPACING, chest, write_dicom, write_nifti

from medctkit.cohort import prepare as preparing
from medctkit.cohort.cache import VolumeCache, digest_of, key_of
from medctkit.cohort.manifest import load_manifest
from medctkit.cohort.open_data import manifest_row
from medctkit.cohort.prepare import prepare, write_failures
from medctkit.findings import FINDINGS
from medctkit.scans.preprocessing import PreprocessConfig

SMALL = PreprocessConfig((30.0, 20.0, 20.0), (12, 18, 18), antialias=True)
MANIFEST = Path(__file__).resolve().parents[2] / "data_manifest.csv"


@pytest.fixture(scope="module")
def phantoms():
    return load_manifest(MANIFEST).tail(12).to_dict("records")


def real_row(study, path, **more):
    return manifest_row(study, study, "train", "here", dict.fromkeys(FINDINGS, 0), path=str(path)) | more


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


@pytest.fixture
def on_cores(monkeypatch):
    """Workers in this process, which see what a test puts into the place of their task."""
    monkeypatch.setattr(preparing, "worker_pool", lambda n, *_: ThreadPoolExecutor(n))


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one_and_of_a_cluster(phantoms, cluster, tmp_path, capsys):
    rows, threads = phantoms[:6], torch.get_num_threads()
    one = prepare(rows, MINI, tmp_path / "one", workers=1)
    assert torch.get_num_threads() == threads and "preparing 6 of 6 volumes on one core" in capsys.readouterr().out
    two = prepare(rows, MINI, tmp_path / "two", workers=2)
    many = prepare(rows, MINI, tmp_path / "many", scheduler=cluster.scheduler_address)
    assert one.made == two.made == many.made == len(rows) and not one.failures and not two.failures
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "many")
    assert one.bytes == two.bytes == sum(map(len, files(tmp_path / "one").values()))
    assert one.contents == two.contents == {row["study"]: row["checksum"] for row in rows}


def test_a_scheduler_needs_dask(phantoms, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    said = r"needs distributed, which is not installed: pip install 'medctkit\[cluster\]'$"
    with pytest.raises(ImportError, match=said):
        prepare(phantoms[:2], SMALL, tmp_path, scheduler="tcp://127.0.0.1:9")


@pytest.mark.parametrize("told", ["plain", "as damage"])
def test_a_full_disk_ends_the_run_and_names_both_disks(phantoms, tmp_path, monkeypatch, told):
    def full(*_):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/part")
        except OSError as error:
            raise error if told == "plain" else ValueError("the file is damaged; get it again") from None

    monkeypatch.setattr(preparing, "prepare_row", full)
    with pytest.raises(OSError, match=r"no room left .*/tmp/part.*TMPDIR.* make room and start again") as caught:
        prepare(phantoms[:2], SMALL, tmp_path, workers=1)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("error", [MemoryError("56 GB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_who_finds_too_little_memory_is_tried_again_alone(phantoms, tmp_path, monkeypatch, on_cores, error):
    tried = Counter()

    def greedy(row, *rest):
        tried[row["study"]] += 1
        if row["study"] == phantoms[0]["study"] or tried[row["study"]] == 1 and row["study"] == phantoms[1]["study"]:
            try:
                raise error
            except Exception:
                raise ValueError("the file is truncated or damaged") from None
        return original(row, *rest)

    original = preparing.prepare_row
    monkeypatch.setattr(preparing, "prepare_row", greedy)
    done = prepare(phantoms[:4], SMALL, tmp_path, workers=2)
    (failure,) = done.failures
    assert failure["study"] == phantoms[0]["study"] and failure["error"] == "MemoryError"
    assert "too little memory" in failure["message"] and "fewer workers" in failure["message"]
    assert list(tried.values()) == [2, 2, 1, 1] and done.made == 3


def test_stopping_and_starting_again_does_only_what_is_missing(phantoms, tmp_path, capsys):
    assert prepare(phantoms[:4], SMALL, tmp_path, workers=1).made == 4
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    again = prepare(phantoms[:7], SMALL, tmp_path, workers=1)
    assert (again.made, len(again.contents)) == (3, 7)
    assert "preparing 3 of 7 volumes on" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    third = prepare(phantoms[:7], SMALL, tmp_path, scheduler="nobody is asked")
    assert third.made == 0 and third.contents == again.contents and not capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("on", ["cores", "cluster"])
def test_a_volume_that_kills_its_worker_is_recorded(phantoms, cluster, tmp_path, monkeypatch, on):
    deadly = real_row("deadly", write_nifti(tmp_path / "scan.nii", chest()))
    monkeypatch.setattr(preparing, "_task_of_a_worker", _dies_on_deadly)
    if on == "cluster":  # those that wait at a worker that dies are suspects too, so the others are prepared before
        prepare(phantoms[:2], SMALL, tmp_path / "cache", workers=1)
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 1)  # of 3, to be quick
    how = {"scheduler": cluster.scheduler_address} if on == "cluster" else {"workers": 2}
    done = prepare([deadly, *phantoms[:2]], SMALL, tmp_path / "cache", **how)
    assert set(done.contents) == {row["study"] for row in phantoms[:2]}
    (failure,) = done.failures
    assert failure["study"] == "deadly" and failure["error"] in ("KilledWorker", "BrokenProcessPool")
    assert "its worker process died each time it was tried, as a rule for want of memory" in failure["message"]


_task = preparing._task_of_a_worker


def _dies_on_deadly(row, config, cache):
    if row["study"] == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return _task(row, config, cache)


def test_a_bad_volume_is_recorded_and_the_rest_goes_on(phantoms, tmp_path):
    good = real_row("good", write_nifti(tmp_path / "good.nii.gz", chest()))
    twice = real_row("twice", write_nifti(tmp_path / "twice.nii.gz", chest()), rescale_intercept=-8192.0)
    lost = real_row("lost", tmp_path / "lost.nii.gz")
    torn = real_row("torn", write_nifti(tmp_path / "torn.nii.gz", chest()))
    content = (tmp_path / "torn.nii.gz").read_bytes()
    (tmp_path / "torn.nii.gz").write_bytes(content[: len(content) // 2])
    rows = [twice, lost, good, torn, phantoms[0]]
    done = prepare(rows, SMALL, tmp_path / "cache", workers=1)
    assert set(done.contents) == {"good", phantoms[0]["study"]} and done.made == 2 and done.left == 0
    failures = {failure["study"]: failure for failure in done.failures}
    assert set(failures) == {"twice", "lost", "torn"}
    assert "rescale" in failures["twice"]["message"] and failures["twice"]["path"] == twice["path"]
    assert failures["lost"]["error"] == "FileNotFoundError" and "there is no such file" in failures["lost"]["message"]
    assert "truncated or damaged" in failures["torn"]["message"]
    assert not list((tmp_path / "cache").glob(".*.tmp")) and len(files(tmp_path / "cache")) == 2


def test_folders_and_zips_of_dicom_are_volumes_too(tmp_path):
    folder = write_dicom(tmp_path / "series", chest())
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"series/{file.name}")
    rows = [real_row("folder", folder), real_row("zip", tmp_path / "series.zip"), real_row("nifti", tmp_path / "a.nii")]
    write_nifti(tmp_path / "a.nii", chest(), np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1]))
    done = prepare(rows, SMALL, tmp_path / "cache", workers=1)
    assert set(done.contents) == {"folder", "zip", "nifti"} and done.contents["folder"] == digest_of(folder)
    cache = VolumeCache(tmp_path / "cache")
    volumes = [cache.load(key_of(row, done.contents[row["study"]], SMALL)) for row in rows]
    assert torch.equal(volumes[0], volumes[1]) and torch.equal(volumes[0], volumes[2])
    assert prepare(rows, SMALL, tmp_path / "cache", scheduler="nobody is asked").made == 0


def test_a_disk_without_room_is_seen_before_anything_starts(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1_000_000))
    with pytest.raises(OSError, match=r"preparing 12 volumes takes about 1.9 GB, .* has 0.0 GB free; make room"):
        prepare(phantoms, PreprocessConfig(shape=(240, 720, 640)), tmp_path, scheduler="nobody is asked")


def test_damaged_files_are_noticed_and_made_again(phantoms, tmp_path):
    rows = phantoms[:3]
    prepare(rows, SMALL, tmp_path, workers=1)
    whole = files(tmp_path)
    first, second, _ = sorted(tmp_path.glob("*.safetensors"))
    first.write_bytes(whole[first.name][:-10])
    assert prepare(rows, SMALL, tmp_path, workers=1).made == 1
    assert files(tmp_path) == whole
    second.write_bytes(whole[second.name][:-1] + bytes([whole[second.name][-1] ^ 8]))
    assert prepare(rows, SMALL, tmp_path, workers=1, verify=True).made == 1
    assert files(tmp_path) == whole


def test_a_file_without_checksum_is_hashed_once(tmp_path, monkeypatch):
    path, cache = write_nifti(tmp_path / "scan.nii.gz", chest()), tmp_path / "cache"
    row = real_row("s", path)
    assert prepare([row], SMALL, cache, workers=1).contents == {"s": digest_of(path)}
    for broken in (f"/x/y.nii.gz,12x,17,{'0' * 64}\n", '"\n', "\0\xff,", "/a/line/that,was cu"):
        with (cache / "contents.csv").open("a") as file:
            file.write(broken)
    assert prepare([row], SMALL, cache, scheduler="nobody is asked").contents == {"s": digest_of(path)}
    moved = tmp_path / "elsewhere.nii.gz"
    shutil.copy(path, moved)
    done = prepare([real_row("s", moved)], SMALL, cache, workers=1)
    assert done.made == done.bytes == 0 and len(files(cache)) == 1, "the same content was prepared again"
    write_nifti(path, chest() + 1)
    assert prepare([row], SMALL, cache, workers=1).bytes > 0 and len(files(cache)) == 2
    other = real_row("s", path, orientation="canonical")
    assert prepare([other], SMALL, cache, workers=1).bytes > 0 and len(files(cache)) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf_8(tmp_path):
    path = write_nifti(tmp_path / os.fsdecode(b"M\xfcller.nii.gz"), chest())
    rows = [real_row("s", path), real_row("t", tmp_path / os.fsdecode(b"\xfc.nii"))]
    done = prepare(rows, SMALL, tmp_path / "cache", workers=1)
    assert prepare(rows[:1], SMALL, tmp_path / "cache", scheduler="nobody is asked").contents == done.contents
    write_failures(done.failures, tmp_path / "failures.csv")
    assert "\\udcfc.nii: there is no such file" in (tmp_path / "failures.csv").read_text()


def test_a_folder_whose_slices_were_replaced_is_read_again(tmp_path):
    folder, cache = write_dicom(tmp_path / "series", chest()), tmp_path / "cache"
    before = {file: file.stat() for file in folder.iterdir()}
    first = prepare([real_row("s", folder)], SMALL, cache, workers=1).contents
    for file, was in before.items():
        content = file.read_bytes()
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))  # as rsync and unzip do
        assert file.stat().st_size == was.st_size
    assert prepare([real_row("s", folder)], SMALL, cache, workers=1).contents == {"s": digest_of(folder)} != first


def test_a_file_that_is_not_the_one_of_the_manifest_is_refused(tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz", chest())
    row = real_row("s", path, checksum=digest_of(path))
    assert prepare([row], SMALL, tmp_path / "a", workers=1).contents
    write_nifti(path, np.flip(chest(), 0))
    done = prepare([row], SMALL, tmp_path / "b", workers=1)
    assert "is not the file whose checksum the manifest gives for s" in done.failures[0]["message"]
    # what was prepared from the right file needs the file no more
    path.unlink()
    assert prepare([row], SMALL, tmp_path / "a", scheduler="nobody is asked").contents


def test_a_scheduler_that_does_not_answer(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "PATIENCE", "1s")
    with pytest.raises(ConnectionError, match=r"no dask scheduler answers at tcp://127.0.0.1:9 .*`dask scheduler`"):
        prepare(phantoms[:1], SMALL, tmp_path, scheduler="tcp://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="no dask scheduler answers at ftp://nowhere"):
        prepare(phantoms[:1], SMALL, tmp_path, scheduler="ftp://nowhere")
    with pytest.raises(ValueError, match="workers is for this machine; the scheduler has workers of its own"):
        prepare(phantoms[:1], SMALL, tmp_path, scheduler="tcp://127.0.0.1:9", workers=2)
