"""Preparing a cohort: the same bytes however many workers, nothing lost, nothing done twice, failures told."""

import errno
import os
import shutil
import signal
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scan_files import SPACING, chest, write_dicom, write_nifti

from medctkit.cohort import prepare as preparing
from medctkit.cohort.cache import VolumeCache, content_of, digest_of, key_of
from medctkit.cohort.manifest import load_manifest
from medctkit.cohort.prepare import prepare
from medctkit.findings import FINDINGS
from medctkit.scans.preprocessing import PreprocessConfig

MINI = PreprocessConfig((11.25, 5.625, 5.625), (32, 64, 64), antialias=True)
SMALL = PreprocessConfig((30.0, 20.0, 20.0), (12, 18, 18), antialias=True)
MANIFEST = Path(__file__).resolve().parents[2] / "data_manifest.csv"


@pytest.fixture(scope="module")
def phantoms():
    return load_manifest(MANIFEST).tail(12).to_dict("records")


def real_row(study, path, **more):
    labels = dict.fromkeys(FINDINGS, 0)
    names = dict(study=study, patient=study, split="train", hospital="here", report="A report.", checksum="")
    return {**names, "scan": "a", "reconstruction": 1, **labels, "path": str(path), **more}


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


@pytest.fixture
def no_dask(monkeypatch):
    monkeypatch.setattr(preparing, "find_spec", lambda _: None)


def test_two_workers_give_the_bytes_of_one_and_of_none(phantoms, cluster, tmp_path, request, capsys):
    rows = phantoms[:6]
    one = prepare(rows, MINI, tmp_path / "one", workers=1)
    two = prepare(rows, MINI, tmp_path / "two", scheduler=cluster.scheduler_address)
    request.getfixturevalue("no_dask")
    threads = torch.get_num_threads()
    none = prepare(rows, MINI, tmp_path / "none")
    assert "on this process (on all cores with `pip install 'medctkit[cluster]'`)" in capsys.readouterr().out
    assert torch.get_num_threads() == threads
    assert one.made == two.made == none.made == len(rows) and not one.failures and not two.failures
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "none")
    assert one.bytes == two.bytes == sum(map(len, files(tmp_path / "one").values()))
    assert one.contents == {row["study"]: row["checksum"] for row in rows}


def test_without_dask_one_process_prepares_and_more_say_how_to_get_it(phantoms, no_dask, tmp_path, monkeypatch):
    for several in ({"scheduler": "tcp://127.0.0.1:9"}, {"workers": 2}):
        with pytest.raises(ImportError, match=r"need dask, which is not installed: pip install 'medctkit\[cluster\]'$"):
            prepare(phantoms[:2], SMALL, tmp_path, **several)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    lost = real_row("lost", tmp_path / "lost.nii.gz")
    done = prepare([lost, phantoms[0]], SMALL, tmp_path, workers=1)
    assert [failure["study"] for failure in done.failures] == ["lost"] and done.made == 1
    monkeypatch.setattr(preparing, "prepare_row", full)
    with pytest.raises(OSError, match="no room left in .*No space left on device.* make room and start again"):
        prepare(phantoms[:2], SMALL, tmp_path)


def test_stopping_and_starting_again_does_only_what_is_missing(phantoms, cluster, tmp_path, capsys):
    address = cluster.scheduler_address
    assert prepare(phantoms[:4], SMALL, tmp_path, scheduler=address).made == 4
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    again = prepare(phantoms[:7], SMALL, tmp_path, scheduler=address)
    assert (again.made, len(again.contents)) == (3, 7)
    assert "preparing 3 of 7 volumes on" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    third = prepare(phantoms[:7], SMALL, tmp_path, scheduler="nobody is asked")
    assert third.made == 0 and third.contents == again.contents and not capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(phantoms, tmp_path):
    from distributed import Client, LocalCluster

    found = {}
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs="CRITICAL",
        ) as own,
        Client(own) as client,
    ):
        run = threading.Thread(
            target=lambda: found.update(done=prepare(phantoms, MINI, tmp_path, scheduler=own.scheduler_address))
        )
        run.start()
        while not files(tmp_path):
            time.sleep(0.01)
        victim = next(iter(client.run(os.getpid).values()))
        os.kill(victim, signal.SIGKILL)
        run.join()
        assert victim not in client.run(os.getpid).values()
    done = found["done"]
    assert len(done.contents) == len(phantoms) and not done.failures
    cache = VolumeCache(tmp_path)
    assert all(cache.load(key_of(row, content_of(row), MINI)) is not None for row in phantoms)
    assert len(files(tmp_path)) == len(phantoms)


