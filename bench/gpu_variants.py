"""Other ways to the same numbers: what might run faster on a GPU, and how the public code computes.

Each function changes a CT-CLIP in place. A way that pays belongs in the package; here it is measured first.
"""

from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from medctkit.training.memory import cast_frozen


def layers_of(model):
    """All layers of both transformers of the vision tower."""
    tower = model.visual_transformer
    return [*tower.enc_spatial_transformer.layers, *tower.enc_temporal_transformer.layers]


# --- weights and activations in half precision


def weights_in_bf16(model):
    """Frozen weights kept in bf16, so that autocast does not round them at every call."""
    cast_frozen(model.requires_grad_(False))


def no_autocast(model):
    """Everything in bf16 but the codebook and the quantiser's choice: the residual stream too."""
    codes = model.visual_transformer.vq._codebook
    embed = codes.embed
    model.bfloat16()
    codes.embed = embed


# --- feed-forward: its width, 1,365, divides by none of the sizes that matrix units like


class PaddedFeedForward(nn.Module):
    """A feed-forward whose inner width is filled with zeros to a multiple of `multiple`."""

    def __init__(self, plain, multiple):
        super().__init__()
        self.norm = plain[0]
        value, gate = plain[1].weight.detach().chunk(2)
        zeros = value.new_zeros(-len(value) % multiple, value.shape[1])
        self.register_buffer("widen", torch.cat([value, zeros, gate, zeros]))
        self.register_buffer("narrow", F.pad(plain[4].weight.detach(), (0, len(zeros))).contiguous())

    def forward(self, x):
        """As the module it stands for."""
        value, gate = F.linear(self.norm(x), self.widen).chunk(2, dim=-1)
        return F.linear(value * F.gelu(gate), self.narrow)


def padded_feed_forward(model, multiple=64):
    for layer in layers_of(model):
        layer["3"] = PaddedFeedForward(layer["3"], multiple)


# --- position convolution: depthwise, so memory is all it should cost


class PositionConvBy(nn.Module):
    """The position convolution of `plain`, computed by `function(x, weight, bias)`."""

    def __init__(self, plain, function):
        super().__init__()
        self.dsconv, self.function = plain.dsconv, function

    def forward(self, x):
        """As the module it stands for."""
        return self.function(x, self.dsconv.weight, self.dsconv.bias)


def conv_channels_first(x, weight, bias):
    """On a copy with the channels first, for which torch has a depthwise kernel of its own."""
    y = F.conv3d(x.permute(0, 4, 1, 2, 3).contiguous(), weight, bias, padding=(2, 1, 1), groups=len(weight))
    return y[:, :, : x.shape[1]].permute(0, 2, 3, 4, 1)


def conv_by_planes(x, weight, bias):
    """Three depthwise 2D convolutions, one for each plane of the kernel; channels last."""
    b, t, h, w, c = x.shape
    planes = x.reshape(b * t, h, w, c).permute(0, 3, 1, 2)
    out = F.conv2d(planes, weight[:, :, 2], bias, padding=1, groups=c).unflatten(0, (b, t))
    for back in (1, 2):
        y = F.conv2d(planes, weight[:, :, 2 - back], padding=1, groups=c).unflatten(0, (b, t))
        out[:, back:] += y[:, : max(t - back, 0)]
    return out.permute(0, 1, 3, 4, 2)


def conv_by_shifts(x, weight, bias):
    """The sum of 27 shifted copies times a weight each: one kernel once it is compiled."""
    t, h, w = x.shape[1:4]
    padded, out = F.pad(x, (0, 0, 1, 1, 1, 1, 2, 0)), bias
    for i, j, k in product(range(3), repeat=3):
        out = out + padded[:, i : i + t, j : j + h, k : k + w] * weight[:, 0, i, j, k]
    return out


def position_conv_by(function):
    def change(model):
        for layer in layers_of(model):
            layer["0"] = PositionConvBy(layer["0"], function)

    return change


# --- quantiser: in float32 a matrix product of 116 GFLOP a volume, as long as all the rest in bf16


def normalised(x, codes):
    """Tokens (n, c) and codes (codes, c) of unit length in float32."""
    return F.normalize(x.flatten(0, -2).float(), dim=-1), F.normalize(codes.float(), dim=-1)


def nearest_at_once(x, codes):
    """In float32, all similarities at once."""
    tokens, codes = normalised(x, codes)
    return (tokens @ codes.T).argmax(1).reshape(x.shape[:-1])


