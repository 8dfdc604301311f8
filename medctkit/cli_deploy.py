"""The commands that take an adapted model to a hospital; `cli` hands them on as its own."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from medctkit.common.extras import require
from medctkit.common.text import printable

deploying = typer.Typer(add_completion=False)
Study = Annotated[Path, typer.Argument(help="One scan: a folder of DICOM slices, a .zip of one, or a file.")]
Asked = Annotated[str, typer.Option("--model", help="mini (knows phantoms only), a folder, or a file of weights.")]
Tokenizer = Annotated[str | None, typer.Option(help="Its folder, for a file of weights.")]
OfModel = Annotated[Path | None, typer.Option(help="Folder of an adapter; by default the base model alone.")]
OneOf = Annotated[str | None, typer.Option(help="Which of several: its UID, number or description.")]


def say(text: object, err: bool = False) -> None:
    """A line for the terminal, of which no name of a file or a study takes hold."""
    typer.echo(printable(text), err=err)


def with_adapter(model: str, tokenizer: str | None, adapter: Path | None) -> Any:
    """A base model, with its adapter where there is one; says so where that is of a run that is not finished."""
    from medctkit.lora.methods import load_trained
    from medctkit.model.base_model import load_base
    from medctkit.training.checkpoints import WORK

    if adapter is not None and adapter.resolve().parent.name == WORK:
        say(f"{adapter} is the best so far of a run that is not finished", err=True)
    base = load_base(model, tokenizer)
    return base if adapter is None else replace(base, model=load_trained(base.model, adapter))


@deploying.command()
def predict(
    study: Study,
    out: Annotated[
        Path, typer.Argument(help="Folder for scores.csv, scores.json, results.json and picture.png.", file_okay=False)
    ],
    model: Asked,
    tokenizer: Tokenizer = None,
    adapter: OfModel = None,
    series: OneOf = None,
) -> None:
    """Score one scan; results.json has the form of the VLM3D challenge. For research, not for diagnosis."""
    from medctkit.quickstart import predict_study

    say(predict_study(study, out, with_adapter(model, tokenizer, adapter), series))


@deploying.command()
def answer(
    study: Study,
    out: Annotated[
        Path, typer.Argument(help="Folder for SR.dcm (report), OT.dcm (picture) and SEG.dcm (map).", file_okay=False)
    ],
    model: Asked,
    tokenizer: Tokenizer = None,
    adapter: OfModel = None,
    series: OneOf = None,
    with_map: Annotated[bool, typer.Option("--map/--no-map", help="Where the model looked; 8 GB at full size.")] = True,
) -> None:
    """Answer one DICOM study in DICOM: report, picture, segmentation. For research, not for diagnosis."""
    require("deploy", "highdicom")
    from medctkit.deploy.answer import write_answer
    from medctkit.quickstart import answer_study

    found = answer_study(study, with_adapter(model, tokenizer, adapter), series, with_map=with_map)
    for path in write_answer(found, out):
        say(f"wrote {path}")


@deploying.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished fine-tuning.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an export that is there is replaced.", file_okay=False)],
    prompts: Annotated[str, typer.Option(help="paper, training-style or ensemble.")] = "paper",
    text: Annotated[bool, typer.Option("--text", help="The text tower too, for other prompts later.")] = False,
) -> None:
    """Write base and adapter as a folder that needs ONNX Runtime and NumPy alone, once it is proven equal."""
    from medctkit.deploy.export import export as write
    from medctkit.experiments.adapt import Origin
    from medctkit.lora.methods import load_trained

    base = Origin.of(run).load()
    model = load_trained(base.model, run.expanduser() / "adapter")
    say(f"wrote {write(model, base.tokenizer, out, prompts, text)}, equal for batches of 1, 2 and 3")


@deploying.command("deploy-table")
def deploy_table(
    run: Annotated[Path, typer.Argument(help="Folder of a finished fine-tuning; RUN/deploy gets the table.")],
    manifest: Annotated[Path, typer.Option(help="The cohort.")] = Path("data_manifest.csv"),
    cache_dir: Annotated[Path | None, typer.Option(help="Prepared volumes; see `medctkit finetune`.")] = None,
) -> None:
    """Measure each way to deploy: size, memory, time, and what changes; what changes too much is not left there.

    Test studies go through eight variants, one of which takes several times as long: the minutes are told first.
    Stop it and start it again as you like.
    """
    from medctkit.cohort.dataset import load_split, prepared_dir
    from medctkit.cohort.manifest import load_manifest
    from medctkit.deploy.deploy_table import as_text
    from medctkit.deploy.deploy_table import deploy_table as measure
    from medctkit.deploy.export import NEEDED
    from medctkit.experiments.adapt import Origin

    require("deploy", *NEEDED)
    origin, cohort, cache = Origin.of(run), load_manifest(manifest), prepared_dir(manifest, run, cache_dir)
    base = origin.load()
    valid, test = (
        load_split(cohort, origin.hospital, split, base.preprocess_config, cache) for split in ("valid", "test")
    )
    say(as_text(measure(base, run / "adapter", valid, test, run / "deploy")))


@deploying.command()
def gateway(
    folder: Annotated[
        Path, typer.Argument(help="For slices and answers on their way; nobody else's.", file_okay=False)
    ],
    destination: Annotated[str, typer.Argument(help="Gets the answers: TITLE@HOST:PORT.")],
    model: Asked,
    tokenizer: Tokenizer = None,
    adapter: OfModel = None,
    allow: Annotated[list[str] | None, typer.Option(help="AE title that may call; give it several times.")] = None,
    allow_all: Annotated[bool, typer.Option("--allow-all", help="Anyone may call.")] = False,
    title: Annotated[str, typer.Option(help="AE title of this service.")] = "MEDCTKIT",
    host: Annotated[
        str, typer.Option(help="Address to listen at; by default this machine alone can call.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.", min=0, max=65535)] = 11112,
    queue: Annotated[int, typer.Option(help="Series that may wait; more are refused for now.", min=1)] = 32,
    quiet: Annotated[float, typer.Option(help="Seconds without a new slice until a series is whole.", min=0)] = 10,
    retry: Annotated[float, typer.Option(help="Seconds until an answer is sent again.", min=0)] = 30,
) -> None:
    """Take CT series by C-STORE, send report and picture on. Stop it and start it again as you like.

    For research, not for diagnosis. The log names no patient.
    """
    require("deploy", "highdicom", "pynetdicom")
    import logging

    from medctkit.deploy.gateway import Gateway, Limits, Peer
    from medctkit.quickstart import answer_study

    log, handler = logging.getLogger("medctkit.gateway"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    to, allowed, limits = Peer.of(destination), None if allow_all else allow or [], Limits(queue, quiet, retry)
    base = with_adapter(model, tokenizer, adapter)
    service = Gateway(folder, lambda path: answer_study(path, base, with_map=False), to, allowed, title, limits)
    with service.serving(port, host) as at:
        say(f"listening at {title}@{host}:{at}; Ctrl-C ends it")
        threading.Event().wait()
