"""One patient: the chest of the atlas, warped to a size, a shape and an age of its own.

The atlas is `assets/anatomy/chest.npz`, made by `tools/make_anatomy.py` from the lung atlas of the Chest Imaging
Platform (licence beside it): outlines, domes, gutters, bones and fissures of a real chest, and how sizes and
fissures vary over 100 people. Places are (z, y, x) in mm: up, back, left; "atlas" means before the warp.
"""

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import numpy as np

from medctkit.phantom import lung_raster, raster

LUNG_LOW, LUNG_STEP = np.array([-126.0, -105.0, -147.0]), 3.0
BODY_LOW, BODY_STEP = np.array([-134.0, -148.0, -196.0]), 4.0
UNIT = 0.25  # mm to one unit of a stored distance
BEND_LOW, BEND_STEP, BEND_KNOTS = np.array([-200.0, -200.0, -200.0]), 12.5, 33
LOBES = ("", "right upper lobe", "middle lobe", "right lower lobe", "left upper lobe", "left lower lobe")
# How chests differ from the atlas, whose subject has a slender middle and flat domes, and from each other: the axis
# along which a place of the atlas moves, its centre and how far around it things move along, (z, y, x) in mm; by how
# much on average, the standard deviation, mm, and what each year after 58 adds.
MIDDLE = (
    (0, (52, -24, 8), (26, 40, 34), 0.0, 5.0, 0.15),  # the arch: up
    (2, (52, -20, 12), (28, 40, 30), 0.0, 4.0, 0.05),  # to the left
    (2, (95, -36, 0), (32, 34, 32), 0.0, 4.5, -0.02),  # the trachea
    (1, (95, -36, 0), (32, 34, 32), 0.0, 3.0, 0.0),
    (2, (-22, -50, 56), (42, 42, 34), 9.0, 8.0, 0.06),  # the left border of the heart
    (2, (-22, -46, -22), (42, 40, 28), -4.0, 4.0, 0.0),  # the right one
    (0, (-30, -52, 48), (36, 44, 38), -2.0, 6.0, -0.03),  # the apex
    (1, (-26, -84, 24), (40, 30, 46), 0.0, 5.0, 0.0),  # the front of the heart
    (1, (-20, -10, 14), (34, 26, 44), 5.0, 4.0, 0.0),  # its back
    (2, (4, 16, 14), (34, 24, 24), 2.0, 4.0, 0.06),  # the aorta, where it runs down
    (2, (-44, 6, 10), (26, 24, 24), 3.0, 4.5, 0.04),
    (0, (-62, -22, -66), (40, 48, 34), 9.0, 4.0, 0.0),  # the top of the right dome
    (0, (-66, -22, 68), (40, 48, 34), 7.0, 4.0, 0.0),  # of the left one
)
FISSURES = ("right_oblique", "right_horizontal", "left_oblique")


@cache
def atlas() -> dict[str, np.ndarray]:
    """The arrays of the atlas, ready to be sampled, and the places (n, 3) inside its lungs."""
    with (files("medctkit") / "assets" / "anatomy" / "chest.npz").open("rb") as file, np.load(file) as stored:
        table = {name: stored[name] for name in stored.files}
    delta = ("soft", "bone", "skin", "lung")
    for name in delta:
        table[name] = np.cumsum(table[name], axis=2, dtype=np.int8)
    table["body"] = np.stack([table.pop(name) for name in delta[:3]]).astype(np.float32)  # read faster than int8
    table["lung"] = table["lung"][None].astype(np.float32)
    table["middle"] = table["middle"].astype(np.float64)
    table["places"] = np.argwhere(table["lung"][0] > 4).astype(np.int16)
    # a smooth curve through 9 knots of 50 mm, at every 12.5 mm
    knots, fine = np.arange(9) * 50.0, np.arange(BEND_KNOTS) * BEND_STEP
    t = np.abs(fine[:, None] - knots) / 50
    table["spline"] = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - np.minimum(t, 2)) ** 3 / 6, 0))
    tile = np.random.default_rng(20261).normal(size=(64, 64, 64)).astype(np.float32)
    table["tile"] = tile * 1.9  # what is left of it between the knots has a standard deviation of about 1
    return table


def _below() -> np.ndarray:
    """How far down in the chest the knots of a bend lie (k, 1, 1): 0 above the hila, 1 at the domes and below."""
    below = np.clip((10 - (BEND_LOW[0] + BEND_STEP * np.arange(BEND_KNOTS))) / 80, 0, 1)[:, None, None]
    return below**2 * (3 - 2 * below)


