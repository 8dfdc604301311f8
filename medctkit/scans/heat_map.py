"""Maps that lie over a CT: a number for each place of a coarse grid, such as the patches of a model, and where that is.

A map keeps its own grid. It is resampled, linearly between the middles of its cells, only where someone looks: for one
slice in a few milliseconds, for all voxels of a scan when a map is to be scored.
"""

from dataclasses import dataclass

import numpy as np

from medctkit.scans.volumes import CTVolume


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Numbers on a grid in the patient.

    Args:
        values: finite numbers of any scale, shape (d, h, w) of the map's own grid.
        affine: 4 x 4 matrix from the grid's index (d, h, w, 1) to patient coordinates in mm (RAS), as that of a
            `CTVolume`.
        name: what is shown, for legends.

    Raises:
        ValueError: values that are not a finite three-dimensional array, or an affine that is no place in space.
    """

    values: np.ndarray
    affine: np.ndarray
    name: str = "heat map"

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
        """A map with a number for each voxel of a volume.

        Raises:
            ValueError: another shape than the volume's.
        """
        if np.shape(values) != volume.shape:
            raise ValueError(f"heat map {name!r} has shape {np.shape(values)}, the volume {volume.shape}: give one")
        return cls(values, volume.affine, name)

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest value: the ends of a colour scale."""
        return float(self.values.min()), float(self.values.max())

    def at(self, points: np.ndarray) -> np.ndarray:
        """Values at patient coordinates (..., 3) in mm.

        Linear between the middles of cells, flat in the outer half of the outermost cells, NaN outside of the grid,
        where the map says nothing.
        """
        from scipy.ndimage import map_coordinates

        points = np.asarray(points, float)
        inverse = np.linalg.inv(self.affine)
        index = points @ inverse[:3, :3].T + inverse[:3, 3]
        places = np.moveaxis(np.atleast_2d(index), -1, 0)
        found = map_coordinates(self.values, places, order=1, mode="nearest").reshape(points.shape[:-1])
        last = np.array(self.values.shape) - 0.5
        return np.where(((index >= -0.5 - 1e-6) & (index <= last + 1e-6)).all(-1), found, np.nan)

    def on_voxels(self, volume: CTVolume) -> np.ndarray:
        """Values (d, h, w) float32 at each voxel of a volume; NaN where the map says nothing."""
        d, h, w = volume.shape
        rows, columns = np.arange(h)[:, None, None], np.arange(w)[None, :, None]
        found = np.empty(volume.shape, np.float32)
        for i in range(d):  # slice by slice, so that no array of all coordinates is needed
            index = np.concatenate(np.broadcast_arrays(np.full((1, 1, 1), i), rows, columns), axis=-1)
            found[i] = self.at(index @ volume.affine[:3, :3].T + volume.affine[:3, 3])
        return found
