"""Adapters of several hospitals on one base: each volume through its own, and nothing left behind."""

import numpy as np
import pytest
import torch

from medctkit.deploy.bank import BASE, AdapterBank
from medctkit.lora.adapter import add_lora, load_adapter, save_adapter
from medctkit.model.base_model import load_mini_base
from medctkit.zero_shot.classifier import ZeroShotClassifier

NAMES = ("north", "south")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = add_lora(load_mini_base().model, "paper", r=4)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
        found[name] = save_adapter(model, tmp_path_factory.mktemp(name))
    return found


@pytest.fixture(scope="module")
def volumes():
    shape = load_mini_base().preprocess_config.shape
    return torch.randn(4, 1, *shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def test_a_mixed_batch_is_each_volume_with_its_own_adapter(folders, volumes):
    names = ["south", BASE, "north", "south"]
    bank = AdapterBank(load_mini_base(), folders)
    scores, slow = bank.scores(volumes, names), []
    for name, volume in zip(names, volumes, strict=True):
        alone = load_mini_base()
        model = alone.model if name == BASE else load_adapter(alone.model, folders[name])
        slow.append(ZeroShotClassifier(model, alone.tokenizer).scores(volume[None]))
    np.testing.assert_allclose(scores, np.concatenate(slow), atol=1e-5)
    assert np.abs(scores - bank.scores(volumes, [BASE] * 4)).max() > 0.01  # adapters do something


def test_no_hook_stays_whatever_happens(folders, volumes, monkeypatch):
    bank = AdapterBank(load_mini_base(), folders)
    monkeypatch.setattr(type(bank.model.get_base_model()), "encode_image", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bank.embed(volumes, ["north"] * 4)
    assert not any(module._forward_pre_hooks for module in bank.model.modules())


def test_names_are_checked(folders, volumes):
    bank = AdapterBank(load_mini_base(), folders)
    with pytest.raises(ValueError, match="4 volumes and 1 names"):
        bank.scores(volumes, ["north"])
    with pytest.raises(ValueError, match="no adapter 'west'; the bank has north, south"):
        bank.scores(volumes, ["north", "west", "north", "north"])
    for wrong in ({}, {BASE: folders["north"]}):
        with pytest.raises(ValueError, match="expected names other than"):
            AdapterBank(load_mini_base(), wrong)
