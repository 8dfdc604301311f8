"""Whether files of a hub repository can be fetched into a folder, found out before the first byte."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PureWindowsPath

from medctkit.cohort.hub.repository import TIMEOUT, Repository
from medctkit.common.text import as_bytes, counted, listed

STATE = ".medctkit"
MARGIN = 10**9  # bytes that stay free on the disk

_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub: name, size in bytes, and SHA-256 (or, of a file in git itself, git's SHA-1)."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Plan:
    """What `download` will do; made by `preflight`.

    Args:
        repository: where from.
        revision: the commit.
        destination: the folder.
        files: what.
        bytes_there: how much of it is in the destination already.
        bytes_free: on its disk.
    """

    repository: Repository
    revision: str
    destination: Path
    files: tuple[RemoteFile, ...]
    bytes_there: int
    bytes_free: int

    @property
    def bytes_total(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    @property
    def bytes_left(self) -> int:
        """How much is still to be fetched."""
        return self.bytes_total - self.bytes_there

    def __str__(self) -> str:
        return (
            f"{self.repository.repo_id} -> {self.destination}: {counted(self.files, 'file')}, "
            f"{as_bytes(self.bytes_total)}; {as_bytes(self.bytes_there)} there, {as_bytes(self.bytes_left)} to fetch, "
            f"{as_bytes(self.bytes_free)} free on the disk"
        )


def preflight(
    repo_id: str,
    files: Iterable[str],
    destination: str | os.PathLike,
    *,
    repo_type: str = "dataset",
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Plan:
    """Find out whether files can be fetched, before the first byte.

    Args:
        repo_id: repository, such as "ibrahimhamamci/CT-RATE".
        files: paths in it.
        destination: folder for them; made if it isn't there.
        repo_type: "dataset" or "model".
        token: None: the one of this machine (HF_TOKEN, `hf auth login`); False: none.
        endpoint: address of the hub; by default HF_ENDPOINT, or huggingface.co.

    Raises:
        ValueError: a name that leads out of the destination.
        PermissionError: no token, one that is refused, or terms that aren't accepted.
        FileNotFoundError: no such repository or file.
        ConnectionError: no network, or offline mode.
        OSError: the destination can't be written, or its disk has no room.
    """
    from huggingface_hub import get_hf_file_metadata

    repository = Repository(repo_id, repo_type, endpoint, token)
    destination = Path(destination).expanduser().absolute()
    names = list(dict.fromkeys(files))
    if not names:
        raise ValueError(f"no file of {repo_id} was asked for")
    for name in names:
        _refuse_escape(name, destination)
    _try_to_write(destination)
    info = repository.ask(
        lambda api: api.repo_info(repo_id, repo_type=repo_type, timeout=TIMEOUT, expand=["sha"]), repo_id
    )
    found = {}
    for start in range(0, len(names), 250):
        some = names[start : start + 250]
        answer = repository.ask(
            lambda api, some=some: api.get_paths_info(repo_id, some, revision=info.sha, repo_type=repo_type), repo_id
        )
        found |= {file.path: file for file in answer if hasattr(file, "blob_id")}
    _refuse_missing(repository, [name for name in names if name not in found])
    # Everyone may list a gated repository: only asking for a file tells whether it can be had.
    url = repository.url(names[0], info.sha)
    repository.ask(lambda api: get_hf_file_metadata(url, token=token, timeout=TIMEOUT, endpoint=endpoint), names[0])
    remote = tuple(_remote_file(name, found[name]) for name in names)
    there = sum(_bytes_there(destination, file) for file in remote)
    plan = Plan(repository, info.sha, destination, remote, there, shutil.disk_usage(destination).free)
    if plan.bytes_left and plan.bytes_left + MARGIN > plan.bytes_free:
        raise OSError(
            f"no room in {destination}: {as_bytes(plan.bytes_left)} to fetch and {as_bytes(MARGIN)} to spare, but "
            f"{as_bytes(plan.bytes_free)} free. Choose another folder or fewer patients, or make room"
        )
    return plan


def _refuse_escape(name: str, destination: Path) -> None:
    parts = name.split("/")
    strange = "\\" in name or not name.isprintable() or PureWindowsPath(name).drive
    if strange or {"", ".", ".."} & set(parts) or parts[0] == STATE:
        raise ValueError(f"file name {name!r}: expected a path inside the repository, such as folder/file.nii.gz")
    if not (destination / name).resolve().is_relative_to(destination.resolve()):
        raise ValueError(
            f"file name {name!r}: a link in {destination} leads out of it; make the linked folder the destination"
        )


def _try_to_write(destination: Path) -> None:
    try:
        destination.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=destination):
            pass
    except OSError as error:
        raise OSError(f"cannot write into {destination}: {error.strerror or error}; choose another folder") from None


def _refuse_missing(repository: Repository, missing: list[str]) -> None:
    if not missing:
        return
    folder = missing[0].rpartition("/")[0]
    try:
        there = repository.ask(
            lambda api: list(api.list_repo_tree(repository.repo_id, folder or None, repo_type=repository.repo_type)),
            folder,
        )
    except FileNotFoundError:
        there = []
    close = get_close_matches(missing[0], [file.path for file in there], 3)
    hint = f"; near it are {', '.join(close)}" if close else ""
    raise FileNotFoundError(f"{repository.page} has no file\n{listed(missing)}{hint}")


def _remote_file(name: str, info) -> RemoteFile:
    digest = info.lfs.sha256 if info.lfs else info.blob_id
    if not (isinstance(info.size, int) and info.size >= 0 and _DIGEST.fullmatch(str(digest))):
        raise OSError(f"{name}: the hub says size {info.size!r} and digest {digest!r}, which can't be; try again later")
    return RemoteFile(name, info.size, digest)


def partial_path(destination: Path, file: RemoteFile) -> Path:
    """Where a file grows. The digest is in the name: no half of another version is ever continued."""
    key = hashlib.sha256(f"{file.name} {file.digest}".encode()).hexdigest()[:16]
    return destination / STATE / "partial" / f"{key}-{Path(file.name).name}.part"


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _bytes_there(destination: Path, file: RemoteFile) -> int:
    if size_of(destination / file.name) == file.size:
        return file.size
    return min(size_of(partial_path(destination, file)), file.size)
