"""Findings of heart, mediastinum, arteries and devices, drawn into a body; see `lung_findings` for what they return."""

from collections.abc import Sequence

import numpy as np

from medctkit.phantom import raster
from medctkit.phantom.body import HEART, OESOPHAGUS, Body, Drawn, curve, in_chest
from medctkit.phantom.places import SIDES, around, fill, severity


def joined(a: np.ndarray, b: np.ndarray, soft: float = 14.0) -> np.ndarray:
    """Signed distance (d, h, w) from two bodies in one skin, mm: the larger of theirs, with no crease between."""
    return 0.5 * (a + b + np.sqrt((a - b) ** 2 + soft**2) - soft)


def prolate(body: Body, centre: Sequence[float], axis: Sequence[float], long: float, short: float) -> np.ndarray:
    """Approximate signed distance (d, h, w) from a lemon of the atlas along an axis (3,), mm, positive inside."""
    middle = body.patient.place(np.array([centre], float))[0]
    way = np.array(axis) / np.linalg.norm(axis)
    size = float(np.cbrt(body.patient.scale.prod()))
    z, y, x = body.z[:, None, None] - middle[0], body.y[None, :, None] - middle[1], body.x[None, None, :] - middle[2]
    along = (z * way[0] + y * way[1] + x * way[2]).astype(np.float32)
    across = (z**2 + y**2 + x**2).astype(np.float32) - along**2
    return (1 - np.sqrt(along**2 / (long * size) ** 2 + np.maximum(across, 0) / (short * size) ** 2)) * short * size


def heart_depth(body: Body, scale: float = 1.0) -> np.ndarray:
    """Signed distance (d, h, w) in mm from the surface of the heart, positive inside; `scale` makes it larger.

    A large heart reaches farther left and down with its apex, where the left ventricle is, and somewhat to the right.
    """
    depth = body.ellipsoid(*HEART)
    if scale > 1:
        more = scale - 1
        left = prolate(body, (-30 - 14 * more, -50, 36 + 40 * more), (-0.42, -0.4, 0.8), 53 + 80 * more, 40 + 30 * more)
        right = prolate(body, (-22, -44, -10 - 20 * more), (1, 0.1, -0.1), 40 + 20 * more, 29 + 22 * more)
        depth = joined(joined(depth, left), right)
    return np.minimum(depth, 30)


@in_chest
def cardiomegaly(body: Body, rng: np.random.Generator) -> Drawn:
    """A large heart: what it grows into, lung and fat, becomes heart."""
    scale = body.patient.heart * rng.uniform(0.97, 1.08)
    depth = heart_depth(body, scale)
    above = np.maximum(
        np.clip((body.z[:, None, None] - body.floor[None] + 2) / body.edge, 0, 1), body.lung > -body.edge
    )
    inside = np.clip(depth / body.edge + 0.5, 0, 1) * ((body.lung > -20) | (body.hu > -150))
    room = (body.lung > -20) | (body.soft > -9)
    share = inside * np.maximum(above, body.soft > 0) * room
    grown = np.where((body.hu < 15) & ((body.soft < 0) | (depth > 0)), share, 0).astype(np.float32)
    fill(body, grown, body.tissue.myocardium)
    raster.paint(body.hu, grown * (body.lung < 0), body.tissue.myocardium)  # the fat that the heart lay in
    more = scale - 1
    cavity = prolate(body, (-32 - 14 * more, -48, 38 + 34 * more), (-0.42, -0.4, 0.8), 36 + 74 * more, 22 + 30 * more)
    cavity = np.clip(cavity / body.edge + 0.5, 0, 1) * (share > 0.5)
    raster.paint(body.hu, cavity.astype(np.float32), body.tissue.blood)
    return share.astype(np.float32), dict(severity=severity((scale - 1.13) / 0.3))


@in_chest
def pericardial_effusion(body: Body, rng: np.random.Generator) -> Drawn:
    """Fluid between two layers of fat around the heart, thicker below and behind; it takes the lung's room."""
    from scipy.ndimage import distance_transform_edt

    thickness, centre = rng.uniform(8, 18), body.patient.place(np.array([HEART[0]], float))[0]
    box = around(body, centre, np.array(HEART[1]) * body.patient.scale + 34)
    near, hollow = body.part(box), 12.0  # mm: the sac spans what is narrower than twice that between parts of the heart
    above = np.clip((near.z[:, None, None] - body.floor[box[1:]][None] + 3) / body.edge, 0, 1)
    heart = (near.soft > -1.5) & (heart_depth(near) > 0) & (above > 0)
    z, y = near.z[:, None, None] / body.patient.scale[0], near.y[None, :, None] / body.patient.scale[1]
    uneven = thickness * (0.8 + 0.2 * np.clip((y + 50) / 45, -0.6, 1) + 0.2 * np.clip((-z - 25) / 35, -1, 1))
    uneven = (uneven + 4) * np.clip((24 - z) / 26, 0, 1) - 4  # none above the roots of the great vessels
    far = distance_transform_edt(~heart, body.step) if heart.any() else np.full(near.shape, 99.0)
    sac = distance_transform_edt(far < uneven + hollow, body.step) - hollow
    room = (near.hu < -20) & (near.lung > -16)
    outer, layer = (np.clip(part / body.edge + 0.5, 0, 1) * above * room for part in (sac, sac + 2.5))
    raster.paint(near.hu, layer.astype(np.float32), body.tissue.fat)
    share = body.everything
    share[box] = outer * np.clip((-1.5 - near.soft) / body.edge + 0.5, 0, 1)
    raster.paint(near.hu, np.ascontiguousarray(share[box]), rng.uniform(2, 20))
    body.hu[box] = near.hu
    return share, dict(size_mm=round(thickness), severity=severity((thickness - 8) / 10))


@in_chest
def hiatal_hernia(body: Body, rng: np.random.Generator) -> Drawn:
    """Stomach that has slipped up behind the heart beside fat: a wall, food and fluid, often a level of air above."""
    radius = rng.uniform(20, 36)
    place = body.patient.place
    centre = place(np.array([[-68 + 0.5 * radius, -1 - 0.35 * radius, 12 + rng.uniform(-3, 8)]]))
    radii = np.array([[radius * 1.05, radius * 0.75, radius]])
    lumps = np.concatenate([centre, centre + rng.normal(0, 0.16, (4, 3)) * radii])
    sizes = np.concatenate([radii, np.repeat(radii * 0.78, 4, 0)])
    neck = np.concatenate(
        [place(np.array([OESOPHAGUS[5]])), centre, place(np.array([[-84, -26, 18], [-100, -40, 40]]))]
    )
    width = np.array([7.0, 0.5 * radius, 0.5 * radius, 14.0])
    thick = rng.uniform(4, 6)
    layers = []
    for grow in (4.0, 0.0, -thick):  # fat, wall, what is inside
        share = body.everything
        body.balls(share, lumps, np.maximum(sizes + grow, 3))
        pouch = share.copy()
        body.line(share, neck, np.maximum(width + grow, 2))
        layers.append(share)
    aorta = body.everything
    points, wide = body.course("aorta")
    body.line(aorta, points, wide + 1)
    room = np.clip((8 - heart_depth(body)) / body.edge + 0.5, 0, 1) * (1 - aorta) * (body.hu < 150)
    low = np.clip((body.z[:, None, None] - body.floor[None] + 22) / 6, 0, 1)  # below lies the stomach itself
    fat, wall, inner = ((part * room * low).astype(np.float32) for part in layers)
    raster.paint(body.hu, fat * (body.hu < -110), body.tissue.fat)
    raster.paint(body.hu, wall, body.tissue.muscle)
    raster.paint(body.hu, inner, float(rng.uniform(8, 38)))
    if rng.random() < 0.85:
        level = centre[0, 1] + rng.uniform(-0.2, 0.5) * radii[0, 1]
        air = np.clip((level - body.y) / body.edge + 0.5, 0, 1)[None, :, None] * pouch
        raster.paint(body.hu, (inner * air).astype(np.float32), -960.0)
    return wall, dict(size_mm=round(2 * radius), severity=severity((radius - 20) / 16))


STATIONS = {  # places in the atlas, (z, y, x) mm
    "paratracheal": ((62, -20, -20), (48, -14, -20), (74, -26, -17)),
    "prevascular": ((46, -62, 4), (34, -66, 10), (56, -56, 8)),
    "aortopulmonary": ((40, -10, 34), (34, -14, 36)),
    "subcarinal": ((12, 2, 2), (4, 0, 2)),
    "hilar": ((10, 6, -50), (20, -14, -44), (8, 12, 50), (20, 4, 50)),
    "axillary": ((64, -14, 148), (76, -6, -148), (52, -18, 150), (60, -20, -148)),
}


def lymphadenopathy(body: Body, rng: np.random.Generator) -> Drawn:
    """Enlarged nodes, 11 to 28 mm in short axis, in chains at the stations where they are looked for."""
    names = list(STATIONS)
    chosen = rng.choice(len(names), size=int(rng.integers(2, 5)), replace=False, p=[0.28, 0.2, 0.14, 0.22, 0.1, 0.06])
    share, largest, count = body.everything, 0.0, 0
    value = rng.uniform(32, 52) + 0.15 * max(body.tissue.blood - 45, 0)
    for name in (names[i] for i in chosen):
        for place in STATIONS[name]:
            if count and rng.random() < 0.25:
                continue
            short = rng.uniform(11, 24)
            centre = body.patient.place(np.array([place], float) + rng.normal(0, 2, 3))
            radii = np.array([[short * rng.uniform(0.6, 0.8), short / 2, short * rng.uniform(0.5, 0.65)]])
            lobules = centre + rng.normal(0, 0.3, (3, 3)) * radii
            body.balls(share, np.concatenate([centre, lobules]), np.concatenate([radii, np.repeat(radii * 0.75, 3, 0)]))
            largest, count = max(largest, short), count + 1
    share[(body.hu >= 25) | (body.airway >= 0.2)] = 0
    fat = 6 - body.lung  # a node lies in fat and bulges little into the lung
    fat /= body.edge
    fat += 0.5
    share *= np.clip(fat, 0, 1, out=fat)
    raster.paint(body.hu, share, value)
    return share, dict(location=names[chosen[0]], size_mm=round(largest), count=count)


# ---- calcium and devices ----


def mark(share: np.ndarray, own: np.ndarray) -> None:
    """Add one thing, `own`, to a share (d, h, w); what is thinner than a voxel counts by its strongest voxels."""
    own /= max(float(own.max()), 1e-6)
    np.maximum(share, own, out=share)


@in_chest
def arterial_calcification(body: Body, rng: np.random.Generator) -> Drawn:
    """Plaques that lie along the wall of the aorta, the arch first."""
    points, radii = body.course("aorta")
    share, count = body.everything, int(rng.integers(9, 24))
    ahead = np.gradient(points, axis=0)
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
    last = int(np.argmax(points[:, 0] < body.patient.scale[0] * -80)) or len(points) - 4
    for _ in range(count):
        i = int(np.clip(rng.normal(0.42 * last, 0.25 * last), 12, last - 1))
        side = np.cross(ahead[i], rng.normal(size=3))
        side /= np.linalg.norm(side)
        other = np.cross(ahead[i], side)
        angle = np.linspace(0, rng.uniform(4, 22) / radii[i], 5)[:, None]
        along = np.linspace(0, rng.normal(0, 5), 5)[:, None]
        path = points[i] + (radii[i] - 0.6) * (np.cos(angle) * side + np.sin(angle) * other) + along * ahead[i]
        own = body.everything
        body.line(own, path, rng.uniform(1.1, 2.0))
        own[(body.airway > 0.05) | (body.lung > 2)] = 0
        raster.paint(body.hu, own, rng.uniform(800, 1400))
        mark(share, own)
    return share, dict(location="aortic arch", severity=severity((count - 9) / 15))


CORONARIES = {  # on the surface of the heart, (z, y, x) in the atlas, mm
    "left anterior descending artery": [(2, -46, 22), (-4, -66, 33), (-16, -80, 42), (-32, -84, 50), (-48, -78, 56)],
    "left circumflex artery": [(2, -44, 24), (-2, -30, 38), (-12, -20, 48), (-26, -16, 52), (-40, -20, 48)],
    "right coronary artery": [(0, -60, -4), (-8, -70, -12), (-24, -74, -16), (-40, -66, -18), (-50, -48, -12)],
}


@in_chest
def coronary_calcification(body: Body, rng: np.random.Generator) -> Drawn:
    """Calcium in short rails and beads along the coronary arteries, the left anterior descending first."""
    names = list(CORONARIES)
    vessels = names[: int(rng.choice([1, 2, 3], p=[0.25, 0.3, 0.45]))]
    share = body.everything
    for name in vessels:
        path, _ = curve(body.patient.place(np.array(CORONARIES[name], float)), np.zeros(len(CORONARIES[name])), 6)
        for _ in range(int(rng.integers(4, 8))):
            i = int(rng.integers(1, len(path) - 6))
            own = body.everything
            body.line(own, path[i : i + int(rng.integers(2, 6))], rng.uniform(1.3, 2.4))
            raster.paint(body.hu, own, rng.uniform(800, 1400))
            mark(share, own)
    return share, dict(location=vessels[0], count=len(vessels), severity=severity((len(vessels) - 1) / 2.1))


def medical_material(body: Body, rng: np.random.Generator) -> Drawn:
    """Metal and plastic: pacemaker, port or venous catheter, sternal wires."""
    p, share = body.patient, body.everything
    kind = str(rng.choice(["pacemaker", "port catheter", "central venous catheter", "sternotomy wires"]))
    side = int(rng.choice([1, -1]))
    cava = [(76, -40, -16), (40, -34, -18), (14, -36, -20)]

    def pocket(x: float, z: float) -> np.ndarray:
        """A place (1, 3) in the fat in front of the ribs, mm."""
        at = p.place(np.array([[z, -70.0, x]]))[0]
        column = body.hu[int(np.argmin(np.abs(body.z - at[0]))), :, int(np.argmin(np.abs(body.x - at[2])))]
        front = body.y[int(np.argmax(column > -300))]
        return np.array([[at[0], front + 9, at[2]]])

    lines: list[tuple[np.ndarray, float, float]] = []
    if kind == "pacemaker":
        case = pocket(side * 78, 66)
        own = body.everything
        body.balls(own, case + np.array([[0, 0, 0.0]]), np.array([[21, 4.5, 18]]))
        raster.paint(body.hu, own, 2900.0)
        mark(share, own)
        vein = [(84, -52, side * 52), (90, -46, side * 28)] if side > 0 else [(88, -50, -48), (90, -42, -24)]
        heart = [(-10, -44, -16), (-30, -56, -4), (-46, -70, 20), (-50, -74, 36)]
        lines = [(np.concatenate([case, p.place(np.array(vein + cava + heart, float))]), 1.3, 2600.0)]
    elif kind == "port catheter":
        case = pocket(-66, 62)
        own = body.everything
        body.balls(own, case, np.array([[11, 6, 11]]))
        raster.paint(body.hu, own, 1900.0)
        mark(share, own)
        lines = [
            (np.concatenate([case, p.place(np.array([(92, -48, -44), (92, -42, -24), *cava], float))]), 1.4, 900.0)
        ]
    elif kind == "central venous catheter":
        neck = [(150, -50, side * 26), (112, -44, side * 26), (92, -44, side * 18)]
        lines = [(p.place(np.array(neck + cava, float)), 1.5, 1000.0)]
    else:
        for z in np.arange(-30, 76, 17.0):
            front = pocket(2, z)[0] + np.array([0, 6, 0])
            angle = np.linspace(0, 2 * np.pi, 13)
            ring = np.stack(
                [front[0] + 1.5 * np.sin(3 * angle), front[1] + 8 * np.cos(angle), front[2] + 13 * np.sin(angle)], 1
            )
            lines.append((ring, 0.8, 2900.0))
    for points, radius, value in lines:
        own = body.everything
        body.line(own, curve(points, np.zeros(len(points)))[0], radius)
        raster.paint(body.hu, own, value)
        mark(share, own)
    return share, dict(kind=kind, side=SIDES[side] if kind == "pacemaker" else "right")
