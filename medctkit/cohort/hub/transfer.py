"""Files from a hub repository to a folder: resumed, verified, stored once.

Files lie in the destination under their names in the repository. The hidden folder `.medctkit` beside them
holds unfinished files and the record of what was verified.

huggingface_hub says what a file is and opens the connection; the bytes are written here, because
`hf_hub_download` begins an interrupted file anew (huggingface_hub issue 4196). Its cache stays empty.
"""

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from medctkit.cohort.hub.preflight import STATE, Plan, RemoteFile, partial_path, size_of
from medctkit.cohort.hub.repository import ATTEMPTS, pause, status_of
from medctkit.common.text import as_bytes, counted


@dataclass(frozen=True)
class Outcome:
    """What a download did, file by file.

    Args:
        fetched: files that came over the network.
        kept: files that were there, whole.
        untried: files that weren't begun or finished, because a failure concerned all of them.
        failures: files that are not there, and why.
        replaced: files that were in the way, under the names they have now.
    """

    fetched: tuple[str, ...]
    kept: tuple[str, ...]
    untried: tuple[str, ...]
    failures: dict[str, str]
    replaced: tuple[Path, ...]

    def __str__(self) -> str:
        parts = [f"{counted(self.fetched, 'file')} fetched", f"{len(self.kept):,} already there"]
        parts += [f"{len(self.failures):,} failed"] if self.failures else []
        parts += [f"{len(self.untried):,} left"] if self.untried else []
        lines = [", ".join(parts), *(f"  {name}\n    {why}" for name, why in self.failures.items())]
        lines += [f"  not what the hub has, kept aside: {path}" for path in self.replaced]
        return "\n".join(lines)


class _Stopped(Exception):
    """The rest of the download was called off."""


class _LocalError(OSError):
    """The destination can't be written."""


class _WrongError(Exception):
    """A file arrives other than the hub announces it."""


def download(plan: Plan, *, workers: int = 4, verify: bool = False) -> Outcome:
    """Fetch what is missing, several files at a time, and verify each by its size and digest.

    A file gets its name once it is whole and verified. One that arrives wrong is fetched once more. Files with
    the right size that were verified before are taken as they are. What was interrupted goes on where it
    stopped, in this call or the next. A file that is not what the hub has is kept under another name.

    Args:
        plan: from `preflight`.
        workers: files at a time.
        verify: read and verify the files that are there again.

    Returns:
        What was done; the failure of one file doesn't keep the others from being fetched.

    Raises:
        OSError: another download is writing into the same folder.
    """
    return _Download(plan, verify).run(workers)


@contextmanager
def _alone(destination: Path) -> Iterator[None]:
    from huggingface_hub.utils import WeakFileLock

    with _writing(destination):
        (destination / STATE / "partial").mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(destination / STATE / "lock", timeout=1))
        except TimeoutError:
            raise OSError(
                f"another download writes into {destination}: wait for it, or choose another folder"
            ) from None
        yield


