"""Prepare a manifest's volumes for a model: on the cores of this machine or on a cluster, each volume once.

Every volume is one task, for a process of this machine or for a worker of a dask cluster: read or generate,
pre-process, store in the cache. A bad volume is recorded and the rest goes on. What is stored stays, so a run that was
stopped goes on where it was.
"""

import errno
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from medctkit.cohort.cache import VolumeCache, checksum_of, content_of, key_of, prepare_row
from medctkit.cohort.contents import Contents, stamp_of
from medctkit.cohort.manifest import has_file
from medctkit.common.csv_tables import begins_with, write_table
from medctkit.common.extras import require
from medctkit.common.processes import worker_pool
from medctkit.common.text import as_bytes, printable
from medctkit.scans.preprocessing import PreprocessConfig

FAILURE = ["study", "path", "error", "message"]  # columns of a list of failures
CONTENTS = "contents.csv"  # in the cache folder: which file had which content, so that it is hashed once
BYTES_PER_VOXEL = 1.4  # expected; phantoms took 1.04 at the released size, 1.34 at that of the mini model
HOPELESS = 20  # failures without one success after which a run stops: the settings are wrong, not the volumes
PATIENCE = "20s"  # for a scheduler to answer
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DIED = "its worker process died each time it was tried, as a rule for want of memory"

Results = Generator[tuple[dict, dict[str, Any]], None, None]  # (row, result of `_task`) as they come


@dataclass
class Preparation:
    """What a run of `prepare` did.

    Attributes:
        contents: for every study that is prepared now, the SHA-256 of its content.
        failures: one dict per study that could not be prepared: study, path, error, message.
        made: studies prepared in this run; the others were there.
        left: studies that were not tried, because everything failed.
        bytes: written in this run.
        seconds: that this run took.
        seconds_per_volume: that one core needed for one volume, the median.
    """

    contents: dict[str, str] = field(default_factory=dict)
    failures: list[dict] = field(default_factory=list)
    made: int = 0
    left: int = 0
    bytes: int = 0
    seconds: float = 0.0
    seconds_per_volume: float = 0.0

    def prepared_rows(self, manifest: pd.DataFrame) -> pd.DataFrame:
        """The rows of a manifest that are prepared, with the checksums that a run found out."""
        rows = manifest[manifest["study"].isin(self.contents)]
        return rows.assign(checksum=rows["study"].map(self.contents))


def prepare(
    rows: Sequence[Mapping],
    config: PreprocessConfig,
    cache_dir: str | os.PathLike,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    verify: bool = False,
) -> Preparation:
    """Prepare every row that is not in the cache yet. Stop it whenever you like: it goes on where it was.

    Args:
        rows: of a manifest, as dicts; files must be reachable from the workers.
        config: what the model wants.
        cache_dir: folder of the cache, reachable from the workers.
        scheduler: address of a dask scheduler, such as "tls://10.1.2.3:8786"; None: processes of this machine.
        workers: how many processes; by default one for each core; 1: this one.
        verify: read every prepared volume again, and make the damaged ones anew.

    Returns:
        What was done. A volume that fails is in its `failures`, and the others are prepared all the same.

    Raises:
        ValueError: `workers` with a `scheduler`, which brings its own.
        ImportError: `scheduler` without dask.
        ConnectionError: no scheduler answers.
        OSError: no room on a disk.
    """
    if scheduler is not None and workers is not None:
        raise ValueError("workers is for this machine; the scheduler has workers of its own")
    started = time.perf_counter()
    cache, done = VolumeCache(os.path.abspath(os.path.expanduser(cache_dir))), Preparation()
    cache.folder.mkdir(parents=True, exist_ok=True)
    cache.sweep()
    contents = Contents(cache.folder / CONTENTS)
    todo = _not_yet(rows, config, cache, contents, done, verify)
    if not todo:
        return done
    cores = os.cpu_count() or 1
    workers = min(workers or cores, len(todo))
    if scheduler:
        where, results = scheduler, _on_cluster(todo, config, cache, scheduler)
    elif workers == 1:
        where, results = "one core", ((row, _task(row, config, cache)) for row in todo)
    else:
        where, results = f"{workers} of {cores} cores", _on_cores(todo, config, cache, workers)
    print(printable(_announcement(len(todo), len(rows), config, Path(cache_dir).expanduser(), where)))
    busy = []
    with closing(results), tqdm(total=len(todo), desc="preparing", unit="volume") as bar:
        for row, result in results:
            bar.update()
            if "error" in result:
                done.failures.append({"study": row["study"], "path": row.get("path", ""), **result})
                bar.set_postfix(failed=len(done.failures))
                if len(done.failures) >= HOPELESS and not done.contents:
                    done.left = len(todo) - len(done.failures)
                    break
                continue
            done.contents[row["study"]] = result["content"]
            if result["bytes"]:
                done.made += 1
                done.bytes += result["bytes"]
                busy.append(result["seconds"])
            if result["stamp"]:
                contents.put(row["path"], result["stamp"], result["content"])
    done.seconds = time.perf_counter() - started
    done.seconds_per_volume = float(np.median(busy)) if busy else 0.0
    return done


def refuse_other_list(path: str | os.PathLike) -> None:
    """Refuse a file that a list of failures would overwrite, or take away, and that is none: a ValueError."""
    if Path(path).exists() and not begins_with(path, FAILURE):
        raise ValueError(f"{path} is no list of failures of `medctkit prepare`; move it away")


def write_failures(failures: Sequence[Mapping], path: str | os.PathLike) -> None:
    """Write the failures of a run as a table, whole or not at all; without failures, remove an earlier run's."""
    path = Path(path)
    if not failures:
        path.unlink(missing_ok=True)
        return
    write_table(pd.DataFrame(failures, columns=FAILURE).map(printable, na_action="ignore"), path)


