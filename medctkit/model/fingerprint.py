"""Which weights and words these are: digests over every value, so that they differ if any does."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from medctkit.common.digests import digest_of_facts
from medctkit.model.protocol import Model


def digests(model: Model) -> tuple[str, str]:
    """Digests of the base model and of the active adapter, "none" if there is none; 0.6 s for each GB.

    The same base model has the same digest with and without an adapter; a merged adapter makes another base model. An
    adapter that is switched off counts as none.
    """
    base, adapter, adapted = hashlib.sha256(), hashlib.sha256(), False
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")}
    for name, tensor in model.state_dict().items():
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if owner is None:
            add_tensor(base, name, tensor)
            continue
        head, *rest = name.removeprefix(f"{owner}.").split(".")
        if head in ("base_layer", "original_module"):  # as peft calls what it wraps
            add_tensor(base, ".".join([owner, *rest]), tensor)
            continue
        layer = layers[owner]
        active = [] if layer.disable_adapters else [a for a in layer.active_adapters if a in rest]
        if active:  # whatever it is called; alpha / r is in no tensor
            adapted, scale = True, getattr(layer, "scaling", {}).get(active[0])
            add_tensor(adapter, f"{owner} {head} {[part for part in rest if part not in active]} {scale}", tensor)
    return base.hexdigest()[:32], adapter.hexdigest()[:32] if adapted else "none"


def add_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add name, type, shape and every value of a tensor to a digest of hashlib."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def digest_of_tensors(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """A digest of a text, and of tensors as `add_tensor` takes them, by name."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        add_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def vocabulary_of(tokenizer: Any) -> str:
    """Digest of a tokenizer: its words by number, and what it makes of capitals, accents, figures and marks."""
    words = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    made = tokenizer(["No Pleural effusion; naïve, 3.5 cm (RLL)?"])["input_ids"]
    return digest_of_facts([words, [list(map(int, ids)) for ids in made]])
