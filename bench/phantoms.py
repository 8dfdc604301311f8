"""Measures how fast phantoms are made: at the size of training, and at full size.

`make bench` runs it. Bars: 0.15 s of one core a study at 64 x 96 x 96, 25 s and 3 GB at 240 x 512 x 512.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # one core; before numpy is imported

from printing import all_met, made_with, peak_bytes

from medctkit.common.provenance import write_json
from medctkit.phantom.study import generate

HERE = Path(__file__).resolve().parent
SMALL, FULL = (64, 96, 96), (240, 512, 512)
BARS = {"small_s": 0.15, "full_s": 25.0, "full_gb": 3.0}


def seconds(seeds, shape, repeats=1) -> float:
    """Processor time a study, of both hospitals by turns; of each study the least of some repeats."""
    return statistics.mean(min(once(seed, shape) for _ in range(repeats)) for seed in seeds)


def once(seed, shape) -> float:
    """Processor time of one study."""
    start = time.process_time()
    generate(seed, ("source", "target")[seed % 2], shape=shape)
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE / "phantoms.json", help="where to write")
    arguments = parser.parse_args()
    seconds(range(6), (16, 32, 32))  # compiled, once on a machine
    found = {"small_s": seconds(range(40), SMALL, repeats=5), "full_s": seconds([3], FULL)}
    found["full_gb"] = peak_bytes() / 1e9
    met = all_met((found[n] <= bar, f"{n:8} {found[n]:.3g}, at most {bar:g}") for n, bar in BARS.items())
    found["made_with"] = made_with("make bench", "numpy scipy numba", cores=1)
    write_json(found, arguments.output)
    sys.exit(not met)


if __name__ == "__main__":
    main()
