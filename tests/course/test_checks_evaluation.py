"""The exercises of notebooks 04 and 05: the right answer passes, each usual slip gets its own message."""

import numpy as np
import pytest
import torch
from judged import is_open, is_right, is_wrong
from tiny import tiny_model, tiny_tokenizer

from medctkit.attention.maps import Attention
from medctkit.findings import FINDINGS
from medctkit.metrics.scores import evaluate, thresholds_from_validation
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cohort():
    """Labels, scores and patients (two studies each) of 80 studies, and thresholds of others."""
    rng = np.random.default_rng(0)
    labels = (rng.random((160, 18)) < 0.3).astype(float)
    scores = np.clip(0.3 + 0.2 * labels + 0.2 * rng.standard_normal(labels.shape), 0, 1)
    patients = np.repeat(np.arange(40), 2)
    return labels[:80], scores[:80], patients, thresholds_from_validation(labels[80:], scores[80:])


def rates(called=np.greater_equal, order=(0, 1), first=None, second=None):
    def sensitivity_and_specificity(labels, scores, threshold):
        said, sick = called(scores, threshold), labels == 1
        found = [
            (said & sick).sum() / (said.sum() if first == "precision" else 1 if first == "count" else sick.sum()),
            ((said if second == "false alarms" else ~said) & ~sick).sum() / (1 if first == "count" else (~sick).sum()),
        ]
        return tuple(found[i] for i in order)

    return sensitivity_and_specificity


def test_sensitivity_and_specificity():
    is_right("04.1", rates())
    is_right("04.1", lambda *a: torch.tensor(rates()(*a)))
    is_wrong("04.1", rates(order=(1, 0)), because="wrong order")
    is_wrong("04.1", rates(called=np.greater), because="`>=`, not `>`")
    is_wrong("04.1", rates(first="precision"), because="the precision")
    is_wrong("04.1", rates(first="count"), because="Those are counts")
    is_wrong("04.1", rates(second="false alarms"), because="specificity is the rest")
    is_wrong("04.1", lambda *a: np.round(rates()(*a), 2), because="right but for rounding")
    is_wrong("04.1", lambda *a: (0.0, 0.0), because="Of 5 sick and 7 healthy")
    is_wrong("04.1", lambda *a: 0.8, because="Expected two numbers")
    is_wrong("04.1", lambda *a: (*rates()(*a), 0.5), because="Expected two numbers")
    is_wrong("04.1", lambda *a: (np.nan, 0.5), because="Expected a share, a single number; got float nan")
    is_open("04.1", lambda *a: ...)


def test_flattery_is_what_test_labels_add(cohort):
    labels, scores, patients, limits = cohort

    def mean(thresholds):
        return evaluate(labels, scores, patients, thresholds=thresholds, resamples=2).loc["mean"]

    honest, optimistic = mean(limits), mean("roc-corner-on-test")
    is_right("04.2", optimistic["f1"] - honest["f1"], *cohort)
    is_wrong("04.2", honest["f1"] - optimistic["f1"], *cohort, because="honest minus optimistic")
    is_wrong("04.2", optimistic["accuracy"] - honest["accuracy"], *cohort, because="difference in accuracy")
    is_wrong("04.2", optimistic["f1"], *cohort, because="subtract the honest one")
    is_wrong("04.2", 0.0, *cohort, because="AUROC needs no threshold")
    is_wrong("04.2", round(optimistic["f1"] - honest["f1"], 4), *cohort, because="right but for rounding")
    is_wrong("04.2", 0.5, *cohort, because="is not the difference")
    is_open("04.2", ..., *cohort)


def test_copies_of_volumes_bring_no_certainty(cohort):
    labels, scores, patients, _ = cohort

    def width(copies, names):
        twice = [np.concatenate([x] * copies) for x in (labels, scores)]
        mean = evaluate(*twice, names, resamples=200).loc["mean"]
        return mean["auroc_high"] - mean["auroc_low"]

    by_patients = width(2, np.concatenate([patients, patients]))
    by_volumes = width(2, np.arange(160))
    assert by_volumes < by_patients == pytest.approx(width(1, patients))
    given = labels, scores, patients
    assert f"stays {by_patients:.3f} wide" in is_right("04.3", by_patients, by_volumes, *given)
    is_right("04.3", by_patients, width(2, np.array([f"copy {i}" for i in range(160)])), *given)  # drawn otherwise
    is_wrong("04.3", by_volumes, by_patients, *given, because="wrong order")
    is_wrong("04.3", by_patients, by_patients, *given, because="still draws patients")
    is_wrong("04.3", by_patients, width(1, np.arange(80)), *given, because="Stack labels and scores twice")
    is_wrong("04.3", 1.0, by_volumes, *given, because="`by_patients` is 1.0000")
    is_open("04.3", by_patients, ..., *given)


