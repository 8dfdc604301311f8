"""Scans and texts to model input in transformers' terms: an image processor, and a processor with the tokenizer."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from medctkit.scans.preprocessing import PreprocessConfig, preprocess
from medctkit.scans.volumes import CTVolume, read_volume

Scan = CTVolume | str | os.PathLike


class CTImageProcessor(BaseImageProcessor):
    """`medctkit.preprocess` for `AutoImageProcessor`; its arguments are those of `PreprocessConfig`."""

    model_input_names = ["pixel_values"]

    def __init__(self, **fields: Any):
        super().__init__()  # which would keep transformers' own fields, too
        own = {name: fields[name] for name in PreprocessConfig.__dataclass_fields__ if name in fields}
        vars(self).update(asdict(PreprocessConfig(**own)))

    @classmethod
    def of(cls, config: PreprocessConfig) -> "CTImageProcessor":
        """One that makes the volumes of `config`."""
        return cls(**asdict(config))

    @property
    def preprocess_config(self) -> PreprocessConfig:
        """The volumes that it makes."""
        return PreprocessConfig(**{name: getattr(self, name) for name in PreprocessConfig.__dataclass_fields__})

    def preprocess(self, images: Scan | Sequence[Scan], return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """CT volumes, or files and folders as `read_volume` takes them, to `pixel_values` (b, 1, d, h, w).

        Raises:
            TypeError: something else than a scan.
            ValueError: see `read_volume` and `medctkit.preprocess`.
        """
        scans: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        read = [read_volume(scan) if isinstance(scan, str | os.PathLike) else scan for scan in scans]
        pixels = torch.stack([preprocess(volume, self.preprocess_config) for volume in read])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


class CTCLIPProcessor(ProcessorMixin):
    """Scans to `pixel_values`, texts to `input_ids` and `attention_mask`: what `CTCLIPModel` takes."""

    def __init__(self, image_processor: CTImageProcessor, tokenizer: Any):
        super().__init__(image_processor, tokenizer)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Either or both; `kwargs` go to the tokenizer, by default `padding=True, truncation=True`."""
        found = {} if images is None else dict(self.image_processor(images))
        if text is not None:
            words = self.tokenizer(text, **{"padding": True, "truncation": True, "return_tensors": "pt"} | kwargs)
            found |= {name: words[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature(found)
