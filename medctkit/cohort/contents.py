"""Which file had which content, written down so that it is read once."""

import csv
import hashlib
import os
import re
from pathlib import Path

from medctkit.scans.stored import files_below

_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def stamp_of(path: str | os.PathLike) -> str:
    """Of a file, or of all in a folder: another after each change, also one that leaves size and date as they were."""
    path, found = Path(path), hashlib.sha256()
    try:
        for file in files_below(path) if path.is_dir() else [path]:
            s = file.stat()
            state = (str(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
            found.update(repr(state).encode(errors="replace"))
    except OSError:
        return ""
    return found.hexdigest()


class Contents:
    """A table with path, stamp and digest, a line each; others than these, cut off or broken, are passed over."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        text = self.path.read_text(encoding="utf-8", errors="surrogateescape") if self.path.is_file() else ""
        rows = [row for line in text.splitlines() for row in csv.reader([line.replace("\0", "")])]
        self._known = {(row[0], row[1]): row[2] for row in rows if len(row) == 3 and _DIGEST.fullmatch(row[2])}

    def get(self, path: str | os.PathLike) -> str | None:
        """The digest of a file, or of a folder, if it is written down and nothing was changed since."""
        return self._known.get((str(path), stamp_of(path)))

    def put(self, path: str | os.PathLike, stamp: str, digest: str) -> None:
        """Write down the digest of what had this stamp before it was read."""
        self._known[str(path), stamp] = digest
        with open(self.path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerow([path, stamp, digest])
