"""How much a scan may unpack to: one rule for every format, asked before anything of that size is made in memory."""

import math
from collections.abc import Sequence

from medctkit.scans.stored import check_shape

# CT shrinks two- to fourfold without loss, with loss or a blank background thirtyfold; small files may shrink more
MOST_RATIO, RATIO_FROM = 100, 256 << 20


def most_unpacked(packed_bytes: int, at_least: int | None = None) -> int:
    """Bytes that this many compressed bytes of a scan may unpack to; of a part of one `at_least` others."""
    return max(RATIO_FROM if at_least is None else at_least, MOST_RATIO * packed_bytes)


def check_claim(shape: Sequence[int], itemsize: int, packed_bytes: int) -> None:
    """Refuse voxels (d, h, w) of `itemsize` bytes that no CT has, or that `packed_bytes` of files can't hold."""
    check_shape(shape)
    claimed, most = math.prod(shape) * itemsize, most_unpacked(packed_bytes)
    if claimed > most:
        found = f"{claimed} bytes of voxels in {packed_bytes} bytes of files, which hold {most} of a CT at most"
        raise ValueError(f"{found}: a damaged or made-up file; get it again, or save it uncompressed")
