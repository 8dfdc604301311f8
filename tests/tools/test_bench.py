"""The measuring programs run, write whole files, and say so when a bar is missed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import small_step

# at toy size more threads only wait for each other
pytestmark = pytest.mark.usefixtures("one_thread")
BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def own_accelerator():
    """Device and precision are fixed for a process; those of other tests are others."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("own_accelerator")
def test_memory_is_measured_without_a_gpu(tmp_path, bench, run_bench, monkeypatch):
    monkeypatch.setattr("transformers.logging.set_verbosity_error", lambda: None)  # it would stay
    code, said = run_bench("memory", "--tiny", "--output", tmp_path / "memory.json")
    assert code == 0 and "met    batch 8" in said
    assert [file.name for file in tmp_path.iterdir()] == ["memory.json"]
    found = json.loads((tmp_path / "memory.json").read_text())
    rows = {row["measures"]: row for row in found["bytes_of_a_step"]}
    assert list(rows) == list(bench("memory").MEASURES) and all(row["batch"] == 8 for row in rows.values())
    for row in rows.values():
        known = ("weights", "input_volumes", "gradients_and_optimiser_state", "activations_and_the_rest")
        assert row["peak"] == sum(row[name] for name in known) and row["activations_and_the_rest"] > 0
        assert row["input_volumes"] == 8 * 8 * 32 * 32 * 4
    assert rows["frozen weights in bf16"]["weights"] < rows["float32 weights"]["weights"]
    assert rows["checkpointing and bf16"]["peak"] < rows["frozen weights in bf16"]["peak"]
    assert found["made_with"]["model"] == "toy"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # its name in transformers < 5
def test_with_the_casts_of_a_gpu_a_step_without_data_takes_exactly_what_a_real_one_takes(bench):
    half = small_step(True, True, torch.bfloat16)
    with bench("memory").autocast_of_a_gpu():
        x = torch.ones(2, 3, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.layer_norm(x, (3,)).dtype == torch.linalg.vector_norm(x, dim=-1).dtype == torch.float32
        as_gpu = small_step(True, True, torch.bfloat16)
        assert small_step(False, True, torch.bfloat16) == as_gpu
    assert as_gpu[-1] > half[-1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.layer_norm(x, (3,)).dtype == torch.bfloat16  # as it was before


def test_what_the_repository_says_about_memory_is_within_the_bar_and_of_the_full_size_model():
    found = json.loads((BENCH / "memory.json").read_text())
    assert found["made_with"]["model"] == "full size"
    assert found["against_the_bar"]["bytes"] <= found["against_the_bar"]["bar"] == 8e9
    assert {(row["batch"], row["volumes_at_a_time"]) for row in found["bytes_of_a_step"]} >= {(1, 1), (8, 8), (32, 32)}


# What a machine with a GPU may lack; None in sys.modules refuses the import.
ABSENT = "monai nibabel SimpleITK pydicom blosc2 dask distributed bokeh ipywidgets typer tensorboard".split()
# Of rows that differ in size or precision alone, one.
ROWS = ["golden", "possible", "operator", "public", "adapters", "encoder: eager", "encoder: compiled", "CUDA graph"]
ROWS += ["blocks compiled, bf16, batch 8", "half precision", "batch 8, 1 at a time", "batch 8, 8 at a time, with check"]


@pytest.mark.slow
def test_the_program_for_gpus_runs_on_a_cpu_at_toy_size_with_torch_transformers_and_peft_alone(tmp_path):
    output = tmp_path / "gpu.json"
    program = f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT})); sys.path.insert(0, {str(BENCH)!r}); "
    program += f"sys.argv[0] = {str(BENCH / 'gpu.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, "--device", "cpu", "--tiny", "--compile-backend", "eager"]
    command += ["--output", str(output), "--only", *ROWS]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"]
    found = json.loads(output.read_text())
    rows = {f"{row['group']}: {row['name']}": row for row in found["rows"]}
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert all("No viable backend" in error for error in failed.values()), failed  # of attention, on a CPU
    assert rows["ceilings: ceilings"]["copy_bytes_per_second"] > 0
    plain = rows["golden: float32"]
    assert plain["codes_flipped"] == 0 and max(plain["image_difference"], plain["text_difference"]) < 1e-5
    assert rows["golden: bf16"]["codes_flipped"] > 0
    exact = rows["encoder: eager, float32, batch 8"]
    assert exact["codes_flipped"] == 0 and exact["difference"] < 1e-5
    assert exact["volumes_per_second"] == pytest.approx(8e3 / exact["ms"])
    assert all(row["difference"] < 0.05 for name, row in rows.items() if name.startswith("encoder") and "ms" in row)
    assert rows["encoder: CUDA graph, bf16, batch 1"] == {
        "group": "encoder",
        "name": "CUDA graph, bf16, batch 1",
        "skipped": "needs a GPU",
    }
    assert rows["adapters: 8 adapters in one batch"]["difference"] < 1e-5
    assert rows["public way: one volume against 18 pairs of prompts"]["difference_public"] < 1e-5
    assert rows["operator: quantiser, as it is"]["codes_flipped"] == 0
    for way in ("grouped by cuDNN", "channels first", "by shifts, compiled"):
        assert rows[f"operator: position convolution, {way}"]["difference"] < 0.02
    least = rows["possible: stream in float32"]
    assert max(least["ms_of_products"], least["ms_of_bytes"]) <= least["ms"]
    assert least["ms"] <= least["ms_of_products"] + least["ms_of_bytes"]
    step = rows["LoRA step: batch 8, 1 at a time, with checkpointing"]
    assert step["peak_bytes"] is None and step["loss"] > 0  # only a GPU's allocator counts
    assert "bar" in found["bars"]["bytes_of_a_step_at_batch_8"] and found["made_with"]["device"].startswith("CPU")


