"""The shipped mini base model: knows its own hospital, less so the other; nothing of the test data is in it."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import randomise_adapter, tiny_model
from torch import nn

from medctkit.cohort.dataset import rows_of
from medctkit.cohort.manifest import load_manifest
from medctkit.experiments import adapt as experiment
from medctkit.lora.adapter import add_lora
from medctkit.lora.counting import parameter_table
from medctkit.lora.methods import load_trained, save_trained
from medctkit.metrics.scores import mean_auroc
from medctkit.model.base_model import BASES, FOLDER, BaseModel, load_base, load_mini_base, preprocess_config_of
from medctkit.model.ct_clip import CTCLIPConfig
from medctkit.model.protocol import Parts, VisionLanguageModel
from medctkit.scans.preprocessing import PreprocessConfig
from medctkit.zero_shot.classifier import ZeroShotClassifier
from medctkit.zero_shot.prompts import PROMPTS, prompt_sentences

MANIFEST = Path(__file__).resolve().parents[2] / "data_manifest.csv"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # half a minute on an idle core; other tests may share it
def test_it_knows_its_own_hospital_and_is_clearly_worse_in_another(tmp_path):
    mini, manifest, found = load_mini_base(), load_manifest(MANIFEST), []
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer)
    for hospital in ("source", "target"):
        some = rows_of(manifest, hospital, "test").head(40)
        data = experiment.load_split(some, hospital, "test", mini.preprocess_config, tmp_path)
        seen = classifier.embed(data, progress=False)
        scores = classifier.scores_from_embeddings(seen.embeddings)
        found.append(mean_auroc(seen.labels, scores))
    source, target = found
    assert source >= 0.70 and target < source - 0.05


def test_it_is_small_and_loads_without_pickle():
    assert (FOLDER / "model.safetensors").stat().st_size <= 15_000_000
    assert not list(FOLDER.glob("*.bin")) + list(FOLDER.glob("*.pt"))
    assert (FOLDER / "README.md").read_text().count("phantom") >= 3
    assert all(tensor.isfinite().all() for tensor in load_mini_base().model.state_dict().values())


def test_the_tokenizer_knows_every_word_of_prompts_and_reports():
    tokenizer = load_mini_base().tokenizer
    texts = [s for name in PROMPTS for side in prompt_sentences(name) for sentences in side for s in sentences]
    texts += ["Adjacent jejunum, quiz: zebra-like XYZ (42 mm)?"]
    texts += load_manifest(MANIFEST)["report"].head(300).tolist()
    longest = 0
    for words in tokenizer(texts)["input_ids"]:
        assert tokenizer.unk_token_id not in words
        longest = max(longest, len(words))
    assert longest <= tokenizer.model_max_length


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        load_mini_base(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="nowhere: expected mini, colipri, released, or a folder with a config.json"
    ):
        preprocess_config_of("nowhere")


def test_what_a_model_wants_is_known_without_its_weights(tmp_path):
    assert preprocess_config_of("released") == PreprocessConfig()
    mini = PreprocessConfig.for_shape((64, 96, 96), (5.0, 3.75, 3.75))
    assert preprocess_config_of("mini") == load_mini_base().preprocess_config == mini
    CTCLIPConfig({"num_frames": 120}).save_pretrained(tmp_path)
    assert preprocess_config_of(tmp_path).shape == (120, 480, 480)


GIVEN = json.loads((FOLDER / "config.json").read_text())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no names with values"),
        ("ct-clip", "holds no names with values"),
        (None, "holds no names with values"),
        ({}, "model_type is None, expected 'ct-clip'"),
        (GIVEN | {"model_type": "bert"}, "model_type is 'bert', expected 'ct-clip'"),
        (GIVEN | {"projection_dim": "96"}, "projection_dim must be .* got '96'"),
        (GIVEN | {"text_config": GIVEN["text_config"] | {"hidden_size": -128}}, "'hidden_size' must be .* got -128"),
        (GIVEN | {"text_config": GIVEN["text_config"] | {"hidden_act": "sharp"}}, "KeyError: 'sharp'"),
        (GIVEN | {"text_config": GIVEN["text_config"] | {"layer_norm_eps": "x"}}, r"layer_norm_eps.*\(value: 'x'\)"),
        (GIVEN | {"id2label": ["a"]}, "AttributeError: 'list'"),
        (GIVEN | {"dtype": "int8"}, "dtype is torch.int8, expected one with a point"),
        (GIVEN | {"dtype": 5}, "dtype is 5, expected one with a point"),
    ],
)
def test_a_configuration_of_something_else_is_named_with_what_is_wrong(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(content))
    for load in (preprocess_config_of, load_base):
        with pytest.raises(ValueError, match=rf"(?s){tmp_path}: its config.json is not that of a CT-CLIP: .*{message}"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token": None}, "cannot be read: Asking to pad"),
        ({"model_input_names": ["ids"]}, "cannot be read: 'attention_mask'"),
        ([], "cannot be read"),
    ],
)
def test_settings_of_a_tokenizer_that_no_batch_can_be_made_with_are_told(tmp_path, changes, message):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes if changes else changes))
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} {message}"):
        load_base(tmp_path)


def test_a_sentence_begins_at_the_left_whatever_a_tokenizer_says(tmp_path):
    mini = load_mini_base().tokenizer
    mini.padding_side = "left"
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    mini.save_pretrained(tmp_path)
    words = load_base(tmp_path).tokenizer(["Emphysema.", "There is no emphysema."], padding=True)["input_ids"]
    assert {ids[0] for ids in words} == {mini.cls_token_id}


def test_weights_in_half_precision_are_computed_with_in_float32(tmp_path):
    base = load_mini_base()
    base.model.bfloat16().save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_base(tmp_path).model.state_dict().values()} == {torch.float32}


class Toy(nn.Module):
    """The least that a base model is: brightness of slabs, and a word list."""

    preprocess_config, longest_text = PreprocessConfig.for_shape((8, 16, 16)), 64
    parts = Parts(
        {"look": "look"}, {"word": "text_encoder.word"}, {"paper": (("look",), ("word",)), "vision": (("look",), ())}
    )

    def __init__(self, words):
        super().__init__()
        self.temperature, self.look = nn.Parameter(torch.tensor(1.0)), nn.Linear(8, 12)
        self.text_encoder = nn.ModuleDict({"table": nn.Embedding(words, 12), "word": nn.Linear(12, 12)})

    @property
    def vision_encoder(self):
        return self.look

    def encode_image(self, volumes):
        return nn.functional.normalize(self.look(volumes.mean((1, 3, 4))), dim=-1)

    def encode_text(self, input_ids, attention_mask=None):
        return nn.functional.normalize(self.text_encoder["word"](self.text_encoder["table"](input_ids).mean(1)), dim=-1)


def test_a_base_model_can_be_added(tmp_path, monkeypatch):
    words = load_mini_base().tokenizer
    torch.manual_seed(0)
    toy = Toy(len(words)).eval()
    monkeypatch.setitem(BASES, "toy", lambda: BaseModel(copy.deepcopy(toy), words))
    base, volumes = load_base("toy"), torch.rand(2, 1, 8, 16, 16)
    before = ZeroShotClassifier(base.model, base.tokenizer).scores(volumes)
    with pytest.raises(ValueError, match="unknown LoRA preset 'text'; choose from paper, vision"):
        add_lora(base.model, "text")
    model = add_lora(base.model, "paper", r=2)
    table = parameter_table(model).set_index("component")
    assert table["trainable"].to_dict() == {"temperature": 0, "look": 40, "text_encoder": 48, "sum": 88}
    assert table.loc["sum", "total"] == table.loc["sum", "live"] == sum(p.numel() for p in toy.parameters())
    randomise_adapter(model, std=1)
    scores = ZeroShotClassifier(model, base.tokenizer).scores(volumes)
    assert scores.shape == (2, 18) and not np.allclose(scores, before)
    save_trained(model, tmp_path)
    again = load_trained(load_base("toy").model, tmp_path)
    np.testing.assert_array_equal(ZeroShotClassifier(again, base.tokenizer).scores(volumes), scores)
    assert preprocess_config_of("toy").shape == (8, 16, 16)
    with pytest.raises(ValueError, match="the toy model has a tokenizer of its own; leave words out"):
        load_base("toy", "words")
    monkeypatch.setitem(BASES, "half", lambda: BaseModel(nn.Linear(2, 2), words))
    with pytest.raises(TypeError, match="Linear lacks encode_image, encode_text, longest_text, parts"):
        load_base("half")


@pytest.mark.parametrize("model", [Toy(10), tiny_model()])
def test_what_is_a_base_model(model):
    assert isinstance(model, VisionLanguageModel)
    assert not isinstance(nn.Linear(2, 2), VisionLanguageModel)
