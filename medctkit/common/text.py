"""Words for messages: lists that stay short, counted things, sizes."""

from collections.abc import Collection, Iterable

SHOWN = 5  # texts of a list that a message gives


def counted(things: Collection, noun: str) -> str:
    """How many things, for a person: "1 file", "2,000 files"."""
    return f"{len(things):,} {noun}{'' if len(things) == 1 else 's'}"


def as_bytes(n: int) -> str:
    """Bytes, for a person: "1.77 GB"."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if n >= 10**power:
            return f"{n / 10**power:.3g} {unit}"
    return f"{n} B"


def listed(texts: Iterable[str], total: int | None = None) -> str:
    """The first few texts, one a line, and how many more there are of `total` (by default: of them)."""
    texts = list(texts)
    total = len(texts) if total is None else total
    more = [f"... and {total - SHOWN} more"] if total > SHOWN else []
    return "\n".join(texts[:SHOWN] + more)
