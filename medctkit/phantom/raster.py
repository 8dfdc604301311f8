"""Loops over voxels, compiled by numba: sampling an atlas, drawing tubes and balls, growing trees.

Grids are (d, h, w), points (z, y, x) in mm; a grid is given by its origin and spacing. Nothing runs in parallel and
no sum is reordered, so the same input gives the same bytes on any number of cores.
"""

import numba
import numpy as np

compiled = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"arcp", "nsz", "nnan", "ninf"})


ONE = np.uint64(1)  # unsigned places need no look whether they are negative


@compiled
def blend(table, channel, z, y, x):
    """Trilinear value of table (c, d, h, w) at a place in voxels, the edge repeated outside."""
    d, h, w = table.shape[1:]
    z, y, x = min(max(z, 0.0), d - 1.001), min(max(y, 0.0), h - 1.001), min(max(x, 0.0), w - 1.001)
    i, j, k = np.uint64(z), np.uint64(y), np.uint64(x)
    return _mixed(table[channel], i, j, k, i + ONE, j + ONE, k + ONE, z - i, y - j, x - k)


@compiled
def _mixed(t, i, j, k, i2, j2, k2, a, b, c):
    """Trilinear mean of the 8 values of t (d, h, w) at the corners, by the shares a, b, c."""
    low = (t[i, j, k] * (1 - c) + t[i, j, k2] * c) * (1 - b) + (t[i, j2, k] * (1 - c) + t[i, j2, k2] * c) * b
    high = (t[i2, j, k] * (1 - c) + t[i2, j, k2] * c) * (1 - b) + (t[i2, j2, k] * (1 - c) + t[i2, j2, k2] * c) * b
    return low * (1 - a) + high * a


@compiled
def speckle(tile, z, y, x):
    """Trilinear value of a periodic cube (n, n, n), n a power of two, at a place in its voxels."""
    n = tile.shape[0] - 1
    fz, fy, fx = np.floor(z), np.floor(y), np.floor(x)
    i, j, k = int(fz), int(fy), int(fx)
    i2, j2, k2 = np.uint64((i + 1) & n), np.uint64((j + 1) & n), np.uint64((k + 1) & n)
    return _mixed(tile, np.uint64(i & n), np.uint64(j & n), np.uint64(k & n), i2, j2, k2, z - fz, y - fy, x - fx)


@compiled
def unwarped(place, scale, bend, bend_low, bend_step):
    """Where places (n, 3) of the atlas lie in a patient, mm.

    Divided by scale (3,) and moved by bend (3, d, h, w) they are those of the atlas; found by iteration.
    """
    out = place * scale
    for _ in range(4):
        for i in range(len(place)):
            a = (out[i, 0] - bend_low[0]) / bend_step
            b = (out[i, 1] - bend_low[1]) / bend_step
            e = (out[i, 2] - bend_low[2]) / bend_step
            for c in range(3):
                out[i, c] = (place[i, c] - blend(bend, c, a, b, e)) * scale[c]
    return out


