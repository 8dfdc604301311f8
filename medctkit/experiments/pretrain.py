"""Makes the mini base model that the kit ships: a small CT-CLIP, pretrained on source-hospital phantoms.

`medctkit pretrain` runs it all: a pool of phantom studies, a vocabulary from their reports, a warm start of each
tower (`warm_start`), contrastive pretraining with the codebook learnt on the way, whose vision encoder the projection
and the text encoder then follow anew, a score on a validation pool, and the model card. As CT-CLIP it learns from
volumes and their reports alone: no loss sees a label, and no report holds a prompt of the evaluation.
"""

import json
import os
import shutil
import string
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from medctkit.common.atomic import replacing, write_text
from medctkit.common.processes import accelerator_for, worker_pool
from medctkit.common.provenance import made_with
from medctkit.experiments.warm_start import SHARPNESS, WarmStart, align, common_phrases, descend, reconstruct
from medctkit.findings import CT_RATE, refuse_other_findings
from medctkit.metrics.scores import mean_auroc
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.model.fingerprint import vocabulary_of
from medctkit.phantom.registry import REGISTRY
from medctkit.phantom.report_text import write_report
from medctkit.phantom.study import generate, named_rng
from medctkit.scans.preprocessing import moved_by, preprocess
from medctkit.training.batches import studies_of
from medctkit.training.gradients import seed_from
from medctkit.training.objectives import contrastive_loss, sentence_loss
from medctkit.training.report_sentences import contrary, phrases_of, sentences_of
from medctkit.zero_shot.classifier import ZeroShotClassifier, evaluating
from medctkit.zero_shot.reference import write_reference

CHUNK = 250
SECONDS_A_STUDY = 0.2  # to draw it, on one core
_COUNTS = ("step", "history", "seconds")  # of a run, beside its tensors
FIRST_SEED = 1_000_000  # seeds of the pool; the patients are named by them
SHAPE = (64, 96, 96)  # of the phantoms and of the model's input
SHIFT = (8, 3, 3)  # voxels by which a volume is moved at most: 40 mm along the body, 11 mm across

