"""The studies of a comparison, what the base model makes of them, and what is done to them before a run learns."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from medctkit.cohort.dataset import CTReportDataset, at_hand, labels_of, rows_of
from medctkit.cohort.manifest import build_default_manifest, load_manifest
from medctkit.common.processes import accelerator_for
from medctkit.experiments.adapt import Origin
from medctkit.experiments.compare.fixes import body_quantiles, lung_centre, matched, registered
from medctkit.findings import FINDINGS
from medctkit.model.base_model import BaseModel
from medctkit.training.gradients import seed_from
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier
from medctkit.zero_shot.embeddings import Changed, with_embeddings
from medctkit.zero_shot.prompts import Prompts

# Kept out of every loss in the runs of "unseen": one of each group that has several findings or none like it.
HELD_OUT = ("Pleural effusion", "Emphysema", "Hiatal hernia", "Bronchiectasis")
CAN_HOLD_OUT = set(HELD_OUT) < set(FINDINGS)  # they are among the findings in use, which may be other ones
REPLAYED, REPLAY_SHARE = 64, 0.25  # patients of the source hospital; their share of what is learnt from
VARIANTS = {  # of a run: what is done to its loss, or to the studies that it learns from
    "prevalence": "its per-finding loss also teaches how common each finding is",
    "contrastive": "it learns from reports too, by the contrastive loss, which weighs as much",
    "unseen": "no label of four findings",
    "noise-5": "5 % of the labels flipped",
    "noise-10": "10 % of the labels flipped",
    "noise-20": "20 % of the labels flipped",
    "replay": f"studies of {REPLAYED} source patients among them, again and again, a quarter of all",
    "anchor-1": "a penalty of weight 1 on moved embeddings",
    "anchor-10": "a penalty of weight 10 on moved embeddings",
}


PHANTOMS, HOME = Origin(), "source"


@dataclass(frozen=True, eq=False)
class Data:
    """A hospital's studies, test studies of the one that the base model comes from (`home`), and the base model.

    Attributes:
        further: training studies of home, for replay; may be none.
        origin: the base model, to be loaded afresh, and the hospital.
    """

    train: CTReportDataset
    valid: CTReportDataset
    test: CTReportDataset
    home: CTReportDataset
    further: pd.DataFrame
    base: BaseModel
    origin: Origin

    @classmethod
    def load(
        cls, manifest_path: str | os.PathLike, cache_dir: str | os.PathLike, origin: Origin = PHANTOMS, home: str = HOME
    ) -> "Data":
        """From a manifest and a folder of prepared volumes, which are made where missing.

        Volumes that are seen again and again are kept in memory, where they are small.
        """
        base, table = origin.load(), load_manifest(manifest_path)
        base.model.to(accelerator_for().device)
        train, valid, test, at_home = (
            CTReportDataset(rows, base.preprocess_config, cache_dir) for rows in parts(table, origin, home)
        )
        further = table[(table["hospital"] == home) & (table["split"] == "train")]
        return cls(at_hand(train), at_hand(valid), test, at_home, further, base, origin)

    @cache  # noqa: B019 (one object, as long as the process)
    def embedded(self, split: str, *changes: str) -> Embedded:
        """A split through the base model, once, after these of `CHANGES` to its volumes."""
        return self._ask.embed(Changed(getattr(self, split), self._change(changes)), progress=False)

    @cache  # noqa: B019
    def features(self, split: str, of: Callable[[torch.Tensor], np.ndarray], *changes: str) -> np.ndarray:
        """Numbers (n, k) of each volume of a split, after these of `CHANGES`."""
        dataset = Changed(getattr(self, split), self._change(changes))
        return np.stack([of(dataset[i]["pixel_values"]) for i in range(len(dataset))])

    @cache  # noqa: B019
    def in_words(self, prompts: Callable[[], Prompts]) -> ZeroShotClassifier:
        """The base model with prompts that it reads once."""
        return ZeroShotClassifier(self.base.model, self.base.tokenizer, prompts())

    @cache  # noqa: B019
    def labels(self, split: str) -> np.ndarray:
        """Labels (n, 18) of a split."""
        return truth(getattr(self, split).rows)[0]

    @cached_property
    def replay(self) -> CTReportDataset:
        """Studies of further patients of home, none of them in `home`.

        Raises:
            ValueError: the manifest has none, and home is not the phantoms'.
        """
        rows, home = self.further, self.home.rows[0]["hospital"]
        rows = rows[rows["patient"].isin(rows["patient"].unique()[:REPLAYED])]
        if rows.empty and home != HOME:
            raise ValueError(f"the manifest has no training studies of hospital {home}, to be replayed")
        if rows.empty:
            rows = build_default_manifest({("source", "train"): REPLAYED}, workers=1)
        cache_dir = None if self.train.cache is None else self.train.cache.folder
        return at_hand(CTReportDataset(rows, self.base.preprocess_config, cache_dir))

    def learnt_from(self, indices: Sequence[int], variant: str, seed: int) -> Dataset:
        """Training studies, changed as one of `VARIANTS` says; "": as they are."""
        train: Dataset = Subset(self.train, indices)
        kind, _, amount = variant.partition("-")
        if kind == "noise":
            return Changed(train, partial(flipped, share=int(amount) / 100, seed=seed))
        if kind == "replay":
            return replayed(train, self.replay)
        if kind == "anchor":
            return self.seen(train)
        return Changed(train, held_out) if kind == "unseen" else train

    def seen(self, dataset: Dataset, of: Sequence[str] = ("train",), name: str = "anchor") -> Dataset:
        """A data set whose items have the base model's embedding of their volume by a name."""
        return with_embeddings(dataset, [self.embedded(split) for split in of], name)

    @cached_property
    def centre(self) -> np.ndarray:
        """Mean centre (3,) of the lungs at home, in voxels."""
        return np.nanmean(self.features("home", lung_centre), axis=0)

    @cache  # noqa: B019
    def quantiles(self, split: str) -> np.ndarray:
        """Mean quantiles of HU within the body."""
        return np.nanmean(self.features(split, body_quantiles), axis=0)

    @cached_property
    def _ask(self) -> ZeroShotClassifier:
        return ZeroShotClassifier(self.base.model, self.base.tokenizer)

    def _change(self, names: Sequence[str]) -> Callable[[dict], dict]:
        def change(item: dict) -> dict:
            for name in names:
                item = item | {"pixel_values": CHANGES[name](self, item["pixel_values"])}
            return item

        return change


