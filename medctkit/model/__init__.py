"""CT-CLIP, its checkpoints, and a base model with what belongs to it."""

from medctkit.model.base_model import BaseModel, load_base, load_mini_base
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel

__all__ = ["BaseModel", "CTCLIPConfig", "CTCLIPModel", "load_base", "load_mini_base"]
