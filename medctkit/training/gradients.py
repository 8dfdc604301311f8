"""The gradient of a large batch in little memory, over several processes.

Both losses compare the volumes of a batch: one tells each apart from all reports, the other centres margins on their
mean. So they cannot be cut into small batches and added up. But the encoders only meet in the loss. Caching the
gradients of the embeddings (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", arXiv 2101.06983) uses that:

1. embed every small batch without keeping anything for the backward pass;
2. compute the loss on all embeddings, and from it the gradient of each embedding;
3. embed every small batch again, now keeping what the backward pass needs, and send its gradients back.

The result is the gradient of the whole batch, exactly, in the memory of one small batch, for one more forward pass.
With several processes step 2 sees the embeddings of all of them; each process then does step 3 for its own volumes,
and the gradients are added up.

`EmbeddedBatch` is steps 1 and 3; step 2 is in sight in `loop.step_gradients`.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator

from medctkit.model.protocol import Model
from medctkit.training.settings import FineTuneConfig

KNOWN = ("report_id", "labels", "anchor")  # of a batch, what the loss needs beside embeddings


def seed_from(*parts: Any) -> int:
    """A seed below 2**63 from anything that can be written down; the same on every machine."""
    return random.Random(":".join(map(str, parts))).getrandbits(63)


class EmbeddedBatch:
    """A batch after its forward pass, and its way back: embeddings of all processes, of which a loss can be made.

    The embeddings are leaves: the backward pass of the loss ends there, and `backward` carries it on from there into
    the encoders. Dropout draws its noise from a seed made of step and place in the batch: the same both times, and in
    a run that was interrupted, whatever the number of processes.

    Args:
        model: CT-CLIP, in training mode.
        small_batches: gives this process's share of the batch in `parts` small batches of equal size, as
            `dataset.collate` makes them, and, if there are several, all of them once more in the same order.
        parts: small batches per process; 1: the whole share at once, embedded only once.
        config: weights of the losses, and the seed of dropout.
        accelerator: device, precision and the other processes.
        prompts: tokens (36, n) from `objectives.draw_prompts`; needed with a prompt weight.
        step: number of the optimiser step.

    Of the joint batch of all processes it has `images` and `texts` (b, p) and `prompts` (36, p), L2-normalised, and as
    `known` its `report_id` (b,), `labels` (b, 18) and, if there is one, `anchor` (b, p). Texts and prompts are None
    where they have no weight.
    """

    def __init__(
        self,
        model: Model,
        small_batches: Iterator[Mapping[str, Any]],
        parts: int,
        config: FineTuneConfig,
        accelerator: Accelerator,
        prompts: Mapping[str, torch.Tensor] | None = None,
        step: int = 1,
    ):
        self._model, self._small_batches, self._parts, self._accelerator = model, small_batches, parts, accelerator
        self._reports, self._seed = bool(config.contrastive_weight), (config.seed, step)
        self._first = accelerator.process_index * parts  # of all small batches, this process's first
        self._own: list[dict[str, torch.Tensor]] = []
        self._studies: list[str] = []
        known: list[dict[str, torch.Tensor]] = []
        for part in range(parts):
            batch = next(small_batches)
            self._own.append(self._embed(batch, part, gradients=parts == 1))
            known.append({name: batch[name].to(accelerator.device) for name in KNOWN if name in batch})
            self._studies += batch["study"]
        del batch  # its volumes need not wait beside the next ones
        torch.manual_seed(seed_from(*self._seed, "prompts"))
        self._asked: torch.Tensor | None = None
        if config.prompt_weight and prompts is not None:
            with accelerator.autocast():
                self._asked = self._embed_texts(prompts)
        self._joint = {name: x.requires_grad_() for name, x in self._of_all(self._own).items()}
        self.images, self.texts = self._joint["images"], self._joint.get("texts")
        self.prompts = None if self._asked is None else self._asked.detach().requires_grad_()
        self.known = self._of_all(known)

    def backward(self) -> None:
        """Send the gradients of the embeddings through the encoders, into `.grad` of everything trainable."""
        if self._asked is not None and self.prompts is not None and self.prompts.grad is not None:
            _backward([(self._asked, self.prompts.grad)])
        size, processes = len(self._own[0]["images"]), self._accelerator.num_processes
        for part in range(self._parts):
            found = self._own[part]
            if self._parts > 1:
                found = self._embed(next(self._small_batches), part, gradients=True)
            rows = slice((self._first + part) * size, (self._first + part + 1) * size)
            # times `processes`, for the mean over the processes has to be a sum of what each did for its own volumes
            joint = {name: leaf.grad[rows] * processes for name, leaf in self._joint.items() if leaf.grad is not None}
            _backward([(found[name], gradient) for name, gradient in joint.items()])
        if processes > 1:
            _average([p.grad for p in self._model.parameters() if p.grad is not None], self._accelerator)

    def suspects(self) -> list[str]:
        """This process's studies whose embedding is not finite, or all if none is to blame."""
        finite = torch.cat([torch.stack([x.isfinite().all(-1) for x in part.values()]).all(0) for part in self._own])
        blamed = [study for study, fine in zip(self._studies, finite.tolist(), strict=True) if not fine]
        return blamed or self._studies

    def _embed(self, batch: Mapping[str, Any], part: int, gradients: bool) -> dict[str, torch.Tensor]:
        """Embeddings (b, p) of small batch `part`."""
        torch.manual_seed(seed_from(*self._seed, self._first + part))
        with torch.set_grad_enabled(gradients), self._accelerator.autocast():
            pixels = batch["pixel_values"].to(self._accelerator.device)
            found = {"images": self._model.encode_image(pixels).float()}
            if self._reports:
                found["texts"] = self._embed_texts(batch)
        return found

    def _embed_texts(self, words: Mapping[str, torch.Tensor]) -> torch.Tensor:
        ids, mask = (words[name].to(self._accelerator.device) for name in ("input_ids", "attention_mask"))
        return self._model.encode_text(ids, mask).float()

    def _of_all(self, own: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Small batches of this process put together, and then those of all processes."""
        return {name: self._accelerator.gather(torch.cat([part[name].detach() for part in own])) for name in own[0]}


def _backward(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Send gradients back from those outputs that anything trainable had a part in."""
    trained = [pair for pair in pairs if pair[0].requires_grad]
    if trained:
        outputs, given = zip(*trained, strict=True)
        torch.autograd.backward(outputs, given)


def _average(gradients: list[torch.Tensor], accelerator: Accelerator) -> None:
    """The mean over the processes of each gradient, in one message: an adapter's are 7 MB at full size."""
    together = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def refuse_non_finite(what: str, value: torch.Tensor, step: int, studies: Callable[[], list[str]]) -> None:
    """Stop on a number that is not finite.

    Raises:
        FloatingPointError: `value`, a scalar, is not finite; tells the step and the `studies` to look at.
    """
    if not torch.isfinite(value).all():
        raise FloatingPointError(
            f"{what} is {value.item():g} at step {step}, studies {', '.join(studies())}. "
            "Look at these volumes for values outside [-1, 1], lower learning_rate, or train in float32"
        )
