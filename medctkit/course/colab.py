"""What Colab lacks for the course is installed there, and nothing else; `assets/colab_cell.py` calls it.

What is there keeps its version: Colab's page belongs to its IPython and ipywidgets, and a package that is replaced
while it is imported needs a restart. Only Python's own modules are imported, since nothing else may be there yet.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Of the extra "notebooks": servers and tools, for which Colab has its own; ipympl, which its page does not show as is.
NOT_IN_COLAB = {"ipykernel", "ipympl", "jupyterlab", "nbconvert", "nbformat", "papermill", "sphinx-mathjax-offline"}
# The kernel that runs, and its page: kept even where they are older than we ask for elsewhere.
COLABS_OWN = {"ipython", "ipywidgets"}
# Large, and imported before the first cell runs: too old, only another runtime helps.
NEVER_REPLACED = {"matplotlib", "numpy", "pandas", "torch"}
_VERSION = re.compile(r"(\d+!)?\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[A-Za-z0-9]+([._-][A-Za-z0-9]+)*)?")
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)>=([0-9.]+)")


def left_to_colab() -> set[str]:
    """Names of requirements whose versions are Colab's business; empty elsewhere. For those who look over a machine."""
    return NOT_IN_COLAB | COLABS_OWN if "COLAB_RELEASE_TAG" in os.environ else set()


def normal(name: str) -> str:
    """The name of a distribution as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Versions of all that is installed, by normal name."""
    return {normal(found.name): found.version for found in reversed(list(distributions())) if found.name}


def needed(project: Mapping) -> dict[str, str]:
    """What the course needs in Colab, of pyproject.toml as it is read: the lowest version, by normal name.

    Raises:
        ValueError: a requirement that isn't "name>=version".
    """
    extras = project["project"]["optional-dependencies"]
    listed = [*extras["cluster"], *project["project"]["dependencies"], *extras["tensorboard"], *extras["notebooks"]]
    listed += extras["deploy"]  # notebook 07
    lowest = {}
    for requirement in listed:
        found = _REQUIREMENT.fullmatch(requirement.strip())
        if found is None:
            raise ValueError(f"pyproject.toml: requirement {requirement!r}: expected name>=version")
        lowest[normal(found[1])] = found[2]
    return {name: version for name, version in lowest.items() if name not in NOT_IN_COLAB}


def numbers(version: str) -> tuple[int, ...]:
    """The numbers a version begins with: (2, 9, 0) of "2.9.0+cu126"."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else [0]
    while parts[-1:] == [0]:
        parts.pop()
    return tuple(parts)


def missing(lowest: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """Requirements for pip: what isn't there, and what is too old and not Colab's own.

    Raises:
        RuntimeError: torch, numpy, pandas or matplotlib is too old.
    """
    lacking = []
    for name, version in lowest.items():
        too_old = name in there and numbers(there[name]) < numbers(version)
        if too_old and name in NEVER_REPLACED:
            raise RuntimeError(
                f"this runtime has {name} {there[name]}, the course needs {version} or newer. Choose the latest "
                "version in Colab's menu: Runtime > Change runtime type"
            )
        if name not in there or (too_old and name not in COLABS_OWN):
            lacking.append(f"{name}>={version}")
    return lacking


def constraints(lacking: Iterable[str], there: Mapping[str, str], tested: Mapping[str, str]) -> list[list[str]]:
    """Constraints for pip to try in turn: what is there stays; what is new, as tested if that fits, else what fits."""
    names = [requirement.partition(">=")[0] for requirement in lacking]
    # packages of the operating system may have versions that pip can't read
    known = {name: version for name, version in sorted(there.items()) if _VERSION.fullmatch(version)}
    kept = [f"{name}=={version}" for name, version in known.items() if name not in names]
    pinned = [f"{name}=={tested[name]}" for name in names if name in tested]
    return [kept + pinned, kept]


def install(root: Path = ROOT) -> None:
    """Install what is missing, then this package beside it, without a restart.

    Raises:
        RuntimeError: pip could not; with the end of what it said.
    """
    there = installed()
    lacking = missing(needed(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))), there)
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if "==" in line and not line.startswith("#")]
    tested = {normal(name): version for name, _, version in pins}
    if lacking:
        print("Installing", ", ".join(lacking), flush=True)
        for lines in constraints(lacking, there, tested):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "constraints.txt"
                file.write_text("\n".join(lines), encoding="utf-8")
                said = _pip("install", *lacking, "--constraint", str(file))
            if said is None:
                break
        else:
            raise RuntimeError(f"pip could not install {', '.join(lacking)}:\n{said}")
    if "medctkit" not in there:
        said = _pip("install", "--no-deps", "--editable", str(root))
        if said is not None:
            raise RuntimeError(f"pip could not install {root}:\n{said}")
    importlib.invalidate_caches()
    newer = [requirement for requirement in lacking if requirement.partition(">=")[0] in there]
    print(f"Ready; replaced: {', '.join(newer)}." if newer else "Ready; nothing that was here has been replaced.")


def upload(folder: str | os.PathLike = "../data/mine") -> Path:
    """In Colab: a button to choose your own CT (a file, or a zip of a DICOM folder); it is moved to `folder`.

    Returns:
        Where it is now, for `my_ct`.

    Raises:
        ModuleNotFoundError: not in Colab; there, a file is simply named.
        ValueError: nothing was chosen, or several.
    """
    from google.colab import files  # type: ignore[import-not-found]

    names = [Path(name) for name in files.upload()]
    if len(names) != 1:
        raise ValueError(f"{len(names)} files were chosen; choose one, and a zip where a scan has many")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return names[0].replace(Path(folder) / names[0].name)


def _pip(*arguments: str) -> str | None:
    """Run pip; None, or the end of what it said where it failed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]
