"""A warm start for contrastive pretraining: what a tower can learn before it has to agree with the other one.

Contrast alone stays at chance for hundreds of steps: the vision encoder is asked for what no text encoder can say yet.
So, as CT-ViT was trained to reconstruct before it became CT-CLIP's vision encoder (arXiv 2305.16037, 2403.17834):

1. `reconstruct`: each token tells which share of its patch lies in which band of Hounsfield units, all the way through
   the quantiser, whose codes are learnt here;
2. `project`: the projection is the reduced-rank ridge regression of the reports' phrases on the tokens, in closed form;
3. `read`: the text encoder learns to find the volumes whose reports hold a sentence, while images stay as they are
   (locked-image tuning, Zhai et al. 2021, arXiv 2111.07991).

Contrast then teaches the vision encoder. The projection, with a weight for each channel of each place, follows it more
slowly than 2 finds anew: so 2 and 3 are done again now and then, and at the end.

Labels have no part in it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from medctkit.training.report_sentences import phrases_of, sentences_of
from medctkit.zero_shot.classifier import evaluating

if TYPE_CHECKING:
    from medctkit.experiments.pretrain import Pretraining

BANDS = (-950, -900, -850, -800, -700, -500, -200, -60, 0, 40, 80, 150, 300, 600)  # HU, where one ends
SHARPNESS = 10.0  # of logits made of unit vectors


@dataclass(frozen=True)
class WarmStart:
    """Settings of the warm start.

    Args:
        reconstruct_steps: of the vision encoder alone; in the second half its tokens are quantised.
        reconstruct_batch: volumes in each.
        reconstruct_rate: peak learning rate.
        ridge: strength of the regression, see `projection_of`.
        phrases: how many of them, at most, the commonest first.
        read_steps: of the text encoder alone.
        read_batch: reports in each.
        read_rate: peak learning rate.
    """

    reconstruct_steps: int = 2_000
    reconstruct_batch: int = 16
    reconstruct_rate: float = 2e-3
    ridge: float = 3.0
    phrases: int = 2_000
    read_steps: int = 600
    read_batch: int = 64
    read_rate: float = 1e-3


def align(run: Pretraining) -> None:
    """Do 2 and 3: what the vision encoder sees becomes what reports say."""
    read(run, project(run))


def common_phrases(reports: Iterable[str], most: int) -> dict[str, float]:
    """Phrases that at least 0.7 and at most 80 % of the reports have, and the share that has each; the first `most`.

    A phrase that a part of it stands for, being as common, is left out.
    """
    having = [phrases_of(report) for report in reports]
    counts = Counter(phrase for found in having for phrase in found)

    def new(phrase: str) -> bool:
        words = phrase.split()
        return len(words) == 1 or counts[phrase] not in (counts[" ".join(words[1:])], counts[" ".join(words[:-1])])

    share = {phrase: count / len(having) for phrase, count in counts.items() if new(phrase)}
    common = [(phrase, part) for phrase, part in share.items() if 0.007 <= part <= 0.8]
    return dict(sorted(common, key=lambda each: (-each[1], each[0]))[:most])


def band_roots(volumes: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """Roots of the shares of `BANDS` in each patch of volumes (b, 1, d, h, w) of HU / 1,000: (b, t, h, w, bands).

    The root makes one bright voxel of 512, a calcification, count for more than the five hundredth part of a patch.
    """
    band = torch.bucketize(volumes[:, 0].contiguous(), torch.tensor(BANDS, device=volumes.device) / 1000)
    (b, d, h, w), (pd, ph, pw), bands = band.shape, patch, len(BANDS) + 1
    grid = (d // pd, h // ph, w // pw)
    place = torch.arange(b * math.prod(grid), device=volumes.device).reshape(b, *grid)
    for axis, times in enumerate(patch, start=1):
        place = place.repeat_interleave(times, dim=axis)
    counts = torch.bincount((place * bands + band).flatten(), minlength=b * math.prod(grid) * bands)
    return (counts / math.prod(patch)).sqrt().reshape(b, *grid, bands)


def reconstruct(run: Pretraining, kept: Path) -> None:
    """Train the vision encoder, its quantiser too, to tell from each token what its patch holds.

    Every `evaluate_every` steps all that it needs to go on is written to `kept`; what is there is gone on from.
    """
    from tqdm.auto import tqdm

    started, config, vision, codebook = time.perf_counter(), run.config.warm, run.model.vision_encoder, run.codebook
    head = torch.nn.Linear(run.model.config.vision_config["dim"], len(BANDS) + 1, device=run.device)
    sizes = run.model.config.vision_config
    patch = (sizes["temporal_patch_size"], sizes["patch_size"], sizes["patch_size"])
    generator = run.generator("reconstruct")

    def some(n: int) -> torch.Tensor:
        return run.moved(torch.randint(len(run.train), (n,), generator=generator).tolist(), generator)

    usual = band_roots(some(64), patch).flatten(0, -2)
    mean, spread = usual.mean(0), usual.std(0).clamp(min=0.05)  # a rare band counts as much as a common one
    optimizer = torch.optim.AdamW([*vision.parameters(), *head.parameters()], betas=(0.9, 0.98))
    parts, steps, done = {"vision": vision, "head": head, "optimizer": optimizer}, config.reconstruct_steps, 0
    if kept.exists():
        state = run.read(kept)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        codebook.load(state["codebook"])
        generator.set_state(state["generator"])
        done, started = state["step"], started - state["seconds"]
    vision.train()
    for step in tqdm(range(done + 1, steps + 1), desc="reconstruction", unit="step", initial=done, total=steps):
        _set_rate(optimizer, config.reconstruct_rate, step, steps)
        if step == steps // 2:
            codebook.start(vision, (some(8) for _ in range(16)))
        volumes = some(config.reconstruct_batch)
        told = head(SHARPNESS * vision(volumes))
        descend(optimizer, (told - (band_roots(volumes, patch) - mean) / spread).pow(2).mean())
        codebook.update()
        if step % run.config.evaluate_every == 0:
            state = {name: part.state_dict() for name, part in parts.items()} | {"codebook": codebook.state()}
            state |= {"generator": generator.get_state(), "step": step, "seconds": time.perf_counter() - started}
            run.write(kept, state)
    run.seconds += time.perf_counter() - started


def ridge(x: torch.Tensor, y: torch.Tensor, strength: float | torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Ridge regression of y (n, m) on x (n, k).

    Returns:
        Weights (n, m) of the rows of x; `y` as they predict it, and as it is predicted for each row by a regression on
        all others. That takes no further fit: with G the inverse of the regularised x x', its error is G y / diag(G).
    """
    gram = x @ x.T
    gram.diagonal().add_(strength)
    inverse = torch.linalg.inv(gram)
    weights = inverse @ y
    return weights, y - strength * weights, y - weights / inverse.diagonal()[:, None]


