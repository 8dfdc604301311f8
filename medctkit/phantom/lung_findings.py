"""Findings of the lungs and the pleura, drawn into a body.

Each function takes the body and a source of randomness, changes the Hounsfield units, and returns (share, details):
how much of every voxel the finding fills, and what a report may say about it. Where nothing is filled nothing
changes, but for what a finding pushes aside, which its docstring then says. Sizes, places and numbers are drawn within
what a radiologist would report; none is fitted to a data set.
"""

import numpy as np

from medctkit.phantom import lung_raster, raster
from medctkit.phantom.body import Body, Drawn, bent, in_chest
from medctkit.phantom.patient import beside
from medctkit.phantom.places import (
    OF_SIDE,
    apart,
    around,
    box_of,
    cells,
    fill,
    hanging,
    lung_share,
    severity,
    sides_of,
    spots,
    territory,
    told,
)

FINE = 2  # voxels that the finest blur reaches


@in_chest
def emphysema(body: Body, rng: np.random.Generator) -> Drawn:
    """Holes of air without walls in the middle of lobules, mostly above; or larger ones in a row under the pleura."""
    paraseptal = rng.random() < 0.3
    burden = rng.uniform(0.3, 1.0)
    n = int((220 if paraseptal else 2600) * burden)
    lobes, depth = (1, 2, 3, 4, 5), (2.0, 7.0) if paraseptal else (3.0, 60.0)
    centre, _ = spots(body, rng, 6 * n if n < 600 else 3500, lobes, depth)
    height = centre[:, 0] / body.patient.scale[0]
    keep = rng.random(len(centre)) < np.clip((height + 45) / 115, 0.03, 1) ** 1.5
    clump = np.sin(centre @ rng.normal(0, 0.045, 3) + rng.uniform(0, 6)) + np.sin(centre @ rng.normal(0, 0.08, 3))
    keep &= clump + 0.5 * rng.normal(size=len(centre)) > -0.4
    centre = centre[keep][:n]
    radius = (
        rng.gamma(5, 1.3, len(centre)) + 2.0 if paraseptal else np.minimum(rng.gamma(3, 0.6, len(centre)) + 1.4, 4.5)
    )
    radius *= 0.75 + 0.45 * burden
    share, edge = body.everything, body.edge
    if not paraseptal:  # holes run together: each is a few
        centre = np.concatenate([centre, *(centre + rng.normal(0, 0.75, centre.shape) * radius[:, None] for _ in "ab")])
        radius = np.concatenate([radius, 0.8 * radius, 0.7 * radius])
    body.edge = max(edge, 1.2 if paraseptal else 3.4)
    body.balls(share, centre, radius[:, None] * rng.uniform(0.75, 1.25, (len(centre), 3)))
    body.edge = edge
    if not paraseptal:  # without an edge, and none like another
        share = np.clip(share * np.maximum(1.1 + 0.3 * body.noise(2.4, int(rng.integers(2**31))), 0.1), 0, 1)
    share *= np.clip((body.lung - (1.0 if paraseptal else 0.5)) / body.edge + 0.5, 0, 1)
    share *= body.hu < -600
    raster.paint(body.hu, share, -992.0)
    return share, dict(kind="paraseptal" if paraseptal else "centrilobular", severity=severity((burden - 0.3) / 0.7),
                       side="bilateral", location="upper lobe")  # fmt: skip


@in_chest
def mosaic(body: Body, rng: np.random.Generator) -> Drawn:
    """Lobules side by side that are denser and that keep their air, with sharp, angular borders."""
    which, _, wall, branch = cells(body, rng, body.lung > -body.edge, smallest=rng.uniform(11, 19))
    middle = body.arteries.end[branch]
    patch = sum(np.sin(middle @ rng.normal(0, 0.04, 3) + rng.uniform(0, 6)) for _ in range(3)) / 1.5
    bright = patch + rng.normal(0, 0.55, len(branch)) > rng.uniform(-0.1, 0.4)
    degree = rng.random()
    share = bright[which] * (which >= 0) * lung_share(body)
    share = share.astype(np.float32) * np.clip(0.55 + np.clip(wall, 0, 3) / 4, 0, 1)
    body.hu += share * (85 + 75 * degree) * np.clip(-(body.hu + 350) / 400, 0, 1)
    return share, dict(side="bilateral", severity=severity(degree))


