"""An adapter on a model, made by peft: added, merged, saved, loaded, and refused where it does not belong."""

import copy
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn

from medctkit.lora.adapter_config import matching, patterns_of, read_config
from medctkit.lora.placement import lora_config, parts_of, placement_of
from medctkit.model.fingerprint import digests
from medctkit.model.protocol import Model
from medctkit.model.weights import read_weights, refuse_bad_numbers, refuse_other_shapes

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft names them
_DIGEST = "sha256:"
_WHOLE = "modules_to_save"  # copies of whole modules, one of which `unload` puts in place


def add_lora(model: Model, preset: str = "paper", **overrides: Any) -> PeftModel:
    """Freeze `model` and add a trainable LoRA adapter to it, in place; for `preset` and `overrides` see `lora_config`.

    The random A matrices come from torch's generator: call `torch.manual_seed` before for a repeatable start.

    Raises:
        ValueError: as `lora_config`; a projection that no layer of this model has; a model that has adapters already.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            f"this model already carries the adapter(s) {', '.join(model.peft_config)}; add another with "
            "model.add_adapter(name, lora_config(...)), or merge_lora(model) first"
        )
    parts = parts_of(model)
    config = lora_config(preset, parts, **overrides)
    match overrides.get("target_modules"):  # peft: one pattern, a list of last parts of names, or a word
        case None:
            patterns = placement_of(preset, dict(overrides), parts).patterns
        case "all-linear":
            patterns = {}
        case str(pattern):
            patterns = {pattern: pattern}
        case names:
            patterns = {name: rf"(?:.*\.)?{re.escape(name)}" for name in names}
    _refuse_unmatched(model, patterns)
    return add_adapter(model, config)


def add_adapter(model: Model, config: PeftConfig) -> PeftModel:
    """Freeze a plain `model` and add the trainable adapter of any peft configuration to it, in place.

    The digest of the base model becomes part of the configuration, so that `load_adapter` refuses any other.
    """
    _refuse_wrapped(model)
    with _quiet():
        adapted = get_peft_model(model, config)
    adapted.register_forward_pre_hook(_refuse_names, with_kwargs=True)
    (config,) = adapted.peft_config.values()
    config.base_model_name_or_path = _digest(adapted) if _has_exact_weights(adapted) else None
    return adapted


def _refuse_wrapped(model: Model) -> None:
    """Refuse a model whose layers carry an adapter already, but which is not the `PeftModel` that knows of it."""
    if hasattr(model, "peft_config") and not isinstance(model, PeftModel):
        raise ValueError(
            f"this model's layers already carry the adapter(s) {', '.join(model.peft_config)}, put there in place; go "
            "on with the model that add_lora or load_adapter gave back, or load the base model anew"
        )


def _digest(model: Model) -> str:
    return f"{_DIGEST}{digests(model)[0]}"


def _has_exact_weights(model: nn.Module) -> bool:
    """Whether there are weights to tell one base model from another by: not on the meta device, not rounded."""
    return all(type(p.data) is torch.Tensor and not p.is_meta and p.dtype == torch.float32 for p in model.parameters())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without two of peft's warnings."""
    with warnings.catch_warnings():
        # it takes the next size of a block that divides the width of a layer
        warnings.filterwarnings("ignore", message="Invalid `oft_block_size`")
        # it asks transformers 5 by an old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def _refuse_names(_: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before peft puts hooks on every layer and leaves them there."""
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "adapter_names: the towers fold depth and places into the batch, so that one name for each volume is not "
            "one for each row. Batches that mix adapters go through medctkit.deploy.bank.AdapterBank"
        )


def _refuse_unmatched(model: nn.Module, patterns: Mapping[str, str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for label, pattern in patterns.items():
        if not any(re.fullmatch(pattern, name) for name in names):
            linear = {re.sub(r"\d+", "N", n) for n, module in model.named_modules() if isinstance(module, nn.Linear)}
            raise ValueError(
                f"LoRA placement {label!r} (pattern {pattern}) matches no module of {type(model).__name__}; "
                f"its linear layers (N: layer number) are: {', '.join(sorted(linear)) or 'none'}"
            )


def merge_lora(model: PeftModel | Model) -> Model:
    """A plain model with the active adapter added into its weights, itself if there is none; `model` is left as it is.

    Both copies are in memory at once (1.1 GB each at full size). To swap adapters instead, use peft's own
    `model.set_adapter(name)`, and `with model.disable_adapter():` for the base.

    Raises:
        ValueError: weights in half precision, where the update would be rounded away; an adapter that is switched off.
    """
    _refuse_wrapped(model)
    if not isinstance(model, PeftModel):
        return model
    if any(layer.disable_adapters for layer in model.modules() if hasattr(layer, "adapter_layer_names")):
        raise ValueError("the adapter is switched off, and would be merged all the same; for the base, load it alone")
    for name, p in model.named_parameters():
        if p.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} is in half precision, which would round the update away; load the adapter on a base model in "
                "float32 and merge it there"
            )
    return copy.deepcopy(model).merge_and_unload(safe_merge=True)


