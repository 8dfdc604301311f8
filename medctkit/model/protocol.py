"""What the rest of the kit needs to know of a base model: enough to adapt it, to score with it, and no more.

CT-CLIP is one such model (`ct_clip`). Another one has these members and an entry in `base_model.BASES`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from medctkit.scans.preprocessing import PreprocessConfig

# A `VisionLanguageModel`, or peft's wrapper around one, which hands every name on where no type checker sees it
Model = Any


@dataclass(frozen=True)
class Parts:
    """Where things are in a model, by name: regular expressions, each for the whole name of a module."""

    vision: Mapping[str, str]  # linear layers in all layers of the vision encoder that an adapter may go beside
    text: Mapping[str, str]  # the same in the text encoder
    # Name -> (names out of `vision`, names out of `text`): what `add_lora` takes by that name. "paper", q, k and v of
    # both encoders, is its default.
    presets: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    keys_values: Sequence[str] = ()  # which of all these hold keys or values; (IA)^3 scales them
    narrowing: Sequence[str] = ()  # layers that narrow a feed-forward; (IA)^3 scales what enters them
    # Name -> prefixes of module names, from the output down: what a sanity check of maps shuffles.
    stages: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def projections(self) -> dict[str, str]:
        """Those of both encoders."""
        return {**self.vision, **self.text}

    @classmethod
    def beside_bert(
        cls,
        attention: Mapping[str, str],
        mlp: Mapping[str, str],
        qkv: Sequence[str],
        keys_values: Sequence[str],
        narrowing: str,
        bert_layer: str,
        stages: Mapping[str, Sequence[str]],
    ) -> "Parts":
        """The parts of a model whose text encoder is transformers' BERT.

        Linear layers of the vision encoder's `attention`, of which some make `qkv` and `keys_values`, and of its `mlp`,
        of which one is the `narrowing`; the beginning of all names in a `bert_layer`; `stages` as above.
        """
        text_qkv = ("query", "key", "value")
        text_attention = {name: rf"{bert_layer}attention\.self\.{name}" for name in text_qkv}
        text_attention["attention.output.dense"] = rf"{bert_layer}attention\.output\.dense"
        text_mlp = {name: bert_layer + re.escape(name) for name in ("intermediate.dense", "output.dense")}
        vision, text = {**attention, **mlp}, {**text_attention, **text_mlp}
        return cls(
            vision=vision,
            text=text,
            presets={
                "paper": (tuple(qkv), text_qkv),
                "vision": (tuple(qkv), ()),
                "text": ((), text_qkv),
                "all-attention": (tuple(attention), tuple(text_attention)),
                "mlp": (tuple(mlp), tuple(text_mlp)),
                "all-linear": (tuple(vision), tuple(text)),
            },
            keys_values=(*keys_values, "key", "value"),
            narrowing=(mlp[narrowing], text_mlp["output.dense"]),
            stages=stages,
        )


@runtime_checkable
class VisionLanguageModel(Protocol):
    """A `torch.nn.Module` that puts CT volumes and texts into one embedding space."""

    temperature: torch.Tensor  # similarity is cosine * exp(temperature)
    preprocess_config: PreprocessConfig  # the volumes it wants
    longest_text: int  # tokens that its text encoder takes at most
    vision_encoder: nn.Module  # what `encode_image` runs
    text_encoder: nn.Module  # what `encode_text` runs
    parts: Parts  # where adapters go

    def encode_image(self, volumes: torch.Tensor) -> torch.Tensor:
        """Embed volumes (b, 1, d, h, w): (b, p), L2-normalised."""

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed token ids (b, n): (b, p), L2-normalised."""


def refuse_other_input(volumes: torch.Tensor, shape: Sequence[int]) -> None:
    """Refuse volumes that are not (b, 1, d, h, w) of the `shape` (d, h, w), or not scaled.

    Raises:
        ValueError: another shape, or whole numbers, HU say.
    """
    if volumes.ndim != 5 or tuple(volumes.shape[1:]) != (1, *shape) or not volumes.shape[0]:
        raise ValueError(
            f"volumes have shape {tuple(volumes.shape)}; this model expects (batch, 1, {', '.join(map(str, shape))}), "
            "as preprocess(volume, model.preprocess_config) and a batch axis give it"
        )
    if not volumes.is_floating_point():
        raise ValueError(f"volumes are {volumes.dtype}; expected floating point in [-1, 1] as preprocess gives it")


def refuse_other_ids(input_ids: torch.Tensor, longest: int) -> None:
    """Refuse token ids that are not (b, n) with n of at most `longest`.

    Raises:
        ValueError: another shape.
    """
    if input_ids.ndim != 2 or not 0 < input_ids.shape[1] <= longest:
        raise ValueError(
            f"input_ids have shape {tuple(input_ids.shape)}; expected (batch, n) with n of at most {longest}: tokenise "
            f"with truncation=True, max_length={longest}"
        )
