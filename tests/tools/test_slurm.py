"""The job for SLURM, with stand-ins for SLURM's commands: what it starts, and that it queues itself again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

JOB = Path(__file__).resolve().parents[2] / "docs" / "static" / "finetune.slurm"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo first-node; else echo "$@" >> "$TOLD/scontrol"; fi',
    "srun": 'shift; SLURM_NODEID=1 exec "$@"',
    "accelerate": """printf '%s\\n' "$@" > "$TOLD/accelerate"
trap 'echo stopped > "$TOLD/stopped"; exit 130' TERM
[ -n "$HANG" ] && { while true; do sleep 0.05; done; }
exit 3""",
}


def start(folder, **more):
    for name, lines in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"} | more
    (folder / "told").mkdir()
    environment = os.environ | slurm | {"TOLD": str(folder / "told"), "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", JOB, "runs/a b", "--config", "run.yaml"], env=environment)


def test_it_launches_as_many_processes_as_there_are_and_fails_where_they_fail(tmp_path):
    assert start(tmp_path, SLURM_GPUS_ON_NODE="4", HANG="").wait(20) == 3
    told = (tmp_path / "told" / "accelerate").read_text().splitlines()
    assert told[told.index("--num_processes") + 1] == "8" and told[told.index("--main_process_ip") + 1] == "first-node"
    assert "--multi_gpu" in told and told[-4:] == ["finetune", "runs/a b", "--config", "run.yaml"]
    assert not (tmp_path / "told" / "scontrol").exists()


@pytest.mark.parametrize("asked", [signal.SIGUSR1, signal.SIGTERM])
def test_before_its_time_is_over_it_stops_the_run_and_queues_itself_again(asked, tmp_path):
    job, told = start(tmp_path, HANG="yes"), tmp_path / "told"
    end = time.monotonic() + 20
    while not (told / "accelerate").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.2)
    job.send_signal(asked)
    assert job.wait(20) == 0
    assert (told / "stopped").exists() and (told / "scontrol").read_text() == "requeue 77\n"
