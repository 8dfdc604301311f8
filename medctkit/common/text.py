"""Words for messages: lists that stay short, counted things, sizes; texts of others, made harmless where they go."""

import re
import unicodedata
from collections.abc import Collection, Iterable

SHOWN = 5  # texts of a list that a message gives
_UNSEEN = re.compile("COMBINING|VARIATION SELECTOR|FILLER|JOINER|BLANK")  # in Unicode's names of characters
# Cyrillic and Greek letters that look like Latin ones, in small or in capitals
_ALIKE = str.maketrans("авекмнорстухіјѕαβεζηικμνορτυχ", "abekmhopctyxijsabezhikmnoptyx")


def counted(things: Collection, noun: str) -> str:
    """How many things, for a person: "1 file", "2,000 files"."""
    return f"{len(things):,} {noun}{'' if len(things) == 1 else 's'}"


def as_bytes(n: int) -> str:
    """Bytes, for a person: "1.77 GB"."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if n >= 0.9995 * 10**power:  # three digits of it are 1
            return f"{n / 10**power:.3g} {unit}"
    return f"{n} B"


def listed(texts: Iterable[str]) -> str:
    """The first few texts, one a line, and how many more there are."""
    texts = list(texts)
    more = [f"... and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return "\n".join(texts[:SHOWN] + more)


def stand_in(start: bytes) -> str:
    """What a file is, by how it starts, that came in place of the one that was asked for; "" if it is none."""
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"\0" in start:  # no text: the length of a header may begin as one
        return ""
    if start.startswith((b"<!", b"<html", b"<head", b"<?xml")):
        return "a web page: its download failed or needs a login (an access token); get the file again"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, a few lines that stand for the file; fetch that with git lfs pull"
    if start.startswith((b'{"', b"{'")):
        return "text (JSON), in which a server may say why it gave no file; read it, and get the file again"
    return ""


def folded(name: object) -> str:
    """What two spellings of one name have in common: "Ｐ-007\u200b", "p\u20117" and "P-7" give the same.

    Set aside are case, Unicode form, accents, letters that look alike, marks that nobody sees, kinds of digits, dashes
    and blanks, zeros before a number, and the ".0" that a spreadsheet puts behind one.
    """

    def plain(c: str) -> str:
        kind = unicodedata.category(c)
        if kind in ("Pd", "Zs", "Nd") or c == "\u2212":
            return {"Z": " ", "N": str(unicodedata.digit(c, ""))}.get(kind[0], "-")
        return "" if kind[0] == "C" or _UNSEEN.search(unicodedata.name(c, "")) else c

    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", str(name)).casefold()).translate(_ALIKE)
    text = " ".join("".join(map(plain, text)).split())
    return re.sub(r"(?<![\d.])0+(?=\d)", "", re.sub(r"^(\d+)\.0+$", r"\1", text))


def printable(text: object) -> str:
    """A text for a terminal: what would steer it (escape codes, letters that turn the line) is spelt out."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def markdown(text: object) -> str:
    """A text for one line or cell of a Markdown page: no HTML, links, pictures or further cells; code stays code."""
    line = " ".join(str(text).split())
    return re.sub(r"[|\\]|(?<=\])[(\[:]", r"\\\g<0>", line).replace("&", "&amp;").replace("<", "&lt;")
