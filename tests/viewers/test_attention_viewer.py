"""The attention viewer shows the maps of `medctkit.attention`, only when asked, and survives bad input."""

import numpy as np
import pytest
from tiny import PatchesOnly, randomise_adapter, tiny_ct_clip, tiny_model, tiny_tokenizer

from medctkit.attention import maps as attention
from medctkit.attention.localisation import patch_shares
from medctkit.lora.adapter import add_lora
from medctkit.phantom.study import generate
from medctkit.scans.preprocessing import PreprocessConfig, preprocess
from medctkit.viewers.attention_viewer import MEAN, OF_ALL, OWN, SHOWN, AttentionViewer
from medctkit.viewers.drawing.rendering import heat_share, place_of

pytestmark = pytest.mark.usefixtures("one_thread")
PATCH = (1, 1, 0)


@pytest.fixture(scope="module")
def study():
    return generate(4, findings=["Pleural effusion"], shape=(24, 40, 40))


@pytest.fixture(scope="module")
def models():
    deep, small = tiny_ct_clip({"spatial_depth": 3, "heads": 2}), tiny_ct_clip({"image_size": 16})
    return {"base": tiny_model().eval(), "deep": deep.eval(), "small": small.eval()}


@pytest.fixture(scope="module")
def config(models):
    return models["base"].preprocess_config


@pytest.fixture
def viewer(study, models, config):
    """On a model of 2 x 2 x 2 patches."""
    made = AttentionViewer(study.volume, models, tiny_tokenizer(), config, study.masks, height=120)
    yield made
    made.close()


def middle_of(patch, study, config, grid=(2, 2, 2)):
    """The middle of a patch, mm."""
    there = attention.patch_map(np.zeros(grid), study.volume, config)
    return (there.affine @ [*patch, 1])[:3]


def shown(viewer):
    (heat_map,) = viewer.slices.heat_maps.values()
    assert viewer.slices.look.heat_map is heat_map
    return heat_map


def ask(viewer, show, model="base", layer=0, head=None, patch=None):
    viewer.model.value, viewer.shown.value = model, show
    if "layer" in SHOWN[show]:
        viewer.layer.value, viewer.head.value = layer, MEAN if head is None else head
    if patch is not None:
        viewer.slices.move_to(patch)


@pytest.mark.parametrize("head", [None, 1])
@pytest.mark.parametrize("layer", [0, 2])
def test_every_map_is_the_one_that_the_package_computes(viewer, study, models, config, layer, head):
    viewer.slices.move_to(middle_of(PATCH, study, config))
    pixels = preprocess(study.volume, config)
    found = attention.attend(models["deep"], pixels)
    expected = {
        "rollout": found.rollout(),
        "spatial attention received": found.received("spatial", layer, head),
        "spatial attention of a patch": found.of_query("spatial", layer, head, PATCH),
        "temporal attention received": found.received("temporal", 0, head),
        "temporal attention of a patch": found.of_query("temporal", 0, head, PATCH),
        "speaks for a prompt": attention.relevance(
            models["deep"], viewer.tokenizer, pixels, "Pleural effusion is present.", "Pleural effusion is not present."
        ),
    }
    assert {"nothing", *expected} == set(SHOWN)
    for show, values in expected.items():
        ask(viewer, show, "deep", layer if "spatial" in show else 0, head)
        np.testing.assert_allclose(shown(viewer).values, 8 * values, atol=1e-5, err_msg=show)  # times chance
        there = attention.patch_map(values, study.volume, config)
        np.testing.assert_array_equal(shown(viewer).affine, there.affine)
        named = show.replace("a prompt", "Pleural effusion")
        assert show in viewer.caption.value and shown(viewer).name == f"deep: {named}, times chance"
        if "layer" in SHOWN[show]:
            named = "mean of heads" if head is None else "head 1"
            assert f"layer {viewer.layer.value} of 0 to {viewer.layer.max}, {named}" in viewer.caption.value
        assert not viewer.messages.text
    ask(viewer, "nothing", "deep")
    assert not viewer.slices.heat_maps and not viewer.caption.value


