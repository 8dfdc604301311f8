"""Memory of a training step: how much it takes, and frozen weights in half precision to take less.

`PeakMemory` also works on tensors without data (FakeTensorMode), for a full-size step on a machine that could never
run it.
"""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors in nested lists, tuples and dicts, each once, by address of their C++ part."""
    found = (leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
    return {storage._cdata: storage for storage in found}


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors that are alive in a block, now and at their highest.

    Counted are the storages given as `alive`, and each one that an operation in the block makes, until nothing refers
    to it any more: activations that wait for the backward pass, gradients, optimiser state. A storage counts once,
    however many views there are of it. Not counted: what an operation takes for itself while it runs, and what an
    allocator keeps in reserve or loses to rounding.

    Tensors without data count as if they had some; enter their FakeTensorMode first.

    Attributes:
        now_bytes: of what is alive now.
        peak_bytes: the highest it has been.
    """

    def __init__(self, alive: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self._known: dict[int, tuple[int, weakref.ref]] = {}  # address: bytes, and what notices the end
        self._count(_storages(list(alive)))

    def _count(self, storages: dict[int, torch.UntypedStorage]) -> None:
        for address, storage in storages.items():
            known = self._known[address][0] if address in self._known else 0
            if storage.nbytes() != known or address not in self._known:  # new, or resized
                self.now_bytes += storage.nbytes() - known
                self._known[address] = (storage.nbytes(), weakref.ref(storage, partial(self._forget, address)))
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _forget(self, address: int, _: weakref.ref) -> None:
        self.now_bytes -= self._known.pop(address)[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # a view of a tensor from outside, or a change to it in place, makes nothing; torch.tensor([...]) does
        given = {} if func is torch.ops.aten.lift_fresh.default else _storages((args, kwargs))
        self._count({a: s for a, s in _storages(out).items() if a in self._known or a not in given})
        return out


def cast_frozen(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    """Keep frozen weights in half precision, in place, where autocast would round them at every call anyway.

    These are the frozen weights and biases of linear layers and 3D convolutions, an adapter's base layers included.
    Under autocast to `dtype` results and gradients stay the same bit for bit; without it the model no longer runs as
    it was, so use it under autocast from here on. Everything else stays float32: whatever is trained, adapters, norms,
    embeddings, the codebook, the relative-position bias (computed outside autocast), and base layers whose adapter
    reads their weight itself (DoRA). To merge an adapter, put it on a base model that was not cast.

    With float16 weights end at 65,504. Its small gradients vanish unless the loss is scaled, as accelerate does;
    bfloat16 has the range of float32 and needs neither care.

    Returns:
        Bytes saved.

    Raises:
        ValueError: a dtype other than these two; a weight that float16 cannot hold. Nothing is cast then.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"frozen weights can be kept in torch.bfloat16 or torch.float16, got {dtype}")
    kept: set[nn.Module] = set()
    module: Any  # one of peft's has what torch's lacks
    for module in model.modules():
        if getattr(module, "full_precision", False):  # computed outside autocast
            kept.update(module.modules())
        elif hasattr(module, "adapter_layer_names"):  # one of peft's layers
            plain_lora = hasattr(module, "lora_A") and not len(module.lora_magnitude_vector)
            base = set(module.base_layer.modules()) if plain_lora else set()
            kept.update(set(module.modules()) - base)
    frozen = {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv3d) and module not in kept
        for key, parameter in module.named_parameters(recurse=False)
        if not parameter.requires_grad and parameter.dtype == torch.float32
    }
    if dtype == torch.float16:
        for name, parameter in frozen.items():
            if not (largest := parameter.abs().max()) <= torch.finfo(dtype).max:
                raise ValueError(
                    f"{name} holds {largest:g}, more than float16 can (65,504), and would become infinite; "
                    "keep the weights in torch.bfloat16 instead"
                )
    for parameter in frozen.values():
        parameter.data = parameter.data.to(dtype)
    return sum(parameter.numel() for parameter in frozen.values()) * (4 - dtype.itemsize)
