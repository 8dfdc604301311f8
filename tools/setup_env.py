"""What `make setup` runs: PyTorch in the build that suits this machine, then everything else.

On Linux a plain `pip install torch` brings several GB of CUDA libraries, on a laptop without a GPU too.
So torch comes first, chosen by `torch_sources`; pyproject.toml asks for a range only, which the installed
build then satisfies. Standard library only, because this runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_MINIMUM = (3, 11)
TORCH = "torch==2.13.0"
TORCH_MINIMUM = (2, 8)
EXTRAS = "cluster,deploy,tensorboard,notebooks,test"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def torch_sources(system: str, has_gpu: bool) -> list[list[str]]:
    """The arguments for `pip install` to try in turn until one succeeds.

    Args:
        system: `platform.system()`; only "Linux" has a CUDA build as its default.
        has_gpu: whether an NVIDIA GPU answers on this machine.
    """
    if has_gpu or system != "Linux":
        return [[TORCH]]
    cpu = f"{TORCH}+cpu"
    from_index = [cpu, "--extra-index-url", CPU_INDEX]
    return [[cpu], from_index, from_index, [TORCH]]


def gpu_answers() -> bool:
    """Whether `nvidia-smi -L` is there and works."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def installed_torch(python: str) -> str | None:
    """The version of the torch that `python` imports; None where there is none or it is too old."""
    version = output_of(python, "import torch; print(torch.__version__)")
    return version if version and tuple(map(int, version.split(".")[:2])) >= TORCH_MINIMUM else None


def install_torch(python: str) -> None:
    """Install torch into `python`'s environment unless a usable one is there.

    Raises:
        SystemExit: no source had it; says what was tried.
    """
    present = installed_torch(python)
    if present:
        print(f"Keeping torch {present}, which is installed already.")
        return
    sources = torch_sources(platform.system(), gpu_answers())
    for arguments in sources:
        print("Installing", *arguments, flush=True)
        # pip's complaint about a source that lacks the build would only frighten while others are left.
        done = subprocess.run([python, "-m", "pip", "install", *arguments], stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return
        print("  not to be had there", flush=True)
    tried = "\n".join("  pip install " + " ".join(arguments) for arguments in sources)
    raise SystemExit(
        f"{done.stderr}\nPyTorch could not be installed. Tried:\n{tried}\n"
        "Install it as pytorch.org describes for this machine, then run `make setup` again."
    )


def output_of(python: str | Path, code: str) -> str | None:
    """What `python` prints when it runs `code`; None where it fails or can't be started."""
    try:
        found = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return None if found.returncode else found.stdout.strip()


def version_of(python: str | Path) -> tuple[int, ...]:
    """Of a Python; () where it does not run."""
    return tuple(map(int, (output_of(python, "import sys; print(*sys.version_info[:2])") or "").split()))


def check_python(python: str | Path, environment: Path) -> None:
    """Raises SystemExit where `python` is older than the package allows."""
    version = version_of(python)
    if version < PYTHON_MINIMUM:
        raise SystemExit(
            f"medctkit needs Python >= {PYTHON_MINIMUM[0]}.{PYTHON_MINIMUM[1]}, but {python} is "
            f"{'.'.join(map(str, version)) or 'none'}. Name a newer one, for example: make setup PYTHON=python3.12 "
            f"(if {environment} was made with the old one, delete it first)."
        )


def environment_python(environment: Path) -> str:
    """The interpreter of `environment`, which is created with the running Python if it is not there, or runs no more.

    Raises:
        SystemExit: Python is too old, or has no venv module.
    """
    python = environment / "bin" / "python"
    if version_of(python):
        check_python(python, environment)
        return str(python)
    there = environment.exists() and any(environment.iterdir())
    if there and not (environment / "pyvenv.cfg").exists():
        raise SystemExit(f"{python} does not run; activate another environment, or mend this one, and try again.")
    check_python(sys.executable, environment)
    print(f"Creating {environment}{', whose Python runs no more, anew' if there else ''}", flush=True)
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)]).returncode:
        shutil.rmtree(environment, ignore_errors=True)
        raise SystemExit(f"{sys.executable} could not create {environment}; the lines above say why.")
    return str(python)


def is_whole(python: Path) -> bool:
    """Whether a Python runs, and has what medctkit asks for by name."""
    code = f"""
import re
from importlib.metadata import distribution, requires
for wanted in requires("medctkit"):
    extra = re.search("extra == .([a-z]+)", wanted)
    if extra is None or extra[1] in {EXTRAS!r}:
        distribution(re.match("[A-Za-z0-9._-]+", wanted)[0])
"""
    return output_of(python, code) is not None


def fingerprint() -> str:
    """Changes with what `make setup` would install."""
    parts = [str(ROOT).encode()]
    parts += [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"\0".join([*parts, TORCH.encode()])).hexdigest()


def main(environment: Path) -> None:
    """Bring `environment` up to date; quick where it already is."""
    stamp = environment / ".medctkit-setup"
    if stamp.exists() and stamp.read_text() == fingerprint() and is_whole(environment / "bin" / "python"):
        return
    python = environment_python(environment)
    pip = [python, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:  # environments made by uv
        subprocess.run([python, "-m", "ensurepip"], check=True)
    install_torch(python)
    everything = ["-c", "constraints.txt", "-e", f".[{EXTRAS}]"]
    print("Installing medctkit and what it needs", flush=True)
    code = subprocess.run([*pip, "install", "--quiet", *everything], cwd=ROOT).returncode
    if code:
        raise SystemExit(f"pip install {' '.join(everything)} failed; the lines above say why.")
    stamp.write_text(fingerprint())
    print(f"Ready: {environment}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tools.setup_env ENVIRONMENT")
    main(Path(sys.argv[1]))
