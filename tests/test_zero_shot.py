"""Zero-shot scoring: once per prompt, once per volume, and equal to the slow way."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from medctkit.findings import FINDINGS
from medctkit.lora import add_lora
from medctkit.mini import load_mini_base
from medctkit.zero_shot import ZeroShotClassifier, prompt_pair, validation_score


@pytest.fixture(scope="module")
def mini():
    return load_mini_base()


@pytest.fixture(scope="module")
def volumes():
    return torch.randn(3, 1, 32, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


class Studies(Dataset):
    def __init__(self, volumes):
        self.volumes = volumes
        self.labels = torch.randint(0, 2, (len(volumes), 18), generator=torch.Generator().manual_seed(1)).float()

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        item = {"pixel_values": self.volumes[i], "labels": self.labels[i], "report": "text"}
        return item | {"patient": f"p{i}", "study": f"s{i}"}


@torch.no_grad()
def one_at_a_time(mini, model, volumes):
    """The way of the public evaluation: pair by pair, padded far, softmax over the two similarities."""
    found = []
    for name in FINDINGS:
        pair = [f"{name} is present.", f"{name} is not present."]
        words = mini.tokenizer(pair, padding="max_length", max_length=64, return_tensors="pt")
        text = model.encode_text(words["input_ids"], words["attention_mask"])
        similarity = model.temperature.exp() * model.encode_image(volumes) @ text.T
        found.append(similarity.softmax(dim=-1)[:, 0])
    return torch.stack(found, dim=1).numpy()


def test_scores_equal_the_slow_way(mini, volumes):
    scores = ZeroShotClassifier(mini.model, mini.tokenizer, "paper").scores(volumes)
    assert scores.shape == (3, 18)
    np.testing.assert_allclose(scores, one_at_a_time(mini, mini.model, volumes), atol=1e-5)


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


def test_volumes_and_prompts_are_encoded_once(mini, volumes, monkeypatch):
    calls = {"image": 0, "text": 0}
    image, text = mini.model.encode_image, mini.model.encode_text
    monkeypatch.setattr(
        mini.model, "encode_image", lambda v: (calls.update(image=calls["image"] + len(v)), image(v))[1]
    )
    monkeypatch.setattr(mini.model, "encode_text", lambda *a: (calls.update(text=calls["text"] + 1), text(*a))[1])
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer)
    found = classifier.embed(Studies(volumes), batch_size=2, progress=False)
    scores = classifier.scores_from_embeddings(found.embeddings)
    classifier.scores_from_embeddings(found.embeddings)
    assert calls == {"image": 3, "text": 1}
    assert found.patients.tolist() == ["p0", "p1", "p2"] and found.labels.shape == (3, 18) == scores.shape
    assert torch.allclose(found.embeddings.norm(dim=-1), torch.ones(3), atol=1e-5)


def test_training_mode_and_gradients_are_left_as_they_were(mini, volumes):
    mini.model.train()
    first = ZeroShotClassifier(mini.model, mini.tokenizer).scores(volumes)
    assert mini.model.training and torch.is_grad_enabled()
    mini.model.eval()
    np.testing.assert_array_equal(ZeroShotClassifier(mini.model, mini.tokenizer).scores(volumes), first)


def test_each_part_of_the_model_gets_its_own_mode_back(mini, volumes):
    mini.model.train()
    mini.model.text_transformer.eval()
    before = [module.training for module in mini.model.modules()]
    ZeroShotClassifier(mini.model, mini.tokenizer).scores(volumes)
    assert [module.training for module in mini.model.modules()] == before
    mini.model.eval()


def test_validation_score_is_a_mean_auroc(mini, volumes):
    score = validation_score(Studies(volumes), mini.tokenizer)(mini.model)
    assert 0 <= score <= 1
    alike = Studies(volumes)
    alike.labels[:] = 0
    with pytest.raises(ValueError, match="no finding has both"):
        validation_score(alike, mini.tokenizer)(mini.model)


def test_prompts_can_be_named_or_given_and_are_checked(mini):
    assert prompt_pair("paper") == ("{finding} is present.", "{finding} is not present.")
    assert prompt_pair(["Signs of {finding}.", "No signs of {finding}."])[0].startswith("Signs")
    odd = ZeroShotClassifier(mini.model, mini.tokenizer, ["{finding} {sure}.", "No {finding} {sure}."])
    assert odd.text_embeds().shape[:2] == (2, 18)  # other braces are text like any other
    with pytest.raises(ValueError, match="unknown prompts 'best'; choose one of"):
        prompt_pair("best")
    with pytest.raises(ValueError, match="two templates"):
        prompt_pair(["{finding}"])
    with pytest.raises(ValueError, match="has no {finding} in it"):
        prompt_pair(["It is present.", "It is not present."])
    with pytest.raises(ValueError, match="tokens, the text encoder takes 192"):
        ZeroShotClassifier(mini.model, mini.tokenizer, ["{finding} " * 200, "no {finding}"])


def test_scores_are_not_rounded_in_mixed_precision(mini):
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer)
    embeds = torch.nn.functional.normalize(torch.randn(5, 96, generator=torch.Generator().manual_seed(0)), dim=-1)
    expected = classifier.scores_from_embeddings(embeds)
    with torch.autocast("cpu", torch.bfloat16):
        assert (classifier.scores_from_embeddings(embeds) == expected).all()
