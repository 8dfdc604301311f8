"""CT-CLIP: equal to the public implementation at a small size, and strict about what it loads."""

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from golden import BATCH, EXPECTED, STATE, relative_error, small_config, small_model
from safetensors.torch import save_file
from torch.nn import functional as F

from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel, released_layout
from medctkit.model.vision_tower import VisionTransformer

GRADIENTS = [name for name in EXPECTED if name.startswith("grad.")]


@pytest.fixture(scope="module")
def model():
    return small_model()


# --- equal to the public implementation ---------------------------------------------------------


@pytest.fixture(scope="module", params=["plain", "quick"])
def computed(request):
    model, results = small_model(), {}
    if request.param == "plain":
        tower = VisionTransformer(model.config.vision_config).eval()
        tower.load_state_dict(model.visual_transformer.state_dict())
        model.visual_transformer = tower
    tower = model.visual_transformer
    with torch.no_grad():
        patches = results["patch_tokens"] = tower.to_patch_emb(BATCH["pixel_values"])
        results["spatial_bias"] = tower.spatial_rel_pos_bias(*patches.shape[2:4])
        spatial = results["spatial_out"] = tower.encode_spatial(patches)
        results["temporal_out"] = tower.encode_temporal(spatial.reshape(patches.shape))
        results["codebook_indices"] = tower.vq.nearest(tower.encode(BATCH["pixel_values"]))
        results["encoded_tokens"] = tower(BATCH["pixel_values"])
        out = model(**BATCH, return_loss=True)
    results |= {"image_latents": out.image_embeds, "text_latents": out.text_embeds}
    return results | {"paired_similarity": out.logits_per_image.diag(), "contrastive_loss": out.loss[None]}


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in GRADIENTS])
def test_forward_equals_the_public_implementation(computed, name):
    if name == "codebook_indices":
        assert torch.equal(computed[name], EXPECTED[name])
    else:
        assert relative_error(computed[name], EXPECTED[name]) <= 1e-5


def test_gradients_equal_the_public_implementation():
    model = small_model().train()
    model(**BATCH, return_loss=True).loss.backward()
    parameters = dict(model.named_parameters())
    assert len(GRADIENTS) == 6
    for name in GRADIENTS:
        assert relative_error(parameters[name.removeprefix("grad.")].grad, EXPECTED[name]) <= 1e-5, name


# --- the quantiser ------------------------------------------------------------------------------


def test_training_leaves_the_codebook_as_it_is_bit_for_bit():
    model = small_model().train()
    codes = model.visual_transformer.vq._codebook.embed
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(**BATCH, return_loss=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(codes, STATE["visual_transformer.vq._codebook.embed"])
    assert not torch.equal(model.to_visual_latent.weight, STATE["to_visual_latent.weight"])


def test_the_silent_trap_nothing_below_the_quantiser_learns_in_evaluation_mode():
    model = small_model().eval()
    model(**BATCH, return_loss=True).loss.backward()
    vision = [p.grad for p in model.visual_transformer.parameters()]
    assert all(gradient is None or not gradient.any() for gradient in vision)
    assert model.text_transformer.encoder.layer[0].attention.self.query.weight.grad.any()
    assert model.to_visual_latent.weight.grad.any()  # above the quantiser


def test_training_mode_reaches_every_live_parameter():
    model = small_model().train()
    model(**BATCH, return_loss=True).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a key bias shifts all scores of a query alike, which the softmax does not see; rounding may still leave a trace
    assert all(name.endswith("key.bias") for name in silent), silent


def test_gradient_passes_straight_through_the_quantiser(model):
    quantiser = copy.deepcopy(model.visual_transformer.vq).train()
    x = torch.randn(2, 3, 64, requires_grad=True)
    upstream = torch.randn(2, 3, 64)
    y = quantiser(x)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream)
    torch.testing.assert_close(y, quantiser.eval()(x))
    assert not quantiser(x).requires_grad


# --- blocks -------------------------------------------------------------------------------------


