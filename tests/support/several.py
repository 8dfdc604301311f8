"""Processes that start at once, and two of them that share their work as under `accelerate launch`."""

import multiprocessing
import os
from datetime import timedelta

import torch
from torch import distributed as dist

READY = ["tiny", "medctkit.training", "accelerate", "peft", "torch.utils.tensorboard"]


def at_once():
    """A context whose processes find imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(READY)
    return context


def in_two_processes(folder, work, *given):
    """Do `work` in both; they meet by a file in the folder."""
    processes = [at_once().Process(target=_one, args=(i, folder, work, *given), daemon=True) for i in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(280)
    assert [process.exitcode for process in processes] == [0, 0], "what they say stands above"


def _one(process, folder, work, *given):
    os.environ |= {"ACCELERATE_USE_CPU": "true", "LOCAL_RANK": str(process), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    meeting, wait = f"file://{folder}/meeting", timedelta(seconds=250)
    dist.init_process_group("gloo", init_method=meeting, timeout=wait, rank=process, world_size=2)
    work(*given)
    dist.destroy_process_group()
