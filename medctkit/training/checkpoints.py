"""Where a run of fine-tuning stands, and whose its folder is.

While a run works, all that it writes lies in `unfinished`; the result takes its place when the run ends, and `run.json`
says what it was made of. A folder has one run: another is refused, and so is a second at the same time.

What the checkpoint holds is all that the next step depends on: the trained parameters, the best ones so far, the
optimiser's averages, the loss scale of fp16, the history. Batches, prompt wordings and dropout are drawn from the seed
and the number of the step, so there is no other state. At full size with preset "paper" that is 27 MB.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import SafetensorError, safe_open
from torch.utils.data import Subset

from medctkit.cohort.cache import content_of, key_of
from medctkit.common.atomic import alone, replacing
from medctkit.common.digests import sha256_of
from medctkit.common.processes import in_main_process
from medctkit.common.provenance import differences, write_json
from medctkit.findings import CT_RATE, FACTS, FINDINGS, refuse_other_findings
from medctkit.lora.methods import restore_trained, save_trained
from medctkit.model.fingerprint import add_tensor, digest_of_tensors, digests, vocabulary_of
from medctkit.model.protocol import Model
from medctkit.model.weights import write_weights
from medctkit.training.settings import FineTuneConfig

NAME, WORK, RECORD, HISTORY = "checkpoint.safetensors", "unfinished", "run.json", "history.csv"
CHANGES_NOTHING = ("prompts", "workers", "checkpoint_every", "tracker")  # of settings; prompts have a digest
_COUNTS = ("step", "history", "best_step", "best_score", "seconds")  # written as JSON
_KINDS = dict(step=int, history=list, best_step=int, best_score=int | float, seconds=int | float, made_of=dict)
_AVERAGES = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


class Run:
    """Where a run stands: what `taken_up` brings back and `save` writes down. Files are the main process's business.

    `output_dir` gets, in the end, `adapter`, the best parameters, and `run.json`; until then `unfinished` has the best
    ones so far, and the checkpoint. `history` has a row for each of the `step` optimiser steps done, and one for step
    0; `best` holds the trained parameters of the best validation score.
    """

    def __init__(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        output_dir: Path,
        made_of: Mapping[str, Any],
    ):
        self.model, self.optimizer, self.accelerator, self.made_of = model, optimizer, accelerator, made_of
        self.output_dir, self.work = output_dir, output_dir / WORK
        self.file, self.adapter_dir = self.work / NAME, output_dir / "adapter"
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.step, self.best_step, self.best_score, self.finished = 0, -1, -math.inf, False
        self.history: list[dict[str, float]] = []
        self.best: dict[str, torch.Tensor] = {}
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent so far, before interruptions too."""
        return time.perf_counter() - self._started

    @property
    def validations_without_best(self) -> int:
        """Validations since the best one."""
        return sum("score" in row and row["step"] > self.best_step for row in self.history)

    @contextmanager
    def taken_up(self) -> Iterator[None]:
        """Hold the folder, and go on where an interrupted run stood: bit for bit what `save` saw.

        A run that is `finished` brings its history back, and the best parameters.

        Raises:
            ValueError: a run is at work there; a damaged checkpoint; another run's folder; in all processes.
        """
        with ExitStack() as self._held:
            if found := in_main_process(self._found):
                self._restore(*found)
            yield

    def _found(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """What is in the folder of this run: counts and tensors, no tensors where it is finished; None: nothing."""
        self._held.enter_context(alone(self.output_dir))
        self._held.callback(self._ended)
        if (self.output_dir / RECORD).is_file():
            record = finished_run(self.output_dir)
            what, way_out = f"{self.output_dir} is of a run that is finished", "Give another output_dir, or delete"
            refuse_other_run(what, record["made_of"], self.made_of, f"{way_out} its adapter and {RECORD}")
            restore_trained(self.model, self.adapter_dir)
            return record, {}
        if self.file.is_file():
            return read(self.file, self.made_of)
        if self.adapter_dir.exists():
            raise ValueError(
                f"{self.adapter_dir} is there, and no {RECORD} that says of which run. Give another output_dir, or "
                "move it away"
            )
        if (self.output_dir / HISTORY).exists():
            raise ValueError(
                f"{self.output_dir / HISTORY} is there, and no {RECORD}: move it away, it would be replaced"
            )
        self._clear()  # of a run that ended before its first checkpoint
        return None

    def _ended(self) -> None:
        if self.finished:
            self._clear()

    def _clear(self) -> None:
        """Take away what a run writes while it works, and the folder of it, unless there is something else in it."""
        shutil.rmtree(self.work / "adapter", ignore_errors=True)
        for file in (self.file, *self.work.glob(f".{NAME}.*.tmp")):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.work.rmdir()

    def _restore(self, counts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self._started -= counts["seconds"]
        for name in set(_COUNTS) - {"seconds"}:
            setattr(self, name, counts[name])
        self.finished = not tensors
        if self.finished:
            for parameter in self.trainable.values():
                broadcast(parameter.data)
            self.model.eval()
            return
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[f"now.{name}"])
                self.best[name] = tensors[f"best.{name}"].to(parameter.device)
                if f"optimizer.step.{name}" in tensors:
                    kept = {key: tensors[f"optimizer.{key}.{name}"] for key in _AVERAGES}
                    moved = {key: t if key == "step" else t.to(parameter.device) for key, t in kept.items()}
                    self.optimizer.state[parameter] = moved  # its step stays on the CPU, as AdamW makes it
        if self.accelerator.scaler is not None and counts["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(counts["scaler"])

    def keep_if_best(self, step: int, score: float) -> None:
        """Keep the trained parameters, here and on disk, if no score was better."""
        if score > self.best_score:
            self.best_step, self.best_score = step, score
            self.best = {name: p.detach().clone() for name, p in self.trainable.items()}
            if self.accelerator.is_main_process:
                save_trained(self.model, self.work / "adapter")

    def save(self) -> None:
        """Write the checkpoint."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"now.{name}": p for name, p in self.trainable.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.trainable.items():
            tensors |= {f"optimizer.{key}.{name}": t for key, t in self.optimizer.state.get(parameter, {}).items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        scaler = self.accelerator.scaler
        counts = {name: getattr(self, name) for name in _COUNTS}
        counts |= {"made_of": dict(self.made_of), "scaler": None if scaler is None else scaler.state_dict()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(counts)
        with replacing(self.file) as temporary:
            write_weights(tensors, temporary, {"medctkit": text, "sha256": digest_of_tensors(tensors, text)})

    def finish(self) -> None:
        """The best parameters onto the model and into `adapter`, and `run.json`."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(self.best[name])
        self.model.eval()
        self.finished = True
        if self.accelerator.is_main_process:
            # what is there may be of a later step, and what a kill left half-written
            shutil.rmtree(self.work / "adapter", ignore_errors=True)
            best = save_trained(self.model, self.work / "adapter")
            shutil.rmtree(self.adapter_dir, ignore_errors=True)  # of this run, killed when it was about to end
            os.replace(best, self.adapter_dir)
            files = [path for path in (*self.adapter_dir.iterdir(), self.output_dir / HISTORY) if path.is_file()]
            sums = {path.relative_to(self.output_dir).as_posix(): sha256_of(path) for path in files}
            counts = {name: getattr(self, name) for name in _COUNTS}
            record = {"state": "finished", "made_of": dict(self.made_of), "files": sums} | counts
            write_json(record, self.output_dir / RECORD)


def _refuse_other_kinds(record: Any) -> None:
    if wrong := [name for name, kind in _KINDS.items() if not isinstance(record[name], kind)]:
        raise TypeError(f"{wrong[0]} is {record[wrong[0]]!r:.80}")


def finished_run(output_dir: str | os.PathLike) -> dict[str, Any]:
    """What `run.json` says of the finished run of a folder, whose files are the ones that it wrote.

    Raises:
        FileNotFoundError: no finished run there.
        ValueError: a file of it was changed since, or is gone; its findings are not those in use.
    """
    output_dir = Path(output_dir).expanduser()
    file = output_dir / RECORD
    if not file.is_file():
        unfinished = (output_dir / WORK).exists()
        raise FileNotFoundError(
            f"{output_dir} has no {RECORD}, so no run of `medctkit finetune` was finished there"
            + ("; one was begun: the same command again goes on with it" if unfinished else "")
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, told in record["files"].items() if sha256_of(output_dir / name) != told]
        _refuse_other_kinds(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged, or a file that it names is gone: {error}. Do the run again") from None
    if changed:
        raise ValueError(f"{output_dir / changed[0]} is not the one that its run wrote. Do the run again")
    refuse_other_findings(f"the run of {output_dir}", record["made_of"].get("findings", CT_RATE))
    return record


def described(output_dir: str | os.PathLike) -> str:
    """The finished run of a folder in a line: its steps, and of which one the adapter is; see `finished_run`."""
    record = finished_run(output_dir)
    return (
        f"{output_dir}: a run finished after {record['step']:,} steps; its adapter is of step {record['best_step']:,}, "
        f"with a validation score of {record['best_score']:.3f}"
    )


def refuse_other_settings(output_dir: str | os.PathLike, config: FineTuneConfig) -> None:
    """Before anything is loaded or prepared: refuse a folder whose run, finished or not, has other settings.

    Raises:
        ValueError: it has; see also `finished_run`.
    """
    output_dir = Path(output_dir).expanduser()
    if (output_dir / RECORD).is_file():
        there = finished_run(output_dir)["made_of"]
    else:
        try:
            with safe_open(str(output_dir / WORK / NAME), "pt") as file:
                there = dict(json.loads(file.metadata()["medctkit"])["made_of"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # none, or damaged, which `read` will say
            return
    here = config.values(*CHANGES_NOTHING)
    what, way_out = f"{output_dir} is of another run", "Give another output_dir, or delete it"
    refuse_other_run(what, {name: there.get(name) for name in here}, here, way_out)


def refuse_other_run(what: str, there: Mapping[str, Any], here: Mapping[str, Any], way_out: str) -> None:
    """Refuse what belongs to a run which was made of something else."""
    if different := differences(there, here):
        raise ValueError(f"{what}, and not this one. {way_out}. {'; '.join(different)}")


def read(path: Path, made_of: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a checkpoint of the same run, what is written down about it, and its tensors; refuse any other."""
    way_out = f"Delete {path} to start over, or give another output_dir"
    try:
        with safe_open(str(path), "pt") as file:
            text = file.metadata()["medctkit"]
            rest, told = json.loads(text), file.metadata()["sha256"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if told != digest_of_tensors(tensors, text):
            raise ValueError("it is not what was written")
        _refuse_other_kinds(rest)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint of medctkit: {error}. {way_out}") from None
    refuse_other_findings(f"the run of {path}, not finished", rest["made_of"].get("findings", CT_RATE))
    refuse_other_run(f"{path} is of a run that was not finished", rest["made_of"], made_of, way_out)
    return rest, tensors


def made_of(model: Model, dataset: Any, config: FineTuneConfig, tokenizer: Any, score_fn: Any) -> dict[str, Any]:
    """What a run is made of, so that a folder is taken up by the same run only.

    Settings one by one, without those that change nothing; digests of the prompts, the base model's weights, the
    tokenizer, what is trained by name, shape and settings (not its random start, which a checkpoint has left behind),
    and of the training and validation studies: volumes, reports and labels, in their order; the findings, if they are
    not CT-RATE's.
    """
    trainable = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    adapters = [config.to_dict() for config in getattr(model, "peft_config", {}).values()]  # alpha is in no tensor
    found = {
        "prompts": hashlib.sha256(repr(config.prompts).encode()).hexdigest(),
        "base model": digests(model)[0],
        "tokenizer": vocabulary_of(tokenizer),
        "trained parameters": hashlib.sha256(json.dumps([trainable, adapters], default=_in_order).encode()).hexdigest(),
        "training studies": _digest_of_studies(dataset),
        "validation studies": _digest_of_studies(getattr(score_fn, "dataset", ())),
    }
    return config.values(*CHANGES_NOTHING) | {key: text[:22] for key, text in found.items()} | FACTS


def _in_order(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _digest_of_studies(dataset: Any) -> str:
    """How many studies, and a digest of what is in each; a data set that is none of the kit's is read once for it."""
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        whole: Any = dataset
        while isinstance(whole, Subset):
            i, whole = whole.indices[i], whole.dataset
        rows = getattr(whole, "rows", ())
        if rows and "report" in rows[i]:
            row = rows[i]
            labels, key = [float(row[name]) for name in FINDINGS], key_of(row, content_of(row), whole.config)
            digest.update(repr((row["study"], key, row["report"], labels)).encode())
        else:
            item = whole[i]
            digest.update(repr((item["study"], item["report"], item["labels"].tolist())).encode())
            add_tensor(digest, "pixels", item["pixel_values"])
    return f"{len(dataset)}, {digest.hexdigest()}"
