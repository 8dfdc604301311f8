"""LoRA, the equation (Hu et al. 2021, arXiv 2106.09685), readable in a minute.

A trained weight matrix W (out, in) is frozen, and a low-rank update is learned beside it:

    y = W x + b + (alpha / r) B A x,      A (r, in) random,  B (out, r) zero at the start.

So training starts exactly at the base model, `r (in + out)` numbers are learned in place of `in * out`, and
afterwards B A can be added into W at no cost.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update.

    The lesson's version; the package itself uses peft, which a test holds equal to this in output, gradient and merge.

    Args:
        base: the linear layer to adapt, `weight` (out, in). Its parameters are frozen in place.
        r: rank of the update, at least 1.
        alpha: scale of the update; `alpha / r` keeps its size about constant when r changes.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        if r < 1:
            raise ValueError(f"rank r must be at least 1, got {r}; usual values are 4 to 64")
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as nn.Linear starts its own weight
        self.scaling, self.merged = alpha / r, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., in) to (..., out)."""
        y = self.base(x)
        if self.merged:
            return y
        return y + self.scaling * F.linear(F.linear(x, self.A), self.B)  # (..., in) -> (..., r) -> (..., out)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update into W: same output, no extra work per call."""
        if not self.merged:
            self.base.weight += self.scaling * self.B @ self.A  # (out, r) (r, in) -> (out, in)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out of W again (equal to the base up to rounding)."""
        if self.merged:
            self.base.weight -= self.scaling * self.B @ self.A
            self.merged = False
