"""What bench/gpu.py measures, row by row, the most important rows first."""

import itertools
import json
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from gpu_lab import BATCH, Row, difference, embed
from gpu_operators import operator_rows
from memory import WORDS, small_batch
from model import PROMPTS
from model import WORDS as PROMPT_WORDS
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from medctkit.lora.adapter import add_lora, merge_lora
from medctkit.lora.counting import count_trainable
from medctkit.lora.methods import METHODS, apply_method
from medctkit.lora.placement import lora_config
from medctkit.model import fast_paths
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.training.loop import step_gradients
from medctkit.training.memory import cast_frozen
from medctkit.training.settings import FineTuneConfig

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "tests" / "golden"
FINDINGS, ADAPTERS = 18, 8
FEW = {"most": 3, "seconds": 3.0}  # runs of what takes long


# --- ceilings


def ceilings(lab):
    """Matrix products in GFLOP/s, and bytes read and written by a copy per second."""
    n, found = 256 if lab.tiny else 8192, {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("float32", torch.float32)):
        a, b = torch.randn(2, n, n, device=lab.device).to(dtype)
        found[f"{name}_gflop_per_second"] = 2 * n**3 / lab.time(lambda a=a, b=b: a @ b)["ms"] / 1e6
    source = torch.randn(2**16 if lab.tiny else 2**29, device=lab.device)
    target = torch.empty_like(source)
    milliseconds = lab.time(lambda: target.copy_(source))["ms"]
    lab.ceilings = found | {"copy_bytes_per_second": 2 * source.nbytes / milliseconds * 1e3, "matrix_product": n}
    return lab.ceilings


def volume_to_device(lab):
    """Milliseconds that one volume takes from the memory of the machine."""
    volume = torch.rand(lab.config.volume_shape)
    kinds = {"float32": volume, "bf16": volume.bfloat16()}
    if lab.gpu:
        kinds |= {f"{name}_pinned": x.pin_memory() for name, x in kinds.items()}
    return {f"ms_{name}": lab.time(lambda x=x: x.to(lab.device, non_blocking=True))["ms"] for name, x in kinds.items()}


# --- right or wrong


def golden(lab, dtype):
    """The small model of tests/golden against what the public implementation computes in float32 on a CPU."""
    tensors = load_file(GOLDEN / "ctclip_small.safetensors")
    sizes = json.loads((GOLDEN / "ctclip_small.json").read_text())
    config = CTCLIPConfig(sizes["vit"] | {"num_frames": sizes["frames"]}, sizes["text"], sizes["dim_latent"])
    state = {name.removeprefix("state."): x for name, x in tensors.items() if name.startswith("state.")}
    model = CTCLIPModel.from_released_checkpoint(state, config).to(lab.device)
    volumes, words, mask = (
        tensors[f"input.{name}"].to(lab.device) for name in ("image", "input_ids", "attention_mask")
    )
    expected = {name: tensors[f"expect.{name}"] for name in ("codebook_indices", "image_latents", "text_latents")}
    tower = model.visual_transformer
    with torch.inference_mode(), lab.autocast(dtype):
        codes = tower.vq.nearest(tower.encode(volumes)).cpu()
        found = {
            "codes_flipped": (codes != expected["codebook_indices"]).double().mean().item(),
            "codes": codes.numel(),
            "image_difference": difference(model.encode_image(volumes), expected["image_latents"]),
            "text_difference": difference(model.encode_text(words, mask), expected["text_latents"]),
        }
        right = expected["codebook_indices"].to(lab.device)
        tower.vq.nearest = lambda x: right
        image, tokens = embed(model, volumes)
        found["image_difference_with_the_right_codes"] = difference(image, expected["image_latents"])
        with torch.autocast(lab.device.type, enabled=False):
            image = F.normalize(model.to_visual_latent(tokens.float().mean(1).flatten(1)), dim=-1)
        found["and_projection_in_float32"] = difference(image, expected["image_latents"])
    return found | {"bar": 1e-3}


