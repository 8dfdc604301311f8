"""What is right and what is wrong in the exercises of notebook 02."""

from collections.abc import Callable

import torch
from torch import nn

from medctkit.course.exercises import Wrong, checks, expect, number
from medctkit.lora.counting import search_placements
from medctkit.lora.linear import LoRALinear
from medctkit.lora.placement import PRESETS

BUDGET = 1_000_000  # parameters, in exercise 02.2


def _trainable(preset: str, r: int) -> int:
    """Parameters of a preset's adapter on the full-size model."""
    vision, text = (" + ".join(names) for names in (PRESETS[preset].vision, PRESETS[preset].text))
    found = search_placements(ranks=(r,))
    return int(found.loc[(found["vision"] == vision) & (found["text"] == text), "trainable"].item())


@checks("02.1")
def adapter_size(lora_size: Callable[[int, int, int], int]) -> str:
    """Parameters of a rank-r adapter on a linear layer."""
    for fan_in, fan_out, r in ((512, 256, 24), (768, 768, 8), (5, 3, 1)):
        found = number(lora_size(fan_in, fan_out, r), "a number of parameters")
        layer = LoRALinear(nn.Linear(fan_in, fan_out, device="meta"), r, 2 * r)
        right = layer.A.numel() + layer.B.numel()
        given = f"For a {fan_in} -> {fan_out} layer at rank {r} you give {found:,.0f}"
        frozen = f"{given}: that is the frozen layer itself. Count A and B."
        one, square = f"{given}: that is one of the two matrices.", f"{given}: right for a square layer only."
        slips = {
            right + fan_out: f"{given}, {fan_out} too many: an adapter has no bias of its own.",
            2 * r * fan_in: square,
            2 * r * fan_out: square,
            r * fan_in: one,
            r * fan_out: one,
            r * fan_in * fan_out: f"{given}: you multiply everything. A and B are two matrices: add their sizes.",
            fan_in * fan_out: frozen,
            fan_in * fan_out + fan_out: frozen,
        }
        expect(found, right, slips, f"{given}. A has shape (r, in), B has shape (out, r).", tolerance=0)
    return "It grows with in + out, the layer with in times out: the larger the layer, the smaller the adapter's share."


@checks("02.2")
def largest_rank_within_budget(rank: int) -> str:
    """The largest rank at which preset "paper" stays within the budget on the full-size model."""
    found = number(rank, "a rank")
    if found != int(found) or found < 1:
        raise Wrong(f"A rank is a whole number of at least 1; got {found:g}. Round down: half a direction isn't one.")
    size, larger = (_trainable("paper", int(found) + more) for more in (0, 1))
    if size > BUDGET:
        raise Wrong(f"Rank {found:.0f} has {size:,} parameters, more than {BUDGET:,}.")
    if larger <= BUDGET:
        raise Wrong(f"Rank {found:.0f} has {size:,} parameters: it fits, but so does rank {found + 1:.0f}.")
    return f"{size:,} parameters. All of an adapter's size is proportional to its rank, so one division answers it."


@checks("02.3")
def merged_weight(merge: Callable[..., torch.Tensor]) -> str:
    """The weight of one plain layer that does what a layer with its adapter does: `merge(W, A, B, alpha, r)`."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((6, 9), (2, 9), (6, 2)))
    alpha, r = 8.0, 2
    layer = LoRALinear(nn.Linear(9, 6, bias=False), r, alpha)
    with torch.no_grad():
        layer.base.weight.copy_(weight), layer.A.copy_(a), layer.B.copy_(b)
    layer.merge()
    expected = layer.base.weight.detach()
    given = merge(weight.clone(), a.clone(), b.clone(), alpha, r)
    try:
        found = torch.as_tensor(given).to(weight.dtype)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"The merged weight is a tensor like W; got {type(given).__name__}.") from None
    if found.shape != weight.shape:
        raise Wrong(f"The merged weight has the shape of W, {tuple(weight.shape)}; got {tuple(found.shape)}.")
    if torch.allclose(found, expected, atol=1e-5):
        return "One matrix as before: after merging, LoRA costs no time and no memory. It can be taken out again, too."
    slips = {  # how much of W, and how much of B A
        (1, 1): "You add B A itself: the update is scaled by alpha / r.",
        (1, r / alpha): "You scale by r / alpha: it is the other way round.",
        (1, alpha): "You scale by alpha: divide by r too, so that the update keeps its size when r changes.",
        (1, 1 / r): "You scale by 1 / r: alpha is missing.",
        (0, alpha / r): "That is the update alone: W is missing.",
        (1, 0): "That is W, unchanged: the update is missing.",
        (1, -alpha / r): "You subtract the update; that takes an adapter out of a merged weight.",
    }
    for (kept, scale), said in slips.items():
        if torch.allclose(found, kept * weight + scale * b @ a, atol=1e-5):
            raise Wrong(said)
    off = (found - expected).abs().max()
    raise Wrong(f"Merged layer and layer with adapter differ by up to {off:.2g}. Look at W x + (alpha / r) B A x.")


@checks("02.4")
def share_of_the_text_encoder(share: float) -> str:
    """Share of the preset "paper"'s trainable parameters that sit in the text encoder."""
    found = number(share, "a share between 0 and 1")
    right = _trainable("text", PRESETS["text"].r) / _trainable("paper", PRESETS["paper"].r)
    otherwise = f"You give {found:.1%}. Per rank: 8 vision layers with 1,792 each, 12 text layers with 4,608 each."
    if found < 0.01:
        otherwise = "That is a share of the whole model: divide by the parameters that are trained."
    elif found > 1:
        otherwise = f"Expected a share between 0 and 1; got {found:g}. Divide by all parameters that are trained."
    slips = {
        100 * right: "You give it in per cent: expected a share between 0 and 1.",
        1 - right: "That is the share of the vision encoder.",
    }
    expect(found, right, slips, otherwise, tolerance=0.006)
    return (
        f"{right:.1%}: most of the budget goes to the encoder that reads, because its layers are wider and more "
        "of them. Whether that is where it helps is a question for notebook 06."
    )
