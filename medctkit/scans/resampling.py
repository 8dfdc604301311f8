"""Slices that were not taken on a straight and even grid, brought onto one by linear interpolation."""

import numpy as np
from scipy import ndimage


def straightened(hu: np.ndarray, shifts: np.ndarray, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """Move slices in their planes: the shear that undoes a gantry tilt, as dcm2niix does it.

    Args:
        hu: float32 (d, h, w).
        shifts: (d, 2), rows and columns that each slice lies away from the first.
        fill: HU of what no slice covers.

    Returns:
        Values (d, h + a, w + b), so that nothing is cut off, and which row and column of the first slice is at [0, 0].
    """
    shifts = np.round(shifts, 4)
    first = np.floor(shifts.min(axis=0))
    grown = (np.ceil(shifts.max(axis=0)) - first).astype(int)
    straight = np.empty((len(hu), *(hu.shape[1:] + grown)), np.float32)
    for old, new, shift in zip(hu, straight, shifts - first, strict=True):
        wide = np.pad(old, [(0, n) for n in grown], constant_values=fill)
        ndimage.shift(wide, shift, output=new, order=1, mode="grid-constant", cval=fill)
    return straight, first


def evened(hu: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Interpolate between slices (d, h, w), which lie at rising `heights` (d,), those at 0, 1, 2 ... to the last."""
    new = np.arange(round(heights[-1]) + 1)
    below = np.clip(np.searchsorted(heights, new, side="right") - 1, 0, len(heights) - 2)
    shares = np.round((new - heights[below]) / np.diff(heights)[below], 6).astype(np.float32)
    even = np.empty((len(new), *hu.shape[1:]), np.float32)
    for slice_, i, share in zip(even, below, shares, strict=True):
        slice_[:] = hu[i] + share * (hu[i + 1] - hu[i])
    return even