def reference(lab):
    """Seconds of one volume in float32 on the CPU, against which embeddings and codes are compared."""
    found = {"gflop_per_volume": lab.gflop, "threads": torch.get_num_threads()}
    started = time.perf_counter()
    embedding, _ = lab.reference
    return found | {"seconds": time.perf_counter() - started, "length": embedding.norm().item()}


# --- vision encoder


def encoder(lab, dtype, batch, way="eager", profile=False, half=False, mends=True):
    """Embedding `batch` volumes, against the reference.

    Args:
        lab: where.
        dtype: of autocast.
        batch: volumes.
        way: eager, blocks (each layer and the patches compiled), compiled, reduce-overhead (compiled, with CUDA graphs)
            or graph (a CUDA graph of the eager model).
        profile: also list the kernels.
        half: weights and volumes in bf16 but for the codebook, no autocast.
        mends: with what the package does otherwise on a GPU in half precision.
    """
    model, volumes = lab.fresh().requires_grad_(False), lab.volumes(batch)
    tower = model.visual_transformer
    precision = partial(lab.autocast, dtype, cache_enabled=False)
    if half:
        codes = tower.vq._codebook.embed
        model.bfloat16()
        tower.vq._codebook.embed, volumes, precision = codes, volumes.bfloat16(), nullcontext
    encode = model.encode_image
    compiled = way in ("blocks", "compiled", "reduce-overhead")
    if compiled:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        blocks = [tower.to_patch_emb, *tower.enc_spatial_transformer.layers, *tower.enc_temporal_transformer.layers]
        for block in blocks if way == "blocks" else ():
            block.forward = lab.compile(block.forward)
        if way != "blocks":
            encode = lab.compile(encode, **({"mode": way} if way == "reduce-overhead" else {}))

    @torch.inference_mode()
    def run():
        with precision(), nullcontext() if mends else mock.patch.object(fast_paths, "_half", lambda x: None):
            return encode(volumes)

    timed, replay = recorded(run) if way == "graph" else (run, run)
    found = lab.rates(lab.time(timed), lab.gflop * batch, batch)
    found["difference"] = difference(replay()[:1], lab.reference[0])
    if way in ("eager", "blocks"):
        with torch.inference_mode(), precision():
            tokens = embed(model, volumes)[1][0].cpu()
        right = lab.reference[1][0].to(tokens.dtype)  # codes are rounded where all else is
        found["codes_flipped"] = (tokens != right).any(-1).double().mean().item()
    if compiled:
        counters = torch._dynamo.utils.counters
        found |= {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}
    if profile:
        found["kernels"] = lab.kernels(timed)
    return found


