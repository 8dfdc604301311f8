"""Zero-shot classification: two sentences for each finding, and which one the volume is nearer to.

The prompts of the paper, "{finding} is present." and "{finding} is not present.", follow the evaluation of
CT-CLIP (arXiv 2403.17834). Prompts are encoded once for a model and every volume once, not once per finding.
Prompts are a data file, `assets/prompts.json`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from medctkit.findings import FINDINGS

PROMPTS: dict[str, list[str]] = json.loads((files("medctkit") / "assets" / "prompts.json").read_text())


@dataclass(frozen=True)
class Embedded:
    """A data set seen through a model, in the order of the data set.

    Attributes:
        embeddings: (n, projection_dim) float32, L2-normalised.
        labels: (n, 18).
        patients: (n,) names.
        studies: (n,) names.
    """

    embeddings: torch.Tensor
    labels: np.ndarray
    patients: np.ndarray
    studies: np.ndarray


def prompt_pair(prompts: str | Sequence[str]) -> tuple[str, str]:
    """The two templates of a named pair, or a pair of your own.

    Raises:
        ValueError: unknown name, not two templates, or a template without {finding}.
    """
    if isinstance(prompts, str):
        if prompts not in PROMPTS:
            raise ValueError(
                f"unknown prompts {prompts!r}; choose one of {sorted(PROMPTS)} or give a pair of templates"
            )
        prompts = PROMPTS[prompts]
    pair = tuple(prompts)
    if len(pair) != 2 or not all(isinstance(p, str) for p in pair):
        raise ValueError(
            f"prompts must be two templates, one that states and one that denies a finding; got {prompts!r}"
        )
    for template in pair:
        if "{finding}" not in template:
            raise ValueError(f"prompt {template!r} has no {{finding}} in it, so all findings would be asked the same")
    return pair


class ZeroShotClassifier:
    """Probabilities of findings from a CT-CLIP model and a pair of prompts.

    Prompts are encoded at the first score and kept: after training the model or switching its adapter, make a
    new classifier.

    Args:
        model: a `CTCLIPModel`, with or without an adapter.
        tokenizer: of its text encoder.
        prompts: "paper", "training-style", or your own (stating, denying) templates with {finding} in them.
        findings: names to put into the templates, in the order of the columns of the scores.

    Raises:
        ValueError: see `prompt_pair`; a prompt longer than the text encoder's positions.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, prompts: str | Sequence[str] = "paper", findings=FINDINGS):
        self.model, self.tokenizer, self.findings = model, tokenizer, tuple(findings)
        stating, denying = prompt_pair(prompts)
        sentences = [t.replace("{finding}", name) for t in (stating, denying) for name in self.findings]
        self._words = tokenizer(sentences, padding=True, return_tensors="pt")
        longest, limit = self._words["input_ids"].shape[1], model.config.text_config["max_position_embeddings"]
        if longest > limit:
            raise ValueError(f"a prompt has {longest} tokens, the text encoder takes {limit}; shorten it")
        self._text: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def text_embeds(self) -> torch.Tensor:
        """Embeddings of the prompts (2, k, p): stating, denying. Encoded at the first call and kept."""
        if self._text is None:
            with _evaluating(self.model):
                found = self.model.encode_text(
                    self._words["input_ids"].to(self.device), self._words["attention_mask"].to(self.device)
                )
                self._scale = self.model.temperature.detach().float().exp()
            self._text = found.float().unflatten(0, (2, -1))  # (2 k, p) -> (2, k, p)
        return self._text

    def scores_from_embeddings(self, image_embeds) -> np.ndarray:
        """Probabilities (b, k) of the findings from image embeddings (b, p)."""
        stating, denying = self.text_embeds()
        image_embeds = torch.as_tensor(image_embeds, dtype=torch.float32, device=stating.device)
        with torch.autocast(stating.device.type, enabled=False):  # bfloat16 would round scores to ties
            # the softmax of two similarities is the sigmoid of their difference
            return torch.sigmoid(self._scale * image_embeds @ (stating - denying).T).cpu().numpy()

    def scores(self, volumes: torch.Tensor) -> np.ndarray:
        """Probabilities (b, k) of the findings for volumes (b, 1, d, h, w) in [-1, 1]."""
        with _evaluating(self.model):
            return self.scores_from_embeddings(self.model.encode_image(volumes.to(self.device)))

    def embed(self, dataset: Dataset, batch_size: int = 32, progress: bool = True, workers: int = 0) -> Embedded:
        """Encode every volume of a data set once; under `accelerate launch` the processes share the work.

        Args:
            dataset: items as `CTReportDataset` gives them.
            batch_size: volumes at a time; 1 or 2 for the full-size model on a small GPU.
            progress: show it.
            workers: processes that load volumes ahead; 0: none, right for data in memory.

        Returns:
            All of the data set in its order, in every process.

        Raises:
            ValueError: an empty data set.
        """
        from tqdm.auto import tqdm

        if not len(dataset):
            raise ValueError("the data set has no studies to embed")
        process, processes = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
        )
        share = Subset(dataset, range(process, len(dataset), processes))
        loader = DataLoader(share, batch_size=batch_size, collate_fn=list, num_workers=workers)
        found = []
        with _evaluating(self.model):
            for batch in tqdm(loader, desc="embedding", disable=not progress or process > 0):
                volumes = torch.stack([item["pixel_values"] for item in batch])
                embeds = self.model.encode_image(volumes.to(self.device)).float().cpu().numpy()
                found += [
                    (embed, item["labels"].numpy(), item["patient"], item["study"])
                    for embed, item in zip(embeds, batch, strict=True)
                ]
        if processes > 1:
            shares = [None] * processes
            dist.all_gather_object(shares, found)
            found = [shares[i % processes][i // processes] for i in range(len(dataset))]
        embeddings, labels, patients, studies = (np.array(part) for part in zip(*found, strict=True))
        return Embedded(torch.from_numpy(embeddings), labels, patients, studies)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
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
    dataset: Dataset, tokenizer: Any, prompts: str | Sequence[str] = "paper", batch_size: int = 32, workers: int = 0
) -> Callable:
    """A function from a model to its mean AUROC on a data set: what `finetune` maximises.

    Use it on validation studies only. Findings with one class in the data set are left out of the mean.

    Args:
        dataset: validation studies.
        tokenizer: of the text encoder.
        prompts: see `ZeroShotClassifier`.
        batch_size: see `ZeroShotClassifier.embed`.
        workers: see `ZeroShotClassifier.embed`.

    Raises:
        ValueError: (when called) no finding has both classes.
    """

    def score(model: nn.Module) -> float:
        from sklearn.metrics import roc_auc_score

        classifier = ZeroShotClassifier(model, tokenizer, prompts)
        found = classifier.embed(dataset, batch_size, progress=False, workers=workers)
        scores = classifier.scores_from_embeddings(found.embeddings)
        both = [k for k in range(len(FINDINGS)) if 0 < found.labels[:, k].mean() < 1]
        if not both:
            raise ValueError("no finding has both positive and negative studies in the validation data")
        return float(np.mean([roc_auc_score(found.labels[:, k], scores[:, k]) for k in both]))

    return score