@pytest.mark.slow
def test_a_volume_that_kills_its_worker_is_recorded(phantoms, cluster, tmp_path, monkeypatch):
    deadly = real_row("deadly", write_nifti(tmp_path / "scan.nii", chest()))
    # those that wait at a worker that dies are suspects too, so the others are prepared before
    prepare(phantoms[:2], SMALL, tmp_path / "cache", scheduler=cluster.scheduler_address)
    monkeypatch.setattr(preparing, "_task_of_a_worker", _dies_on_deadly)
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 1)  # of 3, to be quick
    done = prepare([*phantoms[:2], deadly], SMALL, tmp_path / "cache", scheduler=cluster.scheduler_address)
    assert set(done.contents) == {row["study"] for row in phantoms[:2]}
    (failure,) = done.failures
    assert failure["study"] == "deadly" and failure["error"] == "KilledWorker"
    assert "its worker process died each time it was tried, as a rule for want of memory" in failure["message"]


_task = preparing._task_of_a_worker


def _dies_on_deadly(row, config, cache):
    if row["study"] == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return _task(row, config, cache)


def test_a_bad_volume_is_recorded_and_the_rest_goes_on(phantoms, cluster, tmp_path):
    good = real_row("good", write_nifti(tmp_path / "good.nii.gz", chest()))
    twice = real_row("twice", write_nifti(tmp_path / "twice.nii.gz", chest()), rescale_intercept=-8192.0)
    lost = real_row("lost", tmp_path / "lost.nii.gz")
    torn = real_row("torn", write_nifti(tmp_path / "torn.nii.gz", chest()))
    content = (tmp_path / "torn.nii.gz").read_bytes()
    (tmp_path / "torn.nii.gz").write_bytes(content[: len(content) // 2])
    rows = [twice, lost, good, torn, phantoms[0]]
    done = prepare(rows, SMALL, tmp_path / "cache", scheduler=cluster.scheduler_address)
    assert set(done.contents) == {"good", phantoms[0]["study"]} and done.made == 2 and done.left == 0
    failures = {failure["study"]: failure for failure in done.failures}
    assert set(failures) == {"twice", "lost", "torn"}
    assert "rescale" in failures["twice"]["message"] and failures["twice"]["path"] == twice["path"]
    assert failures["lost"]["error"] == "FileNotFoundError" and "there is no such file" in failures["lost"]["message"]
    assert "truncated or damaged" in failures["torn"]["message"]
    assert not list((tmp_path / "cache").glob(".*.tmp")) and len(files(tmp_path / "cache")) == 2


def test_folders_and_zips_of_dicom_are_volumes_too(cluster, tmp_path):
    folder = write_dicom(tmp_path / "series", chest())
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"series/{file.name}")
    rows = [real_row("folder", folder), real_row("zip", tmp_path / "series.zip"), real_row("nifti", tmp_path / "a.nii")]
    write_nifti(tmp_path / "a.nii", chest(), np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1]))
    done = prepare(rows, SMALL, tmp_path / "cache", scheduler=cluster.scheduler_address)
    assert set(done.contents) == {"folder", "zip", "nifti"} and done.contents["folder"] == digest_of(folder)
    cache = VolumeCache(tmp_path / "cache")
    volumes = [cache.load(key_of(row, done.contents[row["study"]], SMALL)) for row in rows]
    assert torch.equal(volumes[0], volumes[1]) and torch.equal(volumes[0], volumes[2])
    assert prepare(rows, SMALL, tmp_path / "cache", scheduler="nobody is asked").made == 0


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_no_half_file(phantoms, cluster, tmp_path):
    from distributed import Client

    def limit(size):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if size else hard, hard))

    assert prepare(phantoms[:2], SMALL, tmp_path, scheduler=cluster.scheduler_address).made == 2
    before = files(tmp_path)
    with Client(cluster) as client:
        client.run(limit, min(map(len, before.values())) // 2)  # the system itself refuses to write more
        try:
            with pytest.raises(OSError, match="no room left in .* What is prepared is whole; make room") as caught:
                prepare(phantoms[:6], SMALL, tmp_path, scheduler=cluster.scheduler_address)
            assert files(tmp_path) == before
        finally:
            client.run(limit, 0)
    assert caught.value.errno == errno.EFBIG
    assert len(prepare(phantoms[:6], SMALL, tmp_path, scheduler=cluster.scheduler_address).contents) == 6
    assert len(files(tmp_path)) == 6 and not list(tmp_path.glob(".*.tmp"))


def test_a_disk_without_room_is_seen_before_anything_starts(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1_000_000))
    with pytest.raises(OSError, match=r"preparing 12 volumes takes about 1.9 GB, .* has 0.0 GB free; make room"):
        prepare(phantoms, PreprocessConfig(shape=(240, 720, 640)), tmp_path, scheduler="nobody is asked")


