"""Measure the full-size model on a GPU: its parts in three precisions, torch.compile, and the LoRA step.

`make bench` runs it; without a GPU it says so and changes nothing. The weights are random, which costs what trained
ones cost. Shares are of the rate of a bf16 matrix product measured on the same GPU. Writes bench/gpu.json.
"""

import argparse
import json
import platform
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import peft
import torch
import transformers
from memory import BAR_BATCH, BAR_BYTES, TINY_TEXT, TINY_VISION, WORDS
from model import PROMPTS, Stopwatch, gflop_of, parts_of
from model import WORDS as PROMPT_WORDS
from torch.utils.flop_counter import FlopCounterMode

import medctkit
from medctkit.common.atomic import replacing
from medctkit.lora.adapter import add_lora
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.training.memory import cast_frozen

HERE = Path(__file__).resolve().parent
SEED, REPEATS = 0, 5
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCHES = (1, BAR_BATCH, 32)


def wait(device):
    """Until the GPU has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device, dtype):
    """Autocast to `dtype`; None: float32, TF32 off."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def best_of(run, device, repeats=REPEATS):
    """Seconds of the quickest of some runs."""
    times = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def matrix_product_rate(device, n):
    """GFLOP/s of an n x n bf16 matrix product."""
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / best_of(lambda: a @ b, device, 20) / 1e9


class WaitingStopwatch(Stopwatch):
    """Lets the GPU finish before it looks at the clock."""

    def __init__(self, parts, device):
        self.device = device
        super().__init__(parts)

    def _waiting(self, hook):
        def after_waiting(*_):
            wait(self.device)
            hook()

        return after_waiting

    def _start(self, name):
        return self._waiting(super()._start(name))

    def _stop(self, name):
        return self._waiting(super()._stop(name))


def parts_table(model, device, dtype, rate):
    """Seconds, GFLOP and share of the rate of every part, for one volume and 18 prompt pairs."""
    volume = torch.rand(1, 1, *model.config.volume_shape, device=device) * 2 - 1
    words = torch.randint(1, model.config.text_config["vocab_size"], (PROMPTS, PROMPT_WORDS), device=device)
    parts, seconds = parts_of(model), {}

    @torch.inference_mode()
    def run():
        with autocast(device, dtype):
            model(volume, words)

    run()
    for _ in range(REPEATS):
        watch = WaitingStopwatch(parts, device)
        run()
        watch.remove()
        seconds = {name: min(seconds.get(name, 1e9), value) for name, value in watch.seconds.items()}
    gflop = gflop_of(model, parts, run)
    return {
        name: {"seconds": s, "gflop": gflop[name], "share_of_bf16_rate": gflop[name] / s / rate}
        for name, s in seconds.items()
    }


