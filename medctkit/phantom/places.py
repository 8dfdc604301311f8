"""Where findings lie: sides, lobes, places, lobules and territories of a body, and the words of a report for them."""

import numpy as np

from medctkit.phantom import lung_raster, raster
from medctkit.phantom.body import Body
from medctkit.phantom.patient import LOBES, LUNG_LOW, LUNG_STEP, Tree, atlas

SIDES = {1: "left", -1: "right"}
OF_SIDE = {-1: (1, 2, 3), 1: (4, 5)}


def severity(value: float, cuts: tuple[float, float] = (0.33, 0.7)) -> str:
    """A word for a number between 0 and 1."""
    return ("mild", "moderate", "severe")[int(np.searchsorted(cuts, value))]


def told(lobes: list[int]) -> dict[str, str]:
    """Side and lobe in the words of a report, from the lobes (1 to 5) that have a finding."""
    sides = sorted({1 if lobe > 3 else -1 for lobe in lobes})
    names = {LOBES[lobe].removeprefix("right ").removeprefix("left ") for lobe in lobes}
    side = "bilateral" if len(sides) == 2 else SIDES[sides[0]]
    return dict(side=side, location=names.pop()) if len(names) == 1 else dict(side=side)


def sides_of(rng: np.random.Generator, both: float) -> tuple[list[int], str]:
    """The sides that a finding is on (1 left, -1 right), both with a chance, and the word for it."""
    sides = [1, -1] if rng.random() < both else [int(rng.choice([1, -1]))]
    return sides, "bilateral" if len(sides) == 2 else SIDES[sides[0]]


def around(body: Body, centre: np.ndarray, reach: np.ndarray) -> tuple[slice, ...]:
    """The box of the voxels that lie within reach (3,) of a place (3,), mm; one voxel at least."""
    low, high = (np.rint((centre + side * reach - body.low) / body.step + side).astype(int) for side in (-1, 1))
    last = np.array(body.shape) - 1
    return tuple(slice(a, b + 1) for a, b in zip(np.clip(low, 0, last), np.clip(high, 0, last), strict=True))


