"""Scans in zip archives, unpacked into a temporary folder.

Nothing in an archive is trusted: every name and size is checked before the first byte is written, and no more is
written than was checked, since sizes in an archive may lie.
"""

import re
import shutil
import stat
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from medctkit.scans.limits import most_unpacked
from medctkit.scans.stored import is_of_machine

MOST_MEMBERS = 100_000
MOST_BYTES = 8 << 30
_SPARE = 64 << 20  # bytes left free on the disk
_LONGEST_NAME = 200
_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz")


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpack a zip archive into a temporary folder, which is there for the length of a `with` block.

    Archives inside it are not unpacked, and what macOS and Windows add (`__MACOSX`, `Thumbs.db`) is left out.

    Raises:
        ValueError: not a zip archive, damaged, encrypted, or with members that no honest archive of a scan has:
            paths that leave the folder, links, names that occur twice, too many or too large. Nothing is left behind.
        OSError: no file at `path`, or no room in the temporary folder.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise ValueError(_what_it_is(path)) from error
    with archive:
        members = _checked_members(archive, path.stat().st_size)
        size, parent = sum(member.file_size for member in members.values()), tempfile.gettempdir()
        free = shutil.disk_usage(parent).free
        if size + _SPARE > free:
            found = f"unpacks to {size / 2**20:.0f} MiB, but {parent} has {free / 2**20:.0f} MiB left"
            raise OSError(f"{path}: {found}; free some room, or set TMPDIR to a folder on a larger disk")
        with tempfile.TemporaryDirectory(prefix="medctkit-") as folder:
            for name, member in members.items():
                _extract(archive, member, Path(folder, name))
            yield Path(folder)


def _what_it_is(path: Path) -> str:
    """Why a file is not a readable zip archive."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start and not start.startswith(b"PK"):
        found = f"not a zip archive in spite of its name, it starts with {start[:6]!r}"
        return f"{found}; unpack it and give the folder of the scan, or pack it again as .zip"
    return f"the zip archive is truncated or damaged ({path.stat().st_size} bytes here); get the file again"


def _checked_members(archive: zipfile.ZipFile, packed_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The files to unpack by their safe relative path; raises before anything is written."""
    infos = archive.infolist()
    if len(infos) > MOST_MEMBERS:
        raise ValueError(f"the archive has {len(infos)} members, at most {MOST_MEMBERS} are unpacked; pack one scan")
    members, folded = {}, dict[str, str]()
    for info in infos:
        path = _safe_path(info)
        clutter = "__MACOSX" in path.parts or path.name.startswith("._") or path.name in (".DS_Store", "Thumbs.db", "")
        if clutter or info.orig_filename.endswith(("/", "\\")):
            continue
        key = unicodedata.normalize("NFC", str(path)).casefold()  # macOS and Windows hold both for one file
        if key in folded:
            raise ValueError(f"members {folded[key]!r} and {info.filename!r} have one name; pack the scan again")
        folded[key] = info.filename
        members[str(path)] = info
    for key, name in folded.items():
        for parent in map(str, PurePosixPath(key).parents):
            if parent in folded:
                raise ValueError(f"member {folded[parent]!r} is a file and the folder of {name!r}; pack the scan again")
    if not members:
        raise ValueError("the zip archive holds no files")
    if all(name.lower().endswith(_ARCHIVES) for name in members):
        raise ValueError(f"holds only {len(members)} archive(s), such as {next(iter(members))!r}; give the one inside")
    size = sum(info.file_size for info in members.values())
    most = min(MOST_BYTES, most_unpacked(packed_bytes))
    if size > most:
        found = f"the archive's {packed_bytes} bytes unpack to {size}, those of a scan to {most} at most"
        raise ValueError(f"{found}; pack one scan alone, or give its folder")
    return members


def _safe_path(info: zipfile.ZipInfo) -> PurePosixPath:
    """Where a member goes inside the folder; refuses what is no plain file there, or a folder."""
    given = info.orig_filename
    parts = given.replace("\\", "/").split("/")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if not given or "\0" in given:
        raise ValueError(f"member {given!r} has no proper name; pack the scan again")
    if parts[0] == "" or re.match("[A-Za-z]:", parts[0]):
        raise ValueError(f"member {given!r} has an absolute path; an archive may write into its own folder only")
    if ".." in parts:
        raise ValueError(f"member {given!r} leads out of its folder with '..'; such an archive is not unpacked")
    if max(len(part.encode(errors="replace")) for part in parts) > _LONGEST_NAME:
        raise ValueError(f"member {given[:60]!r}... has a name of more than {_LONGEST_NAME} bytes; shorten it")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"member {given!r} is a link, device or pipe, not a file; pack the files themselves")
    if info.flag_bits & 0x1:
        raise ValueError(f"member {given!r} is encrypted; unpack it with its password and give the folder")
    return PurePosixPath(*(part for part in parts if part not in ("", ".")))


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(info) as source, open(target, "xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)  # at most the size that the archive says
            written = file.tell()
    except NotImplementedError as error:
        raise ValueError(f"member {info.filename!r} can't be read ({error}); pack again as plain .zip") from error
    except Exception as error:  # zlib, lzma, struct, zipfile: each has its own types
        if is_of_machine(error):
            raise
        what = str(error) or type(error).__name__
        raise ValueError(f"member {info.filename!r} is damaged; get the file again ({what})") from error
    if written != info.file_size:
        raise ValueError(f"member {info.filename!r} has {written}, not {info.file_size} bytes; get the file again")
