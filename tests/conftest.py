"""Shared fixtures: real CT scans, which are not part of the repository, and the measuring programs of bench/."""

import importlib
import os
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no fault of the code: how long an example takes is measured by the benchmarks.
settings.register_profile("kit", deadline=None)
settings.load_profile("kit")

BENCH = Path(__file__).resolve().parents[1] / "bench"
REAL_SCANS = {
    "dicom": "cip_ct64/dicom",
    "nrrd": "cip_ct64/ct-64.nrrd",
    "nifti-contrast": "totalseg_aorta_cropped/ct_cropped.nii.gz",
    "nifti-abdomen": "totalseg_example/example_ct.nii.gz",
    "metaimage": "elastix_lung/3DCT_lung_baseline_small.mha",
}


@pytest.fixture(scope="session")
def real_ct():
    """Folder with the real scans; the test is skipped, with the reason, where there is none."""
    folder = os.environ.get("MEDCTKIT_REAL_CT")
    if not folder:
        pytest.skip("set MEDCTKIT_REAL_CT to a folder with the real CT scans to run this")
    if not Path(folder).is_dir():
        pytest.skip(f"MEDCTKIT_REAL_CT={folder}: there is no such folder")
    return Path(folder)


@pytest.fixture(scope="session", params=REAL_SCANS)
def real_scan(request, real_ct):
    """Path of one real scan after the other, one for each format and orientation."""
    return real_ct / REAL_SCANS[request.param]


@pytest.fixture(scope="session")
def cluster():
    """Two workers, as someone else's cluster would be; started once, because that takes seconds."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs="CRITICAL"
    ) as cluster:
        yield cluster


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Bit-for-bit claims are about the CPU, also where there is a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def one_thread():
    """Tensors of a toy model lose time to threads that wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench(monkeypatch):
    """Imports a measuring program."""
    monkeypatch.syspath_prepend(BENCH)
    before = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in BENCH.glob("*.py")} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def run_bench(bench, monkeypatch, capsys):
    """Runs a measuring program in this process: its exit code, and what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                code = bench(name).main() or 0
            except SystemExit as end:
                code = int(end.code)
        return code, capsys.readouterr().out

    return run
