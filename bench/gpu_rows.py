"""What bench/gpu.py measures, row by row, the most important rows first."""

import copy
import itertools
import json
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gpu_variants as variants
import torch
from accelerate import Accelerator
from gpu_lab import difference, embed
from memory import WORDS, small_batch
from model import PROMPTS
from model import WORDS as PROMPT_WORDS
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from medctkit.lora.adapter import add_lora, merge_lora
from medctkit.lora.placement import lora_config
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.training.loop import step_gradients
from medctkit.training.memory import cast_frozen
from medctkit.training.settings import FineTuneConfig

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "tests" / "golden"
BATCH, FINDINGS, ADAPTERS = 8, 18, 8
COMPILED, GRAPHS = ("layers", "compiled", "reduce-overhead"), ("graph", "reduce-overhead")
FEW = {"most": 3, "seconds": 3.0}  # runs of what takes long


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        group: what it belongs to.
        name: what it measures.
        seconds: what it may take on a GPU, with all that is built and compiled for it.
        run: takes a `Lab`, gives the figures.
        gpu: whether it means nothing without one.
        holds: name of what it shares with its neighbours (`Lab.hold`).
    """

    group: str
    name: str
    seconds: float
    run: Callable
    gpu: bool = False
    holds: str | None = None


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


def encoder(lab, dtype, batch, change=None, way="eager", profile=False, throughout=False):
    """Embedding `batch` volumes, against the reference.

    Args:
        lab: where.
        dtype: of autocast.
        batch: volumes.
        change: changes the model in place.
        way: eager, layers (each layer compiled), compiled, reduce-overhead (compiled, with CUDA graphs) or graph (a
            CUDA graph of the eager model).
        profile: also list the kernels.
        throughout: weights and volumes in bf16, no autocast.
    """
    model = lab.fresh()
    if change:
        change(model)
    volumes = lab.volumes(batch)
    if throughout:
        volumes, precision = volumes.bfloat16(), nullcontext
    else:
        precision = partial(lab.autocast, dtype, cache_enabled=False)
    encode = model.encode_image
    if way in COMPILED:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
    if way == "layers":
        for layer in variants.layers_of(model):
            layer.forward = lab.compile(layer.forward)
    elif way in COMPILED:
        encode = lab.compile(encode, **({"mode": way} if way == "reduce-overhead" else {}))

    @torch.inference_mode()
    def run():
        with precision():
            return encode(volumes)

    if way == "graph":
        timed, replay = recorded(run)
    else:
        timed = replay = run
    found = lab.rates(lab.time(timed), lab.gflop * batch, batch)
    found["difference"] = difference(replay()[:1], lab.reference[0])
    if way in ("eager", "layers"):
        with torch.inference_mode(), precision():
            tokens = embed(model, volumes)[1][0].cpu()
        right = lab.reference[1][0].to(tokens.dtype)  # codes are rounded where all else is
        found["codes_flipped"] = (tokens != right).any(-1).double().mean().item()
    if way in COMPILED:
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


def shifts(lab):
    """The position convolution by shifts: 27 kernels eagerly, so it is compiled even where the rest is not."""
    return lab.compile(variants.conv_by_shifts)


def mended(lab):
    """All that is hoped to pay."""
    return partial(variants.mended, conv=shifts(lab))


# --- LoRA step


def lora_model(lab):
    """A CT-CLIP with preset "paper" in training mode, frozen weights in bf16, with its optimiser."""
    model = add_lora(lab.fresh(), "paper").train()
    cast_frozen(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return model, optimizer, Accelerator(cpu=not lab.gpu, mixed_precision="bf16")


def lora_stepper(lab, batch, micro, checkpointing):
    """A function that does one step of the contrastive loss, as `finetune` does it."""
    model, optimizer, accelerator = lab.hold("LoRA", partial(lora_model, lab))
    base = model.get_base_model()
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
def by_name(model, names):
    """By peft's `adapter_names`: each name as often as its volume has sequences in the layer.

    The tower folds depth, or the places of a slab, into the batch: always inside a volume's share of it.
    """

    def hook(module, given, named):
        repeats = given[0].shape[0] // len(names)
        return given, named | {"adapter_names": [name for name in names for _ in range(repeats)]}

    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in lora_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


def mixed(lab, way):
    """Eight volumes, each with an adapter of its own, in one batch; right if equal to one after the other."""
    model = lab.hold("adapters", partial(adapted_model, lab))
    volumes = lab.volumes(ADAPTERS)
    right = switched(lab, volumes, "float32")
    with torch.inference_mode(), way(model, [str(i) for i in range(ADAPTERS)]):
        found = lab.time(partial(embedder(lab, model), volumes), **FEW)
        return found | {"difference": difference(embedder(lab, model, "float32")(volumes), right)}


# --- the public code's way


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
        variants.public_way(model)
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


# --- operators


def operator(lab, gflop, moved, run, right=None):
    """Time of one operator, share of the matrix rate, and of the copy rate for the bytes it has to move."""
    found = lab.rates(lab.time(run), gflop)
    found["share_of_copy_rate"] = moved / found["ms"] * 1e3 / lab.ceilings["copy_bytes_per_second"]
    if right is not None:
        found["difference"] = difference(run(), right())
    return found


def tower(lab):
    """The vision tower whose operators are measured."""
    return lab.hold("operators", lab.fresh).visual_transformer


def conv(lab, function, dtype="bf16"):
    x, layer = lab.tokens(BATCH), tower(lab).enc_spatial_transformer.layers[0]["0"]

    @torch.inference_mode()
    def run():
        with lab.autocast(dtype):
            return layer(x) if function is None else function(x, layer.dsconv.weight, layer.dsconv.bias)

    @torch.inference_mode()
    def right():
        return layer(x)

    return operator(lab, 27 * 2 * x.numel() / 1e9, 6 * x.numel(), run, right)


def feed_forward(lab, multiple, dtype="bf16"):
    x, layer = lab.tokens(BATCH), copy.deepcopy(tower(lab).enc_spatial_transformer.layers[0]["3"])
    gflop = 2 * x[..., 0].numel() * (layer[1].weight.numel() + layer[4].weight.numel()) / 1e9
    function = layer if multiple is None else variants.PaddedFeedForward(layer, multiple)
    # as in a model whose frozen weights are kept in bf16
    for tensor in [layer[1].weight, layer[4].weight, *function.buffers()]:
        tensor.data = tensor.data.bfloat16()

    @torch.inference_mode()
    def run():
        with lab.autocast(dtype):
            return function(x)

    return operator(lab, gflop, 6 * x.numel(), run)


def quantiser(lab, function):
    vq = tower(lab).vq
    x, codes = lab.tokens(BATCH), vq._codebook.embed[0]
    gflop = 2 * x.numel() * len(codes) / 1e9
    choose = torch.inference_mode()((lambda: vq.nearest(x)) if function is None else (lambda: function(x, codes)))
    with torch.inference_mode():
        right = vq.nearest(x)
    found = operator(lab, gflop, 4 * x.numel(), choose)
    return found | {"codes_flipped": (choose() != right).double().mean().item()}


def attention_inputs(lab, spatial, dtype):
    """Queries, keys, values (sequences, heads, n, dim_head) as the tower makes them, and the bias or None."""
    x = lab.tokens(BATCH)
    b, t, h, w, c = x.shape
    x = x.reshape(b * t, h * w, c) if spatial else x.permute(0, 2, 3, 1, 4).reshape(b * h * w, t, c)
    side = "spatial" if spatial else "temporal"
    layers = getattr(tower(lab), f"enc_{side}_transformer").layers
    with torch.inference_mode(), lab.autocast(dtype):
        return *layers[0]["1"].project(x), tower(lab).spatial_rel_pos_bias(h, w) if spatial else None


def attention(lab, spatial, backend, dtype="bf16"):
    """Scaled dot-product attention alone: with torch's choice of backend, one of them, or FlexAttention."""
    q, k, v, bias = attention_inputs(lab, spatial, dtype)
    mask = None if bias is None else bias.to(v.dtype)[None]
    n = q.shape[2]
    gflop, moved = 4 * q.numel() * n / 1e9, 4 * q.nbytes
    if backend == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        flex = lab.compile(flex_attention)

        def score(scores, b, head, query, key):
            return scores + mask[0, head, query, key]

        run = partial(flex, q, k, v, score_mod=score if spatial else None, scale=8.0)
        choose = nullcontext
    else:
        run = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, scale=8.0)
        choose = nullcontext if backend is None else partial(sdpa_kernel, backend)

    def right():
        wide = (x.float() for x in (q[:8], k[:8], v[:8]))
        return F.scaled_dot_product_attention(*wide, attn_mask=None if mask is None else mask.float(), scale=8.0)

    with torch.inference_mode(), choose():
        found = operator(lab, gflop, moved, run)
        found["difference"] = difference(run()[:8], right())
        if backend is None:
            found["kernels"] = lab.kernels(run, 3)
    return found


