"""The runs of the comparison: which there are, and how one is done; `run_all` does them all.

Every run starts from the same base model and gets the same loss (but in "loss"), steps, batches, validations and seeds;
methods differ in what they train and in their learning rate, which validation studies choose: a grid is swept until its
best lies between others, or to its end. The words of the per-finding loss are chosen for LoRA in either encoder and in
both; all other methods have LoRA's. Test studies are scored at the end of the runs with the rates chosen, and choose
nothing.
"""

import base64
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medctkit.experiments.adapt import Origin
from medctkit.experiments.compare.data import Data, held_out, truth
from medctkit.experiments.compare.rivals import RIVALS
from medctkit.findings import FACTS, FINDINGS
from medctkit.lora.counting import count_trainable
from medctkit.lora.methods import METHODS, apply_method, trained_bytes
from medctkit.lora.strength import at_strength, intruder_dimensions
from medctkit.metrics.scores import evaluate, mean_auroc
from medctkit.model.base_model import BaseModel
from medctkit.model.fingerprint import digests, vocabulary_of
from medctkit.training.loop import finetune
from medctkit.training.objectives import report_prompts
from medctkit.training.settings import FineTuneConfig
from medctkit.zero_shot.classifier import ZeroShotClassifier, validation_score
from medctkit.zero_shot.embeddings import Changed
from medctkit.zero_shot.prompts import PROMPTS

RANKS = (1, 2, 4, 8, 16, 32, 64)
SIZES = (16, 64, 256, 1024, None)  # None: all
DIALECTS = ("target", "source")  # whose sentences the per-finding loss speaks in
PLACEMENTS = ("lora", "lora-vision", "lora-text")  # choose their dialect as their learning rate; others have lora's
BASE, PROBE, SWEEP = "base", "linear-probe", "learning-rates"
STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5)  # of LoRA and full fine-tuning, beside 0, the base model, and 1
OWN_RATE = ("prevalence", "contrastive", "unseen")  # variants that choose a learning rate of their own
MOST_RATES = 7  # of a sweep; then it ends, wherever its best lies

# What all runs share; a run has its own learning rate and seed, and a smaller batch where there are fewer studies.
SETTINGS = FineTuneConfig(steps=80, batch_size=16, evaluate_every=20, contrastive_weight=0.0)


@dataclass(frozen=True)
class Job:
    """One run. Jobs of two groups that have the same `name` are the same run, and are run once.

    Args:
        group: one of `GROUPS`, the question it helps to answer; or `SWEEP`: it is scored on validation studies alone.
        method: one of `METHODS`, one of `RIVALS`, or "base".
        rank: of the adapter, where it has one.
        studies: number of training studies; None: all.
        learning_rate: None where nothing is trained by gradients.
        seed: of the run, and of which studies.
        dialect: one of `DIALECTS`.
        variant: one of `data.VARIANTS`, or "".
    """

    group: str
    method: str
    rank: int | None = None
    studies: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    dialect: str = "target"
    variant: str = ""

    @property
    def name(self) -> str:
        """What the run is, and the name of its file."""
        if self.method == BASE:
            return BASE
        rank = f"-r{self.rank}" if self.rank else ""
        rate = f"-lr{self.learning_rate:g}" if self.learning_rate else ""
        other = f"-{self.dialect}-wording" * (self.dialect != "target") + f"-{self.variant}" * bool(self.variant)
        return f"{self.method}{rank}-{self.studies or 'all'}-studies{rate}{other}-seed{self.seed}"

    @property
    def trains(self) -> bool:
        """Whether it trains the model by gradients."""
        return self.method in METHODS

    @property
    def tuned(self) -> "Job":
        """The run, without rate and seed, whose learning rate and dialect it has: with all studies, all of them right.

        Only a rank, what is held out and another loss make another rate; sizes, noise and remedies have that of the
        plain method.
        """
        return Job(SWEEP, self.method, self.rank, variant=self.variant * (self.variant in OWN_RATE))


LORA = Job(SWEEP, "lora", METHODS["lora"].rank)  # whose dialect the others have


def _of(group: str, *methods: str, **other: Any) -> list[Job]:
    return [Job(group, name, METHODS[name].rank if name in METHODS else None, **other) for name in methods]


