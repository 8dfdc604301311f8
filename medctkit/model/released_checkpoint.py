"""The released CT-CLIP checkpoint: reading it, what it holds beyond the model, and refusing what is something else."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch


class ReleasedTensor(NamedTuple):
    """A tensor of the released state dict: its shape, "parameter" or "buffer", and whether it is ever used."""

    shape: tuple[int, ...]
    kind: str
    live: bool


def never_used(v: Mapping, text: Mapping, projection_dim: int) -> dict[str, ReleasedTensor]:
    """Tensors of the released state dict that never take part in the forward pass.

    A pooler, second projections, a decoder to pixels, an embedding for single frames, a norm and an empty
    key-value pair in each attention, statistics of the codebook's training, and (in older checkpoints) BERT's
    position index.

    Args:
        v: the complete `vision_config` of a `CTCLIPConfig`.
        text: its complete `text_config`.
        projection_dim: its `projection_dim`.
    """
    dim, hidden, patch = v["dim"], text["hidden_size"], v["patch_size"] ** 2
    voxels = patch * v["temporal_patch_size"]
    rows, columns = [v["image_size"]] * 2 if isinstance(v["image_size"], int) else v["image_size"]
    parameters = {
        "text_transformer.pooler.dense.weight": (hidden, hidden),
        "text_transformer.pooler.dense.bias": (hidden,),
        "to_text_latent_extra.weight": (projection_dim, hidden),
        "to_visual_latent_extra.weight": (projection_dim, rows * columns // patch * dim),
    }
    vision = {
        "to_patch_emb_first_frame.1": [(patch,), (patch,)],
        "to_patch_emb_first_frame.2": [(dim, patch), (dim,)],
        "to_patch_emb_first_frame.3": [(dim,), (dim,)],
        "to_pixels_first_frame.0": [(patch, dim), (patch,)],
        "to_pixels.0": [(voxels, dim), (voxels,)],
    }
    for name, (weight, bias) in vision.items():
        parameters[f"visual_transformer.{name}.weight"] = weight
        parameters[f"visual_transformer.{name}.bias"] = bias
    buffers = {
        "visual_transformer.vq._codebook.cluster_size": (1, v["codebook_size"]),
        "visual_transformer.vq._codebook.initted": (1,),
        "text_transformer.embeddings.position_ids": (1, text["max_position_embeddings"]),
    }
    for tower in ("spatial", "temporal"):
        for i in range(v[f"{tower}_depth"]):
            attention = f"visual_transformer.enc_{tower}_transformer.layers.{i}.1"
            parameters[f"{attention}.context_norm.gamma"] = (dim,)
            parameters[f"{attention}.null_kv"] = (v["heads"], 0, v["dim_head"])
            buffers[f"{attention}.context_norm.beta"] = (dim,)
    layout = {name: ReleasedTensor(shape, "parameter", False) for name, shape in parameters.items()}
    return layout | {name: ReleasedTensor(shape, "buffer", False) for name, shape in buffers.items()}


def read_checkpoint(path: str | os.PathLike) -> object:
    """Read a .safetensors file, or one that `torch.save` wrote; no code in it is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; expected a .pt or .safetensors file (`medctkit download --weights` fetches it)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors alike
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error)
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to run the code
            reason = "it holds pickled Python code, or is no checkpoint at all"
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {reason}. Only tensors are read, never code. If it should be "
            "one, it is damaged: download it again"
        ) from error


def state_dict_of(source: str, state: object, layout: Mapping[str, ReleasedTensor]) -> Mapping[str, torch.Tensor]:
    """What was read from `source`, if it fits `layout` name by name and shape by shape; never used ones may be missing.

    Raises:
        ValueError: not tensors by name; or tensors missing, unexpected or misshapen, all of them listed.
    """
    if not isinstance(state, Mapping) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(
            f"{source} holds {_describe(state)}; expected a state dict, tensors by name, such as CT-CLIP_v2.pt"
        )
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = {
        "missing": [f"{n} {e.shape}" for n, e in layout.items() if e.live and n not in found],
        "unexpected": [f"{name} {shape}" for name, shape in found.items() if name not in layout],
        "misshapen": [
            f"{name}: checkpoint {shape}, model {layout[name].shape}"
            for name, shape in found.items()
            if name in layout and shape != layout[name].shape
        ],
    }
    if not any(problems.values()):
        return state
    lines = []
    for kind, names in problems.items():
        if names:
            lines.append(f"{len(names)} {kind}:")
            lines += [f"  {name}" for name in names[:10]]
            lines += [f"  ... and {len(names) - 10} more"] if len(names) > 10 else []
    raise ValueError(
        f"{source} is not a CT-CLIP checkpoint of these sizes; pass the config it was made with, or the released "
        "CT-CLIP_v2.pt. Tensors that differ:\n" + "\n".join(lines)
    )


def _describe(thing: object) -> str:
    if isinstance(thing, Mapping):
        return f"a {type(thing).__name__} with keys {', '.join(map(repr, list(thing)[:5]))}"
    return f"a {type(thing).__name__}"
