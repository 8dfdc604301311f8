"""The blocks of the vision tower once more, in less time or memory: the same numbers, weights and names.

Each class here is one of `vision_tower` with one method done otherwise; `quicken` puts them in the place of the plain
ones. What they compute stands there, why they compute it so stands here, and tests hold the two equal.

Some ways are taken on a GPU in half precision only (`_half`). Their milliseconds are those of one call with 8 volumes
of full size, measured on one H100 by bench/gpu.py.

Shapes are those of `vision_tower`.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from medctkit.common.processes import keep_freed_memory
from medctkit.model.vision_tower import (
    Attention,
    FeedForward,
    PositionConv,
    RelativePositionBias,
    Transformer,
    VectorQuantiser,
    VisionTransformer,
)

Tower = TypeVar("Tower", bound=nn.Module)


def quicken(tower: Tower) -> Tower:
    """Let every plain block of a tower, or of a part of it, take its quick way from now on; in place.

    Weights and state dict stay as they are: a block changes its class and nothing else.
    """
    keep_freed_memory()
    for module in tower.modules():
        module.__class__ = _QUICK.get(type(module), type(module))
    return tower


class QuickRelativePositionBias(RelativePositionBias):
    """The MLP sees each offset once: of (h w)^2 pairs only (2h - 1)(2w - 1) differ, 2,209 of 331,776 at full size."""

    def forward(self, h: int, w: int) -> torch.Tensor:
        """Bias (heads, h * w, h * w), as `RelativePositionBias.forward` says."""
        device = next(self.parameters()).device
        rows, columns = (torch.arange(1 - n, n, device=device) for n in (h, w))
        table = self.of_offsets(torch.cartesian_prod(rows, columns).float())  # ((2h-1)(2w-1), heads)
        row, column = (torch.arange(n, device=device) for n in (h, w))
        row = row[:, None, None, None] - row[:, None] + h - 1  # (h, 1, h, 1)
        column = column[:, None, None] - column + w - 1  # (w, 1, w)
        index = (row * (2 * w - 1) + column).reshape(h * w, h * w)
        return F.embedding(index, table).permute(2, 0, 1).contiguous()  # (n, n, heads) -> (heads, n, n)


class QuickPositionConv(PositionConv):
    """On a GPU without cuDNN's grouped convolution, which takes 7.5 ms where the channels come last in memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (b, t, h, w, c) to the same shape."""
        half = _half(x)
        if half is None or not _plain(self.dsconv, nn.Conv3d):
            return super().forward(x)
        if torch.compiler.is_compiling():
            return self._by_shifts(x)
        return self._channels_first(x.to(half)) if torch.is_grad_enabled() else self._by_planes(x.to(half))

    def _channels_first(self, x: torch.Tensor) -> torch.Tensor:
        """A copy that cuDNN is quicker with: 1.7 ms, and with the backward pass 3.3 ms, by planes 7.7."""
        y = self.dsconv(x.permute(0, 4, 1, 2, 3).contiguous())
        return y[:, :, : x.shape[1]].permute(0, 2, 3, 4, 1)

    def _by_planes(self, x: torch.Tensor) -> torch.Tensor:
        """A flat convolution for each plane of the kernel, for which cuDNN has quick ones: 1.3 ms."""
        (b, t), weight = x.shape[:2], self.dsconv.weight
        planes = x.flatten(0, 1).permute(0, 3, 1, 2)  # (b * t, c, h, w)
        flat = partial(F.conv2d, planes, padding=1, groups=len(weight))
        out = flat(weight[:, :, 2], self.dsconv.bias).unflatten(0, (b, t))
        for back in range(1, min(t, 3)):  # planes before
            out[:, back:] += flat(weight[:, :, 2 - back]).unflatten(0, (b, t))[:, :-back]
        return out.permute(0, 1, 3, 4, 2)

    def _by_shifts(self, x: torch.Tensor) -> torch.Tensor:
        """27 shifted copies times a weight each, which the compiler makes one kernel: 1.0 ms."""
        t, h, w = x.shape[1:4]
        padded, weight, out = (
            F.pad(x, (0, 0, 1, 1, 1, 1, 2, 0)),
            self.dsconv.weight,
            cast(torch.Tensor, self.dsconv.bias),
        )
        for i, j, k in product(range(3), repeat=3):
            out = out + padded[:, i : i + t, j : j + h, k : k + w] * weight[:, 0, i, j, k]
        return out