# By question, most needed first, the runs of one seed; they have no learning rate yet.
GROUPS: dict[str, list[Job]] = {
    "rivals": _of("rivals", BASE, *RIVALS, *PLACEMENTS, "full"),
    "loss": _of("loss", BASE, "lora")
    + [job for v in ("prevalence", "contrastive") for job in _of("loss", "lora", variant=v)],
    "unseen": _of("unseen", BASE, "lora") + _of("unseen", "lora", variant="unseen"),
    "placement": _of("placement", BASE, *PLACEMENTS, "lora-mlp", "lora-all"),
    "methods": _of("methods", BASE, PROBE, *METHODS),
    "forgetting": _of("forgetting", BASE, "lora", "full")
    + [job for v in ("replay", "anchor-1", "anchor-10") for job in _of("forgetting", "lora", variant=v)]
    + _of("forgetting", "full", variant="replay"),
    "studies": _of("studies", BASE)
    + [job for n in SIZES for job in _of("studies", "lora", "full", PROBE, "hu-boxes", studies=n)],
    "noise": [
        job for v in ("", "noise-5", "noise-10", "noise-20") for job in _of("noise", "lora", variant=v)
    ] + _of("noise", BASE),
    "ranks": [Job("ranks", BASE), *(Job("ranks", "lora", rank) for rank in RANKS)],
}  # fmt: skip


def next_rate(rate: float, up: bool) -> float:
    """The neighbour of a learning rate on the grid 1e-3, 3e-3, 1e-2, ..."""
    return float(f"{10 ** (round(2 * math.log10(rate)) / 2 + (0.5 if up else -0.5)):.0e}")


def sweep(tuned: Job, score: Callable[[Job], float | None]) -> list[Job]:
    """The runs that choose a learning rate and a dialect (`Job.tuned`), as far as is known by now which they are.

    From the rates of `METHODS` on, one more at a time beyond the lowest or highest while that one is the best, and
    below the lowest while it is as good as any: all diverge, or none learns. `score`, on validation studies, is None of
    a run that is not done yet, and -inf of one that diverged.
    """
    found: list[Job] = []
    dialects: tuple[str, ...] = DIALECTS
    if tuned.method not in PLACEMENTS or tuned.rank != METHODS[tuned.method].rank:
        lora = chosen(LORA, score)
        dialects = (lora.dialect,) if lora else ()
    for dialect in dialects:
        rates = list(METHODS[tuned.method].learning_rates)
        while True:
            jobs = [replace(tuned, learning_rate=rate, dialect=dialect) for rate in rates]
            scores = [score(job) for job in jobs]
            known = [value for value in scores if value is not None]
            if len(known) < len(scores) or len(rates) >= MOST_RATES:
                break
            if known[0] == max(known):
                rates.insert(0, next_rate(rates[0], up=False))
            elif known[-1] == max(known) > max(known[:-1]):
                rates.append(next_rate(rates[-1], up=True))
            else:
                break
        found += jobs
    return found


def chosen(tuned: Job, score: Callable[[Job], float | None]) -> Job | None:
    """The best run of a sweep, of equals that of the lowest rate; None where the sweep is not at its end.

    Raises:
        ValueError: it diverged with every learning rate.
    """
    scored = [(score(job), job) for job in sweep(tuned, score)]
    if not scored or any(value is None for value, _ in scored):
        return None
    value, best = max(scored, key=lambda each: (each[0], -(each[1].learning_rate or 0)))
    if value == -math.inf:
        raise ValueError(f"{best.name}: it diverged with every rate of its sweep; lower METHODS[{best.method!r}]'s")
    return best


def jobs(group: str, seeds: Iterable[int], score: Callable[[Job], float | None], assume: bool = False) -> list[Job]:
    """The runs of a group, as far as is known by now which they are: sweeps first, then what needs their rates.

    With `assume`, what is not chosen yet has the first rate of its sweep.
    """
    tuned = dict.fromkeys([LORA, *(job.tuned for job in GROUPS[group] if job.trains)])
    first = {each: [replace(each, learning_rate=x) for x in METHODS[each.method].learning_rates] for each in tuned}
    sweeps = {each: sweep(each, score) or (first[each] if assume else []) for each in tuned}
    best = {each: chosen(each, score) or (found[0] if assume else None) for each, found in sweeps.items()}
    listed = [job for found in sweeps.values() for job in found]
    for seed, job in product(seeds, GROUPS[group]):
        if job.trains:
            if rate := best[job.tuned]:
                listed.append(replace(job, seed=seed, learning_rate=rate.learning_rate, dialect=rate.dialect))
        elif seed == 0 or job.studies:  # there is no chance in what learns from all studies in closed form
            listed.append(replace(job, seed=seed))
    return listed


