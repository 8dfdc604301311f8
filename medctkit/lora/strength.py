"""A trained model at another strength, and what training left in its weights; nothing is trained here."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale

from medctkit.lora.adapter import merge_lora
from medctkit.lora.placement import parts_of, presets_of
from medctkit.model.protocol import Model


def can_be_scaled(model: Model) -> bool:
    """Whether a model carries an adapter that adds to its weights, so that there is less and more of it.

    LoRA, rsLoRA and LoRA+ do. DoRA scales the weight itself, PiSSA takes a part out of it, and the rest multiply.
    """
    config: Any = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", ""), None)
    begun = getattr(config, "init_lora_weights", True)
    return getattr(config, "peft_type", "") == "LORA" and not config.use_dora and begun in (True, False, "gaussian")


@contextmanager
def at_strength(model: Model, strength: float, start: Mapping[str, torch.Tensor] | None = None) -> Iterator[Model]:
    """The model with `strength` times what training added to its weights, within a block: W + strength * (W' - W).

    0 is the base model bit for bit, 1 the trained one, and between them lie the averages of their weights (WiSE-FT,
    Wortsman et al. 2022, arXiv 2109.01903). Beyond 1 is more than training did. A model whose own weights were trained,
    in place of a LoRA, needs the trained parameters as they were at the `start`, by name.

    Raises:
        ValueError: a strength that is not a finite number; a model that has no adapter of this kind, and no `start`.
    """
    if not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number such as 0.5, got {strength}")
    if start is None:
        if not can_be_scaled(model):
            raise ValueError("this model carries no adapter that can be scaled (LoRA, rsLoRA, LoRA+); give `start`")
        with rescale_adapter_scale(model, strength):
            yield model
        return
    parameters = dict(model.named_parameters())
    with _given_back([parameters[name] for name in start]) as trained:
        with torch.no_grad():
            for (name, before), after in zip(start.items(), trained, strict=True):
                before = before.to(after.device)
                parameters[name].copy_(before + strength * (after - before))
        yield model


@contextmanager
def at_rank(model: Model, rank: int) -> Iterator[Model]:
    """The model with every LoRA update cut down to its `rank` strongest directions, within a block.

    That is the update B A of this rank that is nearest to the trained one (Eckart and Young 1936); 0 is the base model.

    Raises:
        ValueError: a rank below 0; a model without a LoRA.
    """
    layers: list[Any] = [m for m in model.modules() if getattr(m, "lora_A", None)] if can_be_scaled(model) else []
    if not layers or rank < 0:
        raise ValueError(f"expected a model with a LoRA and a rank of at least 0, got {type(model).__name__}, {rank}")
    pairs = [(m.lora_A[name].weight, m.lora_B[name].weight) for m in layers for name in m.active_adapters]
    with _given_back([matrix for pair in pairs for matrix in pair]):
        with torch.no_grad():
            for A, B in pairs:
                u, s, v = torch.linalg.svd(B @ A, full_matrices=False)
                s[rank:] = 0
                A.copy_(v[: len(A)])
                B.copy_(u[:, : len(A)] * s[: len(A)])
        yield model


@contextmanager
def _given_back(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Copies of parameters, which may change within the block and have these values again after it."""
    copies = [p.detach().clone() for p in parameters]
    try:
        yield copies
    finally:
        with torch.no_grad():
            for p, before in zip(parameters, copies, strict=True):
                p.copy_(before)


def intruder_dimensions(before: Model, after: Model, leading: int = 10, below: float = 0.5) -> float:
    """How many of the `leading` singular vectors of a trained weight resemble none of the weight's before.

    Those are new whose cosine to every vector from before is `below` this, up to its sign. The mean over q, k and v of
    both encoders. Left singular vectors, and the default limits, as in Shuttleworth et al. 2024, "LoRA vs Full
    Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228).
    """
    pattern = re.compile("|".join(presets_of(parts_of(before))["paper"].patterns.values()))
    old = {name: module.weight for name, module in before.named_modules() if pattern.fullmatch(name)}
    trained = dict(merge_lora(after).named_modules())
    found = []
    for name, weight in old.items():
        u, new = (torch.linalg.svd(w.detach(), full_matrices=False)[0] for w in (weight, trained[name].weight))
        likeness = (u.T @ new[:, :leading]).abs().amax(0)  # (out, k).T (out, leading) -> of each, the greatest
        found.append((likeness < below).sum().item())
    return sum(found) / len(found)