MINI_VISION = dict(
    dim=96, codebook_size=2048, image_size=96, num_frames=64, patch_size=8,
    temporal_patch_size=8, spatial_depth=2, temporal_depth=2, dim_head=24, heads=4,
    windows=[[-1000, 1000], [-1000, -700], [-160, 240], [200, 1000]],  # all, lung, soft tissue, bone and calcium
)  # fmt: skip
MINI_TEXT = dict(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
    max_position_embeddings=192, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
)  # fmt: skip
MINI_PROJECTION = 96
RECORD = "pretraining.json"
MINI_SPACING = (5.0, 3.75, 3.75)  # mm


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of the pretraining; the defaults made the model that is shipped.

    Args:
        studies: phantom studies to learn from.
        validation_studies: further studies to score on. They chose this batch size and rate, before 32 and 5e-4.
        warm: of the warm start.
        steps: optimiser steps.
        align_every: steps after which projection and text encoder are aligned anew, as at the start and the end.
        batch_size: volumes per step.
        learning_rate: that of most steps; the image projection's is smaller by its number of inputs.
        text_share: of that rate, for the text encoder, its projection and the map to phrases.
        warmup_steps: in which it rises.
        decay_fraction: share of all steps, the last ones, in which it falls to zero.
        weight_decay: AdamW's, of matrices.
        max_grad_norm: longer gradients are scaled down to this norm.
        report_weight: of the contrast between volumes and whole reports.
        sentence_weight: of the contrast between volumes and single sentences, see `sentence_loss`.
        phrase_weight: of the cross-entropy of each phrase that the report may have, told by a linear map from the image
            embedding, which is thrown away afterwards.
        swapped_words: share of the words of a text that are swapped for any others in training, so that a sentence
            means the same to it in words that no report has.
        codebook_decay: of the moving averages that follow the tokens.
        vocabulary: words, at most.
        evaluate_every: steps between scores, and between checkpoints from which an interrupted run goes on.
        seed: of weights, batches and wordings.
    """

    studies: int = 4_250
    validation_studies: int = 500
    warm: WarmStart = WarmStart()
    steps: int = 300
    align_every: int = 150
    batch_size: int = 64
    learning_rate: float = 7e-4
    text_share: float = 0.1
    warmup_steps: int = 20
    decay_fraction: float = 0.4
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    report_weight: float = 1.0
    sentence_weight: float = 1.0
    phrase_weight: float = 0.1
    swapped_words: float = 0.15
    codebook_decay: float = 0.97
    vocabulary: int = 1200
    evaluate_every: int = 50
    seed: int = 0


DEFAULT = PretrainConfig()


def _make_chunk(task: tuple[int, Path]) -> None:
    """Draw one chunk of the pool: volumes as model input times 1,000, int16, and beside them what reports need."""
    index, folder = task
    seeds = range(FIRST_SEED + index * CHUNK, FIRST_SEED + (index + 1) * CHUNK)
    config = CTCLIPConfig(MINI_VISION, spacing=MINI_SPACING).preprocess_config
    volumes, facts = np.empty((CHUNK, 1, *SHAPE), np.int16), []
    for i, seed in enumerate(seeds):
        study = generate(seed, "source", shape=SHAPE)
        volumes[i] = (preprocess(study.volume, config) * 1000).round().numpy()
        facts.append({"labels": study.labels, "details": study.details, "contrast": study.contrast})
    write_text(folder / f"chunk_{index:04d}.json", json.dumps(facts))
    with replacing(folder / f"chunk_{index:04d}.npy") as temporary, temporary.open("wb") as file:
        np.save(file, volumes)


def make_pool(studies: int, folder: Path) -> list[Path]:
    """Draw the pool of studies, in chunks of 250; chunks that are there are kept."""
    from tqdm.auto import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"chunk_{i:04d}.npy" for i in range(-(-studies // CHUNK))]
    missing = [(i, folder) for i, path in enumerate(paths) if not path.exists()]
    workers = os.cpu_count() or 1
    if missing:
        minutes = len(missing) * CHUNK * SECONDS_A_STUDY / workers / 60
        gigabytes = len(missing) * CHUNK * np.prod(SHAPE) * 2e-9
        print(
            f"drawing {len(missing) * CHUNK:,} phantom studies, about {minutes:.0f} min on {workers} cores, "
            f"{gigabytes:.1f} GB in {folder}",
            flush=True,
        )
        with worker_pool(workers) as pool:
            for _ in tqdm(pool.map(_make_chunk, missing), total=len(missing), desc="phantoms", unit="chunk"):
                pass
    return paths


class Pool:
    """Studies of the pool: their volumes, on disk or all of them on a GPU, and what their reports are worded from."""

    def __init__(self, paths: list[Path]):
        device = accelerator_for().device
        self.parts = [torch.from_numpy(np.load(path, mmap_mode="c")).to(device) for path in paths]
        self.facts = [fact for path in paths for fact in json.loads(path.with_suffix(".json").read_text())]

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def labels(self) -> np.ndarray:
        """(n, 18), 0 or 1; for scores, never for a loss."""
        return np.array([[fact["labels"][f] for f in CT_RATE] for fact in self.facts])

    def pixels(self, index: Iterable[int]) -> torch.Tensor:
        """Model input (b, 1, d, h, w)."""
        return torch.stack([self.parts[i // CHUNK][i % CHUNK] for i in index]).float().div_(1000)

    def report(self, index: int, wording: int) -> str:
        """A report of study `index`; each `wording` words it anew."""
        return _report(self.facts[index], index, wording)


def _report(fact: dict, index: int, wording: int) -> str:
    rng = named_rng("pool report", index, wording)
    return write_report(fact["labels"], fact["details"], "source", rng, REGISTRY, fact["contrast"])


@dataclass(frozen=True)
class Reader:
    """What a step needs of the reports of its studies, as tensors.

    Args:
        facts: of each study, from which its reports are worded.
        tokenizer: of the text encoder.
        phrases: those that reports are asked for.
    """

    facts: Sequence[dict]
    tokenizer: Any
    phrases: Sequence[str]

    def ids(self, texts: list[str]) -> torch.Tensor:
        """Token ids (n, longest) of texts, padded."""
        return self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]

    def __call__(self, batch: tuple[list[int], int]) -> dict[str, Any]:
        """Of a batch, the `index` of its studies and their wording.

        Returns:
            `index`; token ids of its `reports`, and of their `sentences` (2 s, longest), each once, and then of their
            contraries; `said` (b, s), which report holds which sentence; `has` (b, phrases), which has which phrase.
        """
        index, wording = batch
        reports = [_report(self.facts[i], i, wording) for i in index]
        found = [sentences_of(report) for report in reports]
        sentences = sorted({sentence for each in found for sentence in each})
        place = {sentence: k for k, sentence in enumerate(sentences)}
        column = {phrase: k for k, phrase in enumerate(self.phrases)}
        said, has = torch.zeros(len(index), len(sentences)), torch.zeros(len(index), len(column))
        for row, (report, each) in enumerate(zip(reports, found, strict=True)):
            said[row, [place[sentence] for sentence in each]] = 1
            has[row, [column[phrase] for phrase in phrases_of(report) if phrase in column]] = 1
        both = self.ids([*sentences, *map(contrary, sentences)])
        return {"index": index, "reports": self.ids(reports), "sentences": both, "said": said, "has": has}


def make_tokenizer(reports: Iterable[str], size: int, folder: Path) -> Any:
    """Make a vocabulary of the commonest words of reports and save it as a BERT tokenizer in `folder`.

    A word that it lacks is spelt: all ASCII characters are in it, at the start of a word and inside.
    """
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]

    normalise, cut = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts = Counter(w for r in reports for w, _ in cut.pre_tokenize_str(normalise.normalize_str(r)))
    characters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    start = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    start += [f"##{c}" for c in string.ascii_lowercase + string.digits]
    words = sorted((w for w, n in counts.items() if n > 1 and len(w) > 1), key=lambda w: (-counts[w], w))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "vocab.txt", "\n".join([*start, *words[: size - len(start)]]) + "\n")
    tokenizer = BertTokenizerFast(
        vocab=str(folder / "vocab.txt"), do_lower_case=True, model_max_length=MINI_TEXT["max_position_embeddings"]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


class CodebookLearner:
    """Learns the codebook while the model trains.

    Until `start` the quantiser is bypassed. Then k-means on the tokens of some volumes sets the codes, and
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
        self.counts, self.sums = torch.ones_like(self.codes[0, :, 0]), self.codes[0].clone()

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.vq.training:
            self.tokens = F.normalize(x.detach().reshape(-1, x.shape[-1]), dim=-1)  # (n, c)
        return self.quantised_forward(x) if self.started else F.normalize(x, dim=-1)

    @torch.no_grad()
    def start(self, vision: torch.nn.Module, batches: Iterable[torch.Tensor], rounds: int = 12) -> None:
        """Set the codes by spherical k-means on the tokens of volumes and switch the quantiser on."""
        k, seen = self.codes.shape[1], []
        for volumes in batches:
            vision(volumes)
            seen.append(self.tokens)
        self.tokens = torch.cat(seen)
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
        counts, sums, self.started, generator = state
        self.counts, self.sums = counts.to(self.codes), sums.to(self.codes)
        self.generator.set_state(generator)

    def finish(self) -> float:
        """Give the quantiser back as it was; returns the share of codes in use."""
        self.vq.forward = self.quantised_forward
        return float((self.counts >= 1).float().mean())


@torch.no_grad()
def scores_of(model: CTCLIPModel, tokenizer: Any, pool: Pool) -> np.ndarray:
    """Zero-shot scores (n, 18) of a pool."""
    with evaluating(model):
        parts = torch.arange(len(pool)).split(25)
        embeds = torch.cat([model.encode_image(pool.pixels(part.tolist())) for part in parts])
    return ZeroShotClassifier(model, tokenizer).scores_from_embeddings(embeds)


def score(run: "Pretraining", pool: Pool) -> float:
    """Mean zero-shot AUROC over the 18 findings on a pool."""
    return mean_auroc(pool.labels, scores_of(run.model, run.tokenizer, pool))


def moved(volumes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move each volume (b, 1, d, h, w) by up to `SHIFT` voxels; what comes in is air."""
    moves = [[int(torch.randint(-n, n + 1, (), generator=generator)) for n in SHIFT] for _ in volumes]
    return torch.stack([moved_by(volume, by) for volume, by in zip(volumes, moves, strict=True)])


class Pretraining:
    """A pretraining run: all that a checkpoint has to bring back. What a step sees follows from seed and step."""

    def __init__(self, config: PretrainConfig, tokenizer: Any, train: Pool):
        torch.manual_seed(config.seed)
        text = MINI_TEXT | {"vocab_size": len(tokenizer)}
        self.config, self.tokenizer, self.train, self.device = config, tokenizer, train, accelerator_for().device
        self.model = CTCLIPModel(CTCLIPConfig(MINI_VISION, text, MINI_PROJECTION, spacing=MINI_SPACING)).to(self.device)
        phrases = common_phrases((train.report(i, 0) for i in range(len(train))), config.warm.phrases)
        self.reader = Reader(train.facts, tokenizer, list(phrases))
        self.head = torch.nn.Linear(MINI_PROJECTION, len(phrases), device=self.device)
        torch.nn.init.zeros_(self.head.weight)
        self.head.bias.data.copy_(torch.tensor(list(phrases.values())).logit())
        torch.nn.init.constant_(self.model.temperature, 2.3)  # cosines times 10: CLIP starts at 14
        self.codebook = CodebookLearner(self.model, config.codebook_decay, config.seed)
        # AdamW moves each number by about the rate, so that a layer's output moves by the rate times its inputs: the
        # projection has 144 times those of the other layers, and gets a rate so much smaller (Yang et al. 2022, arXiv
        # 2203.03466). Text encoder and map to phrases have been trained to the end on images that change now.
        wide = self.model.to_visual_latent.weight
        slow = [*self.model.text_encoder.parameters(), *self.model.to_text_latent.parameters(), *self.head.parameters()]
        share = dict.fromkeys(slow, config.text_share) | {wide: MINI_VISION["dim"] / wide.shape[1]}
        alike: dict[tuple, list] = {}
        for p in (*self.model.parameters(), *self.head.parameters()):
            alike.setdefault((share.get(p, 1.0), config.weight_decay * (p.ndim > 1)), []).append(p)
        groups = [{"params": params, "share": of, "weight_decay": decay} for (of, decay), params in alike.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, p) of token ids, in training with some words swapped (Wei and Zou 2019, arXiv 1901.11196)."""
        special, mask = len(self.tokenizer.all_special_ids), (ids != self.tokenizer.pad_token_id).long()
        if self.model.training:
            swapped = (ids >= special) & (torch.rand(ids.shape, device=ids.device) < self.config.swapped_words)
            ids = torch.where(swapped, torch.randint_like(ids, special, len(self.tokenizer)), ids)
        return self.model.encode_text(ids, mask)

    def batch(self, step: int) -> tuple[list[int], int]:
        """The studies of a step, and the epoch, which words their reports."""
        return studies_of(step, len(self.train), self.config.batch_size, self.config.seed)

    def generator(self, *key: Any) -> torch.Generator:
        """A source of randomness for a purpose."""
        return torch.Generator().manual_seed(seed_from(self.config.seed, *key))

    def moved(self, index: list[int], generator: torch.Generator) -> torch.Tensor:
        """The volumes of studies (b, 1, d, h, w), each moved a little."""
        return moved(self.train.pixels(index), generator)

    def reading(self, batches: Sequence[tuple[list[int], int]]) -> Iterator[dict[str, Any]]:
        """What the reader says of each batch; for a GPU, which would wait for it, other processes read ahead."""
        ahead = 0 if self.device.type == "cpu" else min(len(batches), (os.cpu_count() or 1) - 1, 12)
        for texts in DataLoader(batches, batch_size=None, collate_fn=self.reader, num_workers=ahead):  # type: ignore
            yield {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in texts.items()}

    def sentence_loss(self, images: torch.Tensor, texts: dict[str, Any]) -> torch.Tensor:
        """Contrast of image embeddings (b, p) with the sentences of their reports."""
        stated, denied = self.embed(texts["sentences"]).chunk(2)
        return sentence_loss(images, stated, denied, texts["said"], self.model.temperature)

    def phrase_loss(self, images: torch.Tensor, texts: dict[str, Any]) -> torch.Tensor:
        """Cross-entropy of the reports' phrases told from image embeddings (b, p); summed over phrases, mean over b."""
        told = self.head(SHARPNESS * images)
        return F.binary_cross_entropy_with_logits(told, texts["has"], reduction="sum") / len(images)

    def losses(self, texts: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The contrast of a batch with whole reports and with their sentences, and their phrases."""
        images = self.model.encode_image(self.moved(texts["index"], generator))
        losses = {
            "reports": contrastive_loss(images, self.embed(texts["reports"]), self.model.temperature),
            "sentences": self.sentence_loss(images, texts),
            "phrases": self.phrase_loss(images, texts),
        }
        weights = (self.config.report_weight, self.config.sentence_weight, self.config.phrase_weight)
        return losses | {"loss": torch.stack([w * x for w, x in zip(weights, losses.values(), strict=True)]).sum()}

    def advance(self, texts: dict[str, Any]) -> dict[str, float]:
        """One optimiser step on the texts of its `batch`; returns its losses."""
        config, started = self.config, time.perf_counter()
        self.step += 1
        torch.manual_seed(seed_from(config.seed, "dropout", self.step))
        left = (config.steps - self.step + 1) / (config.decay_fraction * config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * group["share"] * min(1.0, self.step / config.warmup_steps, left)
        self.model.train()
        losses = self.losses(texts, self.generator("moves", self.step))
        descend(self.optimizer, losses["loss"], config.max_grad_norm)
        self.codebook.update()
        self.seconds += time.perf_counter() - started
        return {"step": self.step, **{name: value.item() for name, value in losses.items()}}

    def timed(self, work: Callable[["Pretraining"], None]) -> None:
        """Do a part of the run that is not a step, and count its time."""
        started = time.perf_counter()
        work(self)
        self.seconds += time.perf_counter() - started

    def write(self, path: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all; it knows the run's settings."""
        with replacing(path) as temporary:
            torch.save(state | {"config": asdict(self.config)}, temporary)

    def read(self, path: Path) -> dict[str, Any]:
        """What `write` wrote; of a run with other settings it is refused."""
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["config"] != asdict(self.config):
            raise ValueError(f"{path} is of a run with other settings: {state['config']}. Move it away to start anew")
        return state

    def save(self, path: Path) -> None:
        """Write a checkpoint to go on from."""
        state = {name: getattr(self, name) for name in _COUNTS}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.write(path, state | {"head": self.head.state_dict(), "codebook": self.codebook.state()})

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = self.read(path)
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.codebook.load(state["codebook"])
        for name in _COUNTS:
            setattr(self, name, state[name])


def pretrain(output_dir: str | os.PathLike, pool_dir: str | os.PathLike, config: PretrainConfig = DEFAULT) -> dict:
    """Make the mini base model: weights, vocabulary, training record and model card in `output_dir`.

    `output_dir` is written only when the model is complete; `pool_dir` is for generated studies (1.2 MB each) and the
    checkpoint that an interrupted run resumes from. Returns the training record, also written as `pretraining.json`.

    Raises:
        ValueError: the checkpoint in `pool_dir` was made with other settings; findings other than CT-RATE's are in use;
            `output_dir` holds something else than a model that was made so.
    """
    from tqdm.auto import tqdm

    refuse_other_findings("phantoms, of which the mini model learns")
    pool_dir, output_dir = Path(pool_dir).expanduser(), Path(output_dir).expanduser()
    refuse_other_folder(output_dir)
    paths = make_pool(config.studies + config.validation_studies, pool_dir)
    split = -(-config.validation_studies // CHUNK)
    train, valid = Pool(paths[:-split]), Pool(paths[-split:])
    reports = (train.report(i, 0) for i in range(len(train)))
    run = Pretraining(config, make_tokenizer(reports, config.vocabulary, pool_dir / "tokenizer"), train)
    checkpoint = pool_dir / "checkpoint.pt"
    if checkpoint.exists():
        run.resume(checkpoint)
    else:
        reconstruct(run, pool_dir / "reconstruction.pt")
        run.timed(align)
        run.history.append({"step": 0, "auroc": score(run, valid), "seconds": run.seconds})
        run.save(checkpoint)
        (pool_dir / "reconstruction.pt").unlink(missing_ok=True)
        print(json.dumps(run.history[-1]), flush=True)
    bar = tqdm(initial=run.step, total=config.steps, desc="pretraining", unit="step")
    ahead = run.reading([run.batch(step) for step in range(run.step + 1, config.steps + 1)])
    for step, texts in enumerate(ahead, run.step + 1):
        row = run.advance(texts)
        run.history.append(row)
        if step % config.align_every == 0 or step == config.steps:
            run.timed(align)
        if step % config.evaluate_every == 0 or step == config.steps:
            row |= {"auroc": score(run, valid), "seconds": run.seconds}
            bar.write(json.dumps(row))
            run.save(checkpoint)
        bar.update()
        bar.set_postfix(loss=f"{row['loss']:.3f}")
    bar.close()
    return write_model(run, valid, output_dir)


def refuse_other_folder(output_dir: Path) -> None:
    """Refuse a folder that a new model would replace, and that holds something else: a ValueError."""
    if output_dir.exists() and not (output_dir / RECORD).is_file() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} holds something else than a model of `medctkit pretrain`; give another folder")


def write_model(run: Pretraining, valid: Pool, output_dir: Path) -> dict:
    """Write what a run has made, whole or not at all; returns the training record."""
    refuse_other_folder(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as scratch:
        record = _write_model(run, valid, building := Path(scratch) / "model")
        shutil.rmtree(output_dir, ignore_errors=True)
        os.replace(building, output_dir)
    return record


def _write_model(run: Pretraining, valid: Pool, building: Path) -> dict:
    codes_in_use = run.codebook.finish()
    run.model.eval()
    run.model.config.vocabulary = vocabulary_of(run.tokenizer)
    run.model.save_pretrained(building)
    run.tokenizer.save_pretrained(building)
    of = f"{len(valid)} validation phantoms of the source hospital"
    write_reference(building, run.model, run.tokenizer, scores_of(run.model, run.tokenizer, valid), of)
    made = made_with(run.config.seed)
    record = {
        "command": "medctkit pretrain",
        "config": asdict(run.config),
        "minutes": round(run.seconds / 60, 1),
        **{key: made[key] for key in ("device", "versions")},
        "codes_in_use": round(codes_in_use, 3),
        "validation_auroc": run.history[-1]["auroc"],
        "history": [row for row in run.history if "auroc" in row],
    }
    (building / RECORD).write_text(json.dumps(record, indent=1))
    template = (files("medctkit") / "assets" / "model_card.md").read_text(encoding="utf-8")
    card = template.format(parameters=run.model.num_parameters(), **asdict(run.config), **record)
    (building / "README.md").write_text(card, encoding="utf-8")
    return record
