"""Ways to fine-tune a model, from all of its weights to a few thousand numbers, behind one name each.

Every method starts at the base model exactly and leaves the codebook alone; they differ in what may change.
peft makes all adapters; `full` and `bitfit` train tensors of the model itself.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors
import torch
from peft import IA3Config, OFTConfig, VeraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from medctkit.common.atomic import replacing
from medctkit.common.text import listed
from medctkit.lora.adapter import ADAPTER_FILE, add_adapter, add_lora, load_adapter, save_adapter
from medctkit.lora.placement import parts_of, presets_of
from medctkit.model.protocol import Model
from medctkit.model.weights import read_weights, refuse_bad_numbers, refuse_other_shapes, write_weights

TRAINED_FILE = "trained.safetensors"


@dataclass(frozen=True)
class Method:
    """A way to fine-tune; its texts are those of assets/methods.json."""

    label: str  # in tables and figures
    trains: str  # a sentence
    paper: str  # where it comes from
    apply: Callable[..., nn.Module]  # freezes what has to be frozen: a plain model in, the model to train out
    learning_rates: tuple[float, ...]  # peak rates worth a try, lowest first
    rank: int | None = None  # r if none is given; None: it has no rank
    rate_of_b: float = 1.0  # see `FineTuneConfig`


def _bitfit(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith(".bias")
    return model


def _vera(model: nn.Module, r: int, **fields: Any) -> nn.Module:
    key = int(torch.randint(2**31, ()))  # as every random start, from torch's generator
    fields = {"projection_prng_key": key, "target_modules": _targets(model), **fields}
    return add_adapter(model, VeraConfig(r=r, **fields))


def _oft(model: nn.Module, r: int, **fields: Any) -> nn.Module:
    fields = {"r": 0, "oft_block_size": r, "target_modules": _targets(model), **fields}
    return add_adapter(model, OFTConfig(**fields))


def _ia3(model: nn.Module, **fields: Any) -> nn.Module:
    parts = parts_of(model)
    narrowing = "|".join(parts.narrowing)
    targets = "|".join([*(parts.projections[name] for name in parts.keys_values), narrowing])
    return add_adapter(model, IA3Config(**{"target_modules": targets, "feedforward_modules": narrowing, **fields}))


def _targets(model: nn.Module, preset: str = "paper") -> str:
    """What matches the names of a preset's layers."""
    return "|".join(presets_of(parts_of(model))[preset].patterns.values())


def _per_rank(model: nn.Module, preset: str) -> int:
    """What a preset trains at rank 1."""
    pattern = _targets(model, preset)
    layers: list[Any] = [layer for name, layer in model.named_modules() if re.fullmatch(pattern, name)]
    return sum(layer.in_features + layer.out_features for layer in layers)


def _lora(preset: str = "paper", rate_of_b: float = 1.0, **fixed: Any) -> dict[str, Any]:
    """LoRA or one of its kind: a preset, and what is fixed in its configuration."""

    def apply(model: nn.Module, r: int, **fields: Any) -> nn.Module:
        if preset in ("mlp", "all-linear"):  # r is that of "paper", and the preset's own trains as many numbers
            r = max(1, round(r * _per_rank(model, "paper") / _per_rank(model, preset)))
        return add_lora(model, preset, r=r, **fixed | fields)

    return {"apply": apply, "learning_rates": (1e-3, 3e-3, 1e-2), "rank": 16, "rate_of_b": rate_of_b}


_HOW: dict[str, dict[str, Any]] = {
    "full": {"apply": lambda model: model.requires_grad_(True), "learning_rates": (3e-4, 1e-3, 3e-3)},
    "bitfit": {"apply": _bitfit, "learning_rates": (3e-3, 1e-2, 3e-2)},
    "lora": _lora(),
    "lora-vision": _lora("vision"),
    "lora-text": _lora("text"),
    "lora-mlp": _lora("mlp"),
    "lora-all": _lora("all-linear"),
    "dora": _lora(use_dora=True),
    "rslora": _lora(use_rslora=True),
    "lora+": _lora(rate_of_b=16.0),
    "pissa": _lora(init_lora_weights="pissa"),
    "oft": {"apply": _oft, "learning_rates": (1e-3, 3e-3, 1e-2), "rank": 32},
    "vera": {"apply": _vera, "learning_rates": (1e-2, 3e-2, 1e-1), "rank": 64},
    "ia3": {"apply": _ia3, "learning_rates": (1e-2, 3e-2, 1e-1)},
}
_TEXTS = json.loads((files("medctkit") / "assets" / "methods.json").read_text(encoding="utf-8"))
METHODS: dict[str, Method] = {name: Method(**_TEXTS[name], **how) for name, how in _HOW.items()}


