"""The `medctkit` command: what a cluster or a terminal needs, thin over the package."""

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from medctkit.cli_deploy import deploying, say


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong is told without a traceback, and in the exit code; a mistake of ours keeps its traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort):  # RuntimeErrors too
        raise
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        say(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except Exception as error:
        # torch's RuntimeErrors are about memory and disks among others; safetensors has a kind of its own
        if not isinstance(error, MemoryError | RuntimeError) and type(error).__name__ != "SafetensorError":
            raise
        say(f"error: {type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None


class _Commands(TyperGroup):
    """What all commands have in common: `~` is the home folder in every argument, and errors are `told`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        split = [arg.partition("=") if arg.startswith("--") else (arg, "", "") for arg in args]
        home = os.path.expanduser
        return super().parse_args(ctx, [home(name) + equals + home(value) for name, equals, value in split])

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # where a terminal lacks a letter
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that nothing is left behind
        with told():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, help="LoRA on 3D chest CT, from data to evaluation."
)
app.add_typer(deploying)  # predict, answer, export, gateway


def _options_of_settings() -> list[Any]:
    """An option for each setting of an adaptation: name, type, text and defaults are those of its declaration."""
    from medctkit.experiments.adapt import DEFAULT, FULL_SIZE, Adaptation

    def given() -> None: ...

    types, texts, parameters = get_type_hints(Adaptation), Adaptation.help(), []
    for name in [field.name for field in fields(Adaptation)]:
        if name in ("prompts", "seed"):  # no option can hold them; the command's own
            continue
        mini, others = getattr(DEFAULT, name), getattr(FULL_SIZE, name)
        default = f"{mini}" if mini == others else f"{mini} for mini, else {others}"
        option = typer.Option(help=texts[name][0].upper() + texts[name][1:], show_default=default)
        kind = Annotated[types[name] | None, option]  # type: ignore[valid-type]
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    given.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    holder = typer.Typer(add_completion=False)
    holder.command()(given)
    return typer.main.get_command(holder).params


class _TakesSettings(TyperCommand):
    """A command that takes them too, as `ctx.obj`; they are looked up when it is asked for, for torch takes seconds."""

    _params: list[Any]
    _settings: list[Any]

    @property
    def params(self) -> list[Any]:
        if not self._settings:
            self._settings = _options_of_settings()
            self._params.extend(self._settings)
        return self._params

    @params.setter
    def params(self, own: list[Any]) -> None:
        self._params, self._settings = own, []

    def invoke(self, ctx: Any) -> Any:
        given = {option.name: ctx.params.pop(option.name) for option in self._settings}
        ctx.obj = {name: value for name, value in given.items() if value is not None}
        return super().invoke(ctx)


@app.callback()
def main() -> None:
    """LoRA on 3D chest CT, from data to evaluation."""


@app.command()
def doctor() -> None:
    """Look over this machine: versions, device, disk, model, data; exit with 1 if one needs mending."""
    from medctkit.course.doctor import check_all

    rows = check_all()
    for fine, name, found in rows:
        say(f"{'ok ' if fine else 'BAD'} {name:16} {found}")
    if not all(fine for fine, _, _ in rows):
        say("\nMend the lines marked BAD; for packages: make setup")
        raise typer.Exit(1)
    say("\nAll fine.")


Adapted = Annotated[Path, typer.Argument(help="Folder of the adaptation: adapter, history, metrics.")]
Manifest = Annotated[Path, typer.Option(help="The cohort.")]
Seed = Annotated[int, typer.Option(help="Of the adapter's start, batches and wordings, and of the bootstrap.")]
Cache = Annotated[
    Path | None, typer.Option(help="Prepared volumes; if not given, `prepared` beside the manifest or in OUTPUT_DIR.")
]
Model = Annotated[str, typer.Option(help="mini, a model's folder, or a file such as CT-CLIP_v2.pt.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Its folder, for a file of weights.")]
AtATime = Annotated[int, typer.Option(help="Volumes at a time; 1 or 2 at full size.", min=1)]
DEFAULT_MANIFEST, POOL = Path("data_manifest.csv"), Path("runs/pretraining")


@app.command(cls=_TakesSettings)
def finetune(
    ctx: typer.Context,
    output_dir: Adapted,
    manifest: Manifest = DEFAULT_MANIFEST,
    seed: Seed = 0,
    cache_dir: Cache = None,
    model: Model = "mini",
    tokenizer: Tokenizer = None,
    hospital: Annotated[str | None, typer.Option(help="Of the manifest; by default target for mini, else all.")] = None,
) -> None:
    """Adapt a base model to a hospital, as notebook 03 does. Stop it and start it again as you like.

    Without options: the mini model, to the target hospital (phantom). Options that are left out have one value for the
    mini model and another for all others. On several GPUs: accelerate launch -m medctkit.cli finetune ...
    """
    from accelerate.utils import is_tensorboard_available

    from medctkit.common.processes import accelerator_for
    from medctkit.experiments.adapt import DEFAULT, FULL_SIZE, Origin, adapt

    mini = model == "mini"
    given = {"steps": None} | ctx.obj if "epochs" in ctx.obj else ctx.obj
    settings = replace(DEFAULT if mini else FULL_SIZE, **given)
    hospital = hospital or ("target" if mini else None)
    origin = Origin(model, None if tokenizer is None else str(tokenizer), hospital)
    first = accelerator_for().is_main_process
    if first:
        there = is_tensorboard_available()
        to_watch = f"tensorboard --logdir {output_dir}" if there else "pip install 'medctkit[tensorboard]'"
        say(f"{settings}\nTo watch: {to_watch}")
    result = adapt(manifest, output_dir, seed, settings, cache_dir, origin)
    if first:
        say(f"best validation AUROC {result.best_score:.3f} at step {result.best_step}: {result.adapter_dir}")


@app.command()
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
) -> None:
    """Score base and adapted model on the hospital's test patients, as notebook 04 does; write the report."""
    from medctkit.common.processes import accelerator_for
    from medctkit.experiments.measure import measure
    from medctkit.experiments.report.claims import write_report
    from medctkit.metrics.scores import result_table

    measured = measure(manifest, output_dir, seed, cache_dir, batch_size, audit_volumes, home)
    if accelerator_for().is_main_process:
        say(result_table(measured.summary))
        say(f"report: {write_report(measured, output_dir)}")


@app.command()
def localise(
    output_dir: Adapted,
    manifest: Manifest = DEFAULT_MANIFEST,
    seed: Seed = 0,
    cache_dir: Cache = None,
    studies: Annotated[int | None, typer.Option(help="Test studies; by default all.", min=1)] = None,
) -> None:
    """Hold the maps of base and adapted model against the masks of test phantoms, as notebook 05 does.

    About 5 minutes for all 446 on two cores. Writes localisation.csv, .json and .png.
    """
    from medctkit.experiments.localise import measure_localisation

    for table in measure_localisation(manifest, output_dir, seed, cache_dir, studies).values():
        say(f"{table.round(3).to_string(index=False)}\n")


@app.command()
def embed(
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write, or to go on with.", dir_okay=False)],
    manifest: Manifest = DEFAULT_MANIFEST,
    cache_dir: Cache = None,
    model: Model = "mini",
    tokenizer: Tokenizer = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter; by default the base model alone.")] = None,
    split: Annotated[str, typer.Option(help="Of the manifest: train, valid or test.")] = "test",
    hospital: Annotated[str | None, typer.Option(help="Of the manifest; by default all.")] = None,
    batch_size: AtATime = 32,
    workers: Annotated[int, typer.Option(help="Processes that load volumes ahead.", min=0)] = 0,
) -> None:
    """Encode every volume once and keep the embeddings in a file. Stop it and start it again as you like."""
    from medctkit.cohort.dataset import load_split, prepared_dir
    from medctkit.cohort.manifest import load_manifest
    from medctkit.common.processes import accelerator_for
    from medctkit.lora.adapter import load_adapter
    from medctkit.model.base_model import load_base
    from medctkit.zero_shot.classifier import ZeroShotClassifier
    from medctkit.zero_shot.embeddings import embed_manifest

    base = load_base(model, tokenizer)
    loaded = base.model if adapter is None else load_adapter(base.model, adapter)
    prepared = prepared_dir(manifest, out.parent, cache_dir)
    dataset = load_split(load_manifest(manifest), hospital, split, base.preprocess_config, prepared)
    classifier = ZeroShotClassifier(loaded.to(accelerator_for().device), base.tokenizer)
    embedded = embed_manifest(classifier, dataset, out, batch_size, workers)
    if accelerator_for().is_main_process:
        n, width = embedded.embeddings.shape
        say(f"{n:,} volumes, {width} numbers each ({out.stat().st_size / 1e6:,.1f} MB): {out}")


@app.command("compare")
def compare(
    output_dir: Annotated[Path, typer.Argument(help="Gets a file for each run, the tables and the figures.")],
    manifest: Manifest = DEFAULT_MANIFEST,
    cache_dir: Cache = None,
    only: Annotated[
        str | None, typer.Option(help="Of learning-rates,methods,rivals,unseen,ranks,studies; by default all.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Optimiser steps of a run.", min=1)] = 100,
    jobs: Annotated[int, typer.Option(help="Runs side by side, each with its share of the cores.", min=1)] = 1,
) -> None:
    """Compare ways to bridge two hospitals (phantom). Stop it and start it again as you like.

    methods: ways to fine-tune. rivals: free fixes, and what else the same labels give, beside LoRA. unseen: LoRA with
    four findings held out. ranks, studies: of LoRA. learning-rates: of all methods.
    """
    from medctkit.experiments.compare.figures import write_figures
    from medctkit.experiments.compare.results import load_results, show_all
    from medctkit.experiments.compare.run_all import GROUPS, SETTINGS, compare_methods

    groups = GROUPS if only is None else [name.strip() for name in only.split(",")]
    compare_methods(manifest, output_dir, groups, seeds, replace(SETTINGS, steps=steps), jobs, cache_dir)
    results = load_results(output_dir)
    written = write_figures(results, output_dir)
    say(show_all(results))
    say(f"tables: {output_dir / 'comparison.csv'}, costs.csv; figures: {', '.join(p.name for p in written)}")


@app.command("manifest")
def write_default_manifest(
    path: Annotated[Path, typer.Argument(help="CSV to write.")] = DEFAULT_MANIFEST,
) -> None:
    """Write the default phantom cohort's manifest: about two minutes on two cores."""
    from medctkit.cohort.manifest import build_default_manifest, write_manifest

    say(f"wrote {write_manifest(build_default_manifest(), path)}")


@app.command()
def pretrain(
    output_dir: Annotated[Path, typer.Argument(help="For the model; the shipped one is in medctkit/assets/mini.")],
    pool_dir: Annotated[Path, typer.Option(help="Phantom studies (4 GB) and the checkpoint.")] = POOL,
) -> None:
    """Make the mini base model anew: on two cores about 15 minutes of phantoms and 45 of training."""
    from medctkit.experiments.pretrain import pretrain as run

    record = run(output_dir, pool_dir)
    say(f"validation AUROC {record['validation_auroc']:.3f} after {record['minutes']} min: {output_dir}")


@app.command("prepare")
def prepare_data(
    source: Annotated[Path, typer.Argument(help="CT-RATE's folder (the one with dataset/), or a manifest.")],
    output_dir: Annotated[Path, typer.Argument(help="Gets manifest.csv, prepared/ and, if need be, failures.csv.")],
    model: Annotated[
        str | None, typer.Option(help="mini, released, or a model's folder; by default released for files, else mini.")
    ] = None,
    version: Annotated[int | None, typer.Option(help="Of CT-RATE, 1 or 2; by default what is on disk.")] = None,
    one_reconstruction: Annotated[bool, typer.Option("--one-reconstruction", help="Keep one of each scan.")] = False,
    valid_share: Annotated[float, typer.Option(help="Of CT-RATE's training patients, kept for validation.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Draws those patients.")] = 0,
    scheduler: Annotated[str | None, typer.Option(help="Address of a dask scheduler, tcp://HOST:8786.")] = None,
    workers: Annotated[int | None, typer.Option(help="Local processes; by default one for each core.", min=1)] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read prepared volumes again, mend damaged ones.")] = False,
) -> None:
    """Read and pre-process every volume of a data set once. Stop it and start it again as you like."""
    from medctkit.cohort import manifest as schema
    from medctkit.cohort.ct_rate import manifest_from_ct_rate
    from medctkit.cohort.prepare import prepare, write_failures

    failures: list[dict] = []
    if source.is_dir():
        chosen: dict[str, Any] = dict(one_reconstruction=one_reconstruction, failures=failures)
        table, counts = manifest_from_ct_rate(source, version, valid_share, seed, **chosen)
        say("\n".join(f"{n:>8,} {what}" for what, n in counts.items()))
    else:
        if version or one_reconstruction:
            raise ValueError("--version and --one-reconstruction are for CT-RATE's folder; a manifest says it all")
        table = schema.load_manifest(source)
    say(f"no patient is in two splits:\n{schema.split_table(table).to_string()}\n")
    rows = table.to_dict("records")
    wanted = _model_input(model, real=any(map(schema.has_file, rows)))
    done = prepare(rows, wanted, output_dir / "prepared", scheduler=scheduler, workers=workers, verify=verify)
    prepared, leaks = schema.without_leaks(done.prepared_rows(table))
    failures += [*done.failures, *leaks]
    write_failures(failures, output_dir / "failures.csv")
    if len(prepared):
        schema.write_manifest(prepared, output_dir / "manifest.csv")
        say(f"manifest of {len(prepared):,} volumes: {output_dir / 'manifest.csv'}")
    say(
        f"{len(done.contents):,} of {len(table):,} volumes are prepared, {done.made:,} of them now "
        f"({done.bytes / 1e6:,.0f} MB in {done.seconds:,.0f} s)"
    )
    if failures:
        said = "{study}: {message}".format(**failures[0])
        listed = output_dir / "failures.csv"
        say(f"{len(failures):,} failed or were left out, listed in {listed}; the first, {said}", err=True)
        if done.left:
            say(f"As nothing else came through, {done.left:,} were not tried.", err=True)
        raise typer.Exit(1)


def _model_input(model: str | None, real: bool) -> Any:
    """What the model of that name or folder wants to see."""
    from medctkit.model.base_model import preprocess_config_of

    return preprocess_config_of(model or ("released" if real else "mini"))


@app.command()
def gallery(
    folder: Annotated[Path, typer.Argument(help="Where the pages are written.", file_okay=False)],
    real: Annotated[Path | None, typer.Option(help="A real scan: one page more, beside a phantom.")] = None,
) -> None:
    """Draw pages to judge phantoms by: each finding in three planes, beside the same patient without it."""
    from medctkit.viewers.gallery import draw_beside_real, draw_twins

    pages = draw_twins(folder)
    for page in [*pages, *([draw_beside_real(folder / "beside_real.png", real)] if real else [])]:
        say(f"wrote {page}")


WHAT_TO_DOWNLOAD = """Choose what to fetch; all of CT-RATE is 50,188 volumes of 12 to 162 MB:
  --patients N        whole patients of --split (valid, if none is given)
  --studies NAMES     patients, scans or volumes: valid_1,valid_2_a, or a file with one name a line
  --split valid       1,304 patients, 3,039 volumes
  --split train       20,000 patients, 47,149 volumes
  --weights           CT-CLIP_v2.pt, about 1.77 GB
  --tokenizer         vocabulary of its text encoder
With --dry-run the exact size is shown, and no volume is fetched."""


@app.command()
def download(
    destination: Annotated[Path, typer.Argument(help="Folder for it, with the layout of CT-RATE.")],
    patients: Annotated[int | None, typer.Option(help="Number of whole patients of the split.")] = None,
    studies: Annotated[list[str] | None, typer.Option(help="Names with commas between, or a file of names.")] = None,
    split: Annotated[str | None, typer.Option(help="train or valid; alone, all of it.")] = None,
    version: Annotated[int, typer.Option(help="2: volumes in HU; 1: stored values.")] = 2,
    weights: Annotated[bool, typer.Option("--weights", help="The released CT-CLIP_v2.pt too.")] = False,
    tokenizer: Annotated[bool, typer.Option("--tokenizer", help="The text encoder's tokenizer too.")] = False,
    seed: Annotated[int | None, typer.Option(help="Draw the patients at random; else the first by number.")] = None,
    keep_no_chest: Annotated[bool, typer.Option("--keep-no-chest", help="Volumes listed as no chest too.")] = False,
    workers: Annotated[int, typer.Option(help="Files at a time.", min=1, max=32)] = 4,
    verify: Annotated[bool, typer.Option("--verify", help="Read and verify files that are there again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Fetch only the tables, and show the plan.")] = False,
) -> None:
    """Fetch a part of CT-RATE, verified; run again, it goes on. Needs a Hugging Face token and accepted terms."""
    from medctkit.cohort import download as hub
    from medctkit.cohort.selection import study_names

    subset = patients is not None or bool(studies) or split is not None
    if not (subset or weights or tokenizer):
        say(WHAT_TO_DOWNLOAD, err=True)
        raise typer.Exit(2)
    plans = []
    if subset or weights:
        names = study_names(studies) if studies else None
        checkpoints = ["CT-CLIP_v2.pt"] if weights else []
        chosen: dict[str, Any] = dict(patients=patients, studies=names, split=split, version=version, seed=seed)
        plan, selection = hub.plan_ct_rate(destination, weights=checkpoints, keep_no_chest=keep_no_chest, **chosen)
        plans.append(plan)
        if selection:
            how = "drawn by the seed" if seed is not None else "the first by number" if patients else "as asked for"
            say(f"{selection} ({how})")
    if tokenizer:
        plans.append(hub.plan_tokenizer(destination))
    for plan in plans:
        say(str(plan))
    outcomes = [hub.download(plan, workers=workers, verify=verify) for plan in plans if not dry_run]
    for outcome in outcomes:
        say(str(outcome))
    if any(outcome.failures for outcome in outcomes):
        say("Not all was fetched; the same command goes on from here.", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
