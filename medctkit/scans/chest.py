"""Where in a long scan the chest is: found by its lungs, the largest gas inside of a body."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

_COARSE = 5.0  # mm, the grid on which lungs are looked for
_SOLID, _GAS = -300, -500  # HU above which there is body or table, below which there is gas
_LITRES = (0.4, 15.0)  # of gas in the lungs
_LEAST_LUNG = 0.2  # of the largest: the other lung is that large, gas of the bowel is not as large as a lung
_LEAST_AREA = 0.1  # of that in the widest slice: windpipe and throat, which go on from the lungs, are smaller
_MARGIN = 40.0  # mm kept beyond these slices: the rest of apices and bases, and some more


def chest_range(hu: np.ndarray, steps: Sequence[float]) -> tuple[int, int]:
    """The first and last slice of the chest in `hu` (d, h, w), d along the body: 4 cm on either side of the lungs.

    `steps` are mm along its axes.

    Raises:
        ValueError: no gas of the size of lungs.
    """
    stride = [max(1, round(_COARSE / mm)) for mm in steps]
    coarse = hu[tuple(slice(None, None, n) for n in stride)]
    voxel = np.prod([n * mm for n, mm in zip(stride, steps, strict=True)]) / 1e6  # litres
    # a table is thin, and its hollow closed as a body's is; so it is taken away before gas inside is looked for
    solid = ndimage.binary_opening(coarse > _SOLID)
    labels, found = ndimage.label(solid)
    body = labels == 1 + np.argmax(ndimage.sum_labels(solid, labels, range(1, found + 1))) if found else solid
    inside = np.array([ndimage.binary_fill_holes(picture) for picture in body])
    labels, found = ndimage.label(inside & (coarse < _GAS))
    litres = voxel * np.bincount(labels.ravel(), minlength=2)[1:]
    lungs = 1 + np.flatnonzero(litres >= _LEAST_LUNG * litres.max())
    total = litres[lungs - 1].sum()
    if not _LITRES[0] <= total <= _LITRES[1]:
        raise ValueError(
            f"{total:.2g} litres of gas inside of the body, lungs have {_LITRES[0]:g} to {_LITRES[1]:g}: the chest was "
            "not found; cut it out by hand"
        )
    area = np.isin(labels, lungs).sum(axis=(1, 2))
    depth = np.flatnonzero(area >= _LEAST_AREA * area.max()) * stride[0]
    margin = round(_MARGIN / steps[0])
    return max(int(depth[0]) - margin, 0), min(int(depth[-1]) + stride[0] + margin, len(hu)) - 1
