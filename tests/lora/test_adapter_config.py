"""An adapter's folder comes from others: it runs no code, hangs nothing, and says what is wrong with it."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter import tiny_model
from tiny import randomise_adapter, tiny_batch

from medctkit.lora.adapter import add_lora, load_adapter, merge_lora, save_adapter
from medctkit.lora.methods import apply_method, load_trained, save_trained


@pytest.fixture
def folder(tmp_path):
    """A LoRA as it is saved."""
    return save_adapter(add_lora(tiny_model(), "paper", r=2), tmp_path / "adapter")


def changed(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", ["megatron", "payloads"])
def test_no_module_of_the_folder_is_imported(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    save_adapter(add_lora(tiny_model(), "paper", r=2), name)
    (tmp_path / name / "payload.py").write_text("open('was-run', 'w').close()")
    changed(tmp_path / name, megatron_config={"x": 1}, megatron_core=f"{name}.payload")
    with pytest.raises(
        ValueError, match=r"adapter_config.json: megatron_c\w+ is .*, a field that the kit does not load"
    ):
        load_adapter(tiny_model(), name)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": None}, "peft_type is None, expected one of LORA, VERA, IA3"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
        ({"peft_type": "BONE"}, "peft_type is 'BONE'"),
        ({"r": 0}, "r is 0, expected a whole number of 1 to 65,536"),
        ({"r": True}, "r is True"),
        ({"r": "2"}, "r is '2'"),
        ({"r": 10**30}, "r is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": [4]}, r"lora_alpha is \[4\]"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"use_dora": "yes"}, "use_dora is 'yes', expected true or false"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model too"),
        ({"init_lora_weights": {"x": 1}}, "init_lora_weights is"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": 3}, "target_modules is 3, expected a list of plain names, or a pattern"),
        ({"target_modules": ["to_q", 3]}, "target_modules is"),
        ({"target_modules": ["(a+)+"]}, "target_modules is"),
        ({"target_modules": "(to_q"}, "target_modules is no usable pattern"),
        ({"target_modules": "to_v"}, "matches no module of CTCLIPModel"),
        ({"target_modules": ["to_v"]}, "peft cannot make this adapter for this model"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern is"),
        ({"rank_pattern": {"to_q": 0.5}}, "rank_pattern is"),
        ({"modules_to_save": "text"}, "modules_to_save is 'text'"),
        ({"loftq_config": {"bits": 4}}, "loftq_config is .*, a field that the kit does not load"),
        ({"auto_mapping": 3, "new_in_peft": [1]}, "new_in_peft is"),
        ({"bias": "al"}, "bias is 'al', expected none, all or lora_only"),
        ({"layers_to_transform": [1]}, "`layers_to_transform` cannot be used when"),
    ],
)
def test_a_configuration_that_is_not_plain_is_refused(folder, fields, message):
    changed(folder, **fields)
    model = tiny_model()
    with pytest.raises(ValueError, match=rf"(?s)adapter.*{message}"):
        load_adapter(model, folder)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_what_was_switched_off_is_not_taken_for_the_usual(tmp_path):
    folder = save_adapter(apply_method(tiny_model(), "oft", r=2), tmp_path)
    changed(folder, use_cayley_neumann=False)
    with pytest.raises(ValueError, match="use_cayley_neumann is False, a field that the kit does not load"):
        load_adapter(tiny_model(), folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"r": 1' + b" " * 2**20])
def test_a_file_that_is_no_configuration_is_refused(folder, content):
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"adapter_config.json: (not the configuration of an adapter|peft_type is None)"
    ):
        load_adapter(tiny_model(), folder)


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!", "(.*.*)*!", "(a|a)*" * 30 + "!"])
def test_a_pattern_does_not_hang(folder, pattern):
    changed(folder, target_modules=pattern)
    started = time.perf_counter()
    with pytest.raises(ValueError, match="target_modules is no usable pattern .*timed out|matches no module"):
        load_adapter(tiny_model(), folder)
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.to(torch.int8), "is int8"),
        (lambda t: t * 1j, "is complex64"),
        (lambda t: t / 0, "not finite"),
        (lambda t: t[:1], r"made for another architecture.*saved \(1,"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "vera", "bitfit"])
def test_weights_are_held_to_the_same_as_a_model(tmp_path, spoil, message, method):
    save_trained(apply_method(tiny_model(), method), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if len(tensor) > 1)
    save_file(tensors | {name: spoil(tensors[name] + 1).contiguous()}, file)
    with pytest.raises(ValueError, match=rf"(?s){tmp_path.name}.*{message}"):
        load_trained(tiny_model(), tmp_path)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{file.name} cannot be read"):
        load_trained(tiny_model(), tmp_path)


def test_every_linear_layer_may_be_named_by_a_word_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = randomise_adapter(add_lora(tiny_model(), target_modules="all-linear", r=2).eval())
    batch = tiny_batch(model)
    save_adapter(model, "~/adapter")
    loaded = load_adapter(tiny_model(), "~/adapter")
    assert torch.equal(loaded(**batch).logits_per_image, model(**batch).logits_per_image)
    torch.testing.assert_close(merge_lora(model)(**batch).logits_per_image, model(**batch).logits_per_image)
    linear = [n for n, m in tiny_model().named_modules() if isinstance(m, torch.nn.Linear)]
    adapted = {
        n.split(".lora_A")[0].removeprefix("base_model.model.") for n, _ in model.named_modules() if "lora_A.d" in n
    }
    assert adapted == set(linear)
