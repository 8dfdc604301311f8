"""CT-CLIP as a Hugging Face configuration and model: a CT volume and a report into one embedding space.

CT-CLIP (Hamamci et al. 2024, arXiv 2403.17834; vision tower after CT-ViT, arXiv 2305.16037) pairs a 3D
vision transformer that ends in a vector quantiser with BERT, and is trained contrastively as CLIP is. This
is an independent implementation, written from a description of the released model and tested against numbers
that its public code computes. Module names are those of the released state dict, so its weights load by name;
tensors it carries but never uses are listed by `released_layout` and not built.

Shapes: b batch, c channel, d h w depth, rows, columns, t depth patches, n tokens of one sequence.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from transformers.utils import ModelOutput, cached_file, logging

from medctkit.model.ct_clip_parts import COMPONENTS, PARTS
from medctkit.model.fast_paths import quicken
from medctkit.model.processing import CTCLIPProcessor, CTImageProcessor
from medctkit.model.protocol import refuse_other_ids, refuse_other_input
from medctkit.model.released_checkpoint import ReleasedTensor, never_used, released_state_dict
from medctkit.model.vision_tower import Attention, Codebook, ScaleNorm, VisionTransformer
from medctkit.model.weights import write_sum
from medctkit.scans.preprocessing import PreprocessConfig

RELEASED_VISION: dict[str, Any] = {
    "dim": 512,
    "codebook_size": 8192,
    "image_size": 480,
    "num_frames": 240,
    "patch_size": 20,
    "temporal_patch_size": 10,
    "spatial_depth": 4,
    "temporal_depth": 4,
    "dim_head": 32,
    "heads": 8,
    "windows": None,
}
RELEASED_TEXT: dict[str, Any] = {  # BERT-base
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
_LARGEST, _MOST_LAYERS = 1_000_000, 1000  # a size beyond is a mistake, which would fill the memory first
# arguments of `from_pretrained` that say where the files are
_PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class CTCLIPConfig(PretrainedConfig):
    """Sizes of a CT-CLIP; what is left out takes the value of the released model.

    Args:
        vision_config: any of `dim` (token width), `codebook_size`, `image_size` (rows and columns of the
            volume in voxels, an int or [h, w]), `num_frames` (its depth in slices), `patch_size` and
            `temporal_patch_size` (voxels), `spatial_depth` and `temporal_depth` (layers), `dim_head`, `heads`,
            `windows` (pairs of HU, see `vision_tower.Patches`; None: none, as released).
        text_config: any fields of `transformers.BertConfig`.
        projection_dim: width of the shared embedding space.
        vocabulary: digest of the words that the text encoder learnt with (`fingerprint.vocabulary_of`), if known.
        spacing: of the volumes' voxels, mm along their axes (z, x, y); None: the released field of view, 360 mm.

    Raises:
        ValueError: an unknown key, a size that is no whole number from 1 to a million (layers: a thousand), an image
            that does not divide into patches.
    """

    model_type = "ct-clip"

    def __init__(
        self,
        vision_config: dict | None = None,
        text_config: dict | None = None,
        projection_dim: int = 512,
        vocabulary: str | None = None,
        spacing: Sequence[float] | None = None,
        **kwargs,
    ):
        for name, given in (("vision_config", vision_config), ("text_config", text_config)):
            if not isinstance(given, Mapping | None):
                raise ValueError(f"{name} must be a dict, got {type(given).__name__}")
        self.vision_config = RELEASED_VISION | dict(vision_config or {})
        self.text_config = RELEASED_TEXT | dict(text_config or {})
        self.projection_dim, self.vocabulary, self.spacing = projection_dim, vocabulary, spacing
        self._validate()
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "CTCLIPConfig":  # type: ignore[override]
        """Read a config.json, as transformers does.

        Raises:
            OSError: no such folder or repository, or a config.json that is not JSON.
            ValueError: it says something else than the sizes of a CT-CLIP.
        """
        try:
            found = None
            with suppress(AttributeError, TypeError):
                found, _ = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if not isinstance(found, dict):
                raise ValueError("it holds no names with values")
            if (kind := found.get("model_type")) != cls.model_type:
                raise ValueError(f"model_type is {kind!r}, expected {cls.model_type!r}")
            config = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            if not getattr(config.dtype or torch.float32, "is_floating_point", False):
                raise ValueError(f"dtype is {config.dtype!r}, expected one with a point, such as 'float32'")
            released_layout(config)  # BERT looks at its fields when it is made
            return config
        except OSError:
            raise
        except Exception as error:  # transformers raises many
            what = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{pretrained_model_name_or_path}: its config.json is not that of a CT-CLIP: {what}. Get it again"
            ) from error

    def _validate(self) -> None:
        vision, text = self.vision_config, self.text_config
        for section, known, expected in (
            ("vision_config", RELEASED_VISION, ", ".join(RELEASED_VISION)),
            ("text_config", BertConfig().to_dict(), "fields of BertConfig"),
        ):
            if unknown := [key for key in getattr(self, section) if key not in known]:
                raise ValueError(f"unknown {section} key {unknown[0]!r}; expected {expected}")
        if isinstance(vision["image_size"], tuple):
            vision["image_size"] = list(vision["image_size"])  # as JSON gives it back
        size = vision["image_size"]
        if isinstance(size, list) and len(size) != 2:
            raise ValueError(f"vision_config 'image_size' must be an int or [h, w], got {size!r}")
        try:
            bad = [
                window
                for window in vision["windows"] or ()
                if not 0 < float(window[1]) - float(window[0]) or window[2:]
            ]
        except (TypeError, ValueError, LookupError):  # no numbers, or not two
            bad = [vision["windows"]]
        if bad:
            raise ValueError(f"vision_config 'windows' must be pairs of HU, the lower end first, got {bad[0]!r}")
        others = ("image_size", "windows")
        sizes = [(f"vision_config {key!r}", value) for key, value in vision.items() if key not in others]
        sizes += [("vision_config 'image_size'", value) for value in (size if isinstance(size, list) else [size])]
        sizes += [(f"text_config {key!r}", text[key]) for key in RELEASED_TEXT]
        for name, value in [*sizes, ("projection_dim", self.projection_dim)]:
            most = _MOST_LAYERS if name.endswith(("depth'", "layers'")) else _LARGEST
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be a whole number of 1 to {most:,}, got {value!r}")
        depth, rows, columns = self.volume_shape
        for name, n, divisor, of in (
            ("num_frames", depth, "temporal_patch_size", vision),
            ("image_size", rows, "patch_size", vision),
            ("image_size", columns, "patch_size", vision),
            ("text_config hidden_size", text["hidden_size"], "num_attention_heads", text),
        ):
            if n % of[divisor]:
                raise ValueError(f"{name} {n} must be a multiple of {divisor} {of[divisor]}")
        PreprocessConfig.for_shape(self.volume_shape, self.spacing)  # refuses what is no spacing

    @property
    def volume_shape(self) -> tuple[int, int, int]:
        """Depth, rows and columns of the input volume, in voxels."""
        size = self.vision_config["image_size"]
        rows, columns = (size, size) if isinstance(size, int) else size
        return self.vision_config["num_frames"], rows, columns

    @property
    def grid(self) -> tuple[int, int, int]:
        """The volume's shape in patches: (t, h, w)."""
        depth, rows, columns = self.volume_shape
        patch = self.vision_config["patch_size"]
        return depth // self.vision_config["temporal_patch_size"], rows // patch, columns // patch

    @property
    def preprocess_config(self) -> PreprocessConfig:
        """The volumes that the model wants."""
        return PreprocessConfig.for_shape(self.volume_shape, self.spacing)

    def get_text_config(self, *args: Any, **kwargs: Any) -> BertConfig:
        """BERT's configuration, which transformers asks for by this name."""
        return BertConfig(**{"use_cache": False, **self.text_config})  # a cache is for generating text


