"""Two scans that show the same place: in one patient, or in two."""

from collections.abc import Mapping, Sequence

import numpy as np

from medctkit.scans.volumes import CTVolume
from medctkit.viewers.drawing.rendering import Scan, Voxel


class LinkedScans:
    """A scan, and perhaps a second one that moves along with it.

    Where one of the two scanned boxes lies within the other (before and after pre-processing, two series of a patient)
    both show the same patient coordinates. Else they are of two patients, or nobody knows where these lay, and both
    show the same distance from the middle of their scan.

    Args:
        volume: any orientation.
        masks: those of `volume`.
        other: the second volume.
        names: what to call the two.

    Attributes:
        scans: one or two.
        offset: what to add to patient coordinates of the first to come to the same place in the second, mm.
        how: by what the two are linked, in words.

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
        if other is None:
            self.scans: tuple[Scan, ...] = (Scan.of(volume, masks, *(names or ())[:1]),)
            return
        names = ("first scan", "second scan") if names is None else tuple(names)
        if len(names) != 2:
            raise ValueError(f"names {names}: expected two, one for each volume")
        first, second = Scan.of(volume, masks, names[0]), Scan.of(other, None, names[1])
        self.scans = (first, second)
        self.offset, self.how = second.middle - first.middle, "linked by the distance from the middle of each scan"
        if (first.placed or second.placed) and _one_within_the_other(first, second):
            self.offset, self.how = np.zeros(3), "linked by patient coordinates"

    def voxels(self, voxel: Voxel) -> list[Voxel]:
        """For each scan the voxel (d, h, w) at, or nearest to, the place of a voxel of the first."""
        return [voxel, *(second.nearest(self._in_second(voxel)) for second in self.scans[1:])]

    def in_first(self, scan: int, voxel: Voxel) -> Voxel:
        """The voxel of the first scan at, or nearest to, the place of a voxel of scan 0 or 1."""
        if scan == 0:
            return voxel
        first, second = self.scans
        return first.nearest(first.voxel_of(second.point_of(voxel) - self.offset))

    def described(self, voxel: Voxel) -> list[str]:
        """What a second scan has at the place of a voxel of the first, and by what the two are linked."""
        said: list[str] = []
        for second in self.scans[1:]:
            where = self._in_second(voxel)
            there = second.nearest(where)
            outside = np.abs(where - there).max() > 0.5 + 1e-6
            said += [f"{second.name}: {'does not reach this place' if outside else second.described(there)}", self.how]
        return said

    def _in_second(self, voxel: Voxel) -> np.ndarray:
        """Where a voxel of the first scan lies in the second: an index (d, h, w) with fractions."""
        first, second = self.scans
        return second.voxel_of(first.point_of(voxel) + self.offset)


def _one_within_the_other(first: Scan, second: Scan) -> bool:
    """Do the two scanned boxes share nine tenths of the smaller one?"""
    boxes = []
    for scan in (first, second):
        corners = np.array([scan.point_of(np.array(at) * scan.volume.shape - 0.5) for at in np.ndindex(2, 2, 2)])
        boxes.append((corners.min(0), corners.max(0)))
    (low_a, high_a), (low_b, high_b) = boxes
    shared = np.prod(np.clip(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), 0, None))
    return bool(shared >= 0.9 * min(np.prod(high_a - low_a), np.prod(high_b - low_b)))
