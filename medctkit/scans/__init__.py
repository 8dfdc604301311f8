"""One scan file to Hounsfield units, and on to the model's input."""

from medctkit.scans.formats import Reader, register_reader
from medctkit.scans.heat_map import HeatMap
from medctkit.scans.hounsfield import check_hu
from medctkit.scans.preprocessing import PreprocessConfig, as_seen, model_affine, preprocess
from medctkit.scans.stored import Stored
from medctkit.scans.volumes import CTVolume, read_volume

__all__ = [
    "CTVolume",
    "HeatMap",
    "PreprocessConfig",
    "Reader",
    "Stored",
    "as_seen",
    "check_hu",
    "model_affine",
    "preprocess",
    "read_volume",
    "register_reader",
]