def test_position_convolution_is_causal_in_depth_and_keeps_the_shape(model):
    convolution = model.visual_transformer.enc_spatial_transformer.layers[0]["0"]
    x = torch.randn(2, 5, 4, 3, 64)
    changed = x.clone()
    changed[:, 3] += 1.0
    difference = (convolution(changed) - convolution(x)).abs().amax(dim=(0, 2, 3, 4))
    assert difference.shape == (5,)
    assert not difference[:3].any() and difference[3:].all()


# --- the model ----------------------------------------------------------------------------------


def test_outputs_loss_and_similarity(model):
    with torch.no_grad():
        out = model(**BATCH, return_loss=True)
        logits = out.image_embeds @ out.text_embeds.T * model.temperature.exp()
    torch.testing.assert_close(out.logits_per_image, logits)
    assert torch.equal(out.logits_per_text, out.logits_per_image.T)
    for embeds in (out.image_embeds, out.text_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))
    fewer = model(BATCH["pixel_values"][:2], BATCH["input_ids"], BATCH["attention_mask"])
    assert fewer.loss is None and fewer.logits_per_image.shape == (2, 3)
    with pytest.raises(ValueError, match="one to one, got 2 volumes and 3 texts"):
        model(BATCH["pixel_values"][:2], BATCH["input_ids"], return_loss=True)


def test_text_padding_does_not_change_an_embedding(model):
    ids = torch.tensor([[2, 17, 40, 3]])
    padded, mask = F.pad(ids, (0, 9)), F.pad(torch.ones_like(ids), (0, 9))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(padded, mask), model.encode_text(ids))


@pytest.mark.parametrize(
    ("volumes", "message"),
    [
        (torch.zeros(2, 16, 48, 32), r"shape \(2, 16, 48, 32\); this model expects \(batch, 1, 16, 48, 32\)"),
        (torch.zeros(1, 1, 16, 32, 48), r"shape \(1, 1, 16, 32, 48\).*\(batch, 1, 16, 48, 32\)"),
        (torch.zeros(1, 3, 16, 48, 32), "shape"),
        (torch.zeros(0, 1, 16, 48, 32), "shape"),
        (torch.zeros(1, 1, 16, 48, 32, dtype=torch.int16), r"int16; expected floating point in \[-1, 1\]"),
    ],
)
def test_volumes_of_another_shape_are_refused(model, volumes, message):
    with pytest.raises(ValueError, match=message):
        model.encode_image(volumes)


