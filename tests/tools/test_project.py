"""What holds the project together: one-way imports, quick import, dependency files that match, commands, notebooks."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tools import demo, setup_env
from tools import notebooks as course

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OPTIONAL = PYPROJECT["project"]["optional-dependencies"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

OWN = {"medctkit", "google"}  # of google only google.colab, which Colab has
# import name -> distribution name, where they differ
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}


def imports(nodes):
    """Names of the distributions that these statements import."""
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - OWN:
            yield normal(DISTRIBUTIONS.get(name, name))


def requirements(*extras):
    listed = [*PYPROJECT["project"]["dependencies"], *(r for extra in extras for r in OPTIONAL[extra])]
    return {requirement.name.lower(): requirement for requirement in map(Requirement, listed)}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_import_of_the_package_is_a_declared_dependency():
    core, extras = ({normal(name) for name in requirements(*names)} for names in ((), set(OPTIONAL) - {"docs", "test"}))
    for path in (ROOT / "medctkit").rglob("*.py"):
        module = ast.parse(path.read_text())
        assert not set(imports(ast.walk(module))) - extras, f"{path}: not in pyproject.toml"
        assert not set(imports(module.body)) - core, f"{path}: of an extra, so to be imported where it is used"


def test_the_picture_of_the_house_is_the_contract():
    contract = PYPROJECT["tool"]["importlinter"]["contracts"][0]
    rows = [set(layer.split(" | ")) for layer in reversed(contract["layers"])]
    drawn = re.findall(r"^ row (\d+) +│(.*)│", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert [int(number) for number, _ in drawn] == list(range(1, len(rows) + 1))
    assert [{name.strip() for name in cells.split("│")} for _, cells in drawn] == rows


@pytest.mark.slow
def test_an_import_from_a_row_below_is_reported(tmp_path):
    shutil.copytree(ROOT / "medctkit", tmp_path / "medctkit", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "medctkit" / "scans" / "hounsfield.py", "a") as file:
        file.write("\nimport medctkit.viewers\n")
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"medctkit\.scans is not allowed to import medctkit\.viewers", done.stdout), done.stdout


def test_import_is_quick_and_names_load_on_use():
    code = """if True:
        import sys, time
        start = time.process_time()
        import medctkit
        assert time.process_time() - start < 1
        heavy = {"torch", "transformers", "peft", "monai", "numpy", "pandas", "matplotlib", "dask"} & set(sys.modules)
        assert not heavy, heavy
        assert len(medctkit.FINDINGS) == 18 and "CTCLIPModel" in dir(medctkit)
        assert medctkit.FINDINGS is medctkit.findings.FINDINGS
        assert medctkit.__version__[0].isdigit()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists_and_an_unknown_one_lists_them():
    import medctkit

    assert all(getattr(medctkit, name) is not None for name in medctkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'CTClip'; it has .*CTCLIPModel"):
        _ = medctkit.CTClip


# --- the files that say what to install ---------------------------------------------------------------


def conda_file():
    file = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = [entry["pip"] for entry in file["dependencies"] if isinstance(entry, dict)]
    assert len(pip) == 1, "one pip section"
    return file, [entry for entry in file["dependencies"] if isinstance(entry, str)], pip[0]


def test_environment_yml_says_what_pyproject_says():
    file, conda, pip = conda_file()
    assert set(file) == {"name", "channels", "dependencies"}
    assert file["channels"][0] == "conda-forge" and "defaults" not in file["channels"]
    assert pip[0] == "-c constraints.txt" and pip[-1] == "-e .[cluster,deploy,tensorboard,notebooks,test]"
    conda = {r.name: r.specifier for r in map(Requirement, conda)}  # also checks each spec's syntax
    assert conda.pop("python") == SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert {"pip", "pytorch"} <= set(conda)
    known = requirements("cluster", "tensorboard", "notebooks", "test")
    assert conda["pytorch"] == known["torch"].specifier
    for requirement in map(Requirement, pip[1:-1]):
        assert requirement.specifier == known[requirement.name.lower()].specifier, requirement
    named = {*conda, *(Requirement(entry).name for entry in pip[1:-1])}
    assert named >= set("pytorch peft transformers monai matplotlib ipywidgets pandas scikit-learn jupyterlab".split())


def pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    found = {normal(r.name): str(r.specifier) for r in map(Requirement, lines)}
    assert len(found) == len(lines)
    return found


def test_constraints_pin_what_pyproject_asks_for_and_nothing_with_cuda():
    pinned = pins()
    assert not [name for name in pinned if name == "torch" or re.search("nvidia|cuda|triton", name)]
    for name, pin in pinned.items():
        assert re.fullmatch(r"==[\d.]+", pin), f"{name}{pin}"
    for name, requirement in requirements(*OPTIONAL).items():
        if name != "torch":
            pin = pinned[normal(name)]
            assert pin.removeprefix("==") in requirement.specifier, f"{requirement} against {pin}"


def test_binder_builds_from_environment_yml():
    """Binder prefers a folder of its own and a Dockerfile; for pip's local files it clones first."""
    assert not [name for name in ("binder", ".binder", "Dockerfile") if (ROOT / name).exists()]
    _, conda, pip = conda_file()
    local = [re.fullmatch(r"-[ce] (\S+?)(\[.*])?", entry) for entry in (pip[0], pip[-1])]
    assert all((ROOT / found[1]).exists() for found in local)
    unpinned = {Requirement(entry).name for entry in pip[1:-1]} - set(pins())
    assert not unpinned and all(Requirement(entry).specifier for entry in conda if entry not in ("pip", "make"))


# --- make setup ------------------------------------------------------------------------------------------


def test_linux_without_gpu_never_starts_with_the_cuda_build_and_others_get_the_plain_one():
    first, second, third, last = setup_env.torch_sources("Linux", has_gpu=False)
    assert first == ["torch==2.13.0+cpu"]
    assert second == third == ["torch==2.13.0+cpu", "--extra-index-url", setup_env.CPU_INDEX]
    assert last == ["torch==2.13.0"]
    for system, has_gpu in (("Linux", True), ("Darwin", False), ("Windows", False)):
        assert setup_env.torch_sources(system, has_gpu) == [["torch==2.13.0"]]


def test_setup_agrees_with_pyproject():
    lowest = ".".join(map(str, setup_env.TORCH_MINIMUM))
    assert str(requirements()["torch"].specifier) == f">={lowest}"
    assert Requirement(setup_env.TORCH).specifier.contains("2.13.0+cpu")
    lowest = ".".join(map(str, setup_env.PYTHON_MINIMUM))
    assert PYPROJECT["project"]["requires-python"] == f">={lowest}"


def fake(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "expected"),
    [(f"echo {kept}", kept) for kept in ("2.9.1+cu128", "2.13.0a0+git1")] + [("echo 2.1.0", None), ("exit 1", None)],
)
def test_a_torch_that_is_there_and_new_enough_is_kept(tmp_path, script, expected):
    assert setup_env.installed_torch(fake(tmp_path / "python", script)) == expected


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A fake environment: its python logs its arguments and gets torch from PyTorch's index only."""
    monkeypatch.setattr(setup_env, "gpu_answers", lambda: False)
    monkeypatch.setattr(setup_env.platform, "system", lambda: "Linux")
    fake(
        tmp_path / "env" / "bin" / "python",
        f"""echo "$@" >> {tmp_path}/log
        case "$*" in
            *version_info*) echo 3 11;;
            *"import torch"*) exit 1;;
            *extra-index-url*) exit 0;;
            *"install torch"*) echo no matching distribution >&2; exit 1;;
        esac""",
    )
    return tmp_path / "env"


