"""A small CT-CLIP with the weights, inputs and outputs that the public implementation gave; see tests/golden."""

import json
from pathlib import Path

from safetensors.torch import load_file

from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel

GOLDEN = Path(__file__).parents[1] / "golden"
TENSORS = load_file(GOLDEN / "ctclip_small.safetensors")
STATE = {name.removeprefix("state."): t for name, t in TENSORS.items() if name.startswith("state.")}
EXPECTED = {name.removeprefix("expect."): t for name, t in TENSORS.items() if name.startswith("expect.")}
BATCH = {
    "pixel_values": TENSORS["input.image"],
    "input_ids": TENSORS["input.input_ids"],
    "attention_mask": TENSORS["input.attention_mask"],
}


def small_config(vision=None, text=None):
    sizes = json.loads((GOLDEN / "ctclip_small.json").read_text())
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision = sizes["vit"] | {"num_frames": sizes["frames"]} | (vision or {})
    return CTCLIPConfig(vision, sizes["text"] | no_dropout | (text or {}), sizes["dim_latent"])


def small_model():
    return CTCLIPModel.from_released_checkpoint(STATE, small_config())


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