@compiled
def sample_atlas(
    fields, z, y, x, scale, bend, bend_low, bend_step, lung, lung_low, lung_step, body, body_low, body_step, unit
):
    """Signed distances of a patient, mm: fields (4, d, h, w) of lung, soft tissue, bone and skin.

    z, y, x are the voxels' places in mm; what lies above and below the atlas is a stretch of its ends.
    """
    size = np.float32((scale[0] + scale[1] + scale[2]) / 3 * unit)
    m, n = bend.shape[2], bend.shape[3]
    plane, row = np.empty((3, m, n), dtype=bend.dtype), np.empty((3, n), dtype=bend.dtype)
    d, h, w = body.shape[1:]
    one = np.float32(1)
    across = x[1] - x[0]
    lung_share, body_share, bend_share = 1 / lung_step, 1 / body_step, 1 / bend_step
    sz, sy, sx = 1 / scale[0], 1 / scale[1], 1 / scale[2]
    for i in range(len(z)):
        at = min(max((z[i] - bend_low[0]) * bend_share, 0.0), bend.shape[1] - 1.001)
        i0 = int(at)
        for c in range(3):
            for j in range(m):
                for k in range(n):
                    plane[c, j, k] = bend[c, i0, j, k] + (at - i0) * (bend[c, i0 + 1, j, k] - bend[c, i0, j, k])
        for j in range(len(y)):
            at = min(max((y[j] - bend_low[1]) * bend_share, 0.0), m - 1.001)
            j0 = int(at)
            for c in range(3):
                for k in range(n):
                    row[c, k] = plane[c, j0, k] + (at - j0) * (plane[c, j0 + 1, k] - plane[c, j0, k])
            skip, deep = 0, np.float32(-30)
            for k in range(len(x)):
                if skip > 0:  # so far outside that the next voxels are outside too
                    skip -= 1
                    fields[0, i, j, k], fields[1, i, j, k] = -30, -16
                    fields[2, i, j, k], fields[3, i, j, k] = -10, fields[3, i, j, k - 1]
                    continue
                at_x = min(max((x[k] - bend_low[2]) * bend_share, 0.0), n - 1.001)
                k0 = int(at_x)
                c1 = at_x - k0
                qz = z[i] * sz + row[0, k0] * (1 - c1) + row[0, k0 + 1] * c1
                qy = y[j] * sy + row[1, k0] * (1 - c1) + row[1, k0 + 1] * c1
                qx = x[k] * sx + row[2, k0] * (1 - c1) + row[2, k0 + 1] * c1
                below = max(-112 - qz, 0.0)
                if below > 0:
                    qz = -112 + (qz + 112) * 0.5
                    if qz < -133:  # below the atlas: what was above it once more
                        qz = min(-266 - qz, -112)
                elif qz > 108:
                    qz = min(108 + (qz - 108) * 0.2, 112.0)
                known = deep > 12
                if known:  # within a lung: most likely the next voxel is too
                    deep = size * blend(
                        lung,
                        0,
                        (qz - lung_low[0]) * lung_share,
                        (qy - lung_low[1]) * lung_share,
                        (qx - lung_low[2]) * lung_share,
                    )
                    deep -= np.float32(below)  # no lung goes on below the atlas
                    if deep > 19:
                        fields[0, i, j, k], fields[1, i, j, k] = deep, -16
                        fields[2, i, j, k], fields[3, i, j, k] = -10, 20
                        continue
                bz = min(max((qz - body_low[0]) * body_share, 0.0), d - 1.001)
                by = min(max((qy - body_low[1]) * body_share, 0.0), h - 1.001)
                bx = min(max((qx - body_low[2]) * body_share, 0.0), w - 1.001)
                p, q, r = np.uint64(bz), np.uint64(by), np.uint64(bx)
                fz, fy, fx = np.float32(bz - p), np.float32(by - q), np.float32(bx - r)
                w11, w10 = fz * fy, fz * (one - fy)
                w01, w00 = (one - fz) * fy, (one - fz) * (one - fy)
                p1, q1, r1 = p + ONE, q + ONE, r + ONE
                for c in (2, 0, 1):
                    t = body[c]
                    near = t[p, q, r] * w00 + t[p, q1, r] * w01 + t[p1, q, r] * w10 + t[p1, q1, r] * w11
                    far = t[p, q, r1] * w00 + t[p, q1, r1] * w01 + t[p1, q, r1] * w10 + t[p1, q1, r1] * w11
                    value = (near + fx * (far - near)) * size
                    if c == 2:
                        value -= max(body_low[1] - qy, 0.0) + max(qy - body_low[1] - body_step * (h - 1), 0.0)
                        fields[3, i, j, k] = value
                        if value < -15:
                            fields[0, i, j, k], fields[1, i, j, k], fields[2, i, j, k] = -30, -16, -10
                            skip, deep = int((-value - 15) / (1.3 * across)), np.float32(-30)
                            break
                        if not known:
                            deep = size * blend(
                                lung,
                                0,
                                (qz - lung_low[0]) * lung_share,
                                (qy - lung_low[1]) * lung_share,
                                (qx - lung_low[2]) * lung_share,
                            )
                            deep -= np.float32(below)
                        fields[0, i, j, k] = deep
                        if deep > 19:
                            fields[1, i, j, k], fields[2, i, j, k] = -16, -10
                            break
                    else:
                        fields[c + 1, i, j, k] = value


