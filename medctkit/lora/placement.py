"""Where in CT-CLIP a LoRA goes: projections, presets, and peft's configuration of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig


# Where a projection lives inside CTCLIPModel, at any depth. peft matches the whole module name.
VISION_LAYER = r"visual_transformer\.enc_(?:spatial|temporal)_transformer\.layers\.\d+\."


TEXT_LAYER = r"text_transformer\.encoder\.layer\.\d+\."


VISION_PROJECTIONS = {name: rf"{VISION_LAYER}1\.{name}" for name in ("to_q", "to_kv", "to_out")}


TEXT_PROJECTIONS = {
    "query": TEXT_LAYER + r"attention\.self\.query",
    "key": TEXT_LAYER + r"attention\.self\.key",
    "value": TEXT_LAYER + r"attention\.self\.value",
    "attention.output.dense": TEXT_LAYER + r"attention\.output\.dense",
}


@dataclass(frozen=True)
class Placement:
    """Which attention projections get a LoRA, in all layers of each encoder, and its rank.

    Args:
        vision: names out of `VISION_PROJECTIONS` (to_kv holds keys and values in one matrix).
        text: names out of `TEXT_PROJECTIONS`.
        r: rank, the same everywhere.
    """

    vision: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    r: int = 24

    def __post_init__(self):
        for side, known in (("vision", VISION_PROJECTIONS), ("text", TEXT_PROJECTIONS)):
            if unknown := [name for name in getattr(self, side) if name not in known]:
                raise ValueError(f"unknown {side} projection {unknown[0]!r}; choose from {', '.join(known)}")
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"rank r must be a whole number of at least 1, got {self.r!r}; usual values are 4 to 64")

    @property
    def patterns(self) -> dict[str, str]:
        """One regular expression per projection."""
        known = VISION_PROJECTIONS | TEXT_PROJECTIONS
        return {name: known[name] for name in (*self.vision, *self.text)}


PRESETS: dict[str, Placement] = {
    "paper": Placement(vision=("to_q", "to_kv"), text=("query", "key", "value")),
    "vision": Placement(vision=("to_q", "to_kv")),
    "text": Placement(text=("query", "key", "value")),
    "all-attention": Placement(vision=tuple(VISION_PROJECTIONS), text=tuple(TEXT_PROJECTIONS)),
}


def placement_of(preset: str, overrides: dict) -> Placement:
    """The preset with its placement overrides taken out of `overrides`."""
    if preset not in PRESETS:
        raise ValueError(f"unknown LoRA preset {preset!r}; choose from {', '.join(PRESETS)}")
    changes = {field: overrides.pop(field) for field in ("vision", "text", "r") if field in overrides}
    for side in changes.keys() & {"vision", "text"}:
        changes[side] = (changes[side],) if isinstance(changes[side], str) else tuple(changes[side])
    return replace(PRESETS[preset], **changes)


def lora_config(preset: str = "paper", **overrides) -> LoraConfig:
    """A peft configuration for CT-CLIP.

    Args:
        preset: "paper" (r = 24 on q, k, v of both encoders), "vision", "text" (one encoder of it) or
            "all-attention" ("paper" plus both output projections).
        **overrides: `r`; `vision` and `text`, projection names in place of the preset's; and any field of
            `peft.LoraConfig` (`lora_alpha`, default 2 r; `lora_dropout`, default 0; `use_dora`, `use_rslora`;
            `target_modules` in place of the whole placement; ...).

    Raises:
        ValueError: unknown preset, projection or field; rank below 1; no projection left.
    """
    from peft import LoraConfig

    placement = placement_of(preset, overrides)
    fields = {
        "lora_alpha": 2 * placement.r,
        "target_modules": "|".join(placement.patterns.values()),
    } | overrides
    if not fields["target_modules"]:
        raise ValueError(
            f"preset {preset!r} with vision={placement.vision} and text={placement.text} adapts nothing; "
            "name at least one projection"
        )
    if unknown := [name for name in fields if name not in LoraConfig.__dataclass_fields__]:
        raise ValueError(
            f"unknown LoRA setting {unknown[0]!r}; expected r, vision, text or a field of peft.LoraConfig "
            "such as lora_alpha, lora_dropout, use_dora"
        )
    return LoraConfig(r=placement.r, **fields)
