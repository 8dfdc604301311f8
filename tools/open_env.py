"""What `make test-open` runs first: the packages of the extra `open` and Merlin's, in a layer above the environment.

They bring torchvision, by way of timm, and PyPI's is made for CUDA. Beside a CPU build of torch it does not import, and
then neither does transformers, which looks for it. So they stay out of the environment; the layer takes 400 MB.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import torch

from tools.setup_env import CPU_INDEX, ROOT, fingerprint, output_of

MERLIN = "merlin-vlm==0.0.7"  # only measured: bench/base_models.py


def main(layer: Path) -> None:
    """Bring `layer` up to date; quick where it already is.

    Raises:
        SystemExit: pip failed; its lines above say why.
    """
    stamp, python = layer / ".medctkit-open", layer / "bin" / "python"
    wanted = "\n".join([fingerprint(), torch.__version__, MERLIN])
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Creating {layer}", flush=True)
    venv.create(layer, clear=True, symlinks=True)
    site = Path(output_of(python, "import sysconfig; print(sysconfig.get_path('purelib'))") or "")
    below = sysconfig.get_path("purelib")
    (site / "environment_below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", "constraints.txt"]
    if torch.version.cuda is None and sys.platform == "linux":  # where there is one, the torchvision that fits
        minor = int(torch.__version__.split(".")[1]) + 15
        fitting = ["--no-deps", "--retries", "0", "--index-url", CPU_INDEX, f"torchvision==0.{minor}.*"]
        subprocess.run([*pip, *fitting], cwd=ROOT, stderr=subprocess.DEVNULL)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["open"]
    if code := subprocess.run([*pip, f"torch=={torch.__version__}", *extra, MERLIN], cwd=ROOT).returncode:
        raise SystemExit(code)
    if output_of(python, "import torchvision") is None:
        # PyPI's, for CUDA: what it says of its own operators, which are not there and nobody here calls
        (site / "torchvision" / "_meta_registrations.py").write_text("")
    stamp.write_text(wanted)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
