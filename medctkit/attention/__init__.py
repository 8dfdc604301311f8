"""Where the model looks, and whether that is right."""

from medctkit.attention.localisation import localisation_table, score_maps
from medctkit.attention.maps import attend, has_rollout, patch_map, relevance

__all__ = ["attend", "has_rollout", "localisation_table", "patch_map", "relevance", "score_maps"]
