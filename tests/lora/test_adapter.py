"""LoRA: the equation, the placements, the counts, and adapters on disk."""

import copy
import re
from functools import partial

import pytest
import torch
from tiny import randomise_adapter, tiny_batch, tiny_ct_clip
from torch import nn

from medctkit.lora.adapter import add_lora, load_adapter, merge_lora, save_adapter
from medctkit.lora.counting import count_trainable, parameter_table, search_placements
from medctkit.lora.linear import LoRALinear
from medctkit.lora.methods import apply_method
from medctkit.lora.placement import PRESETS, lora_config
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.model.fingerprint import digests

RELEASED_TOTAL = 438_148_761  # parameters of the released checkpoint
PAPER_TRAINABLE = 1_671_168


DEEP = {"image_size": [32, 48], "spatial_depth": 2}


def tiny_model(**vision):
    return tiny_ct_clip(DEEP | vision, {"num_hidden_layers": 2}).eval()


def trainable_names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return CTCLIPModel(CTCLIPConfig())


# --- the equation -------------------------------------------------------------------------------


def test_lora_linear_equals_peft_in_output_gradient_and_merge():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(10, 6))
    peft_model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=3, lora_alpha=7, target_modules=["0"]))
    theirs = peft_model.base_model.model[0]
    ours = LoRALinear(copy.deepcopy(plain[0]), r=3, alpha=7)
    with torch.no_grad():
        ours.A.copy_(theirs.lora_A["default"].weight)
        theirs.lora_B["default"].weight.normal_()
        ours.B.copy_(theirs.lora_B["default"].weight)
    x = torch.randn(4, 5, 10)

    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.allclose(ours(x), plain(x))
    for y in (ours(x), theirs(x)):
        y.square().sum().backward()
    torch.testing.assert_close(ours.A.grad, theirs.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.B.grad, theirs.lora_B["default"].weight.grad)
    assert ours.base.weight.grad is None and theirs.base_layer.weight.grad is None

    before = ours(x)
    ours.merge()
    ours.merge()  # the second call must not add the update again
    merged = peft_model.merge_and_unload()[0]
    torch.testing.assert_close(ours.base.weight, merged.weight)
    torch.testing.assert_close(ours(x), before)
    ours.unmerge()
    torch.testing.assert_close(ours.base.weight, plain[0].weight)
    torch.testing.assert_close(ours(x), before)


def test_lora_linear_starts_as_the_base_and_refuses_rank_zero():
    base = nn.Linear(8, 5)
    x = torch.randn(2, 8)
    assert torch.equal(LoRALinear(base, r=2, alpha=4)(x), base(x))
    with pytest.raises(ValueError, match="rank r must be at least 1, got 0"):
        LoRALinear(base, r=0, alpha=4)


# --- placements ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("paper", PAPER_TRAINABLE),
        ("vision", 24 * 8 * 1_792),
        ("text", 24 * 12 * 4_608),
        ("all-attention", 24 * (8 * (1_792 + 768) + 12 * (4_608 + 1_536))),
        ("mlp", 24 * (8 * (512 + 2 * 1365 + 1365 + 512) + 12 * 2 * (768 + 3072))),
        ("all-linear", 24 * (8 * (1_792 + 768 + 1024 + 3 * 1365) + 12 * (4_608 + 1_536 + 2 * 3840))),
    ],
)
def test_presets_on_the_full_size_model(full_size, preset, expected):
    model = add_lora(copy.deepcopy(full_size), preset)
    assert count_trainable(model) == expected
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable_names(model))


@pytest.mark.parametrize("preset", ["paper", "all-attention"])
def test_a_preset_adapts_its_projections_in_every_layer_and_nothing_else(preset):
    more = preset == "all-attention"
    vision = ["to_q", "to_kv"] + ["to_out"] * more
    text = ["self.query", "self.key", "self.value"] + ["output.dense"] * more  # not that of the feed-forward
    layers = ("spatial", 0), ("spatial", 1), ("spatial", 2), ("temporal", 0), ("temporal", 1)
    model = add_lora(tiny_model(spatial_depth=3, temporal_depth=2), preset)
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trainable_names(model)} == {
        f"visual_transformer.enc_{tower}_transformer.layers.{i}.1.{name}" for tower, i in layers for name in vision
    } | {f"text_transformer.encoder.layer.{i}.attention.{name}" for i in range(2) for name in text}


