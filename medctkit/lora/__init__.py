"""LoRA in both encoders of CT-CLIP: the equation, the placement, the adapter, the count."""

from medctkit.lora.adapter import add_lora, load_adapter, merge_lora, save_adapter
from medctkit.lora.counting import count_trainable, parameter_table, search_placements
from medctkit.lora.linear import LoRALinear
from medctkit.lora.methods import METHODS, apply_method
from medctkit.lora.placement import PRESETS, Placement, lora_config
from medctkit.lora.strength import at_rank, at_strength, can_be_scaled, intruder_dimensions

__all__ = [
    "LoRALinear",
    "METHODS",
    "PRESETS",
    "Placement",
    "add_lora",
    "apply_method",
    "at_rank",
    "at_strength",
    "can_be_scaled",
    "count_trainable",
    "intruder_dimensions",
    "load_adapter",
    "lora_config",
    "merge_lora",
    "parameter_table",
    "save_adapter",
    "search_placements",
]
