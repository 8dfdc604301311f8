"""Zero-shot classification: sentences that state and that deny each finding, and which side the volume is nearer to.

Whether that is zero-shot depends on the model: a base model that learnt from reports alone is, one that was adapted
with labels of the findings is asked in the same way, and is supervised.

The prompts of the paper, "{finding} is present." and "{finding} is not present.", follow the evaluation of
CT-CLIP (arXiv 2403.17834). Several wordings of each side make an ensemble: their normalised embeddings are averaged
and the average is normalised again, as in CLIP's prompt ensembling (Radford et al. 2021, arXiv 2103.00020, section
3.1.4), so that an ensemble costs no more per volume than a pair. Prompts are encoded once for a model and every volume
once, not once per finding.

Prompts are a data file, `assets/prompts.json`; your own go into a file of the same form. The wordings of "ensemble" are
headlines such as "No evidence of pulmonary fibrotic sequela.", which need no article and so fit all 18 names. None is a
wording of the reports that the kit trains on; "training-style" is the pair that is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from medctkit.common.processes import process_and_processes
from medctkit.common.text import listed
from medctkit.findings import FINDINGS
from medctkit.metrics.scores import mean_auroc
from medctkit.model.protocol import Model
from medctkit.zero_shot.prompts import Prompts, prompt_sentences

LARGEST = 1.01  # of a volume's values, whose limits are -1 and 1
AT_A_TIME = 128  # sentences in the text encoder


@dataclass(frozen=True)
class Embedded:
    """A data set seen through a model, in the order of the data set."""

    embeddings: torch.Tensor  # (n, projection_dim) float32, L2-normalised
    labels: np.ndarray  # (n, 18); NaN where unknown
    patients: np.ndarray  # (n,) names
    studies: np.ndarray  # (n,) names


class ZeroShotClassifier:
    """Probabilities of findings from a model and prompts.

    Prompts are encoded once, and again when the model has changed: trained, its adapter switched, scaled or merged.

    Args:
        model: a `VisionLanguageModel` such as `CTCLIPModel`, with or without an adapter.
        tokenizer: of its text encoder.
        prompts: "paper", "training-style", "ensemble", or your own; see `prompt_sentences`.
        findings: names to put into the templates, in the order of the columns of the scores.

    Raises:
        FileNotFoundError: see `prompt_sentences`.
        ValueError: see `prompt_sentences`; a prompt longer than the text encoder's positions.
    """

    def __init__(self, model: Model, tokenizer: Any, prompts: Prompts = "paper", findings: Sequence[str] = FINDINGS):
        self.model, self.tokenizer, self.findings = model, tokenizer, tuple(findings)
        self._wordings = [sentences for side in prompt_sentences(prompts, self.findings) for sentences in side]
        flat = [sentence for sentences in self._wordings for sentence in sentences]
        self._words = words_of(model, tokenizer, flat)
        self._text, self._scale = torch.empty(0), torch.ones(())
        self._seen: Any = None  # the model's state when they were encoded

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def text_embeds(self) -> torch.Tensor:
        """Embeddings of the prompts (2, k, p): stating, denying. Kept while the model stays as it is."""
        state = _state_of(self.model)
        if self._seen != state:
            parts = (self._words[name].to(self.device).split(AT_A_TIME) for name in ("input_ids", "attention_mask"))
            with evaluating(self.model):
                embeds = torch.cat([self.model.encode_text(*part) for part in zip(*parts, strict=True)]).float()
                self._scale = self.model.temperature.detach().float().exp()
            of_wording = embeds.split([len(sentences) for sentences in self._wordings])
            # what several wordings have in common; a single one stays itself, to the last bit
            found = [e[0] if len(e) == 1 else nn.functional.normalize(e.mean(0), dim=-1) for e in of_wording]
            self._text = torch.stack(found).unflatten(0, (2, -1))  # (2 k, p) -> (2, k, p)
            self._seen = state
        return self._text

    def scores_from_embeddings(self, image_embeds: ArrayLike | torch.Tensor) -> np.ndarray:
        """Probabilities (b, k) of the findings from image embeddings (b, p).

        Raises:
            ValueError: embeddings of another shape.
            FloatingPointError: an embedding, of a volume or a prompt, that is not finite.
        """
        stating, denying = self.text_embeds()
        image_embeds = torch.as_tensor(image_embeds, dtype=torch.float32, device=stating.device)
        if image_embeds.ndim != 2 or image_embeds.shape[1] != stating.shape[1]:
            raise ValueError(
                f"image embeddings have shape {tuple(image_embeds.shape)}; this model's are (volumes, "
                f"{stating.shape[1]}): embed the volumes with this model"
            )
        refuse_non_finite(image_embeds, [f"volume {i}" for i in range(len(image_embeds))])
        refuse_non_finite(torch.cat([stating, denying], 1), [f"the prompts of {name}" for name in self.findings])
        refuse_non_finite(self._scale.reshape(1, 1), ["the temperature"])
        with torch.autocast(stating.device.type, enabled=False):  # bfloat16 would round scores to ties
            # the softmax of two similarities is the sigmoid of their difference
            return torch.sigmoid(self._scale * image_embeds @ (stating - denying).T).cpu().numpy()

    def scores(self, volumes: torch.Tensor) -> np.ndarray:
        """Probabilities (b, k) of the findings for volumes (b, 1, d, h, w) in [-1, 1].

        Raises:
            ValueError: values beyond: they look like HU.
            FloatingPointError: see `scores_from_embeddings`.
        """
        refuse_unscaled(volumes)
        with evaluating(self.model):
            return self.scores_from_embeddings(self.model.encode_image(volumes.to(self.device)))

    def embed(self, dataset: Any, batch_size: int = 32, progress: bool = True, workers: int = 0) -> Embedded:
        """Encode every volume of a data set once; under `accelerate launch` the processes share the work.

        Each of them gets all of the data set, in its order.

        Args:
            dataset: items as `CTReportDataset` gives them.
            batch_size: volumes at a time; 1 or 2 for the full-size model on a small GPU.
            progress: show it.
            workers: processes that load volumes ahead; 0: none, right for data in memory.

        Raises:
            ValueError: an empty data set.
            FloatingPointError: an embedding that is not finite; says of which study.
        """
        if not len(dataset):
            raise ValueError("the data set has no studies to embed")
        process, processes = process_and_processes()
        share = Subset(dataset, range(process, len(dataset), processes))
        loader = DataLoader(share, batch_size=batch_size, collate_fn=list, num_workers=workers)
        found = []
        with evaluating(self.model):
            for batch in tqdm(loader, desc="embedding", disable=not progress or process > 0):
                volumes = torch.stack([item["pixel_values"] for item in batch])
                embeds = self.model.encode_image(volumes.to(self.device)).float().cpu()
                refuse_non_finite(embeds, [f"study {item['study']}" for item in batch])
                for embed, item in zip(embeds.numpy(), batch, strict=True):
                    found.append((embed, item["labels"].numpy(), item["patient"], item["study"]))
        if processes > 1:
            shares: list[Any] = [None] * processes
            dist.all_gather_object(shares, found)
            found = [shares[i % processes][i // processes] for i in range(len(dataset))]
        embeddings, labels, patients, studies = (np.array(part) for part in zip(*found, strict=True))
        return Embedded(torch.from_numpy(embeddings), labels, patients, studies)


def _state_of(model: nn.Module) -> tuple:
    """What changes when the model computes something else: its tensors, their in-place changes, adapters in use."""
    tensors = [(id(p), p._version, p.dtype, p.device) for p in model.parameters()]
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "adapter_layer_names")]
    used = [(tuple(m.active_adapters), m.disable_adapters, tuple(m.merged_adapters)) for m in layers]
    return tensors, used, [tuple(getattr(m, "scaling", {}).items()) for m in layers]


def refuse_unscaled(volumes: torch.Tensor) -> None:
    """Refuse volumes whose values lie beyond -1 to 1, as those in HU do: a ValueError."""
    if volumes.numel() and float(volumes.abs().max()) > LARGEST:
        low, high = map(float, volumes.aminmax())
        raise ValueError(f"volumes go from {low:g} to {high:g}; expected -1 to 1, as `preprocess` gives them")


def refuse_non_finite(embeds: torch.Tensor, names: Sequence[str]) -> None:
    """Stop at an embedding (n, p) of which no score can be made; `names` say of what each is.

    Raises:
        FloatingPointError: the first few of them.
    """
    broken = [name for name, fine in zip(names, embeds.isfinite().all(-1).tolist(), strict=True) if not fine]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} of {len(names)} embeddings are not finite:\n{listed(broken)}\nA voxel is NaN or infinite "
            "(look at the volume), a weight is (load the model or its adapter anew), or float16 overflowed (compute in "
            "float32 or bfloat16)"
        )


def words_of(model: Model, tokenizer: Any, sentences: Sequence[str]) -> Any:
    """Token ids and attention mask of sentences.

    Raises:
        ValueError: one longer than the text encoder takes; says which and how long.
    """
    words = tokenizer(list(sentences), padding=True, return_tensors="pt")
    lengths, limit = words["attention_mask"].sum(1), model.longest_text
    if lengths.max() > limit:
        longest = shorten(sentences[int(lengths.argmax())], 60, placeholder=" ...")
        raise ValueError(f"{longest!r} has {lengths.max()} tokens, the text encoder takes {limit}; shorten it")
    return words


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode; afterwards the model is as it was."""
    training = {module: module.training for module in model.modules()}  # parts may differ, a frozen one say
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was


def validation_score(
    dataset: Any, tokenizer: Any, prompts: Prompts = "paper", batch_size: int = 32, workers: int = 0
) -> Callable:
    """A function from a model to its mean AUROC on a data set: what `finetune` maximises.

    Use it on validation studies only. Findings with one class in the data set are left out of the mean, and unknown
    labels (NaN) count nowhere. The other arguments are those of `ZeroShotClassifier` and its `embed`.

    Raises:
        ValueError: (when called) no finding has both classes.
    """

    def score(model: Model) -> float:
        classifier = ZeroShotClassifier(model, tokenizer, prompts)
        found = classifier.embed(dataset, batch_size, progress=False, workers=workers)
        return mean_auroc(found.labels, classifier.scores_from_embeddings(found.embeddings))

    score.dataset = dataset  # type: ignore[attr-defined]  # part of what a run is made of
    return score
