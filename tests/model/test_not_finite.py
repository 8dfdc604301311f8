"""A number that is not finite, wherever in the vision tower, is never scored: the quantiser would hide it."""

import math

import pytest
import torch
from golden import BATCH, small_model
from tiny import tiny_ct_clip, tiny_data, tiny_tokenizer
from torch import nn

from medctkit.lora.adapter import add_lora
from medctkit.zero_shot.classifier import ZeroShotClassifier


def voxel(model, volumes, value):
    volumes[1, 0, 3, 4, 5] = value


def weight(name):
    return lambda model, volumes, value: model.get_parameter(name).data.view(-1)[0].fill_(value)


def adapter(model, volumes, value):
    for name, parameter in add_lora(model, "vision").named_parameters():
        parameter.data.fill_(value) if "lora_B" in name else None


TOWER = "visual_transformer."
PLACES = {
    "voxel": voxel,
    "patches": weight(f"{TOWER}to_patch_emb.2.weight"),
    "spatial attention": weight(f"{TOWER}enc_spatial_transformer.layers.0.1.to_q.weight"),
    "position bias": weight(f"{TOWER}spatial_rel_pos_bias.net.2.weight"),
    "position convolution": weight(f"{TOWER}enc_temporal_transformer.layers.1.0.dsconv.weight"),
    "feed-forward": weight(f"{TOWER}enc_temporal_transformer.layers.0.3.1.weight"),
    "last norm": weight(f"{TOWER}enc_temporal_transformer.norm_out.gamma"),
    "projection": weight("to_visual_latent.weight"),
    "adapter": adapter,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_its_embedding_is_not_finite_either(place, value, training):
    model, volumes = small_model().train(training), BATCH["pixel_values"].clone()
    PLACES[place](model, volumes, value)
    with torch.no_grad():
        fine = model.encode_image(volumes).isfinite().all(1).tolist()
    assert fine == ([True, False, True] if place == "voxel" else [False] * 3)


def test_half_precision_that_overflows_is_seen():
    model = small_model().half()
    with torch.no_grad():
        model.get_parameter("visual_transformer.to_patch_emb.2.weight").fill_(6e4)
        assert not model.encode_image(BATCH["pixel_values"].half()).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["export", "compile"])
def test_a_graph_of_the_model_keeps_it(how):
    tower = small_model().visual_transformer.requires_grad_(False)
    whole = BATCH["pixel_values"][:1]
    spoiled = whole.clone()
    spoiled[0, 0, 0, 0, 0] = math.nan
    graph = (
        torch.export.export(tower, (whole,)).module()
        if how == "export"
        else torch.compile(tower, backend="aot_eager", fullgraph=True)
    )
    assert torch.equal(graph(whole), tower(whole))
    assert not graph(spoiled).isfinite().all()


def test_the_classifier_says_whose_it_is():
    model, tokenizer, data = tiny_ct_clip().eval(), tiny_tokenizer(), tiny_data(3)
    data[1]["pixel_values"][0, 0, 0, 0] = math.nan
    classifier = ZeroShotClassifier(model, tokenizer)
    with pytest.raises(FloatingPointError, match=r"1 of 3 embeddings are not finite:\nvolume 1\n.*NaN"):
        classifier.scores(torch.stack([item["pixel_values"] for item in data]))
    with pytest.raises(FloatingPointError, match=r"1 of 3 embeddings are not finite:\nstudy study_1\n"):
        classifier.embed(data, progress=False)
    nn.init.constant_(model.temperature, math.inf)
    with pytest.raises(FloatingPointError, match="the temperature"):
        ZeroShotClassifier(model, tokenizer).scores(data[0]["pixel_values"][None])
    nn.init.constant_(model.to_text_latent.weight, math.nan)
    with pytest.raises(FloatingPointError, match="the prompts of Medical material"):
        ZeroShotClassifier(model, tokenizer).scores(data[0]["pixel_values"][None])
