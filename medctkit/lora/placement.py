"""Where in a model a LoRA goes: linear layers by name, presets of them, and peft's configuration.

A model says in its `parts` what these layers are called and which presets it has; without a model, CT-CLIP's are
meant. The paper (MedCT-VLM, arXiv 2512.00597) reports 1.67 M trainable parameters, 0.38 % of 440 M. Its full text was
not at hand, so the placement of preset "paper" is inferred: `counting.search_placements` shows that of all ranks and
attention projections only rank 24 fits, and of those only one set is "q, k and v of both encoders". Its alpha is not
known to us; alpha = 2 r and no dropout are our choice.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from peft import LoraConfig

from medctkit.model.ct_clip_parts import PARTS
from medctkit.model.protocol import Model, Parts


@dataclass(frozen=True)
class Placement:
    """Which linear layers of each encoder, by name, get a LoRA in all its layers, and its rank."""

    vision: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    r: int = 24
    parts: Parts = field(default=PARTS, repr=False)

    def __post_init__(self) -> None:
        for side in ("vision", "text"):
            names, known = getattr(self, side), getattr(self.parts, side)
            object.__setattr__(self, side, (names,) if isinstance(names, str) else tuple(names))
            if unknown := [name for name in getattr(self, side) if name not in known]:
                raise ValueError(f"unknown {side} projection {unknown[0]!r}; choose from {', '.join(known)}")
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"rank r must be a whole number of at least 1, got {self.r!r}; usual values are 4 to 64")

    @property
    def patterns(self) -> dict[str, str]:
        """One regular expression per projection."""
        return {name: self.parts.projections[name] for name in (*self.vision, *self.text)}


def presets_of(parts: Parts) -> dict[str, Placement]:
    """A model's presets by name."""
    return {name: Placement(tuple(v), tuple(t), parts=parts) for name, (v, t) in parts.presets.items()}


PRESETS: dict[str, Placement] = presets_of(PARTS)


def parts_of(model: Model) -> Parts:
    """The names of a model's parts; those of CT-CLIP, if it does not say."""
    return getattr(model, "parts", PARTS)


def placement_of(preset: str, overrides: dict[str, Any], parts: Parts = PARTS) -> Placement:
    """The preset with its placement overrides taken out of `overrides`."""
    presets = presets_of(parts)
    if preset not in presets:
        raise ValueError(f"unknown LoRA preset {preset!r}; choose from {', '.join(presets)}")
    changes = {name: overrides.pop(name) for name in ("vision", "text", "r") if name in overrides}
    return replace(presets[preset], **changes)


def lora_config(preset: str = "paper", parts: Parts = PARTS, **overrides: Any) -> LoraConfig:
    """A peft configuration for CT-CLIP, or for a model with other `parts`.

    Args:
        preset: "paper" (r = 24 on q, k, v of both encoders), "vision", "text" (one encoder of it), "all-attention"
            ("paper" plus both output projections), "mlp" (both layers of each feed-forward) or "all-linear" (both).
        parts: the model's.
        **overrides: `r`; `vision` and `text`, projection names in place of the preset's; and any field of
            `peft.LoraConfig` (`lora_alpha`, default 2 r; `lora_dropout`, default 0; `use_dora`, `use_rslora`;
            `target_modules` in place of the whole placement; ...).

    Raises:
        ValueError: unknown preset, projection or field; rank below 1; no projection left.
    """
    placement = placement_of(preset, overrides, parts)
    targets = "|".join(placement.patterns.values())
    fields: dict[str, Any] = {"lora_alpha": 2 * placement.r, "target_modules": targets} | overrides
    if not fields["target_modules"]:
        raise ValueError(f"preset {preset!r} with vision=() and text=() adapts nothing; name at least one projection")
    if unknown := [name for name in fields if name not in LoraConfig.__dataclass_fields__]:
        raise ValueError(f"unknown LoRA setting {unknown[0]!r}; expected r, vision, text or a field of peft.LoraConfig")
    return LoraConfig(r=placement.r, **fields)