def apply_method(model: Model, name: str, **settings: Any) -> Model:
    """Freeze and extend a plain `model` for one of `METHODS`, in place: it comes back, or a `PeftModel` around it.

    Random starts come from torch's generator: call `torch.manual_seed` before for a repeatable one. The `settings` are
    `r`, where the method has a rank, and any field of its peft configuration.

    Raises:
        ValueError: unknown method or setting; a model that has an adapter already; as `add_lora`.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    if hasattr(model, "peft_config"):
        kind = type(getattr(model, "get_base_model", lambda: model)()).__name__
        raise ValueError(f"this model already carries an adapter; {name} starts from a plain {kind}")
    method = METHODS[name]
    rank = {} if method.rank is None else {"r": method.rank}
    try:
        return method.apply(model, **rank | settings)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"method {name!r} does not know one of the settings {settings}: {error}") from None


def trained_bytes(directory: str | os.PathLike) -> int:
    """Size on disk, in bytes, of the weights that `save_trained` wrote."""
    return _weights_file(Path(directory)).stat().st_size


def trained_count(directory: str | os.PathLike) -> int:
    """How many numbers `save_trained` wrote."""
    return sum(tensor.numel() for tensor in read_weights(_weights_file(Path(directory))).values())


def save_trained(model: Model, directory: str | os.PathLike) -> Path:
    """Write what requires gradients, and nothing else: an adapter in peft's format, or `trained.safetensors`.

    A crash midway leaves the previous file whole.

    Raises:
        ValueError: nothing is trainable; trainable tensors that the adapter's file would not hold; the folder
            holds weights of the other kind.
    """
    directory = Path(directory).expanduser()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("nothing on this model is trainable, so there is nothing to save; see apply_method")
    adapter = hasattr(model, "peft_config")
    other = directory / (TRAINED_FILE if adapter else ADAPTER_FILE)
    if other.exists():
        raise ValueError(f"{directory} holds {other.name}, weights of another method; choose another folder")
    if not adapter:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous() for name, p in trained.items()}
        with replacing(directory / TRAINED_FILE) as temporary:
            write_weights(tensors, temporary, {"architecture": _architecture(model)})
        return directory
    name = model.active_adapter
    held = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    places = {tensor.data_ptr() for tensor in held.values()}
    if lost := [name for name, p in trained.items() if p.data_ptr() not in places]:
        raise ValueError(
            f"beside the adapter, {len(lost)} more tensors are trainable and would not be saved. Freeze them, or name "
            f"their modules in modules_to_save when making the adapter:\n{listed(lost)}"
        )
    return save_adapter(model, directory, name)


def load_trained(model: Model, directory: str | os.PathLike) -> Model:
    """Put what `save_trained` wrote on the plain base model, in place; frozen, in evaluation mode.

    Raises:
        FileNotFoundError: nothing saved there.
        ValueError: made for another architecture; `model` carries an adapter; see `load_adapter`.
    """
    file = _weights_file(Path(directory))
    if hasattr(model, "peft_config"):
        raise ValueError("this model carries an adapter; load_trained expects the plain base model")
    if file.name == ADAPTER_FILE:
        return load_adapter(model, directory).eval()
    restore_trained(model, directory)
    return model.requires_grad_(False).eval()


def restore_trained(model: Model, directory: str | os.PathLike) -> None:
    """Put what `save_trained` wrote back on a model that is ready for the same method, in place.

    Raises:
        FileNotFoundError: nothing saved there.
        ValueError: made for another architecture, or otherwise no such weights.
    """
    file = _weights_file(Path(directory))
    found = read_weights(file)
    refusal = f"{file} was made for another architecture; load the base model it was trained on"
    if file.name == ADAPTER_FILE:
        here = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    else:
        here = {name: p for name, p in model.named_parameters() if name in found}
    refuse_other_shapes(found, {name: tuple(tensor.shape) for name, tensor in here.items()}, refusal)
    refuse_bad_numbers(found, file)
    if file.name == ADAPTER_FILE:
        set_peft_model_state_dict(model, found, model.active_adapter)
        return
    with safetensors.safe_open(str(file), "pt") as opened:
        if (opened.metadata() or {}).get("architecture") != _architecture(model):
            raise ValueError(f"{refusal}. What was saved fits, but some of the model would be left untrained")
    with torch.no_grad():
        for name, tensor in found.items():
            here[name].copy_(tensor)


def _weights_file(directory: Path) -> Path:
    directory = directory.expanduser()
    present = [directory / name for name in (ADAPTER_FILE, TRAINED_FILE) if (directory / name).is_file()]
    if not present:
        raise FileNotFoundError(
            f"{directory} has neither {ADAPTER_FILE} nor {TRAINED_FILE}; expected a folder written by save_trained"
        )
    if len(present) > 1:
        raise ValueError(f"{directory} holds both {ADAPTER_FILE} and {TRAINED_FILE}; keep the one you mean")
    return present[0]


def _architecture(model: nn.Module) -> str:
    """A fingerprint of the names and shapes of all parameters."""
    shapes = "\n".join(f"{name} {tuple(p.shape)}" for name, p in sorted(model.named_parameters()))
    return hashlib.sha256(shapes.encode()).hexdigest()
