"""From a CT volume to model input: the one path that training, evaluation and viewers share.

The steps are those behind the released weights (repository ibrahimethemhamamci/CT-CLIP): clip to [-1000, 1000] HU,
resample linearly to the model's spacing, divide by 1000, crop or pad to its shape and axes (z, x, y), which run towards
head, left and back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from medctkit.scans.geometry import CANONICAL, Lengths, checked_spacing, steps_of
from medctkit.scans.hounsfield import check_hu
from medctkit.scans.volumes import CTVolume, turned

if TYPE_CHECKING:
    import torch

FIELD_OF_VIEW = 360.0  # mm along each axis: 240 x 1.5 = 480 x 0.75
HU_LIMIT = 1000.0
ANTIALIAS_TARGET = 3.0  # mm; no chest CT is much coarser than this
ANTIALIAS_RATIO = 1.5
_SLAB = 4  # slices that are resampled at a time: what they need stays in the processor's cache


@dataclass(frozen=True)
class PreprocessConfig:
    """What a model wants to see.

    Args:
        spacing: mm along the model's axes.
        shape: voxels along them.
        antialias: average over what a coarse voxel covers, along each axis where the scan is finer than the
            model by more than a factor 1.5. The released pipeline does not, and its factors are near 1; a model
            of coarse voxels needs it, because two of 15 fine slices show their noise, not their average.
        hu_range: HU below and above are clipped; these two become -1 and 1.
        axes: the order of the model's axes, some order of z (towards the head), y (the back) and x (the left); a
            capital letter: the other way. "XYz" is what others call RAS.
    """

    spacing: tuple[float, float, float] = (1.5, 0.75, 0.75)
    shape: tuple[int, int, int] = (240, 480, 480)
    antialias: bool = False
    hu_range: tuple[float, float] = (-HU_LIMIT, HU_LIMIT)
    axes: str = "zxy"

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or not all(n == int(n) and n > 0 for n in self.shape):
            raise ValueError(f"shape={self.shape}: expected three positive numbers of voxels (z, x, y)")
        low, high = (float(end) for end in self.hu_range)
        if not low < high:
            raise ValueError(f"hu_range={self.hu_range}: expected the lower end, then the higher, in HU")
        if sorted(self.axes.lower()) != sorted("zyx"):
            raise ValueError(f"axes={self.axes!r}: expected z, y and x in some order, such as 'zxy' or 'XYz'")
        object.__setattr__(self, "spacing", checked_spacing(self.spacing, "(z, x, y)"))
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "hu_range", (low, high))

    @property
    def seen_as(self) -> tuple[int, int, int]:
        """Which of the model's axes d, h and w of a canonical scan are."""
        axes = self.axes.lower()
        return axes.index("z"), axes.index("y"), axes.index("x")

    @property
    def backwards(self) -> list[int]:
        """Those of the model's axes that run against the canonical scan's."""
        return [axis for axis, letter in enumerate(self.axes) if letter.isupper()]

    @property
    def scale(self) -> tuple[float, float]:
        """HU that become 0, and from there to 1."""
        low, high = self.hu_range
        return (low + high) / 2, (high - low) / 2

    @classmethod
    def for_shape(cls, shape: tuple[int, int, int], spacing: Sequence[float] | None = None) -> "PreprocessConfig":
        """So many voxels along each axis (z, x, y) of `spacing` mm; None: of the released field of view, 360 mm."""
        z, x, y = checked_spacing([FIELD_OF_VIEW / n for n in shape] if spacing is None else spacing, "(z, x, y)")
        return cls((z, x, y), shape, antialias=max(z, x, y) > ANTIALIAS_TARGET)


def moved_by(pixels: "torch.Tensor", by: Sequence[int]) -> "torch.Tensor":
    """Model input (1, d, h, w), moved by whole voxels along d, h and w; what comes in is air."""
    out = pixels.new_full(pixels.shape, -1.0)
    sizes = list(zip(pixels.shape[1:], by, strict=True))
    there, here = ([slice(max(0, sign * m), n + min(0, sign * m)) for n, m in sizes] for sign in (1, -1))
    out[:, *there] = pixels[:, *here]
    return out


def preprocess(volume: CTVolume, config: PreprocessConfig | None = None, *, check: bool = True) -> "torch.Tensor":
    """Turn a CT volume, which may lie in any orientation, into model input.

    Args:
        volume: scan in HU.
        config: what the model wants; by default what the released weights saw.
        check: refuse values that can't be the HU of a chest; False only for what is no scan, such as a mask.

    Returns:
        float32 tensor (1, *config.shape) along `config.axes`, in [-1, 1]; -1 (air) where the scan covers less than
        the model sees.

    Raises:
        TypeError: `volume` is not a `CTVolume`.
        ValueError: values that can't be the HU of a chest; less than one voxel of the model along some axis.
    """
    import torch

    if not isinstance(volume, CTVolume):
        raise TypeError(f"expected a CTVolume, as read_volume(path) gives it, got {type(volume).__name__}")
    config = PreprocessConfig() if config is None else config
    if check:
        check_hu(volume.hu)
    hu, spacing, _ = turned(volume)
    depth, rows, columns = _plan(hu.shape, spacing, config)
    d, h, w = (config.shape[seen_as] for seen_as in config.seen_as)
    model_input, (low, high), (middle, half) = torch.full((1, d, w, h), -1.0), config.hu_range, config.scale
    filled = model_input[0, depth.filled, columns.filled, rows.filled]
    for start in range(0, len(filled), _SLAB):
        slab = depth.part(slice(start, start + _SLAB))
        # only what the model will see is converted, clipped and resampled
        seen = hu[slab.used, rows.used, columns.used]
        values = torch.from_numpy(np.clip(seen, low, high, dtype=np.float32, order="C"))
        if middle:
            values -= middle
        values /= half
        values = rows.resample(slab.resample(values, 0), 1)
        # d h w -> d w h = z x y. Now, because whole rows are quicker to gather than single voxels
        values = columns.resample(values.transpose(1, 2).contiguous(), 1)
        filled[start : start + _SLAB] = values.clamp_(-1, 1)  # weights add up to 1 but for the last digit
    model_input = model_input.permute(0, *("zxy".index(axis) + 1 for axis in config.axes.lower()))
    return (model_input.flip([axis + 1 for axis in config.backwards]) if config.backwards else model_input).contiguous()


def model_affine(volume: CTVolume, config: PreprocessConfig | None = None) -> np.ndarray:
    """Where the voxels of what `preprocess` gives, of the same arguments, lie in the patient.

    Returns:
        4 x 4 matrix from the model's index (z, x, y, 1) to patient coordinates in mm (RAS, as `CTVolume.affine`).
    """
    to_scan = np.diag([0.0, 0, 0, 1])
    config = PreprocessConfig() if config is None else config
    hu, spacing, affine = turned(volume)
    for axis, seen_as, plan in zip(range(3), config.seen_as, _plan(hu.shape, spacing, config), strict=True):
        last = plan.scale * (config.shape[seen_as] - 1) if seen_as in config.backwards else 0
        to_scan[axis, seen_as], to_scan[axis, 3] = -plan.scale if last else plan.scale, plan.origin + last
    return affine @ to_scan


def as_seen(volume: CTVolume, config: PreprocessConfig | None = None) -> CTVolume:
    """What `preprocess` gives, of the same arguments, as a CT volume that viewers can show beside the scan itself.

    Returns:
        HU clipped to `config.hu_range`, float32, canonical, each voxel at its place in the patient.
    """
    config = PreprocessConfig() if config is None else config
    config = replace(config, axes=config.axes.lower())  # the same voxels, in canonical order
    (middle, half), (low, high) = config.scale, config.hu_range
    hu = preprocess(volume, config, check=False)[0].mul_(half).add_(middle).permute(config.seen_as).contiguous().numpy()
    affine = model_affine(volume, config)[:, [*config.seen_as, 3]]
    provenance = (*volume.provenance, f"resampled to what a model sees: {hu.shape} voxels, {low:g} to {high:g} HU")
    return CTVolume(hu, steps_of(affine), CANONICAL, affine, provenance)


@dataclass(frozen=True)
class _Axis:
    """Linear resampling along one axis, for the voxels that the crop keeps."""

    offset: int  # where the model's axis starts to be filled
    index: np.ndarray  # (taps, kept) which voxels of the scan make each new one
    weight: np.ndarray  # (taps, kept) and with what weights
    scale: float  # voxels of the scan from one voxel of the model to the next
    origin: float  # where the model's voxel 0 lies, in voxels of the scan

    @property
    def filled(self) -> slice:
        """The voxels of the model that the scan fills."""
        return slice(self.offset, self.offset + self.index.shape[1])

    @property
    def used(self) -> slice:
        """Voxels of the scan that are needed."""
        return slice(int(self.index.min()), int(self.index.max()) + 1)

    def part(self, new: slice) -> "_Axis":
        """The same for some of the new voxels, counted among those kept."""
        return replace(self, offset=self.offset + new.start, index=self.index[:, new], weight=self.weight[:, new])

    def resample(self, values: "torch.Tensor", axis: int) -> "torch.Tensor":
        """New voxels of those `used`."""
        import torch

        if self.scale == 1:
            return values
        indices = torch.from_numpy(self.index - self.used.start)
        weights = torch.from_numpy(self.weight).view(-1, *np.where(np.arange(3) == axis, self.index.shape[1], 1))
        total = values.index_select(axis, indices[0]).mul_(weights[0])
        for index, weight in zip(indices[1:], weights[1:], strict=True):
            total.addcmul_(values.index_select(axis, index), weight)
        return total


def _plan(shape: Sequence[int], spacing: Lengths, config: PreprocessConfig) -> list[_Axis]:
    """How d, h and w of a canonical scan are resampled."""
    axes = []
    for axis, (n, step, seen_as) in enumerate(zip(shape, spacing, config.seen_as, strict=True)):
        target, target_step = config.shape[seen_as], config.spacing[seen_as]
        resampled = int(n * step / target_step)
        if resampled < 1:
            found = f"the scan covers {n * step:g} mm along axis {axis} of (d, h, w)"
            raise ValueError(f"{found}, less than one voxel of the model ({target_step:g} mm)")
        kept, offset = min(resampled, target), max(target - resampled, 0) // 2
        start = max(resampled - target, 0) // 2
        ratio = n / resampled
        reach = ratio if config.antialias and ratio > ANTIALIAS_RATIO else 1.0
        centres = (np.arange(start, start + kept) + 0.5) * ratio - 0.5  # half-pixel centres, in voxels of the scan
        index = np.floor(centres - reach) + 1 + np.arange(np.ceil(2 * reach))[:, None]
        weight = np.maximum(1 - np.abs(index - centres) / reach, 0)  # a triangle; of reach 1: linear interpolation
        taps = weight.any(axis=1)  # where nothing is to be resampled the second has no weight
        index, weight = index[taps].clip(0, n - 1).astype(np.int64), weight[taps]  # the edge voxel goes on
        weight = (weight / weight.sum(axis=0)).astype(np.float32)
        axes.append(_Axis(offset, index, weight, ratio, (start - offset + 0.5) * ratio - 0.5))
    return axes