@in_chest
def septal_thickening(body: Body, rng: np.random.Generator) -> Drawn:
    """Thick septa: lines that stand on the pleura and arcades of 1 to 2 cm behind it, at the bases first."""
    thickness, degree = rng.uniform(0.8, 1.3), rng.random()
    size, reach = rng.uniform(12, 16), 13 + 9 * degree
    # lobules stand in two layers under the pleura, so that the septa between those of a layer are square to it
    seeds, height = [], -5 + 60 * degree
    for layer in (7.0, 7.0 + 1.3 * size):
        places, _ = spots(body, rng, 1500, depth=(layer - 2, layer + 2), zone=(-120, height + 30))
        seeds.append(apart(places, size))
    middle = np.concatenate(seeds)
    z, y, x = (axis / scale for axis, scale in zip((body.z, body.y, body.x), body.patient.scale, strict=True))
    inside = (body.lung > -body.edge) & (body.lung < reach) & (z < height + 25)[:, None, None]
    inside &= (np.abs(x)[None, :] > 66 - np.abs(y + 5)[:, None])[None] | (z < -45)[:, None, None]  # not at the hila
    which, beyond, wall, _ = cells(body, rng, inside, seeds=middle, wobble=1.9)
    base = np.clip((height - middle[:, 0] / body.patient.scale[0]) / 60, 0, 1)
    patch = sum(np.sin(middle @ rng.normal(0, 0.04, 3) + rng.uniform(0, 6)) for _ in range(2))
    ill = rng.random(len(middle)) < np.clip(base * (0.6 + 0.25 * degree + 0.35 * patch), 0, 0.85)
    # most septa of an ill lobule are thick: arcades, with gaps
    pair = (np.minimum(which, beyond).astype(np.int64) * 7919 + np.maximum(which, beyond) * 104729) % 1009 / 1009
    strong = (ill[which] | ill[beyond]) & (which >= 0) & (beyond >= 0) & (pair < 0.72)
    strong = strong * np.clip((reach - body.lung) / 5, 0, 1) * (0.6 + 0.55 * pair)
    wide = max(thickness, 0.9 * body.edge)
    share = np.clip((wide / 2 - wall) / body.edge + 0.5, 0, 1) * (thickness / wide) * strong.astype(np.float32)
    share *= lung_share(body)
    share = np.where(share > min(0.06, 0.3 * float(share.max())), share, 0).astype(np.float32)
    raster.paint(body.hu, np.where(body.hu < -200, np.minimum(share * 1.15, 1), 0).astype(np.float32), -20.0)
    return share, dict(side="bilateral", location="lower lobe", severity=severity(degree))


@in_chest
def opacity(body: Body, rng: np.random.Generator) -> Drawn:
    """Ground glass: hazy patches with soft edges through which vessels and bronchi still show."""
    count = int(rng.integers(1, 6))
    centre, lobes = spots(body, rng, count, depth=(3, 30), back=(-70, 80))
    share, delta = body.everything, rng.uniform(260, 380)
    for c in centre:
        radii = rng.uniform(15, 36, 3)
        lumps = c + rng.normal(0, 0.5, (7, 3)) * radii
        blob = body.everything
        body_edge, body.edge = body.edge, max(body.edge, 6.0)
        body.balls(blob, np.concatenate([[c], lumps]), np.concatenate([[radii], radii * rng.uniform(0.4, 0.8, (7, 1))]))
        body.edge = body_edge
        np.maximum(share, blob, out=share)
    uneven = 0.78 + 0.16 * body.noise(7.0, int(rng.integers(2**31))) + 0.12 * body.noise(2.6, int(rng.integers(2**31)))
    share = np.clip(share * 1.25 * uneven, 0, 1) * lung_share(body)
    share = np.where(share > 0.06, share, 0).astype(np.float32)
    body.hu += share * delta * np.clip(-(body.hu + 60) / 650, 0, 1)
    return share, dict(told(list(lobes)), count=count, kind="ground-glass")


@in_chest
def consolidation(body: Body, rng: np.random.Generator) -> Drawn:
    """Air spaces of a segment filled up, sharp at the fissure and ragged elsewhere, with air in its bronchi."""
    count = int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))
    side = int(rng.choice([1, -1]))
    tops, lobes = [], []
    for _ in range(count):
        own = side if rng.random() < 0.65 else -side
        top, lobe = territory(body, rng, OF_SIDE[own], (0.1, 0.42))
        tops.append(top)
        lobes.append(lobe)
    own_lobes = np.isin(body.lobes, lobes)
    which, _, _, branch = cells(body, rng, own_lobes)
    fed = hanging(body.arteries, tops)
    rest = rng.random(len(branch)) < 0.03  # lobules that are spared
    box = box_of(own_lobes, 2 * FINE)  # beyond it nothing is filled, and no blur sees its edge
    near, which, lobe_share = body.part(box), which[box], own_lobes[box].astype(np.float32)
    inside = (fed[branch] & ~rest)[which] * (which >= 0) * lobe_share
    sigma = 5.0 / np.array(body.spacing)
    soft = blurred(inside, sigma) / np.maximum(blurred(lobe_share, sigma), 0.05)
    uneven = 0.16 * near.noise(7.0, int(rng.integers(2**31))) + 0.1 * near.noise(2.8, int(rng.integers(2**31)))
    # a fissure is no stair: the border between two lobes is as smooth as the voxels allow
    fine = np.full(3, 0.8)
    lungs = (body.lobes[box] > 0).astype(np.float32)
    lobe_share = blurred(lobe_share, fine) / np.maximum(blurred(lungs, fine), 0.05)
    lobe_share = np.clip(2 * lobe_share - 0.5, 0, 1) * lung_share(near)
    filled = np.clip((soft - 0.42 + uneven) * 3 + 0.5, 0, 1) * lobe_share
    haze = np.clip((soft - 0.05 + 0.8 * uneven) * 1.7, 0, 0.6) * lobe_share
    near.hu += haze * (1 - filled) * 420 * np.clip(-(near.hu + 200) / 600, 0, 1)
    fill(near, filled, rng.uniform(28, 48) + 0.12 * max(body.tissue.blood - 45, 0))
    body.hu[box] = near.hu
    share = body.everything
    share[box] = filled
    bronchograms(body, share, fed)
    share[box] = np.maximum(filled, np.where(haze > 0.2, haze, 0))
    return share, dict(told(lobes), count=count)


def bronchograms(body: Body, share: np.ndarray, chosen: np.ndarray) -> None:
    """Paint the air that stays in bronchi of `chosen` (n,) branches, where a share (d, h, w) of dense lung is high."""
    air, lumen = body.everything, 1.3 * body.lumens
    start, end = beside(body.arteries, lumen)
    shown = chosen & (body.lumens > max(1.2, 0.3 * body.edge))
    body.tubes(air, *bent(start, end, body.arteries.parent, lumen, 0.9 * lumen, shown))
    raster.paint(body.hu, air * (share > 0.3), -880.0)


@in_chest
def nodule(body: Body, rng: np.random.Generator) -> Drawn:
    """One to four nodules of 7 to 27 mm: round, lobulated or with spicules, small ones sometimes calcified."""
    count = int(rng.choice([1, 2, 3, 4], p=[0.55, 0.22, 0.13, 0.1]))
    centre, lobes = spots(body, rng, count, depth=(5, 45))
    radius = 0.5 * np.exp(rng.uniform(np.log(7), np.log(27), count))
    share = body.everything
    for c, r in zip(centre, radius, strict=True):
        own = body.everything
        lobules = int(rng.integers(3, 8))
        bumps = rng.normal(size=(lobules, 3))
        bumps *= (r * rng.uniform(0.3, 0.55) / np.linalg.norm(bumps, axis=1))[:, None]
        body.balls(
            own,
            np.concatenate([[c], c + bumps]),
            np.concatenate([np.full((1, 3), r * 0.9), np.full((lobules, 3), r * 0.62)]),
        )
        if r > 6 and rng.random() < 0.4:  # spicules
            way = rng.normal(size=(14, 3))
            way /= np.linalg.norm(way, axis=1, keepdims=True)
            reach = r * rng.uniform(1.3, 1.9, (14, 1))
            body.tubes(own, c + way * r * 0.7, c + way * reach, np.full(14, 1.2), np.full(14, 0.3))
        own *= lung_share(body)
        raster.paint(
            body.hu,
            np.where(body.hu < 200, own, 0).astype(np.float32),
            420.0 if r < 5 and rng.random() < 0.25 else rng.uniform(20, 55),
        )
        np.maximum(share, own, out=share)
    return share, dict(told(list(lobes)), size_mm=round(2 * float(radius.max())), count=count)


@in_chest
def atelectasis(body: Body, rng: np.random.Generator) -> Drawn:
    """Collapse at the bases: plates that reach the pleura, or a wedge beside the spine behind a displaced fissure.

    Lung, vessels and fissures are drawn towards the lost volume, and the diaphragm moves up: that part of the side
    changes outside the mask.
    """
    sides, side = sides_of(rng, 0.5)
    wedge = rng.random() < 0.35
    share, p = body.everything, body.patient
    z, y, x = body.z / p.scale[0], body.y / p.scale[1], body.x / p.scale[2]
    for s in sides:
        rise = rng.uniform(6, 11) if wedge else rng.uniform(3, 7)
        low = np.clip((-5 - z) / 45, 0, 1) * np.clip((z + 128) / 30, 0, 1)
        mid = np.clip((s * x - 18) / 22, 0, 1) * np.clip((124 - s * x) / 16, 0, 1)
        deep = np.clip((y + 96) / 30, 0, 1) * np.clip((72 - y) / 24, 0, 1)
        amount = (rise * low[:, None, None] * deep[None, :, None] * mid[None, None, :]).astype(np.float32)
        for field in (body.hu, body.lung, body.soft):
            lung_raster.lift(field.copy(), field, amount, float(body.spacing[0]))
        inside = np.maximum(
            lung_share(body), lung_share(body, body.edge) * (body.hu < -250)
        )  # moved air at the rim too
        if wedge:
            # lung slides back and towards the spine; at the pleura it stays
            near = np.clip(1 - ((z + 40) / 75) ** 2, 0, 1)[:, None, None] * np.clip((s * x - 12) / 20, 0, 1)
            near = near * np.clip((y + 75) / 70, 0, 1)[None, :, None] * np.clip((body.lung - 2) / 16, 0, 1)
            pull = rng.uniform(10, 16) * near
            lung_raster.drawn_in(
                body.hu.copy(), body.hu, pull.astype(np.float32), body.step, np.array([-0.35, 0.8, -0.45 * s])
            )
            lean, reach = rng.uniform(0.5, 0.75), rng.uniform(17, 27)
            turn = rng.uniform(0.45, 0.95)
            front = np.array([-lean, np.cos(turn), -s * np.sin(turn)]) / np.hypot(1, lean)
            corner = p.place(np.array([[-62.0, 70.0, s * 38.0]]))[0] - front * reach
            dz, dy, dx = (axis - c for axis, c in zip((body.z, body.y, body.x), corner, strict=True))
            sheet = front[0] * dz[:, None, None] + front[1] * dy[None, :, None] + (front[2] * dx)[None, None, :]
            across = (np.sin(turn) * dy[:, None] + s * np.cos(turn) * dx[None, :]) / 40
            sheet = sheet + 2.5 * (across**2)[None] - 0.8 * body.noise(14.0, int(rng.integers(2**31)))
            sheet = sheet - 0.5 * np.maximum(z + 25, 0)[:, None, None]  # its tip is below the hilum
            found = np.clip(sheet / body.edge + 0.5, 0, 1) * inside * (s * x > 0)
            np.maximum(share, found.astype(np.float32), out=share)
        for _ in range(int(rng.integers(0, 2)) if wedge else int(rng.integers(2, 5))):
            centre, _ = spots(body, rng, 1, OF_SIDE[s], (2, 16), (-80, -15))
            tilt, half = rng.normal(0, 0.25, 2), rng.uniform(26, 48)
            wave = 1.6 * np.sin((body.x - centre[0, 2]) / 13 + rng.uniform(0, 6))
            squeeze = rng.uniform(0.6, 1.0)
            wide = 1.12 * half * np.array([1, 1 / squeeze])
            high = 1.6 + float(np.abs(tilt) @ wide) + max(6.5, body.edge)
            box = around(body, centre[0], np.array([high, *wide]))  # beyond it the plate has no thickness
            dz, dy, dx = (axis[s] - c for axis, s, c in zip((body.z, body.y, body.x), box, centre[0], strict=True))
            sheet = dz[:, None, None] + tilt[0] * dy[None, :, None] + (tilt[1] * dx + wave[box[2]])[None, None, :]
            far = 1.25 - (dy[:, None] ** 2 + (dx[None, :] * squeeze) ** 2) / half**2
            thick = rng.uniform(3.0, 6.5) * np.clip(far * 1.6, 0, 1)
            wide = np.maximum(thick, body.edge)[None]
            found = np.clip((wide / 2 - np.abs(sheet)) / body.edge + 0.5, 0, 1) * (thick[None] / wide) * inside[box]
            np.maximum(share[box], np.where(found > 0.05, found, 0), out=share[box], casting="same_kind")
    fill(body, share, 32.0 + 0.2 * max(body.tissue.blood - 45, 0))
    if wedge:
        bronchograms(body, share, np.isin(body.arteries.lobe, (3, 5)))
    return share, dict(side=side, location="lower lobe", kind="subsegmental" if wedge else "linear")


