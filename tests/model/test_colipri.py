"""COLIPRI behind the protocol, with its library's own classes at small sizes and random weights; `make test-open`."""

import copy
import itertools
import json
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_ct_clip, tiny_data

from medctkit.attention.localisation import Regions, sanity_check
from medctkit.attention.maps import attend, patch_map, relevance, relevance_maps
from medctkit.findings import FINDINGS
from medctkit.lora.adapter import add_lora, load_adapter, merge_lora, save_adapter
from medctkit.lora.counting import parameter_table
from medctkit.metrics.scores import evaluate
from medctkit.model import colipri as kit
from medctkit.model.base_model import load_base, preprocess_config_of
from medctkit.phantom import generate
from medctkit.scans.preprocessing import model_affine, preprocess
from medctkit.scans.volumes import CTVolume
from medctkit.training.loop import finetune
from medctkit.training.settings import FineTuneConfig
from medctkit.zero_shot.classifier import ZeroShotClassifier, validation_score

pytestmark = [
    pytest.mark.open,
    pytest.mark.skipif(find_spec("colipri") is None, reason="COLIPRI's packages are not here: make test-open"),
    pytest.mark.usefixtures("on_the_cpu"),
]
if find_spec("colipri"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm's
        import torchio as tio
        from colipri import checkpoint, get_model, get_processor
        from colipri.model.multimodal import Model

SIZE, WIDTH = 24, 24
SMALL = [f"input_size={SIZE}", "image_embed_dim=48", f"projection_dim={WIDTH}"]
SMALL += ["model.image_encoder.backbone.eva_depth=2", "model.image_encoder.backbone.eva_numheads=2"]
TEXT = {"vocab_size": 100, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 40, "max_position_embeddings": 32}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] . is not present".split()
WORDS += sorted({word for finding in FINDINGS for word in finding.lower().replace("/", " / ").split()})


@pytest.fixture
def small(monkeypatch):
    """The library's and BERT's sizes."""
    monkeypatch.setattr(kit, "RELEASED_TEXT", kit.RELEASED_TEXT | TEXT)
    monkeypatch.setattr(kit, "INPUT", replace(kit.INPUT, shape=(SIZE, SIZE, SIZE)))
    for name in ("load_model_config", "load_processor_config"):
        monkeypatch.setattr(checkpoint, name, partial(getattr(checkpoint, name), overrides=SMALL))


@pytest.fixture
def own(small):
    """The library's own model, its text tower a BertModel as remote code would make it."""
    torch.manual_seed(0)
    towers = kit.build(checkpoint.load_model_config())
    for name, x in towers.named_parameters():
        torch.nn.init.normal_(x, std=0.1) if name.endswith((".weight", ".bias")) else None
    return Model(towers.image_encoder, towers.text_encoder, temperature=0.07).eval()


