"""The shipped mini base model: knows its own hospital, less so the other; nothing of the test data is in it."""

from pathlib import Path

import pytest
import torch

from medctkit.cohort.manifest import load_manifest
from medctkit.experiments import adapt as experiment
from medctkit.findings import FINDINGS
from medctkit.metrics.scores import evaluate
from medctkit.model.base_model import FOLDER, load_mini_base
from medctkit.zero_shot.classifier import ZeroShotClassifier

MANIFEST = Path(__file__).resolve().parents[2] / "data_manifest.csv"


@pytest.fixture(scope="module")
def auroc(tmp_path_factory):
    """Mean AUROC of the base on the test patients of both hospitals, once for this module."""
    cache = tmp_path_factory.mktemp("prepared")
    mini, manifest = load_mini_base(), load_manifest(MANIFEST)
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer)
    found = {}
    for hospital in ("source", "target"):
        data = experiment.load_split(manifest, hospital, "test", mini.preprocess_config, cache)
        seen = classifier.embed(data, progress=False)
        scores = classifier.scores_from_embeddings(seen.embeddings)
        found[hospital] = evaluate(seen.labels, scores, seen.patients, resamples=200)
    return found


def test_it_knows_its_own_hospital(auroc):
    assert auroc["source"].loc["mean", "auroc"] >= 0.70


def test_in_another_hospital_it_is_clearly_worse(auroc):
    source, target = (auroc[h].loc["mean"] for h in ("source", "target"))
    assert target["auroc"] < source["auroc"] - 0.05 and target["auroc_high"] < source["auroc_low"]


def test_it_is_small_and_loads_without_pickle():
    assert (FOLDER / "model.safetensors").stat().st_size <= 10_000_000
    assert not list(FOLDER.glob("*.bin")) + list(FOLDER.glob("*.pt"))
    assert (FOLDER / "README.md").read_text().count("phantom") >= 3


def test_the_tokenizer_knows_every_word_of_prompts_and_reports():
    tokenizer = load_mini_base().tokenizer
    texts = [f"{f} is not present." for f in FINDINGS] + ["Adjacent jejunum, quiz: zebra-like XYZ (42 mm)?"]
    texts += load_manifest(MANIFEST)["report"].head(300).tolist()
    longest = 0
    for words in tokenizer(texts)["input_ids"]:
        assert tokenizer.unk_token_id not in words
        longest = max(longest, len(words))
    assert longest <= tokenizer.model_max_length


def test_its_codebook_is_used_and_frozen():
    mini = load_mini_base()
    codebook = mini.model.visual_transformer.vq._codebook.embed
    assert not codebook.requires_grad and torch.isfinite(codebook).all()
    assert "visual_transformer.vq._codebook.embed" not in dict(mini.model.named_parameters())


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        load_mini_base(tmp_path)
