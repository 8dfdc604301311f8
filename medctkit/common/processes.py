"""This process's device, and the processes that work beside it.

Every process of a `worker_pool` imports this module: what takes long to import stands where it is needed.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_for(
    mixed_precision: str = "no", output_dir: str | os.PathLike | None = None, tracker: str = "tensorboard"
) -> "Accelerator":
    """This process's device, and the other processes that `accelerate launch` started.

    Args:
        mixed_precision: "no", "bf16" or "fp16". accelerate fixes it at its first use in a process; here it may change,
            as it does in notebooks.
        output_dir: for a tracker's files; None: no logging.
        tracker: "tensorboard" (where it is missing: no logging), "none", or another that accelerate knows.

    Raises:
        ValueError: a tracker that is not known here, or not installed; accelerate is set up to accumulate gradients.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import is_tensorboard_available

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    if tracker not in ("none", "tensorboard", *map(str, get_available_trackers())):
        known = ", ".join(LOGGER_TYPE_TO_CLASS)
        raise ValueError(f"tracker {tracker!r} is not installed (pip install {tracker}), or not one of none, {known}")
    logs = output_dir is not None and (is_tensorboard_available() if tracker == "tensorboard" else tracker != "none")
    board = {"log_with": tracker, "project_dir": output_dir} if logs else {}
    accelerator = Accelerator(mixed_precision=mixed_precision, **board)
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise ValueError(
            f"accelerate is set up for {steps} gradient accumulation steps, expected 1: `micro_batch_size` cuts "
            "batches here. Leave --gradient_accumulation_steps out, or set it to 1 in accelerate's configuration"
        )
    return accelerator


def process_and_processes() -> tuple[int, int]:
    """Which process this is, and of how many that `accelerate launch` started."""
    from torch import distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def in_main_process(work: Callable[[], Any]) -> Any:
    """What `work` gives in the first process, in all of them; or its error, so that none waits for the others."""
    from torch import distributed as dist

    process, processes = process_and_processes()
    if processes == 1:
        return work()
    result: list[Any] = [None]
    if process == 0:
        try:
            result = [work()]
        except (OSError, ValueError) as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], OSError | ValueError):
        raise result[0]
    return result[0]


@contextmanager
def worker_pool(workers: int, start: Callable[..., Any] | None = None, *given: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes that work for this one, and end when it does, however that ends; each begins with `start`, of `given`.

    Raises:
        RuntimeError: they can't start.
    """
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (start, *given)) as pool:
        try:
            pool.submit(os.getpid).result()
        except BrokenProcessPool:
            raise RuntimeError(
                "worker processes cannot start; what they say stands above. In a script, the call must stand under "
                "`if __name__ == '__main__':`, for they read the script too; or ask for one worker only"
            ) from None
        try:
            yield pool
        except BaseException as error:
            working = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):  # of which nobody may have told them: this one would wait for them
                for process in working:
                    process.terminate()
            raise


def keep_freed_memory() -> None:
    """Let the C library keep what large arrays leave, up to 1 GB, for the next ones; where it is not glibc, nothing.

    By default it gives arrays of 32 MB and more back at once, and the next must be zeroed by the kernel again: of a
    training step on two cores that was a quarter, of embedding nearly half.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(-3, 2**28)  # M_MMAP_THRESHOLD, bytes: larger ones are given back
        library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def _start_worker(start: Callable[..., Any] | None, *given: Any) -> None:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for NumPy, not loaded yet: each process has a core
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # stopping is the parent's to tell
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    if start is not None:
        start(*given)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