@dataclass
class CTCLIPOutput(ModelOutput):
    """What `CTCLIPModel` returns."""

    loss: torch.Tensor | None = None  # contrastive, with `return_loss=True`
    logits_per_image: torch.Tensor | None = None  # (images, texts): cosine * exp(temperature)
    logits_per_text: torch.Tensor | None = None  # its transpose
    image_embeds: torch.Tensor | None = None  # (images, projection_dim), L2-normalised
    text_embeds: torch.Tensor | None = None  # (texts, projection_dim), L2-normalised


class CTCLIPModel(PreTrainedModel):
    """CT-CLIP: `encode_image`, `encode_text`, and their similarity."""

    config: CTCLIPConfig
    config_class = CTCLIPConfig
    parts = PARTS
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: CTCLIPConfig):
        super().__init__(config)
        self.text_transformer = BertModel(config.get_text_config(), add_pooling_layer=False)
        self.visual_transformer = quicken(VisionTransformer(config.vision_config))
        _, h, w = config.grid
        self.to_text_latent = nn.Linear(config.text_config["hidden_size"], config.projection_dim, bias=False)
        self.to_visual_latent = nn.Linear(h * w * config.vision_config["dim"], config.projection_dim, bias=False)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.post_init()

    @property
    def preprocess_config(self) -> PreprocessConfig:
        """The volumes that it wants."""
        return self.config.preprocess_config

    @property
    def longest_text(self) -> int:
        """Tokens that BERT takes at most."""
        return self.config.text_config["max_position_embeddings"]

    @property
    def vision_encoder(self) -> VisionTransformer:
        """The vision tower."""
        return self.visual_transformer

    @property
    def text_encoder(self) -> BertModel:
        """BERT."""
        return self.text_transformer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start values of a fresh model; transformers also calls it for tensors a checkpoint lacks."""
        if isinstance(module, nn.Linear | nn.Conv3d):
            fan_in = module.weight[0].numel()
            nn.init.trunc_normal_(module.weight, std=(3 * fan_in) ** -0.5)  # 0.026 at a width of 512
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ScaleNorm):
            nn.init.ones_(module.gamma)
            nn.init.zeros_(module.beta)
        elif isinstance(module, Attention):
            nn.init.ones_(module.q_scale)
            nn.init.ones_(module.k_scale)
        elif isinstance(module, Codebook) and not getattr(module.embed, "_is_hf_initialized", False):
            module.embed.copy_(F.normalize(torch.randn_like(module.embed), dim=-1))
        elif module is self:
            nn.init.ones_(self.temperature)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Compute activations again in the backward pass instead of keeping them; see transformers.

        Without re-entrance unless asked for: with it, a LoRA behind a frozen embedding gets no gradient.
        """
        with warnings.catch_warnings():
            # transformers 5 has a new name for it, and says so even where the old one is defined anew
            warnings.simplefilter("ignore", FutureWarning)
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False}, **kwargs)

    def encode_image(self, volumes: torch.Tensor) -> torch.Tensor:
        """Embed volumes (b, 1, d, h, w), HU / 1000 clipped to [-1, 1], as `preprocess` gives them.

        Returns:
            (b, projection_dim), L2-normalised.

        Raises:
            ValueError: another shape, or whole numbers (HU not yet scaled).
        """
        refuse_other_input(volumes, self.config.volume_shape)
        return self.embed_tokens(self.visual_transformer(volumes))

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed quantised tokens (b, t, h, w, c): (b, projection_dim), L2-normalised."""
        return F.normalize(self.to_visual_latent(tokens.mean(1).flatten(1)), dim=-1)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed token ids (b, n): (b, projection_dim), L2-normalised, from BERT's last hidden state of token 0.

        The mask (b, n) is one for tokens and zero for padding; ones if left out.

        Raises:
            ValueError: not two axes, longer than the text encoder's positions, or a mask of another shape.
        """
        refuse_other_ids(input_ids, self.longest_text)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            given, expected = tuple(attention_mask.shape), tuple(input_ids.shape)
            raise ValueError(f"attention_mask has shape {given}; expected {expected}, that of input_ids")
        hidden = self.text_transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(self.to_text_latent(hidden[:, 0]), dim=-1)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What transformers' CLIP calls `encode_image`: (b, 1, d, h, w) to (b, projection_dim), L2-normalised."""
        return self.encode_image(pixel_values)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What transformers' CLIP calls `encode_text`: (b, n) to (b, projection_dim), L2-normalised."""
        return self.encode_text(input_ids, attention_mask)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = False,
    ) -> CTCLIPOutput:
        """Similarity of every volume with every text; with `return_loss`, row i of each belong together.

        The loss is the mean of InfoNCE over texts per image and over images per text (CLIP, arXiv 2103.00020). For
        `pixel_values` (b, 1, d, h, w) see `encode_image`, for the texts (b, n) `encode_text`.

        Raises:
            ValueError: as `encode_image` and `encode_text`; `return_loss` with unequal numbers of each.
        """
        image_embeds = self.encode_image(pixel_values)
        text_embeds = self.encode_text(input_ids, attention_mask)
        logits = image_embeds @ text_embeds.T * self.temperature.exp()  # (images, texts)
        loss = None
        if return_loss:
            n, texts = logits.shape
            if n != texts:
                raise ValueError(f"the loss pairs volumes with texts one to one, got {n} volumes and {texts} texts")
            pairs = torch.arange(n, device=logits.device)
            loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        return CTCLIPOutput(loss, logits, logits.T, image_embeds, text_embeds)

    @classmethod
    def from_released_checkpoint(
        cls,
        path_or_state_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        config: CTCLIPConfig | None = None,
    ) -> "CTCLIPModel":
        """Build the model with weights in the layout of the released checkpoint (CT-CLIP_v2.pt).

        Tensors that never take part in the forward pass may be there or not; they are left out. The model is in float32
        and evaluation mode, with its own copy of the weights; its sizes are the released ones, or those of `config`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: see `released_state_dict`: a file that cannot be read or holds something else; tensors missing,
                left over, misshapen, or not of finite numbers.
        """
        config = config or CTCLIPConfig()
        live = released_state_dict(path_or_state_dict, released_layout(config))
        live = {name: tensor.to(torch.float32, copy=True) for name, tensor in live.items()}
        return cls._with_weights(live, config=config, dtype=torch.float32)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, config: Any = None, **kwargs: Any
    ) -> "CTCLIPModel":
        """Load what `save_pretrained` wrote, as transformers does, but never with random numbers for what is missing.

        Raises:
            OSError: no such folder or repository, or no weights in it.
            ValueError: as `from_released_checkpoint`; another SHA-256 than was written beside the weights; the digest
                by which an adapter names its base model, which peft's AutoPeftModel takes for a place.
        """
        name = os.path.expanduser(pretrained_model_name_or_path)
        if name.startswith("sha256:"):
            raise ValueError(f"{name} is the digest of a base model, not where it is; load it, then use load_adapter")
        place = {key: kwargs.pop(key) for key in _PLACE if key in kwargs}
        config = config or cls.config_class.from_pretrained(name, **place)
        weights = cached_file(name, "model.safetensors", **place)
        live = released_state_dict(cast(str, weights), released_layout(config))
        return cls._with_weights(live, *args, config=config, **kwargs)

    @classmethod
    def _with_weights(cls, live: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> "CTCLIPModel":
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # what is in memory already needs none
        try:
            return super().from_pretrained(None, *args, state_dict=live, **kwargs)
        finally:
            if shown:
                logging.enable_progress_bar()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write configuration, weights and image processor as transformers does, and the SHA-256 of the weights."""
        folder = Path(save_directory).expanduser()
        super().save_pretrained(folder, *args, **kwargs)
        CTImageProcessor.of(self.preprocess_config).save_pretrained(folder)
        if (weights := folder / "model.safetensors").is_file():
            write_sum(weights)


def released_layout(config: CTCLIPConfig | None = None) -> dict[str, ReleasedTensor]:
    """Every tensor of the released state dict at the sizes of `config` (default: the released ones), by name.

    The live ones are those of `CTCLIPModel`; the others sit in the checkpoint and are never used.
    """
    config = config or CTCLIPConfig()
    with torch.device("meta"):
        model = CTCLIPModel(config)
    parameters = {name for name, _ in model.named_parameters()}
    live = {
        name: ReleasedTensor(tuple(tensor.shape), "parameter" if name in parameters else "buffer", True)
        for name, tensor in model.state_dict().items()
    }
    layout = live | never_used(config.vision_config, config.text_config, live)
    return dict(sorted(layout.items(), key=lambda entry: COMPONENTS.index(entry[0].split(".")[0])))


# For anyone who imports `medctkit.model`: transformers' Auto classes know CT-CLIP.
AutoConfig.register(CTCLIPConfig.model_type, CTCLIPConfig)
AutoModel.register(CTCLIPConfig, CTCLIPModel)
AutoImageProcessor.register(CTCLIPConfig, CTImageProcessor)
AutoProcessor.register(CTCLIPConfig, CTCLIPProcessor)
