"""CT-CLIP, its checkpoints, what a base model is, and base models with what belongs to them."""

from medctkit.model.base_model import BASES, BaseModel, load_base, load_mini_base
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.model.protocol import Parts, VisionLanguageModel

__all__ = [
    "BASES",
    "BaseModel",
    "CTCLIPConfig",
    "CTCLIPModel",
    "Parts",
    "VisionLanguageModel",
    "load_base",
    "load_mini_base",
]
