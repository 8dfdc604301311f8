"""What a run tells while it trains: its history, TensorBoard, a callback, a progress bar."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from medctkit.common.csv_tables import write_table
from medctkit.training.checkpoints import Run


class History:
    """Adds rows to a run's history, and tells them.

    The settings' tracker gets them too, in Weights & Biases as the same run after an interruption. `run` is restored
    already, if there was something to restore.
    """

    def __init__(self, run: Run, steps: int, callback: Callable[[dict[str, float]], None] | None = None):
        self._run, self._callback = run, callback
        # rows that an interrupted run logged after its last checkpoint are logged anew
        folder = run.output_dir.resolve()
        goes_on = {"id": hashlib.sha256(str(folder).encode()).hexdigest()[:16], "resume": "allow"}
        kwargs = {
            "tensorboard": {"purge_step": run.step + 1},
            "wandb": {"dir": str(folder), "name": folder.name, "config": dict(run.made_of)} | goes_on,
        }
        board = "tensorboard" in map(str, run.accelerator.log_with)  # its project is the name of its folder
        run.accelerator.init_trackers("tensorboard" if board else "medctkit", init_kwargs=kwargs)
        silent = not run.accelerator.is_local_main_process
        self._bar = tqdm(total=steps, initial=run.step, desc="fine-tuning", unit="step", disable=silent)

    def add(self, row: dict[str, float]) -> None:
        """A row: `step`, and numbers by name; the seconds so far are added."""
        run, row = self._run, row | {"seconds": self._run.seconds}
        run.history.append(row)
        told = {name: value for name, value in row.items() if name not in ("step", "seconds")}
        run.accelerator.log(told, step=row["step"])
        if self._callback is not None:
            self._callback(row)
        if row["step"]:
            self._bar.update()
            self._bar.set_postfix(loss=f"{row['loss']:.3f}", best=f"{run.best_score:.3f} at step {run.best_step}")

    def close(self, path: Path) -> None:
        """The main process writes all rows to `path`."""
        self._bar.close()
        if self._run.accelerator.is_main_process:
            write_table(pd.DataFrame(self._run.history), path)
        for tracker in self._run.accelerator.trackers:
            tracker.finish()