@pytest.fixture(scope="module")
def seen():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=-1)
    labels = torch.randint(0, 2, (40, len(FINDINGS)), generator=generator).numpy().astype(float)
    names = np.array([f"patient_{i // 2}" for i in range(40)])
    return model, tokenizer, Embedded(embeddings, labels, names, names)


def test_own_prompts_are_scored_and_those_of_training_refused(seen):
    model, tokenizer, embedded = seen
    mine = ("seen {finding}", "without {finding}")

    def auroc(prompts):
        scores = ZeroShotClassifier(model, tokenizer, prompts).scores_from_embeddings(embedded.embeddings)
        return evaluate(embedded.labels, scores, embedded.patients, resamples=2).loc["mean", "auroc"]

    assert "against" in is_right("04.4", mine, auroc(mine), *seen)
    is_wrong("04.4", mine, auroc("paper"), *seen, because="With these prompts the mean AUROC is not")
    paper = ("{finding} is present.", "{finding} is not present.")
    is_wrong("04.4", paper, auroc(paper), *seen, because="Those are the paper's prompts")
    is_wrong("04.4", ("seen {finding}", "seen {finding}"), 0.5, *seen, because="Both sides say the same")
    is_wrong("04.4", ("seen", "not seen"), 0.5, *seen, because="put {finding} where the name belongs")
    trained = ("There is {finding}.", "There is no {finding}.")
    is_wrong("04.4", trained, auroc(trained), *seen, because="a wording that the model was trained with")
    is_wrong("04.4", mine, "high", *seen, because="Expected a mean AUROC, a single number; got str 'high'")
    is_open("04.4", (..., ...), 0.5, *seen)


def test_received_is_the_mean_over_heads_and_queries():
    is_right("05.1", lambda maps: maps.mean(dim=(1, 2)))
    is_right("05.1", lambda maps: maps.mean(dim=(1, 2)).numpy())
    is_right("05.1", lambda maps: 3 * Attention([maps], [], (3, 2, 2)).received("spatial", 0).reshape(3, 4))
    is_wrong("05.1", lambda maps: maps.mean(dim=(1, 3)), because="over the keys")
    is_wrong("05.1", lambda maps: maps.mean(dim=2), because="one map for each head")
    is_wrong("05.1", lambda maps: maps.mean(dim=1).sum(dim=1), because="the sum over the queries")
    is_wrong("05.1", lambda maps: maps[:, 0].mean(dim=1), because="are not the means")
    is_wrong("05.1", lambda maps: maps.mean(), because="should give shape (3, 4)")
    is_open("05.1", lambda maps: ...)


def test_a_hit_is_any_part_of_the_finding_in_the_highest_patch():
    def filled(heat, shares):
        return shares.flat[heat.argmax()]

    is_right("05.2", lambda heat, shares: filled(heat, shares) >= 0.01)
    is_right("05.2", lambda heat, shares: shares[heat == heat.max()] >= 0.01)
    is_wrong("05.2", lambda heat, shares: filled(heat, shares) > 0, because="fills 0.5 % of the highest patch")
    is_wrong("05.2", lambda heat, shares: filled(heat, shares) > 0.5, because="says miss to a small finding")
    is_wrong("05.2", lambda heat, shares: heat.argmax() == shares.argmax(), because="need not be the fullest")
    is_wrong("05.2", lambda heat, shares: (heat * shares).sum() > 0.01, because="Only the highest patch")
    is_wrong("05.2", filled, because="Expected True or False")
    is_open("05.2", lambda heat, shares: None)


def test_chance_is_the_share_of_patches_that_would_be_a_hit():
    is_right("05.3", lambda shares: (shares >= 0.01).mean())
    is_wrong("05.3", lambda shares: shares.mean(), because="share of the volume")
    is_wrong("05.3", lambda shares: (shares > 0).mean(), because="less than 1 % is no hit")
    is_wrong("05.3", lambda shares: (shares >= 0.01).sum(), because="divide by how many")
    is_wrong("05.3", lambda shares: 1 / shares.size, because="if a single patch")
    is_wrong("05.3", lambda shares: 0.9, because="Of 12 patches 5 are filled")
    is_open("05.3", lambda shares: ...)
