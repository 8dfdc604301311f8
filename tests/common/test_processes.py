"""Worker processes end with what they work for; accelerate is not let to do by itself what the kit does."""

import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from medctkit.common.processes import accelerator_for, worker_pool


def test_who_is_interrupted_does_not_wait_for_workers():
    with pytest.raises(KeyboardInterrupt), worker_pool(1) as pool:
        task = pool.submit(time.sleep, 120)
        while not task.running():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert isinstance(task.exception(timeout=60), BrokenProcessPool)


def test_gradients_that_accelerate_would_divide_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="4 gradient accumulation steps, expected 1: `micro_batch_size`"):
        accelerator_for()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert accelerator_for().gradient_accumulation_steps == 1
