"""CT-CLIP in transformers' own terms: Auto classes, a processor beside the model, a pipeline."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline

import medctkit.zero_shot  # noqa: F401  # registers all that is asked for here
from medctkit.findings import FINDINGS
from medctkit.lora.adapter import add_lora
from medctkit.model.base_model import FOLDER, load_mini_base
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.model.fingerprint import vocabulary_of
from medctkit.model.processing import CTCLIPProcessor, CTImageProcessor
from medctkit.phantom.study import generate
from medctkit.scans.preprocessing import PreprocessConfig, preprocess
from medctkit.zero_shot.classifier import ZeroShotClassifier


@pytest.fixture(scope="module")
def base():
    return load_mini_base()


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """A model and its tokenizer, saved as they always are."""
    folder = tmp_path_factory.mktemp("model")
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def volumes():
    return [generate(seed, shape=(24, 48, 48)).volume for seed in (3, 4, 5)]


def test_the_auto_classes_know_a_saved_folder(base, folder, volumes):
    assert isinstance(AutoConfig.from_pretrained(folder), CTCLIPConfig)
    model = AutoModel.from_pretrained(folder).eval()
    assert isinstance(model, CTCLIPModel)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, CTCLIPProcessor) and vocabulary_of(processor.tokenizer) == vocabulary_of(
        base.tokenizer
    )
    assert AutoImageProcessor.from_pretrained(folder).preprocess_config == base.preprocess_config
    inputs = processor(images=volumes[0], text=["A nodule.", "No nodule is seen."])
    assert torch.equal(inputs["pixel_values"], preprocess(volumes[0], base.preprocess_config)[None])
    with torch.no_grad():
        output = model(**inputs)
        image = model.get_image_features(inputs["pixel_values"])
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        assert torch.equal(image, output.image_embeds) and torch.equal(text, output.text_embeds)
        assert torch.equal(image, base.model.encode_image(inputs["pixel_values"]))


def test_a_processor_loads_back_equal(base, tmp_path):
    config = PreprocessConfig((3.0, 2.0, 1.0), (8, 16, 24), True, (-500, 900), "zyx")
    processor = CTCLIPProcessor(CTImageProcessor.of(config), base.tokenizer)
    base.model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict() and again.image_processor.preprocess_config == config


def test_the_shipped_model_has_its_processor():
    assert AutoProcessor.from_pretrained(FOLDER).to_dict() == load_mini_base().processor.to_dict()


def test_the_pipeline_scores_as_the_classifier_does(base, folder, volumes):
    pipe = pipeline("ct-zero-shot", model=folder, device="cpu")
    pixels = torch.stack([preprocess(volume, base.preprocess_config) for volume in volumes])
    expected = ZeroShotClassifier(base.model, base.tokenizer).scores(pixels)
    for rows, scores in zip([*pipe(volumes, batch_size=2), pipe(volumes[0])], [*expected, expected[0]], strict=True):
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
        by_name = {row["label"]: row["score"] for row in rows}
        np.testing.assert_allclose([by_name[name] for name in FINDINGS], scores, atol=1e-6)
    adapted = add_lora(load_mini_base().model, "paper", r=2, init_lora_weights=False).eval()
    pipe = pipeline("ct-zero-shot", model=adapted, processor=base.processor, prompts="ensemble", device="cpu")
    expected = ZeroShotClassifier(adapted, base.tokenizer, "ensemble").scores(pixels[:1])
    assert pipe(volumes[0])[0]["score"] == pytest.approx(expected.max(), abs=1e-6)


def test_what_does_not_fit_is_refused(base, volumes):
    other = CTCLIPProcessor(CTImageProcessor(shape=(8, 16, 16)), base.tokenizer)
    with pytest.raises(ValueError, match=r"shape=\(8, 16, 16\).*the model's own"):
        pipeline("ct-zero-shot", model=base.model, processor=other, device="cpu")
    pipe = pipeline("ct-zero-shot", model=base.model, processor=base.processor, device="cpu")
    with pytest.raises(TypeError, match="does not know top_k"):
        pipe(volumes[0], top_k=3)
    with pytest.raises(TypeError, match="expected a CTVolume.*got int"):
        pipe(3)