@compiled
def draw_tubes(share, origin, spacing, edge, start, end, first, last):
    """Draw tapering tubes into share (d, h, w): from start to end (n, 3) with radii first and last (n,), mm.

    What is thinner than a voxel is drawn wider and fainter, so that its volume stays.
    """
    d, h, w = share.shape
    for s in range(len(start)):
        big = max(first[s], last[s], 0.62 * edge) + 0.5 * edge
        p, q = start[s], end[s]
        v0, v1, v2 = q[0] - p[0], q[1] - p[1], q[2] - p[2]
        length = max(v0 * v0 + v1 * v1 + v2 * v2, 1e-6)
        z0 = max(int(np.ceil((min(p[0], q[0]) - big - origin[0]) / spacing[0])), 0)
        z1 = min(int(np.floor((max(p[0], q[0]) + big - origin[0]) / spacing[0])), d - 1)
        y0 = max(int(np.ceil((min(p[1], q[1]) - big - origin[1]) / spacing[1])), 0)
        y1 = min(int(np.floor((max(p[1], q[1]) + big - origin[1]) / spacing[1])), h - 1)
        x0 = max(int(np.ceil((min(p[2], q[2]) - big - origin[2]) / spacing[2])), 0)
        x1 = min(int(np.floor((max(p[2], q[2]) + big - origin[2]) / spacing[2])), w - 1)
        for i in range(z0, z1 + 1):
            a0 = origin[0] + i * spacing[0] - p[0]
            for j in range(y0, y1 + 1):
                a1 = origin[1] + j * spacing[1] - p[1]
                for k in range(x0, x1 + 1):
                    a2 = origin[2] + k * spacing[2] - p[2]
                    t = min(max((a0 * v0 + a1 * v1 + a2 * v2) / length, 0.0), 1.0)
                    radius = first[s] + t * (last[s] - first[s])
                    wide = max(radius, 0.62 * edge)
                    e0, e1, e2 = a0 - t * v0, a1 - t * v1, a2 - t * v2
                    part = (wide - np.sqrt(e0 * e0 + e1 * e1 + e2 * e2)) / edge + 0.5
                    if part > 0:
                        value = min(part, 1.0) * (radius / wide) ** 2
                        if value > share[i, j, k]:
                            share[i, j, k] = value


@compiled
def draw_balls(share, origin, spacing, edge, centre, radii):
    """Draw ellipsoids into share (d, h, w): centre (n, 3), radii (n, 3) in mm, edges faded over `edge` mm."""
    d, h, w = share.shape
    for s in range(len(centre)):
        c, r = centre[s], radii[s]
        small = min(r[0], r[1], r[2])
        wide = max(small, 0.5 * edge)
        faint = (small / wide) ** 3
        grow = wide - small
        g = 1 + 0.5 * edge / wide
        z0 = max(int(np.ceil((c[0] - (r[0] + grow) * g - origin[0]) / spacing[0])), 0)
        z1 = min(int(np.floor((c[0] + (r[0] + grow) * g - origin[0]) / spacing[0])), d - 1)
        y0 = max(int(np.ceil((c[1] - (r[1] + grow) * g - origin[1]) / spacing[1])), 0)
        y1 = min(int(np.floor((c[1] + (r[1] + grow) * g - origin[1]) / spacing[1])), h - 1)
        x0 = max(int(np.ceil((c[2] - (r[2] + grow) * g - origin[2]) / spacing[2])), 0)
        x1 = min(int(np.floor((c[2] + (r[2] + grow) * g - origin[2]) / spacing[2])), w - 1)
        for i in range(z0, z1 + 1):
            a = (origin[0] + i * spacing[0] - c[0]) / (r[0] + grow)
            for j in range(y0, y1 + 1):
                b = (origin[1] + j * spacing[1] - c[1]) / (r[1] + grow)
                for k in range(x0, x1 + 1):
                    e = (origin[2] + k * spacing[2] - c[2]) / (r[2] + grow)
                    part = (1 - np.sqrt(a * a + b * b + e * e)) * wide / edge + 0.5
                    if part > 0:
                        value = min(part, 1.0) * faint
                        if value > share[i, j, k]:
                            share[i, j, k] = value


