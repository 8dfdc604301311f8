"""Findings of the lungs and the pleura, painted into a chest where they belong.

Each function takes the chest and a source of randomness, changes the Hounsfield units, and returns
(share, details): how much of every voxel the finding fills, and what a report may say about it. Size, place
and number are drawn within the range a radiologist would report; none of it is fitted to CT-RATE.
"""

from typing import Any

import numpy as np

from medctkit.phantom.anatomy import Canvas, Found, Point, ellipsoid, tubes
from medctkit.phantom.chest import Chest

SIDES = {1: "left", -1: "right"}
Painted = tuple[np.ndarray, dict[str, Any]]  # share of every voxel, what a report may tell


def waves(z: np.ndarray, y: np.ndarray, x: np.ndarray, rng: np.random.Generator, scale: float) -> np.ndarray:
    """Smooth pseudo-noise in about [-1, 1] that varies over `scale` mm, the same at any resolution."""
    total = np.zeros(1)
    for _ in range(3):
        k = rng.normal(size=3) / scale
        bend = rng.normal(size=3) * 0.6 / scale
        phase = rng.uniform(0, 2 * np.pi, 2)
        warp = 1.4 * np.sin(bend.sum() * (z - y) + x * bend[2] + phase[1])
        total = total + np.sin(k[0] * z + k[1] * y + k[2] * x + phase[0] + warp)
    return total / 2.2


def cells(z: np.ndarray, y: np.ndarray, x: np.ndarray, rng: np.random.Generator, scale: float) -> np.ndarray:
    """Round bumps in about [-1, 1], a few `scale` mm apart, the same at any resolution."""
    p = rng.uniform(0, 2 * np.pi, 6)
    return (
        np.sin(x / scale + p[0] + 1.1 * np.sin(y / (1.7 * scale) + p[1]))
        * np.sin(y / scale + p[2] + 1.1 * np.sin(z / (1.9 * scale) + p[3]))
        * np.sin(z / scale + p[4] + 1.1 * np.sin(x / (1.6 * scale) + p[5]))
    )


def sheet(canvas: Canvas, distance: np.ndarray, thickness: float) -> np.ndarray:
    """Share of every voxel in a sheet of `thickness` mm, from the distance (mm) to its middle."""
    width = max(thickness, canvas.edge)
    return canvas.occupancy(width / 2 - np.abs(distance)) * (thickness / width)


class Marks:
    """Collects the share of every voxel that a finding fills."""

    def __init__(self, chest: Chest):
        self.chest, self.canvas = chest, chest.canvas
        self.share = np.zeros(self.canvas.shape, dtype=self.canvas.dtype)

    def add(self, found: Found | None) -> None:
        """Add a (box, share) pair; None adds nothing."""
        if found is not None:
            box, share = found
            np.maximum(self.share[box], share, out=self.share[box])

    def blob(
        self,
        centre: Point,
        radii: Point,
        rng: np.random.Generator,
        rough: float = 0.25,
        in_lung: bool = True,
        soft: float = 0.0,
    ) -> Found | None:
        """(box, share) of an irregular ellipsoid, None off the grid.

        Args:
            centre: (z, y, x) in mm.
            radii: (z, y, x) in mm.
            rng: of the bumps.
            rough: height of the bumps as a share of the smallest radius.
            in_lung: cut off at the surface of the lungs.
            soft: mm by which the edge is softened.
        """
        reach = [r * (1 + rough) + soft for r in radii]
        box = self.canvas.box(np.subtract(centre, reach), np.add(centre, reach))
        if box is None:
            return None
        z, y, x = self.canvas.coordinates(box)
        distance = ellipsoid(z, y, x, centre, radii) + rough * min(radii) * waves(z, y, x, rng, 0.45 * min(radii))
        share = np.clip(distance / (self.canvas.edge + soft) + 0.5, 0, 1)
        if in_lung:
            share = share * self.canvas.occupancy(self.chest.lung_depth[box])
        return box, share


def draw_sides(rng: np.random.Generator, both: float = 0.5) -> tuple[list[int], str]:
    """One side or both: (list of +1 left and -1 right, what a report calls it)."""
    sides = [1, -1] if rng.random() < both else [int(rng.choice([1, -1]))]
    return sides, "bilateral" if len(sides) == 2 else SIDES[sides[0]]


def lobe_of(z: float, side: int) -> str:
    """The lobe at height z (mm), roughly."""
    if z > 30:
        return "upper lobe"
    if z > -20:
        return "lingula" if side > 0 else "middle lobe"
    return "lower lobe"


def severity(value: float, cuts: tuple[float, float] = (0.33, 0.7)) -> str:
    """A word for a number."""
    return ("mild", "moderate", "severe")[int(np.searchsorted(cuts, value))]


# ---- lungs ----


def emphysema(chest: Chest, rng: np.random.Generator) -> Painted:
    """Holes of air: many small ones in the upper lobes, or larger ones under the pleura."""
    c, marks = chest.canvas, Marks(chest)
    kind = "centrilobular" if rng.random() < 0.7 else "paraseptal"
    burden = rng.uniform(0.25, 1.0)
    scale = rng.uniform(2.4, 4.2) if kind == "centrilobular" else rng.uniform(4.5, 7)
    bumps = cells(c.z, c.y, c.x, rng, scale) + 0.35 * waves(c.z, c.y, c.x, rng, 9 * scale)
    upper = np.clip((c.z + 75) / 130, 0.05, 1)
    if kind == "paraseptal":
        upper = upper * np.clip(1.3 - chest.lung_depth / 26, 0, 1)
    # holes smaller than a voxel average out: a wider edge paints their mean loss of density instead
    share = np.clip((bumps - 0.75 + 0.95 * burden * upper) * 2.2 * scale / max(c.edge, 0.8 * scale) + 0.4, 0, 1)
    share = share * np.clip(upper * 2.2, 0, 1) * c.occupancy(chest.lung_depth - 1)
    c.paint(c.everywhere, share * (c.hu < -500), -985.0)
    marks.add((c.everywhere, share))
    return marks.share, dict(kind=kind, severity=severity(burden), side="bilateral", location="upper lobe")


def mosaic(chest: Chest, rng: np.random.Generator) -> Painted:
    """Patchwork of lobules: some keep their air and stay dark, their neighbours are denser."""
    c, marks = chest.canvas, Marks(chest)
    noise = waves(c.z, c.y, c.x, rng, rng.uniform(9, 13))
    bright = np.clip(noise * 2.5 * 9 / max(c.edge, 3) + 0.5, 0, 1) * c.occupancy(chest.lung_depth)
    c.hu += bright * rng.uniform(95, 165) * (c.hu < -500)
    c.hu -= (1 - bright) * c.occupancy(chest.lung_depth) * 25 * (c.hu < -500)
    marks.add((c.everywhere, bright))
    return marks.share, dict(side="bilateral", severity=severity(rng.random()))


def septal_thickening(chest: Chest, rng: np.random.Generator) -> Painted:
    """A net of thickened interlobular septa, dense at the bases and under the pleura."""
    c, marks = chest.canvas, Marks(chest)
    cell, thickness = rng.uniform(13, 19), rng.uniform(1.5, 2.6)
    z, y, x = c.z, c.y, c.x
    found = np.zeros(c.shape, dtype=c.dtype)
    for normal in ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)):
        warp = 5.5 * waves(z, y, x, rng, 15) + rng.uniform(0, cell)
        along = (normal[0] * z + normal[1] * y + normal[2] * x) / np.sqrt(3) + warp
        distance = (along % cell) - cell / 2
        np.maximum(found, sheet(c, distance, thickness), out=found)
    patchy = np.clip(0.75 + 0.8 * waves(z, y, x, rng, 30), 0, 1)
    place = np.clip(0.8 - (z + 60) / 150, 0.0, 1) * np.clip(1.4 - chest.lung_depth / 30, 0.3, 1) * patchy
    share = found * np.clip(place * 1.6, 0, 1) * c.occupancy(chest.lung_depth)
    c.paint(c.everywhere, 0.75 * share, 5.0)
    c.hu += 60 * c.occupancy(chest.lung_depth) * place * (c.hu < -600)
    marks.add((c.everywhere, share * (place > 0.3)))
    return marks.share, dict(side="bilateral", location="lower lobe", severity=severity(thickness / 2.8))


def opacity(chest: Chest, rng: np.random.Generator) -> Painted:
    """Ground-glass opacity: hazy patches through which the vessels still show."""
    marks = Marks(chest)
    count = int(rng.integers(1, 6))
    delta = rng.uniform(190, 340)
    lobes, sides = [], set()
    for _ in range(count):
        side = int(rng.choice([1, -1]))
        centre = chest.anatomy.sample_in_lung(rng, side, zone=(0.1, 0.9), depth=(3, 28), back=(-0.6, 1))
        found = marks.blob(centre, rng.uniform(16, 42, 3), rng, rough=0.35, soft=7.0)
        if found is not None:
            box, share = found
            chest.canvas.hu[box] += share * delta * np.clip(-chest.canvas.hu[box] / 800, 0, 1)
            marks.add(found)
        lobes.append(lobe_of(centre[0], side))
        sides.add(side)
    told = "bilateral" if len(sides) == 2 else SIDES[sides.pop()]
    return marks.share, dict(side=told, location=lobes[0], count=count, kind="ground-glass")


def consolidation(chest: Chest, rng: np.random.Generator) -> Painted:
    """Air spaces filled up: dense, with air bronchograms, often bounded by a fissure or the pleura."""
    c, marks = chest.canvas, Marks(chest)
    count = int(rng.integers(1, 4))
    side = int(rng.choice([1, -1]))
    places = []
    for _ in range(count):
        s = side if rng.random() < 0.6 else -side
        centre = chest.anatomy.sample_in_lung(rng, s, zone=(0.05, 0.75), depth=(6, 30), back=(-0.3, 1))
        places.append((s, lobe_of(centre[0], s)))
        found = marks.blob(centre, rng.uniform(17, 38, 3), rng, rough=0.4, soft=1.5)
        if found is None:
            continue
        box, share = found
        c.paint(box, share * (c.hu[box] < 30), rng.uniform(20, 50))
        c.hu[box] += np.clip(-c.hu[box] - 400, 0, 300) * np.clip(share * 4, 0, 1) * 0.5
        marks.add(found)
        low, high = np.subtract(centre, 36), np.add(centre, 36)
        near = lambda seg, low=low, high=high: ((seg > low) & (seg < high)).all(axis=(1, 2))  # noqa: E731
        segments, radii, generation = chest.anatomy.tree(s, "bronchus")
        chosen = near(segments) & (generation <= 3)
        air = tubes(c, segments[chosen], np.maximum(radii[chosen], 1.6))
        if air is not None:
            c.paint(air[0], air[1] * (marks.share[air[0]] > 0.3), -900.0)
    return marks.share, dict(side=SIDES[places[0][0]], location=places[0][1], count=count)


def nodule(chest: Chest, rng: np.random.Generator) -> Painted:
    """One to four round nodules of 5 to 28 mm, some calcified, some with a rough edge."""
    marks = Marks(chest)
    count = int(rng.choice([1, 2, 3, 4], p=[0.5, 0.25, 0.15, 0.1]))
    largest, where = 0.0, (1, "upper lobe")
    for _ in range(count):
        side = int(rng.choice([1, -1]))
        centre = chest.anatomy.sample_in_lung(rng, side, zone=(0.08, 0.95), depth=(6, 40))
        radius = 0.5 * float(np.exp(rng.uniform(np.log(6), np.log(28))))
        found = marks.blob(centre, (radius,) * 3, rng, rough=0.08 if rng.random() < 0.6 else 0.25)
        if found is not None:
            chest.canvas.paint(found[0], found[1], 320.0 if radius < 6 and rng.random() < 0.25 else rng.uniform(15, 60))
            marks.add(found)
        if radius > largest:
            largest, where = radius, (side, lobe_of(centre[0], side))
    return marks.share, dict(side=SIDES[where[0]], location=where[1], size_mm=round(2 * largest), count=count)


def atelectasis(chest: Chest, rng: np.random.Generator) -> Painted:
    """Collapse: dense plates at the bases, or a wedge against the posterior pleura."""
    c, marks = chest.canvas, Marks(chest)
    sides, side = draw_sides(rng, 0.45)
    wedge = rng.random() < 0.45
    for s in sides:
        if wedge:
            centre = chest.anatomy.sample_in_lung(rng, s, zone=(0.08, 0.3), depth=(2, 8), back=(0.55, 1))
            found = marks.blob(centre, (rng.uniform(22, 38), rng.uniform(10, 18), rng.uniform(26, 40)), rng, 0.2)
            marks.add(found)
        for _ in range(0 if wedge else int(rng.integers(2, 5))):
            centre = chest.anatomy.sample_in_lung(rng, s, zone=(0.1, 0.42), depth=(8, 30))
            tilt = rng.normal(0, 0.3, 2)
            half = rng.uniform(24, 46)
            box = c.box(np.subtract(centre, half), np.add(centre, half))
            if box is None:
                continue
            z, y, x = c.coordinates(box)
            dz, dy, dx = z - centre[0], y - centre[1], x - centre[2]
            plate = sheet(c, dz + tilt[0] * dy + tilt[1] * dx + 2 * np.sin(dx / 14), rng.uniform(3.5, 7.5))
            inside = c.occupancy(half - np.sqrt(dy**2 + dx**2 + 0 * dz)) * c.occupancy(chest.lung_depth[box])
            marks.add((box, plate * inside))
    c.paint(c.everywhere, marks.share * (c.hu < 40), 25.0)
    return marks.share, dict(side=side, location="lower lobe", kind="subsegmental" if wedge else "linear")


def fibrosis(chest: Chest, rng: np.random.Generator) -> Painted:
    """Old scars: irregular strands that run to a thickened pleura, mostly at an apex or a base."""
    c, marks = chest.canvas, Marks(chest)
    sides, side = draw_sides(rng, 0.4)
    apical = rng.random() < 0.65
    for s in sides:
        zone = (0.84, 0.99) if apical else (0.06, 0.25)
        centre = np.array(chest.anatomy.sample_in_lung(rng, s, zone=zone, depth=(3, 14), back=(-0.4, 0.9)))
        n = int(rng.integers(10, 20))
        start = centre + rng.normal(0, 8, (n, 3))
        heading = rng.normal(0, 1, (n, 3)) * (0.6, 1, 1) + np.array([0.5 if apical else -0.3, 0, 0.5 * s])
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        middle = start + heading * rng.uniform(8, 20, (n, 1)) + rng.normal(0, 2, (n, 3))
        end = middle + (heading + rng.normal(0, 0.35, (n, 3))) * rng.uniform(8, 20, (n, 1))
        segments = np.concatenate([np.stack([start, middle], 1), np.stack([middle, end], 1)])
        found = tubes(c, segments, np.tile(rng.uniform(1.1, 2.6, n), 2))
        if found is not None:
            marks.add((found[0], found[1] * c.occupancy(chest.lung_depth[found[0]] + 2)))
        # pleural cap over the scar
        reach = rng.uniform(24, 34)
        box = c.box(centre - reach, centre + reach)
        if box is not None:
            near = c.occupancy(ellipsoid(*c.coordinates(box), centre, (reach,) * 3))
            cap = sheet(c, chest.lung_depth[box] - 1.5, rng.uniform(3, 6)) * near
            marks.add((box, cap))
            c.hu[box] += 90 * near * c.occupancy(chest.lung_depth[box]) * (c.hu[box] < -500)
    c.paint(c.everywhere, marks.share * (c.hu < 30), 20.0)
    return marks.share, dict(side=side, location="apical" if apical else "basal")


def peribronchial(chest: Chest, rng: np.random.Generator) -> Painted:
    """Thick cuffs around the bronchi of both lungs."""
    marks = Marks(chest)
    wall = rng.uniform(1.9, 3.2)
    marks.add(chest.bronchi((1.2, np.inf), wall=wall, generations=(0, 3)))
    return marks.share, dict(side="bilateral", severity=severity((wall - 1.9) / 1.3), location="central")


def bronchiectasis(chest: Chest, rng: np.random.Generator) -> Painted:
    """Bronchi wider than the artery beside them, seen far out in a lobe."""
    marks = Marks(chest)
    sides, side = draw_sides(rng, 0.45)
    upper = rng.random() < 0.3
    for s in sides:
        segments, radii, generation = chest.anatomy.tree(s, "bronchus")
        in_zone = segments[:, 1, 0] > 25 if upper else segments[:, 1, 0] < 10
        chosen = in_zone & (generation >= 1) & (generation <= 4)
        factor = rng.uniform(2.0, 3.0)
        wide = np.clip(radii[chosen] * factor, 2.4, 7.0)
        marks.add(chest.rings(segments[chosen], wide, wall=rng.uniform(1.2, 1.9)))
    kind = str(rng.choice(["cylindrical", "varicose", "cystic"], p=[0.7, 0.15, 0.15]))
    return marks.share, dict(side=side, location="upper lobe" if upper else "lower lobe", kind=kind)


# ---- pleura ----


def pleural_effusion(chest: Chest, rng: np.random.Generator) -> Painted:
    """Fluid that settles behind the lung, with a meniscus, and takes its room."""
    c, marks, a = chest.canvas, Marks(chest), chest.anatomy
    sides, side = draw_sides(rng, 0.5)
    amount = rng.uniform(0.12, 0.62)
    for s in sides:
        own = amount * rng.uniform(0.7, 1.0)
        level = a.depth * (1 - 1.25 * own)  # y of the surface at the base
        surface = level + np.maximum(c.z + 90, 0) * 0.32 - 9 * np.clip((s * c.x - 0.6 * a.width) / 40, 0, 1)
        room = np.minimum(chest.cavity_depth - 1, s * c.x - 14)
        room = np.minimum(room, 0.8 * (c.z - a.diaphragm(c.y, c.x) + chest.low))
        room = np.minimum(room, np.maximum(chest.lung_depth, room - 6))
        fluid = np.minimum(room, c.y - surface)
        share = c.occupancy(fluid) * ((c.hu < -120) | (chest.lung_depth > -3))
        c.paint(c.everywhere, share, rng.uniform(4, 18))
        marks.add((c.everywhere, share))
        rim = c.occupancy(np.minimum(8 - np.abs(c.y - surface + 6), np.minimum(chest.lung_depth, c.y - surface + 14)))
        c.paint(c.everywhere, rim * 0.55 * (1 - share), -60.0)
    return marks.share, dict(side=side, severity=severity(amount, (0.25, 0.45)), size_mm=round(90 * amount))
