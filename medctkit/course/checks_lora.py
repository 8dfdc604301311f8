"""What is right and what is wrong in the exercises of notebook 02."""

from collections.abc import Callable

import torch
from torch import nn

from medctkit.course.exercises import Wrong, checks, number
from medctkit.lora.counting import search_placements
from medctkit.lora.linear import LoRALinear
from medctkit.lora.placement import PRESETS

BUDGET = 1_000_000  # parameters, in exercise 02.2


def _adapter_size(fan_in: int, fan_out: int, r: int) -> int:
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(fan_in, fan_out), r, 2 * r)
    return layer.A.numel() + layer.B.numel()


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
        expected = _adapter_size(fan_in, fan_out, r)
        if found == expected:
            continue
        layer = f"a {fan_in} -> {fan_out} layer at rank {r}"
        if found in (fan_in * fan_out, fan_in * fan_out + fan_out):
            raise Wrong(f"For {layer} you give {found:,.0f}: that is the frozen layer itself. Count A and B.")
        if found == r * fan_in * fan_out:
            raise Wrong(f"For {layer} you multiply everything. A has shape (r, in), B has shape (out, r): add the two.")
        if found in (r * fan_in, r * fan_out):
            raise Wrong(f"For {layer} you give {found:,.0f}: that is one of the two matrices.")
        if found in (2 * r * fan_in, 2 * r * fan_out):
            raise Wrong(f"For {layer} you give {found:,.0f}: right for a square layer only; in and out differ here.")
        if found == expected + fan_out:
            raise Wrong(f"For {layer} you give {fan_out} too many: an adapter has no bias of its own.")
        raise Wrong(f"For {layer} you give {found:,.0f}. A has shape (r, in), B has shape (out, r).")
    return "It grows with in + out, the layer with in times out: the larger the layer, the smaller the adapter's share."


@checks("02.2")
def largest_rank_within_budget(rank: int) -> str:
    """The largest rank at which preset "paper" stays within the budget on the full-size model."""
    found = number(rank, "a rank")
    if found != int(found) or found < 1:
        raise Wrong(
            f"A rank is a whole number of at least 1; got {found:g}. Round down: half a direction doesn't exist."
        )
    size = _trainable("paper", int(found))
    if size > BUDGET:
        raise Wrong(f"Rank {found:.0f} has {size:,} parameters, more than {BUDGET:,}.")
    larger = _trainable("paper", int(found) + 1)
    if larger <= BUDGET:
        raise Wrong(
            f"Rank {found:.0f} has {size:,} parameters: it fits, but so does rank {found + 1:.0f} with {larger:,}."
        )
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
    found = merge(weight.clone(), a.clone(), b.clone(), alpha, r)
    if not isinstance(found, torch.Tensor) or found.shape != weight.shape:
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise Wrong(f"The merged weight has the shape of W, {tuple(weight.shape)}; got {got}.")
    if torch.allclose(found, expected, atol=1e-5):
        return "One matrix as before: after merging, LoRA costs no time and no memory. It can be taken out again, too."
    update = b @ a
    for scale, said in (
        (1.0, "You add B A itself: the update is scaled by alpha / r."),
        (r / alpha, "You scale by r / alpha: it is the other way round."),
        (alpha, "You scale by alpha: divide by r too, so that the update keeps its size when r changes."),
        (1 / r, "You scale by 1 / r: alpha is missing."),
    ):
        if torch.allclose(found, weight + scale * update, atol=1e-5):
            raise Wrong(said)
    if torch.allclose(found, alpha / r * update, atol=1e-5):
        raise Wrong("That is the update alone: W is missing.")
    if torch.allclose(found, weight, atol=1e-5):
        raise Wrong("That is W, unchanged: the update is missing.")
    if torch.allclose(found, weight - alpha / r * update, atol=1e-5):
        raise Wrong("You subtract the update; that takes an adapter out of a merged weight.")
    off = (found - expected).abs().max()
    raise Wrong(
        f"The merged layer and the layer with its adapter differ by up to {off:.2g}. Look at W x + (alpha / r) B A x."
    )


@checks("02.4")
def share_of_the_text_encoder(share: float) -> str:
    """Share of the preset "paper"'s trainable parameters that sit in the text encoder."""
    found = number(share, "a share between 0 and 1")
    text, both = _trainable("text", PRESETS["text"].r), _trainable("paper", PRESETS["paper"].r)
    expected = text / both
    if abs(found - expected) < 0.005:
        return (
            f"{expected:.1%}: most of the budget goes to the encoder that reads, because its layers are wider and more "
            "of them. Whether that is where it helps is a question for notebook 06."
        )
    if abs(found - 100 * expected) < 0.5:
        raise Wrong("You give it in per cent: expected a share between 0 and 1.")
    if abs(found - (1 - expected)) < 0.005:
        raise Wrong("That is the share of the vision encoder.")
    if found < 0.01:
        raise Wrong("That is a share of the whole model: divide by the parameters that are trained.")
    if found > 1:
        raise Wrong(f"Expected a share between 0 and 1; got {found:g}. Divide by all parameters that are trained.")
    raise Wrong(f"You give {found:.1%}. Per rank: 8 vision layers with 1,792 each, 12 text layers with 4,608 each.")