def test_the_pages_say_what_was_measured_on_a_gpu(bench):
    found = json.loads((BENCH / "gpu.json").read_text())
    pages = {name: (BENCH.parent / name).read_text() for name in ("docs/released.md", "docs/training.md")}
    assert "\n".join(bench("gpu").page(found)) in pages["docs/released.md"]
    assert found["made_with"]["model"] == "full size" and "no GPU was at hand" not in "".join(pages.values())
    above = [row["bytes_above_estimate"] for row in found["rows"] if "bytes_above_estimate" in row]
    assert 0.05e9 < min(above) and max(above) < 0.95e9  # "0.1 to 0.9 GB more"
    encoder = {row["name"]: row for row in found["rows"] if row["group"] == "encoder"}
    for name in ("eager", "blocks compiled", "blocks compiled, everything in half precision"):
        row = encoder[f"{name}, bf16, batch 8"]
        share, ms = f"{row['share_of_bf16_rate']:.0%}".replace("%", " %"), f"({row['ms']:.0f} ms"
        assert share in pages["docs/released.md"] and ms in pages["docs/released.md"], (name, share, ms)
    ms, step = (
        encoder["eager, bf16, batch 8"]["ms"],
        next(row for row in found["rows"] if row["name"] == "batch 8, 8 at a time, with checkpointing"),
    )
    readme = f"8 scans in {ms:.0f} ms, and a LoRA step with batch 8 takes {step['ms'] / 1e3:.2f} s and "
    assert f"{readme}{step['peak_bytes'] / 1e9:.1f} GB" in (BENCH.parent / "README.md").read_text()
    step = next(row for row in found["rows"] if row["name"] == "batch 32, 2 at a time, with checkpointing")
    notebook = (BENCH.parent / "notebooks" / "03_finetuning.ipynb").read_text()
    assert f"{step['ms'] / 1e3:.1f} s for 32, 2 at a time, {found['made_with']['device']}" in notebook


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_measured_and_nothing_written(tmp_path, run_bench):
    code, said = run_bench("gpu", "--output", tmp_path / "gpu.json")
    assert (code, said.count("\n")) == (0, 1) and said.startswith("no GPU here")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_steps_of_the_slice_viewer_are_measured_with_both_canvases(tmp_path, run_bench):
    _, said = run_bench("viewers", "--tiny", "--output", tmp_path / "viewers.json")
    assert "memory grows by" in said
    assert [file.name for file in tmp_path.iterdir()] == ["viewers.json"]
    found = json.loads((tmp_path / "viewers.json").read_text())
    steps = found["steps"]
    rows = [name for name in steps["plain"] if name.startswith("with both, ")]
    assert rows == ["with both, axial", "with both, coronal", "with both, sagittal"]
    assert list(steps["plain"]) == list(steps["ipympl"]) and len(steps["plain"]) == 13
    slowest = max(row["milliseconds"] for canvas in ("plain", "ipympl") for row in steps[canvas].values())
    assert steps["slowest_step_milliseconds"] == slowest > 0
    assert steps["times_faster_than_matplotlib"] == pytest.approx(steps["matplotlib_milliseconds"] / slowest)
    assert found["stack_page"]["slices"] == 16 and 0 < found["stack_page"]["megabytes"] < 1
    assert found["made_with"]["volume"] == "16 x 32 x 32"


def test_what_the_repository_says_about_the_viewer_is_within_the_bars_and_of_a_volume_of_full_size(bench):
    found = json.loads((BENCH / "viewers.json").read_text())
    assert all(met for met, _ in bench("viewers").bars(found))
    assert found["made_with"]["volume"] == "240 x 480 x 480" and found["memory"]["steps"] == 300


def test_of_each_phantom_the_fastest_of_its_repeats_counts(bench, monkeypatch):
    took = iter([3.0, 1.0, 2.0, 5.0, 9.0, 4.0])
    monkeypatch.setattr(bench("phantoms"), "once", lambda seed, shape: next(took))
    assert bench("phantoms").seconds(range(2), (1, 1, 1), repeats=3) == (1 + 4) / 2


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_bench_runs_all_parts_and_fails_in_the_end_if_one_did(tmp_path):
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$1" in bench/model.py | bench/base.py) exit 1 ;; esac\n')
    python.chmod(0o755)
    command = ["make", "-f", BENCH.parent / "Makefile", "bench", "PYTHON=true"]
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path / "env")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode and done.stdout.count("bench/") == 8 and "failed: model base\n" in done.stdout


def test_the_page_of_base_models_says_what_was_measured(bench):
    found = json.loads((BENCH / "base_models.json").read_text())
    lines = bench("printing").block("base_models", bench("base_models").page(found))
    assert lines in (BENCH.parent / "docs" / "base_models.md").read_text(encoding="utf-8")
    assert found["CT-CLIP"]["lora"]["paper"] == 1_671_168


def test_the_base_model_sees_at_home_and_the_bar_that_it_misses_is_told(bench):
    base, found = bench("base"), json.loads((BENCH / "base.json").read_text())
    (missed,) = (said for met, said in base.bars(found) if not met)
    told = (BENCH.parent / "CHANGELOG.md").read_text().partition("### What was wrong")[0]
    assert "at most two" in missed and all(name.lower() in told for name in base.blind(found))
    lines = bench("printing").block("base", base.page(found))
    assert lines in (BENCH.parent / "docs" / "phantoms.md").read_text(encoding="utf-8"), "run: python bench/base.py"
