"""Worker processes end with what they work for."""

import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from medctkit.common.processes import worker_pool


def test_who_is_interrupted_does_not_wait_for_workers():
    with pytest.raises(KeyboardInterrupt), worker_pool(1) as pool:
        task = pool.submit(time.sleep, 120)
        while not task.running():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert isinstance(task.exception(timeout=60), BrokenProcessPool)
