"""Loops over voxels that findings of the lungs need, compiled by numba."""

from medctkit.phantom.raster import compiled


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