# --- one run --------------------------------------------------------------------------------------------


def draw_studies(patients: Sequence[str], n: int | None, seed: int) -> list[int]:
    """Indices of `n` training studies: those of the first patients, in an order drawn by the seed, cut at n.

    For one seed the small sets lie within the large ones. Fewer studies than n are a ValueError.
    """
    if n is None:
        return list(range(len(patients)))
    if n > len(patients):
        raise ValueError(f"{n} training studies asked for, the manifest has {len(patients)}; leave that size out")
    names = np.unique(patients)
    place = {name: i for i, name in enumerate(np.random.default_rng(seed).permutation(names))}
    return sorted(range(len(patients)), key=lambda i: place[patients[i]])[:n]


def inputs_of(manifest_path: str | os.PathLike, base: BaseModel, origin: Origin, home: str) -> dict[str, Any]:
    """Digests of the base model, of its vocabulary and of the manifest, the hospitals; findings that are your own."""
    manifest = hashlib.sha256(Path(manifest_path).expanduser().read_bytes()).hexdigest()[:32]
    of = {"base": digests(base.model)[0], "vocabulary": vocabulary_of(base.tokenizer), "manifest": manifest}
    return of | {"hospital": str(origin.hospital), "home": home} | FACTS


def settings_of(job: Job, settings: FineTuneConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All that a result depends on, beside the job and the versions; compared before a result is taken up."""
    if not job.trains:
        return {**inputs, **(RIVALS[job.method].settings if job.method in RIVALS else {})}
    config = _config(job, settings)
    prompts = hashlib.sha256(repr(config.prompts).encode()).hexdigest()[:16]
    left_out = ("prompts", "workers", "checkpoint_every", "seed", "learning_rate", "epochs", "micro_batch_size")
    return {**inputs, "training prompts": prompts, **config.values(*left_out)}


def _config(job: Job, settings: FineTuneConfig) -> FineTuneConfig:
    """The settings of all runs with what is this run's own."""
    batch_size = min(settings.batch_size, job.studies or settings.batch_size)
    rate = job.learning_rate or settings.learning_rate
    own: dict[str, Any] = dict(batch_size=batch_size, learning_rate=rate, seed=job.seed)
    own["rate_of_b"] = METHODS[job.method].rate_of_b
    if job.variant == "unseen":  # reports speak of what is held out
        own["contrastive_weight"] = 0.0
    if job.variant == "prevalence":
        own["prevalence"] = True
    if job.variant == "contrastive":
        own["contrastive_weight"] = settings.prompt_weight
    if job.variant.startswith("anchor-"):
        own["anchor_weight"] = float(job.variant.removeprefix("anchor-"))
    return replace(settings, **own, prompts=report_prompts(job.dialect))


def run_job(job: Job, data: Data, settings: FineTuneConfig, work_dir: str | os.PathLike) -> dict[str, Any]:
    """Do one run and score it on the test studies; what `work_dir` holds of it already is not done again.

    Returns:
        `validation_auroc`, the best there was, of `best_step`, and `history`, of each validated step; `trainable`
        numbers, `adapter_bytes` on disk, `seconds`; `auroc` and `calibration_error` of the test studies, and `home`,
        those of the source hospital's; `scores` of all of them, see `unpacked`: in each set of prompts ("home" in the
        paper's), and of LoRA and full fine-tuning at `STRENGTHS`; `intruders`, see `intruder_dimensions`; `chosen`,
        what else validation studies chose; `one_class`, findings of which the training studies hold one class. A run
        of a sweep has nothing of test studies. Only `diverged`, what was not finite, if training stopped there.
    """
    started = time.perf_counter()
    indices = draw_studies([row["patient"] for row in data.train.rows], job.studies, job.seed)
    found: dict[str, Any] = {"best_step": 0, "trainable": 0, "adapter_bytes": 0, "one_class": [], "chosen": ""}
    if job.method in RIVALS:
        rival = RIVALS[job.method].score(data, indices)
        found |= {"validation_auroc": mean_auroc(data.labels("valid"), rival.valid), "chosen": rival.chosen}
        found |= {"trainable": rival.trained, "adapter_bytes": 4 * rival.trained, "one_class": list(rival.one_class)}
        scores = {"paper": rival.test}
    elif job.method == BASE:
        seen = [data.embedded(split).embeddings for split in ("valid", "test", "home")]
        ask = ZeroShotClassifier(data.base.model, data.base.tokenizer)
        found["validation_auroc"] = mean_auroc(data.labels("valid"), ask.scores_from_embeddings(seen[0]))
        scores = _scores(data.base.model, data, seen[1], seen[2])
    else:
        torch.manual_seed(job.seed)
        model = apply_method(data.origin.load().model, job.method, **{"r": job.rank} if job.rank else {})
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        datasets = [data.learnt_from(indices, job.variant, job.seed), data.valid, data.test, data.home]
        if job.variant == "unseen":
            datasets[1] = Changed(data.valid, held_out)
        if job.method == "lora-text":  # the volumes are seen as before: once for all runs
            splits = ("train", "valid", "test", "home")
            datasets = [data.seen(dataset, splits, "pixel_values") for dataset in datasets]
            model.encode_image = lambda embedded: embedded
        score = validation_score(datasets[1], data.base.tokenizer)
        try:
            result = finetune(model, datasets[0], data.base.tokenizer, _config(job, settings), work_dir, score)
        except FloatingPointError as error:
            return {"diverged": str(error)}
        found |= {"best_step": result.best_step, "trainable": count_trainable(model)}
        found |= {"validation_auroc": result.best_score, "adapter_bytes": trained_bytes(result.adapter_dir)}
        found["history"] = result.history[["step", "score"]].dropna().to_numpy().tolist()
        if job.group == SWEEP:
            return found | {"seconds": time.perf_counter() - started}
        found["intruders"] = intruder_dimensions(data.base.model, model)
        ask = ZeroShotClassifier(model, data.base.tokenizer)

        def embedded() -> list[torch.Tensor]:
            return [ask.embed(dataset, progress=False).embeddings for dataset in datasets[2:]]

        scores = _scores(model, data, *embedded())
        plain = not job.variant and job.studies is None and job.rank == METHODS[job.method].rank
        for strength in STRENGTHS if job.method in ("lora", "full") and plain else ():
            with at_strength(model, strength, start if job.method == "full" else None):
                for where, seen_there in zip(("", "/home"), embedded(), strict=True):
                    scores[f"strength {strength:g}{where}"] = ask.scores_from_embeddings(seen_there)
    if "home" in scores:
        found["home"] = _measured(data.home.rows, scores["home"])
    packed = {what: base64.b64encode(each.astype("<f4").tobytes()).decode() for what, each in scores.items()}
    seconds = {"seconds": time.perf_counter() - started}
    return seconds | found | {"scores": packed} | _measured(data.test.rows, scores["paper"])


def _scores(model: Any, data: Data, test: torch.Tensor, home: torch.Tensor) -> dict[str, np.ndarray]:
    """In each set of prompts, and at home in the paper's, from a model's embeddings."""
    asked = {name: ZeroShotClassifier(model, data.base.tokenizer, name) for name in PROMPTS}
    scores = {name: each.scores_from_embeddings(test) for name, each in asked.items()}
    return scores | {"home": asked["paper"].scores_from_embeddings(home)}


def unpacked(scores: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The `scores` of a run: (n, 18) each."""
    return {
        what: np.frombuffer(base64.b64decode(text), "<f4").reshape(-1, len(FINDINGS)) for what, text in scores.items()
    }


def _measured(rows: Sequence[Mapping], scores: np.ndarray) -> dict[str, dict[str, dict[str, float | None]]]:
    """Both metrics of the mean over findings and of each: value, low, high; None where they cannot be computed."""
    labels, patients = truth(rows)
    table = evaluate(labels, scores, patients, resamples=1000).astype(object)
    table = table.where(table.notna(), None)
    return {
        name: table[[name, f"{name}_low", f"{name}_high"]].set_axis(["value", "low", "high"], axis=1).to_dict("index")
        for name in ("auroc", "calibration_error")
    }