def save_adapter(model: PeftModel, directory: str | os.PathLike, name: str = "default") -> Path:
    """Write adapter `name` in peft's format; a crash midway leaves the previous files whole.

    Raises:
        ValueError: no such adapter; beside it one that is called like a part of the model, "0" say.
    """
    if name not in model.peft_config:
        raise ValueError(f"no adapter {name!r} on this model; it has {', '.join(model.peft_config)}")
    layers = {key: m.adapter_layer_names for key, m in model.named_modules() if hasattr(m, "adapter_layer_names")}
    parts = {part for key, names in layers.items() for part in (*key.split("."), *names, "weight", "bias")}
    if clash := sorted(parts & (set(model.peft_config) - {name})):
        raise ValueError(
            f"adapter {clash[0]!r} is called like a part of the model, and peft would leave that part of {name!r} out "
            f"of the file; take it off first, model.delete_adapter({clash[0]!r}), or load it by another name"
        )
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        try:
            model.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
        except SafetensorError as error:  # a full disk
            raise OSError(f"{directory}: {error}") from error
        written = Path(scratch) if name == "default" else Path(scratch) / name
        for file in (ADAPTER_FILE, ADAPTER_CONFIG):
            os.replace(written / file, directory / file)
    return directory


def load_adapter(
    model: Model, directory: str | os.PathLike, name: str = "default", trainable: bool = False
) -> PeftModel:
    """Put a saved adapter on `model` and make it the active one.

    peft alone passes over tensors that are missing or left over with a warning; here the file has to fit the model
    exactly. The `model` may carry other adapters already; `model.set_adapter(name)` swaps them.

    Raises:
        FileNotFoundError: no adapter in `directory`.
        ValueError: the adapter was made for another architecture or base model; names taken twice; biases of the model
            itself, trained by one of several adapters; see `read_weights`, `read_config` and `refuse_bad_numbers`.
    """
    _refuse_wrapped(model)
    directory = Path(directory).expanduser()
    for expected in (ADAPTER_FILE, ADAPTER_CONFIG):
        if not (directory / expected).is_file():
            raise FileNotFoundError(f"{directory} has no {expected}; expected a folder written by save_adapter")
    wrapped = isinstance(model, PeftModel)
    if wrapped and name in model.peft_config:
        raise ValueError(f"an adapter named {name!r} is already on this model; pass another name")

    file = directory / ADAPTER_CONFIG
    config, made_on = read_config(file)
    if wrapped and any(getattr(each, "bias", "none") != "none" for each in (config, *model.peft_config.values())):
        raise ValueError(
            f"{directory} beside {', '.join(model.peft_config)}: one of these adapters trained biases of the base "
            "model itself, which all would get; load each on a base model of its own"
        )
    patterns = patterns_of(config)
    with torch.device("meta"), _quiet():  # shapes only: what this adapter would look like on this architecture
        shapes = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        shapes |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
        for layer in model.modules():  # what other adapters hold is not copied only to be thrown away
            parts = [getattr(layer, part) for part in getattr(layer, "adapter_layer_names", ()) if part != _WHOLE]
            shapes |= {id(part): type(part)() for part in parts}
        twin = copy.deepcopy(model, shapes)
        twin = twin.unload() if wrapped else twin
        for field, matched in matching(patterns, [name for name, _ in twin.named_modules()], file).items():
            setattr(config, field, matched)
            if not matched:
                _refuse_unmatched(twin, {f"of {directory}": re.escape(patterns[field])})
        try:
            adapted = get_peft_model(twin, copy.deepcopy(config))
        except Exception as error:  # peft raises many
            raise ValueError(f"{file}: peft cannot make this adapter for this model: {error}") from error
        tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    found = read_weights(directory / ADAPTER_FILE)
    message = f"the adapter in {directory} was made for another architecture; load the base model it was trained on"
    refuse_other_shapes(found, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, message)
    refuse_bad_numbers(found, directory / ADAPTER_FILE)
    if made_on.startswith(_DIGEST) and _has_exact_weights(model) and made_on != (ours := _digest(model)):
        other = f"on a base model with other weights ({made_on}; this one is {ours})"
        raise ValueError(f"the adapter in {directory} was trained {other}: load that one")
    config.inference_mode = not trainable
    with _quiet():
        if wrapped:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, name)
            model.register_forward_pre_hook(_refuse_names, with_kwargs=True)
    set_peft_model_state_dict(model, found, name)
    model.set_adapter(name)
    vars(model.peft_config[name]).update(patterns, base_model_name_or_path=made_on or None)
    return model if trainable else model.requires_grad_(False).eval()
