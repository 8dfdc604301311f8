"""What fine-tuning minimises: two objectives on L2-normalised embeddings, `b` volumes and their reports.

* contrastive, `contrastive_loss`: each volume has to find its own report among the batch's reports and the
  other way round (InfoNCE in both directions; CLIP, Radford et al. 2021, arXiv 2103.00020; CT-CLIP, Hamamci
  et al. 2024, arXiv 2403.17834);
* per-finding prompts, `finding_prompt_loss`: for each of the 18 findings a volume's margin, its similarity to a
  sentence that states the finding minus that to one that denies it, has to be higher than the batch's where the finding
  is there, and lower where it is not (after the idea of CT-CLIP's VocabFine, arXiv 2403.17834). It learns from labels:
  what it trains is prompt-based and supervised, not zero-shot. The prompts of the evaluation are refused, so that these
  sentences at least are new to it.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from medctkit.findings import FINDINGS, WORDINGS, is_asked
from medctkit.phantom.report_text import finding_sentences

Prompts = Mapping[str, tuple[Sequence[str], Sequence[str]]]


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: torch.Tensor | float,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of the two InfoNCE directions.

    Args:
        image_embeds: (b, p), L2-normalised.
        text_embeds: (b, p), L2-normalised; row i belongs to image i.
        temperature: as CT-CLIP stores it: cosines are multiplied by exp(temperature).
        groups: (b,) whole numbers; equal for volumes with the same report, such as two reconstructions of one
            scan. Such a pair is right, not wrong, so it is left out of each other's negatives. None: all
            different.
    """
    logits = image_embeds @ text_embeds.T * torch.as_tensor(temperature).exp()  # (b, p) (p, b) -> (b, b)
    own = torch.arange(len(logits), device=logits.device)
    if groups is not None:
        same = groups[:, None] == groups[None, :]
        same[own, own] = False
        logits = logits.masked_fill(same, -math.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def sentence_loss(
    image_embeds: torch.Tensor,
    sentence_embeds: torch.Tensor,
    contrary_embeds: torch.Tensor,
    said: torch.Tensor,
    temperature: torch.Tensor | float,
) -> torch.Tensor:
    """Each sentence has to find the volumes whose reports hold it: alone, and against its contrary.

    The softmax runs over volumes, never over sentences: which sentence is the likelier one whatever the scan shows
    cancels out, and only the volume can lower the loss.

    Args:
        image_embeds: (b, p), L2-normalised.
        sentence_embeds: (s, p), the sentences of the batch's reports, L2-normalised.
        contrary_embeds: (s, p), their contraries.
        said: (b, s), 1 where a volume's report holds the sentence, else 0; each sentence is said at least once.
        temperature: the logarithm of the factor on the cosines.
    """
    scale, share = torch.as_tensor(temperature).exp(), said / said.sum()
    alone = scale * image_embeds @ sentence_embeds.T  # (b, p) (p, s) -> (b, s)
    against = alone - scale * image_embeds @ contrary_embeds.T
    return -((alone.log_softmax(dim=0) + against.log_softmax(dim=0)) * share).sum() / 2


def finding_prompt_loss(
    image_embeds: torch.Tensor,
    positive_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor | float,
    prevalence: bool = False,
) -> torch.Tensor:
    """Cross-entropy of each finding's margins, centred on their mean over the batch; averaged over known labels.

    A margin is a volume's similarity to the sentence that states the finding minus that to the one that denies it. At a
    new hospital nearly all margins of a finding are too high, or too low: to move them all is the quickest way down,
    and tells no volume from another. So they are centred, and the log odds of the finding in the batch take the place
    of the intercept of logistic regression (1/2 is added to both counts, so that they are finite). The level of the
    scores is not trained, then. Where all or none of the batch have a finding there is no order to learn: its margins
    are drawn together, weakly.

    Args:
        image_embeds: (b, p), L2-normalised.
        positive_embeds: (18, p), sentences that state each finding, L2-normalised.
        negative_embeds: (18, p), sentences that deny it.
        labels: (b, 18), 1 present, 0 absent, NaN unknown, which counts nowhere.
        scale: factor on the cosines, exp(temperature) for CT-CLIP.
        prevalence: take the margins as they are; the loss then also fits how common each finding is.
    """
    margin = scale * image_embeds @ (positive_embeds - negative_embeds).T  # (b, p) (p, 18) -> (b, 18)
    known = ~labels.isnan()
    if not known.any():
        return margin.sum() * 0.0
    if not prevalence:
        n, present = known.sum(0), labels.nan_to_num(0.0).sum(0)
        mean = torch.where(known, margin, 0.0).sum(0) / n.clamp(min=1)
        margin = margin - mean + torch.log((present + 0.5) / (n - present + 0.5))
    return F.binary_cross_entropy_with_logits(margin[known], labels[known].to(margin.dtype))


def report_prompts(hospital: str = "target") -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Wordings in which `hospital`'s reports state and deny each finding: {finding: (stated, denied)}.

    Of a list of your own, those of its table, in whatever hospital.
    """
    if WORDINGS:
        return dict(WORDINGS)
    return {f: (finding_sentences(f, True, hospital), finding_sentences(f, False, hospital)) for f in FINDINGS}


def check_prompts(prompts: Prompts) -> None:
    """Refuse prompts that lack a finding, or that the evaluation will ask: a ValueError says which."""
    missing = [f for f in FINDINGS if f not in prompts or not all(prompts[f])]
    if missing:
        raise ValueError(
            f"prompts need sentences that state and that deny every finding; none for {', '.join(missing)}. "
            "report_prompts() is a complete set"
        )
    for finding in FINDINGS:
        for sentence in (*prompts[finding][0], *prompts[finding][1]):
            if is_asked(finding, sentence):
                raise ValueError(
                    f"training prompt {sentence!r} is a prompt of the evaluation, whose sentences no training may "
                    "see; use other wordings, such as report_prompts()"
                )


def draw_prompts(prompts: Prompts, tokenizer: Any, wordings: random.Random) -> Mapping[str, torch.Tensor]:
    """One stating sentence per finding, then one denying sentence per finding, as tokens (36, n)."""
    sentences = [wordings.choice(prompts[finding][side]) for side in (0, 1) for finding in FINDINGS]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    return tokens


def joint_loss(
    images: torch.Tensor,
    texts: torch.Tensor | None,
    prompts: torch.Tensor | None,
    batch: Mapping[str, torch.Tensor],
    temperature: torch.Tensor,
    contrastive_weight: float,
    prompt_weight: float,
    anchor_weight: float = 0.0,
    prevalence: bool = False,
) -> dict[str, torch.Tensor]:
    """The objectives and their weighted sum `loss`; an objective of weight 0 is left out.

    Args:
        images: (b, p), L2-normalised.
        texts: (b, p), reports in the same order; needed with a contrastive weight.
        prompts: (36, p), 18 sentences that state the findings, then 18 that deny them; needed with a prompt weight.
        batch: `report_id` (b,), equal for equal reports, `labels` (b, 18), and with an anchor weight `anchor` (b, p).
        temperature: the logarithm of the factor on the cosines.
        contrastive_weight: of `contrastive`.
        prompt_weight: of `prompts`.
        anchor_weight: of `moved`, how far the volumes' embeddings are from their anchors.
        prevalence: see `finding_prompt_loss`.
    """
    lacking = (contrastive_weight and texts is None) or (prompt_weight and prompts is None)
    if lacking or (anchor_weight and "anchor" not in batch):
        raise ValueError("an objective with a weight needs its embeddings: contrastive texts, prompts, or an anchor")
    losses: dict[str, torch.Tensor] = {}
    if contrastive_weight and texts is not None:
        losses["contrastive"] = contrastive_loss(images, texts, temperature, batch["report_id"])
    if prompt_weight and prompts is not None:
        stated, denied = prompts.chunk(2)  # (36, p) -> 2 of (18, p)
        losses["prompts"] = finding_prompt_loss(images, stated, denied, batch["labels"], temperature.exp(), prevalence)
    if anchor_weight:
        losses["moved"] = 1 - F.cosine_similarity(images, batch["anchor"]).mean()
    weights = {"contrastive": contrastive_weight, "prompts": prompt_weight, "moved": anchor_weight}
    return losses | {"loss": torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()}
