"""Base and adapted model on a hospital's test phantoms: do their maps lie on the findings, and mean anything?"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medctkit.attention.localisation import (
    CONTRAST,
    SCORES,
    Regions,
    contrast_of_regions,
    find_regions,
    localisation_table,
    paired_difference,
    relevance_of_regions,
    rollout_of_regions,
    sanity_check,
)
from medctkit.cohort.dataset import load_split, prepared_dir
from medctkit.cohort.manifest import load_manifest
from medctkit.common.atomic import replacing
from medctkit.common.csv_tables import write_table
from medctkit.common.provenance import made_with, write_json
from medctkit.experiments.adapt import Origin
from medctkit.findings import FINDINGS
from medctkit.lora.adapter import load_adapter, merge_lora

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def measure_localisation(
    manifest_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    studies: int | None = None,
) -> "dict[str, pd.DataFrame]":
    """Base and adapted model on the test phantoms of a hospital: do their maps lie on the findings?

    Writes `localisation.csv`, `localisation.json` and `localisation.png` into `output_dir`.

    Args:
        manifest_path: usually `data_manifest.csv`.
        output_dir: where `adapt` wrote.
        seed: of the bootstrap, and of the shuffling.
        cache_dir: see `prepared_dir`.
        studies: how many test studies; None: all.

    Returns:
        `means`: rows of `localisation_table` over all findings; `differences`: see `paired_difference`, adapted minus
        base, and for each model its own prompt minus another finding's; `sanity`: see `sanity_check`.

    Raises:
        FileNotFoundError: no finished run in `output_dir`.
        ValueError: a run whose files were changed since; real scans, of which no masks are known.
    """
    import pandas as pd

    output_dir, origin = Path(output_dir).expanduser(), Origin.of(output_dir)
    base = origin.load()
    models = {"base": base.model, "adapted": load_adapter(origin.load().model, output_dir / "adapter")}
    manifest = load_manifest(manifest_path)
    grid, config = base.model.config.grid, base.preprocess_config
    dataset = load_split(manifest, origin.hospital, "test", config, prepared_dir(manifest_path, output_dir, cache_dir))
    regions = find_regions(dataset.rows[:studies], config, grid)
    maps = {}
    for name, model in models.items():
        for kind, shift in (("relevance", 0), ("another prompt", len(FINDINGS) // 2)):
            maps[f"{name}, {kind}"] = relevance_of_regions(model, base.tokenizer, dataset, regions, shift=shift)
        maps[f"{name}, rollout"] = rollout_of_regions(model, dataset, regions)
    maps[CONTRAST] = contrast_of_regions(dataset, regions, grid)
    compared = [("adapted minus base", "base, relevance", "adapted, relevance")]
    compared += [
        (f"{name}: own minus another prompt", f"{name}, another prompt", f"{name}, relevance") for name in models
    ]
    differences = [
        paired_difference(regions, maps[a], maps[b], seed=seed).assign(difference=said) for said, a, b in compared
    ]
    few = Regions(*(part[:200] for part in vars(regions).values()))
    checks = [
        sanity_check(model, base.tokenizer, dataset, few, seed).assign(model=name)
        for name, model in (("base", base.model), ("adapted", merge_lora(models["adapted"])))
    ]
    command = f"medctkit localise {output_dir} --manifest {manifest_path} --seed {seed}"
    command += "" if studies is None else f" --studies {studies}"
    table = localisation_table(regions, maps, seed=seed)
    write_table(table, output_dir / "localisation.csv")
    with replacing(output_dir / "localisation.png") as temporary:
        localisation_figure(table).savefig(temporary, format="png", dpi=110)
    found = {
        "means": table[table["finding"] == "mean"].drop(columns="finding"),
        "differences": pd.concat(differences, ignore_index=True),
        "sanity": pd.concat(checks).reset_index(),
    }
    made = {"command": command, "studies": len(np.unique(regions.study)), "regions": len(regions.study)}
    records = {name: part.to_dict("records") for name, part in found.items()}
    write_json(records | {"made_with": made_with(seed) | made}, output_dir / "localisation.json")
    return found


def localisation_figure(table: "pd.DataFrame") -> "Figure":
    """Each score, mean of findings, for each map with its interval, beside its chance."""
    from matplotlib.figure import Figure

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
        ax.axvline(chance, color="black", ls=":", label=f"chance, {chance:.3f}")
        ax.set(title=score, xlabel="mean of findings, 95 % interval", yticks=range(len(rows)), xlim=(0, None))
        ax.legend(loc="lower right", fontsize=8)
        if i == 0:
            ax.set_yticklabels(rows["method"])
    return figure