@pytest.fixture
def hub(own, tmp_path, monkeypatch):
    """Both repositories as they lie in the hub's cache, with code that leaves a mark when it runs."""
    from huggingface_hub import constants

    cache, mark, words = tmp_path / "hub", tmp_path / "it-ran", checkpoint.load_model_config().text_encoder.backbone
    for repository, commit in (("microsoft/colipri", "c0"), (words.pretrained_model_name_or_path, words.revision)):
        folder = cache / f"models--{repository.replace('/', '--')}"
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    own.save_weights(cache / "models--microsoft--colipri/snapshots/c0/model.safetensors")
    at = folder / "snapshots" / commit
    (at / "vocab.txt").write_text("\n".join(WORDS))
    (at / "special_tokens_map.json").write_text("{}")
    code = {"AutoConfig": "planted.Config", "AutoModel": "planted.Model", "AutoTokenizer": ["planted.Tokenizer", None]}
    for name in ("config.json", "tokenizer_config.json"):
        (at / name).write_text(json.dumps({"model_type": "cxr-bert", "do_lower_case": True, "auto_map": code}))
    (at / "planted.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return cache, mark


@pytest.fixture
def base(hub):
    return load_base("colipri")


@pytest.fixture
def volumes():
    noise = torch.rand(3, 1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) - 0.5
    return noise + torch.tensor([-0.5, 0.0, 0.5]).view(3, 1, 1, 1, 1)


def data(n=6):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(n, 1, SIZE, SIZE, SIZE, generator=generator) * 2 - 1
    items = zip(tiny_data(n), pixels, strict=True)
    return [item | {"pixel_values": x, "report": "nodule is present"} for item, x in items]


# --- the same as the library ---------------------------------------------------------------------


def test_it_computes_what_the_library_computes(base, own, volumes):
    image = base.model.encode_image(volumes)
    assert torch.equal(image, own.encode_image(volumes, pool=True, project=True, normalize=True))
    pair = ["Lung nodule is present.", "Lung nodule is not present."]
    words = base.tokenizer(pair, padding=True, return_tensors="pt")
    assert base.tokenizer.unk_token_id not in words["input_ids"] and not words["attention_mask"].all()
    text = base.model.encode_text(words["input_ids"], words["attention_mask"])
    assert torch.equal(text, own.encode_text(words["input_ids"], words["attention_mask"]))
    scores = ZeroShotClassifier(base.model, base.tokenizer).scores(volumes)[:, FINDINGS.index("Lung nodule")]
    np.testing.assert_allclose(scores, own.classify(image, text)[:, 0].detach(), rtol=1e-5)
    assert len(set(scores.tolist())) == 3


def test_its_input_is_the_librarys():
    steps = checkpoint.load_processor_config()["image_transform"]["transforms"]
    found, low_high = preprocess_config_of("colipri"), tuple(steps["rescale_intensity"]["in_min_max"])
    assert (set(found.spacing), found.shape) == (
        {steps["resample"]["target"]},
        tuple(steps["crop_or_pad"]["target_shape"]),
    )
    assert (found.hu_range, found.axes, steps["to_orientation"]["orientation"]) == (low_high, "XYz", "RAS")


@pytest.mark.parametrize(("spacing", "alike"), [((2.0, 2.0, 2.0), 1.0), ((3.0, 1.5, 1.5), 0.98)])
def test_volumes_are_what_the_librarys_processor_makes_of_them(small, spacing, alike):
    volume = CTVolume(generate(3, shape=(40, 48, 52)).volume.hu, spacing, "SPL")
    moved = volume.reoriented("PLS")
    image = tio.ScalarImage(tensor=torch.from_numpy(np.float32(moved.hu))[None], affine=moved.affine)
    (expected,) = get_processor(config=checkpoint.load_processor_config(), image_only=True).process_images(image)
    config = kit.INPUT
    found = preprocess(volume, config)
    assert expected.orientation == ("R", "A", "S") and found.shape == expected.data.shape == (1, SIZE, SIZE, SIZE)
    assert np.corrcoef(found.flatten(), expected.data.flatten())[0, 1] >= alike - 1e-6
    corners = np.array([[0, 0, 0, 1], [SIZE - 1, 0, 5, 1]]).T
    # half a voxel of resampling at most
    np.testing.assert_allclose(model_affine(volume, config) @ corners, expected.affine @ corners, atol=1.01)


# --- loading -------------------------------------------------------------------------------------


def test_no_code_of_the_hub_is_run(hub):
    _, mark = hub
    base = load_base("colipri")
    assert type(base.tokenizer).__module__.startswith("transformers.") and not mark.exists()
    assert type(base.model.text_encoder.backbone).__module__ == "transformers.models.bert.modeling_bert"
    with suppress(Exception):  # it is no model
        get_model(pretrained=False, config=checkpoint.load_model_config())
    assert mark.exists()  # the library's own loader would have run it


def test_what_is_not_there_is_named(hub, monkeypatch):
    cache, _ = hub
    (cache / "models--microsoft--colipri/snapshots/c0/model.safetensors").unlink()
    with pytest.raises(OSError, match="could not be downloaded .* 1 GB, .* needs no account"):
        load_base("colipri")
    monkeypatch.setitem(sys.modules, "colipri", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'medctkit\[open\]'"):
        load_base("colipri")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("image_encoder.projector.bias"), r"(?s)not hold .*projector.bias: saved none, model \(24,\)"),
        (lambda x: x.update(extra=torch.ones(2)), r"(?s)not hold .*extra: saved \(2,\), model none"),
        (lambda x: x.pop("softmax_temperature"), "softmax_temperature: saved none"),
        (lambda x: x["image_encoder.projector.bias"].fill_(torch.nan), "projector.bias has values that are not finite"),
    ],
)
def test_other_weights_are_refused(hub, change, message):
    file = hub[0] / "models--microsoft--colipri/snapshots/c0/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        load_base("colipri")


def test_what_does_not_fit_is_refused(base):
    with pytest.raises(
        ValueError, match=r"volumes have shape \(1, 1, 8, 24, 24\); this model expects \(batch, 1, 24, 24, 24"
    ):
        base.model.encode_image(torch.zeros(1, 1, 8, SIZE, SIZE))
    with pytest.raises(ValueError, match=r"shape \(1, 40\); expected \(batch, n\) with n of at most 32"):
        base.model.encode_text(torch.ones(1, 40, dtype=torch.long))


# --- LoRA ----------------------------------------------------------------------------------------


def test_parameters_at_full_size():
    """Counted by hand: r (in + out) for each linear layer."""
    vision, text = 16 * 24, 12 * 24
    mlp = {"vision": vision * 3 * (864 + 2304), "text": text * 2 * (768 + 3072)}
    expected = {
        "paper": vision * 3 * 1728 + text * 3 * 1536,
        "vision": vision * 3 * 1728,
        "text": text * 3 * 1536,
        "all-attention": vision * 4 * 1728 + text * 4 * 1536,
        "mlp": sum(mlp.values()),
        "all-linear": vision * 4 * 1728 + text * 4 * 1536 + sum(mlp.values()),
    }
    found = {}
    with torch.device("meta"):
        plain = kit.build(checkpoint.load_model_config())
    for preset in expected:
        with torch.device("meta"):
            model = add_lora(copy.deepcopy(plain), preset, r=24)
        table = parameter_table(model).set_index("component")
        found[preset] = table.loc["sum", "trainable"]
    assert found == expected and set(model.parts.presets) == set(expected)
    totals = {"temperature": 1, "image_encoder": 147_112_224, "text_encoder": 111_254_016, "sum": 258_366_241}
    assert table["total"].to_dict() == totals