class QuickAttention(Attention):
    """torch's fused attention: the (n, n) maps are never in memory. On a CPU a shorter backward pass of `unit`."""

    def unit(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors (..., dim_head) made one long, as `Attention.unit` says."""
        plain = x.device.type != "cpu" or not x.requires_grad or torch.compiler.is_compiling()
        return super().unit(x) if plain else _Unit.apply(x)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Mixed values (b, heads, n, dim_head), as `Attention.mix` says."""
        if bias is None and _half(v):  # the temporal transformer's short sequences: 0.40 ms, not cuDNN's 0.62
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                return F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        mask = None if bias is None else bias.to(v.dtype)[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)


class _Unit(torch.autograd.Function):
    """Vectors made one long; its gradient is what lies across them, in three passes over memory, not torch's ten."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        unit, length = ctx.saved_tensors
        along = (gradient * unit).sum(-1, keepdim=True)
        return torch.addcmul(gradient, unit, along, value=-1) / length


class QuickFeedForward(FeedForward):
    """In parts: without gradients on a CPU for the cache, frozen and checkpointed for memory.

    Its inner width, 1,365 at full size, is filled up with zeros: matrix products are quicker where rows are a multiple
    of 8 long. On a GPU it takes 2.0 ms instead of 4.0.
    """

    tokens_at_a_time = 1024  # their 2,730 channels stay in the processor's cache
    tokens_in_training = 2**14  # enough to keep a GPU busy, and 0.3 GB in bf16 with all that the backward pass needs
    gradient_checkpointing = False  # transformers' gradient_checkpointing_enable() sets it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (..., c) to the same shape."""
        if self._frozen_and_checkpointed(x):
            tokens = x.flatten(0, -2)
            kept = [_Keep.apply(tokens)]  # in a list: the node saves for `_InParts`, but takes no part in the graph
            return _InParts.apply(tokens, kept, self._map, self.tokens_in_training).view(x.shape)
        return self._map(x)

    def _map(self, x: torch.Tensor) -> torch.Tensor:
        first, last = self[1], self[4]
        on_cpu = x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        on_cpu = on_cpu and not torch.compiler.is_compiling()  # the number of parts would be fixed
        if not ((on_cpu or _half(x)) and _plain(first) and _plain(last)):
            return super().forward(x)
        value, gate = first.weight.chunk(2)  # each (inner, c)
        zeros = value.new_zeros(-len(value) % 8, x.shape[-1])  # they add nothing
        widen, narrow = torch.cat([value, zeros, gate, zeros]), F.pad(last.weight, (0, len(zeros)))

        def padded(part: torch.Tensor) -> torch.Tensor:
            return F.linear(self[2](F.linear(self[0](part), widen)), narrow)

        if not on_cpu:
            return padded(x)
        return torch.cat([padded(part) for part in x.flatten(0, -2).split(self.tokens_at_a_time)]).view(x.shape)

    def _frozen_and_checkpointed(self, x: torch.Tensor) -> bool:
        return (
            (self.gradient_checkpointing and self.training and torch.is_grad_enabled() and x.requires_grad)
            and not any(p.requires_grad for p in self.parameters())
            and not torch.compiler.is_compiling()
        )


class _Keep(torch.autograd.Function):
    """Saves a tensor for `_InParts`, and does nothing else."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(0)


class _InParts(torch.autograd.Function):
    """A frozen function of tokens, part by part, of which nothing is kept: the backward pass computes it again.

    The tokens come from a node of their own. A checkpointed layer, computed again, then has all it needs before it
    gets here, and stops: the function runs twice in all, not three times.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: Any, function: Callable, size: int) -> torch.Tensor:
        device = x.device.type
        ctx.kept, ctx.function, ctx.size = kept, function, size
        ctx.precision = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return torch.cat([function(part) for part in x.detach().split(size)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.kept is None:
            raise RuntimeError("a frozen feed-forward with gradient checkpointing can be backed through only once")
        (x,), ctx.kept = ctx.kept[0].grad_fn.saved_tensors, None  # lets go of the tokens as soon as they are used
        out = torch.empty_like(x)
        with torch.enable_grad(), torch.autocast(*ctx.precision):
            for part, g, place in zip(*(y.split(ctx.size) for y in (x, gradient, out)), strict=True):
                part = part.detach().requires_grad_()
                ctx.function(part).backward(g)
                place.copy_(part.grad)
        return out, None, None, None


class QuickTransformer(Transformer):
    """Layers checkpointed when asked for; sequences side by side in memory."""

    gradient_checkpointing = False  # transformers' gradient_checkpointing_enable() sets this and the next
    _gradient_checkpointing_func: Callable = staticmethod(partial(checkpoint, use_reentrant=False))

    def forward(
        self, x: torch.Tensor, grid: tuple[int, int, int, int], bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens (b', n, c) to the same shape, as `Transformer.forward` says."""
        x = x.contiguous()  # the temporal sequences of a single volume are a view with far jumps in memory
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, grid, bias)
            else:
                x = layer(x, grid, bias)
        return self.norm_out(x)


class QuickVectorQuantiser(VectorQuantiser):
    """Similarities of some tokens at a time: all of them, 13,824 x 8,192, would take 450 MB, and the cache holds few.

    The largest is found with its place: on a CPU that is three times as quick as its place alone.

    On a GPU in half precision each number is two of bf16, which hold 16 bits of it together. Then 18 of a million
    tokens get another code than in float32 (in TF32 651, in bf16 alone 20,900), and it takes 7 ms instead of 24.
    """

    max_similarities = 2**21  # in memory at a time, 8 MB
    max_similarities_in_halves = 2**25  # 134 MB: enough to keep a GPU busy

    @torch.no_grad()
    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Index of the best code for each token, (..., c) -> (...), as `VectorQuantiser.nearest` says."""
        if not _half(x):
            return super().nearest(x)
        with torch.autocast(x.device.type, enabled=False):
            both = x.flatten(0, -2), self._codebook.embed[0]
            (high, low), (code_high, code_low) = (_halves(F.normalize(y.float(), dim=-1)) for y in both)
            # one product, summed in float32: high high + high low + low high
            tokens, codes = torch.cat([high, high, low], -1), torch.cat([code_high, code_low, code_high], -1)
            parts = tokens.split(max(1, self.max_similarities_in_halves // len(codes)))
            return torch.cat([_product(part, codes.T).argmax(-1) for part in parts]).reshape(x.shape[:-1])

    def best(self, tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """For each of the tokens (n, c) the best code (n,), as `VectorQuantiser.best` says."""
        if torch.compiler.is_compiling():  # the number of parts would be fixed
            return super().best(tokens, codes)
        parts = tokens.split(max(1, self.max_similarities // len(codes)))
        return torch.cat([(part @ codes.T).max(-1).indices for part in parts])


class QuickVisionTransformer(VisionTransformer):
    """Frozen patches slab by slab, on a CPU of one volume at a time: what is cut stays in the processor's cache."""

    def embed_patches(self, volumes: torch.Tensor) -> torch.Tensor:
        """Patches of volumes (b, 1, d, h, w), as `VisionTransformer.embed_patches` says."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.to_patch_emb.parameters()):
            return super().embed_patches(volumes)
        # while it is compiled, the number of parts would be fixed
        if volumes.device.type == "cpu" and not torch.compiler.is_compiling() and len(volumes) > 1:
            return torch.cat([self.embed_patches(volume) for volume in volumes.split(1)])
        slabs = volumes.split(self.patch_depth, dim=2)
        return torch.cat([self.to_patch_emb(slab) for slab in slabs], dim=1)


_QUICK: dict[type, type] = {
    RelativePositionBias: QuickRelativePositionBias,
    PositionConv: QuickPositionConv,
    Attention: QuickAttention,
    FeedForward: QuickFeedForward,
    Transformer: QuickTransformer,
    VectorQuantiser: QuickVectorQuantiser,
    VisionTransformer: QuickVisionTransformer,
}


def _half(x: torch.Tensor) -> torch.dtype | None:
    """The half precision in which a GPU computes with a tensor; None: it does so in full, or there is no GPU."""
    if x.device.type != "cuda":
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 number as the sum of two of bf16, but for the last bits."""
    high = x.bfloat16()
    return high, (x - high.float()).bfloat16()


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A product of bf16 matrices in float32. Only a GPU has it: elsewhere the numbers are made float32 before."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else a.float() @ b.float()


def _plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> TypeGuard[nn.Linear]:
    """Whether a layer is nothing but its weights: no adapter on it, not quantised, nobody listening."""
    weight = cast(torch.Tensor, module.weight) if type(module) is kind else None
    plain = weight is not None and type(weight.data) is torch.Tensor and weight.is_floating_point()
    return plain and not module._forward_hooks and not module._forward_pre_hooks
