"""A DICOM service: CT series come in by C-STORE, answers go out by C-STORE to one destination.

A slice is acknowledged once it is on disk. What is to be done is read from the disk alone, so that a gateway that was
killed goes on where it stood: `FOLDER/<study>/<series>/` has `slices/`, `answer/` with what is to be sent, and
`state.json`, which says how far it came; names are digests of UIDs. A series counts as whole when nothing more of it
has come for a while; if more comes later, or a slice of other content, it is answered again, under other UIDs.

Only digests go to the log: no name, no number of a patient, and no text of an error, which may quote a header.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from medctkit.common.atomic import alone, replacing
from medctkit.common.provenance import write_json
from medctkit.deploy.answer import write_answer

log = logging.getLogger("medctkit.gateway")
SUCCESS, OUT_OF_RESOURCES, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000
_TRIES = 3  # of a series, which may be what ends the process each time
_TITLE = re.compile(r"(?=.*[^ ])[ -\[\]-~]{1,16}")  # printable ASCII without the backslash, not only spaces
_TITLES = "a title has at most 16 letters of ASCII and no backslash"
_PAUSE = 0.2  # s between looks at the disk


@dataclass(frozen=True)
class Peer:
    """A DICOM service elsewhere."""

    host: str
    port: int
    title: str

    @classmethod
    def of(cls, text: str) -> "Peer":
        """TITLE@HOST:PORT.

        Raises:
            ValueError: another form.
        """
        title, _, rest = text.partition("@")
        host, _, port = rest.rpartition(":")
        fits = port.isdecimal() and 0 < int(port) < 2**16 and re.fullmatch(r"[\w.:-]+|\[[\w.:]+\]", host)
        if not (fits and _TITLE.fullmatch(title)):
            raise ValueError(f"{text!r}: expected TITLE@HOST:PORT, such as PACS@127.0.0.1:4242; {_TITLES}")
        return cls(host.strip("[]"), int(port), title)


@dataclass(frozen=True)
class Limits:
    """How much a gateway takes, and how long it waits, s."""

    queue: int = 32  # series that wait; slices of a further one are refused (A700), and the sender tries again later
    quiet: float = 10  # without a new slice: a series counts as whole
    retry: float = 30  # until an answer that the destination did not take is sent again
    keep: float = 24 * 3600  # until a series that was answered, or could not be, is taken away


class Gateway:
    """Takes CT series, has them answered one after the other, and sends the answers on.

    Args:
        folder: for what is on its way; nobody else's.
        answering: makes DICOM objects of a folder with the slices of one series.
        destination: gets them.
        allowed: titles of those who may call; None: everyone.
        title: of this service; who calls another one is refused.
        limits: how much it takes.

    Raises:
        ValueError: nobody is allowed to call.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        answering: Callable[[Path], Sequence[Dataset]],
        destination: Peer,
        allowed: Collection[str] | None,
        title: str = "MEDCTKIT",
        limits: Limits = Limits(),
    ):
        if allowed is not None and not allowed:
            raise ValueError("nobody may call: name the titles that may, or allow everyone")
        self.folder, self.answering, self.destination = Path(folder).expanduser(), answering, destination
        self.allowed, self.title, self.limits = allowed, title, limits
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._not_before = dict[Path | None, float]()  # s, of an answer that was refused; None: of all, nobody is there
        self._known = dict[Path, Series]()

    @contextmanager
    def serving(self, port: int, host: str = "127.0.0.1") -> Iterator[int]:
        """Listen and work until the block ends; yields the port, which is a free one for 0.

        Raises:
            OSError: the port is taken, or the address is not this machine's.
            ValueError: another gateway works in the folder.
        """
        from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, _config, evt

        entity = AE(self.title)
        entity.require_called_aet, entity.require_calling_aet = True, list(self.allowed or [])
        for kind in (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage):
            entity.add_supported_context(kind, ALL_TRANSFER_SYNTAXES)
        entity.add_supported_context("1.2.840.10008.1.1")  # C-ECHO
        self._stop.clear()
        worker = threading.Thread(target=self._work, name="answers")
        with ExitStack() as stack:
            stack.enter_context(alone(self.folder))
            for name in ("pynetdicom", "pydicom", "highdicom"):  # they quote headers
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
            _config.LOG_HANDLER_LEVEL = "none"
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for left in self.folder.glob("*/*/slices/.*.tmp"):
                left.unlink()
            handlers: Any = [(evt.EVT_C_STORE, self._store), (evt.EVT_C_ECHO, lambda event: SUCCESS)]
            try:
                server: Any = entity.start_server((host, port), block=False, evt_handlers=handlers)
            except OSError as error:
                why = f"cannot listen at {host}:{port} ({error.strerror}); give another port, or this machine's address"
                raise OSError(error.errno, why) from None
            worker.start()
            stack.callback(worker.join)
            stack.callback(self._stop.set)
            stack.callback(server.shutdown)
            yield server.socket.getsockname()[1]

    def waiting(self) -> "list[Series]":
        """The series that are not answered yet, the oldest first."""
        found = [self._series(path.parent) for path in self.folder.glob("*/*/slices")]
        return sorted((one for one in found if not one.settled), key=lambda one: one.latest)

    def _series(self, folder: Path) -> "Series":
        """A series, looked at anew only if a slice came since the last look."""
        known = self._known.get(folder)
        if known is None or known.latest != Series.latest_of(folder):
            known = self._known[folder] = Series(folder)
        return known

    def _store(self, event: Any) -> int:
        try:
            dataset = event.dataset
            uids = [str(dataset[name].value) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
            if not all(uids):
                return NOT_UNDERSTOOD
            study, series, instance = map(_digest, uids)
        except Exception as error:  # whatever a header may do to a parser
            log.warning("an object was refused: %s", type(error).__name__)
            return NOT_UNDERSTOOD
        folder = self.folder / study / series
        with self._lock:
            try:
                waiting = {one.folder for one in self.waiting()}
                if folder not in waiting and len(waiting) >= self.limits.queue:
                    log.warning("series %s was refused: %d wait", series, len(waiting))
                    return OUT_OF_RESOURCES
                folder.parent.mkdir(mode=0o700, exist_ok=True)  # for this user alone
                (folder / "slices").mkdir(parents=True, exist_ok=True)
                path, content = folder / "slices" / f"{instance}.dcm", event.encoded_dataset()
                if path.is_file() and path.read_bytes() == content:
                    os.utime(path.parent)  # whoever sends it again is not done yet
                    return SUCCESS
                with replacing(path) as temporary, open(temporary, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                log.error("series %s: a slice cannot be written: %s", series, error.strerror)
                return OUT_OF_RESOURCES
        return SUCCESS

    def _work(self) -> None:
        while not self._stop.wait(_PAUSE):
            with _going_on():
                with self._lock:
                    waiting = self.waiting()
                for one in waiting:
                    if not self._stop.is_set() and time.time() - one.latest >= self.limits.quiet:
                        with _going_on():
                            one = self._known[one.folder] = Series(one.folder)  # no slice is missed now
                            self._settle(one)
                self._forget()

    def _settle(self, one: "Series") -> None:
        """Answer a series, or send what is ready."""
        name, answers = one.folder.name, one.folder / "answer"
        if one.state != "ready":
            if one.tries >= _TRIES:
                log.error("series %s was given up after %d tries", name, one.tries)
                return one.becomes("failed", one.reason or "the process ended, of too little memory say, at each try")
            one.becomes("trying")
            shutil.rmtree(answers, ignore_errors=True)
            try:
                made = self.answering(one.folder / "slices")
                if Series(one.folder).slices != one.slices:  # some came meanwhile, which were not looked at
                    return
                write_answer(made, answers)
            except Exception as error:
                log.error("series %s: no answer: %s; state.json says why", name, type(error).__name__)
                lasting = isinstance(error, ValueError)
                return one.becomes("failed" if lasting else "trying", f"{type(error).__name__}: {error}")
            one.becomes("ready")
        if any(time.time() < self._not_before.get(of, 0) for of in (None, one.folder)):
            return
        made = _read(answers)
        if not made:
            log.warning("series %s: its answer cannot be read, and is made again", name)
            return one.becomes("trying", "its answer could not be read")
        if self._send(one, made):
            log.info("series %s: answered", name)
            one.becomes("sent")

    def _send(self, one: "Series", answers: list[Dataset]) -> bool:
        from pynetdicom import AE

        name, entity = one.folder.name, AE(self.title)
        for made in answers:
            entity.add_requested_context(made.SOPClassUID, made.file_meta.TransferSyntaxUID)
        peer = self.destination
        try:
            link = entity.associate(peer.host, peer.port, ae_title=peer.title)
        except (OSError, ValueError) as error:  # an address, or a kind of object, that cannot be
            log.warning("series %s waits: %s, calling %s", name, type(error).__name__, peer.title)
            return self._later(None)
        if not link.is_established:
            log.warning("series %s waits: %s does not take calls", name, peer.title)
            return self._later(None)
        try:
            codes = [link.send_c_store(made).get("Status") for made in answers]
        except (RuntimeError, ValueError) as error:  # the link broke; a kind of object is not taken
            log.warning("series %s waits: %s, from %s", name, type(error).__name__, peer.title)
            return self._later(one.folder)
        finally:
            link.release()
        refused = [code for code in codes if code is None or not (code == 0 or code >> 12 == 0xB)]
        if refused:
            log.warning("series %s waits: %s answers with %s", name, peer.title, refused[0])
            return self._later(one.folder)
        return True

    def _later(self, of: Path | None) -> bool:
        """Not taken: another try after a while, of one series, so that no other waits for it, or of all."""
        self._not_before[of] = time.time() + self.limits.retry
        return False

    def _forget(self) -> None:
        """Take away what was settled long ago."""
        with self._lock:
            for state in self.folder.glob("*/*/state.json"):
                old = time.time() - state.stat().st_mtime > self.limits.keep
                if old and self._series(state.parent).settled:
                    shutil.rmtree(state.parent)
                    self._known.pop(state.parent, None)
                    self._not_before.pop(state.parent, None)
                    with suppress(OSError):  # other series of the study
                        state.parent.parent.rmdir()


class Series:
    """A series on disk, when its latest slice came (s), how often an answer was begun, and how far it came.

    The state is of exactly these files: "" (new), "trying", "ready" (its answer is on disk), "sent" or "failed".
    """

    def __init__(self, folder: Path):
        self.folder, self.latest = folder, self.latest_of(folder)
        files = sorted((folder / "slices").glob("*.dcm"))
        self.slices = _digest("\n".join(f"{path.name} {path.stat().st_mtime_ns}" for path in files))
        self.state, self.tries, self.reason = "", 0, ""
        with suppress(OSError, ValueError, KeyError, TypeError):  # of a series that is new, or has a damaged file
            found = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if found["slices"] == self.slices:
                self.state, self.tries, self.reason = str(found["state"]), int(found["tries"]), str(found["reason"])

    @staticmethod
    def latest_of(folder: Path) -> float:
        """When the latest slice of a series came, s."""
        return (folder / "slices").stat().st_mtime

    @property
    def settled(self) -> bool:
        """Whether nothing is to be done."""
        return self.state in ("sent", "failed")

    def becomes(self, state: str, reason: str = "") -> None:
        """Write down how far it came."""
        self.state, self.tries = state, self.tries + (state == "trying" and not reason)
        content = {"slices": self.slices, "state": state, "tries": self.tries, "reason": reason}
        write_json(content, self.folder / "state.json")


@contextmanager
def _going_on() -> Iterator[None]:
    """Log what goes wrong, the disk for one, by its kind; the next look may find it mended."""
    try:
        yield
    except Exception as error:
        log.error("the queue stumbled: %s", type(error).__name__)


def _read(folder: Path) -> list[Dataset]:
    """The objects of an answer; none if one of them cannot be read."""
    try:
        return [dcmread(file) for file in sorted(folder.glob("*.dcm"))]
    except Exception:  # whatever a damaged file may do to a parser
        return []


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
