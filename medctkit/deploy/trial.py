"""A variant of a vision tower in a process of its own: how long it takes, how much memory, and what it answers.

`Trial` starts the process; the functions beside it run in there. Nothing here imports torch, so that what needs none
is measured without it.
"""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medctkit.common.processes import worker_pool
from medctkit.deploy.exported import FACTS, Exported


@dataclass(frozen=True)
class Variant:
    """What is tried.

    Attributes:
        folder: an export, or a CT-CLIP as `save_pretrained` writes it.
        adapter: folder of an adapter to put on that.
        bf16: compute in it.
    """

    folder: Path
    adapter: Path | None = None
    bf16: bool = False

    @property
    def bytes(self) -> int:
        """Of its weights on disk."""
        if (self.folder / FACTS).is_file():
            files = [*self.folder.glob("vision.*"), self.folder / "prompts.npz"]
        else:
            files = [f for place in (self.folder, self.adapter) if place for f in place.glob("*.safetensors")]
        return sum(file.stat().st_size for file in files) // (2 if self.bf16 else 1)


class Trial:
    """A variant in a process of its own, which ends with the block.

    Args:
        variant: what is tried.
        volumes: (b, 1, d, h, w) float32, of which it takes the first few to measure seconds and memory.
        threads: that compute.
    """

    def __init__(self, variant: Variant, volumes: np.ndarray, threads: int):
        self._given, self._stack = (variant, volumes, threads), ExitStack()

    def __enter__(self) -> "Trial":
        self._pool = self._stack.enter_context(worker_pool(1))
        try:
            self._do(_load, *self._given)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _do(self, function: Callable, *given: Any) -> Any:
        return self._pool.submit(function, *given).result()

    def seconds(self, batch: int) -> float:
        """How long the first `batch` of the volumes take."""
        return self._do(_seconds, batch)

    def peak_bytes(self) -> int | None:
        """The most memory that its process has had; None where the system does not say."""
        return self._do(peak_bytes)

    def outputs(self, volumes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (b, p) and codes (b, t * h * w) of volumes (b, 1, d, h, w)."""
        return self._do(_outputs, volumes)


_loaded: tuple[Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], np.ndarray]


def _load(variant: Variant, volumes: np.ndarray, threads: int) -> None:
    global _loaded
    if (variant.folder / FACTS).is_file():
        _loaded = Exported(variant.folder, threads).embeds_and_codes, volumes
        return
    import torch

    from medctkit.deploy.export import Vision
    from medctkit.lora.adapter import load_adapter
    from medctkit.model.ct_clip import CTCLIPModel

    torch.set_num_threads(threads)
    model: Any = CTCLIPModel.from_pretrained(variant.folder).eval()
    model = model if variant.adapter is None else load_adapter(model, variant.adapter)
    dtype = torch.bfloat16 if variant.bf16 else torch.float32
    vision = Vision(model.to(dtype)).eval()

    def run(given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            embeds, codes = vision(torch.from_numpy(given).to(dtype))
        return embeds.float().numpy(), codes.numpy()

    _loaded = run, volumes


def _seconds(batch: int) -> float:
    run, volumes = _loaded
    started = time.perf_counter()
    run(volumes[:batch])
    return time.perf_counter() - started


def _outputs(volumes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _loaded[0](volumes)


def peak_bytes() -> int | None:
    """The most memory that this process has had; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says there, a process inherits from the one that started it
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    if os.name != "posix":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac
