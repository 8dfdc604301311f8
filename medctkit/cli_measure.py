"""The commands that measure a run, a model or a comparison; `cli` hands them on as its own."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from medctkit.cli_deploy import OfModel, Tokenizer, say, with_adapter

measuring = typer.Typer(add_completion=False)
Adapted = Annotated[Path, typer.Argument(help="Folder of the adaptation: adapter, history, metrics.", file_okay=False)]
Manifest = Annotated[Path, typer.Option(help="The cohort.")]
Seed = Annotated[int, typer.Option(help="Of the adapter's start, batches and wordings, and of the bootstrap.", min=0)]
Cache = Annotated[
    Path | None, typer.Option(help="Prepared volumes; if not given, `prepared` beside the manifest or in OUTPUT_DIR.")
]
Model = Annotated[str, typer.Option(help="mini, a model's folder, or a file such as CT-CLIP_v2.pt.")]
AtATime = Annotated[int, typer.Option(help="Volumes at a time; 1 or 2 at full size.", min=1)]
DEFAULT_MANIFEST = Path("data_manifest.csv")


@measuring.command()
def evaluate(
    output_dir: Adapted,
    manifest: Manifest = DEFAULT_MANIFEST,
    seed: Seed = 0,
    cache_dir: Cache = None,
    batch_size: AtATime = 32,
    audit_volumes: Annotated[
        int | None, typer.Option(help="Scans for the audit; by default 30 phantoms, no real ones.", min=0)
    ] = None,
    home: Annotated[
        str | None, typer.Option(help="Hospital of the base model, to see what it lost; by default source or CT-RATE.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Probabilities of each study, .csv or .parquet; by default OUTPUT_DIR/scores.csv."),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="A base model alone, without a run: --model, --hospital.")
    ] = False,
    model: Model = "mini",
    tokenizer: Tokenizer = None,
    hospital: Annotated[str | None, typer.Option(help="With --base: of the manifest; by default all.")] = None,
) -> None:
    """Score base and adapted model on the hospital's test patients, as notebook 04 does; write the report.

    Also scores.csv and the tables as findings.csv and findings.tex.
    """
    from medctkit.common.processes import accelerator_for
    from medctkit.experiments import tables
    from medctkit.experiments.adapt import Origin
    from medctkit.experiments.measure import measure
    from medctkit.experiments.report.claims import write_report
    from medctkit.metrics.scores import result_table
    from medctkit.training.checkpoints import described

    file = tables.scores_file(scores or output_dir / "scores.csv")
    if scores and not file.parent.is_dir():
        raise ValueError(f"{file}: there is no folder {file.parent}; make it, or give another name")
    first = accelerator_for().is_main_process
    if base:
        origin = Origin(model, tokenizer, hospital)
        said = tables.measure_base(manifest, output_dir, origin, file, seed, cache_dir, batch_size)
        return say(said) if first else None
    if first:
        say(described(output_dir))
    measured = measure(manifest, output_dir, seed, cache_dir, batch_size, audit_volumes, home)
    if first:
        tables.write_scores(file, measured.studies, measured.patients, measured.labels, measured.scores)
        tables.write_findings(measured.tables | {"difference": measured.difference}, output_dir)
        report = write_report(measured, output_dir)  # before anything is told: whoever listens may have gone
        say(result_table(measured.summary))
        say(f"scores: {file}; tables: findings.csv, findings.tex; report: {report}")


@measuring.command()
def localise(
    output_dir: Adapted,
    manifest: Manifest = DEFAULT_MANIFEST,
    seed: Seed = 0,
    cache_dir: Cache = None,
    studies: Annotated[int, typer.Option(help="Test studies; the time grows with them.", min=1)] = 100,
) -> None:
    """Hold the maps of base and adapted model against the masks of test phantoms, and ask if they are faithful.

    About 15 minutes on one core. Stop it and start it again as you like. Writes localisation.csv, .json, .md and .png.
    """
    from medctkit.experiments.localise import measure_localisation
    from medctkit.training.checkpoints import described

    say(described(output_dir))
    for table in measure_localisation(manifest, output_dir, seed, cache_dir, studies).values():
        say(f"{table.round(3).to_string(index=False)}\n")


@measuring.command()
def embed(
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write, or to go on with.", dir_okay=False)],
    manifest: Manifest = DEFAULT_MANIFEST,
    cache_dir: Cache = None,
    model: Model = "mini",
    tokenizer: Tokenizer = None,
    adapter: OfModel = None,
    split: Annotated[str, typer.Option(help="Of the manifest: train, valid or test.")] = "test",
    hospital: Annotated[str | None, typer.Option(help="Of the manifest; by default all.")] = None,
    batch_size: AtATime = 32,
    workers: Annotated[int, typer.Option(help="Processes that load volumes ahead.", min=0)] = 0,
) -> None:
    """Encode every volume once and keep the embeddings in a file. Stop it and start it again as you like."""
    from medctkit.cohort.dataset import load_split, prepared_dir
    from medctkit.cohort.manifest import load_manifest
    from medctkit.common.processes import accelerator_for
    from medctkit.zero_shot.classifier import ZeroShotClassifier
    from medctkit.zero_shot.embeddings import embed_manifest

    base = with_adapter(model, tokenizer, adapter)
    prepared = prepared_dir(manifest, out.parent, cache_dir)
    dataset = load_split(load_manifest(manifest), hospital, split, base.preprocess_config, prepared)
    classifier = ZeroShotClassifier(base.model.to(accelerator_for().device), base.tokenizer)
    embedded = embed_manifest(classifier, dataset, out, batch_size, workers)
    if accelerator_for().is_main_process:
        n, width = embedded.embeddings.shape
        say(f"{n:,} volumes, {width} numbers each ({out.stat().st_size / 1e6:,.1f} MB): {out}")


@measuring.command("compare")
def compare(
    output_dir: Annotated[
        Path, typer.Argument(help="Gets a file for each run, the tables and the figures.", file_okay=False)
    ],
    manifest: Manifest = DEFAULT_MANIFEST,
    cache_dir: Cache = None,
    only: Annotated[
        str | None, typer.Option(help="Of rivals,unseen,placement,methods,forgetting,studies,noise,ranks; all.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Optimiser steps of a run.", min=1)] = 80,
    jobs: Annotated[int, typer.Option(help="Runs side by side, each with its share of the cores.", min=1)] = 1,
    hospital: Annotated[str, typer.Option(help="Of the manifest: where the base model is to go.")] = "target",
    home: Annotated[str, typer.Option(help="Of the manifest: where it comes from.")] = "source",
    model: Model = "mini",
    tokenizer: Tokenizer = None,
) -> None:
    """Compare ways to bridge two hospitals of a manifest. Stop it and start it again as you like.

    In this order: rivals, free fixes and what else the same labels give, beside LoRA. unseen, four findings held out.
    placement, where LoRA goes. methods, ways to fine-tune. forgetting, what helps against it, and other strengths.
    studies, how many it takes. noise, wrong labels. ranks, of LoRA. The rate of each is swept first.
    """
    from medctkit.experiments.adapt import Origin
    from medctkit.experiments.compare.data import CAN_HOLD_OUT
    from medctkit.experiments.compare.figures import write_figures
    from medctkit.experiments.compare.results import load_results
    from medctkit.experiments.compare.run_all import GROUPS, SETTINGS, compare_methods
    from medctkit.experiments.compare.tables import show_all

    possible = [name for name in GROUPS if name != "unseen" or CAN_HOLD_OUT]
    groups = possible if only is None else [name.strip() for name in only.split(",")]
    origin = Origin(model, tokenizer, hospital)
    compare_methods(manifest, output_dir, groups, seeds, replace(SETTINGS, steps=steps), jobs, cache_dir, origin, home)
    results = load_results(output_dir)
    written = write_figures(results, output_dir)
    say(show_all(results))
    say(f"tables: {output_dir / 'tables.json'}, comparison.csv; figures: {', '.join(p.name for p in written)}")