@dataclass(frozen=True)
class Tree:
    """A branching tree of vessels or bronchi: n branches.

    Attributes:
        start, end: (n, 3) mm, in the patient.
        first, last: (n,) radii in mm.
        lobe: (n,) 1 to 5, see `LOBES`.
        parent: (n,) index of the branch it comes from, -1 at a root.
        depth: (n,) number of forks before it.
        fed: (n,) share of its lobe that it feeds.
    """

    start: np.ndarray
    end: np.ndarray
    first: np.ndarray
    last: np.ndarray
    lobe: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    fed: np.ndarray


# Places in the atlas where the vessels of a lobe come from: (z, y, x).
ARTERY_ROOTS = {1: (24, -8, -38), 2: (-2, -14, -44), 3: (2, 0, -48), 4: (26, -6, 40), 5: (10, 6, 48)}
VEIN_ROOTS = {1: (8, -22, -32), 2: (2, -22, -32), 3: (-10, -6, -28), 4: (10, -22, 36), 5: (-8, -4, 34)}
HEADINGS = {1: (0.5, -0.1, -0.8), 2: (-0.4, -0.7, -0.6), 3: (-0.9, 0.2, -0.3), 4: (0.3, -0.6, 0.7), 5: (-0.9, 0.2, 0.3)}


