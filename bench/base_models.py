"""Measure three base models side by side: parameters, LoRA counts, and one volume's CPU seconds and memory.

`make bench-open` runs it, 15 minutes. Each model is built by its own library's classes at its released sizes, with
random weights, in a process of its own; one volume goes through its image tower, in float32, on one thread. Seconds are
those that the processor worked, so that others who use the machine count little; memory is the process's highest.
Writes bench/base_models.json, and its table into docs/base_models.md.
"""

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

from printing import made_with, peak_bytes, publish

RANK = 24
# Of Merlin's package: spacing (x, y, z) in its transforms, towards right, front, head; its text tower's sizes (those of
# Longformer-base), which the package does not hold.
MERLIN_SHAPE, MERLIN_SPACING = (224, 224, 160), (1.5, 1.5, 3.0)
LONGFORMER = {"vocab_size": 50265, "max_position_embeddings": 4098, "type_vocab_size": 1, "pad_token_id": 1}
MERLIN_LORA = {
    "text": r"encode_text\.text_encoder\.encoder\.layer\.\d+\.attention\.self\.(query|key|value)(_global)?",
    "convolutions": r"encode_image\.i3_resnet\.layer\d\..*(conv\d|downsample\.0)",
}


def ct_clip():
    from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel

    return CTCLIPModel(CTCLIPConfig()).eval()


def colipri():
    from colipri.checkpoint import load_model_config

    from medctkit.model.colipri import build

    return build(load_model_config())


def merlin():
    import torchvision
    from merlin.models import build
    from transformers import LongformerConfig, LongformerModel

    text, image = LongformerModel(LongformerConfig(**LONGFORMER)), torchvision.models.resnet152(weights=None)
    with (  # where it would download weights
        mock.patch.object(build.AutoModel, "from_pretrained", lambda name: text),
        mock.patch.object(build.AutoTokenizer, "from_pretrained", lambda name: None),
        mock.patch.object(torchvision.models, "resnet152", lambda pretrained: image),
    ):
        return build.MerlinArchitecture().eval()


BUILD = {"CT-CLIP": ct_clip, "COLIPRI": colipri, "Merlin": merlin}
IMAGE = ("visual_transformer", "to_visual_latent", "image_encoder", "encode_image")
TEXT = ("text_transformer", "to_text_latent", "text_encoder", "encode_text")


def measure(name, counts):
    """The entry of one model; with `counts` no volume goes through it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from medctkit.lora.adapter import add_lora
    from medctkit.lora.counting import count_trainable

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.device("meta" if counts else "cpu"):
        model = BUILD[name]()
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    of = [sum(size for n, size in sizes.items() if n.split(".")[0] in side) for side in (IMAGE, TEXT)]
    ours = hasattr(model, "preprocess_config")
    shape = model.preprocess_config.shape if ours else MERLIN_SHAPE
    lora, found = {}, {}
    if not counts:
        volume = torch.rand(1, 1, *shape) * 2 - 1
        started = time.process_time()
        with torch.no_grad():
            model.encode_image(volume)
        found["cpu_seconds_of_a_volume"] = time.process_time() - started
        found["peak_memory_bytes"] = peak_bytes()
    model = model.to("meta")
    for preset, pattern in (dict.fromkeys(model.parts.presets) if ours else MERLIN_LORA).items():
        with torch.device("meta"):
            plain, config = copy.deepcopy(model), LoraConfig(r=RANK, target_modules=pattern)
            adapted = add_lora(plain, preset, r=RANK) if ours else get_peft_model(plain, config)
        lora[preset] = count_trainable(adapted)
    return {
        "parameters": sum(sizes.values()),
        "image_tower": of[0],
        "text_tower": of[1],
        "input_voxels": list(shape),
        "input_spacing_mm": list(model.preprocess_config.spacing if ours else MERLIN_SPACING),
        "lora": lora,
    } | found


def page(found):
    """The table of docs/base_models.md."""

    def row(name, of):
        return f"| {name} | " + " | ".join(of(found[model]) for model in BUILD) + " |"

    def millions(n):
        return f"{n / 1e6:.1f} M"

    def volume(entry):
        sides = (entry["input_voxels"], entry["input_spacing_mm"])
        return ", ".join(" x ".join(f"{x:g}" for x in side) for side in sides)

    rows = [
        "| measured | " + " | ".join(BUILD) + " |",
        "|---|" + "---|" * len(BUILD),
        row("parameters", lambda e: millions(e["parameters"])),
        row("image tower, text tower", lambda e: f"{millions(e['image_tower'])}, {millions(e['text_tower'])}"),
        row("input: voxels, mm", volume),
    ]
    if "peak_memory_bytes" in found["Merlin"]:
        rows.append(row("one volume, CPU seconds", lambda e: f"{e['cpu_seconds_of_a_volume']:.0f}"))
        rows.append(row("one volume, memory", lambda e: f"{e['peak_memory_bytes'] / 1e9:.1f} GB"))
    for preset in dict.fromkeys(preset for model in BUILD for preset in found[model]["lora"]):
        rows.append(
            row(f'LoRA "{preset}", r = {RANK}', lambda e, p=preset: f"{e['lora'][p]:,}" if p in e["lora"] else "-")
        )
    return rows


def processor():
    """What the seconds are of."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=BUILD, help="measure this one only, and print it")
    parser.add_argument("--counts", action="store_true", help="parameters alone, in a minute")
    parser.add_argument("--output", type=Path, help="where to write; by default here and in docs/base_models.md")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.counts)))
        return
    found = {}
    for name in BUILD:
        command = [sys.executable, __file__, "--one", name, *(["--counts"] if arguments.counts else [])]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one_thread)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
    command = "python bench/base_models.py --counts" if arguments.counts else "make bench-open"
    packages = "medctkit torch transformers peft colipri merlin-vlm timm"
    found["made_with"] = made_with(command, packages, weights="random", threads=1, processor=processor())
    publish("base_models", found, "base_models.md", page(found), arguments.output)


if __name__ == "__main__":
    main()