# --- the table


def encoder_rows(lab):
    """The vision encoder: as it is, changed, and compiled."""

    def row(name, seconds, batch=8, dtype="bf16", **how):
        what = partial(encoder, dtype=dtype, batch=batch, **how)
        return Row("encoder", f"{name}, {dtype}, batch {batch}", seconds, what, gpu=how.get("way") in GRAPHS)

    all_mended = mended(lab)
    plain = [
        row("eager", 6, batch, dtype, profile=(batch, dtype) == (8, "bf16"))
        for batch in (8, 1)
        for dtype in ("bf16", "fp16", "float32")
    ]
    changed = [
        row("eager, all mended", 15, change=all_mended, profile=True),
        row("eager, weights kept in half precision", 6, change=variants.weights_in_bf16),
        row("eager, padded feed-forward", 6, change=variants.padded_feed_forward),
        row("eager, position convolution by shifts", 12, change=variants.position_conv_by(shifts(lab))),
        row("eager, quantiser in bf16 parts", 6, change=variants.quantiser_by(variants.nearest_in_bf16_parts)),
        row("eager, fused norms of queries and keys", 6, change=variants.fused_norm_attention),
        row("eager, everything in half precision", 6, change=variants.no_autocast, throughout=True),
        row("layers compiled", 50, way="layers", profile=True),
        row("layers compiled, all mended", 50, way="layers", change=all_mended, profile=True),
    ]
    recorded_ones = [
        row("CUDA graph", 8, batch=1, way="graph"),
        row("CUDA graph, all mended", 15, batch=1, way="graph", change=all_mended),
    ]
    compiled = [
        row("compiled", 80, way="compiled", profile=True),
        row("compiled, all mended", 70, way="compiled", change=all_mended, profile=True),
        row("layers compiled", 40, dtype="fp16", way="layers"),
        row("layers compiled", 40, dtype="float32", way="layers"),
        row("layers compiled", 40, batch=1, way="layers"),
        row("reduce-overhead, all mended", 70, batch=1, way="reduce-overhead", change=all_mended),
    ]
    return plain, changed, recorded_ones, compiled