def test_defaults_and_overrides():
    assert {placement.r for placement in PRESETS.values()} == {24}
    config = lora_config("paper")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (24, 48, 0.0)
    config = lora_config("paper", r=8)
    assert (config.r, config.lora_alpha) == (8, 16)
    config = lora_config("vision", r=4, lora_alpha=4, use_dora=True)
    assert (config.lora_alpha, config.use_dora) == (4, True)
    model = add_lora(tiny_model(), "paper", vision="to_out", text=(), r=2)
    assert count_trainable(model) == 3 * 2 * (32 + 32)
    assert count_trainable(add_lora(tiny_model(), target_modules=["to_text_latent"], r=2)) == 2 * (24 + 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "papr"}, "unknown LoRA preset 'papr'; choose from paper, vision, text, all-attention"),
        ({"r": 0}, "rank r must be a whole number of at least 1, got 0"),
        ({"r": 2.5}, "rank r must be a whole number of at least 1, got 2.5"),
        ({"vision": ("to_k",)}, "unknown vision projection 'to_k'; choose from to_q, to_kv, to_out"),
        ({"vision": (), "text": ()}, "adapts nothing; name at least one projection"),
        ({"alpha": 3}, "unknown LoRA setting 'alpha'; expected r, vision, text or a field of peft.LoraConfig"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_config(**arguments)


@pytest.mark.parametrize("targets", ["visual_transformer.*to_v", ["to_q", "to_v"]])
def test_a_placement_that_matches_nothing_is_refused_and_the_model_untouched(targets):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"to_v.* matches no module of CTCLIPModel; its linear layers .*to_kv"):
        add_lora(model, target_modules=targets)
    with pytest.raises(ValueError, match="'to_q' .* matches no module of BertModel"):
        add_lora(model.text_transformer, "paper")
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_second_add_lora_is_refused():
    with pytest.raises(ValueError, match=r"already carries the adapter\(s\) default; add another with"):
        add_lora(add_lora(tiny_model(), "text"), "vision")


# --- merge, save, load, swap --------------------------------------------------------------------


def test_merge_gives_a_plain_model_and_leaves_the_adapted_one(tmp_path):
    base = tiny_model()
    batch = tiny_batch(base)
    model = randomise_adapter(add_lora(copy.deepcopy(base), "all-attention", r=3).eval())
    adapted = model(**batch).text_embeds
    merged = merge_lora(model)
    assert type(merged) is CTCLIPModel
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(merged(**batch).text_embeds, adapted)
    torch.testing.assert_close(model(**batch).text_embeds, adapted, rtol=0, atol=0)
    with model.disable_adapter():
        assert torch.equal(model(**batch).text_embeds, base(**batch).text_embeds)
    merged.save_pretrained(tmp_path)
    again = CTCLIPModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).text_embeds, merged(**batch).text_embeds)


def test_an_adapter_that_is_switched_off_is_not_merged():
    model = add_lora(tiny_model())
    with model.disable_adapter(), pytest.raises(ValueError, match="switched off"):
        merge_lora(model)


def test_a_base_model_whose_layers_carry_an_adapter_says_so(tmp_path):
    base = tiny_model()
    save_adapter(randomise_adapter(add_lora(base, r=2)), tmp_path)
    for again in (partial(load_adapter, base, tmp_path), *(partial(f, base) for f in (add_lora, merge_lora))):
        with pytest.raises(ValueError, match="already carry the adapter.s. default.*gave back, or load the base"):
            again()
    with pytest.raises(ValueError, match="starts from a plain CTCLIPModel"):
        apply_method(base, "lora")
    assert digests(base) == digests(load_adapter(tiny_model(), tmp_path))