def box_of(inside: np.ndarray, margin: int) -> tuple[slice, ...]:
    """The box of the voxels (d, h, w) that are true, with a margin in voxels."""
    found = (np.flatnonzero(inside.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    return tuple(slice(max(at[0] - margin, 0), at[-1] + margin + 1) if len(at) else slice(0, 1) for at in found)


def lung_share(body: Body, grow: float = 0.0) -> np.ndarray:
    """How much of each voxel (d, h, w) lies in a lung, grown by mm."""
    return np.clip((body.lung + grow) / body.edge + 0.5, 0, 1)


def fill(body: Body, share: np.ndarray, value: float, below: float = 30.0) -> None:
    """Paint what is solid and may touch the pleura: a voxel that is half wall and half finding holds no air.

    Args:
        body: the chest.
        share: (d, h, w) of the finding, cut off at the surface of the lungs.
        value: HU.
        below: HU; what is denser stays.
    """
    rim = np.clip(body.lung / body.edge + 0.5, 0.02, 1)
    raster.paint(body.hu, np.where(body.hu < below, np.minimum(share / rim, 1), 0).astype(np.float32), value)


def spots(
    body: Body,
    rng: np.random.Generator,
    count: int,
    lobes: tuple[int, ...] = (1, 2, 3, 4, 5),
    depth: tuple[float, float] = (4, 60),
    zone: tuple[float, float] = (-200, 200),
    back: tuple[float, float] = (-200, 200),
) -> tuple[np.ndarray, np.ndarray]:
    """Places in the lungs: (count, 3) in mm, and their lobes (count,).

    Args:
        body: the chest.
        rng: source of randomness.
        count: how many.
        lobes: those that are asked for.
        depth: distance from the surface, mm.
        zone: height in the atlas, mm.
        back: from front to back in the atlas, mm.
    """
    table, p = atlas(), body.patient
    for slack in (0, 6, 15, 40, 200):  # what no place satisfies is asked for less strictly
        at = table["places"][rng.integers(len(table["places"]), size=4000)]
        deep = table["lung"][0][tuple(at.T)] * 0.25
        places = at * LUNG_STEP + LUNG_LOW + rng.uniform(-1.5, 1.5, at.shape)
        own = p.lobes_at(places)
        fits = np.isin(own, lobes) & (deep > depth[0] - slack / 4) & (deep < depth[1] + slack)
        fits &= (places[:, 0] > zone[0] - slack) & (places[:, 0] < zone[1] + slack)
        fits &= (places[:, 1] > back[0] - slack) & (places[:, 1] < back[1] + slack)
        if fits.sum() >= count:
            break
    chosen = np.flatnonzero(fits)[:count]
    return p.place(places[chosen]), own[chosen]


def cells(
    body: Body,
    rng: np.random.Generator,
    inside: np.ndarray,
    smallest: float = 0.0,
    seeds: np.ndarray | None = None,
    wobble: float = 3.2,
) -> tuple[np.ndarray, ...]:
    """Secondary lobules: for each voxel of `inside` (d, h, w) the branch that feeds it, and the distance to the septum.

    Args:
        body: the chest.
        rng: of the shape of the septa.
        inside: (d, h, w) voxels to look at.
        smallest: mm; lobules whose middles lie closer are one.
        seeds: (n, 3) mm, middles of lobules; None for those of the arteries' last branches.
        wobble: mm by which septa are uneven.

    Returns:
        which (d, h, w) and its neighbour (d, h, w), -1 elsewhere; wall (d, h, w) in mm; branch (n,) of the tree that
        each lobule belongs to, or its number among the seeds.
    """
    tree = body.arteries
    if seeds is None:
        leaf = np.ones(len(tree.parent), bool)
        leaf[tree.parent[tree.parent >= 0]] = False
        branch = np.flatnonzero(leaf)
        seeds = tree.end[branch]
    else:
        branch = np.arange(len(seeds))
    if smallest:
        key = np.floor(seeds / smallest).astype(int)
        _, first = np.unique(key, axis=0, return_index=True)
        branch, seeds = branch[np.sort(first)], seeds[np.sort(first)]
    step = max(11.0, smallest * 1.2)
    low = seeds.min(0) - step
    place = np.floor((seeds - low) / step).astype(int)
    which, beyond = np.empty(body.shape, dtype=np.int32), np.empty(body.shape, dtype=np.int32)
    wall = np.empty(body.shape, dtype=np.float32)
    shake = rng.normal(0, wobble, (3, 16, 16, 16))
    lung_raster.nearest_cells(which, beyond, wall, inside, body.low, body.step, seeds, place, low, step, shake, 9.0)
    return which, beyond, wall, branch


def territory(
    body: Body, rng: np.random.Generator, lobes: tuple[int, ...], share: tuple[float, float]
) -> tuple[int, int]:
    """A branch that feeds a share of one of the lobes, and its lobe."""
    tree = body.arteries
    fits = np.flatnonzero(np.isin(tree.lobe, lobes) & (tree.fed >= share[0]) & (tree.fed <= share[1]))
    if not len(fits):
        own = np.flatnonzero(np.isin(tree.lobe, lobes))
        fits = own[np.argsort(np.abs(tree.fed[own] - share[0]))[:3]]
    top = int(rng.choice(fits))
    return top, int(tree.lobe[top])


def hanging(tree: Tree, tops: list[int]) -> np.ndarray:
    """Whether branches (n,) of a tree are any of `tops` or hang on one."""
    found = np.zeros(len(tree.parent), bool)
    found[tops] = True
    for _ in range(int(tree.depth.max())):
        found |= (tree.parent >= 0) & found[tree.parent]
    return found


def apart(places: np.ndarray, least: float) -> np.ndarray:
    """Those of places (n, 3) mm that lie at least `least` mm from one another; earlier ones win."""
    from scipy.spatial import cKDTree

    pairs = cKDTree(places).query_pairs(least, output_type="ndarray")
    first, second = pairs.min(axis=1), pairs.max(axis=1)
    kept, open_ = np.zeros(len(places), bool), np.ones(len(places), bool)
    while open_.any():
        live = open_[first] & open_[second]
        first, second = first[live], second[live]
        best = open_.copy()
        best[second] = False  # an earlier neighbour is still open
        kept |= best
        open_ &= ~best
        open_[second[best[first]]] = False
    return places[kept]
