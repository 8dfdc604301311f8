"""Base and adapted model on a hospital's test phantoms: do their maps lie on the findings, and mean anything?"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from medctkit.attention.faithfulness import LOWER_IS_BETTER, faithfulness, faithfulness_table, some_of_each
from medctkit.attention.localisation import (
    CONTRAST,
    SCORES,
    Regions,
    contrast_of_regions,
    find_regions,
    localisation_table,
    own_and_others,
    paired_difference,
    relevance_of_regions,
    rollout_of_regions,
    sanity_check,
)
from medctkit.attention.maps import has_rollout
from medctkit.cohort.dataset import load_split, prepared_dir
from medctkit.cohort.manifest import load_manifest
from medctkit.common.atomic import alone, replacing, write_text
from medctkit.common.csv_tables import write_table
from medctkit.common.digests import digest_of_facts
from medctkit.common.kept import kept
from medctkit.common.provenance import made_with, records, write_json
from medctkit.common.templates import filled
from medctkit.experiments.adapt import Origin
from medctkit.experiments.report.page import with_ends
from medctkit.findings import FINDINGS
from medctkit.lora.adapter import merge_lora
from medctkit.lora.methods import load_trained
from medctkit.model.fingerprint import digests
from medctkit.model.protocol import Model
from medctkit.scans.preprocessing import PreprocessConfig

FEW = 60  # regions of the sanity check
EACH = 3  # regions of each finding whose maps are tested for faithfulness
OTHERS = f"{len(FINDINGS) - 1} other prompts"


def measure_localisation(
    manifest_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    studies: int | None = None,
) -> dict[str, pd.DataFrame]:
    """Base and adapted model on the test studies of a hospital: do their maps lie on the findings, and mean anything?

    Writes `localisation.csv`, `.json`, `.md` and `.png` into `output_dir`, where `adapt` wrote. What an interrupted run
    has done lies there in `localisation_work` until the end, and the same run goes on from it. `studies` says how many
    test studies; None: all.

    Returns:
        `means`: rows of `localisation_table` over all findings; `differences`: see `paired_difference`, adapted minus
        base, and for each model its own prompt minus the others; `faithfulness`: see `faithfulness_table`; `sanity`:
        see `sanity_check`.

    Raises:
        FileNotFoundError: no finished run in `output_dir`.
        ValueError: a run whose files were changed since; real scans without masks; findings in one study only.
    """
    output_dir, origin = Path(output_dir).expanduser(), Origin.of(output_dir)
    base = origin.load()
    models = {"base": base.model, "adapted": load_trained(origin.load().model, output_dir / "adapter")}
    manifest = load_manifest(manifest_path)
    grid, config = base.model.config.grid, base.preprocess_config
    dataset = load_split(manifest, origin.hospital, "test", config, prepared_dir(manifest_path, output_dir, cache_dir))
    rows = dataset.rows[:studies]
    drawn = [(row["study"], row["checksum"]) for row in rows]
    key = digest_of_facts([seed, [digests(m) for m in models.values()], drawn])
    work = output_dir / "localisation_work"

    def done(name: str, make: Callable[..., dict[str, np.ndarray]], *given: Any) -> dict[str, np.ndarray]:
        return kept(work / f"{name}.npz", key, lambda: make(*given))

    def columns(table: pd.DataFrame) -> dict[str, np.ndarray]:
        numeric = pd.api.types.is_numeric_dtype
        return {name: part.to_numpy(None if numeric(part) else str) for name, part in table.items()}

    with alone(output_dir):
        regions = Regions(**done("regions", lambda: vars(find_regions(rows, config, grid))))
        showing = len(np.unique(regions.study))
        if showing < 2 or len(FINDINGS) < 2:
            raise ValueError(
                f"{showing} of {len(rows)} test studies show one of {len(FINDINGS)} finding(s); "
                "expected two of each at least: maps are held against those of another study and another prompt"
            )
        chosen, few = some_of_each(regions, EACH, seed), Regions(*(part[:FEW] for part in vars(regions).values()))

        def relevant(model: Model) -> dict[str, np.ndarray]:
            every = relevance_of_regions(model, base.tokenizer, dataset, regions, every=True)
            own, others = own_and_others(every, regions)
            rollout = {"rollout": rollout_of_regions(model, dataset, regions)} if has_rollout(model) else {}
            return {"relevance": own, OTHERS: others} | rollout

        def tested(model: Model) -> dict[str, np.ndarray]:
            return columns(faithfulness(model, base.tokenizer, dataset, chosen, seed=seed))

        def sane(model: Model) -> dict[str, np.ndarray]:
            return columns(sanity_check(merge_lora(model), base.tokenizer, dataset, few, seed).reset_index())

        maps: dict[str, np.ndarray] = {}
        checks, faithful = [], []
        for name, model in models.items():
            maps |= {f"{name}, {kind}": of for kind, of in done(f"{name}_maps", relevant, model).items()}
            values = pd.DataFrame(done(f"{name}_faithfulness", tested, model))
            faithful.append(faithfulness_table(chosen, values, seed=seed).assign(model=name))
            checks.append(pd.DataFrame(done(f"{name}_sanity", sane, model)).assign(model=name))
        maps[CONTRAST] = contrast_of_regions(dataset, regions, grid)
        compared = [("adapted minus base", "base, relevance", "adapted, relevance")]
        compared += [(f"{name}: own minus {OTHERS}", f"{name}, {OTHERS}", f"{name}, relevance") for name in models]
        differences = []
        for said, one, other in compared:
            differences.append(paired_difference(regions, maps[one], maps[other], seed=seed).assign(difference=said))
        command = f"medctkit localise {output_dir} --manifest {manifest_path} --seed {seed} --studies {len(rows)}"
        table = localisation_table(regions, maps, seed=seed)
        write_table(table, output_dir / "localisation.csv")
        with replacing(output_dir / "localisation.png") as temporary:
            localisation_figure(table).savefig(temporary, format="png", dpi=110)
        found = {
            "means": table[table["finding"] == "mean"].drop(columns="finding"),
            "differences": pd.concat(differences, ignore_index=True),
            "faithfulness": pd.concat(faithful, ignore_index=True),
            "sanity": pd.concat(checks, ignore_index=True),
        }
        made = {"command": command, "studies": showing, "regions": len(regions.study)}
        content: dict[str, Any] = {name: records(part) for name, part in found.items()}
        of = {"base": digests(base.model)[0], "patch_mm": patch_in_mm(config, grid)}
        content["made_with"] = made_with(seed) | made | of
        write_json(content, output_dir / "localisation.json")
        write_text(output_dir / "localisation.md", localisation_page(content))
        shutil.rmtree(work)
    return found


def patch_in_mm(preprocess_config: PreprocessConfig, grid: Sequence[int]) -> list[float]:
    """Sides of one of a `grid` of patches (t, h, w), mm."""
    steps = zip(preprocess_config.spacing, preprocess_config.shape, grid, strict=True)
    return [round(step * n / g, 1) for step, n, g in steps]


def conclusions(found: dict) -> list[str]:
    """A sentence for each comparison in the records `found` of `localisation.json`, flattering or not."""

    def told(name: str, row: dict, column: str, better: int = 1) -> str:
        prefix = "" if column == "value" else f"{column}_"
        low, high = row[f"{prefix}low"], row[f"{prefix}high"]
        side = np.sign(low) * better if low * high > 0 else 0
        word = {-1: "worse", 0: "no difference that can be told from chance", 1: "better"}[int(side)]
        return f"{name}: {with_ends(row, column, '+')}, {word}."

    said: list[str] = []
    first: dict[tuple[str, str], str] = {}
    for row in found["differences"]:
        said.append(told(f"{row['difference']}, {row['score']}", row, "value"))
    for row in found.get("faithfulness", []):
        subject = first.setdefault((row["model"], row["measure"]), row["map"])
        if subject != row["map"] and row["difference"] is not None and row["difference"] == row["difference"]:
            name = f"{row['model']}, {row['measure']}, {subject} minus {row['map']}"
            said.append(told(name, row, "difference", -1 if row["measure"] in LOWER_IS_BETTER else 1))
    return said


def localisation_page(found: dict) -> str:
    """The page docs/localisation.md, of the records `found` in `localisation.json`: tables, and what follows."""
    scores = {row["score"]: row["chance"] for row in found["means"]}
    cells: dict[str, list[str]] = {}
    faithful: dict[tuple[str, str], dict[str, str]] = {}
    for row in found["means"]:
        cells.setdefault(row["method"], []).append(with_ends(row, "value"))
    for row in found.get("faithfulness", []):
        faithful.setdefault((row["measure"], row["map"]), {})[row["model"]] = with_ends(row, "value")
    values = found | {"scores": scores, "cells": cells, "faithful": faithful, "conclusions": conclusions(found)}
    return filled("localisation.md", **values)


def localisation_figure(table: pd.DataFrame) -> Figure:
    """Each score, mean of findings, for each map with its interval, beside its chance."""
    means = table[table["finding"] == "mean"]
    colours = {"base": "#0072B2", "adapted": "#D55E00"}
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for i, (ax, score) in enumerate(zip(figure.subplots(1, len(SCORES), sharey=True), SCORES, strict=True)):
        rows = means[means["score"] == score].iloc[::-1]
        for y, row in enumerate(rows.itertuples()):
            colour = colours.get(row.method.split(",")[0], "#555555")
            ax.plot([row.low, row.high], [y, y], color=colour, lw=2)
            ax.plot(row.value, y, "o", color=colour, ms=7)
        chance = rows["chance"].iloc[0]
        ax.axvline(chance, color="black", ls=":")
        ax.set(xlabel="mean of findings, 95 % interval", yticks=range(len(rows)), xlim=(0, None))
        ax.set_title(f"{score}\ndotted: chance, {chance:.3f}", fontsize=10)
        if i == 0:
            ax.set_yticklabels(rows["method"])
    return figure