def test_setup_falls_back_installs_the_rest_and_runs_only_once(environment, monkeypatch, capsys):
    setup_env.main(environment)
    log = environment.parent / "log"
    installs = [line for line in log.read_text().splitlines() if " install " in line]
    assert installs == [
        "-m pip install torch==2.13.0+cpu",
        f"-m pip install torch==2.13.0+cpu --extra-index-url {setup_env.CPU_INDEX}",
        "-m pip install --quiet -c constraints.txt -e .[cluster,deploy,tensorboard,notebooks,test]",
    ]
    assert "no matching distribution" not in capsys.readouterr().out
    log.unlink()
    setup_env.main(environment)
    assert " install " not in log.read_text(), "the second run did something"
    monkeypatch.setattr(setup_env, "TORCH", "torch==2.14.0")
    setup_env.main(environment)
    assert " install " in log.read_text(), "a changed requirement was not noticed"
    log.unlink()
    monkeypatch.setattr(setup_env, "is_whole", lambda _: False)
    setup_env.main(environment)
    assert " install " in log.read_text(), "a package that went missing was not noticed"


@pytest.mark.slow
def test_an_environment_without_its_python_or_packages_is_not_whole(tmp_path, monkeypatch, capsys):
    assert setup_env.is_whole(sys.executable)
    broken = tmp_path / "env" / "bin" / "python"
    broken.parent.mkdir(parents=True)
    broken.symlink_to(tmp_path / "python that was removed")
    assert not setup_env.is_whole(broken)
    with pytest.raises(SystemExit, match="does not run; activate another environment, or mend this one"):
        setup_env.environment_python(tmp_path / "env")
    (tmp_path / "env" / "pyvenv.cfg").touch()
    assert setup_env.output_of(setup_env.environment_python(tmp_path / "env"), "print(1)") == "1"
    assert "runs no more" in capsys.readouterr().out
    assert not setup_env.is_whole(broken), "it has no packages"


# --- make, the build server, and what a code host reads ---------------------------------------------------


def make_targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def test_make_help_lists_every_target():
    command = ["make", "--no-print-directory", "help"]  # the tests may run inside make themselves
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} == make_targets()


