"""The gradient of one optimiser step: of a large contrastive batch, in little memory, over several processes.

In a contrastive batch each volume is told apart from all the others, so the loss cannot be cut into small batches
and added up. But the encoders only meet in the loss. Caching the gradients of the embeddings (Gao et al. 2021,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983) uses that:

1. embed every small batch without keeping anything for the backward pass;
2. compute the loss on all embeddings, and from it the gradient of each embedding;
3. embed every small batch again, now keeping what the backward pass needs, and send its gradients back.

The result is the gradient of the whole batch, exactly, in the memory of one small batch, for one more forward pass.
With several processes step 2 sees the embeddings of all of them, so that each volume is told apart from everybody's
reports; each process then does step 3 for its own volumes, and the gradients are added up.

Dropout draws its noise from a seed made of step and place in the batch: the same in 1 and 3, and in a run that was
interrupted, whatever the number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from medctkit.training.objectives import joint_loss

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Objective:
    """What the loss is made of.

    Args:
        contrastive_weight: weight of `objectives.contrastive_loss`.
        prompt_weight: weight of `objectives.finding_prompt_loss`.
    """

    contrastive_weight: float = 1.0
    prompt_weight: float = 1.0


def seed_from(*parts: Any) -> int:
    """A seed below 2**63 from anything that can be written down; the same on every machine."""
    return random.Random(":".join(map(str, parts))).getrandbits(63)


def step_gradients(
    model: nn.Module,
    small_batches: Iterator[Mapping[str, Any]],
    parts: int,
    objective: Objective,
    accelerator: Accelerator,
    prompts: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    step: int = 1,
) -> dict[str, torch.Tensor]:
    """Add the gradient of one batch's loss to `.grad` of everything trainable.

    Args:
        model: CT-CLIP, in training mode.
        small_batches: gives this process's share of the batch in `parts` small batches of equal size, as
            `dataset.collate` makes them, and, if there are several, all of them once more in the same order.
        parts: small batches per process; 1: the whole share at once, embedded only once.
        objective: weights of the losses.
        accelerator: device, precision and the other processes.
        prompts: tokens (36, n) as `objectives.draw_prompts` gives them; needed with a prompt weight.
        seed: of dropout, with `step`.
        step: number of the optimiser step.

    Returns:
        `contrastive`, `prompts` (those with a weight) and `loss`, of the joint batch of all processes.

    Raises:
        FloatingPointError: the loss is not finite; names the step and this process's studies.
    """
    processes, first = accelerator.num_processes, accelerator.process_index * parts

    def embed(batch: Mapping[str, Any], part: int, gradients: bool) -> dict[str, torch.Tensor]:
        """Embeddings (b, p) of small batch `part`."""
        torch.manual_seed(seed_from(seed, step, first + part))
        with torch.set_grad_enabled(gradients), accelerator.autocast():
            found = {"images": model.encode_image(batch["pixel_values"].to(accelerator.device)).float()}
            if objective.contrastive_weight:
                found["texts"] = _embed_texts(model, batch, accelerator).float()
        return found

    # 1. every small batch, without gradients where it will be embedded again
    embedded, known, studies = [], [], []
    for part in range(parts):
        batch = next(small_batches)
        embedded.append(embed(batch, part, gradients=parts == 1))
        known.append({name: batch[name].to(accelerator.device) for name in ("report_id", "labels")})
        studies += batch["study"]
    del batch  # its volumes need not wait beside the next ones
    torch.manual_seed(seed_from(seed, step, "prompts"))
    asked = None
    if objective.prompt_weight:
        with accelerator.autocast():
            asked = _embed_texts(model, prompts, accelerator).float()

    # 2. the loss on everybody's embeddings, and the gradient of each
    def everybodys(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: accelerator.gather(torch.cat([part[name].detach() for part in found])) for name in found[0]}

    joint = {name: x.requires_grad_() for name, x in everybodys(embedded).items()}
    asked_leaf = None if asked is None else asked.detach().requires_grad_()
    weights = (objective.contrastive_weight, objective.prompt_weight)
    losses = joint_loss(
        joint["images"], joint.get("texts"), asked_leaf, everybodys(known), model.temperature.float(), *weights
    )
    refuse_non_finite("loss", losses["loss"], step, _suspects(studies, embedded))
    accelerator.backward(losses["loss"])

    # 3. from the embeddings back through the encoders
    if asked is not None:
        _backward([asked], [asked_leaf.grad])
    size = len(embedded[0]["images"])
    for part in range(parts):
        found = embedded[part] if parts == 1 else embed(next(small_batches), part, gradients=True)
        rows = slice((first + part) * size, (first + part + 1) * size)
        # times `processes`, for the mean over the processes has to be a sum of what each did for its own volumes
        _backward([*found.values()], [joint[name].grad[rows] * processes for name in found])
    if processes > 1:
        _average([p for p in model.parameters() if p.grad is not None], accelerator)
    return {name: value.detach() for name, value in losses.items()}


def _embed_texts(model: nn.Module, words: Mapping[str, torch.Tensor], accelerator: Accelerator) -> torch.Tensor:
    device = accelerator.device
    return model.encode_text(words["input_ids"].to(device), words["attention_mask"].to(device))


def _backward(outputs: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    """Send gradients back from those outputs that anything trainable had a part in."""
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


def _average(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean over the processes of each gradient, in one message: an adapter's are 7 MB at full size."""
    together = torch.cat([p.grad.flatten() for p in parameters])
    together = accelerator.reduce(together, reduction="mean")
    for parameter, gradient in zip(parameters, together.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))


def _suspects(studies: list[str], embedded: list[dict[str, torch.Tensor]]) -> list[str]:
    """The studies whose embedding is not finite, or all if none is to blame."""
    finite = torch.cat([torch.stack([x.isfinite().all(-1) for x in part.values()]).all(0) for part in embedded])
    return [study for study, fine in zip(studies, finite.tolist(), strict=True) if not fine] or studies


def refuse_non_finite(what: str, value: torch.Tensor, step: int, studies: list[str]) -> None:
    """Stop on a number that is not finite; `value` is a scalar tensor, `what` its name.

    Raises:
        FloatingPointError: with the step and the studies.
    """
    if not torch.isfinite(value).all():
        raise FloatingPointError(
            f"{what} is {value.item():g} at step {step}, studies {', '.join(studies)}. "
            "Look at these volumes for values outside [-1, 1], lower learning_rate, or train in float32"
        )
