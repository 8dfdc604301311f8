"""Measure the memory of a LoRA step of the full-size model, on tensors without data: no GPU needed.

`make bench` runs it. The step is that of `finetune` (preset "paper", contrastive loss, bf16 autocast, AdamW),
dispatched as on a CPU, but with the casts of a GPU's autocast. A GPU may choose other kernels, and each needs room
while it runs that counts nowhere here; bench/gpu.py measures one where there is one. Writes bench/memory.json.
"""

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import transformers
from printing import all_met, made_with
from torch._subclasses.fake_tensor import FakeTensorMode

from medctkit.common.provenance import write_json
from medctkit.lora.adapter import add_lora
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.training.loop import step_gradients
from medctkit.training.memory import PeakMemory, cast_frozen
from medctkit.training.settings import FineTuneConfig

HERE = Path(__file__).resolve().parent
WORDS = 128  # tokens of the longest report, FineTuneConfig's default
BATCHES = (1, 2, 8, 32)
CACHED = ((8, 1), (32, 2))  # contrastive batch, volumes embedded at a time
MEASURES = {  # checkpointing, frozen weights in bf16
    "float32 weights": (False, False),
    "frozen weights in bf16": (False, True),
    "checkpointing": (True, False),
    "checkpointing and bf16": (True, True),
}
BEST = "checkpointing and bf16"
BAR_BATCH, BAR_BYTES = 8, 8e9
TINY_VISION = {"dim": 32, "codebook_size": 24, "image_size": 32, "num_frames": 8, "patch_size": 16}
TINY_VISION |= {"temporal_patch_size": 4, "spatial_depth": 2, "temporal_depth": 1, "dim_head": 8, "heads": 4}
TINY_TEXT = {"vocab_size": 100, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_TEXT |= {"intermediate_size": 40, "max_position_embeddings": WORDS}


@contextmanager
def autocast_of_a_gpu():
    """Make the CPU's autocast compute in float32 what a GPU's does, of what CT-CLIP uses: layer norms and norms.

    After the list of CUDA operations that autocast to float32 in the documentation of torch.amp.
    """

    def layer_norm(x, shape, weight=None, bias=None, *rest):
        weight, bias = (y if y is None else y.float() for y in (weight, bias))
        with torch.autocast("cpu", enabled=False):
            return torch.layer_norm(x.float(), shape, weight, bias, *rest)

    def vector_norm(x, *args, dtype=None, **kwargs):
        with torch.autocast("cpu", enabled=False):
            return torch.linalg.vector_norm(x, *args, dtype=torch.float32, **kwargs)

    library = torch.library.Library("aten", "IMPL")
    library.impl("layer_norm", layer_norm, "AutocastCPU")
    library.impl("linalg_vector_norm", vector_norm, "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def without_data(config, checkpointing, half):
    """A CT-CLIP with LoRA in training mode; in the block all tensors are without data."""
    with torch.device("meta"):
        model = add_lora(CTCLIPModel(config), "paper").train()
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    if half:
        cast_frozen(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield model.to_empty(device="cpu")


def small_batch(config, n):
    """What `dataset.collate` gives, without data."""
    return {
        "study": ["study"] * n,
        "report_id": torch.arange(n),
        "labels": torch.zeros(n, 18),
        "pixel_values": torch.empty(n, 1, *config.volume_shape),
        "input_ids": torch.ones(n, WORDS, dtype=torch.long),
        "attention_mask": torch.ones(n, WORDS, dtype=torch.long),
    }


def small_batches(config, n):
    """One after the other, each held until the next is asked for, as a loop over a data loader does."""
    while True:
        batch = small_batch(config, n)
        yield batch
        del batch


def size(tensors):
    """Bytes."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def step_memory(config, batch, at_a_time, checkpointing, half, accelerator):
    """Bytes at the highest of one step after the first, and what they are made of."""
    with without_data(config, checkpointing, half) as model:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        state = [x for entry in optimizer.state.values() for x in entry.values()]
        batches, parts = small_batches(config, at_a_time), batch // at_a_time
        with PeakMemory([*model.parameters(), *model.buffers(), *state]) as memory:
            weights = memory.now_bytes - size(state)
            step_gradients(model, batches, parts, FineTuneConfig(steps=1, prompt_weight=0.0), accelerator)
            optimizer.step()
    known = {
        "weights": weights,
        "input_volumes": 4 * at_a_time * torch.Size(config.volume_shape).numel(),
        "gradients_and_optimiser_state": size(trained) + size(state),
    }
    return {"peak": memory.peak_bytes} | known | {"activations_and_the_rest": memory.peak_bytes - sum(known.values())}


def measure(config, batches, cached):
    """All numbers of memory.json."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    print(
        f"{'peak of one step, GB':52} {'peak':>7} {'weights':>7} {'volumes':>7} {'optim.':>7} {'rest':>7}", flush=True
    )
    steps = []
    for batch, at_a_time in [*((batch, batch) for batch in batches), *cached]:
        for name, measures in MEASURES.items():
            if batch > at_a_time and name != BEST:
                continue
            found = step_memory(config, batch, at_a_time, *measures, accelerator)
            steps.append({"batch": batch, "volumes_at_a_time": at_a_time, "measures": name} | found)
            row = f"batch {batch:2}, {at_a_time:2} at a time, {name}"
            print(f"  {row:50}", *(f"{value / 1e9:7.3f}" for value in found.values()), flush=True)
    return {"bytes_of_a_step": steps}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the program")
    parser.add_argument("--output", type=Path, default=HERE / "memory.json", help="where to write")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    config = CTCLIPConfig(TINY_VISION, TINY_TEXT, 16) if arguments.tiny else CTCLIPConfig()
    # there are no numbers to look at
    with autocast_of_a_gpu(), mock.patch("medctkit.training.loop.refuse_non_finite"):
        found = measure(config, (BAR_BATCH,), ()) if arguments.tiny else measure(config, BATCHES, CACHED)
    (at_bar,) = (
        row["peak"]
        for row in found["bytes_of_a_step"]
        if row["batch"] == row["volumes_at_a_time"] == BAR_BATCH and row["measures"] == BEST
    )
    said = f"batch {BAR_BATCH}: {at_bar / 1e9:.2f} GB, at most {BAR_BYTES / 1e9:.0f}"
    met = all_met([(at_bar <= BAR_BYTES, said)])
    found |= {
        "against_the_bar": {"batch": BAR_BATCH, "bytes": at_bar, "bar": BAR_BYTES},
        "made_with": made_with(
            "make bench",
            "medctkit torch transformers peft accelerate",
            model="toy" if arguments.tiny else "full size",
            device="tensors without data, CPU dispatch with the casts of a GPU's autocast",
            precision="bf16 autocast",
            tokens_per_report=WORDS,
        ),
    }
    write_json(found, arguments.output)
    sys.exit(not met)


if __name__ == "__main__":
    main()