@compiled
def grow(points, root, heading, smallest, start, end, count, depth, parent):
    """Grow a tree that fills a cloud of points (n, 3).

    Each branch runs towards the middle of what it feeds, and the cloud is halved by a plane through that branch, until
    `smallest` points are left (after Tawhai et al., Annals of Biomedical Engineering 28, 2000). Fills start and end
    (m, 3), count (m,) of points fed, depth and parent (m,); returns the number of branches.
    """
    n = len(points)
    order = np.arange(n)
    capacity = len(start)
    stack = np.empty((256, 3), dtype=np.int64)  # low, high, parent
    stack[0] = (0, n, -1)
    top, used = 1, 0
    while top > 0 and used < capacity:
        top -= 1
        low, high, above = stack[top]
        m = high - low
        m0 = m1 = m2 = 0.0
        for i in range(low, high):
            p = order[i]
            m0 += points[p, 0]
            m1 += points[p, 1]
            m2 += points[p, 2]
        m0, m1, m2 = m0 / m, m1 / m, m2 / m
        if above < 0:
            o0, o1, o2, level = root[0], root[1], root[2], 0
            a0, a1, a2 = heading[0], heading[1], heading[2]
        else:
            o0, o1, o2, level = end[above, 0], end[above, 1], end[above, 2], depth[above] + 1
            a0, a1, a2 = o0 - start[above, 0], o1 - start[above, 1], o2 - start[above, 2]
        norm = max(np.sqrt(a0 * a0 + a1 * a1 + a2 * a2), 1e-6)
        a0, a1, a2 = a0 / norm, a1 / norm, a2 / norm
        w0, w1, w2 = m0 - o0, m1 - o1, m2 - o2
        reach = max(np.sqrt(w0 * w0 + w1 * w1 + w2 * w2), 1e-6)
        w0, w1, w2 = w0 / reach, w1 / reach, w2 / reach
        along = w0 * a0 + w1 * a1 + w2 * a2
        if along < 0.5:  # no branch turns back on its parent
            w0, w1, w2 = w0 + (0.5 - along) * a0, w1 + (0.5 - along) * a1, w2 + (0.5 - along) * a2
            norm = np.sqrt(w0 * w0 + w1 * w1 + w2 * w2)
            w0, w1, w2 = w0 / norm, w1 / norm, w2 / norm
        length = reach * (0.42 if m > smallest else 0.7)
        here = used
        used += 1
        start[here, 0], start[here, 1], start[here, 2] = o0, o1, o2
        end[here, 0], end[here, 1], end[here, 2] = o0 + w0 * length, o1 + w1 * length, o2 + w2 * length
        count[here], depth[here], parent[here] = m, level, above
        if m <= smallest or top + 2 > len(stack):
            continue
        # the plane holds the branch and cuts across the longest way of the cloud that is left
        s00 = s01 = s02 = s11 = s12 = s22 = 0.0
        for i in range(low, high, max(1, m // 200)):
            p = order[i]
            v0, v1, v2 = points[p, 0] - m0, points[p, 1] - m1, points[p, 2] - m2
            t = v0 * w0 + v1 * w1 + v2 * w2
            v0, v1, v2 = v0 - t * w0, v1 - t * w1, v2 - t * w2
            s00 += v0 * v0
            s01 += v0 * v1
            s02 += v0 * v2
            s11 += v1 * v1
            s12 += v1 * v2
            s22 += v2 * v2
        n0, n1, n2 = 0.577 + 0.1 * a0, 0.577 + 0.1 * a1, 0.577 + 0.1 * a2
        for _ in range(6):
            n0, n1, n2 = (
                s00 * n0 + s01 * n1 + s02 * n2,
                s01 * n0 + s11 * n1 + s12 * n2,
                s02 * n0 + s12 * n1 + s22 * n2,
            )
            norm = max(np.sqrt(n0 * n0 + n1 * n1 + n2 * n2), 1e-9)
            n0, n1, n2 = n0 / norm, n1 / norm, n2 / norm
        i, j = low, high - 1
        while i <= j:
            p = order[i]
            if (points[p, 0] - m0) * n0 + (points[p, 1] - m1) * n1 + (points[p, 2] - m2) * n2 < 0:
                i += 1
            else:
                order[i], order[j] = order[j], order[i]
                j -= 1
        if i > low:
            stack[top] = (low, i, here)
            top += 1
        if i < high:
            stack[top] = (i, high, here)
            top += 1
    return used


@compiled
def blur(values, weights, wrap):
    """Convolve values (a, n, b) along the middle with weights (an odd number), in place; the edges repeat or wrap."""
    a, n, b = values.shape
    reach = len(weights) // 2
    wide = np.empty((n + 2 * reach) * b, dtype=values.dtype)
    for i in range(a):
        for j in range(-reach, n + reach):
            at = j % n if wrap else min(max(j, 0), n - 1)
            wide[(j + reach) * b : (j + reach + 1) * b] = values[i, at]
        own = values[i].reshape(n * b)
        own[:] = 0
        for t in range(len(weights)):
            weight, shifted = weights[t], wide[t * b : t * b + n * b]
            for k in range(n * b):
                own[k] += weight * shifted[k]


@compiled
def paint(hu, share, value):
    """Blend a value (HU) into hu (d, h, w), by share of the voxel."""
    d, h, w = hu.shape
    for i in range(d):
        for j in range(h):
            for k in range(w):
                if share[i, j, k] > 0:
                    hu[i, j, k] += share[i, j, k] * (value - hu[i, j, k])


@compiled
def paint_inside(hu, share, value, depth, edge):
    """As `paint`, cut off where depth (d, h, w), a signed distance in mm, leaves a surface."""
    d, h, w = hu.shape
    for i in range(d):
        for j in range(h):
            for k in range(w):
                if share[i, j, k] > 0:
                    part = min(max(depth[i, j, k] / edge + 0.5, 0.0), 1.0)
                    hu[i, j, k] += min(share[i, j, k], part) * (value - hu[i, j, k])


@compiled
def paint_tissues(hu, fields, z, y, x, scale, edge, tile, fissures, middle, middle_low, middle_step, tissue, build):
    """Paint the tissues of a patient from the signed distances in fields (4, d, h, w), mm.

    tissue: HU of fat, muscle, myocardium, liver, spleen, lung, marrow, and the slope of lung density with gravity;
    build: mm of fat more than in the atlas, height of the breasts (0 for none), side of the mediastinal fat.
    """
    fat, muscle, heart, liver, spleen, air, marrow, gravity = tissue
    more, breast, cushion = build
    fine = min(1.0, (3.0 / edge) ** 1.2)
    for i in range(len(z)):
        qz = z[i] / scale[0]
        for j in range(len(y)):
            qy = y[j] / scale[1]
            row, flat = 9.0, 0.0
            if breast > 0:
                row = ((z[i] + 22) / 62) ** 2 + ((y[j] + 84 * scale[1]) / (breast + 26)) ** 2
            elif qy < -55:
                flat = 5 * min((-55 - qy) / 25, 1.0) * max(0.0, 1 - ((qz + 10) / 70) ** 2)
            for k in range(len(x)):
                skin = fields[3, i, j, k]
                qx = x[k] / scale[2]
                grown = more - flat
                if row < 4:
                    c = (abs(x[k]) - 78 * scale[2]) / 62
                    bump = (1 - np.sqrt(row + c * c)) * (breast + 12)
                    if bump > -14:
                        grown = max(grown, 0.5 * (grown + bump - skin + np.sqrt((grown - bump + skin) ** 2 + 60)) - 3)
                skin += grown
                fields[3, i, j, k] = skin
                if skin < -0.5 * edge:
                    hu[i, j, k] = -1000
                    continue
                lung, soft, bone = fields[0, i, j, k], fields[1, i, j, k], fields[2, i, j, k]
                speck = speckle(tile, z[i] / 3.1, y[j] / 3.1, x[k] / 3.1)
                broad = speckle(tile, y[j] / 9.7 + 11, x[k] / 9.7 + 5, z[i] / 9.7)
                value = -1000 + min(max(skin / edge + 0.5, 0.0), 1.0) * 1015
                part = min(max((skin - 2.0) / edge + 0.5, 0.0), 1.0)
                value += part * (fat + 5 * broad + 4 * fine * speck - value)
                if breast > 0 and skin > 6 and soft < 0:  # glandular tissue, in strands
                    a, b, c = (z[i] + 24) / 36, (y[j] + 92 * scale[1]) / (breast * 0.5 + 8), abs(x[k]) - 76 * scale[2]
                    deep = 1 - a * a - b * b - (c / 38) ** 2 + 0.55 * broad
                    if deep > 0:
                        value += min(deep * 2, 0.75) * (28 - value)
                if soft > -edge:
                    ring = (qx / 124) ** 2 + ((qy + 20) / 87) ** 2
                    inner = min(max((1 - ring) * 8 + 0.5 * broad, 0.0), 1.0)
                    is_heart = ((qz + 26) / 48) ** 2 + ((qy + 50) / 52) ** 2 + ((qx - 20) / 60) ** 2 < 1
                    own = muscle + 5 * broad + 4 * fine * speck
                    if is_heart:
                        own = heart + 2 * broad
                    elif inner > 0 and qz < -34:
                        is_liver = min(max((14 - 0.25 * (qy + 40) - qx) / 6 + broad, 0.0), 1.0)
                        is_spleen = min(max((qx - 52) / 6 + broad, 0.0), 1.0) * min(
                            max((qy + 34) / 6 + broad, 0.0), 1.0
                        )
                        other = 0.6 * muscle + 0.4 * spleen - 6 + 6 * broad
                        other += is_spleen * (spleen + 3 * fine * speck - other)
                        other += is_liver * (liver + 3 * fine * speck - other)
                        own += inner * (other - own)
                    elif soft > 2.5 and inner <= 0:
                        own -= 26 * max(0.0, min(1.0, 1.2 * broad - 0.7))  # fat between the fibres
                    value += min(max(soft / edge + 0.5, 0.0), 1.0) * (own - value)
                if bone > -edge:
                    shell = marrow + 330 * max(0.0, 1 - max(bone - 0.6, 0.0) / 2.2) + 9 * speck * fine
                    value += min(max(bone / edge + 0.5, 0.0), 1.0) * (shell - value)
                if lung > -edge and cushion > 0:
                    near = max(0.0, 1 - (qx / 62) ** 2) * max(0.0, 1 - (max(qy - 2, 0.0) / 18) ** 2)
                    if near > 0:  # fat lies in lobes, most in front and beside the apex of the heart
                        lobes = 0.45 + 0.7 * speckle(tile, z[i] / 33, y[j] / 33 + 7, x[k] / 33)
                        near *= min(max(lobes + 0.8 * min(max((-qy - 50) / 30, 0.0), 1.0), 0.0), 1.9)
                        lung -= cushion * near * min(1.0, max(0.0, (100 - qz) / 60))
                        fields[0, i, j, k] = lung
                if lung > -edge:
                    dense = air + gravity * qy / 80 + 26 * fine * speck + 13 * broad
                    if qz < 90:
                        mz = min(max((qz - middle_low[0]) / middle_step, 0.0), middle.shape[0] - 1.001)
                        my = min(max((qy - middle_low[1]) / middle_step, 0.0), middle.shape[1] - 1.001)
                        left = qx > middle[int(mz), int(my)]
                        v, u = qy / 100, qx / 100
                        sheet, wave = 0.0, 3.2 * speckle(tile, qy / 37, qx / 37, 0.37)  # no fissure is flat
                        for f in range(3):
                            if (f < 2) == left:
                                continue
                            c = fissures[f]
                            gap = qz - (c[0] + c[1] * v + c[2] * u + c[3] * v * v + c[4] * u * v + c[5] * u * u) - wave
                            if abs(gap) > 3 * edge + 3:
                                continue
                            gap /= np.sqrt(1 + ((c[1] + 2 * c[3] * v + c[4] * u) / 100) ** 2)
                            if f == 1:  # the horizontal fissure ends at the oblique one
                                o = fissures[0]
                                if qz < o[0] + o[1] * v + o[2] * u + o[3] * v * v + o[4] * u * v + o[5] * u * u:
                                    continue
                            sheet = max(
                                sheet, min(max(0.5 - (abs(gap) - 0.35) / edge, 0.0), 1.0) * min(1.0, 0.8 / edge)
                            )
                        dense += 330 * sheet * min(max(0.6 + 0.2 * wave, 0.1), 1.0)  # and most are incomplete
                    value += min(max(lung / edge + 0.5, 0.0), 1.0) * (dense - value)
                hu[i, j, k] = value
