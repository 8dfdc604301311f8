"""Makes the mini base model that the kit ships: a small CT-CLIP, pretrained on source-hospital phantoms.

`medctkit pretrain` runs it all: a pool of phantom studies, a WordPiece vocabulary from their reports,
contrastive pretraining with the codebook learnt on the way, a score on a validation pool, and the model card.
"""

import json
import os
import random
import shutil
import string
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from medctkit.cohort.dataset import report_ids
from medctkit.common.atomic import replacing
from medctkit.findings import FINDINGS
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.phantom.report_text import write_report
from medctkit.phantom.study import TRAINING_SHAPE, generate, named_rng
from medctkit.training.loop import learning_rate_factor
from medctkit.training.objectives import draw_prompts, joint_loss, report_prompts
from medctkit.training.settings import FineTuneConfig
from medctkit.zero_shot.classifier import ZeroShotClassifier, evaluating

CHUNK = 250
_COUNTS = ("step", "epoch", "order", "history", "seconds")  # of a run, beside its tensors
FIRST_SEED = 1_000_000  # seeds of the pool; the patients are named by them

MINI_VISION = dict(
    dim=96, codebook_size=512, image_size=TRAINING_SHAPE[1], num_frames=TRAINING_SHAPE[0], patch_size=8,
    temporal_patch_size=8, spatial_depth=2, temporal_depth=2, dim_head=24, heads=4,
)  # fmt: skip
MINI_TEXT = dict(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
    max_position_embeddings=192, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
)  # fmt: skip
MINI_PROJECTION = 96


@dataclass(frozen=True)
class PretrainConfig(FineTuneConfig):
    """Settings of the pretraining: those of fine-tuning, and of the pool, the codebook and the vocabulary.

    Args:
        studies: phantom studies to learn from.
        validation_studies: further studies to score on.
        quantise_from: step at which the codebook is set by k-means and switched on.
        codebook_decay: of the moving averages that then follow the tokens.
        vocabulary: WordPiece entries.
    """

    studies: int = 13_500
    validation_studies: int = 500
    quantise_from: int = 250
    codebook_decay: float = 0.97
    vocabulary: int = 1200

    def record(self) -> dict[str, Any]:
        """The settings that matter here."""
        unused = ("prompts", "epochs", "micro_batch_size", "max_length", "patience", "mixed_precision", "workers")
        return {name: value for name, value in vars(self).items() if name not in unused}


# Those that made the model that is shipped.
DEFAULT = PretrainConfig(
    steps=1600,
    batch_size=64,
    learning_rate=1.5e-3,
    warmup_fraction=0.05,
    weight_decay=0.05,
    prompt_weight=2.0,
    prompts=report_prompts("source"),
    evaluate_every=100,
    checkpoint_every=100,
)


def _make_chunk(task: tuple[int, Path]) -> None:
    """Write one chunk of the pool; volumes int16 HU, labels, and the details reports are worded from."""
    index, folder = task
    studies = [generate(FIRST_SEED + index * CHUNK + i, "source") for i in range(CHUNK)]
    with replacing(folder / f"chunk_{index:04d}.npz") as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            volumes=np.stack([s.volume.hu for s in studies]),
            labels=np.array([[s.labels[f] for f in FINDINGS] for s in studies], np.uint8),
            details=np.array([json.dumps(s.details) for s in studies]),
        )


