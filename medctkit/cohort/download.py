"""CT-RATE and the released weights from the Hugging Face Hub: planned, fetched by huggingface_hub, verified.

CT-RATE is gated and must not be passed on: everyone fetches it with a token of their own, after accepting its terms.
`plan_files` finds out before the first byte whether files can be had and have room; `download` fetches them.

Each file goes through `hf_hub_download` and not all through `snapshot_download`, which would list every file of the
repository and hold each against each of some thousand patterns. What was verified is written down in `.cache`.
"""

import hashlib
import inspect
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from tqdm.auto import tqdm

from medctkit.cohort.contents import Contents, stamp_of
from medctkit.cohort.ct_rate import TABLES
from medctkit.cohort.hub_repository import HubRepository
from medctkit.cohort.selection import Selection, read_names, select
from medctkit.common.atomic import alone
from medctkit.common.csv_tables import read_table
from medctkit.common.text import as_bytes, counted, listed

CT_RATE = "ibrahimhamamci/CT-RATE"
WEIGHTS = "models/CT-CLIP-Related"
TEXT_ENCODER = "microsoft/BiomedVLP-CXR-BERT-specialized"
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MARGIN = 10**9  # bytes that stay free on the disk
_RECORDS = Path(".cache") / "huggingface"


@dataclass(frozen=True)
class Plan:
    """What `download` will do; made by `plan_files`."""

    repository: HubRepository
    revision: str  # the commit
    destination: Path
    files: tuple[RepoFile, ...]  # as the hub announces them
    bytes_there: int  # how much of them is in the destination already
    bytes_free: int  # on its disk

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


def plan_files(repository: HubRepository, names: Iterable[str], destination: str | os.PathLike) -> Plan:
    """Find out whether files can be fetched, before the first byte.

    Raises:
        PermissionError: no token, one that is refused, or terms that aren't accepted.
        FileNotFoundError: no such repository or file.
        ConnectionError: no network, or offline mode.
        OSError: the destination can't be written, or its disk has no room.
    """
    repo_id, repo_type, names = repository.repo_id, repository.repo_type, list(dict.fromkeys(names))
    destination = Path(destination).expanduser().absolute()
    try:
        destination.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=destination).close()
    except OSError as error:
        raise OSError(f"cannot write into {destination}: {error.strerror or error}; choose another folder") from None

    def commit(api: HfApi) -> str:
        # everyone may list a gated repository: only asking for a file tells whether it can be had
        url = hf_hub_url(repo_id, names[0], repo_type=repo_type, endpoint=api.endpoint)
        found = get_hf_file_metadata(url, timeout=30, endpoint=api.endpoint).commit_hash
        if found is None:
            raise ValueError("an answer without a commit")
        return found

    def entries(some: list[str]) -> list:
        return repository.ask(lambda api: api.get_paths_info(repo_id, some, revision=sha, repo_type=repo_type), repo_id)

    sha = repository.ask(commit, names[0])
    parts = [entries(names[start : start + 250]) for start in range(0, len(names), 250)]
    found = {entry.path: entry for part in parts for entry in part if hasattr(entry, "blob_id")}
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(f"{repository.page} has no file\n{listed(missing)}")
    files = tuple(found[name] for name in names)
    there = sum(file.size for file in files if _has_size(destination / file.path, file))
    plan = Plan(repository, sha, destination, files, there, shutil.disk_usage(destination).free)
    refuse_no_room(destination, plan.bytes_left, plan.bytes_free)
    return plan


def refuse_no_room(destination: Path, left: int, free: int) -> None:
    """Of the bytes that are `left` to fetch, and those that are `free`.

    Raises:
        OSError: too few are free.
    """
    if left and left + MARGIN > free:
        raise OSError(
            f"no room in {destination}: {as_bytes(left)} to fetch and {as_bytes(MARGIN)} to spare, but "
            f"{as_bytes(free)} free. Choose another folder or fewer patients, or make room"
        )