@dataclass(frozen=True)
class Patient:
    """One patient: what lasts over scans. Lengths in mm, scales are factors around 1.

    Attributes:
        sex: "F" or "M".
        age: years.
        scale: (3,) size against the atlas.
        bend: (3, k, k, k) what is added to a place of the patient to get one of the atlas.
        fissures: (3, 6) coefficients of their surfaces.
        fat: more fat under the skin than in the atlas.
        breast: height of the breasts, 0 for none.
        cushion: fat between the lungs more than in the atlas.
        heart: scale of the heart's enlargement when it is large.
        aorta: scale of the aorta's radius.
        bone: marrow, HU.
        seed: of the trees.
    """

    sex: str
    age: int
    scale: np.ndarray
    bend: np.ndarray
    fissures: np.ndarray
    fat: float
    breast: float
    cushion: float
    heart: float
    aorta: float
    bone: float
    seed: int

    @classmethod
    def sample(cls, rng: np.random.Generator, age: float = 58) -> "Patient":
        """Draw a patient of a mean age; sex and age shape bones, vessels and fat."""
        table = atlas()
        sex = "F" if rng.random() < 0.47 else "M"
        age = int(np.clip(rng.normal(age, 15), 20, 92))
        size = rng.multivariate_normal(np.zeros(3), table["size_cov"], method="cholesky") * 0.5
        size = (
            np.clip(size, -0.16, 0.16)
            + (0.035 if sex == "M" else -0.045)
            + np.array([-0.05, 0.02, 0]) * (age - 58) / 40
        )
        knots = rng.normal(0, 1, (3, 9, 9, 9)) * np.array([8.0, 7.0, 6.0])[:, None, None, None]
        bend = np.einsum("az,by,cx,izyx->iabc", *([table["spline"]] * 3), knots, optimize=True)
        at = BEND_LOW[0] + BEND_STEP * np.arange(BEND_KNOTS)
        left = 1 / (1 + np.exp(-at / 15))[None, None, :]
        right_dome, left_dome = rng.normal(2, 8), rng.normal(0, 7)
        bend[0] -= _below() * (left * left_dome + (1 - left) * right_dome)  # each dome has a height of its own
        for axis, centre, widths, mean, spread, aging in MIDDLE:
            z, y, x = (np.exp(-0.5 * ((at - c) / w) ** 2) for c, w in zip(centre, widths, strict=True))
            move = mean + np.clip(rng.normal(0, spread), -2 * spread, 2 * spread) + aging * (age - 58)
            bend[axis] -= move * z[:, None, None] * y[:, None] * x
        fissures = np.stack([
            rng.multivariate_normal(table[f"{name}_mean"], 0.4 * table[f"{name}_cov"], method="cholesky")
            for name in FISSURES
        ])  # fmt: skip
        fat = float(np.clip(rng.normal(3 if sex == "F" else 1, 5), -5, 14))
        return cls(
            sex=sex,
            age=age,
            scale=np.exp(size),
            bend=np.ascontiguousarray(bend, dtype=np.float64),
            fissures=fissures,
            fat=fat,
            breast=float(np.clip(rng.normal(24 + fat, 8), 10, 44)) if sex == "F" else 0.0,
            cushion=float(np.clip(rng.normal(3.5, 3) + 0.3 * fat + 0.03 * (age - 58), 0, 14)),
            heart=float(rng.uniform(1.16, 1.34)),
            aorta=float(np.exp(rng.normal(-0.02 + 0.004 * (age - 58), 0.07))),
            bone=float(np.clip(rng.normal(160 - 1.7 * (age - 50), 28), 60, 270)),
            seed=int(rng.integers(2**31)),
        )

    def breathing(self, raised: float) -> "Patient":
        """The same patient with both halves of the diaphragm higher by `raised` mm, as after a smaller breath."""
        bend = self.bend.copy()
        bend[0] -= raised * _below()
        return replace(self, bend=bend)

    def place(self, points: np.ndarray) -> np.ndarray:
        """Where places of the atlas (n, 3) lie in the patient (n, 3), mm."""
        points = np.ascontiguousarray(np.atleast_2d(points), dtype=np.float64)
        return raster.unwarped(points, self.scale, self.bend, BEND_LOW, BEND_STEP)

    def lobes_at(self, points: np.ndarray) -> np.ndarray:
        """The lobe (n,) of places of the atlas (n, 3) mm."""
        return lung_raster.lobes_at(points, self.fissures, atlas()["middle"], LUNG_LOW[:2], LUNG_STEP)

    def cloud(self, count: int, stream: int) -> np.ndarray:
        """Places (count, 3) in the lungs of the atlas, mm."""
        rng = np.random.default_rng((self.seed, stream))
        places = atlas()["places"]
        return (
            places[rng.integers(len(places), size=count)] + rng.uniform(-0.5, 0.5, (count, 3))
        ) * LUNG_STEP + LUNG_LOW

    def tree(self, kind: str, points: int = 12000, smallest: int = 5) -> Tree:
        """Grow the arteries or veins of both lungs, each inside its lobe.

        Args:
            kind: "artery" or "vein".
            points: places to feed.
            smallest: places fed by a last branch.
        """
        cloud = self.cloud(points, 1 if kind == "artery" else 2)
        lobes = self.lobes_at(cloud)
        roots = ARTERY_ROOTS if kind == "artery" else VEIN_ROOTS
        parts: list[tuple] = []
        before = 0
        for lobe in range(1, 6):
            own = cloud[lobes == lobe]
            if len(own) < 4 * smallest:
                continue
            room = 2 * len(own)
            start, end = np.empty((room, 3)), np.empty((room, 3))
            count, depth, parent = (np.empty(room, dtype=np.int64) for _ in range(3))
            root = np.array(roots[lobe], dtype=float)
            n = raster.grow(own, root, np.array(HEADINGS[lobe]), smallest, start, end, count, depth, parent)
            radius = (6.5 if kind == "artery" else 6.2) * (
                count[:n] / (points / 2)
            ) ** 0.355  # Murray: the cubes (nearly) of the radii add up
            first = np.where(parent[:n] >= 0, np.minimum(radius * 1.12, radius[parent[:n]]), radius)
            above = np.where(parent[:n] >= 0, parent[:n] + before, -1)
            fed = count[:n] / len(own)
            parts.append((start[:n], end[:n], first, radius * 0.97, np.full(n, lobe), above, depth[:n], fed))
            before += n
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        size = float(np.cbrt(self.scale.prod()))
        end, roots_at = self.place(columns[1]), np.flatnonzero(columns[5] < 0)
        start = end[columns[5]]  # a branch starts where the one it comes from ends
        start[roots_at] = self.place(columns[0][roots_at])
        return Tree(start, end, columns[2] * size, columns[3] * size, *columns[4:])


def beside(tree: Tree, lumen: np.ndarray, gap: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """The bronchi that run beside arteries: start and end (n, 3) in mm.

    Args:
        tree: the arteries.
        lumen: (n,) radii of the bronchi, mm.
        gap: between the two walls, mm.
    """
    way = tree.end - tree.start
    way = way / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-6)
    out = np.stack([np.full(len(way), 0.25), np.full(len(way), 0.5), np.where(tree.lobe > 3, -0.8, 0.8)], 1)
    out = out - (out * way).sum(1, keepdims=True) * way
    out = out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-6)
    out = out * (tree.last + lumen + gap)[:, None]
    come = np.where(tree.parent[:, None] >= 0, out[tree.parent], out)
    return tree.start + come, tree.end + out
