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

PARTS = Parts.beside_bert(
    attention={name: rf"{VISION_LAYER}1\.{name}" for name in ("to_q", "to_kv", "to_out")},  # to_kv: both in one matrix
    mlp={name: VISION_LAYER + re.escape(name) for name in ("3.1", "3.4")},
    qkv=("to_q", "to_kv"),
    keys_values=("to_kv",),
    narrowing="3.4",
    bert_layer=TEXT_LAYER,
    stages={
        "projection": ("to_visual_latent",),
        "temporal attention": ("visual_transformer.enc_temporal_transformer",),
        "spatial attention": ("visual_transformer.enc_spatial_transformer", "visual_transformer.spatial_rel_pos_bias"),
        "patches": ("visual_transformer.to_patch_emb",),
    },
)
