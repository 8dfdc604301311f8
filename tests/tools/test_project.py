"""What holds the project together: one-way imports, quick import, matching dependency files, notebooks."""

import ast
import json
import re
import subprocess
import sys
import tomllib
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
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# import name -> distribution name, where they differ
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}


def imports(path):
    """All modules that a file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "medctkit" if node.level else node.module
            base = f"{base}.{node.module}" if node.level and node.module else base
            yield from ([f"medctkit.{alias.name}" for alias in node.names] if base == "medctkit" else [base])


def requirements(*extras):
    optional = PYPROJECT["project"]["optional-dependencies"]
    listed = [*PYPROJECT["project"]["dependencies"], *(r for extra in extras for r in optional[extra])]
    return {requirement.name.lower(): requirement for requirement in map(Requirement, listed)}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_import_is_a_declared_dependency():
    declared = {normal(name) for name in requirements("notebooks")}
    for path in (ROOT / "medctkit").rglob("*.py"):
        outer = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"medctkit"}
        used = {normal(DISTRIBUTIONS.get(name, name)) for name in outer}
        # nbclient is papermill's engine
        assert used <= declared | {"nbclient"}, f"{path.name}: {sorted(used - declared)} not in pyproject.toml"


def test_import_is_quick_and_names_load_on_use():
    code = """if True:
        import sys, time
        start = time.perf_counter()
        import medctkit
        assert time.perf_counter() - start < 1
        heavy = {"torch", "transformers", "peft", "monai", "numpy", "pandas", "matplotlib"} & set(sys.modules)
        assert not heavy, heavy
        assert len(medctkit.FINDINGS) == 18 and "CTCLIPModel" in dir(medctkit)
        assert medctkit.FINDINGS is medctkit.findings.FINDINGS
        assert medctkit.__version__[0].isdigit()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_name_lists_the_known_ones():
    import medctkit

    with pytest.raises(AttributeError, match="no attribute 'CTClip'; it has .*CTCLIPModel"):
        _ = medctkit.CTClip


def test_every_public_name_exists():
    import medctkit

    for name in medctkit.__all__:
        assert getattr(medctkit, name) is not None


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
    assert pip[0] == "-c constraints.txt" and pip[-1] == "-e .[notebooks,test]"
    conda = {r.name: r.specifier for r in map(Requirement, conda)}  # also checks each spec's syntax
    assert conda.pop("python") == SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert {"pip", "pytorch"} <= set(conda)
    known = requirements("notebooks", "test")
    assert conda["pytorch"] == known["torch"].specifier
    for requirement in map(Requirement, pip[1:-1]):
        assert requirement.specifier == known[requirement.name.lower()].specifier, requirement


def test_environment_yml_names_what_the_lessons_are_about():
    _, conda, pip = conda_file()
    named = {Requirement(entry).name for entry in [*conda, *pip[1:-1]]}
    assert named >= set("pytorch peft transformers monai matplotlib ipywidgets pandas scikit-learn jupyterlab".split())


def test_constraints_pin_what_pyproject_asks_for_and_nothing_with_cuda():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {normal(r.name): r for r in map(Requirement, lines)}
    assert len(pins) == len(lines)
    assert not [name for name in pins if name == "torch" or re.search("nvidia|cuda|triton", name)]
    for pin in pins.values():
        assert re.fullmatch(r"==[\d.]+", str(pin.specifier)), pin
    for name, requirement in requirements("notebooks", "test").items():
        if name != "torch":
            version = str(pins[normal(name)].specifier).removeprefix("==")
            assert version in requirement.specifier, f"{requirement} against {pins[normal(name)]}"


def test_package_ships_its_assets():
    assert PYPROJECT["tool"]["setuptools"]["package-data"]["medctkit"] == ["assets/**"]
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


# --- make setup ------------------------------------------------------------------------------------------


def test_linux_without_gpu_never_starts_with_the_cuda_build():
    first, second, third, last = setup_env.torch_sources("Linux", has_gpu=False)
    assert first == ["torch==2.13.0+cpu"]
    assert second == third == ["torch==2.13.0+cpu", "--extra-index-url", setup_env.CPU_INDEX]
    assert last == ["torch==2.13.0"]


@pytest.mark.parametrize(("system", "has_gpu"), [("Linux", True), ("Darwin", False), ("Windows", False)])
def test_gpu_machines_and_other_systems_get_the_plain_build(system, has_gpu):
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


@pytest.mark.parametrize(("script", "answers"), [("echo GPU 0: H100", True), ("exit 9", False), (None, False)])
def test_a_gpu_counts_only_if_nvidia_smi_works(tmp_path, monkeypatch, script, answers):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        fake(tmp_path / "nvidia-smi", script)
    assert setup_env.gpu_answers() is answers


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 2.9.1+cu128", "2.9.1+cu128"),
        ("echo 2.13.0a0+git1", "2.13.0a0+git1"),
        ("echo 2.1.0", None),
        ("exit 1", None),
    ],
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
        "-m pip install --quiet -c constraints.txt -e .[notebooks,test]",
    ]
    assert "no matching distribution" not in capsys.readouterr().out
    log.unlink()
    setup_env.main(environment)
    assert not log.exists(), "the second run did something"
    monkeypatch.setattr(setup_env, "TORCH", "torch==2.14.0")
    setup_env.main(environment)
    assert log.exists(), "a changed requirement was not noticed"


def test_setup_without_any_torch_says_what_it_tried(environment):
    fake(
        environment / "bin" / "python",
        'case "$*" in *version_info*) echo 3 12;; *--version*) ;; *) exit 1;; esac',
    )
    with pytest.raises(SystemExit, match=r"Tried:\n  pip install torch==2.13.0\+cpu\n.*\n.*\n  pip install torch==2"):
        setup_env.main(environment)
    assert not (environment / ".medctkit-setup").exists()


