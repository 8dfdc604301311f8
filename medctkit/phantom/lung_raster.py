"""Loops over voxels that findings of the lungs need, compiled by numba: lobes, lobules, what moves."""

import numpy as np

from medctkit.phantom.raster import blend, compiled, speckle


@compiled
def speckles(out, tile, z, y, x, scale, inside, least):
    """Fill out (d, h, w) with smooth noise of `scale` mm from a periodic cube, where inside (d, h, w) is above least.

    z, y, x are the places of the voxels, mm.
    """
    for i in range(len(z)):
        for j in range(len(y)):
            for k in range(len(x)):
                if inside[i, j, k] > least:
                    out[i, j, k] = speckle(tile, z[i] / scale, y[j] / scale, x[k] / scale)


@compiled
def lobe_at(z, y, x, fissures, middle, middle_low, middle_step):
    """The lobe of a place in the atlas: 1 right upper, 2 middle, 3 right lower, 4 left upper, 5 left lower."""
    mz = min(max((z - middle_low[0]) / middle_step, 0.0), middle.shape[0] - 1.001)
    my = min(max((y - middle_low[1]) / middle_step, 0.0), middle.shape[1] - 1.001)
    v, u = y / 100, x / 100
    if x > middle[int(mz), int(my)]:
        c = fissures[2]
        return 4 if z > c[0] + c[1] * v + c[2] * u + c[3] * v * v + c[4] * u * v + c[5] * u * u else 5
    c = fissures[0]
    if z < c[0] + c[1] * v + c[2] * u + c[3] * v * v + c[4] * u * v + c[5] * u * u:
        return 3
    c = fissures[1]
    return 1 if z > c[0] + c[1] * v + c[2] * u + c[3] * v * v + c[4] * u * v + c[5] * u * u else 2


@compiled
def lobes_at(points, fissures, middle, middle_low, middle_step):
    """`lobe_at` of many places (n, 3)."""
    out = np.empty(len(points), dtype=np.int8)
    for i in range(len(points)):
        out[i] = lobe_at(points[i, 0], points[i, 1], points[i, 2], fissures, middle, middle_low, middle_step)
    return out


@compiled
def name_lobes(lobes, inside, z, y, x, scale, bend, bend_low, bend_step, fissures, middle, middle_low, middle_step):
    """The lobe of each voxel that is in a lung: 1 right upper, 2 middle, 3 right lower, 4 left upper, 5 left lower."""
    d, h, w = lobes.shape
    for i in range(d):
        for j in range(h):
            for k in range(w):
                lobes[i, j, k] = 0
                if inside[i, j, k] > -1:
                    a, b, c = (
                        (z[i] - bend_low[0]) / bend_step,
                        (y[j] - bend_low[1]) / bend_step,
                        (x[k] - bend_low[2]) / bend_step,
                    )
                    qz = z[i] / scale[0] + blend(bend, 0, a, b, c)
                    qy = y[j] / scale[1] + blend(bend, 1, a, b, c)
                    qx = x[k] / scale[2] + blend(bend, 2, a, b, c)
                    lobes[i, j, k] = lobe_at(qz, qy, qx, fissures, middle, middle_low, middle_step)