CHANGES: dict[str, Callable[[Data, torch.Tensor], torch.Tensor]] = {  # to volumes; home tells what is right
    "registration": lambda data, volume: registered(volume, data.centre),
    "intensities": lambda data, volume: matched(volume, data.quantiles("home")),
    "hospital intensities": lambda data, volume: matched(volume, data.quantiles("home"), data.quantiles("train")),
}


def held_out(item: dict[str, Any]) -> dict[str, Any]:
    """A study of which the labels `HELD_OUT` are unknown."""
    labels = item["labels"].clone()
    labels[[FINDINGS.index(name) for name in HELD_OUT]] = float("nan")
    return item | {"labels": labels}


def flipped(item: dict[str, Any], share: float, seed: int) -> dict[str, Any]:
    """A study of which each label is wrong by chance, as a report classifier's may be; its report is right."""
    generator = torch.Generator().manual_seed(seed_from(seed, "flipped", item["study"]))
    wrong = torch.rand(len(item["labels"]), generator=generator) < share
    return item | {"labels": torch.where(wrong, 1 - item["labels"], item["labels"])}


def replayed(dataset: Dataset, studies: Dataset, share: float = REPLAY_SHARE) -> Dataset:
    """A data set with further studies, as often as makes them this share of it; at least once."""
    n, more = len(dataset), len(studies)  # type: ignore[arg-type]
    return ConcatDataset([dataset, *[studies] * max(1, round(share / (1 - share) * n / more))])


def parts(table: pd.DataFrame, origin: Origin, home: str) -> list[pd.DataFrame]:
    """The rows of a manifest that a comparison reads: the hospital's train, valid and test, and home's test.

    Raises:
        ValueError: there are none of one of them.
    """
    here = origin.hospital
    wanted = ((here, "train"), (here, "valid"), (here, "test"), (home, "test"))
    return [rows_of(table, hospital, split) for hospital, split in wanted]


def truth(rows: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n, 18) and patients (n,) of rows of a manifest."""
    return labels_of(rows), np.array([row["patient"] for row in rows])