# --- fetching ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a download did, file by file, names sorted."""

    fetched: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # were there, whole
    untried: list[str] = field(default_factory=list)  # not begun or finished, as a failure concerned all
    failures: dict[str, str] = field(default_factory=dict)  # and why
    replaced: list[Path] = field(default_factory=list)  # were in the way; the names they have now

    def __str__(self) -> str:
        parts = [f"{counted(self.fetched, 'file')} fetched", f"{len(self.kept):,} already there"]
        parts += [f"{len(self.failures):,} failed"] if self.failures else []
        parts += [f"{len(self.untried):,} left"] if self.untried else []
        lines = [", ".join(parts), *(f"  {name}\n    {why}" for name, why in sorted(self.failures.items()))]
        return "\n".join([*lines, *(f"  not what the hub has, kept aside: {path}" for path in self.replaced)])


def download(plan: Plan, *, workers: int = 4, verify: bool = False) -> Outcome:
    """Fetch what is missing, several files at a time, and verify each by the digest that the hub announces.

    A file gets its name once it is whole. Files that were verified before, and not changed since, are taken as they
    are, unless `verify` is set. A file that is not what the hub has is kept under another name. The failure of one file
    doesn't keep the others from being fetched.

    Raises:
        ValueError: another download is writing into the same folder.
    """
    # huggingface_hub 0.x, which Colab has, shows a bar of its own for each file
    one_bar = "tqdm_class" in inspect.signature(hf_hub_download).parameters
    stop, left, outcome = threading.Event(), plan.bytes_left if one_bar else 0, Outcome()

    class FileBar(tqdm):
        """Not shown: what it counts goes into the one bar, until all is called off."""

        def __init__(self, *_, **__) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise CancelledError
            bar.update(n)

        def update_transfer(self, *_) -> None:
            """Of bytes that are counted again when they are put together."""

        set_transfer_postfix_str = update_transfer

    options: dict[str, Any] = {"tqdm_class": FileBar} if one_bar else {}

    def fetch(api: HfApi, file: RepoFile) -> None:
        where: dict[str, Any] = dict(repo_id=plan.repository.repo_id, repo_type=plan.repository.repo_type)
        where |= dict(revision=plan.revision, local_dir=plan.destination, endpoint=api.endpoint)
        path = Path(hf_hub_download(filename=file.path, **where, **options))
        stamp, found = stamp_of(path), _digest(path, file)  # the library looks at the size only
        if found != _announced_digest(file):
            path.unlink()
            raise OSError(f"arrived with digest {found}, but the hub says {_announced_digest(file)}")
        verified.put(plan.destination / file.path, stamp, found)

    def provide(file: RepoFile) -> None:
        target = plan.destination / file.path
        if stop.is_set():
            outcome.untried.append(file.path)
            return
        try:
            if _is_there(target, file, verified, verify):
                outcome.kept.append(file.path)
                return
            if target.exists():  # it may be the only one of its kind
                outcome.replaced.append(target.rename(f"{target}.replaced-{time.time_ns()}"))
            plan.repository.ask(lambda api: fetch(api, file), file.path)
            outcome.fetched.append(file.path)
        except CancelledError:
            outcome.untried.append(file.path)
        except OSError as error:
            full = f"cannot write {target}: {error.strerror}. Make room, or look at your quota, and run this again"
            outcome.failures[file.path] = str(error) if error.errno is None else full
            if error.errno is not None or isinstance(error, PermissionError):  # concerns every other file too
                stop.set()

    with ExitStack() as stack:
        records = plan.destination / _RECORDS
        records.mkdir(parents=True, exist_ok=True)
        stack.enter_context(alone(plan.destination))
        verified = Contents(records / "verified.csv")
        bar = stack.enter_context(tqdm(total=left, disable=not left, unit="B", unit_scale=True, desc="download"))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        try:
            list(pool.map(provide, plan.files))
        finally:
            stop.set()  # where the wait was broken off
    for names in (outcome.fetched, outcome.kept, outcome.untried):
        names.sort()
    return outcome


def _has_size(path: Path, file: RepoFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _is_there(path: Path, file: RepoFile, verified: Contents, verify: bool) -> bool:
    """Whether a file is in the destination, whole; it is read unless it was verified and is as it was then."""
    if not _has_size(path, file):
        return False
    found = None if verify else verified.get(path)
    if found is None:
        stamp, found = stamp_of(path), _digest(path, file)
        verified.put(path, stamp, found)
    return found == _announced_digest(file)


def _announced_digest(file: RepoFile) -> str:
    """SHA-256, or git's SHA-1 of a file in git itself."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def _digest(path: Path, file: RepoFile) -> str:
    algorithm = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size)
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, lambda: algorithm).hexdigest()


# --- what to fetch ---------------------------------------------------------------------------------------------


def plan_ct_rate(
    destination: str | os.PathLike,
    *,
    patients: int | None = None,
    studies: Iterable[str] | None = None,
    split: str | None = None,
    version: int = 2,
    weights: Iterable[str] = (),
    seed: int | None = None,
) -> tuple[Plan, Selection | None]:
    """Fetch the tables of CT-RATE, choose volumes by them, and find out whether these can be fetched.

    Args:
        destination: folder that becomes a part of CT-RATE, with its layout.
        patients: how many, of `split` ("valid" if it isn't given); see `select`.
        studies: names; see `select`.
        split: "train" or "valid"; alone it means all of it.
        version: see `select`.
        weights: names such as "CT-CLIP_v2.pt", to be fetched too.
        seed: see `select`.

    Returns:
        The plan of volumes and weights, and the choice behind it (None where it is only weights).

    Raises:
        ValueError: nothing chosen, too much, or names that don't exist.
        OSError: a table can't be fetched; see also `plan_files`.
    """
    repository = HubRepository(CT_RATE)
    weights = [f"{WEIGHTS}/{name}" for name in weights]
    if patients is None and studies is None and split is None:
        if not weights:
            raise ValueError("nothing was chosen: give patients, studies, split or weights")
        return plan_files(repository, weights, destination), None
    if split is not None and split not in TABLES:
        raise ValueError(f"split {split!r}: expected train or valid")
    studies = None if studies is None else list(studies)
    named = [name for name in TABLES if any(study.startswith(f"{name}_") for study in studies or ())]
    tables = [TABLES[name] for name in ([split] if split else named or ["valid"])]
    plan = plan_files(repository, [path for table in tables for path in table.values()], destination)
    outcome = download(plan)
    if outcome.failures:
        raise OSError(str(outcome))
    volumes, no_chest = [], []
    for table in tables:
        volumes += list(read_table(plan.destination / table["labels"], ["VolumeName"], [])["VolumeName"])
        no_chest += read_names(plan.destination / table["no_chest"])
    chosen = select(volumes, patients=patients, studies=studies, version=version, no_chest=no_chest, seed=seed)
    return plan_files(repository, [*chosen.files, *weights], destination), chosen


def plan_tokenizer(destination: str | os.PathLike) -> Plan:
    """Find out whether the tokenizer of the released text encoder can be fetched.

    The encoder's weights are part of CT-CLIP's; of its repository's Python code nothing is fetched.

    Raises:
        OSError: see `plan_files`.
    """
    repository = HubRepository(TEXT_ENCODER, "model")
    there = repository.ask(lambda api: {entry.path for entry in api.list_repo_tree(TEXT_ENCODER)}, TEXT_ENCODER)
    names = [name for name in TOKENIZER_FILES if name in there or name == "vocab.txt"]
    return plan_files(repository, names, Path(destination) / TEXT_ENCODER.rpartition("/")[2])
