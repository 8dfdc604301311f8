"""CT-RATE and CT-CLIP fetched from the Hugging Face hub."""

__all__ = []