def test_setup_refuses_an_old_python(environment):
    fake(environment / "bin" / "python", "echo 3 9")
    with pytest.raises(SystemExit, match=r"needs Python >= 3\.11, but .* is 3\.9\. .* make setup PYTHON="):
        setup_env.main(environment)


# --- Makefile, README, notebooks -------------------------------------------------------------------------


def make_targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def test_make_help_lists_every_target():
    command = ["make", "--no-print-directory", "help"]  # the tests may run inside make themselves
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} == make_targets()


@pytest.mark.parametrize("active", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_make_uses_the_active_environment(active):
    clean = {"PATH": "/usr/local/bin:/usr/bin:/bin", "CONDA_DEFAULT_ENV": "lab" if "CONDA" in active else ""}
    command = ["make", "-n", "setup"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean | {active: "/some env"})
    assert '"/some env"' in shown.stdout
    base = clean | {"CONDA_PREFIX": "/opt/conda", "CONDA_DEFAULT_ENV": "base"}
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=base)
    assert '".venv"' in shown.stdout, "conda's base environment is not ours to fill"


def test_readme_and_ci_name_only_commands_that_exist():
    for name in ("README.md", ".ci/run"):
        text = (ROOT / name).read_text()
        code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.S)) if name.endswith(".md") else text
        named = {word for line in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", code) for word in line.split()}
        assert {"demo", "test"} <= named
        assert named <= make_targets(), f"{name}: no such make targets: {sorted(named - make_targets())}"


def test_readme_quotes_what_make_bench_measured():
    found, model = (json.loads((ROOT / "bench" / f"{name}.json").read_text()) for name in ("data", "model"))
    readme = (ROOT / "README.md").read_text()
    seconds = {part: row["seconds"] for part, row in model["parts"].items()}
    shares = {name: row["share_of_public_seconds"] for name, row in model["against_the_public_code"].items()}
    vision, pairs = "vision encoder", "one volume against 18 prompt pairs"
    preprocessing, cache, prepare = found["preprocessing"], found["cache"], found["prepare"]
    whole = prepare["all_of_ct_rate"]
    minutes = {cores: 60 * whole[f"hours_on_{cores}_cores"] for cores in (16, 64, 256)}
    for quoted in (
        f"a `.nii.gz` of {cache['megabytes_of_nifti']:.0f} MB",
        f"{prepare['seconds_of_one_core_per_volume']:.1f} s of one core, {prepare['megabytes_per_volume']:.0f} MB",
        f"{cache['load_seconds']:.2f} s, a single slice {cache['one_slice_milliseconds']:.0f} ms",
        f"{preprocessing['times_faster']:.1f} times faster",
        f"with {100 * preprocessing['share_of_peak_memory']:.0f} % of its memory",
        f"{whole['terabytes']:.1f} TB; {minutes[16] / 60:.1f} h on 16 cores, {minutes[64]:.0f} min on 64, "
        f"{minutes[256]:.0f} min on 256",
        f"{seconds[vision]:.1f} s for the embedding of a volume, {seconds[pairs]:.1f} s against all 18 prompt pairs",
        f"{shares[vision]:.2f} and {shares[pairs]:.3f} of the public code's time",
    ):
        assert quoted in readme, f"README does not say {quoted!r}"


def test_readme_quotes_the_memory_that_make_bench_measured():
    found = json.loads((ROOT / "bench" / "memory.json").read_text())["bytes_of_a_step"]
    peak = {(row["batch"], row["volumes_at_a_time"], row["measures"]): row["peak"] / 1e9 for row in found}
    readme = (ROOT / "README.md").read_text()
    for quoted in (
        f"weights in float32 | {peak[8, 8, 'float32 weights']:.1f} GB |",
        f"frozen weights in bf16 | **{peak[8, 8, 'checkpointing and bf16']:.1f} GB** |",
        f"batch 32, two volumes at a time | {peak[32, 2, 'checkpointing and bf16']:.1f} GB |",
    ):
        assert quoted in readme, f"README does not say {quoted!r}"


def test_readme_has_the_table_of_the_comparison_that_comes_with_the_package():
    from medctkit.experiments.compare.results import load_results, method_table

    readme = (ROOT / "README.md").read_text()
    for row in method_table(load_results()).itertuples():
        name = row.label if row.zero_shot else f"{row.label} (not zero-shot)"
        quoted = f"| {name} | {row.auroc:.3f} [{row.auroc_low:.3f}, {row.auroc_high:.3f}] | {row.trainable:,.0f} |"
        assert quoted in readme
        if row.seconds_per_step == row.seconds_per_step:
            assert f"| {row.seconds_per_step_of_full:.2f} | {row.peak_bytes_of_full:.2f} |" in readme


def test_the_lessons_of_the_demo_are_there():
    assert {path.name for path in NOTEBOOKS} >= set(demo.NOTEBOOKS)


def read(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert notebook.nbformat == 4
    nbformat.validate(notebook)
    return notebook


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
    for cell in notebook.cells:
        assert cell.metadata == course.FOLDED if course.is_tagged(cell, "colab") else set(cell.metadata) <= {"tags"}
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"{cell.source}\n{output.get('evalue')}"
            assert output.get("name") != "stderr" and not any("widget" in mime for mime in output.get("data", ()))


def test_every_solution_belongs_to_a_notebook():
    assert {path.stem for path in (ROOT / "notebooks" / "solutions").glob("*.py")} <= {path.stem for path in NOTEBOOKS}
