"""Prompts to scores; embeddings and retrieval."""

from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier, validation_score
from medctkit.zero_shot.pipeline import CTZeroShotPipeline
from medctkit.zero_shot.prompts import PROMPTS, prompt_sentences

__all__ = ["CTZeroShotPipeline", "Embedded", "PROMPTS", "ZeroShotClassifier", "prompt_sentences", "validation_score"]
