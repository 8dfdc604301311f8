"""From a base model and its adapter to a folder that runs without PyTorch, proven equal before it is written.

The adapter is merged into the vision tower. Of the text tower only what it says of the prompts is needed: for each
finding the difference of two embeddings.
"""

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medctkit.common.atomic import write_text
from medctkit.common.extras import require
from medctkit.common.provenance import made_with, write_json
from medctkit.common.templates import filled
from medctkit.deploy.exported import FACTS, PROMPTS, VISION, Exported, sealed
from medctkit.lora.adapter import merge_lora
from medctkit.model.fingerprint import digests, vocabulary_of
from medctkit.model.vision_tower import VisionTransformer
from medctkit.zero_shot.classifier import ZeroShotClassifier, evaluating
from medctkit.zero_shot.prompts import Prompts

TOLERANCE = 1e-6  # of an embedding's numbers
TIE = 2e-6  # difference of two cosines that rounding decides
OPSET = 20
NEEDED = ("onnx", "onnxscript", "onnxruntime")
_OWN, _OWN_BEGIN = {FACTS, PROMPTS, "README.md", "text"}, ("vision.", ".export-")  # of an export, half of one as well


class ExportDiffers(ValueError):
    """What was exported does not compute what the model computes; nothing was written."""


class Vision(nn.Module):
    """Volumes (b, 1, d, h, w) to embeddings (b, p), and to the index of each token's code (b, t * h * w)."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, volumes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (b, p) and codes (b, t * h * w) of volumes (b, 1, d, h, w)."""
        tower = self.model.vision_encoder
        tokens = tower.encode(volumes)  # (b, t, h, w, c)
        codes = tower.vq.nearest(tokens)
        return self.model.embed_tokens(tower.vq.vectors(codes, tokens)), codes.flatten(1)


def export(
    model: Any, tokenizer: Any, folder: str | os.PathLike, prompts: Prompts = "paper", text: bool = False
) -> Path:
    """Write vision tower, prompts, pre-processing and digests to `folder`, as `Exported` reads them.

    The `model` is a CT-CLIP, with an adapter or without, and is left as it is. An export in `folder` is replaced as a
    whole, or left as it was. With `text`, it has the text tower and its vocabulary too, for other prompts later.

    Raises:
        ValueError: a model whose vision tower is not CT-CLIP's; `folder` holds something else.
        ExportDiffers: an embedding off by more than 1e-6, or a token with another code, for a batch of 1, 2 or 3; see
            `prove`.
        ImportError: the extra [deploy] is not installed.
    """
    require("deploy", *NEEDED)
    if not isinstance(getattr(model, "vision_encoder", None), VisionTransformer):
        raise ValueError(f"{type(model).__name__} has no vision tower of CT-CLIP, which alone can be exported")
    base, adapter = digests(model)
    classifier = ZeroShotClassifier(model, tokenizer, prompts)
    stating, denying = classifier.text_embeds()
    plain: Any = merge_lora(model)
    if plain.temperature.device.type != "cpu":  # whoever gave it goes on with it where it is
        plain = copy.deepcopy(plain).cpu()
    config = plain.preprocess_config
    facts: dict[str, Any] = {
        "findings": classifier.findings,
        "input": {"shape": config.shape, "spacing": config.spacing, "hu_range": config.hu_range, "axes": config.axes},
        "base": base, "adapter": adapter, "vocabulary": vocabulary_of(tokenizer),
        "prompts": prompts if isinstance(prompts, str) else "own", "made_with": made_with(0, "none"),
    }  # fmt: skip
    with replacing_export(folder) as building:
        difference = (stating - denying).cpu().numpy()
        scale = np.float32(plain.temperature.detach().exp())
        np.savez(building / PROMPTS, differences=difference, scale=scale)
        shape = (1, *config.shape)
        with evaluating(plain):
            vision = Vision(plain).eval()
            example, outputs = {"volumes": torch.zeros(2, *shape)}, ["embeds", "codes"]
            _save(vision, example, _sizes(), outputs, building / VISION)
            write_json(sealed(facts, building), building / FACTS)
            facts["checked"] = prove(Exported(building), vision, shape)
        if text:
            tokenizer.save_pretrained(building / "text")
            _text_to_onnx(plain, tokenizer, building / "text" / "text.onnx")
        write_facts(building, facts)
    return Path(folder).expanduser()