@contextmanager
def _writing(what: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _LocalError(
            f"cannot write {what}: {error.strerror or error}. Make room, or look at your quota, and run this again: it "
            "goes on from here"
        ) from None


def _digest(path: Path, file: RemoteFile) -> str:
    algorithm = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(b"blob %d\0" % file.size)
    try:
        with open(path, "rb") as opened:
            return hashlib.file_digest(opened, lambda: algorithm).hexdigest()
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None


class _Record:
    """Which files were verified, one line each: digest, size, name. A line half written is forgotten."""

    def __init__(self, destination: Path) -> None:
        self.path, self.lock = destination / STATE / "verified.txt", threading.Lock()
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        lines = re.findall(r"^[0-9a-f]{40,64} \d+ .+(?=\n)", text, flags=re.M)
        self.lines = {line.split(" ", 2)[2]: line for line in lines}
        temporary = self.path.with_suffix(".tmp")
        with _writing(self.path):
            temporary.write_text("".join(f"{line}\n" for line in self.lines.values()), encoding="utf-8")
            os.replace(temporary, self.path)

    def has(self, file: RemoteFile) -> bool:
        return self.lines.get(file.name) == self._line(file)

    def add(self, file: RemoteFile) -> None:
        with self.lock, _writing(self.path), open(self.path, "a", encoding="utf-8") as opened:
            self.lines[file.name] = self._line(file)
            opened.write(f"{self._line(file)}\n")

    @staticmethod
    def _line(file: RemoteFile) -> str:
        return f"{file.digest} {file.size} {file.name}"


class _Download:
    """One run of `download`; `stop` calls it off from any thread."""

    def __init__(self, plan: Plan, verify: bool) -> None:
        self.plan, self.verify = plan, verify
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.replaced: list[Path] = []

    def run(self, workers: int) -> Outcome:
        from concurrent.futures import ThreadPoolExecutor, as_completed

        from tqdm.auto import tqdm

        done: dict[str, list[str]] = {"fetched": [], "kept": [], "untried": []}
        failures, left = {}, self.plan.bytes_left
        with (
            _alone(self.plan.destination),
            tqdm(total=left, disable=not left, unit="B", unit_scale=True, mininterval=1, desc="download") as self.bar,
            ThreadPoolExecutor(workers) as pool,
        ):
            self.record = _Record(self.plan.destination)
            futures = {pool.submit(self.provide, file): file.name for file in self.plan.files}
            try:
                for future in as_completed(futures):
                    name = futures[future]
                    try:
                        done[future.result()].append(name)
                    except OSError as error:
                        failures[name] = str(error)
                        if isinstance(error, _LocalError | PermissionError):  # concerns every other file too
                            self.stop.set()
            except BaseException:
                self.stop.set()
                raise
        return Outcome(
            *(tuple(sorted(names)) for names in done.values()), dict(sorted(failures.items())), tuple(self.replaced)
        )

    def provide(self, file: RemoteFile) -> str:
        """See to it that a file is there, whole; returns what had to be done."""
        target, partial = self.plan.destination / file.name, partial_path(self.plan.destination, file)
        try:
            whole, known = target.is_file() and size_of(target) == file.size, self.record.has(file)
            if whole and known and not self.verify:
                return "kept"
            self.go_on()
            if whole and _digest(target, file) == file.digest:
                if not known:
                    self.record.add(file)
                return "kept"
            self.fetch(file, partial)
            with _writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                self.keep_aside(target)
                os.replace(partial, target)
            self.record.add(file)
        except _Stopped:
            return "untried"
        return "fetched"

    def keep_aside(self, target: Path) -> None:
        """Give a file that is in the way another name: it may be the only one of its kind."""
        if target.exists():
            names = (target.with_name(f"{target.name}.replaced{n}") for n in count(1))
            aside = next(name for name in names if not name.exists())
            os.replace(target, aside)
            self.replaced.append(aside)

    def fetch(self, file: RemoteFile, partial: Path) -> None:
        """Bring a file into `partial`, verified; what arrives wrong is thrown away and fetched once more."""
        for again in (True, False):
            try:
                self.grow(file, partial)
                found = _digest(partial, file)
                if found == file.digest:
                    return
                raise _WrongError(f"arrived with digest {found}, but the hub says {file.digest}")
            except _WrongError as error:
                self.advance(-size_of(partial))
                partial.unlink()
                if not again:
                    raise OSError(f"{error}; fetched twice, so the hub itself is wrong: try again later") from None

    def grow(self, file: RemoteFile, partial: Path) -> None:
        """Let `partial` grow to the file's size, over as many connections as that takes."""
        with _writing(partial):
            partial.touch()
        repository, reached, failures = self.plan.repository, size_of(partial), 0
        while size_of(partial) < file.size:
            error = None
            try:
                self.receive(file, partial)
            except (_LocalError, _WrongError, _Stopped):
                raise
            except Exception as caught:
                error = caught
                if status_of(error) == 416:
                    raise _WrongError(f"ends before byte {reached}, but the hub says {file.size}") from None
                if not repository.may_pass(error):
                    raise repository.explain(error, file.name) from None
            failures = 0 if size_of(partial) > reached else failures + 1
            reached = max(reached, size_of(partial))
            if failures == ATTEMPTS:
                raise OSError(
                    f"broke off at {as_bytes(reached)} of {as_bytes(file.size)}; {ATTEMPTS} attempts brought no more"
                    + (f": {repository.explain(error, file.name)}" if error else "; run this again to go on from there")
                )
            if size_of(partial) < file.size:
                self.stop.wait(pause(max(failures, 1), error))

    def receive(self, file: RemoteFile, partial: Path) -> None:
        """Append to `partial` what one connection brings."""
        self.go_on()
        have = size_of(partial)
        with self.plan.repository.stream(file.name, self.plan.revision, have) as (start, length, chunks):
            if length not in (None, file.size) or start > have:
                raise _WrongError(f"has {length} bytes where it is stored, but the hub says {file.size}")
            with open(partial, "r+b", buffering=0) as opened:
                opened.truncate(start)
                opened.seek(start)
                self.advance(start - have)
                for chunk in chunks:
                    self.go_on()
                    if opened.tell() + len(chunk) > file.size:
                        raise _WrongError(f"goes on after the {file.size} bytes that the hub says")
                    with _writing(partial):
                        rest = memoryview(chunk)
                        while rest:  # a full disk may take a part
                            rest = rest[opened.write(rest) :]
                    self.advance(len(chunk))
                with _writing(partial):
                    os.fsync(opened.fileno())

    def go_on(self) -> None:
        """Leave off here if the download was called off."""
        if self.stop.is_set():
            raise _Stopped

    def advance(self, n: int) -> None:
        """Move the progress bar by n bytes."""
        with self.lock:
            self.bar.update(n)
