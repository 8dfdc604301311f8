"""The released CT-CLIP checkpoint: what it holds beyond the model, and what others wrap around it."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from medctkit.common.text import listed
from medctkit.model.weights import read_weights, refuse_bad_numbers, refuse_other_shapes

_ANCHOR = "to_visual_latent.weight"  # every state dict of a CT-CLIP has it


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
) -> dict[str, torch.Tensor]:
    """The live tensors of a state dict, or of what a file holds, if it fits `layout`.

    Tensors that are never used may be missing. What trainers wrap around a state dict is taken off: a dict in a dict,
    and a prefix of all names, such as "module.".

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `read_weights`; not tensors by name; other tensors than those of `layout`; see
            `refuse_bad_numbers`.
    """
    state: Any = source if isinstance(source, Mapping) else read_weights(source)
    name = "the state dict" if state is source else str(source)
    state = _unwrapped(state, name)
    if not isinstance(state, Mapping) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        keys = f" with keys {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, Mapping) else ""
        raise ValueError(f"{name} holds a {type(state).__name__}{keys}; expected a state dict, as of CT-CLIP_v2.pt")
    expected = {key: entry.shape for key, entry in layout.items() if entry.live or key in state}
    refusal = f"{name} is not a CT-CLIP of these sizes; pass the config it was made with, or the released CT-CLIP_v2.pt"
    refuse_other_shapes(state, expected, refusal)
    live = {key: state[key] for key, entry in layout.items() if entry.live}
    refuse_bad_numbers(live, name)
    return live


def _unwrapped(state: Any, name: str) -> Any:
    """The state dict in what a trainer saved, under the names of the released one."""

    def prefixes(of: Any) -> list[str]:
        keys = [str(key) for key in of] if isinstance(of, Mapping) else []
        return [key.removesuffix(_ANCHOR) for key in keys if key == _ANCHOR or key.endswith(f".{_ANCHOR}")]

    if isinstance(state, Mapping) and not prefixes(state):
        inside = {key: value for key, value in state.items() if prefixes(value)}
        if len(inside) > 1:
            raise ValueError(f"{name} holds several models: {', '.join(map(repr, inside))}; pass the one you mean")
        state = next(iter(inside.values()), state)
    found = prefixes(state)
    if not found or "" in found:
        return state
    beside = [key for key in state if not str(key).startswith(found[0])]
    if beside:
        raise ValueError(
            f"{name} holds a CT-CLIP under {found[0]!r}, and beside it what there is no place for:\n{listed(beside)}\n"
            f"To use the CT-CLIP alone, pass {{name.removeprefix({found[0]!r}): tensor}} of the tensors under it"
        )
    return {key.removeprefix(found[0]): tensor for key, tensor in state.items()}
