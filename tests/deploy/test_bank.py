"""Adapters of several hospitals on one base: each volume through its own, and nothing left behind."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import AutoPeftModel, PeftModel
from tiny import PROMPTS, randomise_adapter, tiny_batch, tiny_ct_clip, tiny_model, tiny_tokenizer

from medctkit.deploy.bank import BASE, AdapterBank
from medctkit.lora.adapter import add_lora, load_adapter, save_adapter
from medctkit.lora.methods import apply_method, save_trained
from medctkit.model.base_model import load_mini_base
from medctkit.zero_shot.classifier import ZeroShotClassifier

NAMES = ("north", "south")


def hooks_on(model):
    return [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = randomise_adapter(add_lora(load_mini_base().model, "paper", r=4), 0.1, seed)
        found[name] = save_adapter(model, tmp_path_factory.mktemp(name))
    return found


@pytest.fixture(scope="module")
def volumes():
    shape = load_mini_base().preprocess_config.shape
    return torch.randn(4, 1, *shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@pytest.fixture(scope="module")
def bank(folders):
    """One that no test changes."""
    return AdapterBank(load_mini_base(), folders)


def test_a_mixed_batch_is_each_volume_with_its_own_adapter(bank, folders, volumes):
    names = ["south", BASE, "north", "south"]
    scores, slow = bank.scores(volumes, names), []
    for name, volume in zip(names, volumes, strict=True):
        alone = load_mini_base()
        model = alone.model if name == BASE else load_adapter(alone.model, folders[name])
        slow.append(ZeroShotClassifier(model, alone.tokenizer).scores(volume[None]))
    np.testing.assert_allclose(scores, np.concatenate(slow), atol=1e-5)
    assert np.abs(scores - bank.scores(volumes, [BASE] * 4)).max() > 0.01  # adapters do something


def test_no_hook_stays_whatever_happens(bank, volumes, monkeypatch):
    monkeypatch.setattr(type(bank.model.get_base_model()), "encode_image", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bank.embed(volumes, ["north"] * 4)
    assert not any(hooks_on(bank.model.get_base_model()))


def test_names_are_checked(bank, folders, volumes):
    with pytest.raises(ValueError, match="4 volumes and 1 names"):
        bank.scores(volumes, ["north"])
    with pytest.raises(ValueError, match="no adapter 'west'; the bank has north, south"):
        bank.scores(volumes, ["north", "west", "north", "north"])
    for wrong in ({}, {BASE: folders["north"]}):
        with pytest.raises(ValueError, match="expected names other than"):
            AdapterBank(load_mini_base(), wrong)


def test_values_in_hu_are_refused_as_without_a_bank(bank, volumes):
    with pytest.raises(ValueError, match="expected -1 to 1"):
        bank.scores(1000 * volumes, ["north"] * 4)


def tiny_bank(folder, methods):
    """A bank of tiny adapters, each of a method and its settings, and a batch."""
    folders = {}
    for seed, (name, (method, settings)) in enumerate(methods.items()):
        model = apply_method(tiny_ct_clip(), method, **settings)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
        folders[name] = save_trained(model, folder / name)
    bank = AdapterBank(SimpleNamespace(model=tiny_ct_clip().eval(), tokenizer=tiny_tokenizer()), folders, PROMPTS)
    return bank, tiny_batch(bank.model)["pixel_values"], folders


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *((method, {}) for method in ("dora", "vera", "ia3", "oft")),
        *(("lora", {"bias": bias}) for bias in ("all", "lora_only")),
        ("lora", {"modules_to_save": ["to_text_latent"]}),
    ],
)
def test_what_a_batch_cannot_mix_is_told_at_once(tmp_path, method, settings):
    with pytest.raises(ValueError, match="cannot be mixed with others in a batch"):
        tiny_bank(tmp_path, {"odd": (method, settings), "plain": ("lora", {})})


def test_whole_modules_are_mixed_too_and_threads_do_not_mix_them_up(tmp_path):
    whole = {"r": 2, "modules_to_save": ["to_visual_latent", "to_text_latent"]}
    bank, volumes, folders = tiny_bank(tmp_path, {"one": ("lora", whole), "two": ("lora", whole)})
    alone = {BASE: ZeroShotClassifier(tiny_ct_clip(), tiny_tokenizer(), PROMPTS).scores(volumes)}
    for name, folder in folders.items():
        model = load_adapter(tiny_ct_clip(), folder)
        alone[name] = ZeroShotClassifier(model, tiny_tokenizer(), PROMPTS).scores(volumes)
    mixed = bank.scores(volumes, ["two", BASE, "one"])
    np.testing.assert_allclose(mixed, [alone["two"][0], alone[BASE][1], alone["one"][2]], atol=1e-6)
    names = ["one", "two"] * 10
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda name: bank.scores(volumes, [name] * 3), names))
    for name, scores in zip(names, found, strict=True):
        np.testing.assert_allclose(scores, alone[name], atol=1e-6)


def test_what_peft_would_choke_on_is_told_before(folders):
    for name in ("st.mary", ""):
        with pytest.raises(ValueError, match="of letters, digits, _ and -"):
            AdapterBank(load_mini_base(), {name: folders["north"]})
    bank = AdapterBank(load_mini_base(), folders)
    both = dict.fromkeys(NAMES, 0.5)
    for name, weights, how in (
        ("a.b", both, "svd"),
        ("new", {"north": 1.0}, "nonsense"),
        ("new", both | {"north": float("nan")}, "cat"),
    ):
        with pytest.raises(ValueError, match="expected"):
            bank.combine(name, weights, how)
    bank.combine("new", both, "cat")
    assert bank.names == (*NAMES, "new"), "the name is free still"


def updates(model, name):
    return {key: m.get_delta_weight(name) for key, m in model.named_modules() if hasattr(m, "lora_A")}


def test_adapters_add_up_and_what_comes_out_is_an_adapter_like_others(folders, volumes, tmp_path):
    bank = AdapterBank(load_mini_base(), folders)
    north, south = (updates(bank.model, name) for name in NAMES)
    off, state = {}, torch.get_rng_state()
    for how in ("cat", "svd", "linear", "ties", "dare_linear", "dare_ties_svd"):
        bank.combine(how, {"north": 0.7, "south": -0.4}, how)
        found = updates(bank.model, how)
        off[how] = max((found[key] - (0.7 * north[key] - 0.4 * south[key])).norm() / found[key].norm() for key in found)
    assert off["cat"] < 1e-5 < off["svd"] < min(off[how] for how in ("linear", "ties", "dare_linear"))
    assert not any(p.requires_grad for p in bank.model.parameters()) and torch.equal(state, torch.get_rng_state())
    mixed = bank.scores(volumes, ["cat", "north", "svd", BASE])
    save_adapter(bank.model, tmp_path, "cat")
    again = AdapterBank(load_mini_base(), {"both": tmp_path})
    np.testing.assert_allclose(again.scores(volumes[:1], ["both"]), mixed[:1], atol=1e-6)


def test_only_plain_loras_of_known_names_add_up(tmp_path, folders):
    torch.manual_seed(0)
    scaled = save_adapter(add_lora(load_mini_base().model, "paper", r=4, use_rslora=True), tmp_path)
    bank = AdapterBank(load_mini_base(), folders | {"scaled": scaled})
    for name, weights in {"north": {"south": 1.0}, "new": {"west": 1.0}, "empty": {}, BASE: {"north": 1.0}}.items():
        with pytest.raises(ValueError, match="expected a new name, of north, south, scaled"):
            bank.combine(name, weights)
    with pytest.raises(ValueError, match="'scaled' is no plain LoRA"):
        bank.combine("new", {"north": 0.5, "scaled": 0.5})
    assert bank.names == ("north", "south", "scaled")


def test_prompts_are_encoded_again_once_an_adapter_has_changed(folders, volumes):
    bank = AdapterBank(load_mini_base(), folders)
    before = bank.scores(volumes[:1], ["north"])
    with torch.no_grad():
        for key, parameter in bank.model.named_parameters():
            if "text_transformer" in key and ".lora_B.north." in key:
                parameter.mul_(2)
    assert np.abs(bank.scores(volumes[:1], ["north"]) - before).max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
def test_pefts_own_ways_behave_or_say_why_not(folders, volumes):
    """Loading on a base model gives the same; `adapter_names` and AutoPeftModel can not, and say what does."""
    pefts = PeftModel.from_pretrained(load_mini_base().model, folders["north"]).eval()
    own = load_adapter(load_mini_base().model, folders["north"])
    with torch.no_grad():
        assert torch.equal(pefts.encode_image(volumes[:1]), own.encode_image(volumes[:1]))
    model = tiny_model().eval()
    with pytest.raises(ValueError, match="one name for each volume.*AdapterBank"):
        model(**tiny_batch(model), adapter_names=["default"] * 3)
    assert not hooks_on(model.get_base_model())
    with pytest.raises(ValueError, match="import_allowlist=.'medctkit.model.ct_clip'"):
        AutoPeftModel.from_pretrained(folders["north"])
    with pytest.raises(ValueError, match="sha256:.*not where it is.*load_adapter"):
        AutoPeftModel.from_pretrained(folders["north"], import_allowlist=["medctkit"])
