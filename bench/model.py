"""Measure the full-size model on this machine: seconds, GFLOP and share of the matrix-product rate, part by part.

`make bench` runs it. The weights are random, which costs what trained ones cost. The public code's seconds are those
measured on two cores of a machine whose 2048 x 2048 float32 matrix product ran at 134 GFLOP/s; the bars are
scaled by the rate measured here. Writes bench/model.json.
"""

import os
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from printing import all_met, made_with
from torch.utils.flop_counter import FlopCounterMode

from medctkit.common.provenance import write_json
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel

HERE = Path(__file__).resolve().parent
SEED, REPEATS = 0, 3
PUBLIC_RATE = 134.0  # GFLOP/s
PUBLIC_SECONDS = {"vision encoder": 18.4, "one volume against 18 prompt pairs": 390.0}  # the lower of those measured
BARS = {"vision encoder": 0.5, "one volume against 18 prompt pairs": 1 / 35}
PROMPTS, WORDS = 36, 12  # 18 pairs; tokens of the longest


def matrix_product_rate():
    """GFLOP/s of a 2048 x 2048 float32 matrix product, the best of ten."""
    a, b = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times) / 1e9


def parts_of(model):
    """Name of the part -> its modules."""
    tower = model.visual_transformer
    parts = {"patches": [tower.to_patch_emb], "relative-position bias": [tower.spatial_rel_pos_bias]}
    for name in ("spatial", "temporal"):
        layers = getattr(tower, f"enc_{name}_transformer").layers
        for part, key in (("attention", "1"), ("feed-forward", "3"), ("position convolution", "0")):
            parts[f"{name} {part}"] = [layer[key] for layer in layers]
    parts["quantisation"] = [tower.vq]
    parts["vision encoder"] = [tower]
    parts["projection of the volume"] = [model.to_visual_latent]
    parts["36 prompts"] = [model.text_transformer]
    return parts


class Stopwatch:
    """Adds up the seconds that each part's modules take."""

    def __init__(self, parts):
        self.seconds, self._started, self._hooks = defaultdict(float), {}, []
        for name, modules in parts.items():
            for module in modules:
                self._hooks.append(module.register_forward_pre_hook(self._start(name), with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._stop(name), with_kwargs=True))

    def _start(self, name):
        def hook(*_):
            self._started[name] = time.perf_counter()

        return hook

    def _stop(self, name):
        def hook(*_):
            self.seconds[name] += time.perf_counter() - self._started[name]

        return hook

    def remove(self):
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()


def gflop_of(model, parts, run):
    """GFLOP of each part, counted by torch while `run` runs once."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()
    names = {module: name for name, module in model.named_modules()}

    def of(module):
        return sum(counts.get(f"{type(model).__name__}.{names[module]}", {}).values())

    return {part: sum(map(of, modules)) / 1e9 for part, modules in parts.items()}


def main():
    torch.manual_seed(SEED)
    print("making a CT-CLIP of full size with random weights", flush=True)
    model = CTCLIPModel(CTCLIPConfig()).eval()
    volume = torch.rand(1, 1, *model.config.volume_shape) * 2 - 1
    words = torch.randint(1000, 30_000, (PROMPTS, WORDS))
    parts, seconds, whole = parts_of(model), {}, []

    @torch.inference_mode()
    def run():
        return model(volume, words).logits_per_image

    run()
    rates = [matrix_product_rate()]
    for _ in range(REPEATS):
        watch = Stopwatch(parts)
        started = time.perf_counter()
        run()
        whole.append(time.perf_counter() - started)
        watch.remove()
        seconds = {name: min(seconds.get(name, 1e9), value) for name, value in watch.seconds.items()}
        rates.append(matrix_product_rate())
    rate, gflop = max(rates), gflop_of(model, parts, run)
    seconds["one volume against 18 prompt pairs"] = min(whole)
    gflop["one volume against 18 prompt pairs"] = (
        gflop["vision encoder"] + gflop["projection of the volume"] + gflop["36 prompts"]
    )
    table = {
        name: {
            "seconds": seconds[name],
            "gflop": gflop[name],
            "share_of_matrix_product_rate": gflop[name] / seconds[name] / rate,
        }
        for name in seconds
    }
    print(f"{'matrix product, float32':38} {rate:8.0f} GFLOP/s\n{'part':38} {'s':>8} {'GFLOP':>8} {'of rate':>8}")
    for name, row in table.items():
        print(f"{name:38} {row['seconds']:8.3f} {row['gflop']:8.1f} {row['share_of_matrix_product_rate']:8.0%}")
    shares = {name: seconds[name] / (PUBLIC_SECONDS[name] * PUBLIC_RATE / rate) for name in BARS}
    said = "{}: {:.3f} of the public code's time, at most {:.3f}"
    met = all_met((shares[name] <= bar, said.format(name, shares[name], bar)) for name, bar in BARS.items())
    device = f"CPU, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    how = {"device": device, "precision": "float32", "seed": SEED}
    found = {
        "matrix_product_gflop_per_second": rate,
        "parts": table,
        "against_the_public_code": {n: {"share_of_public_seconds": shares[n], "bar": bar} for n, bar in BARS.items()},
        "made_with": made_with("make bench", "medctkit torch transformers", **how),
    }
    write_json(found, HERE / "model.json")
    sys.exit(not met)


if __name__ == "__main__":
    main()