@in_chest
def fibrosis(body: Body, rng: np.random.Generator) -> Drawn:
    """Old scars: a ragged cap on the pleura, bands from it towards the hilum, wide bronchi and some calcium in it.

    They shrink: lung, vessels and fissures between the scar and the hilum are drawn towards it, outside the mask.
    """
    sides, side = sides_of(rng, 0.45)
    apical = rng.random() < 0.7
    share, calcium, air = body.everything, body.everything, body.everything
    rough = rng.integers(2**31), rng.integers(2**31)
    for s in sides:
        lobes = ((1,) if s < 0 else (4,)) if apical else ((3,) if s < 0 else (5,))
        places, _ = spots(body, rng, 12, lobes, (3, 9), (68, 104) if apical else (-85, -45), (-20, 80))
        c = places[np.argmax((1.0 if apical else -0.5) * places[:, 0] + 0.4 * s * places[:, 2] + rng.normal(0, 6, 12))]
        reach = rng.uniform(24, 36)
        hub = np.array([c[0] - 58 if apical else c[0] + 50, 0.3 * c[1], 0.6 * c[2]])
        retract(body, c, hub, rng.uniform(9, 15))
        inside = lung_share(body)
        box = around(body, c, 1.12 * reach * np.array([0.8, 1, 1]))
        part, own = body.part(box), body.everything
        d2 = (((part.z - c[0]) / (0.8 * reach))[:, None, None] ** 2 + ((part.y - c[1]) / reach)[None, :, None] ** 2
              + ((part.x - c[2]) / reach)[None, None, :] ** 2)  # fmt: skip
        near = np.clip(1.25 - d2, 0, 1).astype(np.float32)
        coarse, fine = (part.noise(scale, int(seed)) for scale, seed in zip((6.0, 2.6), rough, strict=True))
        # dense where the pleura is near, and in strands where it is not
        cap = (
            near * (1.1 - np.maximum(part.lung, 0) / rng.uniform(9, 14))
            + 0.24 * min(1, 1.6 / body.edge) * coarse
            + 0.08 * min(1, 1.2 / body.edge) * fine
        )
        own[box] = np.clip((cap - 0.52) * 3.2 * min(1, 2.4 / body.edge) + 0.5, 0, 1) * np.minimum(near * 5, 1)
        n = int(rng.integers(8, 13))
        start = c + rng.normal(0, 0.38 * reach, (n, 3)) * (1, 1, 0.6)
        for a in start:
            t = np.linspace(0, rng.uniform(0.5, 1.1), 9)[:, None]
            band = a + (hub - a) * (t - 0.25) + np.cumsum(rng.normal(0, 1.0, (9, 3)), 0)
            for offset in rng.normal(0, 1.2, (2, 3)):  # a band is flat and frayed
                body.line(own, band + offset, rng.uniform(0.9, 1.7) * np.linspace(1.3, 0.5, 9))
        np.maximum(share, own * inside, out=share)
        for a in c + rng.normal(0, 0.3 * reach, (3, 3)):  # bronchi pulled open
            way = (hub - a) / np.linalg.norm(hub - a) * rng.uniform(9, 18)
            bend = rng.normal(0, 2.0, 3)
            body.line(air, np.stack([a, a + 0.5 * way + bend, a + way]), np.array([1.7, 1.9, 1.4]))
        body.balls(calcium, c + rng.normal(0, 0.3 * reach, (5, 3)), rng.uniform(1.0, 2.6, (5, 1)) * np.ones(3))
    share = np.where(share > min(0.05, 0.3 * float(share.max())), share, 0).astype(np.float32)
    fill(body, share, 35.0)
    air *= inside * (share > 0.3)
    raster.paint(body.hu, air, -930.0)
    calcium *= inside * (share > 0.2)
    raster.paint(body.hu, calcium, 480.0)
    return np.maximum(share, calcium), dict(side=side, location="apical" if apical else "basal")


