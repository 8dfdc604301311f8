"""Single operators of the vision encoder, as the package computes them and otherwise; and what is possible."""

import copy
import math
import warnings
from functools import partial

import torch
from gpu_lab import BATCH, Row, difference
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from medctkit.model.vision_tower import FeedForward, PositionConv


def tower(lab):
    """The vision tower whose operators are measured."""
    return lab.hold("operators", lambda: lab.fresh().requires_grad_(False)).visual_transformer


def measured(lab, function, inputs, gflop, moved, dtype="bf16", backward=True):
    """Figures of an operator, and what it gives.

    Args:
        lab: where.
        function: of the inputs.
        inputs: tensors.
        gflop: that it needs.
        moved: bytes that it has to read and write.
        dtype: of autocast.
        backward: also measure it together with the gradient of its inputs, its weights frozen as in LoRA.
    """

    def forward():
        with lab.autocast(dtype):
            return function(*inputs)

    with torch.no_grad():
        found, out = lab.rates(lab.time(forward), gflop), forward()
    found["share_of_copy_rate"] = moved / found["ms"] * 1e3 / lab.ceilings["copy_bytes_per_second"]
    if backward:
        for x in inputs:
            x.requires_grad_()
        found["ms_with_backward"] = lab.time(lambda: torch.autograd.grad(forward(), inputs, out))["ms"]
    return found, out


def conv(lab, way, dtype="bf16"):
    """The position convolution: depthwise, so memory is all that it should cost."""
    layer, x = tower(lab).enc_spatial_transformer.layers[0]["0"], lab.tokens(BATCH)
    ways = {
        "as it is": layer,
        "grouped by cuDNN": partial(PositionConv.forward, layer),
        "channels first": layer._channels_first,
        "by planes": layer._by_planes,
        "by shifts, compiled": lab.compile(layer._by_shifts),
    }
    found, out = measured(lab, ways[way], [x], 27 * 2 * x.numel() / 1e9, 6 * x.numel(), dtype)
    with torch.no_grad():
        return found | {"difference": difference(out, layer(x.detach()))}


def feed_forward(lab, padded):
    """The feed-forward with frozen weights in bf16, as `cast_frozen` leaves them."""
    block, x = copy.deepcopy(tower(lab).enc_spatial_transformer.layers[0]["3"]), lab.tokens(BATCH)
    block[1].bfloat16()
    block[4].bfloat16()
    gflop = 2 * x[..., 0].numel() * (block[1].weight.numel() + block[4].weight.numel()) / 1e9
    return measured(lab, block if padded else partial(FeedForward.forward, block), [x], gflop, 6 * x.numel())[0]


def quantiser(lab, dtype, tf32=False):
    """The choice of the codes: 116 GFLOP a volume in one product."""
    vq, x = tower(lab).vq, lab.tokens(BATCH)
    gflop, right = 2 * x.numel() * len(vq._codebook.embed[0]) / 1e9, vq.nearest(x)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        found, out = measured(lab, vq.nearest, [x], gflop, 4 * x.numel(), dtype, backward=False)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    return found | {"codes_flipped": (out != right).double().mean().item()}


def attention(lab, spatial, way):
    """Attention proper, without its projections."""
    blocks, (b, t, h, w, c) = tower(lab), (x := lab.tokens(BATCH)).shape
    x = x.reshape(b * t, h * w, c) if spatial else x.permute(0, 2, 3, 1, 4).reshape(b * h * w, t, c)
    layers = blocks.enc_spatial_transformer.layers if spatial else blocks.enc_temporal_transformer.layers
    with torch.no_grad(), lab.autocast("bf16"):
        q, k, v = (y.contiguous() for y in layers[0]["1"].project(x))
        bias = blocks.spatial_rel_pos_bias(h, w) if spatial else None
        mask = None if bias is None else bias.to(v.dtype)[None]
        wide = (y[:8].float() for y in (q, k, v))
        right = F.scaled_dot_product_attention(*wide, attn_mask=None if bias is None else bias[None], scale=8.0)

    def by_backend(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, way)):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=8.0)

    function = by_backend
    if way == "as it is":
        function = partial(layers[0]["1"].mix, bias=bias)
    elif way == "FlexAttention":
        added = (lambda score, b, head, i, j: score + mask[0, head, i, j]) if spatial else None
        function = partial(lab.compile(flex_attention), score_mod=added, scale=8.0)
    with warnings.catch_warnings(action="ignore"):  # why a backend cannot do it
        gflop, moved, backward = 4 * q.numel() * q.shape[2] / 1e9, 4 * q.nbytes, lab.gpu or way != "FlexAttention"
        found, out = measured(lab, function, [q, k, v], gflop, moved, backward=backward)
    return found | {"difference": difference(out[:8], right)}


