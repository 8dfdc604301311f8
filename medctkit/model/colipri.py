"""COLIPRI (Wald et al. 2026, arXiv 2510.15042) as a base model: its own towers, and no code from the hub.

The image tower is Primus, one transformer over all patches of a volume; the text tower is BERT; attention pooling ends
both. PyPI's package `colipri` (MIT) has their classes and sizes. Its loader fetches the text tower with
`trust_remote_code`, which runs Python files of another repository. That tower is a plain BERT, so here transformers'
`BertModel` takes its place, filled from COLIPRI's own safetensors; of the other repository only the words are read.

Shapes: b batch, x y z voxels towards right, front and head, n tokens of one text, p width of the embeddings.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from medctkit.common.extras import require
from medctkit.model.ct_clip import RELEASED_TEXT
from medctkit.model.protocol import Parts, refuse_other_ids, refuse_other_input
from medctkit.model.weights import read_weights, refuse_bad_numbers, refuse_other_shapes
from medctkit.scans.preprocessing import PreprocessConfig

INPUT = PreprocessConfig((2.0, 2.0, 2.0), (192, 192, 192), axes="XYz")  # a test holds it to the library's own
TOKENIZER_FILES = ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
_VISION_LAYER = r"image_encoder\.backbone\.eva\.blocks\.\d+\."
_TEXT_LAYER = r"text_encoder\.backbone\.encoder\.layer\.\d+\."
PARTS = Parts.beside_bert(
    attention={name: rf"{_VISION_LAYER}attn\.{name}" for name in ("q_proj", "k_proj", "v_proj", "proj")},
    mlp={name: rf"{_VISION_LAYER}mlp\.{name}" for name in ("fc1_g", "fc1_x", "fc2")},  # SwiGLU: gate, value, out
    qkv=("q_proj", "k_proj", "v_proj"),
    keys_values=("k_proj", "v_proj"),
    narrowing="fc2",
    bert_layer=_TEXT_LAYER,
    stages={
        "pooling": ("image_encoder.pooler", "image_encoder.projector"),
        "layers": ("image_encoder.backbone.eva",),
        "patches": ("image_encoder.backbone.down_projection",),
    },
)


@dataclass(frozen=True)
class Sizes:
    """What is asked of a model's configuration."""

    grid: tuple[int, ...]  # patches along the model's axes
    projection_dim: int  # p


class Colipri(nn.Module):
    """COLIPRI with the members of `VisionLanguageModel`; names of modules are those of its state dict.

    It is made of a `colipri.model.image.ImageEncoder`, a `colipri.model.text.TextEncoder` around a `BertModel`, and the
    temperature, above 0, that COLIPRI divides similarities by.
    """

    parts = PARTS

    def __init__(self, image_encoder: Any, text_encoder: Any, temperature: float, preprocess_config: PreprocessConfig):
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.temperature = nn.Parameter(-torch.tensor(float(temperature)).log())  # the kit multiplies by exp(t)
        self.preprocess_config = preprocess_config

    @property
    def config(self) -> Sizes:
        """Its sizes."""
        patch, shape = self.image_encoder.patch_size, self.preprocess_config.shape
        return Sizes(tuple(n // side for n, side in zip(shape, patch, strict=True)), self.patches.out_channels)

    @property
    def vision_encoder(self) -> nn.Module:
        """Primus with projection and pooling."""
        return self.image_encoder

    @property
    def patches(self) -> nn.Conv3d:
        """Whose output has a vector for each patch along the model's axes, (b, p, x, y, z); after it comes pooling."""
        return self.image_encoder.projector

    @property
    def longest_text(self) -> int:
        """Tokens that BERT takes at most."""
        return self.text_encoder.backbone.config.max_position_embeddings

    def encode_image(self, volumes: torch.Tensor) -> torch.Tensor:
        """Embed volumes (b, 1, x, y, z), as `preprocess` gives them: (b, p), L2-normalised.

        Raises:
            ValueError: another shape.
        """
        refuse_other_input(volumes, self.preprocess_config.shape)
        return self.image_encoder(volumes, project=True, pool=True, normalize=True)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed token ids (b, n), the mask zero for padding: (b, p), L2-normalised.

        Raises:
            ValueError: longer than the text encoder's positions.
        """
        refuse_other_ids(input_ids, self.longest_text)
        return self.text_encoder(input_ids, attention_mask)

    def gradient_checkpointing_enable(self) -> None:
        """Compute the activations of each layer of Primus again in the backward pass instead of keeping them.

        It has a switch of its own for that, whose call current versions of torch refuse.
        """
        for block in self.image_encoder.backbone.eva.blocks:
            block.forward = partial(checkpoint, type(block).forward.__get__(block), use_reentrant=False)


def build(config: Any, temperature: float = 1.0) -> Colipri:
    """COLIPRI of the library's classes, weights random, in evaluation mode; `config` is its `load_model_config()`."""
    require("open", "colipri")
    from colipri.model.multimodal import instantiate  # hydra's
    from colipri.model.text import TextEncoder

    bert = BertModel(BertConfig(**{"use_cache": False, **RELEASED_TEXT}), add_pooling_layer=False)
    text_encoder = TextEncoder(bert, instantiate(config["text_encoder"]["pooler"]))
    return Colipri(instantiate(config["image_encoder"]), text_encoder, temperature, INPUT).eval()


def from_file(weights: Path, config: Any) -> Colipri:
    """COLIPRI from `weights`, a safetensors file in the layout of the released one; `config` as in `build`.

    Raises:
        ValueError: weights of another model, or damaged; see `read_weights`.
    """
    found = read_weights(weights)
    found = {name: tensor.float() for name, tensor in found.items() if not name.endswith(".position_ids")}  # old BERTs'
    refuse_bad_numbers(found, weights)
    with init_empty_weights():  # no second GB
        model = build(config)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if name != "temperature"}
    message = f"{weights} does not hold the weights of this COLIPRI"
    refuse_other_shapes(found, shapes | {"softmax_temperature": ()}, message)
    model.load_state_dict(found | {"temperature": -found.pop("softmax_temperature").log()}, assign=True)
    return model


def load_colipri() -> tuple[Colipri, Path]:
    """COLIPRI with its released weights, and the folder of its tokenizer.

    Both come once, 1 GB, from the Hugging Face hub (microsoft/colipri, MIT, no account). Tensors and words are read
    from these files; no code in them is run.

    Raises:
        ModuleNotFoundError: the package `colipri` is not installed.
        OSError: no network, and not downloaded yet.
        ValueError: see `from_file`.
    """
    require("open", "colipri")
    from colipri.checkpoint import load_model_config

    config = load_model_config()
    words = config["text_encoder"]["backbone"]  # whose name and revision are wanted, not its code
    where, revision = words["pretrained_model_name_or_path"], words["revision"]
    try:
        weights = hf_hub_download("microsoft/colipri", "model.safetensors")
        folder = [Path(hf_hub_download(where, name, revision=revision)).parent for name in TOKENIZER_FILES][0]
    except OSError as error:
        raise OSError(
            f"COLIPRI could not be downloaded ({error}). It comes once, 1 GB, from the Hugging Face hub and needs no "
            "account; after that HF_HUB_OFFLINE=1 goes without a network"
        ) from error
    return from_file(Path(weights), config), folder
