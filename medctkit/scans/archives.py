"""Scans in zip archives, unpacked into a temporary folder.

Archives come from other hospitals, portals and e-mails, so nothing in them is trusted: every name and size is checked
before the first byte is written, and no more is written than was checked, since sizes in an archive may lie.
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

from medctkit.scans.stored import is_web_page

MOST_MEMBERS = 100_000
MOST_BYTES = 8 << 30
MOST_RATIO, RATIO_FROM = 200, 100 << 20  # CT slices shrink two- to tenfold; a few small files may shrink more
_SPARE = 64 << 20  # bytes left free on the disk
_LONGEST_NAME = 200
_STARTS = {b"\x1f\x8b": "gzip", b"7z\xbc\xaf\x27\x1c": "7-Zip", b"Rar!": "RAR", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz")


@contextmanager
def unpacked(path: str | Path) -> Iterator[Path]:
    """Unpack a zip archive for the length of a `with` block.

    Folders inside the archive are kept, archives inside it are not unpacked, and what macOS and Windows add
    (`__MACOSX`, `.DS_Store`, `Thumbs.db`) is left out. A backslash separates folders, as some Windows tools write it.

    Args:
        path: a .zip file.

    Yields:
        A temporary folder with the archive's files, removed at the end of the block.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not a zip archive, damaged, encrypted, or with members that no honest archive of a scan has:
            paths that leave the folder, links, names that occur twice, too many or too large. Nothing is left behind.
        OSError: no room in the temporary folder.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise ValueError(_what_it_is(path)) from error
    with archive:
        members = _checked_members(archive, path.stat().st_size)
        _check_room(path, sum(member.file_size for member in members.values()))
        with tempfile.TemporaryDirectory(prefix="medctkit-") as folder:
            for name, member in members.items():
                _extract(archive, member, Path(folder, name))
            yield Path(folder)


def _what_it_is(path: Path) -> str:
    """Why a file is not a readable zip archive."""
    with open(path, "rb") as file:
        start = file.read(64)
    for magic, kind in _STARTS.items():
        if start.startswith(magic):
            return f"a {kind} file, not a zip archive; unpack it and give the folder, or pack it again as .zip"
    if is_web_page(start):
        return "a web page, not a zip archive: the download failed or needs a login; get the file again"
    if start and not start.startswith(b"PK"):
        return "not a zip archive in spite of its name; give a .zip file or the folder of the scan"
    return f"the zip archive is truncated or damaged ({path.stat().st_size} bytes here); get the file again"


def _checked_members(archive: zipfile.ZipFile, packed_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The files to unpack by their safe relative path; raises before anything is written."""
    infos = archive.infolist()
    if len(infos) > MOST_MEMBERS:
        raise ValueError(f"the archive has {len(infos)} members, at most {MOST_MEMBERS} are unpacked; pack one scan")
    members, folded = {}, dict[str, str]()
    for info in infos:
        path = _safe_path(info)
        if info.orig_filename.endswith(("/", "\\")) or _is_clutter(path):
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
    if size > MOST_BYTES:
        raise ValueError(f"unpacks to {size} bytes, more than {MOST_BYTES}; pack one scan alone, or give the folder")
    if size > RATIO_FROM and size > MOST_RATIO * packed_bytes:
        raise ValueError(
            f"unpacks to {size / packed_bytes:.0f} times its {packed_bytes} bytes, scans to 2 to 10 times theirs: not "
            "the archive of a scan"
        )
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
        what = "a link" if kind == stat.S_IFLNK else "a device or pipe"
        raise ValueError(f"member {given!r} is {what}, not a file; pack the files themselves")
    if info.flag_bits & 0x1:
        raise ValueError(f"member {given!r} is encrypted; unpack it with its password and give the folder")
    return PurePosixPath(*(part for part in parts if part not in ("", ".")))


def _is_clutter(path: PurePosixPath) -> bool:
    return "__MACOSX" in path.parts or path.name.startswith("._") or path.name in (".DS_Store", "Thumbs.db", "")


def _check_room(path: Path, size: int) -> None:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size + _SPARE > free:
        found = f"unpacks to {size / 2**20:.0f} MiB, but {folder} has {free / 2**20:.0f} MiB left"
        raise OSError(f"{path}: {found}; free some room, or set TMPDIR to a folder on a larger disk")


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(info) as source, open(target, "xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)  # at most the size that the archive says
            written = file.tell()
    except NotImplementedError as error:
        raise ValueError(f"member {info.filename!r} can't be read ({error}); pack again as plain .zip") from error
    except Exception as error:  # zlib, lzma, struct, zipfile: each has its own types
        if isinstance(error, OSError) and error.errno:  # not of bzip2, but of the disk
            raise
        what = str(error) or type(error).__name__
        raise ValueError(f"member {info.filename!r} is damaged; get the file again ({what})") from error
    if written != info.file_size:
        raise ValueError(f"member {info.filename!r} has {written}, not {info.file_size} bytes; get the file again")
