"""The blocks of the vision tower once more, in less time or memory: the same numbers, weights and names.

Each class here is one of `vision_tower` with one method done otherwise; `quicken` puts them in the place of the plain
ones. What they compute stands there, why they compute it so stands here, and tests hold the two equal.

Shapes are those of `vision_tower`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medctkit.model.vision_tower import (
    Attention,
    FeedForward,
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
    for module in tower.modules():
        module.__class__ = _QUICK.get(type(module), type(module))
    return tower


class QuickRelativePositionBias(RelativePositionBias):
    """Only (2h - 1)(2w - 1) offsets differ among (h w)^2 pairs, 2,209 of 331,776 at full size: the MLP sees each once.

    On a CPU the bias is kept while nothing learns, and computed anew once the weights differ in value. A GPU computes
    it in less time than it takes to wait for the comparison.
    """

    _kept: tuple[tuple, list[torch.Tensor], torch.Tensor] | None = None  # grid, weights, and the bias they gave

    def forward(self, h: int, w: int) -> torch.Tensor:
        """Bias (heads, h * w, h * w), as `RelativePositionBias.forward` says."""
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
        return real and not learning and all(map(_plain, map(self.net.get_submodule, ("0.0", "1.0", "2"))))

    def _bias(self, h: int, w: int) -> torch.Tensor:
        device = next(self.parameters()).device
        rows, columns = (torch.arange(1 - n, n, device=device) for n in (h, w))
        table = self.of_offsets(torch.cartesian_prod(rows, columns).float())  # ((2h-1)(2w-1), heads)
        row, column = (torch.arange(n, device=device) for n in (h, w))
        row = row[:, None, None, None] - row[:, None] + h - 1  # (h, 1, h, 1)
        column = column[:, None, None] - column + w - 1  # (w, 1, w)
        index = (row * (2 * w - 1) + column).reshape(h * w, h * w)
        return F.embedding(index, table).permute(2, 0, 1).contiguous()  # (n, n, heads) -> (heads, n, n)


class QuickAttention(Attention):
    """torch's fused attention: the (n, n) maps are never in memory."""

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Mixed values (b, heads, n, dim_head), as `Attention.mix` says."""
        mask = None if bias is None else bias.to(v.dtype)[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)


class QuickFeedForward(FeedForward):
    """In parts: without gradients on a CPU for the cache, frozen and checkpointed for memory."""

    tokens_at_a_time = 1024  # their 2,730 channels stay in the processor's cache
    tokens_in_training = 2**14  # enough to keep a GPU busy, and 0.3 GB in bf16 with all that the backward pass needs
    gradient_checkpointing = False  # transformers' gradient_checkpointing_enable() sets it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (..., c) to the same shape."""
        if self._frozen_and_checkpointed(x):
            tokens = x.flatten(0, -2)
            kept = [_Keep.apply(tokens)]  # in a list: the node saves for `_InParts`, but takes no part in the graph
            return _InParts.apply(tokens, kept, super().forward, self.tokens_in_training).view(x.shape)
        quick = x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        first, last = self[1], self[4]
        if not (quick and _plain(first) and _plain(last)):
            return super().forward(x)
        # Matrix products are quicker where rows are a multiple of 8 long: zeros are added, and add nothing
        value, gate = first.weight.chunk(2)  # each (inner, c)
        zeros = value.new_zeros(-len(value) % 8, x.shape[-1])
        widen, narrow = torch.cat([value, zeros, gate, zeros]), F.pad(last.weight, (0, len(zeros)))
        parts = x.flatten(0, -2).split(self.tokens_at_a_time)
        return torch.cat([F.linear(self[2](F.linear(self[0](part), widen)), narrow) for part in parts]).view(x.shape)

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
    """Similarities of some tokens at a time: all of them, 13,824 x 8,192, would take 450 MB."""

    max_similarities = 2**23  # in memory at a time, 32 MB

    def best(self, tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """For each of the tokens (n, c) the best code (n,), as `VectorQuantiser.best` says."""
        parts = tokens.split(max(1, self.max_similarities // len(codes)))
        return torch.cat([super(QuickVectorQuantiser, self).best(part, codes) for part in parts])


class QuickVisionTransformer(VisionTransformer):
    """Frozen patches slab by slab: what is cut stays in the processor's cache, and takes little memory."""

    def embed_patches(self, volumes: torch.Tensor) -> torch.Tensor:
        """Patches of volumes (b, 1, d, h, w), as `VisionTransformer.embed_patches` says."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.to_patch_emb.parameters()):
            return super().embed_patches(volumes)
        slabs = volumes.split(self.patch_depth, dim=2)
        return torch.cat([self.to_patch_emb(slab) for slab in slabs], dim=1)


_QUICK: dict[type, type] = {
    RelativePositionBias: QuickRelativePositionBias,
    Attention: QuickAttention,
    FeedForward: QuickFeedForward,
    Transformer: QuickTransformer,
    VectorQuantiser: QuickVectorQuantiser,
    VisionTransformer: QuickVisionTransformer,
}


def _plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a linear layer is nothing but its weight: no adapter on it, nobody listening."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks
