"""The healthy half of a phantom: a procedural chest, painted in Hounsfield units.

Everything is analytic. A structure is an approximate signed distance in mm (positive inside) that can be
evaluated on a voxel grid or on a list of points, so the same patient can be painted at any resolution and
a lesion can ask whether a point lies in the lung. Axes follow `CTVolume`: z grows towards Superior, y
towards Posterior, x towards the patient's Left, in mm from the middle of the thorax.

Organ sizes and Hounsfield units are ordinary textbook values for adults; none is fitted to a data set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Point = Sequence[float] | np.ndarray  # (z, y, x) in mm
Box = tuple[slice, slice, slice]  # of a grid
Found = tuple[Box, np.ndarray]  # a box of the grid, and the share of each of its voxels that is filled


class Canvas:
    """A voxel grid in patient coordinates and the Hounsfield units painted on it so far.

    Args:
        shape: voxels (d, h, w).
        spacing: (d, h, w) in mm.
        offset: (z, y, x) in mm of the patient's centre from the centre of the grid.
    """

    def __init__(self, shape: tuple[int, int, int], spacing: Point, offset: Point = (0.0, 0.0, 0.0)):
        # Small grids are painted in float64, so that rounding to whole HU gives the same bytes everywhere.
        self.dtype = np.float64 if np.prod(shape) < 2**21 else np.float32
        self.shape, self.spacing = shape, spacing
        axes = [
            ((np.arange(n) - (n - 1) / 2) * s - o).astype(self.dtype)
            for n, s, o in zip(shape, spacing, offset, strict=True)
        ]
        self.axes = axes
        self.z: np.ndarray
        self.y: np.ndarray
        self.x: np.ndarray
        self.z, self.y, self.x = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
        self.edge = max(0.8, float(np.prod(spacing)) ** (1 / 3))  # mm over which a surface fades: partial volume
        self.hu: np.ndarray = np.full(shape, -1000.0, dtype=self.dtype)

    @property
    def everywhere(self) -> Box:
        """The box that is the whole grid."""
        return (slice(None), slice(None), slice(None))

    def box(self, low: Point, high: Point) -> Box | None:
        """Voxels between two corners (mm), with a margin for soft edges; None if outside the grid."""
        slices = []
        for axis, lo, hi in zip(self.axes, low, high, strict=True):
            start = int(np.searchsorted(axis, lo - self.edge))
            stop = int(np.searchsorted(axis, hi + self.edge, side="right"))
            if start >= stop:
                return None
            slices.append(slice(start, stop))
        return (slices[0], slices[1], slices[2])

    def coordinates(self, box: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Broadcastable z, y, x (mm) of a box."""
        return self.z[box[0]], self.y[:, box[1]], self.x[:, :, box[2]]

    def occupancy(self, distance: np.ndarray) -> np.ndarray:
        """Share of each voxel inside a surface, from the signed distance in mm."""
        return np.clip(distance / self.edge + 0.5, 0.0, 1.0)

    def paint(self, box: Box, share: np.ndarray, value: float | np.ndarray) -> None:
        """Blend `value` (HU, scalar or array) into a box, by share of the voxel."""
        view = self.hu[box]
        view += share * (value - view)

    def fill(self, low: Point, high: Point, distance: Callable[..., np.ndarray], value: float) -> Found | None:
        """Paint a local shape; `distance` maps (z, y, x) to mm. Returns (box, share), None if off the grid."""
        box = self.box(low, high)
        if box is None:
            return None
        share = self.occupancy(distance(*self.coordinates(box)))
        self.paint(box, share, value)
        return box, share

    def ellipsoid(self, centre: Point, radii: Point, value: float, axis: Point | None = None) -> Found | None:
        """Paint an ellipsoid, its first radius along `axis` if one is given."""
        reach = max(radii) if axis is not None else None
        low = tuple(c - (reach or r) for c, r in zip(centre, radii, strict=True))
        high = tuple(c + (reach or r) for c, r in zip(centre, radii, strict=True))
        return self.fill(low, high, lambda z, y, x: ellipsoid(z, y, x, centre, radii, axis), value)

    def tube(
        self, points: np.ndarray, radius: float | np.ndarray, value: float, share: np.ndarray | None = None
    ) -> None:
        """Paint a polyline of radius mm (scalar or one per point); collect it into `share` if given."""
        points = np.asarray(points, dtype=float)
        radii = np.broadcast_to(np.asarray(radius, dtype=float), len(points))
        found = tubes(self, np.stack([points[:-1], points[1:]], axis=1), (radii[:-1] + radii[1:]) / 2)
        if found is not None:
            self.paint(found[0], found[1], value)
            if share is not None:
                np.maximum(share[found[0]], found[1], out=share[found[0]])


def ellipsoid(
    z: np.ndarray, y: np.ndarray, x: np.ndarray, centre: Point, radii: Point, axis: Point | None = None
) -> np.ndarray:
    """Approximate signed distance (mm) at z, y, x to an ellipsoid at `centre`; the first of `radii` is along `axis`."""
    dz, dy, dx = z - centre[0], y - centre[1], x - centre[2]
    if axis is None:
        q = (dz / radii[0]) ** 2 + (dy / radii[1]) ** 2 + (dx / radii[2]) ** 2
    else:  # a spheroid: radii[0] along the axis, radii[1] across
        a = np.asarray(axis) / np.linalg.norm(axis)
        along = dz * a[0] + dy * a[1] + dx * a[2]
        q = (along / radii[0]) ** 2 + (dz**2 + dy**2 + dx**2 - along**2) / radii[1] ** 2
    return (1.0 - np.sqrt(np.maximum(q, 0.0))) * min(radii)


def capsule(z: np.ndarray, y: np.ndarray, x: np.ndarray, start: Point, end: Point, radius: float) -> np.ndarray:
    """Signed distance (mm) at z, y, x to a segment from `start` to `end` (z, y, x), thickened by radius; all in mm."""
    d = np.subtract(end, start)
    t = (z - start[0]) * d[0] + (y - start[1]) * d[1] + (x - start[2]) * d[2]
    t = np.clip(t / max(float(d @ d), 1e-6), 0.0, 1.0)
    return radius - np.sqrt(
        (z - start[0] - t * d[0]) ** 2 + (y - start[1] - t * d[1]) ** 2 + (x - start[2] - t * d[2]) ** 2
    )


def tubes(canvas: Canvas, segments: np.ndarray, radii: np.ndarray) -> Found | None:
    """Share of every voxel filled by many tubes: segments (n, 2, 3) and radii (n,), in mm.

    Thick tubes are drawn as capsules. Thin ones are scattered as points that carry their volume, which
    keeps the right mean density however coarse the grid is.

    Returns:
        (box, share) around all of them, or None if they lie off the grid.
    """
    if not len(radii):
        return None
    reach = radii[:, None]
    box = canvas.box((segments.min(1) - reach).min(0), (segments.max(1) + reach).max(0))
    if box is None:
        return None
    axes = [axis[s] for axis, s in zip(canvas.axes, box, strict=True)]
    share = np.zeros([len(axis) for axis in axes], dtype=canvas.dtype)
    thick = radii > 0.6 * max(canvas.spacing[1:])
    if not thick.all():
        scatter_thin(share, axes, canvas.spacing, segments[~thick], radii[~thick])
    for (start, end), radius in zip(segments[thick], radii[thick], strict=True):
        part = canvas.box(np.minimum(start, end) - radius, np.maximum(start, end) + radius)
        if part is not None:
            found = canvas.occupancy(capsule(*canvas.coordinates(part), start, end, radius))
            view = share[tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(part, box, strict=True))]
            np.maximum(view, found, out=view)
    return box, share


def scatter_thin(
    share: np.ndarray, axes: Sequence[np.ndarray], spacing: Point, segments: np.ndarray, radii: np.ndarray
) -> None:
    """Add the volume of thin tubes (radii in mm) to the voxels of `share` (d, h, w), with trilinear weights."""
    lengths = np.linalg.norm(segments[:, 1] - segments[:, 0], axis=1)
    counts = np.maximum(1, np.ceil(2 * lengths / min(spacing))).astype(int)
    index = np.repeat(np.arange(len(segments)), counts)
    t = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + 0.5) / counts[index]
    points = segments[index, 0] + t[:, None] * (segments[index, 1] - segments[index, 0])
    weight = (np.pi * radii**2 * lengths / counts / np.prod(spacing))[index]
    place = (points - np.array([axis[0] for axis in axes])) / np.array(spacing)
    base = np.floor(place).astype(int)
    fraction = place - base
    corners = np.array(list(np.ndindex(2, 2, 2)))[:, None]  # (8, 1, 3)
    at = base + corners
    weights = weight * np.where(corners, fraction, 1 - fraction).prod(axis=2)
    inside = ((at >= 0) & (at < share.shape)).all(axis=2)
    flat = np.ravel_multi_index(tuple(at[inside].T), share.shape)
    added = np.bincount(flat, weights=weights[inside], minlength=share.size).reshape(share.shape)
    np.minimum(share + added, 1.0, out=share, casting="same_kind")


@dataclass(frozen=True)
class Anatomy:
    """One patient: sizes that persist over scans. Lengths in mm; scales are factors around 1."""

    width: float  # half width of the thoracic cavity
    depth: float  # half depth (front to back) of the cavity
    height: float  # scale of everything along z
    fat: float  # thickness of subcutaneous fat
    breasts: float  # 0 for none
    heart: float  # scale of the heart
    dome: float  # height of the right diaphragm dome
    aorta: float  # radius of the ascending aorta
    bone: float  # density of trabecular bone, HU
    tree_seed: int  # vessels and bronchi

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Anatomy":
        """Draw a patient."""
        size = rng.normal(1.0, 0.05)
        female = rng.random() < 0.5
        return cls(
            width=128 * size * rng.normal(1, 0.03),
            depth=90 * size * rng.normal(1, 0.05),
            height=size * rng.normal(1, 0.03),
            fat=float(np.clip(rng.lognormal(2.6, 0.4), 6, 32)),
            breasts=rng.uniform(22, 42) if female else 0.0,
            heart=rng.normal(0.97, 0.035) * size,
            dome=-78 + rng.normal(0, 7),
            aorta=rng.normal(14.5, 1.3) * size,
            bone=rng.uniform(110, 240),
            tree_seed=int(rng.integers(2**31)),
        )

    # ---- regions: signed distances in mm ----

    def _superellipse(self, y, x, half_depth, half_width, centre=0.0, p=2.3):
        q = np.abs((y - centre) / half_depth) ** p + np.abs(x / half_width) ** p
        return (1.0 - q ** (1 / p)) * np.minimum(half_depth, half_width)

    def cavity(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Signed distance (mm) at z, y, x (mm) from the inside of the rib cage, from the apex down into the abdomen."""
        t = np.clip((z / self.height + 20) / 157, 0.0, 0.9999)
        r = (1 - t**2.4) ** 0.55
        return self._superellipse(y, x, self.depth * r**0.8 + 1, self.width * r + 1, centre=8 * t)

    def body(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Signed distance (mm) at z, y, x (mm) from the skin: torso, shoulders, neck and breasts."""
        zs = z / self.height
        w, d, f = self.width, self.depth, self.fat
        levels = [-200, -60, 40, 95, 128, 150, 168, 185]
        width = np.interp(zs, levels, [w + 16 + f, w + 19 + f, w + 22 + f, w + 30 + f, w + 26 + f, 110, 66, 58])
        depth = np.interp(zs, levels, [d + 17 + f, d + 20 + f, d + 22 + f, d + 18 + f, d + 4 + f, 82, 64, 60])
        skin = self._superellipse(y, x, depth, width, centre=np.interp(zs, levels, [0, 2, 5, 9, 14, 16, 14, 12]))
        if self.breasts:
            for side in (-1, 1):
                centre = (-8.0, -(d + f * 0.6), side * 78.0)
                skin = np.maximum(skin, ellipsoid(z, y, x, centre, (62, self.breasts + 12, 58)))
        return skin

    def diaphragm(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Height z (mm) of the diaphragm: two domes, the right one higher, falling to the costophrenic angles."""
        right = self.dome - ((x + 62) / 66) ** 2 * 26 - ((y + 12) / 78) ** 2 * 34
        left = self.dome - 9 - ((x - 66) / 62) ** 2 * 26 - ((y + 8) / 78) ** 2 * 34
        middle = self.dome - 26 - (y / 90) ** 2 * 20 + 0 * x
        return np.maximum(np.maximum(right, left), middle)

    def heart_region(
        self, z: np.ndarray, y: np.ndarray, x: np.ndarray, scale: float = 1.0, grow: float = 0.0
    ) -> np.ndarray:
        """Signed distance (mm) at z, y, x (mm): ventricles and atria, times `scale`, grown by `grow` mm."""
        s = self.heart * scale
        left = 4 * (scale - 1) * 10
        parts = (
            ((-44, -30, 22 + left), (60 * s, 43 * s, 43 * s), (-0.46, -0.42, 0.78)),
            ((-28, -14, -24 - left * 0.4), (36 * s, 30 * s, 25 * s), None),
            ((-10, 16, 6), (27 * s, 21 * s, 36 * s), None),
        )
        found = [ellipsoid(z, y, x, c, r, a) for c, r, a in parts]
        return np.maximum(np.maximum(found[0], found[1]), found[2]) + grow

    def spine(self, z: np.ndarray, y: np.ndarray, x: np.ndarray, grow: float = 0.0) -> np.ndarray:
        """Signed distance (mm) at z, y, x (mm): vertebral column and what clings to it, grown by `grow` mm."""
        return ellipsoid(0 * z, y, x, (0, self.depth * 0.74, 0), (1e3, 24 + grow, 20 + grow))

    def lung(
        self, z: np.ndarray, y: np.ndarray, x: np.ndarray, side: int, heart_scale: float = 1.0, low: float = 0.0
    ) -> np.ndarray:
        """Signed distance (mm) at z, y, x (mm) from the surface of one lung, positive inside.

        Args:
            z: in mm, as y and x.
            y: in mm.
            x: in mm.
            side: +1 the patient's left, -1 the right.
            heart_scale: factor of the heart's size.
            low: mm by which hyperinflation pushes the diaphragm down.
        """
        zs = z / self.height
        front = np.interp(zs, [-150, -60, 20, 70, 130], [13, 13, 10, 16, 22])
        mid = np.interp(zs, [-150, -60, 0, 40, 90, 130], [26, 28, 32, 30, 32, 30])
        back = np.interp(zs, [-150, 0, 60, 130], [20, 20, 22, 30])
        t = np.clip((y + self.depth) / (2 * self.depth), 0, 1)  # 0 front, 1 back
        half = np.where(t < 0.55, front + (mid - front) * np.sin(t / 0.55 * np.pi / 2) ** 2, 0.0)
        half = np.where(t >= 0.55, mid + (back - mid) * ((t - 0.55) / 0.45), half)
        inside = np.minimum(self.cavity(z, y, x) - 2.5, side * x - half)
        inside = np.minimum(inside, 0.8 * (z - (self.diaphragm(y, x) - low)))
        inside = np.minimum(inside, -self.heart_region(z, y, x, heart_scale, grow=6.0))
        # the descending aorta and the spine indent the lung
        if side > 0:
            inside = np.minimum(inside, -(16 - np.hypot(y - self.depth * 0.53, x - 26)) + 0 * z)
        return np.minimum(inside, -self.spine(z, y, x))

    # ---- vessels and airways: polylines (n, 3) in mm ----

    def vessels(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Centre lines (z, y, x) and radii (mm) of the great vessels."""
        a, back = self.aorta, self.depth * 0.53
        arch = [
            (-5, -16, -6),
            (20, -20, -14),
            (44, -18, -14),
            (60, -6, -6),
            (66, 12, 8),
            (62, 30, 20),
            (48, back, 25),
        ]
        aorta = np.array(arch + [(20, back + 2, 26), (-30, back + 3, 24), (-90, back + 1, 14), (-185, back - 2, 4)])
        return {
            "aorta": (aorta, np.linspace(a, a * 0.78, len(aorta))),
            "brachiocephalic artery": (
                np.array([(62, -4, -6), (100, -6, -16), (150, 2, -24)]),
                np.full(3, 6.0),
            ),
            "left carotid artery": (np.array([(66, 8, 6), (105, 6, 14), (185, 4, 24)]), np.full(3, 4.0)),
            "left subclavian artery": (
                np.array([(64, 20, 14), (105, 18, 26), (130, 14, 60)]),
                np.full(3, 5.0),
            ),
            "pulmonary trunk": (np.array([(-2, -34, 14), (18, -30, 16), (32, -12, 20)]), np.full(3, 14.0)),
            "right pulmonary artery": (
                np.array([(30, -10, 14), (26, 6, -10), (20, 8, -40)]),
                np.array([11, 11, 10.0]),
            ),
            "left pulmonary artery": (
                np.array([(34, -8, 22), (36, 10, 36), (28, 20, 46)]),
                np.array([11, 11, 9.0]),
            ),
            "superior vena cava": (
                np.array([(95, -10, -24), (50, -10, -28), (-5, -8, -26)]),
                np.full(3, 9.0),
            ),
            "left brachiocephalic vein": (
                np.array([(88, -26, 26), (82, -26, 0), (76, -14, -24)]),
                np.full(3, 6.5),
            ),
            "inferior vena cava": (
                np.array([(-45, 4, -24), (-90, 8, -22), (-185, 20, -18)]),
                np.full(3, 11.0),
            ),
        }

    def airways(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Centre lines and lumen radii (mm) of the trachea and the main and lobar bronchi."""
        carina = (38.0, 18.0, 0.0)
        return {
            "trachea": (np.array([(190, 2, 0), (110, 8, 0), (70, 14, -1), carina]), np.full(4, 8.5)),
            "right main bronchus": (np.array([carina, (26, 18, -18), (16, 18, -36)]), np.array([7.5, 7, 6])),
            "left main bronchus": (np.array([carina, (24, 20, 22), (12, 22, 42)]), np.array([7, 6.5, 5.5])),
            "intermediate bronchus": (
                np.array([(18, 18, -32), (-6, 18, -40), (-26, 24, -46)]),
                np.array([5.5, 5, 4]),
            ),
            "left lower bronchus": (
                np.array([(12, 22, 42), (-8, 28, 48), (-28, 32, 54)]),
                np.array([5, 4.5, 3.8]),
            ),
            "right upper bronchus": (
                np.array([(26, 18, -26), (34, 14, -44), (46, 12, -52)]),
                np.array([5, 4, 3.2]),
            ),
            "left upper bronchus": (
                np.array([(14, 20, 40), (24, 6, 52), (38, 2, 60)]),
                np.array([5, 4, 3.2]),
            ),
        }

    def tree(self, side: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A branching tree in one lung: segments (n, 2, 3), radii (n,) in mm and generation (n,).

        Args:
            side: +1 left, -1 right.
            kind: "artery", "vein" or "bronchus"; bronchi run beside the arteries.
        """
        offset = {"artery": 0, "bronchus": 0, "vein": 7}[kind] + (100 if side > 0 else 0)
        rng = np.random.default_rng((self.tree_seed, offset))
        root = np.array([14.0, 16.0, side * 44.0]) + (np.array([-12, -4, 0]) if kind == "vein" else 0)
        n = 11
        # first directions fan out over the lung: up, down, front, back, always away from the midline
        tilt = np.linspace(-1.35, 1.25, n) + rng.normal(0, 0.12, n)
        turn = rng.permutation(np.linspace(-1.15, 1.15, n)) + rng.normal(0, 0.15, n)
        direction = np.stack([np.sin(tilt), np.cos(tilt) * np.sin(turn), side * np.cos(tilt) * np.cos(turn)], 1)
        start = np.repeat(root[None], n, 0)
        radius, length = np.full(n, 4.2), rng.uniform(20, 34, n)
        segments, radii, generations = [], [], []
        for generation in range(8):
            end = start + direction * length[:, None]
            segments.append(np.stack([start, end], 1))
            radii.append(radius)
            generations.append(np.full(len(radius), generation))
            inside = self.lung(end[:, 0], end[:, 1], end[:, 2], side) > 2
            if generation == 7 or not inside.any():
                break
            start = np.repeat(end[inside], 2, 0)
            sway = rng.normal(0, 1, (len(start), 3))
            sway[1::2] = -sway[::2] + rng.normal(0, 0.4, sway[1::2].shape)
            direction = np.repeat(direction[inside], 2, 0) + 0.48 * sway
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            m = len(start)
            radius = np.repeat(radius[inside], 2) * rng.uniform(0.66, 0.82, m)
            length = np.repeat(length[inside], 2) * rng.uniform(0.68, 0.95, m)
        lines, widths, numbers = np.concatenate(segments), np.concatenate(radii), np.concatenate(generations)
        if kind == "bronchus":
            return lines + np.array([2.0, 4.5, 0.0]), widths * 0.8, numbers
        return lines, widths, numbers

    def sample_in_lung(
        self,
        rng: np.random.Generator,
        side: int,
        zone: tuple[float, float] = (0.0, 1.0),
        depth: tuple[float, float] = (4.0, 60.0),
        back: tuple[float, float] = (-1.0, 1.0),
        tries: int = 4000,
    ) -> tuple[float, float, float]:
        """A point (z, y, x) in one lung.

        Args:
            rng: source of randomness.
            side: +1 left, -1 right.
            zone: from 0 (base) to 1 (apex).
            depth: wanted distance (mm) from the surface of the lung.
            back: from -1 (front) to 1 (back).
            tries: points drawn at once; the first that fits is taken, else the one nearest the wanted depth.
        """
        z = rng.uniform(-118 + 240 * zone[0], -118 + 240 * zone[1], tries) * self.height
        y = rng.uniform(back[0], back[1], tries) * self.depth
        x = side * rng.uniform(14, self.width, tries)
        inside = self.lung(z, y, x, side)
        fits = np.flatnonzero((inside >= depth[0]) & (inside <= depth[1]))
        best = fits[0] if len(fits) else int(np.argmin(np.abs(inside - depth[0])))
        return float(z[best]), float(y[best]), float(x[best])
