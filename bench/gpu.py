"""Measure the full-size model on a GPU, in one run of a few minutes, most important things first.

`make bench` runs it; without a GPU it says so and changes nothing. The weights are random, which costs what trained
ones cost. It needs torch, transformers, peft, accelerate and this repository, nothing else of what the kit uses.

The table is written after every row, so a run that is cut off loses nothing; a row that fails says why, and the next
one follows. Shares are of the rate of a bf16 matrix product measured in the same run. Writes bench/gpu.json.
"""

import argparse
import json
import platform
import re
import signal
import sys
import time
import tomllib
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from gpu_lab import SEED, Lab
from gpu_rows import rows
from memory import BAR_BATCH, BAR_BYTES

from medctkit.common.provenance import write_json

HERE = Path(__file__).resolve().parent
GOAL = 0.4  # of the measured bf16 rate, by the vision encoder at batch 8
PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton")


class Table:
    """The rows measured so far, in a file that is whole at any time."""

    def __init__(self, output, head, earlier=()):
        self.output, self.head = output, head
        self.rows = {(row["group"], row["name"]): row for row in earlier}

    def add(self, group, name, figures):
        """Add a row, or put it in the place of an older one, and write all of them."""
        self.rows[group, name] = {"group": group, "name": name} | figures
        self.write()

    def write(self):
        """Write the file, by another name first."""
        found = self.head | {"rows": [*self.rows.values()], "bars": self.bars()}
        write_json(found, self.output)

    def bars(self):
        """The best figure for each bar so far, None if there is none."""
        rows = self.rows.values()
        shares = [row.get("share_of_bf16_rate") for row in rows if row["group"] == "encoder"]
        peaks = [row.get("peak_bytes") for row in rows if row["group"] == "LoRA step" and row.get("batch") == BAR_BATCH]
        return {
            "encoder_share_of_bf16_rate": {"best": max(filter(None, shares), default=None), "goal": GOAL},
            f"bytes_of_a_step_at_batch_{BAR_BATCH}": {"best": min(filter(None, peaks), default=None), "bar": BAR_BYTES},
        }


@contextmanager
def at_most(seconds):
    """Raise TimeoutError in what takes longer; work on the GPU is waited for."""

    def late(*_):
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def figures_of(row, lab, seconds_left):
    """What a row gives, or why it gives nothing."""
    if row.gpu and not lab.gpu:
        return {"skipped": "needs a GPU"}
    if row.seconds > seconds_left:
        return {"skipped": f"may take {row.seconds:.0f} s, {max(seconds_left, 0):.0f} s were left"}
    started = time.monotonic()
    try:
        with at_most(min(3 * row.seconds + 20, seconds_left + 20)):
            found = row.run(lab)
    except torch.OutOfMemoryError as error:
        found = {"error": str(error).splitlines()[0], "out_of_memory": True}
    except Exception as error:  # an operator that this GPU or this torch lacks: one row fewer
        said = re.sub(r"/\S*/", "", " ".join(str(error).split()))  # without the folders of this machine
        found = {"error": f"{type(error).__name__}: {said[:300]}"}
    return found | {"seconds_of_the_row": time.monotonic() - started}


def measure(lab, planned, table, minutes):
    """Fill the table, row by row, until the minutes are used up."""
    end = time.monotonic() + 60 * minutes
    for row in planned:
        if row.holds != lab.held:
            lab.let_go()
        figures = figures_of(row, lab, end - time.monotonic())
        lab.tidy()  # here, where no traceback holds on to what was measured
        table.add(row.group, row.name, figures)
        print(f"{row.group}: {row.name}:", shown(figures), flush=True)


def shown(figures):
    """A row in a line, and each of its kernels in a line below."""
    plain = {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in figures.items() if name != "kernels"}
    line = ", ".join(f"{name} {value}" for name, value in plain.items())
    kernels = figures.get("kernels", {}).get("top", ())
    return "".join([line, *(f"\n  {k['ms']:9.3f} ms {k['calls']:5} x {k['kernel']}" for k in kernels)])


def version_of(package):
    """Its version; None: not installed. The kit itself may be a clone that nobody installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return project["version"] if package == project["name"] else None


def made_with(device, tiny):
    """Where the numbers come from."""
    gpu = device.type == "cuda"
    return {
        "command": "make bench",
        "model": "toy" if tiny else "full size",
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {platform.machine()}",
        "device_bytes": torch.cuda.get_device_properties(device).total_memory if gpu else None,
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            **{package: version_of(package) for package in ("medctkit", *PACKAGES)},
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if gpu else None,
        },
    }


def page(found):
    """The lines of the table in docs/released.md, and of what made it."""
    rows = {row["name"]: row for row in found["rows"] if row["group"] in ("encoder", "LoRA step") and "ms" in row}
    names = {
        "eager, float32, batch 8": "embedding 8 volumes, float32",
        "eager, bf16, batch 8": "embedding 8 volumes, bf16",
        "eager, bf16, batch 1": "embedding one volume, bf16",
        "batch 8, 8 at a time, with checkpointing": "a training step, batch 8 at once",
        "batch 8, 2 at a time, with checkpointing": "a training step, batch 8, two volumes at a time",
        "batch 32, 2 at a time, with checkpointing": "a training step, batch 32, two volumes at a time",
    }
    lines = ["| on a GPU | time | volumes a second | memory |", "|---|---|---|---|"]
    for name, says in names.items():
        row = rows[name]
        rate, peak = row["volumes_per_second"], row["peak_bytes"] / 1e9
        lines.append(f"| {says} | {row['ms'] / 1e3:.3g} s | {rate:.3g} | {peak:.1f} GB |")
    versions = ", ".join(f"{name} {found['made_with']['versions'][name]}" for name in ("torch", "cuda", "transformers"))
    return [*lines, "", f"*{found['made_with']['device']}, {versions}.*"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cpu, to try the program")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the program")
    parser.add_argument("--minutes", type=float, default=8.0, help="rows that would take longer are skipped")
    parser.add_argument(
        "--only", nargs="+", help="measure rows whose group or name holds one of these, keep the others"
    )
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile")
    parser.add_argument("--output", type=Path, default=HERE / "gpu.json", help="where to write")
    parser.add_argument("--page", action="store_true", help="print the table for docs/released.md, measure nothing")
    arguments = parser.parse_args()
    if arguments.page:
        print(*page(json.loads(arguments.output.read_text(encoding="utf-8"))), sep="\n")
        return
    device = arguments.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing measured, bench/gpu.json stays as it is")
        return
    transformers.logging.set_verbosity_error()
    started = time.monotonic()
    head, earlier = {"made_with": made_with(device, arguments.tiny)}, ()
    lab = Lab(device, arguments.tiny, arguments.compile_backend)
    planned = rows()
    if arguments.only:
        planned = [
            r
            for r in planned
            if r.group in ("ceilings", "reference") or any(word in f"{r.group}: {r.name}" for word in arguments.only)
        ]
        if arguments.output.exists():
            earlier = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
    table = Table(arguments.output, head, earlier)
    measure(lab, planned, table, arguments.minutes - (time.monotonic() - started) / 60)
    missed = False
    for name, bar in table.bars().items():
        best, wanted = bar.values()
        over = best is None or (best > wanted if "bar" in bar else best < wanted)
        missed |= over and "bar" in bar and lab.gpu
        print(f"{'MISSED' if over else 'met   '} {name.replace('_', ' ')}: {best} of {wanted}")
    sys.exit(missed)


if __name__ == "__main__":
    main()
