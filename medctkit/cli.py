"""The `medctkit` command: what a cluster or a terminal needs, thin over the package."""

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from medctkit.cli_deploy import Tokenizer, deploying, say
from medctkit.cli_maintain import maintaining
from medctkit.cli_measure import DEFAULT_MANIFEST, Adapted, Cache, Manifest, Model, Seed, measuring

# What is stopped here goes on where it was; any other command begins anew
GOES_ON = ("finetune", "prepare", "download", "localise", "embed", "compare", "deploy-table", "gateway", "pretrain")


@contextmanager
def told(ctx: Any = None) -> Iterator[None]:
    """What goes wrong is told without a traceback, and in the exit code; a mistake of ours keeps its traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort):  # RuntimeErrors too
        raise
    except KeyboardInterrupt:
        goes_on = ctx is not None and ctx.invoked_subcommand in GOES_ON
        say(f"stopped; the same command {'goes on from here' if goes_on else 'begins anew'}", err=True)
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
        if empty := [name for name, equals, value in split if not (value if equals else name)]:
            what = f"the value of {empty[0]}" if empty[0] else "an argument"
            raise typer.BadParameter(f"{what} is empty: is it a shell variable that is not set?")
        return super().parse_args(ctx, [home(name) + equals + home(value) for name, equals, value in split])

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # where a terminal lacks a letter
        with _terminated_as_by_ctrl_c(), told(ctx):
            return super().invoke(ctx)


@contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that nothing is left behind; afterwards it is the caller's again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: no handler of Python's


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, help="LoRA on 3D chest CT, from data to evaluation."
)
app.add_typer(measuring)  # evaluate, localise, embed, compare
app.add_typer(deploying)  # predict, answer, export, gateway
app.add_typer(maintaining)  # manifest, pretrain, gallery


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
    config: Annotated[
        Path | None, typer.Option(help="A run.yaml, as it lies beside each adapter; options given go before it.")
    ] = None,
) -> None:
    """Adapt a base model to a hospital, as notebook 03 does. Stop it and start it again as you like.

    Without options: the mini model, to the target hospital (phantom). Options that are left out have one value for the
    mini model and another for all others. On several GPUs: accelerate launch -m medctkit.cli finetune ...
    """
    from accelerate.utils import is_tensorboard_available

    from medctkit.common.processes import accelerator_for
    from medctkit.experiments.adapt import Origin, adapt
    from medctkit.experiments.run_file import ASKED, NAME, read_run_file, settings_of, write_run_file

    in_file, chosen = read_run_file(config) if config else ({}, {})
    default = [name for name in ASKED if ctx.get_parameter_source(name).name == "DEFAULT"]  # type: ignore[union-attr]
    asked = {name: ctx.params[name] for name in ASKED} | {name: in_file[name] for name in default if name in in_file}
    manifest, seed, cache_dir, model = (asked[name] for name in ("manifest", "seed", "cache_dir", "model"))
    instead = {other: None for name, other in (("steps", "epochs"), ("epochs", "steps")) if name in ctx.obj}
    settings = settings_of(model, chosen | instead | ctx.obj)
    asked["hospital"] = asked["hospital"] or ("target" if model == "mini" else None)
    origin = Origin(model, asked["tokenizer"], asked["hospital"])
    first = accelerator_for().is_main_process
    if first:
        there = is_tensorboard_available()
        to_watch = f"tensorboard --logdir {output_dir}" if there else "pip install 'medctkit[tensorboard]'"
        say(f"{settings}\nTo watch: {to_watch if settings.tracker == 'tensorboard' else settings.tracker}")
    result = adapt(manifest, output_dir, seed, settings, cache_dir, origin)
    if first:
        write_run_file(output_dir / NAME, asked, settings)
        say(f"best validation AUROC {result.best_score:.3f} at step {result.best_step}: {result.adapter_dir}")


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
    from medctkit.cohort.prepare import prepare, refuse_other_list, write_failures
    from medctkit.model.base_model import preprocess_config_of

    failures: list[dict] = []
    if source.is_file() and (output_dir / "manifest.csv").exists() and source.samefile(output_dir / "manifest.csv"):
        raise ValueError(f"{source} would be overwritten by the manifest of what is prepared; give another OUTPUT_DIR")
    refuse_other_list(output_dir / "failures.csv")
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
    wanted = preprocess_config_of(model or ("released" if any(map(schema.has_file, rows)) else "mini"))
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


WHAT_TO_DOWNLOAD = """Choose what to fetch; all of CT-RATE is 50,188 volumes of 12 to 162 MB:
  --patients N        whole patients of --split (valid, if none is given)
  --studies NAMES     patients, scans or volumes: valid_1,valid_2_a, or a file with one name a line
  --split valid       1,304 patients, 3,039 volumes
  --split train       20,000 patients, 47,149 volumes
  --weights           CT-CLIP_v2.pt, about 1.77 GB
  --tokenizer         vocabulary of its text encoder
Without an account: --source idc (--collection lidc_idri), or --source rad-chestct, which is given on request.
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
    workers: Annotated[int, typer.Option(help="Files at a time.", min=1, max=32)] = 4,
    verify: Annotated[bool, typer.Option("--verify", help="Read and verify files that are there again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Fetch only the tables, and show the plan.")] = False,
    source: Annotated[str, typer.Option(help="ct-rate, idc (Imaging Data Commons) or rad-chestct.")] = "ct-rate",
    collection: Annotated[str, typer.Option(help="Of Imaging Data Commons, such as lidc_idri or nlst.")] = "lidc_idri",
) -> None:
    """Fetch a part of CT-RATE, verified; run again, it goes on. Needs a Hugging Face token and accepted terms.

    Or chest CTs that need no account, with a manifest: --source idc and --source rad-chestct; licences are shown first.
    """
    from medctkit.cohort import download as hub
    from medctkit.cohort.selection import study_names

    if source != "ct-rate":
        if studies or weights or tokenizer or verify or (split and source == "idc"):
            of_ct_rate = "--studies, --weights, --tokenizer, --verify and, with idc, --split"
            raise ValueError(f"{of_ct_rate} are for CT-RATE")
        _download_open(source, destination, patients, split, seed, collection, dry_run)
        return
    subset = patients is not None or bool(studies) or split is not None
    if not (subset or weights or tokenizer):
        say(WHAT_TO_DOWNLOAD, err=True)
        raise typer.Exit(2)
    plans = []
    if subset or weights:
        names = study_names(studies) if studies else None
        checkpoints = ["CT-CLIP_v2.pt"] if weights else []
        chosen: dict[str, Any] = dict(patients=patients, studies=names, split=split, version=version, seed=seed)
        plan, selection = hub.plan_ct_rate(destination, weights=checkpoints, **chosen)
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


def _download_open(
    source: str,
    destination: Path,
    patients: int | None,
    split: str | None,
    seed: int | None,
    collection: str,
    dry: bool,
) -> None:
    from medctkit.cohort import idc, open_data, rad_chestct

    if source == "idc":
        plan = idc.plan_idc(destination, collection, patients, seed)
    elif source == "rad-chestct":
        plan = rad_chestct.plan_rad_chestct(destination, patients, split, seed)
    else:
        raise ValueError(f"--source {source}: expected ct-rate, idc or rad-chestct")
    say(str(plan))
    if dry:
        return
    manifest, failures = open_data.fetch(plan)
    say(f"manifest: {manifest}")
    for study, why in failures.items():
        say(f"{study}: {why}", err=True)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
