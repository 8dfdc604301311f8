"""What a scanner makes of a body: slice thickness, kernel, noise, table; and how one study is drawn."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d

from medctkit.phantom import raster
from medctkit.phantom.body import Body
from medctkit.phantom.patient import Patient
from medctkit.phantom.registry import Finding
from medctkit.phantom.tissue import Tissue

DEPTH = 320.0  # mm from the neck to the upper abdomen
DISEASE = 3  # layers up to this one change the density of lungs and airways; later ones press aside or replace
BLUR = 2  # voxels over which a scan spreads what is drawn, at most


def table(body: Body, shape: str) -> None:
    """Paint the table under the patient's back, curved or flat, into the air of the body's `hu` (d, h, w)."""
    middle = np.abs(body.x) < 60
    solid = (body.hu[:, :, middle] > -500).any(axis=(0, 2))
    back = float(body.y[np.flatnonzero(solid)[-1]]) if solid.any() else 120.0
    y, x = body.y[:, None], body.x[None, :]
    if shape == "curved":
        bow, inside = y - back - 5 + 0.0009 * x**2, 195 - np.abs(x)
        layers = ((0.0, 1.6, -350.0), (24.0, 1.6, -450.0))
    else:
        bow, inside = y - back - 3 + 0 * x, 205 - np.abs(x)
        layers = ((5.0, 3.2, 60.0), (32.0, 3.2, -120.0))
    for depth, half, value in layers:
        share = np.clip((half - np.abs(bow - depth)) / body.edge + 0.5, 0, 1) * np.clip(inside / body.edge + 0.5, 0, 1)
        rows = np.flatnonzero(share.max(axis=1) > 0)
        if len(rows):
            part = body.hu[:, rows[0] : rows[-1] + 1]
            part += np.where(part < -900, share[rows[0] : rows[-1] + 1][None] * (value - part), 0).astype(np.float32)


def blurred(values: np.ndarray, axis: int, width: float, reach: int, wrap: bool = False) -> np.ndarray:
    """Blur values (d, h, w), float32, along an axis in place.

    Args:
        values: C-contiguous.
        axis: 0 to 2.
        width: standard deviation, voxels.
        reach: where the Gauss curve is cut off, voxels.
        wrap: the ends meet; otherwise they are repeated.

    Returns:
        The values.
    """
    if axis == 2:  # rows are too short for the compiled loop
        mode = "wrap" if wrap else "nearest"
        return gaussian_filter1d(values, width, axis=2, mode=mode, radius=reach, output=values)
    raster.blur(values.reshape(int(np.prod(values.shape[:axis])), values.shape[axis], -1), curve(width, reach), wrap)
    return values


def curve(width: float, reach: int) -> np.ndarray:
    """Weights (n,), float32, of a Gauss curve of `width` voxels that is cut off at `reach`: n = 2 * reach + 1."""
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def smoothed(values: np.ndarray, widths: tuple[float, float], wrap: bool) -> np.ndarray:
    """Noise (n, h, w) blurred in place along rows and columns by `widths` voxels, of unit spread."""
    for axis, width in zip((1, 2), widths, strict=True):
        if width > 0.25:
            reach = int(3 * width + 0.5)
            blurred(values, axis, width, reach, wrap)
            values /= np.sqrt((curve(width, reach) ** 2).sum())
    return values


def expose(
    body: Body, scanner: Any, rng: np.random.Generator, noise_rng: np.random.Generator, reconstruction: int
) -> np.ndarray:
    """The scan (d, h, w), int16 HU.

    Noise is correlated within a slice and stronger where the shoulders and the middle of a large patient take photons;
    between the shoulders it runs in streaks. It depends on the patient's outline alone: two drawings of a patient
    that differ in a finding get the same.

    Args:
        body: the painted chest.
        scanner: a `Hospital`.
        rng: of dose and calibration.
        noise_rng: of the noise.
        reconstruction: 0, 1, ...: which kernel.
    """
    sharpness = scanner.sharpness + (0.0, -0.7, 0.5)[reconstruction % 3]
    dose, drift = rng.lognormal(0, 0.15), rng.normal(0, scanner.drift)
    hu = body.hu if scanner.thickness <= 1 else blurred(body.hu.copy(), 0, 0.42 * scanner.thickness, BLUR)
    soft = blurred(blurred(hu.copy(), 1, 0.8, BLUR), 2, 0.8, BLUR)
    gain = min(sharpness, 1.0)
    soft *= -gain
    soft += (1 + gain) * hu
    ratio = float(np.prod(body.spacing)) / (1.5 * 0.7 * 0.7)
    sigma = scanner.noise * dose * (1 + 0.4 * sharpness) * max(0.3, ratio**-0.25)
    width = scanner.grain * float(np.clip(0.9 / body.spacing[2], 0.55, 1.0))  # voxels
    top = float(body.patient.scale[0]) * 92  # mm: from here up the shoulders lie in the slice
    across = (1 + 0.3 * np.exp(-((body.x / 95) ** 2))[None, :] * np.exp(-(((body.y + 5) / 75) ** 2))[:, None]).astype(
        np.float32
    )
    streaks = np.random.default_rng(noise_rng.integers(2**63))
    some = max(1, 2**20 // (body.shape[1] * body.shape[2]))
    for start in range(0, body.shape[0], some):  # some slices at a time: small memory
        part = soft[start : start + some]
        shoulders = np.clip((body.z[start : start + some] - top + 25) / 35, 0, 1).astype(np.float32)[:, None, None]
        grain = smoothed(noise_rng.standard_normal(part.shape, dtype=np.float32), (width, width), True)
        if shoulders.any():
            first = int(np.argmax(shoulders[:, 0, 0] > 0))
            lines = streaks.standard_normal(part[first:].shape, dtype=np.float32)
            grain[first:] *= 1 + 0.25 * shoulders[first:]
            grain[first:] += 0.9 * shoulders[first:] * smoothed(lines, (0.6, 14), False)
        part += (sigma * across) * grain
    soft += drift
    np.rint(soft, out=soft)
    return np.clip(soft, -1024, 3071, out=soft).astype(np.int16)


def draw(
    patient: Patient,
    tissue: Tissue,
    registry: Mapping[str, Finding],
    labels: Mapping[str, int],
    shape: tuple[int, int, int],
    scanner: Any,
    offset: tuple[float, float, float],
    density: float,
    randomness: Callable[[str], np.random.Generator],
) -> tuple[Body, dict[str, np.ndarray], dict[str, dict], np.ndarray]:
    """Draw a patient with the findings that labels name.

    Args:
        patient: whose chest.
        tissue: HU in this scan.
        registry: of the findings.
        labels: 0 or 1 for each.
        shape: voxels (d, h, w).
        scanner: a `Hospital`.
        offset: (z, y, x) mm of the patient from the middle of the scan.
        density: share of its density that disease of lungs and airways reaches.
        randomness: a source for each finding's name.

    Returns:
        The body, the masks (d, h, w), the details, and a boolean array (d, h, w): outside it the scan is the healthy
        patient's, voxel for voxel.
    """
    spacing = (DEPTH / shape[0], scanner.field_of_view / shape[1], scanner.field_of_view / shape[2])
    body = Body(shape, spacing, offset, patient, tissue)
    table(body, scanner.table)
    present = [f for f in sorted(registry.values(), key=lambda f: f.layer) if labels[f.name]]
    healthy = body.hu.copy() if present else body.hu
    masks, details = {}, {}
    for disease in (True, False):
        for finding in present:
            if (finding.layer <= DISEASE) is disease:
                share, details[finding.name] = finding.paint(body, randomness(finding.name))
                # what is thinner than a voxel still gets a mask: its strongest voxels
                masks[finding.name] = share > min(0.5, 0.35 * float(share.max()))
        if disease and masks:
            for sick, well in zip(body.hu, healthy, strict=True):
                sick += np.float32(density - 1) * (sick - well)
    changed = body.hu != healthy
    if present:
        for axis in range(3):  # what the blur reaches
            before, changed = changed, changed.copy()
            for step in range(1, BLUR + 1):
                ahead, behind = (
                    (*(slice(None),) * axis, part)
                    for part in (slice(step, None), slice(None, before.shape[axis] - step))
                )
                changed[ahead] |= before[behind]
                changed[behind] |= before[ahead]
    return body, masks, details, changed
