"""Findings of the airways, drawn into a body; see `lung_findings` for what they return."""

import numpy as np

from medctkit.phantom import raster
from medctkit.phantom.body import Body, Drawn, in_chest
from medctkit.phantom.places import lung_share, severity, sides_of


@in_chest
def peribronchial(body: Body, rng: np.random.Generator) -> Drawn:
    """The healthy patient's bronchi with thick walls, in all lobes, as far out as their lumens are 2 mm wide."""
    degree = rng.random()
    chosen = (body.lumens > 1.0) & (rng.random(len(body.lumens)) < 0.75 + 0.25 * degree)
    within = (lung_share(body) > 0.5) & (body.airway < 0.3)
    walls = body.bronchi(chosen, 2.2 + 1.6 * degree, 10.0, within)
    share = np.minimum(2.5 * walls, 1)  # most are thinner than a voxel
    return share, dict(side="bilateral", severity=severity(degree), location="central")


def bronchus(
    body: Body,
    into: tuple[np.ndarray, ...],
    path: np.ndarray,
    radius: np.ndarray,
    wall: float | np.ndarray,
    artery: np.ndarray,
) -> None:
    """Draw a bronchus and the artery beside it into the shares (d, h, w) of walls with lumens, lumens, and vessels.

    Args:
        body: the chest.
        into: the three shares.
        path: (n, 3) mm.
        radius: (n,) of the lumen, mm.
        wall: thickness, mm.
        artery: (n,) radius, mm.
    """
    outer, inner, vessel = into
    way = np.gradient(path, axis=0)
    aside = np.cross(way, np.cross(np.array([0.25, 0.5, 0.8]), way))
    aside /= np.maximum(np.linalg.norm(aside, axis=1, keepdims=True), 1e-6)
    body.line(vessel, path + aside * (radius + wall + 0.8 * artery)[:, None], artery)
    body.line(outer, path, radius + wall)
    body.line(inner, path, radius)


def walled(body: Body, outer: np.ndarray, inner: np.ndarray, vessel: np.ndarray) -> np.ndarray:
    """Paint what `bronchus` drew as far as it lies in the lungs; returns the share (d, h, w) of all of it."""
    within = (lung_share(body) > 0.5) & (body.airway < 0.3)
    outer, vessel = outer * within, vessel * within
    raster.paint(body.hu, np.where(body.hu < 0, vessel, 0).astype(np.float32), 0.85 * body.tissue.blood + 5)
    raster.paint(body.hu, outer, 10.0)
    raster.paint(body.hu, np.minimum(inner, outer), -970.0)
    return np.maximum(outer, vessel)


@in_chest
def bronchiectasis(body: Body, rng: np.random.Generator) -> Drawn:
    """Bronchi wider than the artery beside them that keep their width to within 1 cm of the pleura, in some segments.

    Cylindrical ones are rings across and tram tracks along; varicose ones are beaded, cystic ones end in clusters.
    """
    sides, side = sides_of(rng, 0.55)
    upper = rng.random() < 0.25
    kind = str(rng.choice(["cylindrical", "varicose", "cystic"], p=[0.65, 0.2, 0.15]))
    paths: list[np.ndarray] = []
    lumens: list[float] = []
    outer, inner, vessel = body.everything, body.everything, body.everything
    for s in sides:
        lobe = (1 if s < 0 else 4) if upper else (3 if s < 0 else 5)
        paths += courses(body, rng, lobe, int(rng.integers(10, 17)))
        lumens += [rng.uniform(2.1, 2.9)] * (len(paths) - len(lumens))
    wall = rng.uniform(0.6, 0.95)
    for path, lumen in zip(paths, np.array(lumens) * rng.uniform(0.8, 1.25, len(paths)), strict=True):
        t = np.linspace(0, 1, len(path))
        radius = lumen * np.interp(t, [0, 0.2, 0.9, 1], [0.75, 1, 0.9, 0.6])
        if kind == "varicose":
            radius = radius * (1.05 + 0.4 * np.sin(len(path) * t * rng.uniform(0.9, 1.3) + rng.uniform(0, 6)))
        artery = lumen * rng.uniform(0.55, 0.75) * np.interp(t, [0, 1], [1, 0.6])
        bronchus(body, (outer, inner, vessel), path, radius, wall, artery)
        if kind == "cystic":
            place = path[-1] + rng.normal(0, 4.5, (7, 3))
            size = rng.uniform(2.8, 6.0, (7, 1)) * np.ones(3)
            body.balls(outer, place, size + wall)
            body.balls(inner, place, size)
    share = walled(body, outer, inner, vessel)
    return share, dict(side=side, location="upper lobe" if upper else "lower lobe", kind=kind)


def courses(body: Body, rng: np.random.Generator, lobe: int, count: int, ends: float = 11.0) -> list[np.ndarray]:
    """Smooth courses of bronchi (n, 3) mm, one point every 3 mm, from where a lobe's segments fork towards the pleura.

    Args:
        body: the chest.
        rng: source of randomness.
        lobe: 1 to 5.
        count: how many, spread over the lobe.
        ends: mm from the pleura where they end at most.
    """
    tree = body.arteries
    leaf = np.ones(len(tree.parent), bool)
    leaf[tree.parent[tree.parent >= 0]] = False
    leaf = np.flatnonzero(leaf & (tree.lobe == lobe))
    at = np.clip(np.rint((tree.end[leaf] - body.low) / body.step).astype(int), 0, np.array(body.shape) - 1)
    depth = body.lung[tuple(at.T)]
    leaf = rng.permutation(leaf[(depth > 3) & (depth < ends + body.edge)])
    found: list[tuple[float, np.ndarray, np.ndarray]] = []
    for i in leaf[: 6 * count]:
        nodes, j = [tree.end[i]], int(i)
        while j >= 0 and tree.fed[j] < 0.35:
            nodes.append(tree.start[j])
            j = int(tree.parent[j])
        rough = np.array(nodes[::-1])
        far = np.r_[0, np.cumsum(np.sqrt((np.diff(rough, axis=0) ** 2).sum(1)))]
        if far[-1] > 30:
            found.append((float(((rough[-1] - rough[0]) ** 2).sum() / far[-1] ** 2), rough, far))
    chosen: list[np.ndarray] = []
    for _, rough, far in sorted(found, key=lambda item: -item[0]):  # the straightest, apart from one another
        ended = np.array([path[-1] for path in chosen] or [[np.inf] * 3])
        if len(chosen) == count or ((ended - rough[-1]) ** 2).sum(1).min() < 13**2:
            continue
        at_mm = np.linspace(0, far[-1], int(far[-1] / 3) + 1)
        path = np.stack([np.interp(at_mm, far, axis) for axis in rough.T], 1)
        for _ in range(12):
            path[1:-1] = 0.25 * path[:-2] + 0.5 * path[1:-1] + 0.25 * path[2:]
        chosen.append(path)
    return chosen
