"""The vision tower of CT-CLIP, block by block: patches, spatial and temporal attention, vector quantiser.

After CT-ViT (Hamamci et al. 2023, arXiv 2305.16037), whose blocks come from C-ViViT (Villegas et al. 2022, arXiv
2210.02399). Written from a description of the released model; module names are those of its state dict.

Two traits look like mistakes and are kept, for the released weights were trained with them: the temporal
transformer's position convolution reads its tokens in the wrong order, and keys and values are computed from
tokens that are not normalised.

Shapes: b batch, c channel, d h w depth, rows, columns (of the volume, in voxels, or of the token grid),
t depth patches, n tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Patches(nn.Module):
    """Cut a volume into patches: (b, 1, d, h, w) -> (b, t, h, w, voxels of a patch)."""

    def __init__(self, temporal_patch_size: int, patch_size: int):
        super().__init__()
        self.size = (temporal_patch_size, patch_size, patch_size)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Inside a patch the order is channel, depth, row, column."""
        b, c, *shape = volumes.shape
        (pt, ph, pw), (t, h, w) = self.size, (n // p for n, p in zip(shape, self.size, strict=True))
        x = volumes.reshape(b, c, t, pt, h, ph, w, pw)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (b, t, h, w, c * pt * ph * pw)


class ScaleNorm(nn.Module):
    """Layer norm with a learned scale `gamma`; the shift `beta` is a buffer of zeros."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class RelativePositionBias(nn.Module):
    """Learned attention bias from the offset between two places of the h x w grid (after Swin V2).

    Each component of the offset enters an MLP as sign * log(1 + |offset|). Only (2h - 1)(2w - 1) offsets
    differ among (h w)^2 pairs, 2,209 of 331,776 at full size, so the MLP sees each once.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1)),
            nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1)),
            nn.Linear(dim, heads),
        )
        self._kept = None  # grid, weights, and the bias they gave

    def forward(self, h: int, w: int) -> torch.Tensor:
        """Bias (heads, h * w, h * w), to be added to the scores of query i and key j.

        On a CPU it is kept while nothing learns, and computed anew once the weights differ in value. A GPU computes
        it in less time than it takes to wait for the comparison.
        """
        if torch.compiler.is_compiling() or not self._constant():
            return self._bias(h, w)
        weights = list(self.parameters())
        kept, grid = self._kept, (h, w, weights[0].dtype)
        if kept is None or kept[0] != grid or not all(map(torch.equal, weights, kept[1])):
            with torch.inference_mode(False), torch.no_grad():  # what inference mode makes is of no use in training
                kept = self._kept = grid, [p.detach().clone() for p in weights], self._bias(h, w)
        return kept[2]

    def _constant(self) -> bool:
        """Whether nothing but a change of the weights can change the bias, and their values can be compared quickly."""
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        real = all(type(p.data) is torch.Tensor and p.device.type == "cpu" for p in self.parameters())
        return real and not learning and all(map(_plain, (self.net[0][0], self.net[1][0], self.net[2])))

    def _bias(self, h: int, w: int) -> torch.Tensor:
        weight = self.net[2].weight
        rows, columns = (torch.arange(1 - n, n, device=weight.device) for n in (h, w))
        offsets = torch.cartesian_prod(rows, columns).float()  # ((2h-1)(2w-1), 2)
        with torch.autocast(weight.device.type, enabled=False):
            table = self.net((offsets.sign() * offsets.abs().log1p()).to(weight.dtype))
        row, column = (torch.arange(n, device=weight.device) for n in (h, w))
        row = row[:, None, None, None] - row[:, None] + h - 1  # (h, 1, h, 1)
        column = column[:, None, None] - column + w - 1  # (w, 1, w)
        index = (row * (2 * w - 1) + column).reshape(h * w, h * w)
        return F.embedding(index, table).permute(2, 0, 1).contiguous()  # (n, n, heads) -> (heads, n, n)