@torch.no_grad()
def project(run: Pretraining) -> torch.Tensor:
    """Set the projection; returns embeddings (n, p) of all studies, each as if the projection did not know the study.

    Ridge regression of the phrases on the tokens' mean over depth, each volume moved a little. The embedding's axes are
    those on which prediction and truth vary together most, where each study is predicted from all others: with more
    tokens than studies, a regression knows its own almost by heart. A projection has no bias: the mean token is
    projected out instead.
    """
    from tqdm.auto import tqdm

    vision, projection = run.model.vision_encoder, run.model.to_visual_latent
    found, having, generator = [], [], run.generator("project")
    batches = [(part.tolist(), 0) for part in torch.arange(len(run.train)).split(10)]
    with evaluating(run.model):
        for texts in tqdm(run.reading(batches), total=len(batches), desc="projection", unit="batch"):
            found.append(vision(run.moved(texts["index"], generator)).mean(1).flatten(1))
            having.append(texts["has"])
    matrix, embeds = projection_of(torch.cat(found), torch.cat(having), run.config.warm.ridge, projection.out_features)
    projection.weight.copy_(matrix)
    return embeds


def projection_of(
    features: torch.Tensor, phrases: torch.Tensor, strength: float, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The projection (p, k) of features (n, k) that tells phrases (n, m), and embeddings (n, p) as in `project`.

    Features are not divided by their spread: a patch of air that hardly varies at home would count as much as one of
    the heart, and what another hospital changes in it, noise or a table, would drown the rest.

    Args:
        features: of each study, its tokens.
        phrases: 1 where its report has the phrase.
        strength: of the ridge regression, in units of a study's mean squared distance to the mean.
        size: p.
    """
    mean = features.mean(0)
    x, y = features - mean, (phrases - phrases.mean(0)) / (phrases.std(0) + 1e-6)
    weights, by_itself, by_others = ridge(x, y, strength * x.pow(2).sum() / len(x))
    together = by_others.T @ y
    axes = torch.linalg.eigh(together + together.T).eigenvectors[:, -size:]  # (m, p)
    matrix = (x.T @ (weights @ axes)).T  # (p, k)
    toward = F.normalize(mean, dim=0)
    matrix -= torch.outer(matrix @ toward, toward)
    told = features @ matrix.T + (by_others - by_itself) @ axes  # (n, p)
    scale = told.pow(2).mean(0).sqrt()  # equal spread: the mean of what has a finding points where it differs most
    matrix, told = matrix / scale[:, None], told / scale
    return matrix / told.norm(dim=-1).mean(), F.normalize(told, dim=-1)


def read(run: Pretraining, embeds: torch.Tensor) -> None:
    """Train the text encoder, and the map to phrases, on image embeddings (n, p) that stay as they are."""
    from tqdm.auto import tqdm

    config, model = run.config.warm, run.model
    _spread_texts(run)
    learnt = [*model.text_encoder.parameters(), *model.to_text_latent.parameters(), *run.head.parameters()]
    optimizer = torch.optim.AdamW(learnt, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    generator = run.generator("read")
    steps = range(1, config.read_steps + 1)
    order = (torch.randperm(len(embeds), generator=generator)[: config.read_batch].tolist() for _ in steps)
    batches = [(index, run.step + step) for step, index in zip(steps, order, strict=True)]
    for step, texts in enumerate(tqdm(run.reading(batches), total=len(batches), desc="reading", unit="step"), 1):
        _set_rate(optimizer, config.read_rate, step, config.read_steps)
        images = embeds[texts["index"]]
        descend(optimizer, run.sentence_loss(images, texts) + 0.01 * run.phrase_loss(images, texts))


@torch.no_grad()
def _spread_texts(run: Pretraining) -> None:
    """Take the mean out of what a fresh text encoder embeds: it gives all sentences nearly one embedding."""
    texts = [s for i in range(min(len(run.train), 64)) for s in sentences_of(run.train.report(i, 0))]
    seen: list[torch.Tensor] = []
    projection = run.model.to_text_latent
    hook = projection.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with evaluating(run.model):
        run.embed(run.reader.ids(texts).to(run.device))
    hook.remove()
    mean = F.normalize(torch.cat(seen).mean(0), dim=0)
    projection.weight -= torch.outer(projection.weight @ mean, mean)


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor, longest: float = 1.0) -> None:
    """One step down a loss, a scalar, its gradient scaled down to the norm `longest` if it is longer."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], longest)
    optimizer.step()
    optimizer.zero_grad()


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Up in a tenth of the steps, down to a fiftieth in the last four tenths."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, step / (0.1 * steps), max(0.02, (steps - step) / (0.4 * steps)))