def test_attention_is_captured_once_for_a_model_and_only_when_asked(study, models, config, monkeypatch):
    calls = []
    whole = attention.attend
    monkeypatch.setattr(attention, "attend", lambda model, pixels: calls.append(model) or whole(model, pixels))
    viewer = AttentionViewer(study.volume, models, tiny_tokenizer(), config, height=120, show="nothing")
    ask(viewer, "nothing", "deep")
    ask(viewer, "speaks for a prompt", "base")
    assert not calls
    for show in ("rollout", "spatial attention received", "temporal attention of a patch"):
        for model in ("base", "deep"):
            ask(viewer, show, model)
    assert calls == [models["base"], models["deep"]]
    viewer.close()
    assert not viewer._kept and viewer.shown.comm is None, "a control that lives on would keep the models"


def test_the_patch_is_the_one_under_the_crosshair(viewer, study, config, monkeypatch):
    ask(viewer, "spatial attention of a patch")
    for patch in ((0, 0, 1), (1, 1, 1)):
        point = middle_of(patch, study, config)
        viewer.slices.move_to(point)
        assert f"patch (t, i, j) = {patch} under the crosshair, around {place_of(point)}</div>" in viewer.caption.value
        assert shown(viewer).values[patch[0]].sum() == pytest.approx(8, abs=1e-4)
    monkeypatch.setattr(viewer, "_draw", None)  # fails when called
    viewer.slices.move_to(middle_of((1, 1, 1), study, config) + 20)  # in the same patch


def test_a_crosshair_outside_of_what_the_model_sees_gives_a_message(study, models):
    narrow = PreprocessConfig((10, 4, 4), (8, 32, 32))
    viewer = AttentionViewer(study.volume, models, tiny_tokenizer(), narrow, height=120)
    ask(viewer, "temporal attention of a patch")
    inside = middle_of((1, 0, 1), study, narrow)
    viewer.slices.move_to(inside + [0, 0, 150])
    assert "the crosshair is outside of what the model sees" in viewer.messages.text and not viewer.slices.heat_maps
    viewer.slices.move_to(inside)
    assert not viewer.messages.text and shown(viewer)


def test_controls_offer_what_the_model_has_and_the_choice_needs(viewer):
    ask(viewer, "spatial attention received", "deep", layer=2, head=1)
    assert viewer.layer.max == 2 and len(viewer.head.options) == 3
    assert viewer.prompt.layout.display == "none" and viewer.layer.layout.display is None
    viewer.model.value = "base"  # one layer, four heads
    assert (viewer.layer.value, viewer.layer.max, viewer.head.value, len(viewer.head.options)) == (0, 0, 1, 5)
    viewer.head.value = 3
    viewer.model.value = "deep"
    assert viewer.head.value == MEAN and viewer.head.index == 0
    viewer.shown.value = "speaks for a prompt"
    assert viewer.prompt.layout.display is None and viewer.layer.layout.display == "none"


def test_an_adapter_has_a_strength_of_which_0_is_the_base_model(study, models, config):
    adapted = randomise_adapter(add_lora(tiny_ct_clip({"heads": 2}), "paper", r=2).eval())
    both = {"plain": models["deep"], "adapted": adapted}
    viewer = AttentionViewer(study.volume, both, tiny_tokenizer(), config, height=120)
    assert viewer.strength.layout.display == "none"
    viewer.model.value = "adapted"
    seen = {}
    for strength in (1.0, 0.0, 0.5):
        viewer.strength.value = strength
        assert viewer.strength.layout.display is None
        seen[strength] = shown(viewer).values
    with adapted.disable_adapter():
        base = attention.attend(adapted, preprocess(study.volume, config)).rollout()
    np.testing.assert_array_equal(seen[0], base * base.size)
    assert not np.allclose(seen[1], seen[0]) and not np.allclose(seen[0.5], seen[1])
    viewer.close()


def test_a_prompt_is_a_finding_or_any_sentence(viewer, study, models, config):
    ask(viewer, "speaks for a prompt")
    viewer.prompt.value = "Emphysema"
    assert (viewer.stating.value, viewer.denying.value) == ("Emphysema is present.", "Emphysema is not present.")
    assert "Emphysema is present." in viewer.caption.value and "against" in viewer.caption.value
    viewer.denying.value = ""
    assert viewer.prompt.value == OWN and "against" not in viewer.caption.value
    viewer.prompt.value = "Atelectasis"
    viewer.stating.value = "there is consolidation"
    assert viewer.denying.value == "" and viewer.prompt.value == OWN  # what it denied was another sentence
    expected = attention.relevance(
        models["base"], viewer.tokenizer, preprocess(study.volume, config), "there is consolidation"
    )
    np.testing.assert_allclose(shown(viewer).values, 8 * expected, atol=1e-5)


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [("scan " * 40, "has 40 tokens, the text encoder takes 32; shorten it"), (" ", "the sentence is")],
)
def test_a_sentence_too_long_or_empty_gives_a_message_and_the_next_a_map(viewer, sentence, reason):
    ask(viewer, "speaks for a prompt")
    viewer.stating.value = sentence
    assert reason in viewer.messages.text and not viewer.slices.heat_maps and not viewer.caption.value
    viewer.slices.move_to((10, 20, 30))
    assert reason in viewer.messages.text  # still true
    viewer.stating.value = "there is emphysema"
    assert not viewer.messages.text and shown(viewer)


