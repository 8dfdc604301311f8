"""This process's device, and the processes that work beside it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torch import distributed as dist

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_for(mixed_precision: str = "no", output_dir: str | os.PathLike | None = None) -> Accelerator:
    """This process's device, and the other processes that `accelerate launch` started.

    Args:
        mixed_precision: "no", "bf16" or "fp16". accelerate fixes it at its first use in a process; here it may change,
            as it does in notebooks.
        output_dir: for TensorBoard's files; None, or no TensorBoard: no logging.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import is_tensorboard_available

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    logs = output_dir is not None and is_tensorboard_available()
    board = {"log_with": "tensorboard", "project_dir": output_dir} if logs else {}
    return Accelerator(mixed_precision=mixed_precision, **board)


def process_and_processes() -> tuple[int, int]:
    """Which process this is, and of how many that `accelerate launch` started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