class PositionConv(nn.Module):
    """Position encoding generator (Chu et al. 2021, arXiv 2102.10882): a depthwise 3 x 3 x 3 convolution.

    Zero padding, one place around rows and columns; causal in depth, two planes before and none after.
    """

    def __init__(self, dim: int):
        super().__init__()
        # symmetric padding in depth, cut in `forward`: cheaper than a padded copy of the input
        self.dsconv = nn.Conv3d(dim, dim, 3, padding=(2, 1, 1), groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (b, t, h, w, c) to the same shape."""
        y = self.dsconv(x.permute(0, 4, 1, 2, 3))  # (b, c, t + 2, h, w); a view: channels stay last in memory
        return y[:, :, : x.shape[1]].permute(0, 2, 3, 4, 1)  # (b, t, h, w, c)


class Attention(nn.Module):
    """Multi-head attention on L2-normalised queries and keys.

    Per head, `scores = 8 (q_scale * q / |q|) . (k_scale * k / |k|) + bias`. Queries come from the normalised
    input; keys and values from the input as it is.
    """

    scale = 8.0

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.norm = ScaleNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.to_out = nn.Linear(inner, dim, bias=False)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (b, heads, n, dim_head) of tokens (b, n, c)."""
        q, (k, v) = self.to_q(self.norm(x)), self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        return q.to(v.dtype), k.to(v.dtype), v

    def weights(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The attention map (b, heads, n queries, n keys) of tokens (b, n, c); each row sums to one."""
        q, k, _ = self.project(x)
        return self.probabilities(q, k, bias)

    def probabilities(self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The attention map (b, heads, n queries, n keys) of queries and keys (b, heads, n, dim_head)."""
        scores = self.scale * q @ k.transpose(-1, -2)
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Attend among the tokens (b, n, c) of each sequence; `bias` is (heads, n, n)."""
        q, k, v = self.project(x)
        mask = None if bias is None else bias.to(v.dtype)[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.to_out(y.transpose(1, 2).flatten(2))  # (b, heads, n, dim_head) -> (b, n, inner)


class GatedGELU(nn.Module):
    """The first half of the channels times the GELU of the second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., 2 c) to (..., c)."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class _Keep(torch.autograd.Function):
    """Saves a tensor for `_InParts`, and does nothing else."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.new_empty(0)


class _InParts(torch.autograd.Function):
    """A frozen function of tokens, part by part, of which nothing is kept: the backward pass computes it again.

    The tokens come from a node of their own. A checkpointed layer, computed again, then has all it needs before it
    gets here, and stops: the function runs twice in all, not three times.
    """

    @staticmethod
    def forward(ctx, x, kept, function, size):
        device = x.device.type
        ctx.kept, ctx.function, ctx.size = kept, function, size
        ctx.precision = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return torch.cat([function(part) for part in x.detach().split(size)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        if ctx.kept is None:
            raise RuntimeError("a frozen feed-forward with gradient checkpointing can be backed through only once")
        (x,), ctx.kept = ctx.kept.saved_tensors, None  # lets go of the tokens as soon as they are used
        out = torch.empty_like(x)
        with torch.enable_grad(), torch.autocast(*ctx.precision):
            for part, g, place in zip(*(y.split(ctx.size) for y in (x, gradient, out)), strict=True):
                part = part.detach().requires_grad_()
                ctx.function(part).backward(g)
                place.copy_(part.grad)
        return out, None, None, None


class FeedForward(nn.Sequential):
    """LayerNorm, gated GELU of width 8/3 dim; places 0, 1 and 4 hold weights, as in the released state dict."""

    tokens_at_a_time = 1024  # their 2,730 channels stay in the processor's cache
    tokens_in_training = 2**14  # enough to keep a GPU busy, and 0.3 GB in bf16 with all that the backward pass needs
    gradient_checkpointing = False  # transformers' gradient_checkpointing_enable() sets it

    def __init__(self, dim: int):
        inner = 8 * dim // 3
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, 2 * inner, bias=False),
            GatedGELU(),
            nn.Identity(),
            nn.Linear(inner, dim, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (..., c) to the same shape; on a CPU, without gradients, by a quicker way to the same numbers."""
        if self._frozen_and_checkpointed(x):
            tokens = x.flatten(0, -2)
            kept = _Keep.apply(tokens).grad_fn
            return _InParts.apply(tokens, kept, super().forward, self.tokens_in_training).view(x.shape)
        quick = x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if not (quick and _plain(self[1]) and _plain(self[4])):
            return super().forward(x)
        # Matrix products are quicker where rows are a multiple of 8 long: zeros are added, and add nothing
        value, gate = self[1].weight.chunk(2)  # each (inner, c)
        zeros = value.new_zeros(-len(value) % 8, x.shape[-1])
        widen, narrow = torch.cat([value, zeros, gate, zeros]), F.pad(self[4].weight, (0, len(zeros)))
        parts = x.flatten(0, -2).split(self.tokens_at_a_time)
        return torch.cat([F.linear(self[2](F.linear(self[0](part), widen)), narrow) for part in parts]).view(x.shape)

    def _frozen_and_checkpointed(self, x: torch.Tensor) -> bool:
        return (
            (self.gradient_checkpointing and self.training and torch.is_grad_enabled() and x.requires_grad)
            and not any(p.requires_grad for p in self.parameters())
            and not torch.compiler.is_compiling()
        )


def _plain(module: nn.Module) -> bool:
    """Whether a linear layer is nothing but its weight: no adapter on it, nobody listening."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


class Layer(nn.ModuleDict):
    """Position convolution ("0"), attention ("1") and feed-forward ("3"), each added to its input."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__({"0": PositionConv(dim), "1": Attention(dim, heads, dim_head), "3": FeedForward(dim)})

    def forward(self, x: torch.Tensor, grid: tuple[int, int, int, int], bias: torch.Tensor | None) -> torch.Tensor:
        """Tokens (b', n, c) to the same shape; see `Transformer.forward`."""
        x = x + self["0"](x.reshape(*grid, -1)).reshape(x.shape)
        x = x + self["1"](x, bias)
        return x + self["3"](x)


class Transformer(nn.Module):
    """A stack of layers and a closing norm."""

    def __init__(self, dim: int, depth: int, heads: int, dim_head: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads, dim_head) for _ in range(depth))
        self.norm_out = ScaleNorm(dim)
        self.gradient_checkpointing = False  # transformers' gradient_checkpointing_enable() sets this and the next
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(
        self, x: torch.Tensor, grid: tuple[int, int, int, int], bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run sequences of tokens (b', n, c) through the stack.

        `grid` (b, t, h, w) is the shape in which the position convolution reads the tokens: a plain reshape of
        `x`, whatever the order of its tokens. For (b t) sequences of (h w) tokens that is where they lie; for
        the temporal transformer's (b h w) sequences of t tokens it is not, and the released weights expect
        just that.
        """
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, grid, bias)
            else:
                x = layer(x, grid, bias)
        return self.norm_out(x)


class Codebook(nn.Module):
    """The code vectors `embed` (1, codes, c): a buffer, which no optimiser ever sees."""

    def __init__(self, dim: int, codes: int):
        super().__init__()
        self.register_buffer("embed", F.normalize(torch.randn(1, codes, dim), dim=-1))


class VectorQuantiser(nn.Module):
    """Replaces each token by the code vector of highest cosine similarity (van den Oord et al. 2017).

    In evaluation mode no gradient passes, so nothing below learns. In training mode gradients pass straight
    through, as if output were input, and the codebook stays as it is. (The public code moves it by
    moving averages in training mode, so that a "frozen" base drifts.)
    """

    max_similarities = 2**23  # in memory at a time, 32 MB

    def __init__(self, dim: int, codes: int):
        super().__init__()
        self._codebook = Codebook(dim, codes)

    @torch.no_grad()
    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Index of the best code for each token: (..., c) -> (...)."""
        with torch.autocast(x.device.type, enabled=False):
            codes = F.normalize(self._codebook.embed[0], dim=-1)  # (codes, c)
            tokens = F.normalize(x.flatten(0, -2).to(codes.dtype), dim=-1)  # (n, c)
            parts = tokens.split(max(1, self.max_similarities // len(codes)))
            return torch.cat([(part @ codes.T).argmax(1) for part in parts]).reshape(x.shape[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantise tokens (..., c)."""
        codes = self._codebook.embed[0][self.nearest(x)].to(x.dtype)
        return x + (codes - x).detach() if self.training else codes


class VisionTransformer(nn.Module):
    """The vision tower: patches, spatial then temporal attention, quantisation.

    Args:
        v: the complete `vision_config` of a `CTCLIPConfig`.
    """

    def __init__(self, v: Mapping):
        super().__init__()
        dim, heads, dim_head = v["dim"], v["heads"], v["dim_head"]
        voxels = v["temporal_patch_size"] * v["patch_size"] ** 2
        self.to_patch_emb = nn.Sequential(
            Patches(v["temporal_patch_size"], v["patch_size"]),
            nn.LayerNorm(voxels),
            nn.Linear(voxels, dim),
            nn.LayerNorm(dim),
        )
        self.spatial_rel_pos_bias = RelativePositionBias(dim, heads)
        self.enc_spatial_transformer = Transformer(dim, v["spatial_depth"], heads, dim_head)
        self.enc_temporal_transformer = Transformer(dim, v["temporal_depth"], heads, dim_head)
        self.vq = VectorQuantiser(dim, v["codebook_size"])

    def encode_spatial(self, tokens: torch.Tensor) -> torch.Tensor:
        """Attention within each slab: (b, t, h, w, c) -> (b * t, h * w, c)."""
        b, t, h, w, c = tokens.shape
        bias = self.spatial_rel_pos_bias(h, w)
        return self.enc_spatial_transformer(tokens.reshape(b * t, h * w, c), (b, t, h, w), bias)

    def encode_temporal(self, tokens: torch.Tensor) -> torch.Tensor:
        """Attention along depth at each place of the slab: (b, t, h, w, c) -> (b * h * w, t, c)."""
        b, t, h, w, c = tokens.shape
        # contiguous: of a single volume, reshape would give a view with far jumps in memory
        sequences = tokens.permute(0, 2, 3, 1, 4).reshape(b * h * w, t, c).contiguous()
        return self.enc_temporal_transformer(sequences, (b, t, h, w))

    def encode(self, volumes: torch.Tensor) -> torch.Tensor:
        """Tokens before quantisation: (b, 1, d, h, w) -> (b, t, h, w, c)."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.to_patch_emb.parameters()):
            tokens = self.to_patch_emb(volumes)
        else:  # slab by slab: what is cut stays in the processor's cache, and takes little memory
            slabs = volumes.split(self.to_patch_emb[0].size[0], dim=2)
            tokens = torch.cat([self.to_patch_emb(slab) for slab in slabs], dim=1)
        b, t, h, w, c = tokens.shape
        tokens = self.encode_spatial(tokens).reshape(b, t, h, w, c)
        return self.encode_temporal(tokens).reshape(b, h, w, t, c).permute(0, 3, 1, 2, 4)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Quantised tokens (b, t, h, w, c) of volumes (b, 1, d, h, w)."""
        return self.vq(self.encode(volumes))