def possible(lab, stream_bytes):
    """What the encoder takes if every operator moves its inputs and outputs once, and all else is fused with these.

    Each takes the longer of two times: of its bytes at the rate of a copy, of its products at that of a bf16 product.

    Args:
        lab: with the rates measured.
        stream_bytes: of a number that layers hand on: 4 under autocast.
    """
    v, (t, h, w) = lab.config.vision_config, lab.config.grid
    c, inner, wide = v["dim"], v["heads"] * v["dim_head"], 8 * v["dim"] // 3
    voxels, stream = v["temporal_patch_size"] * v["patch_size"] ** 2, stream_bytes * v["dim"]

    def layer(keys):
        return [
            (0, 2 * stream),  # position convolution
            (2 * c * 3 * inner, stream + 2 * 3 * inner),  # norm, queries, keys and values
            (4 * keys * inner, 2 * 4 * inner),  # attention
            (2 * inner * c, 2 * inner + 2 * stream),  # projection, added to the stream
            (2 * c * 2 * wide, stream + 2 * wide),  # norm, first product and gated GELU
            (2 * wide * c, 2 * wide + 2 * stream),  # second product, added to the stream
        ]

    operators = [(2 * voxels * c, 4 * voxels + stream), (3 * 2 * c * v["codebook_size"], 2 * stream)]
    operators += v["spatial_depth"] * layer(h * w) + v["temporal_depth"] * layer(t)
    n = BATCH * math.prod(lab.config.grid)
    flop_rate, byte_rate = 1e9 * lab.ceilings["bf16_gflop_per_second"], lab.ceilings["copy_bytes_per_second"]
    times = [(1e3 * n * flop / flop_rate, 1e3 * n * moved / byte_rate) for flop, moved in operators]
    found = {"bytes": n * sum(moved for _, moved in operators)}
    found |= {"ms_of_products": sum(a for a, _ in times), "ms_of_bytes": sum(b for _, b in times)}
    return lab.rates(found | {"ms": sum(map(max, times))}, BATCH * lab.gflop, BATCH)


def operator_rows():
    """Rows of the operators, and of what is possible."""

    def row(name, seconds, run, **how):
        return Row("operator", name, seconds, partial(run, **how), holds="operators")

    spatial = ("as it is", "EFFICIENT_ATTENTION", "FlexAttention")
    temporal = ("as it is", "CUDNN_ATTENTION", "FLASH_ATTENTION")
    convs = ("as it is", "grouped by cuDNN", "channels first", "by shifts, compiled")
    return [
        *(
            Row("possible", f"stream in {name}", 1, partial(possible, stream_bytes=size))
            for name, size in (("float32", 4), ("bf16", 2))
        ),
        *(row(f"position convolution, {way}", 3, conv, way=way) for way in convs),
        *(
            row(f"position convolution, {way}, float32", 3, conv, way=way, dtype="float32")
            for way in ("as it is", "by planes")
        ),
        row("feed-forward, as it is", 1, feed_forward, padded=True),
        row("feed-forward, not padded", 1, feed_forward, padded=False),
        row("quantiser, as it is", 1, quantiser, dtype="bf16"),
        row("quantiser, float32", 1, quantiser, dtype="float32"),
        row("quantiser, TF32", 1, quantiser, dtype="float32", tf32=True),
        *(row(f"spatial attention, {way}", 2, attention, spatial=True, way=way) for way in spatial),
        *(row(f"temporal attention, {way}", 1, attention, spatial=False, way=way) for way in temporal),
    ]