@pytest.mark.parametrize("name", ["0", "layers", "lora_A"])
def test_a_name_that_is_a_part_of_the_model_costs_no_other_adapter_a_tensor(tmp_path, name):
    model = add_lora(tiny_model(), r=2)
    model.add_adapter(name, lora_config("paper", r=2))
    with pytest.raises(ValueError, match=f"{name!r} is called like a part of the model.*'default'.*take it off first"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path, name)
    model.delete_adapter(name)
    load_adapter(tiny_model(), save_adapter(model, tmp_path))


def test_adapters_beside_each_other_may_save_whole_modules_but_not_train_biases_of_the_base(tmp_path):
    for name, fields in {"one": {}, "two": {}, "bias": {"bias": "lora_only"}}.items():
        fields = fields or {"modules_to_save": ["to_text_latent"]}
        save_adapter(randomise_adapter(add_lora(tiny_model(), r=2, **fields)), tmp_path / name)
    model = load_adapter(tiny_model(), tmp_path / "one", "one")
    model = load_adapter(model, tmp_path / "two", "two")
    with pytest.raises(ValueError, match="bias beside one, two: one of these adapters trained biases"):
        load_adapter(model, tmp_path / "bias", "bias")
    with pytest.raises(ValueError, match="trained biases"):
        load_adapter(load_adapter(tiny_model(), tmp_path / "bias"), tmp_path / "one", "one")


def test_adapters_are_saved_loaded_and_swapped_by_name(tmp_path):
    model, outputs = tiny_model(), {}
    batch = tiny_batch(model)
    base = model(**batch).logits_per_image
    for name, preset, seed in (("north", "paper", 5), ("south", "text", 6)):
        model = randomise_adapter(add_lora(tiny_model(), preset, r=2).eval(), seed=seed)
        outputs[name] = model(**batch).logits_per_image
        save_adapter(model, tmp_path / name)
        assert {p.name for p in (tmp_path / name).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    model = load_adapter(tiny_model(), tmp_path / "north", "north").eval()
    assert torch.equal(model(**batch).logits_per_image, outputs["north"])
    assert not trainable_names(model)
    model = load_adapter(model, tmp_path / "south", "south", trainable=True).eval()
    assert torch.equal(model(**batch).logits_per_image, outputs["south"])
    assert trainable_names(model) and all(".south." in name for name in trainable_names(model))
    model.set_adapter("north")
    assert torch.equal(model(**batch).logits_per_image, outputs["north"])
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits_per_image, base)
    save_adapter(model, tmp_path / "again", "south")
    again = load_adapter(tiny_model(), tmp_path / "again").eval()
    assert torch.equal(again(**batch).logits_per_image, outputs["south"])
    with pytest.raises(ValueError, match="an adapter named 'north' is already on this model"):
        load_adapter(model, tmp_path / "north", "north")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors; expected a folder written by"):
        load_adapter(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="no adapter 'east' on this model; it has north, south"):
        save_adapter(model, tmp_path / "east", "east")


@pytest.mark.parametrize(
    ("other", "tensor"),
    [
        ({"heads": 2}, r"to_q\.lora_B\.weight: saved \(32, 2\), model \(16, 2\)"),
        ({"spatial_depth": 3}, r"layers\.2\.1\.to_kv\.lora_A\.weight: saved none, model \(2, 32\)"),
        ({"spatial_depth": 1}, r"layers\.1\.1\.to_kv\.lora_A\.weight: saved \(2, 32\), model none"),
    ],
)
def test_an_adapter_of_another_architecture_is_refused(tmp_path, other, tensor):
    save_adapter(add_lora(tiny_model(), "paper", r=2), tmp_path)
    model = tiny_model(**other)
    with pytest.raises(ValueError, match=rf"(?s)was made for another architecture.*{tensor}"):
        load_adapter(model, tmp_path)
    assert not any("lora" in name for name, _ in model.named_parameters())


