"""The released CT-CLIP checkpoint: reading it, what it holds beyond the model, and refusing what is something else."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from medctkit.model.fingerprint import different_shapes


class ReleasedTensor(NamedTuple):
    """A tensor of the released state dict: its shape, "parameter" or "buffer", and whether it is ever used."""

    shape: tuple[int, ...]
    kind: str
    live: bool


def never_used(v: Mapping, text: Mapping, live: Mapping[str, ReleasedTensor]) -> dict[str, ReleasedTensor]:
    """Tensors of the released state dict that never take part in the forward pass.

    A pooler, second projections, a decoder to pixels, an embedding for single frames, a norm and an empty key-value
    pair in each attention, statistics of the codebook's training, and (in older checkpoints) BERT's position index.

    Args:
        v: the complete `vision_config` of a `CTCLIPConfig`.
        text: its complete `text_config`.
        live: the tensors that do.
    """
    dim, hidden, patch = v["dim"], text["hidden_size"], v["patch_size"] ** 2
    voxels = patch * v["temporal_patch_size"]
    parameters = {
        "text_transformer.pooler.dense.weight": (hidden, hidden),
        "text_transformer.pooler.dense.bias": (hidden,),
        "to_text_latent_extra.weight": live["to_text_latent.weight"].shape,
        "to_visual_latent_extra.weight": live["to_visual_latent.weight"].shape,
    }
    for name, *weight in (
        ("to_patch_emb_first_frame.1", patch),
        ("to_patch_emb_first_frame.2", dim, patch),
        ("to_patch_emb_first_frame.3", dim),
        ("to_pixels_first_frame.0", patch, dim),
        ("to_pixels.0", voxels, dim),
    ):
        parameters[f"visual_transformer.{name}.weight"] = tuple(weight)
        parameters[f"visual_transformer.{name}.bias"] = (weight[0],)
    buffers = {
        "visual_transformer.vq._codebook.cluster_size": (1, v["codebook_size"]),
        "visual_transformer.vq._codebook.initted": (1,),
        "text_transformer.embeddings.position_ids": (1, text["max_position_embeddings"]),
    }
    for name in live:
        if name.endswith(".q_scale"):  # of each attention
            attention = name.removesuffix(".q_scale")
            parameters[f"{attention}.context_norm.gamma"] = (dim,)
            parameters[f"{attention}.null_kv"] = (v["heads"], 0, v["dim_head"])
            buffers[f"{attention}.context_norm.beta"] = (dim,)
    kinds = {"parameter": parameters, "buffer": buffers}
    return {name: ReleasedTensor(shape, kind, False) for kind, of in kinds.items() for name, shape in of.items()}


def released_state_dict(
    source: str | os.PathLike | Mapping[str, torch.Tensor], layout: Mapping[str, ReleasedTensor]
) -> Mapping[str, torch.Tensor]:
    """A state dict, or what a file holds, if it fits `layout`; tensors that are never used may be missing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one with pickled code; not tensors by name; other tensors than those of `layout`.
    """
    state = source if isinstance(source, Mapping) else _read(Path(source))
    name = "the state dict" if state is source else str(source)
    if not isinstance(state, Mapping) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        keys = f" with keys {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, Mapping) else ""
        raise ValueError(
            f"{name} holds a {type(state).__name__}{keys}; expected a state dict, tensors by name, as of CT-CLIP_v2.pt"
        )
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = different_shapes(found, {name: e.shape for name, e in layout.items() if e.live or name in found})
    if wrong:
        raise ValueError(
            f"{name} is not a CT-CLIP checkpoint of these sizes; pass the config it was made with, or the released "
            f"CT-CLIP_v2.pt. Tensors that differ:\n{wrong}"
        )
    return state


def _read(path: Path) -> object:
    """What a .safetensors file holds, or one that `torch.save` wrote; no code in it is run."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; expected a .pt or .safetensors file (`medctkit download --weights` fetches it)"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors alike
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to run the code
            reason = "it holds pickled Python code, or is no checkpoint at all"
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {reason}. Only tensors are read, never code. If it should be "
            "one, it is damaged: download it again"
        ) from error
