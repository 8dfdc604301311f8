"""Zero-shot scoring: once per prompt, once per volume, and equal to the slow way."""

import json
import re

import numpy as np
import pytest
import torch
from tiny import randomise_adapter

from medctkit.findings import FINDINGS
from medctkit.lora.adapter import add_lora
from medctkit.model.base_model import load_mini_base
from medctkit.phantom.report_text import finding_sentences
from medctkit.phantom.study import TRAINING_SHAPE
from medctkit.training.objectives import report_prompts
from medctkit.zero_shot.classifier import ZeroShotClassifier, validation_score
from medctkit.zero_shot.prompts import PROMPTS, prompt_sentences


@pytest.fixture(scope="module")
def mini():
    return load_mini_base()


@pytest.fixture(scope="module")
def volumes():
    return torch.randn(3, 1, *TRAINING_SHAPE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def studies(volumes):
    """A data set of these volumes, with random labels."""
    labels = torch.randint(0, 2, (len(volumes), 18), generator=torch.Generator().manual_seed(1)).float()
    parts = enumerate(zip(volumes, labels, strict=True))
    return [{"pixel_values": v, "labels": y, "patient": f"p{i}", "study": f"s{i}"} for i, (v, y) in parts]


@pytest.mark.parametrize("prompts", ["paper", "ensemble"])
@torch.no_grad()
def test_scores_equal_the_slow_way(mini, volumes, prompts):
    """The way of the public evaluation: pair by pair, padded far, softmax over the two similarities.

    An ensemble is the normalised mean of normalised embeddings.
    """
    model, slow = mini.model, []
    images = model.encode_image(volumes)
    for name in FINDINGS:
        similarity = []
        for side in ("stating", "denying"):
            total = 0
            for template in PROMPTS[prompts][side]:
                sentence = template.replace("{finding}", name)
                words = mini.tokenizer([sentence], padding="max_length", max_length=64, return_tensors="pt")
                total = total + model.encode_text(words["input_ids"], words["attention_mask"])[0]
            similarity.append(model.temperature.exp() * images @ (total / total.norm()))
        slow.append(torch.stack(similarity, dim=-1).softmax(dim=-1)[:, 0])
    scores = ZeroShotClassifier(model, mini.tokenizer, prompts).scores(volumes)
    assert scores.shape == (3, 18)
    np.testing.assert_allclose(scores, torch.stack(slow, dim=1).numpy(), atol=1e-5)


def test_an_adapter_is_scored_like_its_base_until_it_learns(volumes):
    base, wrapped = load_mini_base(), load_mini_base()
    adapted = add_lora(wrapped.model, "paper", r=4)
    before = ZeroShotClassifier(base.model, base.tokenizer).scores(volumes)
    np.testing.assert_array_equal(ZeroShotClassifier(adapted, base.tokenizer).scores(volumes), before)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert np.abs(ZeroShotClassifier(adapted, base.tokenizer).scores(volumes) - before).max() > 1e-4


def trained_a_little(model):
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "text" in name and "lora_B.default" in name).add_(0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_adapter("other"),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: [m.scale_layer(0.5) for m in model.modules() if hasattr(m, "scale_layer")],
        lambda model: model.base_model.merge_adapter(),
        lambda model: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}),
        lambda model: model.double().float(),
        trained_a_little,
    ],
)
def test_prompts_follow_the_model(change):
    mini = load_mini_base()
    model = add_lora(mini.model, "paper", r=4)
    model.add_adapter("other", model.peft_config["default"])
    randomise_adapter(model)
    classifier = ZeroShotClassifier(model, mini.tokenizer)
    embeds = torch.nn.functional.normalize(torch.randn(2, model.config.projection_dim), dim=-1)
    classifier.scores_from_embeddings(embeds)
    change(model)
    fresh = ZeroShotClassifier(model, mini.tokenizer).scores_from_embeddings(embeds)
    np.testing.assert_array_equal(classifier.scores_from_embeddings(embeds), fresh)


