"""Every way to fine-tune: where it starts, what it changes, how much that is, and the way to disk and back."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_batch, tiny_ct_clip

from medctkit.lora.adapter import merge_lora
from medctkit.lora.counting import count_trainable
from medctkit.lora.methods import METHODS, apply_method, load_trained, save_trained, trained_bytes
from medctkit.lora.strength import at_rank, at_strength, can_be_scaled, intruder_dimensions

pytestmark = pytest.mark.usefixtures("one_thread")

ADAPTERS = [name for name in METHODS if name not in ("full", "bitfit")]
LOADED = [name for name in METHODS if name != "pissa"]  # which changes the base model too
# no two widths alike, so that a formula cannot be right by chance
VISION = {"spatial_depth": 2, "dim_head": 6}
TEXT = {"hidden_size": 20, "num_hidden_layers": 2, "intermediate_size": 42}


def model_with(vision=None, text=None):
    model = tiny_ct_clip(VISION | (vision or {}), TEXT | (text or {})).eval()
    for module in model.modules():  # biases of a fresh model are all zero
        if getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias, std=0.1)
    return model


@pytest.fixture(scope="module")
def base():
    return model_with()


@pytest.fixture(scope="module")
def batch(base):
    return tiny_batch(base)


def made(base, name, seed=0, **settings):
    torch.manual_seed(seed)
    return apply_method(copy.deepcopy(base), name, **settings)


def embeds(model, batch):
    """With gradients: without, a plain feed-forward takes a way that rounds otherwise."""
    model.eval()
    out = model(**batch)
    return torch.stack([out.image_embeds, out.text_embeds]).detach()


def changed(model, seed=2):
    """The model, with everything trainable moved at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_training_starts_at_the_base_model(base, batch, name):
    # a weight divided by its length and multiplied by it again; one taken apart and put together again
    tolerance = 1e-6 if name in ("dora", "pissa") else 0
    torch.testing.assert_close(embeds(made(base, name), batch), embeds(base, batch), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_change_all_that_is_trainable_and_nothing_else(base, batch, name):
    model = made(base, name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2, weight_decay=0)
    for step in range(2):  # LoRA's A and VeRA's d learn from the second on, when B and b are not zero any more
        optimizer.zero_grad()
        model(**batch, return_loss=True).loss.backward()
        assert step or name == "pissa" or not any(p.grad.any() for key, p in trainable.items() if ".lora_A." in key)
        optimizer.step()
    assert all(p.grad.any() for p in trainable.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    different = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert different == trainable.keys()


def test_parameter_counts_by_formula(base):
    vision, text = 3, 2  # layers
    width, inner, narrow, hidden, wide = 32, 24, 85, 20, 42

    def lora(r):
        return vision * r * (width + inner + width + 2 * inner), text * 3 * r * 2 * hidden

    outputs = vision * (inner + 2 * inner) + text * 3 * hidden
    patches, offsets = 4 * 16 * 16 + width + width, width + width + 4
    text_layer = 4 * hidden + hidden + wide + hidden + hidden  # q, k, v, out; norm; wide, narrow; norm
    mlp = vision * (width + 2 * narrow + narrow + width) + text * 2 * (hidden + wide)
    out = vision * (inner + width) + text * 2 * hidden
    expected = {
        "full": sum(p.numel() for p in base.parameters()),
        "bitfit": patches + offsets + vision * 2 * width + hidden + text * text_layer,
        "lora": sum(lora(16)),
        "lora-vision": lora(16)[0],
        "lora-text": lora(16)[1],
        "dora": sum(lora(16)) + outputs,
        **dict.fromkeys(("rslora", "lora+", "pissa"), sum(lora(16))),
        "lora-mlp": round(sum(lora(16)) / mlp) * mlp,
        "lora-all": round(sum(lora(16)) / (mlp + out + sum(lora(1)))) * (mlp + out + sum(lora(1))),
        "oft": vision * 2 * width * (width - 1) // 2 + text * 3 * hidden * (hidden - 1) // 2,
        "vera": outputs + (2 * vision + 3 * text) * 64,
        "ia3": vision * (2 * inner + narrow) + text * (2 * hidden + wide),
    }
    assert {name: count_trainable(made(base, name)) for name in METHODS} == expected
    for r in (1, 64):
        assert count_trainable(made(base, "lora", r=r)) == sum(lora(r))


@pytest.mark.parametrize("name", LOADED)
def test_what_was_trained_comes_back_from_disk(base, batch, tmp_path, name):
    model = changed(made(base, name))
    assert save_trained(model, tmp_path) == tmp_path
    if name in ("full", "bitfit"):
        assert {p.name for p in tmp_path.iterdir()} == {"trained.safetensors"}
        assert 0 < trained_bytes(tmp_path) - 4 * count_trainable(model) < 20_000  # the rest are names
    loaded = load_trained(copy.deepcopy(base), tmp_path)
    expected = embeds(model, batch)
    assert torch.equal(embeds(loaded, batch), expected)
    assert not torch.allclose(expected, embeds(base, batch))
    assert count_trainable(loaded) == 0 and not loaded.training


@pytest.mark.parametrize("name", LOADED)
def test_weights_for_another_architecture_are_refused(base, tmp_path, name):
    save_trained(made(base, name), tmp_path)
    deeper = model_with(text={"num_hidden_layers": 3}) if name == "lora-text" else model_with({"spatial_depth": 3})
    with pytest.raises(ValueError, match="was made for another architecture"):
        load_trained(deeper, tmp_path)  # all that was saved has its place, and does not fill all places


def test_an_adapter_that_changes_the_base_model_is_not_loaded(base, tmp_path):
    save_trained(made(base, "pissa"), tmp_path)
    with pytest.raises(ValueError, match="'pissa', which changes the base model too"):
        load_trained(copy.deepcopy(base), tmp_path)


def test_vera_draws_its_projections_from_the_seed_and_keeps_them(base, tmp_path):
    def projection(model):
        return model.base_model.vera_A["default"]

    first = made(base, "vera", seed=1)
    assert torch.equal(projection(first), projection(made(base, "vera", seed=1)))
    assert not torch.equal(projection(first), projection(made(base, "vera", seed=2)))
    save_trained(first, tmp_path)
    torch.manual_seed(9)
    assert torch.equal(projection(load_trained(copy.deepcopy(base), tmp_path)), projection(first))


def test_trainable_tensors_beside_an_adapter_are_not_lost_in_silence(base, tmp_path):
    model = made(base, "lora")
    model.get_base_model().temperature.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 more tensors are trainable.*Freeze them(.|\n)*\.temperature"):
        save_trained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    named = made(base, "lora", modules_to_save=["to_visual_latent"])
    save_trained(named, tmp_path)  # peft's own way to train more is kept
    assert any("to_visual_latent" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_what_cannot_be_done_is_told(base, tmp_path):
    with pytest.raises(ValueError, match="unknown method 'lorra'; choose one of full, bitfit, lora"):
        apply_method(base, "lorra")
    with pytest.raises(ValueError, match="method 'bitfit' does not know one of the settings {'r': 4}"):
        made(base, "bitfit", r=4)
    with pytest.raises(ValueError, match="method 'ia3' does not know one of the settings {'alpha': 4}"):
        made(base, "ia3", alpha=4)
    with pytest.raises(ValueError, match="already carries an adapter; full starts from a plain CTCLIPModel"):
        apply_method(made(base, "lora"), "full")
    with pytest.raises(ValueError, match="nothing on this model is trainable"):
        save_trained(copy.deepcopy(base).requires_grad_(False), tmp_path)
    with pytest.raises(FileNotFoundError, match="neither adapter_model.safetensors nor trained.safetensors"):
        load_trained(copy.deepcopy(base), tmp_path)
    with pytest.raises(FileNotFoundError, match="written by save_trained"):
        trained_bytes(tmp_path)
    save_trained(made(base, "bitfit"), tmp_path)
    with pytest.raises(ValueError, match="holds trained.safetensors, weights of another method; choose another folder"):
        save_trained(made(base, "ia3"), tmp_path)
    with pytest.raises(ValueError, match="this model carries an adapter; load_trained expects the plain base"):
        load_trained(made(base, "lora"), tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="holds both adapter_model.safetensors and trained.safetensors"):
        load_trained(copy.deepcopy(base), tmp_path)


def test_methods_say_what_they_train():
    for name, method in METHODS.items():
        assert method.trains.endswith(".") and re.search("arXiv|Without Regret", method.paper), name
        assert 0 < len(method.learning_rates) <= 3 and list(method.learning_rates) == sorted(method.learning_rates)
    assert METHODS["full"].learning_rates[0] < METHODS["lora"].learning_rates[0]


# --- afterwards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "rslora", "lora-all", "full", "bitfit"])
def test_strength_0_is_the_base_bit_for_bit_and_between_lie_averages_of_the_weights(base, batch, name):
    model, plain = made(base, name), name in ("full", "bitfit")
    start = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad} if plain else None
    trained = embeds(changed(model), batch)
    seen = {}
    for strength in (0, 0.5, 1.5):
        with at_strength(model, strength, start):
            seen[strength] = embeds(model, batch)
    assert torch.equal(seen[0], embeds(base, batch)) and torch.equal(embeds(model, batch), trained)
    whole = copy.deepcopy(model) if plain else merge_lora(model)
    with torch.no_grad():
        for average, before in zip(whole.parameters(), base.parameters(), strict=True):
            average.lerp_(before, 0.5)
    torch.testing.assert_close(embeds(whole, batch), seen[0.5], atol=1e-4, rtol=0)
    assert not torch.allclose(seen[1.5], trained)


def test_what_has_no_strength_says_so(base):
    assert [name for name in ADAPTERS if can_be_scaled(made(base, name))] == [
        *("lora", "lora-vision", "lora-text", "lora-mlp", "lora-all", "rslora", "lora+")
    ]
    for model, strength, message in (
        (made(base, "dora"), 0.5, "no adapter that can be scaled"),
        (base, 0.5, "give `start`"),
        (made(base, "lora"), float("nan"), "finite number such as 0.5, got nan"),
    ):
        with pytest.raises(ValueError, match=message), at_strength(model, strength):
            pass


@pytest.mark.parametrize("name", ["lora", "rslora", "lora-all"])
def test_a_lower_rank_keeps_the_strongest_directions_of_each_update_and_gives_the_rest_back(base, batch, name):
    model = made(base, name, r=4)
    trained = embeds(changed(model), batch)
    before = merge_lora(model)
    with at_rank(model, 0):
        assert torch.equal(embeds(model, batch), embeds(base, batch))
    with at_rank(model, 2):
        cut = merge_lora(model)
    for module, whole, start in zip(cut.modules(), before.modules(), base.modules(), strict=True):
        if isinstance(module, torch.nn.Linear) and not torch.equal(whole.weight, start.weight):
            u, s, v = torch.linalg.svd(whole.weight - start.weight, full_matrices=False)
            nearest = start.weight + u[:, :2] * s[:2] @ v[:2]
            torch.testing.assert_close(module.weight, nearest, atol=1e-5, rtol=0)
    with at_rank(model, 9):
        torch.testing.assert_close(embeds(model, batch), trained, atol=1e-4, rtol=0)
    assert torch.equal(embeds(model, batch), trained)
    for wrong, rank in ((base, 2), (made(base, "dora"), 2), (model, -1)):
        with pytest.raises(ValueError, match="with a LoRA and a rank of at least 0"), at_rank(wrong, rank):
            pass


def test_a_strong_new_direction_is_an_intruder_and_more_of_the_old_is_none(base):
    assert intruder_dimensions(base, base) == 0
    model = made(base, "lora", r=1)
    assert intruder_dimensions(base, model) == 0, "B is zero"
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A"):
                u, _, v = torch.linalg.svd(module.base_layer.weight)
                module.lora_A["default"].weight.copy_(v[:1])
                module.lora_B["default"].weight.copy_(9 * u[:, :1])
        assert intruder_dimensions(base, model) == 0
        for module in model.modules():
            if hasattr(module, "lora_A"):
                mixed = torch.linalg.svd(module.base_layer.weight)[0].sum(1, keepdim=True)  # a little of all
                module.lora_B["default"].weight.copy_(9 * mixed)
    assert intruder_dimensions(base, model) == 1