def recorded(run):
    """A CUDA graph of `run`: what replays it, and what replays it and gives its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay():
        graph.replay()
        return out

    return graph.replay, replay


# --- LoRA step


def lora_model(lab, method=None):
    """A CT-CLIP with preset "paper" or another method in training mode, frozen weights in bf16, with its optimiser."""
    model = (apply_method(lab.fresh(), method) if method else add_lora(lab.fresh(), "paper")).train()
    cast_frozen(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return model, optimizer, Accelerator(cpu=not lab.gpu, mixed_precision="bf16")


def lora_stepper(lab, batch, micro, checkpointing, method=None):
    """A function that does one step of the contrastive loss, as `finetune` does it."""
    model, optimizer, accelerator = lab.hold(method or "LoRA", partial(lora_model, lab, method))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.gradient_checkpointing_enable() if checkpointing else base.gradient_checkpointing_disable()
    small = small_batch(lab.config, micro) | {"pixel_values": lab.volumes(micro)}
    small["input_ids"] = torch.randint(1, lab.config.text_config["vocab_size"], (micro, WORDS))
    small = {name: x.to(lab.device) if isinstance(x, torch.Tensor) else x for name, x in small.items()}
    parts, config = batch // micro, FineTuneConfig(steps=1, prompt_weight=0.0)
    # the same volumes again and again, under other names: what is in them costs nothing
    batches = (small | {"report_id": small["report_id"] + micro * i} for i in itertools.cycle(range(parts)))

    def step():
        losses = step_gradients(model, batches, parts, config, accelerator)
        optimizer.step()
        optimizer.zero_grad()
        return losses

    return step


def estimate_of(batch, micro, checkpointing):
    """Bytes of this step in bench/memory.json, or of a whole batch as large as its small batches; None: neither."""
    known = json.loads((HERE / "memory.json").read_text())["bytes_of_a_step"]
    name = "checkpointing and bf16" if checkpointing else "frozen weights in bf16"
    peaks = {(row["batch"], row["volumes_at_a_time"]): row["peak"] for row in known if row["measures"] == name}
    return peaks.get((batch, micro), peaks.get((micro, micro)))


def lora_step(lab, batch, micro, checkpointing, profile=False):
    """One optimiser step; with small batches every volume is embedded twice."""
    step = lora_stepper(lab, batch, micro, checkpointing)
    if lab.gpu:
        torch.cuda.empty_cache()
    found = lab.time(step, **FEW)
    found |= {"volumes_per_second": batch / found["ms"] * 1e3, "loss": step()["loss"].item()}
    found |= {"batch": batch, "volumes_at_a_time": micro, "checkpointing": checkpointing}
    if lab.gpu:
        found["reserved_bytes"] = torch.cuda.max_memory_reserved(lab.device)
        if not lab.tiny and (estimate := estimate_of(batch, micro, checkpointing)):
            found |= {"estimate_bytes": estimate, "bytes_above_estimate": found["peak_bytes"] - estimate}
    if profile:
        found["kernels"] = lab.kernels(step)
    return found


def method_step(lab, method, batch=4):
    """One optimiser step of a way to fine-tune, and what it trains."""
    step = lora_stepper(lab, batch, batch, checkpointing=True, method=method)
    model, _, _ = lab.hold(method, None)
    return lab.time(step, **FEW) | {"batch": batch, "trained": count_trainable(model)}


def optimisers(lab):
    """Milliseconds of AdamW alone, plain and fused, on the adapter's parameters."""
    model, _, _ = lab.hold("LoRA", partial(lora_model, lab))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.randn_like(p)
    found = {"parameters": sum(p.numel() for p in trained), "tensors": len(trained)}
    for name, how in (("plain", {"foreach": False}), ("foreach", {"foreach": True}), ("fused", {"fused": True})):
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, **how)
        found[f"ms_{name}"] = lab.time(optimizer.step)["ms"]
    for p in trained:
        p.grad = None
    return found


# --- adapters at work


def adapted_model(lab):
    """One base with adapters 0 to 7, none of which is zero, and "default"."""
    model = add_lora(lab.fresh(), "paper", init_lora_weights=False)
    for i in range(ADAPTERS):
        model.add_adapter(str(i), lora_config("paper", init_lora_weights=False))
    return model.requires_grad_(False).eval()


def embedder(lab, model, dtype="bf16"):
    """A function of volumes."""

    @torch.inference_mode()
    def run(volumes):
        with lab.autocast(dtype):
            return model.encode_image(volumes)

    return run


def merged(lab, batch):
    """An adapter beside the weights, and merged into them."""
    model = lab.hold("adapters", partial(adapted_model, lab))
    model.set_adapter("0")
    volumes, plain, found = lab.volumes(batch), merge_lora(model), {}
    for name, one in (("unmerged", model), ("merged", plain)):
        found[f"ms_{name}"] = lab.time(partial(embedder(lab, one), volumes))["ms"]
    both = [embedder(lab, one, "float32")(volumes[:1]) for one in (model, plain)]
    return found | {"unmerged_to_merged": found["ms_unmerged"] / found["ms_merged"], "difference": difference(*both)}


def switched(lab, volumes, dtype="bf16"):
    """One volume after the other, each with an adapter of its own."""
    model = lab.hold("adapters", partial(adapted_model, lab))
    embeddings = []
    for i, volume in enumerate(volumes.split(1)):
        model.set_adapter(str(i))
        embeddings.append(embedder(lab, model, dtype)(volume))
    return torch.cat(embeddings)