@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        ("README.md", {"demo", "test"}),
        ("CONTRIBUTING.md", {"setup", "style", "test", "test-all", "test-browser", "notebooks", "docs", "bench"}),
        (".ci/run", {"setup", "style", "test-all", "test-browser", "test-pacs", "docs", "notebooks"}),
        (".github/PULL_REQUEST_TEMPLATE.md", {"style", "test"}),
        (".devcontainer/devcontainer.json", {"setup"}),
    ],
)
def test_only_commands_that_exist_are_named(name, at_least):
    text = (ROOT / name).read_text()
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.S)) if name.endswith(".md") else text
    named = {word for line in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", code) for word in line.split()}
    assert at_least <= named <= make_targets(), f"{name}: {sorted(named - make_targets())}"


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_build_server_runs_what_a_laptop_runs():
    workflow = read_yaml(".github/workflows/ci.yml")
    everything, light = workflow["jobs"]["everything"], workflow["jobs"]["light"]
    assert workflow["permissions"] == {"contents": "read"}
    assert everything["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert set(light["strategy"]["matrix"]["system"]) == {"macos-latest", "windows-latest"}
    assert ".ci/run" in [step.get("run") for step in everything["steps"]]
    ran = "\n".join(step.get("run", "") for step in light["steps"])
    folders = re.findall(r"tests/\w+", ran)
    assert folders and all((ROOT / folder).is_dir() for folder in folders)
    assert set(re.search(r"\[(.*)]", ran)[1].split(",")) <= set(OPTIONAL)


def test_the_checks_before_a_commit_have_the_version_of_make_style():
    ruff, others = read_yaml(".pre-commit-config.yaml")["repos"]
    assert ruff["rev"] == "v" + pins()["ruff"].removeprefix("==")
    hooks = {hook["id"] for repo in (ruff, others) for hook in repo["hooks"]}
    assert hooks >= {"ruff-check", "ruff-format", "end-of-file-fixer", "check-added-large-files"}


def test_the_citation_names_the_kit_the_paper_and_ct_clip():
    citation, project = read_yaml("CITATION.cff"), PYPROJECT["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["repository-code"] == project["urls"]["Repository"]
    assert citation["authors"] == project["authors"]
    for work, number in zip(citation["references"], ("2512.00597", "2403.17834"), strict=True):
        assert work["title"] and work["year"] and work["authors"] and work["url"] == f"https://arxiv.org/abs/{number}"


def test_pyproject_says_what_is_tested():
    versions = {text.rpartition(" ")[2] for text in PYPROJECT["project"]["classifiers"] if "Python :: 3." in text}
    workflow = read_yaml(".github/workflows/ci.yml")
    assert versions == set(workflow["jobs"]["everything"]["strategy"]["matrix"]["python"])
    assert f"## {PYPROJECT['project']['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


# --- notebooks -------------------------------------------------------------------------------------------


def read(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert notebook.nbformat == 4
    nbformat.validate(notebook)
    return notebook


IMPORTS = {"tags": ["hide-input"], "jupyter": {"source_hidden": True}}  # folded: the story comes first
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_notebook_opens_as_all_do(path):
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    opening, colab, parameters, *rest = notebook.cells
    assert opening.cell_type == "markdown" and opening.source.startswith("# ")
    assert course.is_tagged(colab, "colab") and course.is_tagged(parameters, "parameters")
    assert not any(course.is_tagged(cell, "parameters") for cell in rest), "one cell tagged parameters"
    names = {t.id for n in ast.walk(ast.parse(parameters.source)) if isinstance(n, ast.Assign) for t in n.targets}
    assert {"output_dir", "seed"} <= names
    for cell in notebook.cells:
        assert cell.cell_type != "code" or len(cell.source.splitlines()) <= 20, f"more than 20 lines:\n{cell.source}"


@each_notebook
def test_exercises_are_those_of_the_solutions(path):
    notebook, solutions = read(path), course.read_solutions(path.parent / "solutions" / f"{path.stem}.py")
    assert {name[:2] for name in solutions} <= {path.stem[:2]}
    before = {cell.id: cell.source for cell in notebook.cells}
    changed = [cell.id for cell in course.assembled(notebook, solutions).cells if before.get(cell.id) != cell.source]
    assert not changed, f"{path.name}: cells {changed} are not as `make render` writes them from the solutions"


@each_notebook
def test_outputs_are_committed_as_make_render_leaves_them(path):
    notebook, text = read(path), path.read_text(encoding="utf-8")
    assert len(text.encode()) <= course.LARGEST
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1))), "not of one run from top to bottom"
    asked = [b.id for a, b in pairwise(notebook.cells) if course.QUESTION in a.source and b.cell_type == "code"]
    for cell in notebook.cells:
        folded = course.FOLDED if course.is_tagged(cell, "colab") else course.ANSWER if cell.id in asked else None
        folded = IMPORTS if course.is_tagged(cell, "hide-input") and not folded else folded
        assert cell.metadata == folded if folded else set(cell.metadata) <= {"tags"}
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"{cell.source}\n{output.get('evalue')}"
            assert output.get("name") != "stderr" and not any("widget" in mime for mime in output.get("data", ()))


def test_every_solution_belongs_to_a_notebook_and_the_lessons_of_the_demo_are_there():
    assert {path.name for path in NOTEBOOKS} >= set(demo.NOTEBOOKS)
    assert {path.stem for path in (ROOT / "notebooks" / "solutions").glob("*.py")} <= {path.stem for path in NOTEBOOKS}
