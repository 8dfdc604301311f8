"""Where things are in CT-CLIP. The names are those of the released state dict."""

import re

from medctkit.model.protocol import Parts

VISION_LAYER = r"visual_transformer\.enc_(?:spatial|temporal)_transformer\.layers\.\d+\."
TEXT_LAYER = r"text_transformer\.encoder\.layer\.\d+\."
COMPONENTS = (
    "visual_transformer",
    "text_transformer",
    "to_visual_latent",
    "to_text_latent",
    "to_visual_latent_extra",
    "to_text_latent_extra",
    "temperature",
)

_VISION = {name: rf"{VISION_LAYER}1\.{name}" for name in ("to_q", "to_kv", "to_out")}  # to_kv: both in one matrix
_TEXT = {name: rf"{TEXT_LAYER}attention\.self\.{name}" for name in ("query", "key", "value")}
_TEXT["attention.output.dense"] = rf"{TEXT_LAYER}attention\.output\.dense"
_ATTENTION = (tuple(_VISION), tuple(_TEXT))
_MLP = (("3.1", "3.4"), ("intermediate.dense", "output.dense"))  # widening and narrowing layer of each feed-forward
_VISION |= {name: VISION_LAYER + re.escape(name) for name in _MLP[0]}
_TEXT |= {name: TEXT_LAYER + re.escape(name) for name in _MLP[1]}
_VISION_QKV, _TEXT_QKV = ("to_q", "to_kv"), ("query", "key", "value")

PARTS = Parts(
    vision=_VISION,
    text=_TEXT,
    presets={
        "paper": (_VISION_QKV, _TEXT_QKV),
        "vision": (_VISION_QKV, ()),
        "text": ((), _TEXT_QKV),
        "all-attention": _ATTENTION,
        "mlp": _MLP,
        "all-linear": (tuple(_VISION), tuple(_TEXT)),
    },
    keys_values=("to_kv", "key", "value"),
    narrowing=(_VISION["3.4"], _TEXT["output.dense"]),
    stages={
        "projection": ("to_visual_latent",),
        "temporal attention": ("visual_transformer.enc_temporal_transformer",),
        "spatial attention": ("visual_transformer.enc_spatial_transformer", "visual_transformer.spatial_rel_pos_bias"),
        "patches": ("visual_transformer.to_patch_emb",),
    },
)
