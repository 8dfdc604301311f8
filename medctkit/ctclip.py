"""CT-CLIP as a Hugging Face configuration and model: a CT volume and a report into one embedding space.

CT-CLIP (Hamamci et al. 2024, arXiv 2403.17834; vision tower after CT-ViT, arXiv 2305.16037) pairs a 3D
vision transformer that ends in a vector quantiser with BERT, and is trained contrastively as CLIP is. This
is an independent implementation, written from a description of the released model and tested against numbers
that its public code computes. Module names are those of the released state dict, so its weights load by name;
tensors it carries but never uses are listed by `released_layout` and not built.

Two traits look like mistakes and are kept, for the released weights were trained with them: the temporal
transformer's position convolution sees its tokens in the wrong order, and keys and values are computed from
tokens that are not normalised.

Shapes: b batch, c channel, d h w depth, rows, columns (of the volume, in voxels, or of the token grid),
t depth patches, n tokens of one sequence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

RELEASED_VISION = {
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
}
RELEASED_TEXT = {  # BERT-base
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


class CTCLIPConfig(PretrainedConfig):
    """Sizes of a CT-CLIP; without arguments those of the released model.

    Args:
        vision_config: any of `dim` (token width), `codebook_size`, `image_size` (rows and columns of the
            volume in voxels, an int or [h, w]), `num_frames` (its depth in slices), `patch_size` and
            `temporal_patch_size` (voxels), `spatial_depth` and `temporal_depth` (layers), `dim_head`, `heads`.
        text_config: any fields of `transformers.BertConfig`.
        projection_dim: width of the shared embedding space.

    Keys that are left out take the released values.

    Raises:
        ValueError: an unknown key, a size that is not a positive whole number, an image that does not divide
            into patches.
    """

    model_type = "ct-clip"

    def __init__(
        self,
        vision_config: dict | None = None,
        text_config: dict | None = None,
        projection_dim: int = 512,
        **kwargs,
    ):
        for name, given in (("vision_config", vision_config), ("text_config", text_config)):
            if not isinstance(given, Mapping | None):
                raise ValueError(f"{name} must be a dict, got {type(given).__name__}")
        self.vision_config = RELEASED_VISION | dict(vision_config or {})
        self.text_config = RELEASED_TEXT | dict(text_config or {})
        self.projection_dim = projection_dim
        self._validate()
        super().__init__(**kwargs)

    def _validate(self):
        known = {"vision_config": RELEASED_VISION, "text_config": BertConfig().to_dict()}
        for section, fields in known.items():
            if unknown := [key for key in getattr(self, section) if key not in fields]:
                expected = ", ".join(RELEASED_VISION) if fields is RELEASED_VISION else "fields of BertConfig"
                raise ValueError(f"unknown {section} key {unknown[0]!r}; expected {expected}")
        vision, text = self.vision_config, self.text_config
        sizes = {f"vision_config {k!r}": v for k, v in vision.items() if k != "image_size"}
        sizes |= {f"text_config {k!r}": text[k] for k in RELEASED_TEXT if not k.endswith("prob")}
        sizes["projection_dim"] = self.projection_dim
        size = vision["image_size"]
        if not isinstance(size, int) and not (isinstance(size, list | tuple) and len(size) == 2):
            raise ValueError(f"vision_config 'image_size' must be an int or [h, w], got {size!r}")
        sizes |= {"vision_config 'image_size'": v for v in ([size] if isinstance(size, int) else size)}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if isinstance(size, tuple):
            vision["image_size"] = list(size)  # as JSON gives it back
        depth, rows, columns = self.volume_shape
        for name, n, patch in (
            ("num_frames", depth, "temporal_patch_size"),
            ("image_size", rows, "patch_size"),
            ("image_size", columns, "patch_size"),
        ):
            if n % vision[patch]:
                raise ValueError(f"{name} {n} must be a multiple of {patch} {vision[patch]}")
        if text["hidden_size"] % text["num_attention_heads"]:
            raise ValueError(
                f"text_config hidden_size {text['hidden_size']} must be a multiple of num_attention_heads "
                f"{text['num_attention_heads']}"
            )

    @property
    def volume_shape(self) -> tuple[int, int, int]:
        """Depth, rows and columns of the input volume, in voxels."""
        size = self.vision_config["image_size"]
        return (self.vision_config["num_frames"], *([size, size] if isinstance(size, int) else size))

    @property
    def grid(self) -> tuple[int, int, int]:
        """The volume's shape in patches: (t, h, w)."""
        depth, rows, columns = self.volume_shape
        patch = self.vision_config["patch_size"]
        return (depth // self.vision_config["temporal_patch_size"], rows // patch, columns // patch)

    def get_text_config(self, *args, **kwargs) -> BertConfig:
        """BERT's configuration, which transformers asks for by this name."""
        return BertConfig(**self.text_config)


# --- blocks of the vision tower -----------------------------------------------------------------


class Patches(nn.Module):
    """Cut a volume into patches: (b, 1, d, h, w) -> (b, t, h, w, voxels of a patch)."""

    def __init__(self, temporal_patch_size: int, patch_size: int):
        super().__init__()
        self.size = (temporal_patch_size, patch_size, patch_size)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Inside a patch the order is channel, depth, row, column."""
        b, c, *shape = volumes.shape
        (pt, ph, pw), (t, h, w) = self.size, (n // p for n, p in zip(shape, self.size, strict=True))
        x = volumes.reshape(b, c, t, pt, h, ph, w, pw)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (b, t, h, w, c * pt * ph * pw)


class ScaleNorm(nn.Module):
    """Layer norm with a learned scale `gamma`; the shift `beta` is a buffer of zeros."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class RelativePositionBias(nn.Module):
    """Learned attention bias from the offset between two places of the h x w grid (after Swin V2).

    Each component of the offset enters an MLP as sign * log(1 + |offset|). Only (2h - 1)(2w - 1) offsets
    differ among (h w)^2 pairs, 2,209 of 331,776 at full size, so the MLP sees each once.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1)),
            nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1)),
            nn.Linear(dim, heads),
        )

    def forward(self, h: int, w: int) -> torch.Tensor:
        """Bias (heads, h * w, h * w), to be added to the scores of query i and key j."""
        weight = self.net[2].weight
        rows, columns = (torch.arange(1 - n, n, device=weight.device) for n in (h, w))
        offsets = torch.cartesian_prod(rows, columns).float()  # ((2h-1)(2w-1), 2)
        with torch.autocast(weight.device.type, enabled=False):
            table = self.net((offsets.sign() * offsets.abs().log1p()).to(weight.dtype))
        row, column = (torch.arange(n, device=weight.device) for n in (h, w))
        row = row[:, None, None, None] - row[:, None] + h - 1  # (h, 1, h, 1)
        column = column[:, None, None] - column + w - 1  # (w, 1, w)
        index = (row * (2 * w - 1) + column).reshape(h * w, h * w)
        return F.embedding(index, table).permute(2, 0, 1)  # (n, n, heads) -> (heads, n, n)


class PositionConv(nn.Module):
    """Position encoding generator (Chu et al. 2021, arXiv 2102.10882): a depthwise 3 x 3 x 3 convolution.

    Zero padding, one place around rows and columns; causal in depth, two planes before and none after.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (b, t, h, w, c) to the same shape."""
        x = F.pad(x.permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 2, 0))  # (b, c, t + 2, h + 2, w + 2)
        return self.dsconv(x).permute(0, 2, 3, 4, 1)  # (b, c, t, h, w) -> (b, t, h, w, c)


class Attention(nn.Module):
    """Multi-head attention on L2-normalised queries and keys.

    Per head, `scores = 8 (q_scale * q / |q|) . (k_scale * k / |k|) + bias`. Queries come from the normalised
    input; keys and values from the input as it is.
    """

    scale = 8.0

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.norm = ScaleNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.to_out = nn.Linear(inner, dim, bias=False)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (b, heads, n, dim_head) of tokens (b, n, c)."""
        q, (k, v) = self.to_q(self.norm(x)), self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        return q.to(v.dtype), k.to(v.dtype), v

    def weights(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The attention map (b, heads, n queries, n keys); each row sums to one."""
        q, k, _ = self.project(x)
        scores = self.scale * q @ k.transpose(-1, -2)
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Attend among the tokens (b, n, c) of each sequence; `bias` is (heads, n, n)."""
        q, k, v = self.project(x)
        mask = None if bias is None else bias.to(v.dtype)[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.to_out(y.transpose(1, 2).flatten(2))  # (b, heads, n, dim_head) -> (b, n, inner)


class GatedGELU(nn.Module):
    """The first half of the channels times the GELU of the second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., 2 c) to (..., c)."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


def feed_forward(dim: int) -> nn.Sequential:
    """LayerNorm, gated GELU of width 8/3 dim; places 0, 1 and 4 hold weights, as in the released state dict."""
    inner = int(dim * 8 / 3)
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, 2 * inner, bias=False),
        GatedGELU(),
        nn.Identity(),
        nn.Linear(inner, dim, bias=False),
    )


class Layer(nn.ModuleDict):
    """Position convolution ("0"), attention ("1") and feed-forward ("3"), each added to its input."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__({"0": PositionConv(dim), "1": Attention(dim, heads, dim_head), "3": feed_forward(dim)})

    def forward(self, x: torch.Tensor, grid: tuple[int, int, int, int], bias: torch.Tensor | None) -> torch.Tensor:
        """Tokens (b', n, c) to the same shape; see `Transformer.forward`."""
        x = x + self["0"](x.reshape(*grid, -1)).reshape(x.shape)
        x = x + self["1"](x, bias)
        return x + self["3"](x)


class Transformer(nn.Module):
    """A stack of layers and a closing norm."""

    def __init__(self, dim: int, depth: int, heads: int, dim_head: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads, dim_head) for _ in range(depth))
        self.norm_out = ScaleNorm(dim)
        self.gradient_checkpointing = False  # transformers' gradient_checkpointing_enable() sets it

    def forward(
        self, x: torch.Tensor, grid: tuple[int, int, int, int], bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run sequences of tokens (b', n, c) through the stack.

        `grid` (b, t, h, w) is the shape in which the position convolution reads the tokens: a plain reshape of
        `x`, whatever the order of its tokens. For (b t) sequences of (h w) tokens that is where they lie; for
        the temporal transformer's (b h w) sequences of t tokens it is not, and the released weights expect
        just that.
        """
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, grid, bias, use_reentrant=False)
            else:
                x = layer(x, grid, bias)
        return self.norm_out(x)


class Codebook(nn.Module):
    """The code vectors `embed` (1, codes, c): a buffer, which no optimiser ever sees."""

    def __init__(self, dim: int, codes: int):
        super().__init__()
        self.register_buffer("embed", F.normalize(torch.randn(1, codes, dim), dim=-1))


class VectorQuantiser(nn.Module):
    """Replaces each token by the code vector of highest cosine similarity (van den Oord et al. 2017).

    In evaluation mode no gradient passes, so nothing below learns. In training mode gradients pass straight
    through, as if output were input, and the codebook stays as it is. (The public code moves it by
    moving averages in training mode, so that a "frozen" base drifts.)
    """

    max_similarities = 2**25  # in memory at a time, 128 MB

    def __init__(self, dim: int, codes: int):
        super().__init__()
        self._codebook = Codebook(dim, codes)

    @torch.no_grad()
    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Index of the best code for each token: (..., c) -> (...)."""
        with torch.autocast(x.device.type, enabled=False):
            codes = F.normalize(self._codebook.embed[0], dim=-1)  # (codes, c)
            tokens = F.normalize(x.flatten(0, -2).to(codes.dtype), dim=-1)  # (n, c)
            parts = tokens.split(max(1, self.max_similarities // len(codes)))
            return torch.cat([(part @ codes.T).argmax(1) for part in parts]).reshape(x.shape[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantise tokens (..., c)."""
        codes = self._codebook.embed[0][self.nearest(x)].to(x.dtype)
        return x + (codes - x).detach() if self.training else codes


class VisionTransformer(nn.Module):
    """The vision tower: patches, spatial then temporal attention, quantisation."""

    def __init__(self, config: CTCLIPConfig):
        super().__init__()
        v = config.vision_config
        dim, heads, dim_head = v["dim"], v["heads"], v["dim_head"]
        voxels = v["temporal_patch_size"] * v["patch_size"] ** 2
        self.to_patch_emb = nn.Sequential(
            Patches(v["temporal_patch_size"], v["patch_size"]),
            nn.LayerNorm(voxels),
            nn.Linear(voxels, dim),
            nn.LayerNorm(dim),
        )
        self.spatial_rel_pos_bias = RelativePositionBias(dim, heads)
        self.enc_spatial_transformer = Transformer(dim, v["spatial_depth"], heads, dim_head)
        self.enc_temporal_transformer = Transformer(dim, v["temporal_depth"], heads, dim_head)
        self.vq = VectorQuantiser(dim, v["codebook_size"])

    def encode_spatial(self, tokens: torch.Tensor) -> torch.Tensor:
        """Attention within each slab: (b, t, h, w, c) -> (b * t, h * w, c)."""
        b, t, h, w, c = tokens.shape
        bias = self.spatial_rel_pos_bias(h, w)
        return self.enc_spatial_transformer(tokens.reshape(b * t, h * w, c), (b, t, h, w), bias)

    def encode_temporal(self, tokens: torch.Tensor) -> torch.Tensor:
        """Attention along depth at each place of the slab: (b, t, h, w, c) -> (b * h * w, t, c)."""
        b, t, h, w, c = tokens.shape
        sequences = tokens.permute(0, 2, 3, 1, 4).reshape(b * h * w, t, c)
        return self.enc_temporal_transformer(sequences, (b, t, h, w))

    def encode(self, volumes: torch.Tensor) -> torch.Tensor:
        """Tokens before quantisation: (b, 1, d, h, w) -> (b, t, h, w, c)."""
        tokens = self.to_patch_emb(volumes)
        b, t, h, w, c = tokens.shape
        tokens = self.encode_spatial(tokens).reshape(b, t, h, w, c)
        return self.encode_temporal(tokens).reshape(b, h, w, t, c).permute(0, 3, 1, 2, 4)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Quantised tokens (b, t, h, w, c) of volumes (b, 1, d, h, w)."""
        return self.vq(self.encode(volumes))


# --- the model ----------------------------------------------------------------------------------


@dataclass
class CTCLIPOutput(ModelOutput):
    """What `CTCLIPModel` returns.

    Attributes:
        loss: contrastive loss, with `return_loss=True`.
        logits_per_image: cosine * exp(temperature), (images, texts).
        logits_per_text: its transpose.
        image_embeds: (images, projection_dim), L2-normalised.
        text_embeds: (texts, projection_dim), L2-normalised.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None


class CTCLIPModel(PreTrainedModel):
    """CT-CLIP: `encode_image`, `encode_text`, and their similarity."""

    config_class = CTCLIPConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: CTCLIPConfig):
        super().__init__(config)
        self.text_transformer = BertModel(config.get_text_config(), add_pooling_layer=False)
        self.visual_transformer = VisionTransformer(config)
        _, h, w = config.grid
        self.to_text_latent = nn.Linear(config.text_config["hidden_size"], config.projection_dim, bias=False)
        self.to_visual_latent = nn.Linear(h * w * config.vision_config["dim"], config.projection_dim, bias=False)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.post_init()

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

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Recompute layers in the backward pass to save memory.

        Without re-entrance unless asked for: with it, a LoRA behind a frozen embedding gets no gradient.
        """
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})

    def encode_image(self, volumes: torch.Tensor) -> torch.Tensor:
        """Embed CT volumes.

        Args:
            volumes: (b, 1, depth, rows, columns) of this model's size, HU / 1000 clipped to [-1, 1], on the
                axes that `medctkit.preprocess` gives them.

        Returns:
            (b, projection_dim), L2-normalised.

        Raises:
            ValueError: another shape, or whole numbers (HU not yet scaled).
        """
        expected = self.config.volume_shape
        if volumes.ndim != 5 or tuple(volumes.shape[1:]) != (1, *expected) or not volumes.shape[0]:
            raise ValueError(
                f"volumes have shape {tuple(volumes.shape)}; this model expects (batch, 1, "
                f"{', '.join(map(str, expected))}), as preprocess(volume, PreprocessConfig.for_model(config)) "
                "and a batch axis give it"
            )
        if not volumes.is_floating_point():
            raise ValueError(
                f"volumes are {volumes.dtype}; expected floating point in [-1, 1] as medctkit.preprocess gives it"
            )
        tokens = self.visual_transformer(volumes)  # (b, t, h, w, c)
        return F.normalize(self.to_visual_latent(tokens.mean(1).flatten(1)), dim=-1)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed tokenised texts.

        Args:
            input_ids: (b, n) token ids.
            attention_mask: (b, n), one for tokens and zero for padding; ones if left out.

        Returns:
            (b, projection_dim), L2-normalised, from BERT's last hidden state of token 0.

        Raises:
            ValueError: not two axes, or longer than the text encoder's positions.
        """
        longest = self.config.text_config["max_position_embeddings"]
        if input_ids.ndim != 2 or not 0 < input_ids.shape[1] <= longest:
            raise ValueError(
                f"input_ids have shape {tuple(input_ids.shape)}; expected (batch, n) with n of at most {longest}: "
                f"tokenise with truncation=True, max_length={longest}"
            )
        hidden = self.text_transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(self.to_text_latent(hidden[:, 0]), dim=-1)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = False,
    ) -> CTCLIPOutput:
        """Similarity of every volume with every text; with `return_loss`, row i of each belong together.

        The loss is the mean of InfoNCE over texts per image and over images per text (CLIP, arXiv 2103.00020).

        Raises:
            ValueError: as `encode_image` and `encode_text`; `return_loss` with unequal numbers of each.
        """
        image_embeds = self.encode_image(pixel_values)
        text_embeds = self.encode_text(input_ids, attention_mask)
        logits = image_embeds @ text_embeds.T * self.temperature.exp()  # (images, texts)
        loss = None
        if return_loss:
            if logits.shape[0] != logits.shape[1]:
                raise ValueError(
                    f"the loss pairs volumes with texts one to one, got {logits.shape[0]} volumes and "
                    f"{logits.shape[1]} texts; leave return_loss out for similarities only"
                )
            pairs = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        return CTCLIPOutput(loss, logits, logits.T, image_embeds, text_embeds)

    @classmethod
    def from_released_checkpoint(
        cls,
        path_or_state_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        config: CTCLIPConfig | None = None,
    ) -> CTCLIPModel:
        """Build the model with weights in the layout of the released checkpoint (CT-CLIP_v2.pt).

        Tensors that never take part in the forward pass may be there or not; they are left out.

        Args:
            path_or_state_dict: a .pt file (read with `weights_only=True`), a .safetensors file, or a state dict.
            config: sizes of the model; the released ones by default.

        Returns:
            The model in float32 and evaluation mode, with its own copy of the weights.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that cannot be read or holds something else; tensors missing, unexpected or
                misshapen (all listed).
        """
        config = config or CTCLIPConfig()
        state = path_or_state_dict
        source = "the state dict"
        if not isinstance(state, Mapping):
            source, state = str(state), read_state_dict(state)
        _refuse_other_layout(source, {name: tuple(t.shape) for name, t in state.items()}, config)
        with torch.device("meta"):
            model = cls(config)
        live = {name: state[name].to(torch.float32, copy=True) for name in model.state_dict()}
        model.load_state_dict(live, assign=True)
        embeddings, device = model.text_transformer.embeddings, model.temperature.device
        # BERT's own index buffers are in no checkpoint and still on the meta device
        positions = torch.arange(config.text_config["max_position_embeddings"], device=device)[None]
        embeddings.register_buffer("position_ids", positions, persistent=False)
        embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
        return model.eval()


# --- the released checkpoint --------------------------------------------------------------------


class ReleasedTensor(NamedTuple):
    """A tensor of the released state dict: its shape, "parameter" or "buffer", and whether it is ever used."""

    shape: tuple[int, ...]
    kind: str
    live: bool


def released_layout(config: CTCLIPConfig | None = None) -> dict[str, ReleasedTensor]:
    """Every tensor of the released state dict at the sizes of `config` (default: the released ones), by name.

    The live ones are those of `CTCLIPModel`. The others sit in the checkpoint and never take part in the
    forward pass: a pooler, second projections, a decoder to pixels, an embedding for single frames, a norm and
    an empty key-value pair in each attention, statistics of the codebook's training.
    """
    config = config or CTCLIPConfig()
    with torch.device("meta"):
        model = CTCLIPModel(config)
    parameters = {name for name, _ in model.named_parameters()}
    layout = {
        name: ReleasedTensor(tuple(t.shape), "parameter" if name in parameters else "buffer", True)
        for name, t in model.state_dict().items()
    }
    v, hidden = config.vision_config, config.text_config["hidden_size"]
    dim, patch = v["dim"], v["patch_size"] ** 2
    unused = {
        "text_transformer.pooler.dense.weight": (hidden, hidden),
        "text_transformer.pooler.dense.bias": (hidden,),
        "to_text_latent_extra.weight": layout["to_text_latent.weight"].shape,
        "to_visual_latent_extra.weight": layout["to_visual_latent.weight"].shape,
    }
    vision = {
        "to_patch_emb_first_frame.1": [(patch,), (patch,)],
        "to_patch_emb_first_frame.2": [(dim, patch), (dim,)],
        "to_patch_emb_first_frame.3": [(dim,), (dim,)],
        "to_pixels_first_frame.0": [(patch, dim), (patch,)],
        "to_pixels.0": [(v["temporal_patch_size"] * patch, dim), (v["temporal_patch_size"] * patch,)],
    }
    for name, shapes in vision.items():
        for kind, shape in zip(("weight", "bias"), shapes, strict=True):
            unused[f"visual_transformer.{name}.{kind}"] = shape
    buffers = {
        "visual_transformer.vq._codebook.cluster_size": (1, v["codebook_size"]),
        "visual_transformer.vq._codebook.initted": (1,),
        # older checkpoints only
        "text_transformer.embeddings.position_ids": (1, config.text_config["max_position_embeddings"]),
    }
    for tower in ("spatial", "temporal"):
        for i in range(v[f"{tower}_depth"]):
            attention = f"visual_transformer.enc_{tower}_transformer.layers.{i}.1"
            unused[f"{attention}.context_norm.gamma"] = (dim,)
            unused[f"{attention}.null_kv"] = (v["heads"], 0, v["dim_head"])
            buffers[f"{attention}.context_norm.beta"] = (dim,)
    layout |= {name: ReleasedTensor(tuple(shape), "parameter", False) for name, shape in unused.items()}
    return layout | {name: ReleasedTensor(shape, "buffer", False) for name, shape in buffers.items()}


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read tensors by name from a .safetensors file or one that `torch.save` wrote; no code in it is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds something else than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; expected a .pt or .safetensors file (medctkit.hub fetches CT-CLIP_v2.pt)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors alike
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}). Only plain tensors are "
            "read, never pickled code; if the file is damaged, download it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(
            f"{path} holds {_describe(state)}; expected a state dict, tensors by name, such as CT-CLIP_v2.pt"
        )
    return state


def _describe(thing: object) -> str:
    if isinstance(thing, dict):
        return f"a dict with keys {', '.join(map(repr, list(thing)[:5]))}"
    return f"a {type(thing).__name__}"


def _refuse_other_layout(source: str, found: Mapping[str, tuple[int, ...]], config: CTCLIPConfig) -> None:
    layout = released_layout(config)
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
        return
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