def test_a_model_of_another_input_size_gives_a_message_and_the_right_one_a_map(viewer):
    for show in ("rollout", "speaks for a prompt", "temporal attention of a patch"):
        ask(viewer, show, "small")
        assert "volumes have shape (1, 1, 8, 32, 32); this model expects (batch, 1, 8, 16, 16)" in viewer.messages.text
        assert not viewer.slices.heat_maps
        viewer.model.value = "base"
        assert not viewer.messages.text and shown(viewer)


def test_the_caption_says_how_much_of_the_map_lies_in_each_mask(study, models, config):
    effusion = study.masks["Pleural effusion"]
    masks = {"effusion": effusion, "everything": effusion | True, "nothing": effusion & False}
    viewer = AttentionViewer(study.volume, models, tiny_tokenizer(), config, masks, height=120)
    filled = patch_shares(effusion, study.volume, config, (2, 2, 2))
    share, size = (shown(viewer).values * filled).sum() / 8, filled.mean()
    assert 0 < share < 1 and share != pytest.approx(size, rel=1e-3)
    said = viewer.caption.value
    assert f"effusion: {share / size:.1f} times chance; {share:.1%} of the map in {size:.1%} of what the model" in said
    seen = patch_shares(effusion | True, study.volume, config, (2, 2, 2))
    share, size = (shown(viewer).values * seen).sum() / 8, seen.mean()
    assert f"everything: {share / size:.1f} times chance; {share:.1%} of the map in {size:.1%} of" in said
    assert "nothing: nothing that the model sees; 0.0% of" in said


def test_it_starts_at_the_finding_outlined_and_shows_patches_as_squares(viewer, study):
    mask = viewer.slices.scans[0].masks["Pleural effusion"]
    assert mask[viewer.slices.voxel] and viewer.slices.look.masks == ("Pleural effusion",)
    assert viewer.slices.look.opacity == 0 and viewer.prompt.value == "Pleural effusion"
    slab = heat_share(shown(viewer), study.volume, "axial", 12)
    assert len(np.unique(slab)) <= 4, "2 x 2 patches, nothing between them"
    assert "Accordion" in {type(child).__name__ for child in viewer.slices.widget.children}, "controls are folded"
    assert viewer.caption.value.count("<div") == 3


def test_of_a_model_without_ct_clips_layers_it_offers_what_speaks_for_a_prompt(study, models, config):
    words = tiny_tokenizer()
    other = PatchesOnly(len(words)).eval()
    viewer = AttentionViewer(study.volume, {"other": other}, words, config, study.masks, height=120)
    assert viewer.shown.options == OF_ALL and set(OF_ALL) < set(SHOWN) and viewer.shown.value == "speaks for a prompt"
    pair = viewer.stating.value, viewer.denying.value
    expected = attention.relevance(other, words, preprocess(study.volume, config), *pair)
    np.testing.assert_allclose(shown(viewer).values, expected * 8, rtol=1e-5)
    assert "of the map in" in viewer.caption.value and not viewer.messages.text
    with pytest.raises(ValueError, match="show='rollout': expected one of nothing, speaks for a prompt$"):
        AttentionViewer(study.volume, models | {"other": other}, words, config, show="rollout")


def test_bad_input_is_refused(study, models, config):
    with pytest.raises(TypeError, match="expected a CTVolume"):
        AttentionViewer(study.volume.hu, models, tiny_tokenizer(), config)
    with pytest.raises(TypeError, match=r"models: expected a dict such as \{'base': model\}"):
        AttentionViewer(study.volume, models["base"], tiny_tokenizer(), config)
    with pytest.raises(ValueError, match="show='gradient': expected one of nothing, rollout, spatial"):
        AttentionViewer(study.volume, models, tiny_tokenizer(), config, show="gradient")
