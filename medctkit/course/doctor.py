"""A look over this machine: versions, device, disk, model, data. A row: whether it is fine, what, what was found."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from medctkit.course import colab

Row = tuple[bool, str, str]
OPTIONAL = ("cluster", "deploy", "tensorboard")  # extras one can do without; the course wants "notebooks"
MINI_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def check_versions() -> list[Row]:
    """Every requirement of the package and of its extras, apart from those for its development."""
    rows, not_ours = [], colab.left_to_colab()
    try:
        wanted = [Requirement(text) for text in requires("medctkit") or ()]
    except PackageNotFoundError:
        return [(False, "medctkit", "runs from its folder, but is not installed")]
    for requirement in wanted:
        name, needed, marker = requirement.name, requirement.specifier, requirement.marker
        extras = [e for e in ("", "notebooks", *OPTIONAL) if marker is None or marker.evaluate({"extra": e})]
        if not extras or colab.normal(name) in not_ours:
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            optional = extras[0] in OPTIONAL
            way_out = f"none (optional: pip install 'medctkit[{extras[0]}]')"
            rows.append((optional, name, way_out if optional else f"missing, needs {needed}"))
            continue
        fine = needed.contains(found, prereleases=True)
        rows.append((fine, name, found if fine else f"{found}, needs {needed}"))
    return sorted(rows, key=lambda row: row[1].lower())


def check_mini_model(folder: Path | None = None) -> Row:
    """Whether the mini base model is complete; by default the one in the package."""
    try:
        from medctkit.model.base_model import FOLDER
    except ImportError as error:
        return False, "mini model", f"medctkit.model does not import: {error}"
    folder = folder or FOLDER
    missing = [name for name in MINI_FILES if not (folder / name).is_file()]
    return not missing, "mini model", f"{folder} lacks {', '.join(missing)}" if missing else str(folder)


def describe_device() -> Row:
    """The accelerator that torch would use; a CPU is fine."""
    try:
        import torch
    except ImportError as error:
        return False, "device", f"torch does not import: {error}"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found = f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    elif torch.backends.mps.is_available():
        found = "Apple GPU (mps)"
    else:
        found = "CPU (enough for the demo and all default notebooks)"
    return True, "device", f"{found}; {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def check_all() -> list[Row]:
    """All of it."""
    from medctkit.cohort.hub_repository import token_source

    own = os.environ.get("MEDCTKIT_REAL_CT")
    scans = "none (optional: set MEDCTKIT_REAL_CT to a folder of scans)" if own is None else f"MEDCTKIT_REAL_CT={own}"
    return [
        (sys.version_info >= (3, 11), "python", f"{platform.python_version()}, {sys.executable}"),
        (True, "system", platform.platform()),
        describe_device(),
        (True, "free disk", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB here"),
        check_mini_model(),
        (own is None or Path(own).is_dir(), "own CT", scans),
        (True, "HF token", token_source() or "none (only CT-RATE and the released weights need one: hf auth login)"),
        *check_versions(),
    ]