def test_both_towers_learn_and_the_adapter_comes_back(base, hub, volumes, tmp_path):
    plain = copy.deepcopy(base.model)
    model = add_lora(base.model, "all-linear", r=2)
    model.gradient_checkpointing_enable()
    studies, words, later = data(), base.tokenizer, itertools.count()
    score = validation_score(studies, words)
    config = FineTuneConfig(steps=2, batch_size=4, micro_batch_size=2, learning_rate=1e-2, evaluate_every=1)
    result = finetune(model, studies, words, config, tmp_path / "run", lambda model: score(model) + next(later))
    assert result.best_step == 2
    moved = {name for name, p in model.named_parameters() if "lora_B" in name and p.any()}
    assert {name.split(".lora_B")[0].split(".")[-1] for name in moved} >= {"q_proj", "fc2", "query", "dense"}
    scores = ZeroShotClassifier(model, base.tokenizer).scores(volumes)
    assert not np.allclose(scores, ZeroShotClassifier(plain, base.tokenizer).scores(volumes))
    merged = merge_lora(model)
    np.testing.assert_allclose(ZeroShotClassifier(merged, base.tokenizer).scores(volumes), scores, atol=1e-4)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_base("colipri").model, tmp_path / "adapter")
    np.testing.assert_array_equal(ZeroShotClassifier(again, base.tokenizer).scores(volumes), scores)
    with torch.no_grad():
        plain.text_encoder.pooler.attn.in_proj_bias[0] += 1
    with pytest.raises(ValueError, match="trained on a base model with other weights"):
        load_adapter(plain, tmp_path / "adapter")
    with pytest.raises(ValueError, match="matches no module of CTCLIPModel"):
        load_adapter(tiny_ct_clip(), tmp_path / "adapter")
    save_adapter(add_lora(tiny_ct_clip(), r=2), tmp_path / "other")
    with pytest.raises(ValueError, match="matches no module of Colipri"):
        load_adapter(load_base("colipri").model, tmp_path / "other")


def test_layers_computed_again_give_the_same_gradient(base, volumes):
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = add_lora(copy.deepcopy(base.model), "vision", r=2).train()
        if again:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)  # layers are left out at random
        model.encode_image(volumes)[:, 0].sum().backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "lora_B" in name])
    assert gradients[0] and all(map(torch.equal, *gradients))


# --- downstream ----------------------------------------------------------------------------------


def test_studies_are_embedded_and_evaluated(base):
    classifier = ZeroShotClassifier(base.model, base.tokenizer, "ensemble")
    seen = classifier.embed(data(), batch_size=4, progress=False)
    table = evaluate(seen.labels, classifier.scores_from_embeddings(seen.embeddings), seen.patients, resamples=20)
    assert seen.embeddings.shape == (6, base.model.config.projection_dim) and 0 <= table.loc["mean", "auroc"] <= 1


def test_relevance_is_what_each_patch_adds(base, volumes):
    pair = "Lung nodule is present.", "Lung nodule is not present."
    found = relevance(base.model, base.tokenizer, volumes[0], *pair)
    assert found.shape == base.model.config.grid == (3, 3, 3) and (found >= 0).all() and found.sum() == pytest.approx(1)
    kept = []
    handle = base.model.patches.register_forward_hook(lambda module, given, out: kept.append(out))
    image = base.model.encode_image(volumes[:1])
    handle.remove()
    words = base.tokenizer(list(pair), padding=True, return_tensors="pt")
    text = base.model.encode_text(words["input_ids"], words["attention_mask"])
    (gradient,) = torch.autograd.grad((image @ (text[0] - text[1])).sum(), kept)
    expected = (gradient * kept[0]).sum(1)[0].clamp(min=0).detach().numpy()
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-5)
    several = relevance_maps(base.model, volumes, (text[0] - text[1]).detach().expand(3, -1))
    np.testing.assert_allclose(several[0], found, atol=1e-5)
    assert all(p.grad is None for p in base.model.parameters()) and not base.model.training
    regions = Regions(np.arange(2), np.array([0, 5]), np.array(["a", "b"]), np.ones((2, 3, 3, 3), np.float32))
    table = sanity_check(base.model, base.tokenizer, data(2), regions, progress=False)
    assert list(table.index) == ["nothing", "pooling", "+ layers", "+ patches"] and "rollout" not in table
    assert table["relevance"].iloc[0] > 0.999 > table["relevance"].iloc[-1]
    scan = generate(3).volume
    middle = patch_map(found, scan, base.preprocess_config).affine
    assert (np.sign(middle[:3, :3].round(3)) == np.eye(3)).all()  # right, front, head
    with pytest.raises(ValueError, match="maps of attention .* are those of CT-CLIP.*see what speaks .* relevance"):
        attend(base.model, volumes[0])
