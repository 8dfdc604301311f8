"""In Colab, what is missing is installed, and nothing else; the rest keeps its version."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from medctkit.course import colab
from tools import notebooks as course
from tools import setup_env

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LISTED = (ROOT / "tests" / "colab_2026_01.txt").read_text().splitlines()
COLAB = {
    colab.normal(name): version for name, _, version in (line.partition("==") for line in LISTED if line[0] != "#")
}
LACKING = "distributed monai numba peft pydicom pylibjpeg pylibjpeg-openjpeg regex simpleitk".split()
LACKING += "highdicom onnx onnxruntime onnxscript pynetdicom".split()  # notebook 07
CELL = course.COLAB_CELL.read_text()
EXTRAS = ("cluster", "tensorboard", "notebooks", "deploy")
SLOW = "MEDCTKIT_TEST_COLAB"


def test_of_colab_s_runtime_only_what_it_lacks_is_asked_for():
    there = COLAB | {"torch": "2.9.0+cpu"}
    lacking = [re.split("[>=]", requirement)[0] for requirement in colab.missing(colab.needed(PROJECT), there)]
    assert lacking == LACKING
    with_gpu = there | {"torch": "2.9.0+cu126", "dask": "2025.9.1", "distributed": "2025.9.1"}
    assert [line.partition(">")[0] for line in colab.missing(colab.needed(PROJECT), with_gpu)] == lacking[1:]


def test_servers_and_tools_are_not_asked_for():
    listed = PROJECT["project"]["optional-dependencies"]["notebooks"]
    extra = {colab.normal(re.split("[>=]", requirement)[0]) for requirement in listed}
    assert extra <= colab.NOT_IN_COLAB, "a new requirement of notebooks: does Colab need it?"
    assert not set(colab.needed(PROJECT)) & colab.NOT_IN_COLAB


def test_a_requirement_it_cannot_read_is_an_error():
    odd = {"project": {"dependencies": ["numpy>=2,<3"], "optional-dependencies": dict.fromkeys(EXTRAS, ())}}
    with pytest.raises(ValueError, match="requirement 'numpy>=2,<3': expected name>=version"):
        colab.needed(odd)


@pytest.mark.parametrize(
    ("found", "asked"),
    [
        ("2.10", ["peft>=3.0"]),
        ("2.99.rc1", ["peft>=3.0"]),
        *((v, []) for v in ("3", "3.0.0.post1", "3.0+cu126", "10.0")),
    ],
)
def test_versions_are_compared_as_numbers(found, asked):
    assert colab.missing({"peft": "3.0"}, {"peft": found}) == asked


def test_colab_s_own_are_kept_though_they_are_older_and_what_is_imported_already_is_never_replaced():
    for name in ("ipython", "ipywidgets"):
        assert colab.missing({name: "99"}, {name: "7.34.0"}) == []
    for name in ("torch", "numpy", "pandas", "matplotlib"):
        said = f"this runtime has {name} 1.9, the course needs 2.8 or newer. Choose the latest"
        with pytest.raises(RuntimeError, match=said):
            colab.missing({name: "2.8"}, {name: "1.9"})


def test_who_looks_over_colab_leaves_its_own_versions_alone(monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    assert colab.left_to_colab() == set()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    assert {"ipython", "ipywidgets", "ipykernel", "papermill", "jupyterlab"} <= colab.left_to_colab()
    assert not {"torch", "monai"} & colab.left_to_colab()


def test_pip_may_not_touch_what_is_there():
    there = {"numpy": "2.0.2", "blosc2": "2.0", "python-apt": "2.4 (ubuntu)", "torch": "2.9.0+cu126"}
    first, second = colab.constraints(["monai>=1.5", "blosc2>=3.0"], there, {"monai": "1.6.1", "numpy": "2.4.6"})
    assert second == ["numpy==2.0.2", "torch==2.9.0+cu126"], "all but what is to be newer, and what pip can't read"
    assert first == [*second, "monai==1.6.1"]


@pytest.fixture
def pip(monkeypatch):
    """Logs what pip is asked for; the first attempts fail as often as `.failures` says."""

    class Pip:
        asked: list = []
        failures = 0

        def __call__(self, *arguments):
            constrained = arguments.index("--constraint") + 1 if "--constraint" in arguments else None
            lines = Path(arguments[constrained]).read_text().split() if constrained else None
            self.asked = [*self.asked, (list(arguments[:constrained]), lines)]
            self.failures -= 1
            return "ResolutionImpossible" if self.failures >= 0 else None

    monkeypatch.setattr(colab, "_pip", Pip())
    return colab._pip


def test_where_tested_versions_do_not_fit_others_are_taken(pip, monkeypatch, capsys):
    monkeypatch.setattr(colab, "installed", lambda: COLAB | {"torch": "2.9.0+cpu"})
    pip.failures = 1
    colab.install(ROOT)
    (first, with_pins), (second, without), (last, none) = pip.asked
    assert first == second == ["install", *first[1:-1], "--constraint"]
    assert [requirement.split(">=")[0] for requirement in first[1:-1]] == LACKING
    assert "monai==1.6.1" in with_pins and set(without) < set(with_pins)
    assert {"torch==2.9.0+cpu", "numpy==2.0.2", "ipywidgets==7.7.1", "dask==2025.12.0"} <= set(without)
    assert (last, none) == (["install", "--no-deps", "--editable", str(ROOT)], None)
    assert "Ready; replaced: peft>=0.21." in capsys.readouterr().out


def test_where_nothing_fits_pip_s_words_are_shown_and_with_everything_there_it_is_not_asked(pip, monkeypatch):
    monkeypatch.setattr(colab, "installed", lambda: {**colab.needed(PROJECT), "medctkit": "0.1.0"})
    colab.install(ROOT)
    assert pip.asked == []
    monkeypatch.setattr(colab, "installed", lambda: COLAB | {"torch": "2.9.0+cpu"})
    pip.failures = 9
    with pytest.raises(RuntimeError, match="pip could not install .*monai.*>=.*:\nResolutionImpossible"):
        colab.install(ROOT)


def test_it_needs_nothing_but_python():
    tree = ast.parse(Path(colab.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names | {"google"}  # Colab's own


# --- the cell -------------------------------------------------------------------------------------------------


def test_the_cell_fetches_from_the_project_s_own_address():
    assert f'"{PROJECT["project"]["urls"]["Repository"]}"' in CELL
    assert len(CELL.strip().splitlines()) <= 20


def commit(folder):
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    return folder


def fake_colab(folder):
    """A folder for PYTHONPATH that has google.colab."""
    for package in ("google", "google/colab"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("")
    return folder


def run_cell(folder, python_path="", **environment):
    code = f"{CELL}\nimport os; print(os.getcwd())"
    environment = {**os.environ, "PYTHONPATH": str(python_path), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_outside_colab_the_cell_does_nothing(tmp_path):
    done = run_cell(tmp_path)
    assert (done.stdout.strip(), done.stderr) == (str(tmp_path.resolve()), "")
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_without_the_course_is_named(tmp_path):
    done = subprocess.run([sys.executable, "-IS", "-c", CELL], cwd=tmp_path, capture_output=True, text=True)
    assert f"this kernel is {sys.executable}, which has no medctkit" in done.stderr and "Change Kernel" in done.stderr


def test_in_colab_the_cell_fetches_installs_and_goes_to_the_notebooks_and_does_so_once(tmp_path):
    source = tmp_path / "source"
    (source / "medctkit" / "course").mkdir(parents=True)
    (source / "notebooks").mkdir()
    (source / "notebooks" / "01.ipynb").write_text("{}")
    for package in ("medctkit", "medctkit/course"):
        (source / package / "__init__.py").write_text("")
    (source / "medctkit" / "course" / "colab.py").write_text("def install():\n    print('installed')\n")
    python_path, content = fake_colab(tmp_path / "fake"), tmp_path / "content"
    content.mkdir()
    where = {"MEDCTKIT_REPOSITORY": str(commit(source))}
    for _ in ("first", "after a restart"):
        done = run_cell(content, python_path, **where)
        assert done.stdout.split() == ["installed", str((content / "medctkit-course" / "notebooks").resolve())], (
            done.stderr
        )
    done = run_cell(content / "medctkit-course" / "notebooks", python_path, **where)
    assert done.stdout.split() == [str((content / "medctkit-course" / "notebooks").resolve())], "again: nothing"


# --- all of it: make test-colab ---------------------------------------------------------------------------------

RUN = """import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.mark.skipif(SLOW not in os.environ, reason="builds Colab's environment (2 GB, minutes): make test-colab")
@pytest.mark.timeout(1800)
def test_notebooks_run_with_colab_s_versions_and_leave_them_as_they_are(tmp_path):
    here = Path(os.environ[SLOW]).resolve()  # kept, so that a second run is quick
    python = here / "environment" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(here / "environment")], check=True)
    setup_env.install_torch(str(python))
    colabs = ["-r", str(ROOT / "tests" / "colab_2026_01.txt"), f"torch=={setup_env.installed_torch(str(python))}"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *colabs], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *LACKING, "medctkit"], check=True)
    source, content = tmp_path / "source", tmp_path / "content"
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    commit(source)
    content.mkdir()
    before = versions(python)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONHOME")} | {
        "PYTHONPATH": str(fake_colab(tmp_path / "fake")),
        "MEDCTKIT_REPOSITORY": str(source),
        "COLAB_RELEASE_TAG": "release-colab",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    for name in ("00_start_here", "02_lora_injection"):
        solutions = course.read_solutions(ROOT / "notebooks" / "solutions" / f"{name}.py")
        opened = course.assembled(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4), solutions)
        nbformat.write(opened, tmp_path / f"{name}.ipynb")  # as Colab opens it: from elsewhere than the repository
        command = [python, "-c", RUN, str(tmp_path / f"{name}.ipynb"), str(here / f"{name}.ipynb")]
        done = subprocess.run(command, cwd=content, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    after = versions(python)
    assert before.items() <= after.items(), "a version has changed"
    added = set(after) - set(before)
    assert {*LACKING, "medctkit"} <= added
    assert not {"jupyterlab", "papermill", "ipympl", "torchvision"} & added


def versions(python):
    """What `python` has installed, by name."""
    code = "from importlib.metadata import distributions as d; [print(x.name.lower(), x.version) for x in d()]"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    return {colab.normal(name): version for name, version in (line.split() for line in done.stdout.splitlines())}


def test_a_scan_is_uploaded_by_a_button(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def choose(*names):
        for name in names:
            Path(name).write_bytes(b"scan")
        files = SimpleNamespace(upload=lambda: dict.fromkeys(names, b"scan"))
        monkeypatch.setitem(sys.modules, "google", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(files=files))

    choose("ct.zip")
    assert colab.upload("mine") == Path("mine/ct.zip") and not Path("ct.zip").exists()
    assert Path("mine/ct.zip").read_bytes() == b"scan"
    choose("a.dcm", "b.dcm")
    with pytest.raises(ValueError, match="2 files were chosen; choose one, and a zip"):
        colab.upload("mine")
