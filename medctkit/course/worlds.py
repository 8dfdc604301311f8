"""The worlds of the notebooks: phantoms with the mini model, CT-RATE with the released weights, or open ones of both.

`open_world` says which files are which, and stops before anything is computed where some are missing. It asks the disk
only; where the open world lacks something it also asks whether there is a network to fetch it by.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pandas as pd

from medctkit.cohort.dataset import CTReportDataset, load_split, prepared_dir
from medctkit.cohort.download import CT_RATE, TEXT_ENCODER, WEIGHTS
from medctkit.cohort.hub_repository import token_source
from medctkit.cohort.manifest import SPLITS, has_file, load_manifest, study_from_row, volume_from_row
from medctkit.common.templates import filled
from medctkit.experiments.adapt import DEFAULT, FULL_SIZE, Adaptation, Origin
from medctkit.model.base_model import BaseModel, preprocess_config_of
from medctkit.scans.preprocessing import PreprocessConfig
from medctkit.scans.volumes import CTVolume

WORLDS = ("phantom", "released", "open")
TO_LOOK_AT = (80, 256, 256)  # voxels of a phantom that is shown, not scored
# A part of CT-RATE to begin with: patients of its train and its valid tables (the latter become the split "test").
PATIENTS = {"train": 500, "valid": 150}
# Volumes for each patient, and bytes of a volume, smallest and largest: of CT-RATE's tables and listing.
VOLUMES_OF_A_PATIENT = {"train": 47_149 / 20_000, "valid": 3_039 / 1_304}
GIGABYTES_OF_A_VOLUME = (0.012, 0.162)
# Measured by `make bench` (bench/data.json, bench/model.json, two cores).
GIGABYTES_PREPARED = 0.058
SECONDS_TO_PREPARE = 2.3
SECONDS_TO_EMBED = 5.4
# The open world: patients of LIDC-IDRI to begin with, and GB of a patient, of the index of Imaging Data Commons.
OPEN_PATIENTS = 100
GIGABYTES_OF_A_PATIENT = 0.13
OPEN_SITES = ("https://huggingface.co", "https://s3.amazonaws.com", "https://github.com")  # weights, scans, index
COLIPRI = ("microsoft/colipri", "model.safetensors")
OPEN = Origin("colipri", None, None)


class NotReady(FileNotFoundError):
    """A world lacks files; the message says which, and how to come by them."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for this: the reader wants the steps, not our stack
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class World:
    """Model, studies and settings that a notebook works with; made by `open_world`."""

    name: str  # one of `WORLDS`
    origin: Origin  # base model, its tokenizer, and the hospital of the manifest that is adapted to
    manifest_path: Path
    cache_dir: Path  # prepared volumes
    settings: Adaptation
    said: str  # for the reader, a line or two

    def __str__(self) -> str:
        return self.said

    @property
    def hospital(self) -> str | None:
        """The hospital of the manifest that is adapted to; None: all of its studies."""
        return self.origin.hospital

    @cached_property
    def manifest(self) -> pd.DataFrame:
        """The cohort, one row a study; see `medctkit.cohort.manifest`."""
        return load_manifest(self.manifest_path)

    @cached_property
    def preprocess_config(self) -> PreprocessConfig:
        """Spacing (mm) and shape of the base model's input."""
        return preprocess_config_of("released" if self.name == "released" else self.origin.model)

    @property
    def knows_where(self) -> bool:
        """Whether it is known where findings are: of phantoms, and nodules of LIDC-IDRI."""
        return self.name == "phantom" or "masks" in self.manifest

    def load_base(self) -> BaseModel:
        """The base model, fresh each time."""
        return self.origin.load()

    def dataset(self, split: str) -> CTReportDataset:
        """The prepared studies of a split ("train", "valid" or "test"), see `load_split`.

        Raises:
            ValueError: no such studies, or some that could not be prepared.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
        return load_split(self.manifest, self.hospital, split, self.preprocess_config, self.cache_dir)

    def sample(self, split: str = "test", index: int = 0, having: str | None = None) -> tuple[CTVolume, dict]:
        """A study to look at, and its row of the manifest: a scan as it is on disk, or a phantom at a fine resolution.

        `index` counts the studies of the split, or those of them whose labels say that they are `having` a finding.

        Raises:
            ValueError: no study with this index.
            FileNotFoundError: its file has been moved or deleted since it was prepared.
        """
        rows = self.manifest[self.manifest["split"] == split]
        if self.hospital is not None:
            rows = rows[rows["hospital"] == self.hospital]
        rows = rows if having is None else rows[rows[having] == 1]
        if not 0 <= index < len(rows):
            of = f"split {split!r}" + ("" if having is None else f" with {having}")
            raise ValueError(f"study {index} of {of}: the manifest has {len(rows):,} there, counted from 0")
        row = rows.iloc[index].to_dict()
        return (volume_from_row(row) if has_file(row) else study_from_row(row, TO_LOOK_AT).volume), row


def open_world(
    world: str = "phantom",
    data_dir: str | os.PathLike = "../data",
    output_dir: str | os.PathLike = "../runs/notebooks",
    seed: int = 0,
) -> World:
    """Open the world that a notebook's parameters name, or say what it lacks.

    Args:
        world: "phantom": made here, needs nothing; "released": CT-RATE and CT-CLIP's weights in `data_dir`; "open":
            LIDC-IDRI in `data_dir` and COLIPRI, without an account.
        data_dir: folder with `ct-rate` and `prepared`, or `idc` and `idc-prepared`, as `medctkit download` and
            `medctkit prepare` leave them.
        output_dir: of the notebook; phantoms are prepared in it.
        seed: draws the patients that are fetched in the commands shown.

    Raises:
        ValueError: another world, or a manifest that can't be used.
        NotReady: the world lacks files; says which, and every step to get them.
        FileNotFoundError: `data_manifest.csv` is not near the notebook.
    """
    if world == "phantom":
        manifest = phantom_manifest()
        return World(
            world,
            Origin(),
            manifest,
            prepared_dir(manifest, output_dir),
            DEFAULT,
            "phantom: procedural chest CTs of two hospitals and the mini CT-CLIP, 2.3 M parameters.\nNothing "
            "measured here says anything about patients.",
        )
    if world not in WORLDS:
        raise ValueError(f"world={world!r}: expected {', '.join(WORLDS)}")
    data_dir = Path(data_dir).expanduser()
    released = world == "released"
    parts, steps = (_parts(data_dir), released_steps) if released else (_open_parts(data_dir), open_steps)
    if lacking := [what for what, path in parts.items() if not path.exists()]:
        raise NotReady(steps(data_dir, seed, lacking))
    manifest = parts["manifest"]
    table = load_manifest(manifest)
    if drawn := sum(not has_file(row) for row in table.to_dict("records")):
        raise ValueError(
            f"{manifest}: {drawn:,} of its {len(table):,} studies are phantoms; the {world} world wants scans only. "
            f"Its steps make it anew:\n{steps(data_dir, seed)}"
        )
    if lacking := [f"{split} studies" for split in SPLITS if split not in set(table["split"])]:
        raise NotReady(steps(data_dir, seed, lacking))
    origin = Origin(str(parts["weights"]), str(parts["tokenizer"].parent), None) if released else OPEN
    what = "CT-CLIP, 438 M parameters" if released else "COLIPRI"
    said = f"{world}: {what}, and {len(table):,} scans of {table['patient'].nunique():,} patients ({manifest}). "
    return World(world, origin, manifest, prepared_dir(manifest, output_dir), FULL_SIZE, said + _device(released))


def released_steps(data_dir: str | os.PathLike = "../data", seed: int = 0, lacking: Sequence[str] = ()) -> str:
    """All steps to the released world as text: what to accept, where the token goes, commands, disk and time.

    The first line says what is `lacking`, if anything is. For the rest see `open_world`.
    """
    data_dir = Path(data_dir)
    ct_rate, prepared = (shlex.quote(str(data_dir / name)) for name in ("ct-rate", "prepared"))
    volumes = sum(round(number * VOLUMES_OF_A_PATIENT[split]) for split, number in PATIENTS.items())
    steps = filled(
        "released.txt", lacking=lacking, parts=_parts(data_dir), token=token_source(), data_set=CT_RATE,
        ct_rate=ct_rate, prepared=prepared, download=f"medctkit download {ct_rate} --seed {seed} --split",
        patients=PATIENTS, volumes=volumes, gigabytes=[share * volumes for share in GIGABYTES_OF_A_VOLUME],
        gigabytes_prepared=GIGABYTES_PREPARED * volumes, seconds_to_prepare=SECONDS_TO_PREPARE,
        seconds_to_embed=SECONDS_TO_EMBED,
    )  # fmt: skip
    return steps.rstrip("\n")


def open_steps(data_dir: str | os.PathLike = "../data", seed: int = 0, lacking: Sequence[str] = ()) -> str:
    """All steps to the open world as text: packages, commands, disk, time, licences, and whether there is a network.

    For the arguments see `released_steps`.
    """
    data_dir, silent = Path(data_dir), [site for site in OPEN_SITES if not _answers(site)]
    scans, prepared = (shlex.quote(str(data_dir / name)) for name in ("idc", "idc-prepared"))
    steps = filled(
        "open.txt", lacking=lacking, parts=_open_parts(data_dir), silent=silent,
        patients=OPEN_PATIENTS, gigabytes=OPEN_PATIENTS * GIGABYTES_OF_A_PATIENT, seconds=SECONDS_TO_PREPARE,
        download=f"medctkit download {scans} --source idc --patients {OPEN_PATIENTS} --seed {seed}",
        prepare=f"medctkit prepare {scans}/manifest.csv {prepared} --model colipri",
    )  # fmt: skip
    return steps.rstrip("\n")


def _open_parts(data_dir: Path) -> dict[str, Path]:
    """What the open world consists of: two packages, weights where the hub's library keeps them, and a manifest."""
    from huggingface_hub import try_to_load_from_cache

    specs, weights = map(find_spec, ("colipri", "idc_index")), try_to_load_from_cache(*COLIPRI)
    packages = [Path(spec.origin) for spec in specs if spec and spec.origin]
    return {
        "packages": packages[0] if len(packages) == 2 else Path("medctkit[open]"),
        "weights": Path(weights if isinstance(weights, str) else "/".join(COLIPRI)),
        "manifest": data_dir / "idc-prepared" / "manifest.csv",
    }