# --- counts -------------------------------------------------------------------------------------


def test_parameter_table_of_the_full_size_model(full_size):
    plain = parameter_table(full_size).set_index("component")
    table = parameter_table(add_lora(copy.deepcopy(full_size), "paper")).set_index("component")
    columns = "total, live, never used, trainable, share of released total, share of live, adapter bytes"
    assert ", ".join(table.columns) == columns
    expected = {
        "text_transformer": 109_482_240,
        "visual_transformer": 25_890_200,
        "to_text_latent": 393_216,
        "to_visual_latent": 150_994_944,
        "to_text_latent_extra": 393_216,
        "to_visual_latent_extra": 150_994_944,
        "temperature": 1,
        "sum": RELEASED_TOTAL,
    }
    assert table["total"].to_dict() == expected == plain["total"].to_dict()
    total = table.loc["sum"]
    assert total["live"] + total["never used"] == RELEASED_TOTAL
    assert total["live"] == sum(p.numel() for p in full_size.parameters())
    assert total["trainable"] == PAPER_TRAINABLE
    assert total["adapter bytes"] == 4 * PAPER_TRAINABLE
    assert round(100 * total["share of released total"], 3) == 0.380
    assert total["share of live"] == pytest.approx(PAPER_TRAINABLE / (total["live"] + PAPER_TRAINABLE))
    assert table.loc["visual_transformer", "trainable"] == 24 * 8 * 1_792
    assert table.loc["to_visual_latent_extra", ["live", "trainable", "share of live"]].tolist() == [0, 0, 0]
    assert plain.loc["sum", "trainable"] == total["live"] and plain.loc["sum", "adapter bytes"] == 0


def test_parameter_table_counts_the_active_adapter_only():
    model = add_lora(tiny_model(), "paper", r=2)
    first = count_trainable(model)
    model.add_adapter("second", lora_config("text", r=5))
    model.set_adapter("second")
    total = parameter_table(model).set_index("component").loc["sum"]
    assert total["trainable"] == count_trainable(model) != first
    assert total["adapter bytes"] == 4 * total["trainable"]
    model.set_adapter("default")
    assert parameter_table(model).set_index("component").loc["sum", "adapter bytes"] == 4 * first


def test_the_search_singles_out_the_paper_placement():
    table = search_placements()
    assert len(table) == 8 * (2**7 - 1)
    fits = table[table["fits the paper"]]
    assert set(fits["r"]) == {24} and len(fits) == 8
    assert (fits["trainable"] == PAPER_TRAINABLE).all()
    assert all("to_kv" in vision and len(vision.split(" + ")) == 2 for vision in fits["vision"])
    assert all(len(text.split(" + ")) == 3 for text in fits["text"])
    chosen = fits[fits["exactly q, k, v"]]
    assert chosen[["vision", "text"]].values.tolist() == [["to_q + to_kv", "query + key + value"]]
    assert chosen["percent of total"].round(3).tolist() == [0.380]
    assert (table[table["exactly q, k, v"]]["trainable"] == table[table["exactly q, k, v"]]["r"] * 69_632).all()


def test_a_merge_that_would_round_the_update_away_is_refused():
    adapted = add_lora(tiny_model(), "paper", r=2)
    adapted.get_base_model().to_visual_latent.bfloat16()
    with pytest.raises(ValueError, match=r"to_visual_latent\.weight is in half precision"):
        merge_lora(adapted)


def test_an_adapter_of_another_base_model_is_refused(tmp_path):
    adapted = add_lora(tiny_model(), "paper", r=2)
    save_adapter(adapted, tmp_path)
    load_adapter(tiny_model(), tmp_path)
    two = add_lora(tiny_model(), "text", r=3)
    load_adapter(two, tmp_path, name="second")  # the same base, under another adapter
    other = tiny_model()
    with torch.no_grad():
        other.visual_transformer.vq._codebook.embed[0, 0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"was trained on a base model with other weights \(sha256:\w+; this one is"):
        load_adapter(other, tmp_path)