def make_pool(studies: int, folder: Path) -> list[Path]:
    """Generate the pool of studies, in chunks of 250; chunks that are there are kept."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from tqdm.auto import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    chunks = range(-(-studies // CHUNK))
    paths = [folder / f"chunk_{i:04d}.npz" for i in chunks]
    missing = [(i, folder) for i in chunks if not paths[i].exists()]
    workers = os.cpu_count() or 1
    if missing:
        minutes = len(missing) * CHUNK * 0.09 / workers / 60
        print(f"generating {len(missing) * CHUNK} phantom studies, about {minutes:.0f} min on {workers} cores")
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for _ in tqdm(pool.map(_make_chunk, missing), total=len(missing), desc="phantoms", unit="chunk"):
                pass
    return paths


class Pool:
    """The studies in memory: volumes (n, 1, d, h, w) int16 HU, labels (n, 18), details for the reports."""

    def __init__(self, paths: list[Path]):
        parts = [np.load(path) for path in paths]
        self.volumes = torch.from_numpy(np.concatenate([p["volumes"] for p in parts]))[:, None]
        self.labels = torch.from_numpy(np.concatenate([p["labels"] for p in parts])).float()
        self.details = [json.loads(d) for p in parts for d in p["details"]]

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: Any) -> torch.Tensor:
        """Model input (b, 1, d, h, w); at this spacing pre-processing is clip, scale and axis order only."""
        return self.volumes[index].float().clamp(-1000, 1000).div_(1000).transpose(-1, -2).contiguous()

    def report(self, index: int, wording: int) -> str:
        """A report of study `index`; each `wording` words it anew."""
        labels = {f: int(v) for f, v in zip(FINDINGS, self.labels[index], strict=True)}
        return write_report(labels, self.details[index], "source", named_rng("pool report", index, wording))


def train_tokenizer(reports: Iterable[str], size: int, folder: Path) -> Any:
    """Train a WordPiece vocabulary on reports and save it as a BERT tokenizer in `folder`."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]

    trainer = BertWordPieceTokenizer(lowercase=True)
    # the alphabet is given whole, at the start of words and inside them, so that no ASCII text becomes [UNK]
    alphabet = [chr(c) for c in range(33, 127)]
    inside = [f"a{c}" for c in string.ascii_lowercase + string.digits] * 2
    trainer.train_from_iterator(
        chain(inside, reports), vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    trainer.save_model(str(folder))
    settings = {"do_lower_case": True, "model_max_length": MINI_TEXT["max_position_embeddings"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


class CodebookLearner:
    """Learns the codebook while the model trains.

    Until `start` the quantiser is bypassed. Then k-means on the tokens of one batch sets the codes, and
    moving averages follow the tokens assigned to each code; a code that no token chooses is moved onto a
    token (van den Oord et al. 2017, arXiv 1711.00937, appendix A.1, on the unit sphere).
    """

    def __init__(self, model: CTCLIPModel, decay: float, seed: int):
        self.vq: Any = model.vision_encoder.vq
        self.codes = self.vq._codebook.embed  # (1, k, c), unit length
        self.decay, self.started = decay, False
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.empty(0, self.codes.shape[-1])  # (n, c), of the last batch
        self.quantised_forward = self.vq.forward
        self.vq.forward = self._forward  # type: ignore[method-assign]
        self.counts, self.sums = torch.ones(self.codes.shape[1]), self.codes[0].clone()

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.vq.training:
            self.tokens = F.normalize(x.detach().reshape(-1, x.shape[-1]), dim=-1)  # (n, c)
        return self.quantised_forward(x) if self.started else F.normalize(x, dim=-1)

    @torch.no_grad()
    def start(self, rounds: int = 12) -> None:
        """Set the codes by spherical k-means on the tokens of the last batch and switch the quantiser on."""
        k = self.codes.shape[1]
        codes = self.tokens[torch.randperm(len(self.tokens), generator=self.generator)[:k]]
        for _ in range(rounds):
            sums, counts = self._assign(codes)
            codes = F.normalize(torch.where(counts[:, None] > 0, sums, codes), dim=-1)
        self.codes[0] = codes
        self.counts, self.sums = counts.clamp(min=1), codes * counts.clamp(min=1)[:, None]
        self.started = True

    def _assign(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nearest = torch.cat([(part @ codes.T).argmax(1) for part in self.tokens.split(8192)])
        sums = torch.zeros_like(codes).index_add_(0, nearest, self.tokens)
        return sums, torch.bincount(nearest, minlength=len(codes)).float()

    @torch.no_grad()
    def update(self) -> None:
        """Move the codes after a training step."""
        if not self.started:
            return
        sums, counts = self._assign(self.codes[0])
        self.counts = self.decay * self.counts + (1 - self.decay) * counts
        self.sums = self.decay * self.sums + (1 - self.decay) * sums
        unused = self.counts < 0.3
        if unused.any():
            pick = torch.randint(len(self.tokens), (int(unused.sum()),), generator=self.generator)
            self.sums[unused], self.counts[unused] = self.tokens[pick], 1.0
        self.codes[0] = F.normalize(self.sums, dim=-1)

    def state(self) -> tuple:
        """What a checkpoint needs; the codes themselves are in the model."""
        return self.counts, self.sums, self.started, self.generator.get_state()

    def load(self, state: tuple) -> None:
        """Go on from a checkpoint."""
        self.counts, self.sums, self.started, generator = state
        self.generator.set_state(generator)

    def finish(self) -> float:
        """Give the quantiser back as it was; returns the share of codes in use."""
        self.vq.forward = self.quantised_forward
        return float((self.counts >= 1).float().mean())


@torch.no_grad()
def score(model: CTCLIPModel, tokenizer: Any, pool: Pool) -> float:
    """Mean zero-shot AUROC over the 18 findings on a pool."""
    from sklearn.metrics import roc_auc_score

    with evaluating(model):
        embeds = torch.cat([model.encode_image(pool.pixels(part)) for part in torch.arange(len(pool)).split(100)])
    probabilities = ZeroShotClassifier(model, tokenizer).scores_from_embeddings(embeds)
    return float(roc_auc_score(pool.labels, probabilities))


class Run:
    """A pretraining run: all that a checkpoint has to bring back."""

    def __init__(self, config: PretrainConfig, tokenizer: Any, train: Pool):
        torch.manual_seed(config.seed)
        text = MINI_TEXT | {"vocab_size": len(tokenizer)}
        self.config, self.tokenizer, self.train = config, tokenizer, train
        self.model = CTCLIPModel(CTCLIPConfig(MINI_VISION, text, MINI_PROJECTION))
        torch.nn.init.constant_(self.model.temperature, 2.3)  # cosines times 10: CLIP starts at 14
        self.codebook = CodebookLearner(self.model, config.codebook_decay, config.seed)
        matrices = {"params": [p for p in self.model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay}
        vectors = {"params": [p for p in self.model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([matrices, vectors], lr=config.learning_rate, betas=(0.9, 0.98))
        self.step, self.epoch, self.seconds = 0, 0, 0.0
        self.order: list[int] = []
        self.history: list[dict[str, float]] = []

    def advance(self) -> dict[str, float]:
        """One optimiser step; returns its losses."""
        config, started = self.config, time.perf_counter()
        self.step += 1
        if len(self.order) < config.batch_size:
            self.epoch += 1
            self.order = torch.randperm(len(self.train)).tolist()
        index, self.order = self.order[: config.batch_size], self.order[config.batch_size :]
        if self.step == config.quantise_from:
            self.codebook.start()
        rate = config.learning_rate * learning_rate_factor(self.step - 1, config.steps or 0, config.warmup_fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        reports = [self.train.report(i, self.epoch) for i in index]
        words = self.tokenizer(reports, padding=True, truncation=True, return_tensors="pt")
        words = {name: words[name] for name in ("input_ids", "attention_mask")}
        batch = {"report_id": report_ids(**words), "labels": self.train.labels[index]}
        self.model.train()
        wordings = random.Random(config.seed * 1_000_003 + self.step)
        images = self.model.encode_image(shifted(self.train.pixels(index)))
        texts = self.model.encode_text(**words)
        prompts = self.model.encode_text(**draw_prompts(config.prompts, self.tokenizer, wordings))
        losses = joint_loss(
            images, texts, prompts, batch, self.model.temperature, config.contrastive_weight, config.prompt_weight
        )
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.codebook.update()
        self.seconds += time.perf_counter() - started
        return {"step": self.step, **{name: value.item() for name, value in losses.items()}}

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {name: getattr(self, name) for name in _COUNTS}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"codebook": self.codebook.state(), "random": torch.get_rng_state(), "config": self.config.record()}
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same settings."""
        state = torch.load(path, weights_only=True)
        if state["config"] != self.config.record():
            raise ValueError(f"{path} is of a run with other settings: {state['config']}. Move it away to start anew")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.codebook.load(state["codebook"])
        torch.set_rng_state(state["random"])
        for name in _COUNTS:
            setattr(self, name, state[name])


def shifted(pixels: torch.Tensor) -> torch.Tensor:
    """Move each volume (b, 1, d, h, w) by up to two pixels, as patients lie on the table."""
    moves = torch.randint(-2, 3, (len(pixels), 2)).tolist()
    return torch.stack([torch.roll(p, move, dims=(-2, -1)) for p, move in zip(pixels, moves, strict=True)])


def pretrain(output_dir: str | os.PathLike, pool_dir: str | os.PathLike, config: PretrainConfig = DEFAULT) -> dict:
    """Make the mini base model: weights, vocabulary, training record and model card in `output_dir`.

    `output_dir` is written only when the model is complete; `pool_dir` is for generated studies (264 kB each) and the
    checkpoint that an interrupted run resumes from. Returns the training record, also written as `pretraining.json`.

    Raises:
        ValueError: the checkpoint in `pool_dir` was made with other settings.
    """
    import platform
    from importlib.metadata import version

    from tqdm.auto import tqdm

    pool_dir, output_dir = Path(pool_dir), Path(output_dir)
    paths = make_pool(config.studies + config.validation_studies, pool_dir)
    split = -(-config.validation_studies // CHUNK)
    train, valid = Pool(paths[:-split]), Pool(paths[-split:])
    reports = (train.report(i, 0) for i in range(min(len(train), 6000)))
    run = Run(config, train_tokenizer(reports, config.vocabulary, pool_dir / "tokenizer"), train)
    checkpoint = pool_dir / "checkpoint.pt"
    if checkpoint.exists():
        run.resume(checkpoint)
    bar = tqdm(initial=run.step, total=config.steps, desc="pretraining", unit="step")
    for step in range(run.step + 1, (config.steps or 0) + 1):
        row = run.advance()
        run.history.append(row)
        if step % config.evaluate_every == 0 or step == config.steps:
            row |= {"auroc": score(run.model, run.tokenizer, valid), "seconds": run.seconds}
            bar.write(json.dumps(row))
            run.save(checkpoint)
        bar.update()
        bar.set_postfix(loss=f"{row['loss']:.3f}")
    bar.close()
    building = output_dir.with_name(output_dir.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    codes_in_use = run.codebook.finish()
    run.model.eval()
    run.model.save_pretrained(building)
    run.tokenizer.save_pretrained(building)
    record = {
        "command": "medctkit pretrain",
        "config": config.record(),
        "minutes": round(run.seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "device": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "codes_in_use": round(codes_in_use, 3),
        "validation_auroc": run.history[-1]["auroc"],
        "history": [row for row in run.history if "auroc" in row],
    }
    (building / "pretraining.json").write_text(json.dumps(record, indent=1))
    template = (files("medctkit") / "assets" / "model_card.md").read_text(encoding="utf-8")
    card = template.format(parameters=run.model.num_parameters(), **config.record(), **record)
    (building / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(output_dir, ignore_errors=True)
    os.replace(building, output_dir)
    return record