def inference(model, device, dtype, backend):
    """Seconds of embedding one volume as it is and compiled, and of compiling."""
    volume = torch.rand(1, 1, *model.config.volume_shape, device=device) * 2 - 1

    def seconds(encode):
        @torch.inference_mode()
        def run():
            with autocast(device, dtype):
                encode(volume)

        return best_of(run, device, 1), best_of(run, device)

    found = {"seconds": seconds(model.encode_image)[1]}
    torch.compiler.reset()
    try:
        first, found["seconds_compiled"] = seconds(torch.compile(model.encode_image, backend=backend))
        found["seconds_to_compile"] = first - found["seconds_compiled"]
    except Exception as error:  # no compiler on this machine, or a GPU it does not know: one row fewer
        found["not_compiled"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return found


def lora_step(config, batch, device, rate):
    """Milliseconds, volumes per second, GFLOP, share of the rate and peak bytes of a LoRA step; None: out of memory."""
    with device:
        model = add_lora(CTCLIPModel(config), "paper").train()
    model.get_base_model().gradient_checkpointing_enable()
    cast_frozen(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step(volumes, words):
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(pixel_values=volumes, input_ids=words, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def inputs(n):
        volumes = torch.rand(n, 1, *config.volume_shape, device=device).mul_(2).sub_(1)
        return volumes, torch.randint(1, config.text_config["vocab_size"], (n, WORDS), device=device)

    try:
        with FlopCounterMode(display=False) as counter:
            step(*inputs(1))
        gflop, given = counter.get_total_flops() / 1e9 * batch, inputs(batch)
        step(*given)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = best_of(lambda: step(*given), device)
    except torch.OutOfMemoryError:
        return None
    return {
        "milliseconds": 1e3 * seconds,
        "volumes_per_second": batch / seconds,
        "gflop_with_recomputation": gflop,
        "share_of_bf16_rate": gflop / seconds / rate,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def show_parts(name, table):
    """Print one precision."""
    print(f"{'part, ' + name:38} {'ms':>9} {'GFLOP':>8} {'of rate':>8}")
    for part, row in table.items():
        print(
            f"  {part:36} {1e3 * row['seconds']:9.3f} {row['gflop']:8.1f} {row['share_of_bf16_rate']:8.0%}", flush=True
        )


def measure(config, device, n, backend):
    """All numbers of gpu.json."""
    rate = matrix_product_rate(device, n)
    print(f"{'matrix product, bf16':38} {rate:9.0f} GFLOP/s", flush=True)
    with device:
        model = CTCLIPModel(config).eval()
    parts, images = {}, {}
    for name, dtype in PRECISIONS.items():
        parts[name] = parts_table(model, device, dtype, rate)
        show_parts(name, parts[name])
    for name, dtype in PRECISIONS.items():
        images[name] = inference(model, device, dtype, backend)
        print(f"one volume, {name}:", ", ".join(f"{key} {value}" for key, value in images[name].items()), flush=True)
    del model
    steps = []
    for batch in BATCHES:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        row = lora_step(config, batch, device, rate)
        steps.append({"batch": batch} | (row or {"out_of_memory": True}))
        print("LoRA step:", ", ".join(f"{key} {value}" for key, value in steps[-1].items()), flush=True)
    return {
        "bf16_matrix_product_gflop_per_second": rate,
        "parts": parts,
        "one_volume": images,
        "lora_step_with_checkpointing_and_frozen_weights_in_bf16": steps,
    }


def made_with(device, tiny):
    """Where the numbers come from."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {platform.machine()}"
    return {
        "command": "make bench",
        "model": "toy" if tiny else "full size",
        "device": name,
        "device_bytes": torch.cuda.get_device_properties(device).total_memory if gpu else None,
        "seed": SEED,
        "versions": {
            "medctkit": medctkit.__version__,
            "python": platform.python_version(),
            **{package.__name__: package.__version__ for package in (torch, transformers, peft)},
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if gpu else None,
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cpu, to try the program")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the program")
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile")
    parser.add_argument("--output", type=Path, default=HERE / "gpu.json", help="where to write")
    arguments = parser.parse_args()
    device = arguments.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing measured, bench/gpu.json stays as it is")
        return
    torch.manual_seed(SEED)
    transformers.logging.set_verbosity_error()
    config = CTCLIPConfig(TINY_VISION, TINY_TEXT, 16) if arguments.tiny else CTCLIPConfig()
    found = measure(config, device, 256 if arguments.tiny else 8192, arguments.compile_backend)
    steps = found["lora_step_with_checkpointing_and_frozen_weights_in_bf16"]
    (at_bar,) = (row for row in steps if row["batch"] == BAR_BATCH)
    peak = at_bar.get("peak_bytes")
    missed = "out_of_memory" in at_bar or (peak or 0) > BAR_BYTES
    if device.type == "cuda":
        taken = "out of memory" if peak is None else f"{peak / 1e9:.2f} GB"
        print(f"{'MISSED' if missed else 'met   '} batch {BAR_BATCH}: {taken}, at most {BAR_BYTES / 1e9:.0f} GB")
    found |= {
        "against_the_bar": {"batch": BAR_BATCH, "bytes": peak, "bar": BAR_BYTES},
        "made_with": made_with(device, arguments.tiny),
    }
    with replacing(arguments.output) as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(missed)


if __name__ == "__main__":
    main()
