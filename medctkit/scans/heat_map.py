"""Maps that lie over a CT: a number for each place of a coarse grid, such as the patches of a model, and where that is.

A map keeps its own grid and is resampled only where someone looks.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates

from medctkit.scans.volumes import CTVolume


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Numbers on a grid in the patient.

    Args:
        values: finite numbers of any scale, shape (d, h, w) of the map's own grid.
        affine: 4 x 4 matrix from the grid's index to patient coordinates in mm, as that of a `CTVolume`.
        name: what is shown, for legends.
        smooth: linear between the middles of cells; else each cell has one value up to its edges.
    """

    values: np.ndarray
    affine: np.ndarray
    name: str = "heat map"
    smooth: bool = True

    def __post_init__(self) -> None:
        values, affine = np.asarray(self.values, np.float32), np.array(self.affine, float)
        if values.ndim != 3 or 0 in values.shape:
            raise ValueError(f"heat map {self.name!r} has shape {values.shape}; expected three axes (d, h, w)")
        if not np.isfinite(values).all():
            raise ValueError(f"heat map {self.name!r} has values that are not finite numbers")
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
            raise ValueError(f"heat map {self.name!r}: its affine must be an invertible 4 x 4 matrix, got {affine}")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "affine", affine)

    @classmethod
    def of_voxels(cls, values: np.ndarray, volume: CTVolume, name: str = "heat map") -> "HeatMap":
        """A map with a number for each voxel (d, h, w) of a volume."""
        if np.shape(values) != volume.shape:
            raise ValueError(f"heat map {name!r} has shape {np.shape(values)}, the volume {volume.shape}: give one")
        return cls(values, volume.affine, name)

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest value: the ends of a colour scale."""
        return float(self.values.min()), float(self.values.max())

    def at(self, points: np.ndarray) -> np.ndarray:
        """Values at patient coordinates (..., 3) in mm.

        Between the middles of cells linear where the map is `smooth`, flat in the outer half of the outermost cells,
        NaN outside of the grid, where the map says nothing.
        """
        points = np.asarray(points, float)
        inverse = np.linalg.inv(self.affine)
        index = points @ inverse[:3, :3].T + inverse[:3, 3]
        places = np.moveaxis(np.atleast_2d(index), -1, 0)
        found = map_coordinates(self.values, places, order=int(self.smooth), mode="nearest").reshape(points.shape[:-1])
        last = np.array(self.values.shape) - 0.5
        return np.where(((index >= -0.5 - 1e-6) & (index <= last + 1e-6)).all(-1), found, np.nan)

    def on_voxels(self, volume: CTVolume) -> np.ndarray:
        """Values (d, h, w) float32 at each voxel of a volume; NaN where the map says nothing."""
        found = np.empty(volume.shape, np.float32)
        index = np.moveaxis(np.indices((1, *volume.shape[1:]))[:, 0], 0, -1)
        for i in range(volume.shape[0]):  # slice by slice, so that no array of all coordinates is needed
            index[..., 0] = i
            found[i] = self.at(index @ volume.affine[:3, :3].T + volume.affine[:3, 3])
        return found