def _not_yet(
    rows: Sequence[Mapping],
    config: PreprocessConfig,
    cache: VolumeCache,
    contents: Contents,
    done: Preparation,
    verify: bool,
) -> list[dict]:
    """Rows to prepare, without their long texts; those that are prepared go into `done`."""
    todo = []
    for row in rows:
        row = {name: value for name, value in row.items() if name != "report"}
        if has_file(row):
            row["path"] = os.path.abspath(os.path.expanduser(row["path"]))  # workers may be at home in other folders
        content = checksum_of(row) or contents.get(row["path"])
        key = key_of(row, content, config) if content else None
        if content and key and (cache.load(key) is not None if verify else cache.has(key)):
            done.contents[row["study"]] = content
        else:
            todo.append(row)
    return todo


def _announcement(n: int, of: int, config: PreprocessConfig, folder: Path, where: str) -> str:
    """What the run will cost; refuses where even half of it has no room."""
    expected, free = n * BYTES_PER_VOXEL * float(np.prod(config.shape)), shutil.disk_usage(folder).free
    if expected / 2 > free:
        raise OSError(
            errno.ENOSPC,
            f"preparing {n} volumes takes about {expected / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free; make "
            "room, or prepare into a folder on another disk",
        )
    return (
        f"preparing {n} of {of} volumes on {where}: about {as_bytes(round(expected))} in {folder} "
        f"({as_bytes(free)} free). Stop whenever you like, it goes on where it was."
    )


def _on_cores(todo: list[dict], config: PreprocessConfig, cache: VolumeCache, workers: int) -> Results:
    """In processes of this machine.

    Rows whose process died, or found too little memory, are tried once more at the end, with no others beside them.
    """
    waiting, again = deque(todo), deque[dict]()
    while waiting or again:
        rows, at_once = (waiting, workers) if waiting else (again, 1)
        running: dict[Future, dict] = {}
        try:
            with worker_pool(at_once) as pool:
                while rows or running:
                    while rows and len(running) < at_once:
                        row = rows[0]
                        running[pool.submit(_task_of_a_worker, row, config, cache)] = row
                        rows.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result, row = future.result(), running.pop(future)
                        if result.get("error") == "MemoryError" and at_once > 1:
                            again.append(row)
                        else:
                            yield row, result
        except BrokenProcessPool:
            if at_once > 1:
                again.extend(running.values())
                continue
            for row in running.values():
                yield row, {"error": "BrokenProcessPool", "message": _DIED}


def _on_cluster(todo: list[dict], config: PreprocessConfig, cache: VolumeCache, scheduler: str) -> Results:
    """By the workers of a dask cluster.

    Raises:
        ImportError: no dask.
        ConnectionError: no scheduler answers.
    """
    require("cluster", "distributed")
    from distributed import Client, as_completed

    try:
        client = Client(scheduler, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no dask scheduler answers at {scheduler} ({error}). Start one with `dask scheduler`, and on every "
            "machine `dask worker ADDRESS --nthreads 1 --nworkers auto`, in an environment with medctkit"
        ) from error
    keys = [f"prepare-{i}-{row['study']}" for i, row in enumerate(todo)]
    rows = dict(zip(keys, todo, strict=True))
    with client:
        futures = client.map(_task_of_a_worker, todo, key=keys, config=config, cache=cache, batch_size=1000)
        try:
            for future in as_completed(futures):
                died = future.exception()
                if died is None:
                    yield rows[future.key], future.result()
                elif isinstance(died, OSError) and died.errno in _DISK_FULL:
                    raise died
                else:  # the worker died again and again
                    yield rows[future.key], {"error": type(died).__name__, "message": f"{_DIED}: {died}"}
                future.release()
        finally:
            client.cancel(futures)


def _task_of_a_worker(row: Mapping, config: PreprocessConfig, cache: VolumeCache) -> dict[str, Any]:
    torch.set_num_threads(1)  # the processes are the parallelism
    return _task(row, config, cache)


def _task(row: Mapping, config: PreprocessConfig, cache: VolumeCache) -> dict[str, Any]:
    """Prepare one row, or say why not. Only a full disk, which ends everything, is raised."""
    started = time.perf_counter()
    try:
        stamp = stamp_of(row["path"]) if has_file(row) else ""
        content = content_of(row)
        key = key_of(row, content, config)
        # another process may have been quicker, or an earlier run did not get to writing down the content
        size = 0 if cache.load(key) is not None else prepare_row(row, content, config, cache)
    except Exception as error:
        for cause in _causes(error):
            if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
                raise OSError(cause.errno, f"no room left ({cause}): {_room(cache.folder)}") from None
        if any(isinstance(cause, MemoryError) or "llocate memory" in str(cause) for cause in _causes(error)):
            message = f"too little memory, which says nothing against the scan; try again with fewer workers ({error})"
            return {"error": "MemoryError", "message": message}
        return {"error": type(error).__name__, "message": str(error)}
    return {"content": content, "stamp": stamp, "bytes": size, "seconds": time.perf_counter() - started}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it came from: a reader may tell it in other words."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _room(folder: Path) -> str:
    """Which disks may be full, and what to do."""
    disks = {"prepared volumes": folder, "temporary files (TMPDIR)": Path(tempfile.gettempdir())}
    free = [f"{what} go to {disk}, {as_bytes(shutil.disk_usage(disk).free)} free" for what, disk in disks.items()]
    return f"{'; '.join(free)}. What is prepared is whole; make room and start again, it goes on where it was"