def lora_layers(model):
    return [m for m in model.get_base_model().visual_transformer.modules() if hasattr(m, "lora_A")]


@contextmanager
def stacked(model, names):
    """All adapters of a layer in two batched products, added to what the base layer gives."""

    def listen(layer):
        a = torch.stack([layer.lora_A[name].weight for name in names])  # (adapters, r, in)
        b = torch.stack([layer.lora_B[name].weight * layer.scaling[name] for name in names])  # (adapters, out, r)

        def hook(module, given, out):
            x = given[0].reshape(len(names), -1, given[0].shape[-1])
            return out + (x @ a.mT @ b.mT).reshape(out.shape)

        return layer.register_forward_hook(hook)

    hooks = [listen(layer) for layer in lora_layers(model)]
    try:
        with model.disable_adapter():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def one_after_the_other(lab):
    """Eight volumes, each with an adapter of its own, switched in between; and what a switch takes."""
    model = lab.hold("adapters", partial(adapted_model, lab))
    volumes = lab.volumes(ADAPTERS)
    switch = lab.time(lambda: [model.set_adapter(str(i)) for i in range(ADAPTERS)])["ms"] / ADAPTERS
    with model.disable_adapter():
        base = lab.time(partial(embedder(lab, model), volumes))["ms"]
    return lab.time(partial(switched, lab, volumes), **FEW) | {"ms_base_in_one_batch": base, "ms_set_adapter": switch}


def mixed(lab):
    """Eight volumes, each with an adapter of its own, in one batch; right if equal to one after the other."""
    model = lab.hold("adapters", partial(adapted_model, lab))
    volumes = lab.volumes(ADAPTERS)
    right = switched(lab, volumes, "float32")
    with torch.inference_mode(), stacked(model, [str(i) for i in range(ADAPTERS)]):
        found = lab.time(partial(embedder(lab, model), volumes), **FEW)
        return found | {"difference": difference(embedder(lab, model, "float32")(volumes), right)}


# --- the public code's way