def retract(body: Body, scar: np.ndarray, hub: np.ndarray, pull: float) -> None:
    """Draw the lung between a scar (3,) and the hilum (3,) towards the scar, by `pull` mm at most; mm."""
    way = (scar - hub) / np.linalg.norm(scar - hub)
    centre = 0.65 * scar + 0.35 * hub
    box = around(body, centre, np.full(3, 64.0))
    near = body.part(box)
    squares = ((axis - c) ** 2 for axis, c in zip((near.z, near.y, near.x), centre, strict=True))
    far = sum(part.reshape(shape) for part, shape in zip(squares, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True))
    amount = pull * np.clip(1 - far / 60**2, 0, 1) * np.clip((near.lung - 3) / 20, 0, 1)  # at the pleura it stays
    lung_raster.drawn_in(near.hu.copy(), near.hu, amount.astype(np.float32), body.step, way)
    body.hu[box] = near.hu


# ---- pleura ----


@in_chest
def pleural_effusion(body: Body, rng: np.random.Generator) -> Drawn:
    """Fluid in a crescent behind the lung, thickest at the base, which takes the lung's room on its side."""
    sides, side = sides_of(rng, 0.5)
    amount = rng.uniform(0.1, 0.6)
    share, squeezed, p = body.everything, body.everything, body.patient
    left = body.lobes > 3
    for s in sides:
        own = amount * rng.uniform(0.75, 1.0) if len(sides) == 2 else amount
        on_side = left if s > 0 else (body.lobes > 0) & ~left
        box = box_of(on_side, 0)
        near = body.part(box)
        room = lung_share(near) * on_side[box]
        top = 200 * own - 62  # where it thins out, in the atlas
        z, x = near.z / p.scale[0], (s * near.x / p.scale[2] - 70) / 55
        thick = (12 + 95 * own) * np.clip((top - z) / (top + 95), 0, 1.3) ** 1.5
        depth = thick[:, None] * (1 + 0.5 * x**2) * p.scale[1]  # it climbs at the outer wall and at the spine
        depth = depth[:, None] - behind(near)[:, None] + near.y[None, :, None]
        depth += np.minimum(0.12 * thick, 2.0)[:, None, None] * near.noise(28.0, int(rng.integers(2**31)))
        wet = (thick > 0)[:, None, None]
        for found, into in ((depth / body.edge + 0.5, share), ((depth + 9) / 9, squeezed)):
            np.maximum(into[box], np.clip(found, 0, 1) * room * wet, out=into[box], casting="same_kind")
    squeezed *= 1 - share
    body.hu += squeezed * 330 * np.clip(-(body.hu + 100) / 650, 0, 1)  # lung that the fluid presses together
    fill(body, share, rng.uniform(4, 18), 300.0)
    return share, dict(side=side, severity=severity(amount, (0.25, 0.42)), size_mm=round(12 + 95 * amount))


def behind(body: Body) -> np.ndarray:
    """Where a lung ends behind (d, w), mm: fluid of a patient on the back gathers in front of it."""
    inside = body.lung > 0
    last = body.shape[1] - 1 - np.argmax(inside[:, ::-1], axis=1)
    last = np.minimum(last, body.shape[1] - 2)[:, None]
    here, beyond = (np.take_along_axis(body.lung, last + i, axis=1)[:, 0] for i in (0, 1))
    part = np.clip(here / np.maximum(here - beyond, 1e-3), 0, 1)
    return np.where(inside.any(axis=1), body.y[last[:, 0]] + part * body.step[1], -np.inf)


def blurred(values: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Gaussian mean of values (d, h, w), sigma (3,) in voxels."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(values, sigma, mode="nearest", truncate=2.5)
