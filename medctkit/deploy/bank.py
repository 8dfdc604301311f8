"""One base model with the adapters of many hospitals on board; each volume is seen through its own."""

import math
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from medctkit.findings import FINDINGS
from medctkit.lora.adapter import load_adapter
from medctkit.model.base_model import BaseModel
from medctkit.zero_shot.classifier import ZeroShotClassifier, refuse_non_finite, refuse_unscaled
from medctkit.zero_shot.prompts import Prompts

BASE = "__base__"  # peft's name for no adapter
WAYS = """cat svd linear ties ties_svd dare_linear dare_linear_svd dare_ties dare_ties_svd magnitude_prune
    magnitude_prune_svd""".split()  # of peft, which looks at them only where there are two
_NAME = re.compile(r"[\w-]{1,64}")
_NAMES = f"names other than {BASE!r}, of letters, digits, _ and -"


class AdapterBank:
    """Adapters, loaded once onto `base`, chosen by name: `folders` has for each the folder that `save_adapter` wrote.

    A batch may mix hospitals: `bank.scores(volumes, ["north", "south", "north"])`. The prompts (see
    `ZeroShotClassifier`) are encoded once for each adapter. Threads may share a bank; they take turns.

    Raises:
        ValueError: no adapter; peft's own name for the base model; an adapter that a batch cannot mix: no LoRA, one
            with DoRA or trained biases, or whose `modules_to_save` others do not have; see `load_adapter`.
    """

    def __init__(self, base: BaseModel, folders: Mapping[str, str | os.PathLike], prompts: Prompts = "paper"):
        if not folders or BASE in folders or not all(map(_NAME.fullmatch, folders)):
            raise ValueError(f"folders has {', '.join(map(repr, folders)) or 'no adapters'}; expected {_NAMES}")
        model: Any = base.model
        for name, folder in folders.items():
            model = load_adapter(model, folder, name)
            config = model.peft_config[name]
            odd = config.peft_type != "LORA" or config.use_dora or config.bias != "none"
            if odd or len({frozenset(each.modules_to_save or ()) for each in model.peft_config.values()}) > 1:
                raise ValueError(
                    f"{name!r} ({folder}) cannot be mixed with others in a batch: expected LoRAs without DoRA and "
                    f"without trained biases, all with the same modules_to_save; this is {config.peft_type}, "
                    f"modules_to_save {config.modules_to_save}. Use it alone: load_adapter on a base model of its own"
                )
        self._lock = threading.Lock()
        self.model, self.names, self._layers = model, tuple(folders), _adapted(model)
        self._classifiers: dict[str, ZeroShotClassifier] = {}
        self._prompts, self._tokenizer = prompts, base.tokenizer

    def embed(self, volumes: torch.Tensor, adapters: Sequence[str]) -> torch.Tensor:
        """Embed volumes (b, 1, d, h, w) in [-1, 1], each with the adapter that `adapters` names: (b, p), L2-normalised.

        Raises:
            ValueError: another number of names than of volumes; an unknown name; values beyond -1 to 1.
        """
        refuse_unscaled(volumes)
        if len(adapters) != len(volumes):
            raise ValueError(f"{len(volumes)} volumes and {len(adapters)} names of adapters; give one for each")
        if unknown := sorted(set(adapters) - {*self.names, BASE}):
            raise ValueError(f"no adapter {unknown[0]!r}; the bank has {', '.join(self.names)}, and {BASE} for none")
        with self._each_its_own(adapters):
            return self.model.encode_image(volumes)

    def scores(self, volumes: torch.Tensor, adapters: Sequence[str]) -> np.ndarray:
        """Probabilities (b, 18) for volumes (b, 1, d, h, w), each with its own adapter in both encoders.

        Raises:
            ValueError, FloatingPointError: see `embed`; an embedding that is not finite.
        """
        embeds = self.embed(volumes, adapters).float()
        refuse_non_finite(embeds, [f"volume {i}, adapter {name}" for i, name in enumerate(adapters)])
        found = np.empty((len(embeds), len(FINDINGS)), np.float32)
        for name in set(adapters):
            mine = [i for i, other in enumerate(adapters) if other == name]
            found[mine] = self._prompts_of(name).scores_from_embeddings(embeds[mine])
        return found

    def combine(
        self, name: str, weights: Mapping[str, float], how: str = "svd", density: float = 0.5, seed: int = 0
    ) -> None:
        """Put one more adapter on board, the sum of LoRAs that are, by peft's `add_weighted_adapter`.

        `weights` has a factor for each. `how` is peft's `combination_type`:
        `cat` adds the updates B A up exactly, and the ranks with them; `svd` comes as near as the higher rank allows.
        `linear`, `ties`, `dare_linear` and `dare_ties` mix the A of adapters of one rank and, apart from them, the B,
        so that each A meets the B of the others, too; with `_svd` behind their names the last three mix updates.
        TIES and DARE keep a `density` of the numbers; `seed` says which those of DARE are.
        `save_adapter(bank.model, folder, name)` saves it.

        Raises:
            ValueError: a name that is taken, or unknown; no plain LoRA; what peft cannot combine.
        """
        known = self.model.peft_config
        if how not in WAYS or not all(map(math.isfinite, weights.values())):
            raise ValueError(f"{how!r} of {dict(weights)}: expected finite weights, and one of {', '.join(WAYS)}")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r}: expected {_NAMES}")
        if name in (*known, BASE) or not weights or not set(weights) <= set(known):
            raise ValueError(f"{name!r} of {[*weights]}: expected a new name, of {', '.join(self.names)}")
        for each in weights:  # peft would keep the scaling of rsLoRA and the lengths of DoRA, and both were wrong
            if known[each].peft_type != "LORA" or known[each].use_rslora or known[each].use_dora:
                raise ValueError(f"{each!r} is no plain LoRA ({known[each].peft_type}, rsLoRA or DoRA); those add up")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model.add_weighted_adapter(
                [*weights], [*weights.values()], name, how, density=density, svd_full_matrices=False
            )
        self.model.requires_grad_(False).eval()
        self.names, self._layers = (*self.names, name), _adapted(self.model)

    def _prompts_of(self, name: str) -> ZeroShotClassifier:
        """A classifier whose prompts were encoded with this adapter."""
        if name not in self._classifiers:
            self._classifiers[name] = ZeroShotClassifier(_Through(self, name), self._tokenizer, self._prompts)
        return self._classifiers[name]

    @contextmanager
    def _each_its_own(self, adapters: Sequence[str]) -> Iterator[None]:
        """Adapted layers take each element of the batch through the adapter named for it.

        The towers fold depth or places into the batch, element after element, so that a name counts for as many rows.
        """

        def name_rows(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            rows = len(args[0]) // len(adapters)
            return args, kwargs | {"adapter_names": [name for name in adapters for _ in range(rows)]}

        with self._lock, torch.no_grad():
            if self.model.training:
                self.model.eval()
            hooks = [layer.register_forward_pre_hook(name_rows, with_kwargs=True) for layer in self._layers]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()


class _Through:
    """The text encoder as one adapter has it; of a hundred, only its own tensors are looked through for changes."""

    def __init__(self, bank: AdapterBank, name: str):
        self._bank, self._name, model = bank, name, bank.model
        self.temperature, self.longest_text = model.temperature, model.longest_text
        others = {*model.peft_config} - {name}
        self._tensors = [p for key, p in model.named_parameters() if others.isdisjoint(key.split("."))]

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self._tensors)

    def modules(self) -> Iterator[nn.Module]:
        return iter(())

    def eval(self) -> None:
        pass

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        with self._bank._each_its_own([self._name] * len(input_ids)):
            return self._bank.model.encode_text(input_ids, attention_mask)


def _adapted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "adapter_layer_names")]