@compiled
def nearest_cells(near, next_to, wall, inside, origin, spacing, seeds, cube, grid_low, grid_step, wobble, wobble_step):
    """For each voxel of near (d, h, w) the nearest seed (n, 3), the next one, and the mm to the wall between them.

    cube (n, 3) says in which cube of grid_step mm each seed lies; only voxels of `inside` (d, h, w) are looked at,
    others get -1. Places are shaken by wobble (3, e, f, g), so that no wall is flat.
    """
    d, h, w = near.shape
    shape = (cube[:, 0].max() + 2, cube[:, 1].max() + 2, cube[:, 2].max() + 2)
    heads, following = np.full(shape, -1, dtype=np.int32), np.empty(len(seeds), dtype=np.int32)  # in chains
    for s in range(len(seeds)):
        following[s] = heads[cube[s, 0], cube[s, 1], cube[s, 2]]
        heads[cube[s, 0], cube[s, 1], cube[s, 2]] = s
    last, before = -1, -1
    for i in range(d):
        for j in range(h):
            for k in range(w):
                near[i, j, k] = next_to[i, j, k] = -1
                wall[i, j, k] = 99.0
                if not inside[i, j, k]:
                    continue
                z, y, x = origin[0] + i * spacing[0], origin[1] + j * spacing[1], origin[2] + k * spacing[2]
                s0 = speckle(wobble[0], z / wobble_step, y / wobble_step, x / wobble_step)
                s1 = speckle(wobble[1], z / wobble_step, y / wobble_step, x / wobble_step)
                s2 = speckle(wobble[2], z / wobble_step, y / wobble_step, x / wobble_step)
                z, y, x = z + s0, y + s1, x + s2
                c0, c1, c2 = (
                    int((z - grid_low[0]) / grid_step),
                    int((y - grid_low[1]) / grid_step),
                    int((x - grid_low[2]) / grid_step),
                )
                best, second, which, other = 1e9, 1e9, -1, -1
                for s in (last, before):  # most likely those of the voxel beside: then few cubes are worth a look
                    if s >= 0:
                        v = (seeds[s, 0] - z) ** 2 + (seeds[s, 1] - y) ** 2 + (seeds[s, 2] - x) ** 2
                        if v < best:
                            best, second, which, other = v, best, s, which
                        else:
                            second, other = v, s
                for reach in range(3):
                    for a in range(max(c0 - reach, 0), min(c0 + reach + 1, shape[0])):
                        for b in range(max(c1 - reach, 0), min(c1 + reach + 1, shape[1])):
                            for c in range(max(c2 - reach, 0), min(c2 + reach + 1, shape[2])):
                                if max(abs(a - c0), abs(b - c1), abs(c - c2)) < reach:
                                    continue
                                gz = max(grid_low[0] + a * grid_step - z, z - grid_low[0] - (a + 1) * grid_step, 0.0)
                                gy = max(grid_low[1] + b * grid_step - y, y - grid_low[1] - (b + 1) * grid_step, 0.0)
                                gx = max(grid_low[2] + c * grid_step - x, x - grid_low[2] - (c + 1) * grid_step, 0.0)
                                if gz * gz + gy * gy + gx * gx > second:
                                    continue
                                s = heads[a, b, c]
                                while s >= 0:
                                    if s == which or s == other:
                                        s = following[s]
                                        continue
                                    v = (seeds[s, 0] - z) ** 2 + (seeds[s, 1] - y) ** 2 + (seeds[s, 2] - x) ** 2
                                    if v < best:
                                        best, second, which, other = v, best, s, which
                                    elif v < second:
                                        second, other = v, s
                                    s = following[s]
                    if reach > 0 and other >= 0:
                        break
                near[i, j, k], next_to[i, j, k] = which, other
                last, before = which, other
                if other >= 0:
                    gz, gy = seeds[which, 0] - seeds[other, 0], seeds[which, 1] - seeds[other, 1]
                    gx = seeds[which, 2] - seeds[other, 2]
                    wall[i, j, k] = (second - best) / (2 * max(np.sqrt(gz * gz + gy * gy + gx * gx), 1e-3))


@compiled
def lift(hu, out, amount, spacing):
    """Move what is drawn in hu (d, h, w) up by amount (d, h, w) mm, into out; where amount is 0 out stays."""
    d, h, w = hu.shape
    for i in range(d):
        for j in range(h):
            for k in range(w):
                if amount[i, j, k] > 0:
                    at = max(i - amount[i, j, k] / spacing, 0.0)
                    low = min(int(at), d - 2)
                    out[i, j, k] = hu[low, j, k] + (at - low) * (hu[low + 1, j, k] - hu[low, j, k])


@compiled
def drawn_in(hu, out, amount, spacing, way):
    """Move what is drawn in hu (d, h, w) along `way` (3,) by amount (d, h, w) mm, into out; where that is 0 out stays.

    spacing (3,) is in mm.
    """
    d, h, w = hu.shape
    for i in range(d):
        for j in range(h):
            for k in range(w):
                far = amount[i, j, k]
                if far > 0:
                    z = min(max(i - far * way[0] / spacing[0], 0.0), d - 1.001)
                    y = min(max(j - far * way[1] / spacing[1], 0.0), h - 1.001)
                    x = min(max(k - far * way[2] / spacing[2], 0.0), w - 1.001)
                    a, b, c = int(z), int(y), int(x)
                    value = 0.0
                    for p in range(2):
                        for q in range(2):
                            for r in range(2):
                                part = (1 - abs(z - a - p)) * (1 - abs(y - b - q)) * (1 - abs(x - c - r))
                                value += part * hu[a + p, b + q, c + r]
                    out[i, j, k] = value
