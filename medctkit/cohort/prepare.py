"""Prepare a manifest's volumes for a model: on the cores of this machine or on a cluster, each volume once.

Every volume is one task of dask.distributed: read or generate, pre-process, store in the cache. A bad volume is
recorded and the rest goes on. What is stored stays, so a run that was stopped goes on where it was. Without dask (the
extra `cluster`) volumes are prepared here, one after the other.
"""

import csv
import errno
import os
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medctkit.cohort.cache import VolumeCache, checksum_of, content_of, key_of, prepare_row
from medctkit.cohort.manifest import has_file
from medctkit.common.atomic import replacing
from medctkit.common.text import as_bytes
from medctkit.scans.preprocessing import PreprocessConfig

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client

CONTENTS = "contents.csv"  # in the cache folder: which file had which content, so that it is hashed once
BYTES_PER_VOXEL = 1.4  # expected; phantoms took 1.04 at the released size, 1.34 at that of the mini model
HOPELESS = 20  # failures without one success after which a run stops: the settings are wrong, not the volumes
PATIENCE = "20s"  # for a scheduler to answer
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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

    def prepared_rows(self, manifest: "pd.DataFrame") -> "pd.DataFrame":
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
        scheduler: address of a dask scheduler, such as "tcp://10.1.2.3:8786"; None: a cluster of this machine's
            cores, on the loopback interface, for the time of this call.
        workers: processes of the local cluster; by default one for each core; without dask only this one.
        verify: read every prepared volume again, and make the damaged ones anew.

    Returns:
        What was done. A volume that fails is in its `failures`, and the others are prepared all the same.

    Raises:
        ValueError: `workers` with a `scheduler`, which brings its own.
        ImportError: `scheduler` or several `workers` without dask.
        ConnectionError: no scheduler answers.
        OSError: no room on the disk.
    """
    from tqdm.auto import tqdm

    if scheduler is not None and workers is not None:
        raise ValueError("workers is for the local cluster; the scheduler has workers of its own")
    started = time.perf_counter()
    cache, done = VolumeCache(os.path.abspath(cache_dir)), Preparation()
    cache.folder.mkdir(parents=True, exist_ok=True)
    cache.sweep()
    todo = _not_yet(rows, config, cache, done, verify)
    if not todo:
        return done
    cores = os.cpu_count() or 1
    if find_spec("distributed") is None:
        if scheduler or (workers or 1) > 1:
            raise ImportError("several workers need dask, which is not installed: pip install 'medctkit[cluster]'")
        where = "this process (on all cores with `pip install 'medctkit[cluster]'`)"
    else:
        workers = None if scheduler else min(workers or cores, len(todo))
        where = scheduler or f"{workers} of {cores} cores"
    print(_announcement(len(todo), len(rows), config, Path(cache_dir), where))
    busy = []
    with (
        open(cache.folder / CONTENTS, "a", newline="", encoding="utf-8") as contents,
        _client(scheduler, workers) as client,
        closing(_results(client, todo, config, cache)) as results,
        tqdm(total=len(todo), desc="preparing", unit="volume") as bar,
    ):
        if client and client.dashboard_link:
            bar.write(f"dashboard: {client.dashboard_link}")
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
                csv.writer(contents).writerow([row["path"], *result["stamp"], result["content"]])
                contents.flush()
    done.seconds = time.perf_counter() - started
    done.seconds_per_volume = float(np.median(busy)) if busy else 0.0
    return done


def write_failures(failures: Sequence[Mapping], path: str | os.PathLike) -> None:
    """Write the failures of a run as a table, whole or not at all; without failures, remove an earlier run's."""
    import pandas as pd

    path = Path(path)
    if not failures:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        pd.DataFrame(failures, columns=["study", "path", "error", "message"]).to_csv(temporary, index=False)


def _not_yet(
    rows: Sequence[Mapping], config: PreprocessConfig, cache: VolumeCache, done: Preparation, verify: bool
) -> list[dict]:
    """Rows to prepare, without their long texts; those that are prepared go into `done`."""
    known, todo = _known_contents(cache.folder), []
    for row in rows:
        row = {name: value for name, value in row.items() if name != "report"}
        if has_file(row):
            row["path"] = os.path.abspath(row["path"])  # workers may be at home in other folders
        content = checksum_of(row) or known.get((row["path"], *(_stamp(row["path"]) or ())))
        key = key_of(row, content, config) if content else None
        if content and key and (cache.load(key) is not None if verify else cache.has(key)):
            done.contents[row["study"]] = content
        else:
            todo.append(row)
    return todo


