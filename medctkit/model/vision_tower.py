"""The vision tower of CT-CLIP, block by block: patches, spatial and temporal attention, vector quantiser.

After CT-ViT (Hamamci et al. 2023, arXiv 2305.16037), whose blocks come from C-ViViT (Villegas et al. 2022, arXiv
2210.02399). Written from a description of the released model; module names are those of its state dict.

    volume (b, 1, d, h, w)                    240 x 480 x 480 voxels at full size
      -> tokens (b, t, h, w, c)               24 x 24 x 24 patches, 512 channels
      -> spatial attention, t times among h * w tokens
      -> temporal attention, h * w times among t tokens
      -> the nearest of 8,192 code vectors for each token

Two traits look like mistakes and are kept, for the released weights were trained with them: the temporal
transformer's position convolution reads its tokens in the wrong order, and keys and values are computed from
tokens that are not normalised.

Here stands what is computed. `CTCLIPModel` computes the same more quickly and in less memory: see `fast_paths`.

Shapes: b batch, c channel, d h w depth, rows, columns (of the volume, in voxels, or of the token grid),
t depth patches, n tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F


class Patches(nn.Module):
    """Cut a volume into patches: (b, 1, d, h, w) -> (b, t, h, w, voxels of a patch), once for each window.

    The norm that follows takes the mean out of a patch: an even piece of lung looks as an even piece of liver does.
    CT-CLIP lives with it. A model with `windows`, pairs of HU, sees a volume in each of them, as a radiologist does, -1
    at the lower end and below, 1 at the upper end and above: how a patch looks in one beside the others is left.
    """

    def __init__(self, temporal_patch_size: int, patch_size: int, windows: Sequence[Sequence[float]] | None = None):
        super().__init__()
        self.size, self.windows = (temporal_patch_size, patch_size, patch_size), windows

    def look(self, volumes: torch.Tensor) -> torch.Tensor:
        """Volumes (b, 1, d, h, w) of HU / 1,000 in each window: (b, windows, d, h, w)."""
        seen = [(2000 * volumes - (low + high)) / (high - low) for low, high in self.windows or ()]
        return torch.cat(seen, dim=1).clamp(-1, 1) if seen else volumes

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Cut volumes (b, 1, d, h, w); inside a patch the order is window, depth, row, column."""
        volumes = self.look(volumes)
        b, c, *shape = volumes.shape
        (pt, ph, pw), (t, h, w) = self.size, (n // p for n, p in zip(shape, self.size, strict=True))
        x = volumes.reshape(b, c, t, pt, h, ph, w, pw)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (b, t, h, w, c * pt * ph * pw)


class ScaleNorm(nn.Module):
    """Layer norm with a learned scale `gamma`; the shift `beta` is a buffer of zeros."""

    beta: torch.Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of tokens (..., c)."""
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class RelativePositionBias(nn.Module):
    """Learned attention bias from the offset between two places of the h x w grid (after Swin V2).

    `bias[head, i, j] = MLP(sign(o) log(1 + |o|))[head]` with the offset `o = place_i - place_j` (rows, columns).
    """

    full_precision = True  # computed outside autocast

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1)),
            nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1)),
            nn.Linear(dim, heads),
        )

    def of_offsets(self, offsets: torch.Tensor) -> torch.Tensor:
        """Bias (..., heads) of offsets (..., 2), in the precision of the weights whatever the rest computes in."""
        weight = next(self.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            precision = (
                weight.dtype if weight.is_floating_point() else torch.float32
            )  # a quantised layer's are whole numbers
            return self.net((offsets.sign() * offsets.abs().log1p()).to(precision))

    def forward(self, h: int, w: int) -> torch.Tensor:
        """Bias (heads, h * w, h * w), to be added to the scores of query i and key j."""
        device = next(self.parameters()).device
        places = torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device)).float()  # (n, 2)
        return self.of_offsets(places[:, None] - places).permute(2, 0, 1)  # (n, n, heads) -> (heads, n, n)


class PositionConv(nn.Module):
    """Position encoding generator (Chu et al. 2021, arXiv 2102.10882): a depthwise 3 x 3 x 3 convolution.

    Zero padding, one place around rows and columns; causal in depth, two planes before and none after.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, padding=(2, 1, 1), groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (b, t, h, w, c) to the same shape."""
        y = self.dsconv(x.permute(0, 4, 1, 2, 3))  # (b, c, t + 2, h, w)
        return y[:, :, : x.shape[1]].permute(0, 2, 3, 4, 1)  # the last two planes look ahead: cut off


class Attention(nn.Module):
    """Multi-head attention on L2-normalised queries and keys.

    Per head, `softmax(8 (q_scale * q / |q|) . (k_scale * k / |k|) + bias) v`. Queries come from the normalised
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
        q, k = self.unit(q) * self.q_scale, self.unit(k) * self.k_scale
        return q.to(v.dtype), k.to(v.dtype), v

    def unit(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors (..., dim_head) made one long."""
        return F.normalize(x, dim=-1)

    def probabilities(self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The attention map (b, heads, n queries, n keys) of queries and keys; each row sums to one."""
        scores = self.scale * q @ k.transpose(-1, -2)
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What each query gets of the values: (b, heads, n, dim_head)."""
        return self.probabilities(q, k, bias).to(v.dtype) @ v

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Attend among the tokens (b, n, c) of each sequence; `bias` is (heads, n, n)."""
        y = self.mix(*self.project(x), bias)
        return self.to_out(y.transpose(1, 2).flatten(2))  # (b, heads, n, dim_head) -> (b, n, inner)


class GatedGELU(nn.Module):
    """The first half of the channels times the GELU of the second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., 2 c) to (..., c)."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Sequential):
    """LayerNorm, gated GELU of width 8/3 dim; places 0, 1 and 4 hold weights, as in the released state dict."""

    def __init__(self, dim: int):
        inner = 8 * dim // 3
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, 2 * inner, bias=False),
            GatedGELU(),
            nn.Identity(),
            nn.Linear(inner, dim, bias=False),
        )


class Layer(nn.ModuleDict):
    """Position convolution ("0"), attention ("1") and feed-forward ("3"), each added to its input."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__({"0": PositionConv(dim), "1": Attention(dim, heads, dim_head), "3": FeedForward(dim)})

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
            x = layer(x, grid, bias)
        return self.norm_out(x)


class Codebook(nn.Module):
    """The code vectors `embed` (1, codes, c): a buffer, which no optimiser ever sees."""

    embed: torch.Tensor

    def __init__(self, dim: int, codes: int):
        super().__init__()
        self.register_buffer("embed", F.normalize(torch.randn(1, codes, dim), dim=-1))


class VectorQuantiser(nn.Module):
    """Replaces each token by the code vector of highest cosine similarity (van den Oord et al. 2017).

    In evaluation mode no gradient passes, so nothing below learns. In training mode gradients pass straight
    through, as if output were input, and the codebook stays as it is. (The public code moves it by
    moving averages in training mode, so that a "frozen" base drifts.)
    """

    def __init__(self, dim: int, codes: int):
        super().__init__()
        self._codebook = Codebook(dim, codes)

    def best(self, tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Index (n,) of the code (codes, c) most similar to each token (n, c)."""
        return (tokens @ codes.T).argmax(-1)

    @torch.no_grad()
    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Index of the best code for each token: (..., c) -> (...), in full precision."""
        with torch.autocast(x.device.type, enabled=False):
            codes = F.normalize(self._codebook.embed[0], dim=-1)  # (codes, c)
            tokens = F.normalize(x.flatten(0, -2).to(codes.dtype), dim=-1)  # (n, c)
            return self.best(tokens, codes).reshape(x.shape[:-1])

    def vectors(self, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Code vectors (..., c) of index (...), in place of tokens (..., c); what is not finite in them stays."""
        return torch.where(x.isfinite(), self._codebook.embed[0][index].to(x.dtype), x.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantise tokens (..., c)."""
        codes = self.vectors(self.nearest(x), x)
        return x + (codes - x).detach() if self.training else codes


class VisionTransformer(nn.Module):
    """The vision tower: patches, spatial then temporal attention, quantisation.

    Args:
        v: the complete `vision_config` of a `CTCLIPConfig`.
    """

    def __init__(self, v: Mapping):
        super().__init__()
        dim, heads, dim_head = v["dim"], v["heads"], v["dim_head"]
        self.patch_depth = v["temporal_patch_size"]
        seen = self.patch_depth * v["patch_size"] ** 2 * len(v["windows"] or [None])
        self.to_patch_emb = nn.Sequential(
            Patches(self.patch_depth, v["patch_size"], v["windows"]),
            nn.LayerNorm(seen),
            nn.Linear(seen, dim),
            nn.LayerNorm(dim),
        )
        self.spatial_rel_pos_bias = RelativePositionBias(dim, heads)
        self.enc_spatial_transformer = Transformer(dim, v["spatial_depth"], heads, dim_head)
        self.enc_temporal_transformer = Transformer(dim, v["temporal_depth"], heads, dim_head)
        self.vq = VectorQuantiser(dim, v["codebook_size"])

    def attention_layers(self) -> dict[str, list[Attention]]:
        """The attention of each layer, first to last, of the two transformers."""
        towers = {"spatial": self.enc_spatial_transformer, "temporal": self.enc_temporal_transformer}
        return {name: [m for m in tower.modules() if isinstance(m, Attention)] for name, tower in towers.items()}

    def embed_patches(self, volumes: torch.Tensor) -> torch.Tensor:
        """Tokens (b, t, h, w, c) of volumes (b, 1, d, h, w)."""
        return self.to_patch_emb(volumes)

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
        tokens = self.embed_patches(volumes)
        b, t, h, w, c = tokens.shape
        tokens = self.encode_spatial(tokens).reshape(b, t, h, w, c)
        return self.encode_temporal(tokens).reshape(b, h, w, t, c).permute(0, 3, 1, 2, 4)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Quantised tokens (b, t, h, w, c) of volumes (b, 1, d, h, w)."""
        return self.vq(self.encode(volumes))
