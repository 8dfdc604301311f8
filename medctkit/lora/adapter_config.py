"""The configuration of a saved adapter, read without peft: known kinds and fields, finite numbers, plain names.

An adapter's folder is made by others. What stands in its configuration peft would hand on, to `importlib` and `re`
among others, so only what is checked here gets to peft.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import regex

KINDS = {"LORA": peft.LoraConfig, "VERA": peft.VeraConfig, "IA3": peft.IA3Config, "OFT": peft.OFTConfig}
SECONDS = 2.0  # that the patterns of one adapter may take
_PATTERNS = ("target_modules", "feedforward_modules")
# What a folder says and no model depends on; an adapter is what its tensors are, however they were begun
_UNUSED = {"peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping", "revision"}
_UNUSED |= {"base_model_name_or_path", "init_lora_weights", "init_weights", "init_ia3_weights"}
_BEGINNINGS = (True, False, "gaussian", "orthogonal")  # the others change the base model's weights, too


Check = Callable[[Any], bool]


def _whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high  # True is no number


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= 10_000 and all(map(check, value))


def _by_name(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(_name(key) and check(of) for key, of in value.items())


def _name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]{1,200}", value) is not None


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # NaN is not


def _places(value: Any) -> bool:
    return _list_of(_name)(value) or (isinstance(value, str) and len(value) <= 10_000)


_RANK = _whole(1, 2**16)
_FIELDS: dict[str, tuple[Check, str]] = {
    "r": (_RANK, "a whole number of 1 to 65,536"),
    "rank_pattern": (_by_name(_RANK), "ranks by plain names"),
    "alpha_pattern": (_by_name(_number), "numbers by plain names"),
    "oft_block_size": (_RANK, "a whole number of 1 to 65,536"),
    "projection_prng_key": (_whole(0, 2**63), "a whole number"),
    "layers_to_transform": (_list_of(_whole(0, 2**16)), "a list of whole numbers"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    **dict.fromkeys(_PATTERNS, (_places, "a list of plain names, or a pattern")),
    **dict.fromkeys(("modules_to_save", "exclude_modules", "layers_pattern"), (_list_of(_name), "plain names")),
    **dict.fromkeys(("lora_alpha", "d_initial"), (_number, "a finite number")),
    **dict.fromkeys(("lora_dropout", "vera_dropout"), (lambda v: _number(v) and 0 <= v < 1, "0 to below 1")),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "lora_bias", "save_projection"), (lambda v: type(v) is bool, "true or false")
    ),
}


def read_config(file: Path) -> tuple[peft.PeftConfig, str]:
    """The configuration that peft, or this kit, wrote, and what the adapter was made on ("": it does not say).

    Raises:
        ValueError: no such configuration, a kind or field that the kit does not load, a value that is not plain.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"{file}: {what}. Get the adapter anew, or save it with the kit's save_adapter")

    try:
        if file.stat().st_size > 2**20:
            raise ValueError("it is larger than 1 MB")
        given = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise refuse(f"not the configuration of an adapter ({error})") from None
    kind = given.get("peft_type") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise refuse(f"peft_type is {_short(kind)}, expected one of {', '.join(KINDS)}")
    usual = json.loads(json.dumps(KINDS[kind]().to_dict(), default=sorted))
    fields = {}
    for name, value in given.items():
        if name in _FIELDS and name in usual:
            check, expected = _FIELDS[name]
            if value != usual[name] and (value is not None or usual[name]):
                if not check(value):
                    raise refuse(f"{name} is {_short(value)}, expected {expected}")
                fields[name] = value
        elif name.startswith("init_") and value not in _BEGINNINGS:
            raise refuse(f"{name} is {_short(value)}, which changes the base model too; the kit does not load that")
        elif name not in _UNUSED and value is not None and (value or usual.get(name)) and value != usual.get(name):
            raise refuse(f"{name} is {_short(value)}, a field that the kit does not load")
    if "target_modules" not in fields:
        raise refuse("target_modules is missing")
    made_on = given.get("base_model_name_or_path")
    try:
        return KINDS[kind](**fields), made_on if isinstance(made_on, str) else ""
    except (TypeError, ValueError) as error:
        raise refuse(str(error)) from None


def patterns_of(config: peft.PeftConfig) -> dict[str, str]:
    """The fields of a configuration that are patterns of names."""
    found = {field: getattr(config, field, None) for field in _PATTERNS}
    return {field: value for field, value in found.items() if isinstance(value, str) and value != "all-linear"}


def matching(patterns: Mapping[str, str], names: Sequence[str], file: Path) -> dict[str, list[str]]:
    """For each of the `patterns_of` the configuration in `file`, those of the `names` that it matches as a whole.

    Raises:
        ValueError: no pattern, or one that takes too long.
    """
    found, end = {}, time.monotonic() + SECONDS
    for field, pattern in patterns.items():
        try:
            within = ((name, max(1e-3, end - time.monotonic())) for name in names)
            found[field] = [name for name, left in within if name and regex.fullmatch(pattern, name, timeout=left)]
        except (regex.error, TimeoutError, RecursionError) as error:
            raise ValueError(f"{file}: {field} is no usable pattern ({error}): {_short(pattern)}") from None
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
