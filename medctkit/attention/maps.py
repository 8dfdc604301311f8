"""Where CT-CLIP looks: its attention, rolled out through both transformers, and what speaks for a prompt.

The vision tower attends twice: within each slab of patches (spatial), then along depth at each place (temporal). The
text never meets the image inside the network, only in the last dot product, so raw attention and rollout are the same
for every prompt; gradient-weighted relevance is not.

Sources: attention rollout, Abnar & Zuidema 2020 (arXiv 2005.00928); gradient-weighted relevance, Chefer et al. 2021
(arXiv 2103.15679), written for one transformer with a class token. Carried over here to two transformers in a row that
end in a linear map of all tokens. Position convolutions and feed-forward layers, which also move things about, are left
out by all of them.

Shapes: t, h, w patches along the model's axes (z, x, y); n = h * w; c channels; p = projection_dim.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medctkit.model.protocol import Model
from medctkit.model.vision_tower import Attention as AttentionLayer
from medctkit.scans.heat_map import HeatMap
from medctkit.scans.preprocessing import PreprocessConfig, model_affine
from medctkit.scans.volumes import CTVolume
from medctkit.zero_shot.classifier import evaluating, words_of

PARTS = ("spatial", "temporal")


@dataclass(frozen=True)
class Attention:
    """The attention of one volume, in every layer and head of the vision tower; each row is a probability."""

    spatial: list[torch.Tensor]  # for each layer (t, heads, n queries, n keys)
    temporal: list[torch.Tensor]  # for each layer (n, heads, t queries, t keys)
    grid: tuple[int, int, int]  # (t, h, w)

    @property
    def heads(self) -> int:
        """Heads of each layer."""
        return self.spatial[0].shape[1]

    def of_query(self, part: str, layer: int, head: int | None, token: Sequence[int]) -> np.ndarray:
        """What one patch (t, i, j), the `token`, attends to: (t, h, w), sum 1.

        It is zero outside of the patch's slab (`part` "spatial") or column ("temporal"). A `head` of None is the mean
        of all.

        Raises:
            ValueError, IndexError: no such part; no such layer, head or patch.
        """
        maps = self._chosen(part, layer, head)
        if len(token) != 3 or not all(0 <= i < n for i, n in zip(token, self.grid, strict=True)):
            raise IndexError(f"patch {tuple(token)}: the model has {' x '.join(map(str, self.grid))} patches (t, h, w)")
        (t, i, j), (_, h, w) = token, self.grid
        found = np.zeros(self.grid, np.float32)
        if part == "spatial":
            found[t] = maps[t, i * w + j].reshape(h, w)
        else:
            found[:, i, j] = maps[i * w + j, t]
        return found

    def received(self, part: str, layer: int, head: int | None = None) -> np.ndarray:
        """How much attention each patch gets, on average over all that ask: (t, h, w), sum 1."""
        maps = self._chosen(part, layer, head).mean(1)  # spatial (t, n), temporal (n, t)
        t, h, w = self.grid
        found = maps.reshape(t, h, w) if part == "spatial" else maps.reshape(h, w, t).transpose(2, 0, 1)
        return found / found.sum()

    def rollout(self) -> np.ndarray:
        r"""How much each patch takes part in the mean of all output tokens: (t, h, w), sum 1.

        In each transformer $R = \hat A_L \cdots \hat A_1$ with $\hat A = (\bar A + I) / 2$ and $\bar A$ the mean of the
        heads: half of a token is the residual connection. A patch (t', s') is then reached by way of each (t', s):
        $$ r_{t's'} = \frac{1}{t n} \sum_{t, s} R^\text{temporal}_s[t, t'] \, R^\text{spatial}_{t'}[s, s']. $$
        """
        spatial, temporal = _rolled(self.spatial), _rolled(self.temporal)  # (t, n, n), (n, t, t)
        even = torch.full((1, *temporal.shape[:2]), 1 / temporal.shape[:2].numel())
        return _through(even, temporal[None], spatial[None], self.grid)[0]

    def _chosen(self, part: str, layer: int, head: int | None) -> np.ndarray:
        """The maps of one layer and head, (batch, queries, keys)."""
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}; choose one of {', '.join(PARTS)}")
        layers = self.spatial if part == "spatial" else self.temporal
        if not 0 <= layer < len(layers):
            raise IndexError(f"{part} layer {layer}: the model has layers 0 to {len(layers) - 1}")
        if head is None:
            return layers[layer].mean(1).numpy()
        if not 0 <= head < self.heads:
            raise IndexError(f"head {head}: the model has heads 0 to {self.heads - 1}")
        return layers[layer][:, head].numpy()


def attend(model: Model, pixels: torch.Tensor) -> Attention:
    """Capture the attention of one volume: the very probabilities with which the model computes.

    At full size the maps take 1.1 GB. Only this call computes them; otherwise the model goes the quick way, which
    never has them in memory.

    The `model` is a `CTCLIPModel`, with or without an adapter; `pixels` (1, D, H, W) are as `preprocess` gives them, or
    a batch of one.

    Raises:
        ValueError: another shape, or more than one volume; a base model of another architecture.
    """
    if not has_rollout(model):
        raise ValueError(
            "maps of attention and their rollout are those of CT-CLIP, which attends within slabs of patches and along "
            "depth. This model's patches all attend to each other, in one matrix of (patches, patches) for each head "
            "and layer, too large to look at: see what speaks for a sentence, with relevance(), instead"
        )
    pixels = _one_volume(pixels)
    with evaluating(model), _explicit(model) as layers:
        model.encode_image(pixels.to(model.temperature.device))
    spatial, temporal = ([kept.float().cpu() for kept in layers[part]] for part in PARTS)
    return Attention(spatial, temporal, model.config.grid)


def relevance(
    model: Model, tokenizer: Any, pixels: torch.Tensor, stating: str, denying: str | None = None
) -> np.ndarray:
    r"""What in a volume speaks for a sentence, and against its denial: (t, h, w), at least 0, sum 1.

    With the score $y = e^\tau v^\top (t_+ - t_-)$, in each layer
    $\bar A = \mathrm{E}_\text{heads}\,(\nabla_{\!A}\, y \odot A)^+$ and $R \leftarrow R + \bar A R$ from $R = I$. Each
    output token starts with what it adds to the score, $(\nabla_{\!z}\, y \cdot z)^+$. The quantiser is passed straight
    through, as in training. The full-size model needs 8 GB for it, and on a CPU the time of four or five encodings.
    Of a model with `patches` in place of CT-CLIP's transformers, such as COLIPRI, it is what each patch adds to the
    score, $(\nabla_{\!z}\, y \cdot z)^+$, where it enters the pooling, not followed back through the layers before:
    the time of one encoding.

    `model` and `pixels` are those of `attend`; `stating` is for instance "Pleural effusion is present."; without
    `denying` the sentence counts alone.

    Raises:
        ValueError: an empty sentence, or one longer than the text encoder's positions; volumes of another shape.
    """
    sentences = [stating] if denying is None else [stating, denying]
    for sentence in sentences:
        if not isinstance(sentence, str) or not sentence.strip():
            raise ValueError(f"the sentence is {sentence!r}; expected words, such as 'Pleural effusion is present.'")
    words, device = words_of(model, tokenizer, sentences), model.temperature.device
    with evaluating(model):
        embeds = model.encode_text(words["input_ids"].to(device), words["attention_mask"].to(device)).float()
    direction = embeds[0] if denying is None else embeds[0] - embeds[1]
    return relevance_maps(model, _one_volume(pixels), direction[None])[0]


def relevance_maps(model: Model, pixels: torch.Tensor, directions: torch.Tensor) -> np.ndarray:
    """`relevance` of several volumes (b, 1, D, H, W), each for a direction of its own (b, p): (b, t, h, w).

    Directions (b, k, p), k for each volume, which is encoded once for all of them, give (b, k, t, h, w).

    Raises:
        ValueError: a base model that has neither CT-CLIP's transformers nor `patches`.
    """
    device = model.temperature.device
    of = _followed_back if has_rollout(model) else _added_by_patches
    found = of(model, pixels.to(device), directions.to(device).reshape(len(pixels), -1, directions.shape[-1]))
    total = found.sum((2, 3, 4), keepdims=True)
    found = np.divide(found, total, out=np.full_like(found, 1 / found[0, 0].size), where=total > 0)
    return found if directions.ndim == 3 else found[:, 0]


def _followed_back(model: Model, pixels: torch.Tensor, directions: torch.Tensor) -> np.ndarray:
    """Through both transformers of CT-CLIP, for directions (b, k, p): (b, k, t, h, w)."""
    z, found, b = list[torch.Tensor](), [], len(pixels)
    with evaluating(model), torch.enable_grad(), _explicit(model) as layers:
        with model.vision_encoder.register_forward_hook(lambda module, given, out: z.append(out)):
            image = model.encode_image(pixels.requires_grad_())
        scores = model.temperature.exp() * (image[:, None] * directions).sum((0, 2))  # (k,)
        kept, n = [*layers["spatial"], *layers["temporal"]], len(layers["spatial"])
        for k, score in enumerate(scores):
            gradients = torch.autograd.grad(score, [*kept, *z], retain_graph=k + 1 < len(scores))
            tokens = (gradients[-1] * z[0].detach()).sum(-1).clamp(min=0).flatten(2)  # (b, t, n)
            spatial = _related(layers["spatial"], gradients[:n]).unflatten(0, (b, -1))  # (b, t, n, n)
            temporal = _related(layers["temporal"], gradients[n:-1]).unflatten(0, (b, -1))  # (b, n, t, t)
            found.append(_through(tokens.transpose(1, 2), temporal, spatial, model.config.grid))
    return np.stack(found, 1)


def _added_by_patches(model: Model, pixels: torch.Tensor, directions: torch.Tensor) -> np.ndarray:
    """Of a model whose `patches` puts out a vector for each patch, (b, c, t, h, w): (b, k, t, h, w)."""
    if not hasattr(model, "patches"):
        raise ValueError("this base model does not say where its patches are, so there is no map of them")
    z = list[torch.Tensor]()

    def start_here(module: torch.nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(True)  # nothing before the patches is kept for a backward pass
        z.append(out.detach().requires_grad_())
        return z[0]

    with evaluating(model), model.patches.register_forward_hook(start_here):
        scores = model.temperature.exp() * (model.encode_image(pixels)[:, None] * directions).sum((0, 2))  # (k,)
    gradients = [torch.autograd.grad(score, z, retain_graph=True)[0] for score in scores]
    return torch.stack([(g * z[0]).sum(1).clamp(min=0) for g in gradients], 1).detach().float().cpu().numpy()


def patch_map(
    values: np.ndarray, volume: CTVolume, preprocess_config: PreprocessConfig, name: str = "attention"
) -> HeatMap:
    """A map of patches (t, h, w), on the model's axes, over the scan that `preprocess` was given, with its `name`.

    Raises:
        ValueError: a map whose patches do not divide the model's input.
    """
    shape = np.shape(values)
    if len(shape) != 3 or any(n % g for n, g in zip(preprocess_config.shape, shape, strict=True)):
        sees = preprocess_config.shape
        raise ValueError(f"map of shape {shape} for a model that sees {sees} voxels; is it the map of another model?")
    return HeatMap(values, _patch_affine(volume, preprocess_config, shape), name)


def patch_at(
    point_mm: Sequence[float], volume: CTVolume, preprocess_config: PreprocessConfig, grid: Sequence[int]
) -> tuple[int, int, int] | None:
    """The patch (t, i, j) that holds a point of the patient (RAS, mm); None outside of what the model sees."""
    index = np.linalg.inv(_patch_affine(volume, preprocess_config, grid)) @ [*point_mm, 1]
    t, i, j = (int(n) for n in np.floor(index[:3] + 0.5))
    return (t, i, j) if all(0 <= p < n for p, n in zip((t, i, j), grid, strict=True)) else None


def _patch_affine(volume: CTVolume, preprocess_config: PreprocessConfig, grid: Sequence[int]) -> np.ndarray:
    """From a patch's index to its middle in the patient."""
    size = np.array(preprocess_config.shape) / np.array(grid)
    to_voxel = np.diag([*size, 1.0])
    to_voxel[:3, 3] = (size - 1) / 2
    return model_affine(volume, preprocess_config) @ to_voxel


def _one_volume(pixels: torch.Tensor) -> torch.Tensor:
    pixels = pixels[None] if pixels.ndim == 4 else pixels
    if pixels.ndim != 5 or len(pixels) != 1:
        raise ValueError(f"volumes of shape {tuple(pixels.shape)}: expected one, (1, D, H, W), as preprocess gives it")
    return pixels


def has_rollout(model: Model) -> bool:
    """Whether a model has CT-CLIP's two transformers, whose attention `attend` captures."""
    return hasattr(model.vision_encoder, "attention_layers")


@contextmanager
def _explicit(model: Model) -> Iterator[dict[str, list[torch.Tensor]]]:
    """For a while, attention goes by way of its probabilities, and they are kept; the quantiser lets gradients pass."""
    vision = model.vision_encoder
    layers = [(layer, part) for part, of in vision.attention_layers().items() for layer in of]
    kept: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}

    def keeping(layer: AttentionLayer, part: str) -> Callable[..., torch.Tensor]:
        def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            kept[part].append(layer.probabilities(q, k, bias))
            return kept[part][-1].to(v.dtype) @ v

        return mix

    def straight_through(x: torch.Tensor) -> torch.Tensor:
        return x + (type(vision.vq).forward(vision.vq, x) - x).detach()

    try:
        for layer, part in layers:
            layer.mix = keeping(layer, part)
        vision.vq.forward = straight_through
        yield kept
    finally:
        vars(vision.vq).pop("forward", None)
        for layer, _ in layers:
            vars(layer).pop("mix", None)


def _rolled(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rollout of the layers of one transformer: (batch, tokens, tokens)."""
    identity = rolled = torch.eye(layers[0].shape[-1])
    for layer in layers:
        rolled = (layer.mean(1) + identity) / 2 @ rolled
    return rolled


def _related(layers: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gradient-weighted relevance through the layers of one transformer: (batch, tokens, tokens)."""
    related = torch.eye(layers[0].shape[-1], device=layers[0].device)
    for layer, gradient in zip(layers, gradients, strict=True):
        related = related + (gradient * layer.detach()).clamp(min=0).mean(1) @ related
    return related


def _through(
    weights: torch.Tensor, temporal: torch.Tensor, spatial: torch.Tensor, grid: tuple[int, int, int]
) -> np.ndarray:
    """Weights of the output tokens (b, n, t) back through both transformers: (b, t, h, w).

    `temporal` is (b, n, t, t), `spatial` (b, t, n, n); of each, rows are outputs and columns inputs.
    """
    between = torch.einsum("bst,bstu->bus", weights, temporal)  # (b, t, n): what each place gets of each slab
    found = torch.einsum("bts,btsr->btr", between, spatial)
    return found.unflatten(-1, grid[1:]).detach().float().cpu().numpy()