def test_texts_of_another_shape_are_refused(model):
    for ids, mask, message in (
        ((1, 65), None, r"shape \(1, 65\); .* at most 64: .*truncation=True, max_length=64"),
        ((5,), None, r"shape \(5,\); expected \(batch, n\)"),
        ((1, 5), torch.ones(1, 4), r"attention_mask has shape \(1, 4\); expected \(1, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode_text(torch.ones(ids, dtype=torch.long), mask)


def test_a_fresh_model_starts_sensibly_and_can_learn():
    torch.manual_seed(0)
    model = CTCLIPModel(small_config()).train()
    codes = model.visual_transformer.vq._codebook.embed
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(1, 96))
    assert model.temperature.item() == 1.0
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        losses.append(model(**BATCH, return_loss=True).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0].item() == pytest.approx(math.log(3), abs=0.5)
    assert losses[-1] < 0.7 * losses[0]


def test_saved_and_loaded_model_is_the_same_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = CTCLIPModel.from_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not again.training
    assert again.config.vision_config == model.config.vision_config
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        assert torch.equal(again(**BATCH).logits_per_image, model(**BATCH).logits_per_image)


# --- configuration ------------------------------------------------------------------------------


def test_default_configuration_has_the_released_sizes():
    config = CTCLIPConfig()
    assert config.volume_shape == (240, 480, 480) and config.grid == (24, 24, 24)
    assert config.projection_dim == 512 and config.text_config["vocab_size"] == 30522
    assert CTCLIPConfig({"image_size": [40, 60]}).grid == (24, 2, 3)


def test_configuration_survives_the_disk(tmp_path):
    config = small_config({"image_size": (48, 32)}, {"layer_norm_eps": 1e-6})
    config.save_pretrained(tmp_path)
    again = CTCLIPConfig.from_pretrained(tmp_path)
    assert again.vision_config == config.vision_config and again.text_config == config.text_config
    assert again.projection_dim == 32 and again.volume_shape == (16, 48, 32)
    assert again.get_text_config().layer_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({"image_size": 50}, None, "image_size 50 must be a multiple of patch_size 20"),
        ({"image_size": [480, 490]}, None, "image_size 490 must be a multiple of patch_size 20"),
        ({"image_size": [0, 480]}, None, "image_size.* 1 to 1,000,000, got 0"),
        ({"image_size": [1, 2, 3]}, None, r"image_size.* int or \[h, w\], got \[1, 2, 3\]"),
        ({"num_frames": 241}, None, "num_frames 241 must be a multiple of temporal_patch_size 10"),
        ({"dim": 0}, None, "vision_config 'dim' must be a whole number of 1 to 1,000,000, got 0"),
        ({"heads": 2.5}, None, "'heads' must be a whole number of 1 to 1,000,000, got 2.5"),
        ({"windows": [[40, -160]]}, None, r"'windows' must be pairs of HU, the lower end first, got \[40, -160\]"),
        ({"windows": [[0, 1], [1, 2, 3]]}, None, r"pairs of HU, the lower end first, got \[1, 2, 3\]"),
        ({"windows": 5}, None, "pairs of HU, the lower end first, got 5"),
        ({"windows": "lung"}, None, "pairs of HU, the lower end first, got 'lung'"),
        ({"windows": [["a", "b"]]}, None, r"pairs of HU, the lower end first, got \[\['a', 'b'\]\]"),
        ({"depth": 4}, None, "unknown vision_config key 'depth'; expected dim, codebook_size"),
        ([4], None, "vision_config must be a dict, got list"),
        (None, {"hiden_size": 4}, "unknown text_config key 'hiden_size'; expected fields of BertConfig"),
        (None, {"hidden_size": 100}, "hidden_size 100 must be a multiple of num_attention_heads 12"),
        ({"spatial_depth": 10**9}, None, "'spatial_depth' must be a whole number of 1 to 1,000, got 1000000000"),
        (None, {"num_hidden_layers": -1}, "text_config 'num_hidden_layers' must be .* got -1"),
    ],
)
def test_impossible_configurations_are_refused(vision, text, message):
    with pytest.raises(ValueError, match=message):
        CTCLIPConfig(vision, text)
    with pytest.raises(ValueError, match="projection_dim must be .* got '512'"):
        CTCLIPConfig(projection_dim="512")


@pytest.mark.parametrize("spacing", ["1.5", 5, [1, 2], [0, 1, 1], [1, None, 1], []])
def test_a_configuration_with_another_spacing_than_three_lengths_is_refused(spacing):
    with pytest.raises(ValueError, match="spacing .*: expected three positive lengths in mm"):
        CTCLIPConfig(spacing=spacing)


# --- the released layout and its loader ---------------------------------------------------------


def test_layout_equals_the_state_dict_of_the_public_implementation():
    layout = released_layout(small_config())
    # empty, or from older checkpoints only
    extra = {n for n in layout if n.endswith(("null_kv", "position_ids"))}
    assert {name: entry.shape for name, entry in layout.items() if name not in extra} == {
        name: tuple(tensor.shape) for name, tensor in STATE.items()
    }


def test_layout_at_full_size_counts_what_the_released_checkpoint_holds():
    layout = released_layout()

    def count(kind, live=(True, False), prefix=""):
        entries = [e for n, e in layout.items() if n.startswith(prefix) and e.kind == kind and e.live in live]
        return sum(math.prod(e.shape) for e in entries)

    assert count("parameter") == 438_148_761
    assert count("parameter", [False]) == 154_447_184
    assert count("parameter", [False], "visual_transformer.to_pixels") == 2_052_000 + 205_200
    assert count("parameter", [False], "visual_transformer.to_patch_emb_first_frame.") == 207_136
    assert count("buffer", prefix="visual_transformer.vq.") == 4_202_497
    assert layout["visual_transformer.enc_spatial_transformer.layers.3.3.1.weight"].shape == (2730, 512)
    assert layout["to_visual_latent.weight"].shape == (512, 294912)


