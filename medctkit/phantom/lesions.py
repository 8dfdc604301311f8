"""Findings of heart, mediastinum, arteries and devices, painted into a chest.

Each painter takes the chest and a source of randomness, changes the Hounsfield units, and returns
(share, details): how much of every voxel the finding fills, and what a report may say about it. Size, place
and number are drawn within the range a radiologist would report; none of it is fitted to CT-RATE.
"""

from collections.abc import Sequence

import numpy as np

from medctkit.phantom.anatomy import Point, tubes
from medctkit.phantom.chest import Chest
from medctkit.phantom.lung_lesions import SIDES, Marks, Painted, severity

# ---- heart and mediastinum ----


def cardiomegaly(chest: Chest, rng: np.random.Generator) -> Painted:
    """The heart itself, already painted large by the chest."""
    share = chest.canvas.occupancy(chest.heart_depth)
    return share, dict(severity=severity((chest.heart_scale - 1.2) / 0.25))


def pericardial_effusion(chest: Chest, rng: np.random.Generator) -> Painted:
    """Fluid around the heart, thicker below and behind."""
    c, marks, a = chest.canvas, Marks(chest), chest.anatomy
    thickness = rng.uniform(8, 24)
    uneven = thickness * (0.75 + 0.35 * np.clip((c.y + 10) / 60, -0.6, 1) + 0.25 * np.clip((-c.z - 40) / 40, -1, 1))
    outer = np.minimum(chest.heart_depth + uneven, 0.8 * (c.z - a.diaphragm(c.y, c.x) + chest.low))
    outer = np.minimum(outer, np.minimum(chest.cavity_depth - 2, 6 - c.z + 30))
    outer = np.minimum(outer, -a.spine(c.z, c.y, c.x))
    share = c.occupancy(outer) - c.occupancy(np.minimum(outer, chest.heart_depth + 1.0))
    c.paint(c.everywhere, share * (c.hu < 45) * (c.hu > -990 - 10), rng.uniform(6, 20))
    marks.add((c.everywhere, share))
    return marks.share, dict(size_mm=round(thickness), severity=severity((thickness - 8) / 16))


def hiatal_hernia(chest: Chest, rng: np.random.Generator) -> Painted:
    """Stomach that has slipped up behind the heart: wall, fluid, and often a level of air."""
    c, marks, a = chest.canvas, Marks(chest), chest.anatomy
    radius = rng.uniform(18, 42)
    centre = (a.dome + 4 + 0.5 * radius, a.depth * 0.42, 6 + rng.uniform(-8, 12))
    radii = (radius * 1.1, radius * 0.85, radius)
    found = marks.blob(centre, radii, rng, rough=0.08, in_lung=False)
    inner = marks.blob(centre, [r - 4.5 for r in radii], rng, rough=0.08, in_lung=False)
    for part, value in ((found, 42.0), (inner, float(rng.choice([-85.0, 18.0])))):
        if part is not None:
            c.paint(part[0], part[1], value)
    marks.add(found)
    if inner is not None and rng.random() < 0.75:
        air = inner[1] * c.occupancy(centre[1] - rng.uniform(-4, 6) - c.coordinates(inner[0])[1])
        c.paint(inner[0], air, -960.0)
    return marks.share, dict(size_mm=round(2 * radius), severity=severity((radius - 18) / 24))


NODE_STATIONS = {
    "paratracheal": ((70, 4, -22), (48, 6, -20), (86, 0, -24)),
    "prevascular": ((58, -44, 2), (44, -46, 8)),
    "aortopulmonary": ((44, 2, 30),),
    "subcarinal": ((20, 30, 0), (14, 32, -6)),
    "hilar": ((14, 8, -48), (10, 12, 50)),
    "axillary": ((84, 8, 158), (78, 4, -158), (66, 0, 156)),
}


def lymphadenopathy(chest: Chest, rng: np.random.Generator) -> Painted:
    """Enlarged nodes, 11 to 28 mm across, at the stations where they are looked for."""
    marks, a = Marks(chest), chest.anatomy
    names = list(NODE_STATIONS)
    chosen = rng.choice(len(names), size=int(rng.integers(2, 5)), replace=False, p=[0.28, 0.2, 0.14, 0.22, 0.1, 0.06])
    largest = 0.0
    for name in (names[i] for i in chosen):
        for spot in NODE_STATIONS[name]:
            if rng.random() < 0.25:
                continue
            if name == "axillary":
                spot = (spot[0], spot[1], np.sign(spot[2]) * (a.width + 22))
            short = rng.uniform(11, 26)
            centre = np.array(spot) + rng.normal(0, 3, 3)
            radii = (short * rng.uniform(0.6, 0.85), short / 2, short * rng.uniform(0.5, 0.7))
            found = marks.blob(centre, radii, rng, rough=0.1, in_lung=False)
            if found is not None:
                soft = (chest.canvas.hu[found[0]] < 30) & (chest.airway[found[0]] < 0.2)
                share = found[1] * soft
                chest.canvas.paint(found[0], share, rng.uniform(32, 55) + 0.15 * max(chest.tissue.blood - 45, 0))
                marks.add((found[0], share))
                largest = max(largest, short)
    if not marks.share.any():  # every spot was skipped by chance: one node always stands
        found = marks.blob((20, 30, 0), (12, 9, 11), rng, rough=0.1, in_lung=False)
        if found is not None:
            chest.canvas.paint(found[0], found[1], 42.0)
        marks.add(found)
        largest, chosen = 18.0, np.array([names.index("subcarinal")])
    return marks.share, dict(location=names[chosen[0]], size_mm=round(largest), count=len(chosen))