def test_volumes_and_prompts_are_encoded_once(mini, volumes, monkeypatch):
    calls = {"image": 0, "text": 0}
    image, text = mini.model.encode_image, mini.model.encode_text
    monkeypatch.setattr(
        mini.model, "encode_image", lambda v: (calls.update(image=calls["image"] + len(v)), image(v))[1]
    )
    monkeypatch.setattr(mini.model, "encode_text", lambda *a: (calls.update(text=calls["text"] + 1), text(*a))[1])
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer)
    found = classifier.embed(studies(volumes), batch_size=2, progress=False)
    scores = classifier.scores_from_embeddings(found.embeddings)
    classifier.scores_from_embeddings(found.embeddings)
    assert calls == {"image": 3, "text": 1}
    assert found.patients.tolist() == ["p0", "p1", "p2"] and found.labels.shape == (3, 18) == scores.shape
    assert torch.allclose(found.embeddings.norm(dim=-1), torch.ones(3), atol=1e-5)


def test_modes_and_gradients_are_left_as_they_were(mini, volumes):
    mini.model.train()
    mini.model.text_transformer.eval()  # each part gets its own mode back
    before = [module.training for module in mini.model.modules()]
    first = ZeroShotClassifier(mini.model, mini.tokenizer).scores(volumes)
    assert [module.training for module in mini.model.modules()] == before and torch.is_grad_enabled()
    mini.model.eval()
    np.testing.assert_array_equal(ZeroShotClassifier(mini.model, mini.tokenizer).scores(volumes), first)


def test_the_validation_score_is_a_mean_auroc_in_which_unknown_labels_count_nowhere(mini):
    generator = torch.Generator().manual_seed(0)
    items = studies(torch.rand(8, 1, *TRAINING_SHAPE, generator=generator) * 2 - 1)
    for item in items[6:]:
        item["labels"] = torch.full((18,), float("nan"))
    score = validation_score(items, mini.tokenizer)(mini.model)
    assert 0 <= score <= 1 and score == validation_score(items[:6], mini.tokenizer)(mini.model)
    alike = [item | {"labels": torch.zeros(18)} for item in items]
    for data in (items[6:], alike):
        with pytest.raises(ValueError, match="no finding has both positive and negative studies in the validation"):
            validation_score(data, mini.tokenizer)(mini.model)


def test_prompts_can_be_named_or_given(mini):
    stating, denying = prompt_sentences("paper")
    assert stating[2] == ["Cardiomegaly is present."] and denying[2] == ["Cardiomegaly is not present."]
    own = {"stating": ["Signs of {finding}.", "{finding} {sure}."], "denying": "No signs of {finding}."}
    stating, denying = prompt_sentences(own, ["Emphysema"])  # other braces are text like any other
    assert (stating, denying) == ([["Signs of Emphysema.", "Emphysema {sure}."]], [["No signs of Emphysema."]])
    assert prompt_sentences(["Signs of {finding}.", "No signs of {finding}."], ["Emphysema"])[1] == denying


def test_a_finding_can_have_wordings_of_its_own(mini, volumes):
    stating, denying = prompt_sentences(
        {"A": (["The heart is large."], "The heart is small."), "B": PROMPTS["paper"]}, "AB"
    )
    assert stating == [["The heart is large."], ["B is present."]]
    assert denying == [["The heart is small."], ["B is not present."]]
    reports = report_prompts("source")  # what training uses has the same form, and unequal numbers of wordings
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer, reports)
    assert classifier.text_embeds().shape == (2, 18, 96)
    with pytest.raises(ValueError, match="or an entry for each finding; missing B; unknown C"):
        prompt_sentences({"A": PROMPTS["paper"], "C": PROMPTS["paper"]}, "AB")
    with pytest.raises(ValueError, match=r"prompts, B: the denying side is \[\]; expected at least one sentence"):
        prompt_sentences({"A": PROMPTS["paper"], "B": (["B."], [])}, "AB")