def test_damaged_files_are_noticed_and_made_again(phantoms, cluster, tmp_path):
    rows, address = phantoms[:3], cluster.scheduler_address
    prepare(rows, SMALL, tmp_path, scheduler=address)
    whole = files(tmp_path)
    first, second, _ = sorted(tmp_path.glob("*.safetensors"))
    first.write_bytes(whole[first.name][:-10])
    assert prepare(rows, SMALL, tmp_path, scheduler=address).made == 1
    assert files(tmp_path) == whole
    second.write_bytes(whole[second.name][:-1] + bytes([whole[second.name][-1] ^ 8]))
    assert prepare(rows, SMALL, tmp_path, scheduler=address, verify=True).made == 1
    assert files(tmp_path) == whole


def test_a_file_without_checksum_is_hashed_once(cluster, tmp_path, monkeypatch):
    path, cache = write_nifti(tmp_path / "scan.nii.gz", chest()), tmp_path / "cache"
    row, address = real_row("s", path), cluster.scheduler_address
    assert prepare([row], SMALL, cache, scheduler=address).contents == {"s": digest_of(path)}
    with (cache / "contents.csv").open("a") as file:
        file.write("/a/line/that,was cu")
    assert prepare([row], SMALL, cache, scheduler="nobody is asked").contents == {"s": digest_of(path)}
    moved = tmp_path / "elsewhere.nii.gz"
    shutil.copy(path, moved)
    done = prepare([real_row("s", moved)], SMALL, cache, scheduler=address)
    assert done.made == done.bytes == 0 and len(files(cache)) == 1, "the same content was prepared again"
    write_nifti(path, chest() + 1)
    assert prepare([row], SMALL, cache, scheduler=address).bytes > 0 and len(files(cache)) == 2
    other = real_row("s", path, orientation="canonical")
    assert prepare([other], SMALL, cache, scheduler=address).bytes > 0 and len(files(cache)) == 3


def test_a_file_that_is_not_the_one_of_the_manifest_is_refused(cluster, tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz", chest())
    row = real_row("s", path, checksum=digest_of(path))
    assert prepare([row], SMALL, tmp_path / "a", scheduler=cluster.scheduler_address).contents
    write_nifti(path, np.flip(chest(), 0))
    done = prepare([row], SMALL, tmp_path / "b", scheduler=cluster.scheduler_address)
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
    with pytest.raises(ValueError, match="workers is for the local cluster; the scheduler has workers of its own"):
        prepare(phantoms[:1], SMALL, tmp_path, scheduler="tcp://127.0.0.1:9", workers=2)


def test_the_local_cluster_listens_on_the_loopback_interface_only(phantoms, tmp_path, capsys):
    import psutil

    seen = []
    original = preparing._results

    def looking(client, *rest):
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        for process in processes:
            seen.extend(c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN)
        yield from original(client, *rest)

    preparing._results, kept = looking, original
    try:
        prepare(phantoms[:1], SMALL, tmp_path, workers=1)
    finally:
        preparing._results = kept
    assert seen and set(seen) == {"127.0.0.1"}
    assert "dashboard: http://127.0.0.1:" in capsys.readouterr().out
