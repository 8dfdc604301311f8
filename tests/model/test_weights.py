"""One strictness for every way in: what is loaded are the weights that were saved, or an error says why."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from golden import STATE, small_config
from safetensors.torch import load_file, save_file

from medctkit.model.base_model import FOLDER, load_base, load_mini_base
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel, released_layout
from medctkit.model.weights import write_weights

NAME = "to_visual_latent.weight"
LIVE = {name: STATE[name] for name, entry in released_layout(small_config()).items() if entry.live}


def load(source):
    return CTCLIPModel.from_released_checkpoint(source, small_config())


def same(model, state=LIVE):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def prefixed(prefix):
    return {f"{prefix}{name}": tensor for name, tensor in STATE.items()}


@pytest.fixture
def folder(tmp_path):
    """A model's folder that may be spoiled."""
    shutil.copytree(FOLDER, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.index_fill(1, torch.tensor(3), float("nan")), "has values that are not finite"),
        (lambda t: t.index_fill(1, torch.tensor(3), float("-inf")), "has values that are not finite"),
        (lambda t: t.double() * 1e300, "has values that are not finite"),
        (lambda t: (100 * t).to(torch.int8), "is int8, .*plain tensors of floating point"),
        (lambda t: t > 0, "is bool"),
        (lambda t: t * (1 + 1j), "is complex64"),
        (lambda t: t.to_sparse(), "sparse_coo"),
        (lambda t: t.to("meta"), "on meta"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(spoil, message):
    with pytest.raises(ValueError, match=f"the state dict: {NAME} .*{message}"):
        load(STATE | {NAME: spoil(STATE[NAME])})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != NAME}, f"{NAME}: saved none, model"),
        (lambda t: {k.replace("to_q", "q"): v for k, v in t.items()}, r"layers.0.1.q.weight: saved \(.*, model none"),
        (lambda t: t | {"temperature": torch.zeros(2)}, r"temperature: saved \(2,\), model \(\)"),
        (lambda t: t | {"temperature": torch.tensor(2)}, "temperature is int64"),
        (lambda t: t | {NAME: t[NAME] / 0}, "not finite"),
    ],
)
def test_a_folder_is_held_to_the_same(folder, spoil, message):
    file = folder / "model.safetensors"
    save_file(spoil(load_file(file)), file, {"format": "pt"})
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    for way in (load_base, load_mini_base, CTCLIPModel.from_pretrained):
        with pytest.raises(ValueError, match=message):
            way(folder)


def flipped(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_a_flipped_bit_never_changes_a_weight(tmp_path):
    whole, file, rng, refused = tmp_path / "whole.pt", tmp_path / "flipped.pt", random.Random(0), 0
    torch.save(STATE, whole)
    for _ in range(40):
        shutil.copy(whole, file)
        flipped(file, rng)
        try:
            assert same(load(file))
        except ValueError as error:
            refused += "flipped.pt" in str(error)
    assert refused > 30


def test_what_the_kit_saves_is_known_by_its_sum(tmp_path):
    load(STATE).save_pretrained(tmp_path)
    assert same(CTCLIPModel.from_pretrained(tmp_path))
    flipped(tmp_path / "model.safetensors", random.Random(1))
    with pytest.raises(ValueError, match=r"model.safetensors .*its SHA-256 is \w+, by .*SHA256SUMS it should be"):
        CTCLIPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False), "legacy.pt"),
        (lambda path: torch.save(prefixed("module."), path), "of_several_gpus.pt"),
        (lambda path: torch.save({"model": STATE, "optim": {"state": {}}, "step": 3}, path), "of_a_trainer.pt"),
        (lambda path: torch.save({"state_dict": prefixed("_orig_mod.module.")}, path), "both.bin"),
        (lambda path: torch.save(prefixed("trained_model."), path), "of_a_classifier"),
        (lambda path: save_file(STATE, path), "renamed.pt"),
    ],
)
def test_checkpoints_that_users_have_are_read(tmp_path, write, name):
    write(tmp_path / name)
    assert same(load(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            prefixed("trained_model.") | {"head.bias": torch.zeros(18)},
            r"under 'trained_model.*\nhead.bias\nTo use .* pass",
        ),
        ({"model": STATE, "ema": STATE}, "holds several models: 'model', 'ema'; pass the one you mean"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1750000000\n", "LFS pointer.*git lfs pull"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>Sign in</html>", "a web page: .*access token"),
        (b'{"error": "Access to model is restricted"}', "JSON"),
    ],
)
def test_what_is_something_else_is_called_by_its_name(tmp_path, content, message):
    file = tmp_path / "weights.pt"
    torch.save(content, file) if isinstance(content, dict) else file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)weights.pt .*{message}"):
        load(file)


def test_a_short_memory_is_no_damage(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    torch.save(STATE, tmp_path / "x.pt")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        load(tmp_path / "x.pt")


def test_a_full_disk_is_told_as_such(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        write_weights(STATE, tmp_path / "nowhere" / "x.safetensors", {})


def test_the_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    torch.save(STATE, folder.parent / "x.pt")
    assert same(load("~/x.pt"))
    base = load_base("~/model", "~/model")
    base.model.save_pretrained("~/again")
    assert same(CTCLIPModel.from_pretrained("~/again"), load_mini_base("~/model").model.state_dict())
    assert not Path("~").exists()


def test_a_tokenizer_with_other_words_is_refused(folder, tmp_path):
    assert CTCLIPConfig.from_pretrained(FOLDER).vocabulary, "the shipped model knows its words"
    for name, old, new in (
        ("tokenizer.json", '"lungs"', '"sgnul"'),
        ("tokenizer_config.json", '"do_lower_case": true', '"do_lower_case": false'),
    ):
        other = Path(shutil.copytree(folder, tmp_path / name))
        text = (other / name).read_text()
        assert old in text
        (other / name).write_text(text.replace(old, new))
        for arguments in ((folder, other), (other,)):
            with pytest.raises(
                ValueError, match=r"\d+ words, .*their digest is \w+, .* the tokenizer of another model"
            ):
                load_base(*arguments)
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer in .*cannot be read"):
        load_base(other)