def _known_contents(folder: Path) -> dict[tuple, str]:
    """(path, bytes, time of change) -> SHA-256, from earlier runs; a line that was cut off is passed over."""
    try:
        with open(folder / CONTENTS, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == 4 and len(row[3]) == 64]
    except FileNotFoundError:
        return {}
    return {(path, int(size), int(changed)): content for path, size, changed, content in rows}


def _stamp(path: str | os.PathLike) -> tuple[int, int] | None:
    """Bytes and time of the last change of a file, or of all files in a folder; None if there is none."""
    path = Path(path)
    try:
        found = [file.stat() for file in path.rglob("*")] if path.is_dir() else [path.stat()]
    except OSError:
        return None
    return sum(s.st_size for s in found), max((s.st_mtime_ns for s in found), default=0)


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


@contextmanager
def _client(scheduler: str | None, workers: int | None) -> "Iterator[Client | None]":
    """Of a cluster; None where dask isn't installed."""
    if find_spec("distributed") is None:
        yield None
        return
    import dask
    from distributed import Client, LocalCluster

    if scheduler is None:
        # Dask has workers give memory back at once (MALLOC_TRIM_THRESHOLD_), which takes volumes 1.4 times as long
        environ = dict(dask.config.get("distributed.nanny.pre-spawn-environ"))
        environ.pop("MALLOC_TRIM_THRESHOLD_", None)
        with (
            dask.config.set({"distributed.nanny.pre-spawn-environ": environ}),
            LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                silence_logs="CRITICAL",  # a worker that dies is seen in what fails, or is replaced
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = Client(scheduler, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no dask scheduler answers at {scheduler} ({error}). Start one with `dask scheduler`, and on every "
            "machine `dask worker ADDRESS --nthreads 1 --nworkers auto`, in an environment with medctkit"
        ) from error
    with client:
        yield client


def _results(
    client: "Client | None", todo: list[dict], config: PreprocessConfig, cache: VolumeCache
) -> Generator[tuple[dict, dict[str, Any]], None, None]:
    """(row, result of `_task`) as they come."""
    if client is None:
        for row in todo:
            yield row, _task(row, config, cache)
        return
    from distributed import as_completed

    keys = [f"prepare-{i}-{row['study']}" for i, row in enumerate(todo)]
    futures = client.map(_task_of_a_worker, todo, key=keys, config=config, cache=cache, batch_size=1000)
    rows = dict(zip(keys, todo, strict=True))
    try:
        for future in as_completed(futures):
            error = future.exception()
            if error is None:
                yield rows[future.key], future.result()
            elif isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise error
            else:  # the worker died again and again
                message = f"its worker process died each time it was tried, as a rule for want of memory: {error}"
                yield rows[future.key], {"error": type(error).__name__, "message": message}
            future.release()
    finally:
        client.cancel(futures)


def _task_of_a_worker(row: Mapping, config: PreprocessConfig, cache: VolumeCache) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)  # the processes are the parallelism
    return _task(row, config, cache)


def _task(row: Mapping, config: PreprocessConfig, cache: VolumeCache) -> dict[str, Any]:
    """Prepare one row, or say why not. Only a full disk, which ends everything, is raised."""
    started = time.perf_counter()
    try:
        stamp = _stamp(row["path"]) if has_file(row) else None
        content = content_of(row)
        key = key_of(row, content, config)
        # another process may have been quicker, or an earlier run did not get to writing down the content
        size = 0 if cache.load(key) is not None else prepare_row(row, content, config, cache)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise OSError(
                error.errno,
                f"no room left in {cache.folder} ({error.strerror}). What is prepared is whole; make room and start "
                "again, it goes on where it was",
            ) from None
        return {"error": type(error).__name__, "message": str(error)}
    return {"content": content, "stamp": stamp, "bytes": size, "seconds": time.perf_counter() - started}
