"""One base model with the adapters of many hospitals on board; each volume is seen through its own."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from medctkit.lora.adapter import load_adapter
from medctkit.model.base_model import BaseModel
from medctkit.zero_shot.classifier import ZeroShotClassifier, evaluating, refuse_non_finite
from medctkit.zero_shot.prompts import Prompts

BASE = "__base__"  # peft's name for no adapter


class AdapterBank:
    """Adapters that were loaded once and are chosen by name.

    A batch may mix hospitals: `bank.scores(volumes, ["north", "south", "north"])`.

    Args:
        base: the base model; the bank puts the adapters on it.
        folders: name of each adapter, and the folder that `save_adapter` wrote.
        prompts: see `ZeroShotClassifier`; encoded once for each adapter.

    Raises:
        ValueError: no adapter; peft's own name for the base model; see `load_adapter`.
    """

    def __init__(self, base: BaseModel, folders: Mapping[str, str | os.PathLike], prompts: Prompts = "paper"):
        if not folders or BASE in folders:
            raise ValueError(f"folders has {', '.join(folders) or 'no adapters'}; expected names other than {BASE!r}")
        model: Any = base.model
        for name, folder in folders.items():
            model = load_adapter(model, folder, name)
        self.model, self.names = model, tuple(folders)
        self._classifiers: dict[str, ZeroShotClassifier] = {}
        self._prompts, self._tokenizer = prompts, base.tokenizer

    def embed(self, volumes: torch.Tensor, adapters: Sequence[str]) -> torch.Tensor:
        """Embed volumes (b, 1, d, h, w), each with the adapter that `adapters` names for it: (b, p), L2-normalised.

        Raises:
            ValueError: another number of names than of volumes; an unknown name.
        """
        if len(adapters) != len(volumes):
            raise ValueError(f"{len(volumes)} volumes and {len(adapters)} names of adapters; give one for each")
        if unknown := sorted(set(adapters) - {*self.names, BASE}):
            raise ValueError(f"no adapter {unknown[0]!r}; the bank has {', '.join(self.names)}, and {BASE} for none")
        with evaluating(self.model), _each_its_own(self.model, adapters):
            return self.model.encode_image(volumes)

    def scores(self, volumes: torch.Tensor, adapters: Sequence[str]) -> np.ndarray:
        """Probabilities (b, 18) for volumes (b, 1, d, h, w), each with its own adapter in both encoders.

        Raises:
            ValueError: see `embed`.
            FloatingPointError: an embedding that is not finite.
        """
        embeds = self.embed(volumes, adapters).float()
        refuse_non_finite(embeds, [f"volume {i}, adapter {name}" for i, name in enumerate(adapters)])
        found = [
            self._prompts_of(name).scores_from_embeddings(e[None]) for name, e in zip(adapters, embeds, strict=True)
        ]
        return np.concatenate(found)

    def _prompts_of(self, name: str) -> ZeroShotClassifier:
        """A classifier whose prompts were encoded with this adapter."""
        if name not in self._classifiers:
            self._classifiers[name] = ZeroShotClassifier(_Through(self.model, name), self._tokenizer, self._prompts)
        return self._classifiers[name]


class _Through(nn.Module):
    """The model's text encoder as one adapter has it."""

    def __init__(self, model: Any, name: str):
        super().__init__()
        self.model, self.name = model, name
        self.temperature, self.longest_text = model.temperature, model.longest_text

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        with _each_its_own(self.model, [self.name] * len(input_ids)):
            return self.model.encode_text(input_ids, attention_mask)


@contextmanager
def _each_its_own(model: nn.Module, adapters: Sequence[str]) -> Iterator[None]:
    """Adapted layers take each element of the batch through the adapter named for it.

    The towers fold depth or places into the batch, element after element, so that a name counts for as many rows.
    """

    def name_rows(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        rows = len(args[0]) // len(adapters)
        return args, kwargs | {"adapter_names": [name for name in adapters for _ in range(rows)]}

    layers = [module for module in model.modules() if hasattr(module, "adapter_layer_names")]
    hooks = [layer.register_forward_pre_hook(name_rows, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
