"""Two scans that show the same place: in one patient, or in two."""

from collections.abc import Mapping, Sequence

import numpy as np

from medctkit.scans.heat_map import HeatMap
from medctkit.scans.volumes import CTVolume
from medctkit.viewers.drawing.rendering import Scan, Voxel

NOT_REACHED = "does not reach this place"


class LinkedScans:
    """A scan, and perhaps a second one that moves along with it.

    Where one of the two scanned boxes lies within the other (before and after pre-processing, two series of a patient)
    both show the same patient coordinates. Else they are of two patients, or nobody knows where these lay, and both
    show the same distance from the middle of their scan; `how` says which. The `masks` are those of the first.

    Raises:
        TypeError: not a CTVolume.
        ValueError: a mask of another shape; two volumes and not two names.
    """

    def __init__(
        self,
        volume: CTVolume,
        masks: Mapping[str, np.ndarray] | None = None,
        other: CTVolume | None = None,
        names: Sequence[str] | None = None,
    ):
        names = list(names or ("first scan", "second scan")[: 0 if other is None else 2])
        self.scans: tuple[Scan, ...] = (Scan.of(volume, masks, *names[:1]),)
        # what to add to patient coordinates of the first to come to the same place in each, (3,) mm
        self.offsets, self.how = [np.zeros(3)] * 2, "linked by patient coordinates"
        if other is None:
            return
        if len(names) != 2:
            raise ValueError(f"names {names}: expected two, one for each volume")
        first, second = self.scans = (*self.scans, Scan.of(other, None, names[1]))
        if not (first.placed or second.placed) or not _one_within_the_other(first, second):
            self.offsets[1] = second.middle - first.middle
            self.how = "linked by the distance from the middle of each scan"

    def voxels(self, voxel: Voxel) -> list[Voxel]:
        """For each scan the voxel (d, h, w) at, or nearest to, the place of a voxel of the first."""
        return [scan.nearest(where) for scan, where in zip(self.scans, self._in_each(voxel), strict=False)]

    def in_first(self, scan: int, voxel: Voxel) -> Voxel:
        """The voxel of the first scan at, or nearest to, the place of a voxel of scan 0 or 1."""
        first = self.scans[0]
        return first.nearest(first.voxel_of(self.scans[scan].point_of(voxel) - self.offsets[scan]))

    def described(self, voxel: Voxel) -> list[str]:
        """What a second scan has at the place of a voxel of the first, and by what the two are linked."""
        if len(self.scans) == 1:
            return []
        second, there = self.scans[1], self.in_second(voxel)
        return [f"{second.name}: {second.described(there) if there else NOT_REACHED}", self.how]

    def in_second(self, voxel: Voxel) -> Voxel | None:
        """The voxel of the second scan at the place of a voxel of the first; None where it does not reach."""
        where = self._in_each(voxel)[1]
        there = self.scans[1].nearest(where)
        return None if np.abs(where - there).max() > 0.5 + 1e-6 else there

    def _in_each(self, voxel: Voxel) -> list[np.ndarray]:
        """Where a voxel of the first scan lies in each: indices (d, h, w) with fractions."""
        point = self.scans[0].point_of(voxel)
        return [scan.voxel_of(point + offset) for scan, offset in zip(self.scans, self.offsets, strict=False)]


def _one_within_the_other(first: Scan, second: Scan) -> bool:
    """Do the two scanned boxes share nine tenths of the smaller one?"""
    boxes = []
    for scan in (first, second):
        corners = np.array([scan.point_of(np.array(at) * scan.volume.shape - 0.5) for at in np.ndindex(2, 2, 2)])
        boxes.append((corners.min(0), corners.max(0)))
    (low_a, high_a), (low_b, high_b) = boxes
    shared = np.prod(np.clip(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), 0, None))
    return bool(shared >= 0.9 * min(np.prod(high_a - low_a), np.prod(high_b - low_b)))


def heat_maps_of(heat_maps: Mapping[str, HeatMap] | None) -> dict[str, HeatMap]:
    """Named maps, refused unless each is a HeatMap."""
    for name, heat_map in (heat_maps or {}).items():
        if not isinstance(heat_map, HeatMap):
            raise TypeError(
                f"heat map {name!r} is of type {type(heat_map).__name__}, expected a HeatMap; "
                "HeatMap.of_voxels(values, volume) makes one of an array with the volume's shape"
            )
    return dict(heat_maps or {})
