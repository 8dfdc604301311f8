"""A variant of a vision tower in a process of its own: how long it takes, how much memory, and what it answers.

`trial` starts the process; the functions beside it run in there. Nothing here imports torch, so that what needs none
is measured without it.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from joblib.externals.loky import ProcessPoolExecutor, process_executor

from medctkit.deploy.exported import FACTS, Exported


@dataclass(frozen=True)
class Variant:
    """What is tried: an export, or a CT-CLIP as `save_pretrained` writes it, with an adapter or in bf16."""

    folder: Path
    adapter: Path | None = None
    bf16: bool = False

    @property
    def bytes(self) -> int:
        """Of its weights on disk."""
        patterns = ("vision.*", "prompts.npz", "*.safetensors")
        places = [place for place in (self.folder, self.adapter) if place]
        files = [file for place in places for pattern in patterns for file in place.glob(pattern)]
        return sum(file.stat().st_size for file in files) // (2 if self.bf16 else 1)


@contextmanager
def trial(variant: Variant, volumes: np.ndarray, threads: int) -> Iterator[Callable[..., Any]]:
    """Start a process for a variant, with volumes (b, 1, d, h, w) to measure seconds with; it ends with the block.

    Yields:
        A function that calls another one, `seconds` say, in that process, on so many `threads`.

    Raises:
        RuntimeError: the process ended, killed for memory say.
    """
    # joblib's, for multiprocessing's would import there what this program imports, torch say
    with ProcessPoolExecutor(1) as process:

        def do(function: Callable, *given: Any) -> Any:
            try:
                return process.submit(function, *given).result()
            except BrokenExecutor:
                raise RuntimeError(f"the process of {variant.folder} ended; memory may be too short") from None

        do(_load, variant, volumes, threads)
        yield do


_loaded: tuple[Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], np.ndarray]


def _load(variant: Variant, volumes: np.ndarray, threads: int) -> None:
    global _loaded
    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize  # joblib ends a process that grows by 300 MB; activations do
    if (variant.folder / FACTS).is_file():
        _loaded = Exported(variant.folder, threads).embeds_and_codes, volumes
        return
    import torch

    from medctkit.deploy.export import Vision
    from medctkit.lora.methods import load_trained
    from medctkit.model.ct_clip import CTCLIPModel

    torch.set_num_threads(threads)
    model: Any = CTCLIPModel.from_pretrained(variant.folder).eval()
    model = model if variant.adapter is None else load_trained(model, variant.adapter)
    dtype = torch.bfloat16 if variant.bf16 else torch.float32
    vision = Vision(model.to(dtype)).eval()

    def run(given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            embeds, codes = vision(torch.from_numpy(given).to(dtype))
        return embeds.float().numpy(), codes.numpy()

    _loaded = run, volumes


def seconds(batch: int) -> float:
    """How long the first `batch` of the volumes take."""
    run, volumes = _loaded
    started = time.perf_counter()
    run(volumes[:batch])
    return time.perf_counter() - started


def outputs(volumes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (b, p) and codes (b, t * h * w) of volumes (b, 1, d, h, w)."""
    return _loaded[0](volumes)


def peak_bytes() -> float:
    """The most memory that this process has had; NaN where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says there, a process inherits from the one that started it
        return next(1024.0 * int(line.split()[1]) for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    if os.name != "posix":
        return float("nan")
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on a Mac