def _answers(site: str) -> bool:
    try:
        urlopen(site, timeout=5).close()
    except HTTPError as error:  # which is an answer
        error.close()
    except OSError:
        return False
    return True


def _parts(data_dir: Path) -> dict[str, Path]:
    """What the released world consists of, and where `medctkit download` and `prepare` put it."""
    return {
        "weights": data_dir / "ct-rate" / WEIGHTS / "CT-CLIP_v2.pt",
        "tokenizer": data_dir / "ct-rate" / TEXT_ENCODER.rpartition("/")[2] / "vocab.txt",
        "manifest": data_dir / "prepared" / "manifest.csv",
    }


def phantom_manifest() -> Path:
    """The phantom cohort: in this folder, in the one above (a notebook's), or in the package's repository."""
    places = [folder / "data_manifest.csv" for folder in (Path(), Path(".."), Path(__file__).resolve().parents[2])]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"no data_manifest.csv in {Path.cwd()} or above. It comes with a clone of the repository; "
        "`medctkit manifest` writes it anew"
    )


def _device(released: bool) -> str:
    import torch

    if torch.cuda.is_available():
        return f"Computes on {torch.cuda.get_device_name()}."
    seconds = f"about {SECONDS_TO_EMBED} s for each scan on two cores; " if released else ""
    return f"No GPU here: {seconds}fine-tuning wants a GPU."