def nearest_tf32(x, codes):
    """As `nearest_at_once` with TF32 allowed."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        return nearest_at_once(x, codes)
    finally:
        matmul.allow_tf32 = before


def _halves(x):
    """A number in two bf16 parts that hold 16 bits of it together."""
    high = x.bfloat16()
    return high, (x - high.float()).bfloat16()


def nearest_in_bf16_parts(x, codes):
    """One bf16 product of high and low parts, summed in float32: high high + high low + low high."""
    (high, low), (code_high, code_low) = map(_halves, normalised(x, codes))
    tokens, codes = torch.cat([high, high, low], -1), torch.cat([code_high, code_low, code_high], -1)
    if x.device.type != "cuda":  # no bf16 product with float32 results there
        return (tokens.float() @ codes.float().T).argmax(1).reshape(x.shape[:-1])
    parts = tokens.split(2**14)  # 0.5 GB of similarities at a time
    chosen = [torch.mm(part, codes.T, out_dtype=torch.float32).argmax(1) for part in parts]
    return torch.cat(chosen).reshape(x.shape[:-1])


def nearest_bf16(x, codes):
    """In bf16, similarities too: how far one gets without care."""
    tokens, codes = normalised(x, codes)
    return (tokens.bfloat16() @ codes.bfloat16().T).argmax(1).reshape(x.shape[:-1])


class QuantiserBy(nn.Module):
    """A quantiser whose choice is made by `function(x, codes)`."""

    def __init__(self, plain, function):
        super().__init__()
        self._codebook, self.function = plain._codebook, function

    def forward(self, x):
        """As the module it stands for."""
        codes = self._codebook.embed[0]
        with torch.autocast(x.device.type, enabled=False):
            index = self.function(x, codes)
        return codes[index].to(x.dtype)


def quantiser_by(function):
    def change(model):
        model.visual_transformer.vq = QuantiserBy(model.visual_transformer.vq, function)

    return change


# --- attention


class FusedNormAttention(nn.Module):
    """Attention whose queries and keys are normalised by one kernel each: x / |x| is a root-mean-square norm."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, x, bias=None):
        """As the module it stands for."""
        plain = self.plain
        q, (k, v) = plain.to_q(plain.norm(x)), plain.to_kv(x).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (plain.heads, -1)) for y in (q, k, v))
        width = q.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            scales = ((s / width**0.5).to(q.dtype) for s in (plain.q_scale, plain.k_scale))
            q, k = (F.rms_norm(y, (width,), s, eps=1e-12) for y, s in zip((q, k), scales, strict=True))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        mask = None if bias is None else bias.to(v.dtype)[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=plain.scale)
        return plain.to_out(y.transpose(1, 2).flatten(2))


def fused_norm_attention(model):
    for layer in layers_of(model):
        layer["1"] = FusedNormAttention(layer["1"])


# --- all that is hoped to pay


def mended(model, conv=conv_by_shifts):
    """Padded feed-forward, shifted convolution, quantiser in bf16 parts, fused norms, weights in bf16."""
    weights_in_bf16(model)
    padded_feed_forward(model)
    position_conv_by(conv)(model)
    quantiser_by(nearest_in_bf16_parts)(model)
    fused_norm_attention(model)


# --- the public code's arithmetic, written anew


class PlainAttention(nn.Module):
    """Attention with all scores in memory."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, x, bias=None):
        """As the module it stands for."""
        q, k, v = self.plain.project(x)
        y = self.plain.probabilities(q, k, bias) @ v
        return self.plain.to_out(y.transpose(1, 2).flatten(2))


class OneHotQuantiser(nn.Module):
    """All similarities at once, and codes fetched by a product with one-hot rows."""

    def __init__(self, plain):
        super().__init__()
        self._codebook = plain._codebook

    def forward(self, x):
        """As the module it stands for."""
        codes = self._codebook.embed[0]
        index = nearest_at_once(x, codes)
        return (F.one_hot(index, len(codes)).to(codes.dtype) @ codes).to(x.dtype)


class BiasOfAllPairs(nn.Module):
    """The bias with every one of the (h w)^2 pairs put through the network, at every call."""

    def __init__(self, plain):
        super().__init__()
        self.net = plain.net

    def forward(self, h, w):
        """As the module it stands for."""
        device = self.net[2].weight.device
        places = torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device)).float()
        offsets = places[:, None] - places[None]  # (n, n, 2)
        return self.net(offsets.sign() * offsets.abs().log1p()).permute(2, 0, 1).contiguous()


def public_way(model):
    for layer in layers_of(model):
        layer["1"] = PlainAttention(layer["1"])
    tower = model.visual_transformer
    tower.vq, tower.spatial_rel_pos_bias = OneHotQuantiser(tower.vq), BiasOfAllPairs(tower.spatial_rel_pos_bias)
