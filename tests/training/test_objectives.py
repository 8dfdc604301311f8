"""Losses against hand-computed values."""

import math

import pytest
import torch
from tiny import tiny_data, tiny_model
from torch.nn import functional as F

from medctkit.findings import FINDINGS
from medctkit.training.objectives import contrastive_loss, finding_prompt_loss, joint_loss, report_prompts
from medctkit.training.settings import FineTuneConfig


def test_contrastive_loss_by_hand():
    images, texts = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    # cosines: image 0 against texts 0.6, 0.0; image 1: 0.8, 1.0; factor exp(0) = 1
    per_image = [math.log(math.exp(0.6) + 1) - 0.6, math.log(math.exp(0.8) + math.e) - 1]
    per_text = [math.log(math.exp(0.6) + math.exp(0.8)) - 0.6, math.log(1 + math.e) - 1]
    expected = (sum(per_image) / 2 + sum(per_text) / 2) / 2
    assert contrastive_loss(images, texts, 0.0).item() == pytest.approx(expected, rel=1e-6)
    sharper = contrastive_loss(images, texts, torch.tensor(3.0))
    logits = math.exp(3) * images @ texts.T
    truth = torch.arange(2)
    assert sharper.item() == pytest.approx(
        (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)).item() / 2, rel=1e-6
    )


def test_contrastive_loss_equals_the_loss_of_the_model():
    model = tiny_model().eval()
    batch = torch.stack([item["pixel_values"] for item in tiny_data(3)])
    ids = torch.arange(2, 8).reshape(3, 2)
    out = model(pixel_values=batch, input_ids=ids, attention_mask=torch.ones_like(ids), return_loss=True)
    ours = contrastive_loss(out.image_embeds, out.text_embeds, model.temperature)
    torch.testing.assert_close(ours, out.loss)


def test_two_reconstructions_of_one_scan_are_not_negatives_of_each_other():
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(3, 8), dim=1), F.normalize(torch.randn(3, 8), dim=1)
    texts[2] = texts[1]
    groups = torch.tensor([4, 7, 7])
    got = contrastive_loss(images, texts, 1.0, groups)
    # volumes 1 and 2 each see the batch without the other; volume 0 still sees both
    logits = math.e * images @ texts.T
    first = sum(F.cross_entropy(m[:1], torch.zeros(1, dtype=torch.long)) for m in (logits, logits.T)) / 2
    others = [
        sum(F.cross_entropy(m[1:], torch.ones(1, dtype=torch.long)) for m in (sub, sub.T)) / 2
        for sub in (logits[[0, k]][:, [0, k]] for k in (1, 2))
    ]
    assert got.item() == pytest.approx((first + sum(others)).item() / 3, rel=1e-5)
    assert got < contrastive_loss(images, texts, 1.0)


def test_finding_prompt_loss_is_the_cross_entropy_of_the_pair():
    torch.manual_seed(0)
    images = F.normalize(torch.randn(2, 5), dim=1)
    stated, denied = (F.normalize(torch.randn(18, 5), dim=1) for _ in range(2))
    labels = torch.randint(0, 2, (2, 18))
    scale, terms = 3.0, []
    for i in range(2):
        for k in range(18):
            s, d = math.exp(scale * (images[i] @ stated[k])), math.exp(scale * (images[i] @ denied[k]))
            terms.append(-math.log((s if labels[i, k] else d) / (s + d)))
    loss = finding_prompt_loss(images, stated, denied, labels, scale, prevalence=True)
    assert loss.item() == pytest.approx(sum(terms) / 36, rel=1e-5)


def test_the_per_finding_loss_asks_which_volumes_have_a_finding_and_not_how_common_it_is():
    """Margins that are all higher by the same are as good; those that know nothing cost what the shares cost."""
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, math.nan]])
    margins = torch.tensor([[0.3, -2.0], [-1.0, 0.5], [0.1, 0.0], [2.0, 9.0]])

    def loss(margins, **how):
        return finding_prompt_loss(margins, torch.eye(2), torch.zeros(2, 2), labels, 1.0, **how)

    shifted = margins + torch.tensor([5.0, -3.0])
    assert loss(shifted).item() == pytest.approx(loss(margins).item(), rel=1e-5)
    assert loss(shifted, prevalence=True) > 2 * loss(margins, prevalence=True)
    shares = torch.tensor([2.5 / 5, 1.5 / 4])  # (present + 1/2) / (n + 1)
    entropy = F.binary_cross_entropy(shares.expand(4, 2)[~labels.isnan()], labels[~labels.isnan()])
    assert loss(torch.full((4, 2), 7.0)).item() == pytest.approx(entropy.item(), rel=1e-5)
    ordered = torch.where(labels == 1, 1.0, -1.0)
    assert loss(3 * ordered) < loss(ordered) < loss(0 * ordered) < loss(-ordered)


def test_unknown_labels_count_nowhere():
    torch.manual_seed(0)
    images, prompts = F.normalize(torch.randn(3, 8), dim=1).requires_grad_(), F.normalize(torch.randn(36, 8), dim=1)
    labels = torch.randint(0, 2, (3, 18)).float()
    whole = finding_prompt_loss(images, *prompts.chunk(2), labels, 2.0)
    alone = finding_prompt_loss(images[:2], *prompts.chunk(2), labels[:2], 2.0)
    labels[2] = math.nan
    known = finding_prompt_loss(images, *prompts.chunk(2), labels, 2.0)
    assert known.item() == pytest.approx(alone.item(), rel=1e-6) and known != whole
    (gradient,) = torch.autograd.grad(known, images)
    assert gradient[:2].any() and not gradient[2].any()
    none = finding_prompt_loss(images, *prompts.chunk(2), torch.full((3, 18), math.nan), 2.0)
    assert none == 0 and not torch.autograd.grad(none, images)[0].any()


def test_the_joint_loss_is_the_weighted_sum_and_leaves_out_what_has_no_weight():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    prompts, temperature = F.normalize(torch.randn(36, 8), dim=1), torch.tensor(1.0)
    batch = {"report_id": torch.arange(4), "labels": torch.randint(0, 2, (4, 18))}
    both = joint_loss(images, texts, prompts, batch, temperature, 2.0, 0.5)
    assert (
        joint_loss(images, texts, prompts, batch, temperature, 2.0, 0.5, prevalence=True)["prompts"] != both["prompts"]
    )
    assert both["contrastive"] == contrastive_loss(images, texts, 1.0)
    assert both["prompts"] == finding_prompt_loss(images, prompts[:18], prompts[18:], batch["labels"], math.e)
    assert both["loss"].item() == pytest.approx(2 * both["contrastive"].item() + 0.5 * both["prompts"].item())
    assert joint_loss(images, texts, None, batch, temperature, 1.0, 0.0).keys() == {"contrastive", "loss"}
    assert joint_loss(images, None, prompts, batch, temperature, 0.0, 1.0).keys() == {"prompts", "loss"}


@pytest.mark.parametrize("hospital", ["source", "target"])
def test_report_wordings_are_complete_and_are_not_the_evaluation_prompts(hospital):
    assert list(report_prompts(hospital)) == list(FINDINGS)
    FineTuneConfig(steps=1, prompts=report_prompts(hospital))