class OneHotQuantiser(nn.Module):
    """All similarities at once, and codes fetched by a product with one-hot rows."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, x):
        """As the module it stands for."""
        codes = self.plain._codebook.embed[0]
        return (F.one_hot(self.plain.nearest(x), len(codes)).to(codes.dtype) @ codes).to(x.dtype)


def public_way(model):
    """All scores of the attention in memory, the bias of all pairs at every call, one-hot rows: written anew."""
    plain = {quick: block for block, quick in fast_paths._QUICK.items()}
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
    model.visual_transformer.vq = OneHotQuantiser(model.visual_transformer.vq)


def zero_shot(lab):
    """One volume against 18 pairs of prompts: embedded once, or anew with each pair as the public code does."""
    found = {}
    for name, public, dtype in (("float32", False, "float32"), ("bf16", False, "bf16"), ("public", True, "float32")):
        whole, image, right = zero_shot_once(lab, public, dtype)
        found |= {
            f"ms_{name}": whole["ms"],
            f"ms_vision_encoder_{name}": image["ms"],
            f"peak_bytes_{name}": whole["peak_bytes"],
        }
        found[f"difference_{name}"] = difference(right, lab.reference[0])
    return found | {f"public_to_{name}": found["ms_public"] / found[f"ms_{name}"] for name in ("float32", "bf16")}


def zero_shot_once(lab, public, dtype):
    """Figures of the whole and of the vision encoder alone, and the embedding.

    The public code pads every prompt to the longest text that the model takes.
    """
    model = lab.fresh()
    if public:
        public_way(model)
    longest = lab.config.text_config["max_position_embeddings"]
    n, length = (2, longest) if public else (PROMPTS, PROMPT_WORDS)
    words = torch.randint(1, lab.config.text_config["vocab_size"], (n, length), device=lab.device)
    mask = (torch.arange(length, device=lab.device) < PROMPT_WORDS).long().expand(n, -1)
    volume = lab.volumes(1)

    @torch.inference_mode()
    def image():
        with lab.autocast(dtype):
            return model.encode_image(volume)

    @torch.inference_mode()
    def run():
        with lab.autocast(dtype):
            return [model(volume, words, mask).logits_per_image for _ in range(FINDINGS if public else 1)]

    return lab.time(run, **FEW), lab.time(image), image()


# --- the table


def encoder_row(name, seconds, dtype="bf16", batch=BATCH, **how):
    """A row of the encoder."""
    run = partial(encoder, dtype=dtype, batch=batch, **how)
    return Row("encoder", f"{name}, {dtype}, batch {batch}", seconds, run, gpu=how.get("way") not in (None, "blocks"))


def lora_rows(steps):
    """LoRA steps: (batch, volumes at a time, checkpointing, seconds)."""
    return [
        Row(
            "LoRA step",
            f"batch {batch}, {micro} at a time, {'with' if checkpointing else 'without'} checkpointing",
            seconds,
            partial(lora_step, batch=batch, micro=micro, checkpointing=checkpointing, profile=batch == micro == BATCH),
            holds="LoRA",
        )
        for batch, micro, checkpointing, seconds in steps
    ]


def adapter_row(name, seconds, run):
    """A row of adapters at work."""
    return Row("adapters", name, seconds, run, holds="adapters")


def rows():
    """All rows, the most important first; seconds are those of an H100, and a little more."""
    return [
        Row("ceilings", "ceilings", 2, ceilings),
        Row("golden", "float32", 2, partial(golden, dtype="float32")),
        Row("golden", "bf16", 2, partial(golden, dtype="bf16")),
        Row("reference", "one volume on the CPU", 3, reference),
        encoder_row("eager", 4, profile=True),
        encoder_row("eager, without what is for GPUs", 4, mends=False),
        encoder_row("eager", 4, dtype="fp16"),
        encoder_row("eager", 4, dtype="float32"),
        *(encoder_row("eager", 2, dtype=dtype, batch=1) for dtype in ("bf16", "fp16", "float32")),
        *lora_rows([(8, 8, True, 11), (8, 1, True, 11), (8, 2, True, 8), (1, 1, True, 2)]),
        *lora_rows([(8, 8, False, 4), (8, 1, False, 8)]),
        encoder_row("blocks compiled", 18, way="blocks", profile=True),
        encoder_row("compiled", 50, way="compiled", profile=True),
        *operator_rows(),
        encoder_row("CUDA graph", 4, batch=1, way="graph"),
        Row("input", "one volume to the device", 4, volume_to_device),
        *lora_rows([(32, 32, True, 20), (32, 2, True, 24)]),
        encoder_row("reduce-overhead", 40, batch=1, way="reduce-overhead"),
        encoder_row("blocks compiled, everything in half precision", 15, way="blocks", half=True),
        encoder_row("blocks compiled", 15, dtype="fp16", way="blocks"),
        encoder_row("blocks compiled", 15, dtype="float32", way="blocks"),
        encoder_row("blocks compiled", 15, batch=1, way="blocks"),
        Row("public way", "one volume against 18 pairs of prompts", 9, zero_shot),
        adapter_row("merged and unmerged, batch 8", 7, partial(merged, batch=8)),
        adapter_row("merged and unmerged, batch 1", 2, partial(merged, batch=1)),
        adapter_row("8 adapters, one after the other", 5, one_after_the_other),
        adapter_row("8 adapters in one batch", 3, mixed),
        *(Row("method step", name, 5, partial(method_step, method=name), holds=name) for name in METHODS),
        *lora_rows([(8, 2, False, 5), (1, 1, False, 1)]),
        Row("optimiser", "AdamW", 1, optimisers, holds="LoRA"),
        *lora_rows([(32, 8, True, 18), (32, 8, False, 12), (32, 2, False, 17)]),
        *lora_rows([(32, 1, False, 22), (32, 1, True, 35)]),
    ]
