"""Scans in zip archives, unpacked into a temporary folder.

Archives come from other hospitals, portals and e-mails, so nothing in them is trusted: every name and size is
checked before the first byte is written, and what is written is counted, since sizes in an archive may lie.
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
    if not start:
        return "the zip archive is empty (0 bytes); get the file again"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not a zip archive: the download failed or needs a login; get the file again"
    if start.startswith(b"PK"):
        return f"the zip archive is truncated or damaged ({path.stat().st_size} bytes here); get the file again"
    return "not a zip archive in spite of its name; give a .zip file or the folder of the scan"


def _checked_members(archive: zipfile.ZipFile, packed_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The files to unpack by their safe relative path; raises before anything is written."""
    members, folded = {}, {}
    infos = archive.infolist()
    if len(infos) > MOST_MEMBERS:
        raise ValueError(f"the archive has {len(infos)} members, at most {MOST_MEMBERS} are unpacked; pack one scan")
    for info in infos:
        name = _safe_name(info)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            what = "a link" if kind == stat.S_IFLNK else "a device or pipe"
            raise ValueError(f"member {info.filename!r} is {what}, not a file; pack the files themselves")
        if info.orig_filename.endswith(("/", "\\")) or _is_clutter(name):
            continue
        if info.flag_bits & 0x1:
            raise ValueError(f"member {info.filename!r} is encrypted; unpack it with its password and give the folder")
        key = unicodedata.normalize("NFC", str(name)).casefold()  # macOS and Windows hold both for one file
        if key in folded:
            raise ValueError(
                f"members {folded[key]!r} and {info.filename!r} have one name; one would replace the other"
            )
        folded[key] = info.filename
        members[str(name)] = info
    for key, name in folded.items():
        for parent in map(str, PurePosixPath(key).parents):
            if parent in folded:
                raise ValueError(
                    f"member {folded[parent]!r} is a file, and the folder of {name!r}; pack the scan again"
                )
    if not members:
        raise ValueError("the zip archive holds no files")
    if all(PurePosixPath(name).suffix.lower() in _ARCHIVES for name in members):
        inner = next(iter(members))
        raise ValueError(
            f"holds nothing but {len(members)} archive(s), such as {inner!r}; unpack it and give the one inside"
        )
    size = sum(info.file_size for info in members.values())
    if size > MOST_BYTES:
        raise ValueError(
            f"unpacks to {size / 2**30:.1f} GiB, at most {MOST_BYTES / 2**30:.0f} GiB are unpacked; pack one scan "
            "alone, or unpack it yourself and give the folder"
        )
    if size > RATIO_FROM and size > MOST_RATIO * packed_bytes:
        raise ValueError(
            f"unpacks to {size / packed_bytes:.0f} times its size ({packed_bytes} to {size} bytes), scans to 2 to 10 "
            "times: not the archive of a scan"
        )
    return members


def _safe_name(info: zipfile.ZipInfo) -> PurePosixPath:
    given = info.orig_filename
    parts = given.replace("\\", "/").split("/")
    if not given or "\0" in given:
        raise ValueError(f"member {given!r} has no proper name; pack the scan again")
    if parts[0] == "" or re.match("[A-Za-z]:", parts[0]):
        raise ValueError(f"member {given!r} has an absolute path; an archive may write into its own folder only")
    if ".." in parts:
        raise ValueError(f"member {given!r} leads out of its folder with '..'; such an archive is not unpacked")
    if max(len(part.encode(errors="replace")) for part in parts) > _LONGEST_NAME:
        raise ValueError(f"member {given[:60]!r}... has a name of more than {_LONGEST_NAME} bytes; shorten it")
    return PurePosixPath(*(part for part in parts if part not in ("", ".")))


def _is_clutter(name: PurePosixPath) -> bool:
    return "__MACOSX" in name.parts or name.name.startswith("._") or name.name in (".DS_Store", "Thumbs.db", "")


def _check_room(path: Path, size: int) -> None:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size + _SPARE > free:
        raise OSError(
            f"{path}: unpacks to {size / 2**20:.0f} MiB, but {folder} has {free / 2**20:.0f} MiB left; free some room, "
            "or set TMPDIR to a folder on a larger disk"
        )


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with open(target, "xb") as file:
        for block in _blocks(archive, info):
            written += len(block)
            if written > info.file_size:
                break
            file.write(block)
    if written != info.file_size:
        raise ValueError(
            f"member {info.filename!r} does not have the {info.file_size} bytes that the archive says; get the "
            "file again"
        )


def _blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """What a member holds, piece by piece; whatever zipfile and its decompressors raise is a ValueError."""
    try:
        with archive.open(info) as source:
            while block := source.read(1 << 20):
                yield block
    except NotImplementedError as error:
        raise ValueError(
            f"member {info.filename!r} is packed in a way that is not read here ({error}); pack again as plain .zip"
        ) from error
    except Exception as error:  # zlib, lzma, struct, zipfile: each has its own types
        raise ValueError(
            f"member {info.filename!r} is damaged; get the file again ({str(error) or type(error).__name__})"
        ) from error
