"""The pre-processing as MONAI transforms, to be composed with MONAI's own and used with its data sets.

They are deterministic, so `monai.data.PersistentDataset` and `CacheDataset` keep what they give. Those that end in d
take dictionaries, replace what is under `keys`, and may pass over keys that an item lacks.
"""

import os
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform

from medctkit.scans.preprocessing import PreprocessConfig, model_affine, preprocess
from medctkit.scans.volumes import CTVolume, read_volume


class ReadVolume(Transform):
    """Path of a scan to `CTVolume`, as `medctkit.read_volume`.

    Args:
        **reading: its other arguments, such as rescale_slope or orientation.
    """

    def __init__(self, **reading: Any):
        self.reading = reading

    def __call__(self, path: str | os.PathLike) -> CTVolume:
        """Raises as `read_volume` does."""
        return read_volume(path, **self.reading)


class Preprocess(Transform):
    """`CTVolume` to model input, as `medctkit.preprocess`.

    Args:
        config: what the model wants; by default what the released weights saw.
    """

    def __init__(self, config: PreprocessConfig | None = None):
        self.config = PreprocessConfig() if config is None else config

    def __call__(self, volume: CTVolume) -> MetaTensor:
        """Model input (1, z, x, y) in [-1, 1], with the affine of its voxels (RAS mm) and the scan's provenance.

        Raises:
            TypeError: not a `CTVolume`.
            ValueError: as `preprocess`.
        """
        pixels = preprocess(volume, self.config)
        affine = torch.from_numpy(model_affine(volume, self.config))
        return MetaTensor(pixels, affine=affine, meta={"provenance": list(volume.provenance)})


class ReadVolumed(MapTransform):
    """`ReadVolume` for dictionaries."""

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, **reading: Any):
        super().__init__(keys, allow_missing_keys)
        self.transform = ReadVolume(**reading)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The item with each path replaced by its `CTVolume`."""
        return dict(data) | {key: self.transform(data[key]) for key in self.key_iterator(data)}


class Preprocessd(MapTransform):
    """`Preprocess` for dictionaries."""

    def __init__(self, keys: KeysCollection, config: PreprocessConfig | None = None, allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.transform = Preprocess(config)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The item with each `CTVolume` replaced by model input."""
        return dict(data) | {key: self.transform(data[key]) for key in self.key_iterator(data)}