def lora_rows(steps):
    """LoRA steps (batch, volumes at a time, checkpointing)."""
    return [
        Row(
            "LoRA step",
            f"batch {batch}, {micro} at a time, {'with' if checkpointing else 'without'} checkpointing",
            15,
            partial(lora_step, batch=batch, micro=micro, checkpointing=checkpointing, profile=batch == micro == BATCH),
            holds="LoRA",
        )
        for batch, micro, checkpointing in steps
    ]


def operator_rows(lab):
    """Each operator of the encoder in several ways."""

    def row(name, way, seconds, run, **how):
        return Row("operator", f"{name}, {way}", seconds, partial(run, **how), holds="operators")

    convs = {"as it is": None, "channels first": variants.conv_channels_first, "by planes": variants.conv_by_planes}
    convs["by shifts, compiled"] = shifts(lab)
    quantisers = {
        "as it is": None,
        "at once": variants.nearest_at_once,
        "TF32": variants.nearest_tf32,
        "bf16 in two parts": variants.nearest_in_bf16_parts,
        "bf16": variants.nearest_bf16,
    }
    widths = {"as it is": None, "padded to 8": 8, "padded to 64": 64}
    backends = {"as it is": None} | {
        name.lower(): getattr(SDPBackend, name)
        for name in ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "FLASH_ATTENTION", "MATH")
    }
    return [
        *(row("position convolution", way, 10, conv, function=function) for way, function in convs.items()),
        *(row("feed-forward", way, 3, feed_forward, multiple=multiple) for way, multiple in widths.items()),
        *(row("quantiser", way, 3, quantiser, function=function) for way, function in quantisers.items()),
        *(row("spatial attention", way, 4, attention, spatial=True, backend=b) for way, b in backends.items()),
        *(row("temporal attention", way, 4, attention, spatial=False, backend=b) for way, b in backends.items()),
        row("spatial attention", "FlexAttention", 30, attention, spatial=True, backend="flex"),
    ]


def rows(lab):
    """All rows, the most important first."""
    plain, changed, recorded_ones, compiled = encoder_rows(lab)
    return [
        Row("ceilings", "ceilings", 5, ceilings),
        Row("golden", "float32", 3, partial(golden, dtype="float32")),
        Row("golden", "bf16", 3, partial(golden, dtype="bf16")),
        Row("reference", "one volume on the CPU", 20, reference),
        *plain,
        *lora_rows([(8, 8, True), (8, 1, True), (8, 2, True), (1, 1, True), (8, 8, False), (8, 1, False)]),
        *changed,
        *operator_rows(lab),
        Row("public way", "one volume against 18 pairs of prompts", 20, zero_shot),
        Row("adapters", "merged and unmerged, batch 8", 15, partial(merged, batch=8), holds="adapters"),
        Row("adapters", "merged and unmerged, batch 1", 10, partial(merged, batch=1), holds="adapters"),
        Row("adapters", "8 adapters, one after the other", 10, one_after_the_other, holds="adapters"),
        Row("adapters", "8 adapters in one batch, stacked", 6, partial(mixed, way=stacked), holds="adapters"),
        Row("adapters", "8 adapters in one batch, by name", 10, partial(mixed, way=by_name), holds="adapters"),
        *lora_rows([(32, 8, True), (32, 2, True), (32, 1, True), (8, 2, False), (1, 1, False)]),
        *lora_rows([(32, 8, False), (32, 2, False), (32, 1, False)]),
        Row("optimiser", "AdamW", 5, optimisers, holds="LoRA"),
        *recorded_ones,
        Row("input", "one volume to the device", 5, volume_to_device),
        *compiled,
        *lora_rows([(32, 32, True)]),
    ]
