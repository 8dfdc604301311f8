"""`run.yaml`: what a run was asked for, beside its adapter, to be read, changed, and handed to `medctkit finetune`.

YAML is data here: it is read by a `yaml.SafeLoader`, and every name and value in it is checked.
"""

import os
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from medctkit.common.atomic import write_text
from medctkit.experiments.adapt import DEFAULT, FULL_SIZE, Adaptation

NAME = "run.yaml"
# of the command, beside the settings
ASKED: dict[str, type] = dict.fromkeys(("manifest", "cache_dir", "model", "tokenizer", "hospital"), str) | {"seed": int}
_SETTINGS = [field.name for field in fields(Adaptation) if field.name != "seed"]  # the run's, above


class _EachNameOnce(yaml.SafeLoader):
    """Of a name that stands twice, YAML's own loader takes the last value without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def write_run_file(path: str | os.PathLike, asked: Mapping[str, Any], settings: Adaptation) -> Path:
    """Write what was `asked` (see `ASKED`) and every field of the settings.

    Prompts are {finding: {states: [sentences], denies: [sentences]}}.
    """
    path = Path(path).expanduser()
    found = {name: getattr(settings, name) for name in _SETTINGS}
    found["prompts"] = {
        finding: {"states": list(states), "denies": list(denies)}
        for finding, (states, denies) in settings.prompts.items()
    }
    said = {name: None if asked.get(name) is None else ASKED[name](asked[name]) for name in ASKED}
    text = yaml.safe_dump(said | {"settings": found}, sort_keys=False, allow_unicode=True, width=120)
    write_text(path, f"# medctkit finetune OUTPUT_DIR --config {path.name} does this again\n{text}")
    return path


def read_run_file(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run file asks for (see `ASKED`), and the settings that it has, as `Adaptation` takes them.

    What it does not name is left out: the command's own, or the default of the model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, a name that is unknown or there twice, a value of another type; says where.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no run file at {path}; `medctkit finetune` writes a {NAME} beside each adapter")
    try:
        found = yaml.load(path.read_bytes(), _EachNameOnce) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # 2026-02-30 is a date to YAML, and none
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("settings", {}), dict):
        raise ValueError(f"{path}: expected names with values, and below `settings` those of the settings")
    settings = found.pop("settings", {})
    types = get_type_hints(Adaptation)
    for given, known in ((found, ASKED), (settings, {name: types[name] for name in _SETTINGS})):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{path}: unknown {unknown[0]!r}; expected {', '.join(known)}")
    asked = {name: _typed(path, name, value, ASKED[name] | None) for name, value in found.items()}
    chosen = {name: _typed(path, name, value, types[name]) for name, value in settings.items() if name != "prompts"}
    if (prompts := settings.get("prompts")) is not None:
        try:
            sides = {finding: (both["states"], both["denies"]) for finding, both in prompts.items()}
            lists = [side for both in sides.values() for side in both]
            if not all(isinstance(side, list) and all(isinstance(text, str) for text in side) for side in lists):
                raise TypeError("a sentence without its list would be taken letter by letter")
            chosen["prompts"] = {finding: tuple(map(tuple, both)) for finding, both in sides.items()}
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"{path}: prompts must be {{finding: {{states: [...], denies: [...]}}}}") from None
    return {name: value for name, value in asked.items() if value is not None}, chosen


def settings_of(model: str, given: Mapping[str, Any]) -> Adaptation:
    """The defaults of a model, with what is `given`, as `FineTuneConfig` checks it; `epochs` replace `steps`."""
    steps = {"steps": None} if given.get("epochs") is not None else {}
    return replace(DEFAULT if model == "mini" else FULL_SIZE, **(steps | dict(given)))


def _typed(path: Path, name: str, value: Any, wanted: Any) -> Any:
    """A value of the type that a field wants; 3e-4 without a dot is text in YAML."""
    kinds = get_args(wanted) or (wanted,)
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    elif isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return value
    names = {type(None): "nothing", str: "text (in quotes, if it looks like a number)"}
    expected = " or ".join(names.get(kind, kind.__name__) for kind in kinds)
    raise ValueError(f"{path}: {name} must be {expected}, got {reprlib.repr(value)}")
