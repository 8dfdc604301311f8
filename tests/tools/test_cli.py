"""The command line and the demo, on small stand-in notebooks."""

import errno
import html
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import typer
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from safetensors import SafetensorError
from typer.testing import CliRunner

from medctkit import cli
from medctkit.course import doctor
from tools import demo, offline_pages

MANIFEST = Path(__file__).resolve().parents[2] / "data_manifest.csv"


def around(value, margin):
    return {"value": value, "low": value - margin, "high": value + margin}


METRICS = {
    "base": {"auroc": around(0.55, 0.03), "accuracy": around(0.60, 0.03), "macro_f1": around(0.30, 0.03)},
    "adapted": {"auroc": around(0.64, 0.03), "accuracy": around(0.66, 0.03), "macro_f1": around(0.36, 0.03)},
    "difference": {"auroc": around(0.09, 0.02), "accuracy": around(0.06, 0.02), "macro_f1": around(0.06, 0.02)},
}
WRITE_METRICS = f"""
import json, pathlib
pathlib.Path(output_dir, "metrics.json").write_text(json.dumps({METRICS!r}))
"""


def run(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def write_notebook(path, *sources):
    parameters = new_code_cell("output_dir, seed = 'unset', None", metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# A lesson"), parameters, *map(new_code_cell, sources)]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)


def test_help_is_quick_and_needs_no_clone():
    heavy = "torch", "tools", "medctkit.training"
    code = "import sys; from medctkit.cli import app; app(['--help'], standalone_mode=False)\n"
    code += f"print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=100)
    assert done.stdout.endswith("[]\n") and "finetune" in done.stdout


@pytest.mark.parametrize("arguments", [("prepare", "~/m.csv", "out"), ("embed", "out", "--manifest=~/m.csv")])
def test_the_home_folder_is_found_in_every_argument(tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run(*arguments)
    assert result.exit_code == 1 and f"error: no manifest at {tmp_path}/m.csv" in result.output


def test_an_adapter_of_a_run_that_is_not_finished_is_marked(tmp_path):
    adapter = tmp_path / "unfinished" / "adapter"
    result = run("embed", tmp_path / "e.safetensors", "--manifest", MANIFEST, "--adapter", adapter)
    assert result.exit_code == 1 and "the best so far of a run that is not finished" in result.output


def test_maintainers_commands_stand_apart():
    text = run("--help").output
    ordinary, apart = (set(part.split()) for part in text.split("For maintainers"))
    assert {"finetune", "evaluate"} <= ordinary and {"gallery", "pretrain", "manifest"} <= apart


def test_a_name_does_not_steer_the_terminal():
    result = run("prepare", "\x1b]0;evil\x07\u202egpj.csv", "out")
    assert r"no manifest at \x1b]0;evil\x07\u202egpj.csv" in result.output and "\x1b" not in result.output


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space", "a.csv"), "error: [Errno 28] No space: 'a.csv'"),
        (MemoryError("3 GB"), "error: MemoryError: 3 GB"),
        (RuntimeError("[enforce fail] file write failed"), "error: RuntimeError: [enforce fail] file write failed"),
        (SafetensorError("header too large"), "error: SafetensorError: header too large"),
        (TypeError("a mistake of ours"), None),
    ],
)
def test_what_goes_wrong_is_told_a_mistake_of_ours_has_its_traceback(monkeypatch, error, told):
    def failing():
        raise error

    monkeypatch.setattr(doctor, "check_all", failing)
    result = run("doctor")
    assert result.exit_code == 1 and (result.output.strip() == told if told else result.exception is error)


@pytest.mark.parametrize(
    ("command", "stopped", "does"),
    [
        (["prepare", MANIFEST, "out"], "medctkit.cohort.manifest.load_manifest", "goes on from here"),
        (["evaluate", "run"], "medctkit.experiments.tables.scores_file", "begins anew"),
        (["doctor"], "medctkit.course.doctor.check_all", "begins anew"),
    ],
)
def test_a_command_that_is_stopped_says_what_it_does_when_it_is_called_again(monkeypatch, command, stopped, does):
    monkeypatch.setattr(stopped, lambda *_: signal.raise_signal(signal.SIGINT))
    result = run(*command)
    assert result.exit_code == 130 and result.output.strip() == f"stopped; the same command {does}"


def test_the_commands_that_go_on_are_those_that_say_so_in_their_help():
    texts = {name: command.help for name, command in typer.main.get_command(cli.app).commands.items()}
    assert {name for name, text in texts.items() if re.search("start it again|run again", text)} == {*cli.GOES_ON}


def test_the_callers_own_way_to_end_is_his_again(monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "check_all", lambda: seen.append(signal.getsignal(signal.SIGTERM)) or [])
    before = signal.getsignal(signal.SIGTERM)
    assert run("doctor").exit_code == 0 and seen == [signal.default_int_handler]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_terminal_that_lacks_letters_gets_others(monkeypatch):
    monkeypatch.setattr(doctor, "check_all", lambda: print("\xfc") or [])
    done = CliRunner(charset="ascii").invoke(cli.app, ["doctor"])
    assert done.exit_code == 0 and r"\xfc" in done.stdout


@pytest.fixture
def folders(tmp_path):
    """Four stand-in lessons and an output folder that does not exist yet."""
    for name in demo.NOTEBOOKS[:3]:
        write_notebook(tmp_path / "notebooks" / name, "print('fine')")
    write_notebook(tmp_path / "notebooks" / demo.NOTEBOOKS[3], WRITE_METRICS)
    return tmp_path / "notebooks", tmp_path / "runs" / "demo"


def run_demo(folders, *more):
    arguments = ("--notebooks-dir", folders[0], "--output-dir", folders[1], *more)
    app = typer.Typer()
    app.command()(demo.demo)
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.slow
def test_demo_runs_all_four_and_prints_what_04_measured(folders, monkeypatch):
    foreign = folders[0].parent / "jupyter" / "kernels" / "python3" / "kernel.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text(json.dumps({"argv": ["false"], "display_name": "another Python", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(folders[0].parent / "jupyter"))
    where = "import os, sys\nprint('here', sys.executable, os.getcwd(), seed)"
    write_notebook(folders[0] / demo.NOTEBOOKS[0], where, "import ipywidgets\nipywidgets.IntSlider(7)")
    result = run_demo(folders, "--seed", 5)
    assert result.exit_code == 0, result.output
    assert "+0.090 [+0.070, +0.110]" in result.output
    assert "Done in " in result.output
    for name in demo.NOTEBOOKS:
        assert (folders[1] / name).with_suffix(".html").stat().st_size > 10_000
    page = (folders[1] / "01_data_prep.html").read_text()
    assert f"here {sys.executable} {folders[0]} 5" in page, "another interpreter, folder or seed than asked for"
    index = (folders[1] / "index.html").read_text()
    assert "+0.090 <small>+0.070 to +0.110</small>" in index and 'href="01_data_prep.html"' in index


@pytest.mark.slow
def test_the_demo_s_pages_need_no_network_and_no_kernel(tmp_path):
    """Viewers are stacks, equations are set by what lies beside, parameters are shown once, Colab's cell not at all."""
    colab = new_code_cell("import os", metadata={"tags": ["colab"]})
    parameters = new_code_cell("seed = 0  # of all\noutput_dir = '../runs'", metadata={"tags": ["parameters"]})
    viewer = """import numpy as np
from medctkit.scans.volumes import CTVolume
from medctkit.viewers import SliceViewer
SliceViewer(CTVolume(np.zeros((4, 6, 6), np.int16), (2.0, 2.0, 2.0)))"""
    links = "[of CT](../docs/glossary.md), [next](b.ipynb#more), [out](https://example.org)"
    imports = new_code_cell("import math\nprint('ready')", metadata={"tags": ["hide-input"]})
    text = new_markdown_cell(f"# Slices\n\n$x^2$ and $$y$$ {links}")
    cells = [text, colab, parameters, imports, new_code_cell(viewer)]
    source, out = tmp_path / "a.ipynb", tmp_path / "out"
    out.mkdir()
    nbformat.write(new_notebook(cells=cells), source)
    nbformat.write(offline_pages.with_stacks_kept(source, out), out / "a.ipynb")
    used = {"seed": 7, "output_dir": "C:\\out"}
    with demo.this_interpreter_as_kernel():
        demo.execute(out / "a.ipynb", out / "a.ipynb", used, tmp_path)
    page, picture = offline_pages.write_page(source, out / "a.ipynb", used, ["a.ipynb", "b.ipynb"])
    text = page.read_text()
    assert 'href="b.html#more"' in text and "glossary" not in text and 'href="https://example.org"' in text
    assert not re.findall(r"src=.https?:|cdn|import os|keep_stacks|widget-state", text)
    assert len(re.findall("a-stack-1.html", text)) == 1 and picture.startswith("data:image/")
    assert "axial slice 2 of 0 to 3" in (out / "a-stack-1.html").read_text()
    shown = html.unescape(re.sub("<[^>]+>", "", text))
    assert "ready" in shown and "import math" not in shown
    assert (
        shown.count("seed = ") == 1
        and "seed = 7  # of all" in shown
        and f"output_dir = {used['output_dir']!r}" in shown
    )
    index = offline_pages.write_index(out, METRICS, {page: picture})
    assert "<b>Slices</b>" in index.read_text() and (out / "mathjax.js").stat().st_size > 1e6


@pytest.mark.slow
def test_demo_stops_at_the_first_failing_cell_and_names_it(folders):
    write_notebook(folders[0] / demo.NOTEBOOKS[0], "x = 1", "1 / (x - 1)", "print('never')")
    folders[1].mkdir(parents=True)
    (folders[1] / "metrics.json").write_text(json.dumps(METRICS))
    result = run_demo(folders)
    assert result.exit_code == 1
    assert "01_data_prep.ipynb failed in cell 5 (In [4])" in result.output
    assert "ZeroDivisionError" in result.output and "1 / (x - 1)" in result.output
    assert "ZeroDivisionError" in (folders[1] / "01_data_prep.html").read_text()
    assert not (folders[1] / demo.NOTEBOOKS[1]).exists()
    assert not (folders[1] / "metrics.json").exists(), "figures of an earlier run were left behind"


@pytest.mark.slow
def test_demo_says_when_a_kernel_dies(folders):
    write_notebook(folders[0] / demo.NOTEBOOKS[0], "import os; os._exit(9)")
    result = run_demo(folders)
    assert result.exit_code == 1
    assert "01_data_prep.ipynb: its kernel died" in result.output and "memory" in result.output


def test_demo_without_notebooks_says_where_they_come_from(tmp_path):
    result = run_demo((tmp_path, tmp_path / "out"))
    assert result.exit_code == 1
    assert "04_zero_shot_evaluation.ipynb" in result.output and "clone" in result.output


def test_doctor_looks_at_everything():
    result = run("doctor")
    for word in ("python", "device", "threads of", "free disk", "mini model", "own CT", "torch", "jupyterlab", "dask"):
        assert word in result.output
    assert (result.exit_code == 0) == ("BAD" not in result.output)


def test_doctor_names_what_is_missing_or_too_old(monkeypatch, tmp_path):
    wanted = ["torch>=99", "no-such-package>=1", "pip; extra == 'test'", "no-such-cluster>=1; extra == 'cluster'"]
    monkeypatch.setattr(doctor, "requires", lambda _: wanted)
    monkeypatch.setenv("MEDCTKIT_REAL_CT", str(tmp_path / "nowhere"))
    result = run("doctor")
    assert result.exit_code == 1
    bad = {line.split()[1] for line in result.output.splitlines() if line.startswith("BAD ")}
    assert {"torch", "no-such-package", "own"} <= bad and "no-such-cluster" not in bad
    assert "needs >=99" in result.output and "missing, needs >=1" in result.output
    assert "none (optional: pip install 'medctkit[cluster]')" in result.output
    assert "pip" not in [line.split()[1] for line in result.output.splitlines() if line[:3] in ("ok ", "BAD")]


def test_doctor_lists_the_mini_model_files_it_misses(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    fine, _, found = doctor.check_mini_model(tmp_path)
    assert not fine and "lacks model.safetensors, tokenizer.json" in found