def test_prompts_in_a_file_of_your_own_score_as_the_same_ones_given(mini, volumes, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps(PROMPTS["ensemble"]))
    scores = ZeroShotClassifier(mini.model, mini.tokenizer, own).scores(volumes)
    np.testing.assert_array_equal(ZeroShotClassifier(mini.model, mini.tokenizer, "ensemble").scores(volumes), scores)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("best", r"unknown prompts 'best'; choose one of \['ensemble', 'paper', 'training-style'\], or give templates"),
        (["{finding}"], r'expected {"stating": \[...\], "denying": \[...\]} or a pair of the two, got'),
        (["It is present.", "No {finding}."], "'It is present.' has no {finding} in it"),
        (["{finding}", ["No {finding}.", "None."]], "'None.' has no {finding} in it, .* put {finding} where"),
        ({"stating": ["{finding}"]}, "expected {.stating"),
        ({"stating": [], "denying": ["No {finding}"]}, r"the stating side is \[\]; expected at least one sentence"),
        ({"stating": ["{finding}", 3], "denying": ["{finding}"]}, "stating side has 3 in it; expected a sentence"),
        ({"stating": ["{finding}"], "denying": [" "]}, "the denying side has ' ' in it; expected a sentence"),
        ({"stating": {"a": 1}, "denying": ["No {finding}"]}, "the stating side is {'a': 1}"),
        (7, "got 7"),
    ],
)
def test_prompts_that_ask_nothing_are_refused_and_named(prompts, message):
    with pytest.raises(ValueError, match=message):
        prompt_sentences(prompts)


def test_a_file_of_prompts_that_cannot_be_used_is_named(tmp_path):
    file = tmp_path / "own.json"
    with pytest.raises(FileNotFoundError, match="own.json: no such file; expected JSON"):
        prompt_sentences(file)
    for content, message in (
        ('{"stating": ["{finding}"],', "own.json is not readable as JSON: .* Compare it with assets/prompts.json"),
        (json.dumps(PROMPTS), "own.json holds the sets paper, training-style, ensemble; keep one"),
        ('{"stating": ["yes"], "denying": ["no"]}', "own.json: 'yes' has no {finding} in it"),
        ("[1, 2]", "own.json: the stating side is 1"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            prompt_sentences(file)
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="own.json is not readable as JSON"):
        prompt_sentences(file)
    for encoding in ("utf-8-sig", "utf-16"):  # as editors on Windows save it
        file.write_text(json.dumps(PROMPTS["paper"]), encoding)
        assert prompt_sentences(file) == prompt_sentences("paper")


def test_a_prompt_longer_than_the_text_encoder_is_named(mini):
    long = "{finding} " * 200
    with pytest.raises(ValueError, match="'Coronary artery .* tokens, the text encoder takes 192; shorten it"):
        ZeroShotClassifier(mini.model, mini.tokenizer, [long, "no {finding}"])


def test_the_wordings_of_the_ensemble_are_no_wordings_of_reports():
    stating, denying = prompt_sentences("ensemble")
    sides = PROMPTS["ensemble"]["stating"], PROMPTS["ensemble"]["denying"]
    assert [len(set(side)) for side in sides] == [8, 8] and not set(sides[0]) & set(sides[1])

    def bare(sentence):
        return re.sub(r"\W+", " ", sentence).strip().lower()

    asked = {bare(s) for side in (stating, denying) for sentences in side for s in sentences}
    assert len(asked) == 2 * 8 * 18
    for hospital in ("source", "target"):
        for finding in FINDINGS:
            for present in (True, False):
                assert not asked & set(map(bare, finding_sentences(finding, present, hospital)))


def test_embeddings_of_another_model_are_refused(mini):
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer)
    with pytest.raises(ValueError, match=r"image embeddings have shape \(5, 512\); this model's are \(volumes, 96\)"):
        classifier.scores_from_embeddings(torch.zeros(5, 512))


def test_hounsfield_units_are_no_input(mini):
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer)
    with pytest.raises(ValueError, match="volumes go from -1000 to -1000; expected -1 to 1, as `preprocess`"):
        classifier.scores(torch.full((1, 1, 64, 96, 96), -1000.0))


def test_scores_are_not_rounded_in_mixed_precision(mini):
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer)
    embeds = torch.nn.functional.normalize(torch.randn(5, 96, generator=torch.Generator().manual_seed(0)), dim=-1)
    expected = classifier.scores_from_embeddings(embeds)
    with torch.autocast("cpu", torch.bfloat16):
        assert (classifier.scores_from_embeddings(embeds) == expected).all()