# ---- calcium and devices ----


def arterial_calcification(chest: Chest, rng: np.random.Generator) -> Painted:
    """Plaques in the wall of the aorta and its branches."""
    marks = Marks(chest)
    points, radii = chest.anatomy.vessels()["aorta"]
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    count = int(rng.integers(5, 16))
    for _ in range(count):
        t = rng.uniform(70, along[-1] - 60)
        at = np.array([np.interp(t, along, points[:, i]) for i in range(3)])
        radius = np.interp(t, along, radii)
        ahead = np.array([np.interp(t + 2, along, points[:, i]) for i in range(3)]) - at
        ahead /= np.linalg.norm(ahead)
        across = np.cross(ahead, rng.normal(size=3))
        across /= np.linalg.norm(across)
        length = rng.uniform(4, 15)
        wall = at + across * radius
        segment = np.stack([wall - ahead * length / 2, wall + ahead * length / 2])[None]
        found = tubes(chest.canvas, segment, np.array([rng.uniform(1.4, 3.2)]))
        if found is not None:
            chest.canvas.paint(*found, rng.uniform(600, 1250))
            marks.add(found)
    return marks.share, dict(location="aortic arch", severity=severity((count - 5) / 10))


def coronary_calcification(chest: Chest, rng: np.random.Generator) -> Painted:
    """Beads of calcium along the coronary arteries, the left anterior descending artery first."""
    marks = Marks(chest)
    s = chest.anatomy.heart * chest.heart_scale
    centre = np.array([-32.0, -20.0, 8.0])
    paths = {
        "left anterior descending artery": [(0, -26, 20), (-10, -52, 28), (-30, -62, 36), (-52, -58, 46)],
        "left circumflex artery": [(0, -24, 22), (-8, -6, 46), (-24, 10, 52), (-44, 14, 46)],
        "right coronary artery": [(-6, -34, -14), (-24, -44, -36), (-46, -34, -42), (-62, -12, -30)],
    }
    names = list(paths)
    vessels = names[: int(rng.choice([1, 2, 3], p=[0.4, 0.3, 0.3]))]
    for name in vessels:
        path = centre + (np.array(paths[name], dtype=float) - centre) * s
        for _ in range(int(rng.integers(2, 6))):
            t = rng.uniform(0.15, len(path) - 1.2)
            i = int(t)
            start = path[i] + (t - i) * (path[i + 1] - path[i])
            heading = (path[i + 1] - path[i]) / np.linalg.norm(path[i + 1] - path[i])
            segment = np.stack([start, start + heading * rng.uniform(4, 14)])[None]
            found = tubes(chest.canvas, segment, np.array([rng.uniform(1.3, 2.4)]))
            if found is not None:
                chest.canvas.paint(*found, rng.uniform(550, 1200))
                marks.add(found)
    return marks.share, dict(location=vessels[0], count=len(vessels), severity=severity((len(vessels) - 1) / 2.1))


def medical_material(chest: Chest, rng: np.random.Generator) -> Painted:
    """Metal and plastic: pacemaker, port or venous catheter, sternal wires."""
    c, marks, a = chest.canvas, Marks(chest), chest.anatomy
    kind = str(rng.choice(["pacemaker", "port catheter", "central venous catheter", "sternotomy wires"]))
    side = int(rng.choice([1, -1]))
    y0 = -a.depth - 6
    lines: list[tuple[Sequence[Point] | np.ndarray, float, float]] = []
    if kind == "pacemaker":
        marks.add(c.ellipsoid((74.0, y0 + 2, side * 74.0), (24, 5, 21), 2800.0))
        vein = [(80, y0 + 8, side * 60), (92, -20, side * 34), (80, -12, -24), (20, -10, -27)]
        lines = [(vein + [(-20, -14, -26), (-52, -36, 12)], 1.3, 2600.0)]
    elif kind == "port catheter":
        marks.add(c.ellipsoid((62, y0 + 1, -68.0), (12, 6, 12), 1900.0))
        lines = [([(68, y0 + 6, -60), (96, -16, -34), (60, -10, -27), (4, -8, -26)], 1.5, 900.0)]
    elif kind == "central venous catheter":
        neck = [(185, -6, side * 30), (120, -8, side * 26), (84, -12, -24)]
        lines = [(neck + [(40, -10, -28), (-4, -8, -26)], 1.7, 1000.0)]
    else:
        for z in np.arange(-28, 72, 15.0):
            angle = np.linspace(0, 2 * np.pi, 9)
            lines.append((np.stack([z + 0 * angle, y0 + 2 + 8 * np.cos(angle), 15 * np.sin(angle)], 1), 0.9, 2800.0))
    for points, radius, value in lines:
        c.tube(np.array(points, dtype=float), radius, value, share=marks.share)
    return marks.share, dict(kind=kind, side=SIDES[side] if kind == "pacemaker" else "right")