def test_checkpoint_loads_from_file_or_state_dict_alike(model, tmp_path):
    save_file(STATE, tmp_path / "small.safetensors")
    state = STATE | {"text_transformer.embeddings.position_ids": torch.arange(64)[None]}
    torch.save(state, tmp_path / "small.pt")
    layout = released_layout(small_config())
    live = {name: tensor for name, tensor in STATE.items() if layout[name].live}  # the others may be left out
    assert len(live) < len(STATE)
    for source in (tmp_path / "small.safetensors", str(tmp_path / "small.pt"), state, live):
        again = CTCLIPModel.from_released_checkpoint(source, small_config())
        assert not again.training and not any("extra" in name for name in again.state_dict())
        with torch.no_grad():
            assert torch.equal(again(**BATCH).logits_per_image, model(**BATCH).logits_per_image)


def test_loaded_model_owns_its_weights_in_float32():
    state = {name: tensor.half() for name, tensor in STATE.items()}
    before = state["temperature"].clone()
    model = CTCLIPModel.from_released_checkpoint(state, small_config())
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    same = CTCLIPModel.from_released_checkpoint(STATE, small_config())
    with torch.no_grad():
        same.temperature += 1.0
    assert torch.equal(state["temperature"], before) and STATE["temperature"].item() != same.temperature.item()


def test_in_windows_an_even_patch_shows_its_density_which_the_norm_hides_without_them():
    lung, liver = (torch.full((1, 1, *small_config().volume_shape), hu / 1000) for hu in (-850, 60))

    def apart(windows):
        torch.manual_seed(0)
        tower = CTCLIPModel(small_config({"windows": windows})).eval().visual_transformer
        with torch.no_grad():
            return (tower.embed_patches(lung) - tower.embed_patches(liver)).abs().max(), tower

    assert apart(None)[0] < 1e-3
    difference, tower = apart([[-1000, 1000], [-160, 240]])
    assert difference > 0.1
    seen = tower.to_patch_emb[0].look(torch.tensor([-1.0, -0.16, 0.04, 0.24, 1.0]).reshape(1, 1, 5, 1, 1))
    assert torch.allclose(seen[0, :, :, 0, 0], torch.tensor([[-1, -0.16, 0.04, 0.24, 1], [-1, -1, 0, 1, 1]]))


def test_one_refusal_lists_missing_unexpected_and_misshapen():
    state = dict(STATE) | {"classifier.weight": torch.zeros(18, 32), "to_text_latent.weight": torch.zeros(32, 50)}
    del state["temperature"]
    with pytest.raises(ValueError, match="pass the config it was made with") as caught:
        CTCLIPModel.from_released_checkpoint(state, small_config())
    assert sorted(str(caught.value).splitlines()[1:]) == [
        "  classifier.weight: saved (18, 32), model none",
        "  temperature: saved none, model ()",
        "  to_text_latent.weight: saved (32, 50), model (32, 48)",
    ]


def test_other_architectures_are_refused_with_a_readable_list(model):
    with pytest.raises(ValueError, match=r"weight: saved \(48,\), model \(768,\)(.|\n)*and \d+ more") as caught:
        CTCLIPModel.from_released_checkpoint(STATE)  # a small model where the released sizes are expected
    assert len(str(caught.value).splitlines()) < 10


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("payload-was-run"),))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_refused(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at .*weights{suffix}"):
        CTCLIPModel.from_released_checkpoint(path)
    save = torch.save if suffix == ".pt" else save_file
    save(STATE, path)
    whole = path.read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2], pickle.dumps(Payload())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"weights{suffix} cannot be read as a checkpoint: .*download it again"):
            CTCLIPModel.from_released_checkpoint(path, small_config())
    assert not (tmp_path / "payload-was-run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": [1], "epoch": 3}, "holds a dict with keys 'model', 'epoch'; expected a state dict"),
        (torch.zeros(3), "holds a Tensor; expected a state dict"),
        ({"state": Payload()}, "cannot be read as a checkpoint: it holds pickled Python code"),
    ],
)
def test_files_that_hold_something_else_are_refused_and_no_code_is_run(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "other.pt")
    with pytest.raises(ValueError, match=f"other.pt {message}") as caught:
        CTCLIPModel.from_released_checkpoint("other.pt")
    assert "weights_only" not in str(caught.value)  # no advice to switch the protection off
    assert not Path("payload-was-run").exists()
