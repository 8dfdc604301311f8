"""Files that are written whole or not at all, and folders that one process works in at a time."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file under a temporary name beside it, which takes its name at the end of the block.

    Whoever reads `path` meanwhile sees the old file; if the block fails, the old file stays and nothing else is left.
    Several processes may do so at once. Yields the path to write to; it ends in .tmp.
    """
    path = Path(path).expanduser()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # of a full disk only the errno is told
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_all(contents: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write files of these names into a folder, which take their names when all of them are whole, or none does."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name, content in contents.items():
            stack.enter_context(replacing(folder / name)).write_bytes(content)
    return [folder / name for name in contents]


@contextmanager
def alone(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a folder, made where it is missing, for a block: what another process has begun there is not taken away.

    Raises:
        ValueError: another one holds it.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is at work in {folder}; wait for its end, or give another folder") from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does it on release
            Path(lock.lock_file).unlink()
        lock.release()