@contextmanager
def replacing_export(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to write an export to, whose files go to `folder` at the end of the block, or nothing happens.

    Those of an earlier export are taken away; what else lies there stays. The last to come is `FACTS`, without which a
    folder is no export. The folder itself stays the same: it may be a mount point.

    Raises:
        ValueError: a folder that holds something else than an export.
    """
    folder = Path(folder).expanduser()
    made, there = not folder.exists(), [path.name for path in folder.iterdir()] if folder.exists() else []
    own = [name for name in there if name in _OWN or name.startswith(_OWN_BEGIN)]
    if FACTS not in there and len(own) < len(there):
        raise ValueError(f"{folder} holds something else than an export; give an empty or another folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
            building, old = Path(scratch) / "new", Path(scratch) / "old"
            building.mkdir()
            old.mkdir()
            yield building
            for name in sorted(own, key=lambda name: name != FACTS):
                (folder / name).rename(old / name)
            for path in sorted(building.iterdir(), key=lambda path: path.name == FACTS):
                path.rename(folder / path.name)
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write export.json and, from it, the model card."""
    write_json(sealed(facts, folder), folder / FACTS)
    size = sum(file.stat().st_size for file in folder.glob("vision.*")) / 1e6
    card = filled("export.md", facts=facts, megabytes=size, tolerance=TOLERANCE)
    write_text(folder / "README.md", card)


def prove(exported: Any, vision: nn.Module, shape: tuple[int, ...], seed: int = 0) -> dict[str, float]:
    """Compare an export with the model on noise of a `shape` (1, d, h, w), drawn by a `seed`, in batches of 1, 2 and 3.

    A token that lies as near to two codes, but for rounding, may get either: a tie. Its volume's embedding is left out.

    Returns:
        `largest`, the largest difference of an embedding's number, `codes`, how many were compared, and `ties`.

    Raises:
        ExportDiffers: an embedding or a code differs, or every volume has a tie; see `export`.
    """
    generator, largest, compared, ties, volumes_decided = torch.Generator().manual_seed(seed), 0.0, 0, 0, 0
    for batch in (1, 2, 3):
        coarse = torch.randn(batch, 1, *(max(1, n // 8) for n in shape[1:]), generator=generator)
        smooth = nn.functional.interpolate(coarse, shape[1:], mode="trilinear")
        volumes = (smooth + 0.1 * torch.randn(batch, *shape, generator=generator)).clamp(-1, 1)
        try:
            embeds, codes = exported.embeds_and_codes(volumes.numpy())
        except Exception as error:  # ONNX Runtime raises many
            raise ExportDiffers(f"a batch of {batch} does not run: {error}") from error
        with torch.no_grad():
            own_embeds, own_codes = (y.numpy() for y in vision(volumes))
        other = codes != own_codes
        tied = _ties(vision, volumes, codes, own_codes) if other.any() else other
        flipped, decided = int((other & ~tied).sum()), ~tied.any(1)
        off = float(np.abs(embeds - own_embeds)[decided].max(initial=0))
        if flipped or not off <= TOLERANCE or not np.isfinite(embeds).all():
            raise ExportDiffers(
                f"a batch of {batch}: {flipped} of {codes.size:,} codes flipped, embeddings off by {off:.1g}, allowed "
                f"are none and {TOLERANCE:g}; nothing was written"
            )
        largest, compared, ties = max(largest, off), compared + codes.size, ties + int(tied.sum())
        volumes_decided += int(decided.sum())
    if not volumes_decided:
        raise ExportDiffers(f"every volume has a token between two codes ({ties} in all); nothing was written")
    return {"largest": largest, "codes": compared, "ties": ties}


@torch.no_grad()
def _ties(vision: nn.Module, volumes: torch.Tensor, codes: np.ndarray, own_codes: np.ndarray) -> np.ndarray:
    """Which tokens (b, n) have another code that is as near as their own, but for rounding."""
    model: Any = vision.model
    tower = model.vision_encoder
    tokens = nn.functional.normalize(tower.encode(volumes).flatten(1, -2), dim=-1)  # (b, n, c)
    vectors = nn.functional.normalize(tower.vq._codebook.embed[0], dim=-1)  # (codes, c)
    nearer = ((vectors[torch.from_numpy(own_codes)] - vectors[torch.from_numpy(codes)]) * tokens).sum(-1)
    return (codes != own_codes) & (nearer.abs() <= TIE).numpy()


def _text_to_onnx(model: Any, tokenizer: Any, path: Path) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model.encode_text(input_ids, attention_mask)

    words = tokenizer(["A nodule is seen.", "No."], padding=True, return_tensors="pt")
    example = {name: words[name] for name in ("input_ids", "attention_mask")}
    with evaluating(model):
        _save(Text().eval(), example, _sizes(model.longest_text), ["embeds"], path)


def _sizes(words: int | None = None) -> dict[int, Any]:
    """The axes of an input that may have any size: batch and, of a text, words."""
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    return batch if words is None else batch | {1: torch.export.Dim("words", min=2, max=words)}


def _save(module: nn.Module, example: Mapping[str, torch.Tensor], sizes: dict, outputs: list[str], path: Path) -> None:
    """Write ONNX; the `example` has the inputs, all with the same axes of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        program = torch.onnx.export(
            module, tuple(example.values()), dynamo=True, dynamic_shapes=dict.fromkeys(example, sizes),
            input_names=[*example], output_names=outputs, opset_version=OPSET, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(path)
