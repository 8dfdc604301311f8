"""The pre-processing as MONAI transforms of dictionaries, to be composed with MONAI's own and used with its data sets.

They are deterministic, so `monai.data.CacheDataset` and `PersistentDataset` keep what they give. By default the latter
loses affine and provenance; `PersistentDataset(..., track_meta=True, weights_only=False)` keeps both, in a folder that
only you write to. The transforms replace what is under `keys`, and may pass over keys that an item lacks.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from medctkit.scans.preprocessing import PreprocessConfig, model_affine, preprocess
from medctkit.scans.volumes import CTVolume, read_volume


class ReadVolumed(MapTransform):
    """Path of a scan to `CTVolume`; `reading` are the other arguments of `medctkit.read_volume`."""

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, **reading: Any):
        super().__init__(keys, allow_missing_keys)
        self.reading = reading

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The item with each path replaced by its `CTVolume`."""
        return dict(data) | {key: read_volume(data[key], **self.reading) for key in self.key_iterator(data)}


class Preprocessd(MapTransform):
    """`CTVolume` to model input, as `medctkit.preprocess`; by default what the released weights saw."""

    def __init__(self, keys: KeysCollection, config: PreprocessConfig | None = None, allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.config = config

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The item with each `CTVolume` replaced by model input."""
        return dict(data) | {key: self._seen(data[key]) for key in self.key_iterator(data)}

    def _seen(self, volume: CTVolume) -> MetaTensor:
        """Model input (1, z, x, y) in [-1, 1], with the affine of its voxels (RAS mm) and the scan's provenance."""
        affine = torch.from_numpy(model_affine(volume, self.config))
        meta = {"provenance": list(volume.provenance)}
        return MetaTensor(preprocess(volume, self.config), affine=affine, meta=meta)
