"""Studies of a manifest as several models see them: what a case browser shows, without the widget.

Every volume is prepared once and embedded once for each model; probabilities, and the scores of any sentence, then take
milliseconds. With a folder, both are kept there, so that the next browser starts at once.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from medctkit.cohort.cache import content_of, key_of
from medctkit.cohort.dataset import CTReportDataset, labels_of
from medctkit.cohort.manifest import has_file, load_manifest, study_from_row, validate_manifest, volume_from_row
from medctkit.common.digests import digest_of_facts
from medctkit.common.text import counted
from medctkit.findings import FACTS, FINDINGS
from medctkit.scans.preprocessing import PreprocessConfig
from medctkit.scans.volumes import CTVolume
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier
from medctkit.zero_shot.embeddings import describe, load_embeddings, save_embeddings
from medctkit.zero_shot.prompts import Prompts

VIEW_SHAPE = (80, 160, 160)  # voxels at which a phantom is made to be looked at
PRESENCE = ("any", "present", "absent", "unknown")
EMPTY_WORDS = frozenset(
    "a an and are at has have in is it no not of on or present seen the there to with without".split()
)


@dataclass(frozen=True)
class Sentence:
    """A sentence scored against all studies."""

    what: str  # "probability" of the sentence against its negation, else "cosine" of sentence and volume
    values: dict[str, np.ndarray]  # for each model (n,); NaN for studies that could not be read
    tokens: tuple[str, ...]  # what the text encoder reads of it: a word it has not learned falls into pieces
    unknown: tuple[str, ...] = ()  # words of it and of its negation that are not in the model's vocabulary
    words: int = 0  # in both; neither counts those that carry no content, such as "there is no"

    def share_below(self, model: str, index: int) -> float:
        """Of the other studies, the share that a model finds less near to the sentence; NaN where none can be told."""
        values = self.values[model]
        others = np.delete(values, index)
        others = others[~np.isnan(others)]
        known = len(others) and not np.isnan(values[index])
        return float((others < values[index]).mean()) if known else float("nan")


class Cases:
    """Embeddings, probabilities and labels of a manifest's studies.

    Args:
        manifest: rows as `load_manifest` gives them, or the path of a manifest.
        models: a name for each `CTCLIPModel`, with or without an adapter, such as {"base": ..., "adapted": ...}.
        tokenizer: of their text encoders.
        preprocess_config: what the models see.
        cache_dir: folder for prepared volumes, and in it `embeddings`; None: nothing is kept.
        limit: only the first so many rows.
        prompts: of the 18 probabilities; see `ZeroShotClassifier`.

    Attributes:
        rows: one dict for each study.
        labels: (n, 18); NaN where unknown.
        embeddings: for each model (n, p); NaN before `embed`, and for studies in `failures`.
        failures: for each study that could not be read or prepared, why.

    Raises:
        TypeError: models that are not a dict.
        ValueError: a wrong manifest, no models, a model of another input size; see `ZeroShotClassifier`.
        FileNotFoundError: no manifest at that path.
    """

    def __init__(
        self,
        manifest: pd.DataFrame | str | os.PathLike,
        models: Mapping[str, Any],
        tokenizer: Any,
        preprocess_config: PreprocessConfig,
        cache_dir: str | os.PathLike | None = None,
        limit: int | None = None,
        prompts: Prompts = "paper",
    ):
        if not isinstance(models, Mapping) or not models:
            raise TypeError(f"models: expected a dict such as {{'base': model}}, got {models!r:.80}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit}: expected at least 1 study, or None for all")
        for name, model in models.items():
            sees, made = model.preprocess_config.shape, preprocess_config.shape
            if sees != made:
                raise ValueError(f"model {name!r} sees volumes of {sees} voxels, not {made}; use its preprocess_config")
        self.models, self.tokenizer = dict(models), tokenizer
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.failures: dict[str, str] = {}
        table = load_manifest(manifest) if isinstance(manifest, str | os.PathLike) else validate_manifest(manifest)
        self.dataset = CTReportDataset(table[:limit], preprocess_config, cache_dir)
        self.rows = self.dataset.rows
        self.labels = labels_of(self.rows)
        self.classifiers = {name: ZeroShotClassifier(model, tokenizer, prompts) for name, model in models.items()}
        self._made_of = {name: describe(model, preprocess_config) for name, model in models.items()}
        self._keys = [self._key(row) for row in self.rows]
        self.embeddings: dict[str, torch.Tensor] = {}
        for name, model in models.items():
            kept, none = self._kept(name), torch.full((model.config.projection_dim,), torch.nan)
            self.embeddings[name] = torch.stack([kept.get(key, none) for key in self._keys])

    # --- embedding ---

    def _key(self, row: dict) -> str:
        """The study's content and how it is read; "" if its file is not there, which `embed` will say."""
        try:
            row["checksum"] = content_of(row)  # so that its file is hashed once
        except OSError:
            return ""
        return key_of(row, row["checksum"], self.dataset.config)

    def _file(self, name: str) -> Path:
        assert self.cache_dir is not None
        return self.cache_dir / "embeddings" / f"{digest_of_facts(self._made_of[name] | FACTS)}.safetensors"

    def _kept(self, name: str) -> dict[str, torch.Tensor]:
        """Embeddings of a model that are on disk, of other browsers' studies too, by the key of their study."""
        if self.cache_dir is None or not self._file(name).is_file():
            return {}
        kept = load_embeddings(self._file(name), self._made_of[name])
        return dict(zip(kept.studies.tolist(), kept.embeddings, strict=True))

    def _keep(self) -> None:
        """Add to the files what they lack."""
        if self.cache_dir is None:
            return
        for name, found in self.embeddings.items():
            of_key = self._kept(name)
            before = len(of_key)
            of_key |= {key: found[i] for i, key in enumerate(self._keys) if key and not found[i].isnan().any()}
            if len(of_key) > before:
                unknown = np.full((len(of_key), len(FINDINGS)), np.nan)
                keys = np.array(list(of_key))
                embedded = Embedded(torch.stack(list(of_key.values())), unknown, keys, keys)
                save_embeddings(embedded, self._file(name), self._made_of[name])

    def _left(self) -> dict[str, list[int]]:
        """For each model the studies without an embedding."""
        return {name: found.isnan().any(1).nonzero()[:, 0].tolist() for name, found in self.embeddings.items()}

    def cost(self) -> str:
        """What `embed` will have to do, in a sentence."""
        left = self._left()
        n, todo = len(self.rows), set().union(*left.values())
        cache = self.dataset.cache
        unprepared = sum(cache is None or not self._keys[i] or not cache.has(self._keys[i]) for i in todo)
        return (
            f"{n:,} {'study' if n == 1 else 'studies'}, {counted(self.models, 'model')} ({', '.join(self.models)}): "
            f"{sum(map(len, left.values())):,} of {n * len(self.models):,} embeddings are to be computed, "
            f"{counted(range(unprepared), 'volume')} to be prepared first"
        )

    def embed(self, batch_size: int = 8) -> None:
        """Embed what is left, `batch_size` volumes in memory at a time. Interrupted, the same call goes on."""
        left = self._left()
        todo = sorted(set().union(*left.values()))
        try:
            with tqdm(total=len(todo), desc="studies", unit="study", disable=not todo) as bar:
                for start in range(0, len(todo), batch_size):
                    self._embed_some(todo[start : start + batch_size], left)
                    bar.update(len(todo[start : start + batch_size]))
        finally:
            self._keep()

    def _embed_some(self, indices: Sequence[int], left: Mapping[str, Sequence[int]]) -> None:
        items = {}
        for i in indices:
            study = self.rows[i]["study"]
            self.failures.pop(study, None)
            try:
                items[i] = self.dataset[i]
            except (OSError, ValueError) as error:  # one bad file does not cost the others
                self.failures[study] = str(error)
        for name, classifier in self.classifiers.items():
            if mine := [i for i in items if i in left[name]]:
                seen = classifier.embed([items[i] for i in mine], len(mine), progress=False)
                self.embeddings[name][mine] = seen.embeddings

    # --- what is shown ---

    @property
    def probabilities(self) -> dict[str, np.ndarray]:
        """For each model (n, 18); NaN for studies in `failures`."""
        return {name: _scores(classifier, self.embeddings[name]) for name, classifier in self.classifiers.items()}

    @property
    def sortings(self) -> tuple[str, ...]:
        """What `ordered` sorts by."""
        return ("disagreement", *(f"error of {name}" for name in self.models), "study")

    def ordered(self, by: str = "disagreement", finding: str | None = None, presence: str = "any") -> pd.Series:
        """Studies that a filter lets through, in order: the value sorted by, on the index of the row.

        Args:
            by: "disagreement", the mean over findings of the models' largest minus smallest probability, largest first;
                "error of NAME", the mean over known labels of |probability - label| of that model, largest first;
                "study", by name (the value is the disagreement). NaN, of what could not be read, comes last.
            finding: takes disagreement and error of this finding alone; None: of all.
            presence: keeps studies whose label of the finding is "present", "absent" or "unknown"; "any" keeps all.

        Raises:
            ValueError: an unknown `by`, finding or presence; a presence without a finding.
        """
        known = {"by": self.sortings, "finding": (None, *FINDINGS), "presence": PRESENCE}
        for name, value in {"by": by, "finding": finding, "presence": presence}.items():
            if value not in known[name]:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(str, known[name]))}")
        if finding is None and presence != "any":
            raise ValueError(f"presence={presence!r} needs a finding: present, absent or unknown is the label of one")
        columns = [k for k, name in enumerate(FINDINGS) if finding in (name, None)]
        if by.startswith("error of "):
            values = np.abs(self.probabilities[by.removeprefix("error of ")] - self.labels)
        else:
            values = np.ptp(np.stack(list(self.probabilities.values())), axis=0)
        # over a data frame, because a mean over no known label is NaN there, without a warning
        found = pd.DataFrame(values)[columns].mean(axis=1)
        if presence != "any":
            label = self.labels[:, columns[0]]
            found = found[{"present": label == 1, "absent": label == 0, "unknown": np.isnan(label)}[presence]]
        if by == "study":
            return found.loc[sorted(found.index, key=lambda i: self.rows[i]["study"])]
        return found.sort_values(ascending=False, na_position="last", kind="stable")

    def score(self, stating: str, denying: str = "") -> Sentence:
        """Score any sentence against all studies, with its negation or ("") without.

        Raises:
            ValueError: no sentence, or one that is longer than the text encoder takes.
        """
        stating, denying = stating.strip(), denying.strip()
        if not stating:
            raise ValueError("type a sentence, for example: There is a nodule in the right upper lobe.")
        values = {}
        for name, model in self.models.items():
            pair = {"sentence": ([stating], [denying or stating])}
            classifier = ZeroShotClassifier(model, self.tokenizer, pair, findings=("sentence",))
            embeds = self.embeddings[name]
            if denying:
                values[name] = _scores(classifier, embeds)[:, 0]
            else:
                values[name] = (embeds.to(classifier.device) @ classifier.text_embeds()[0, 0]).cpu().numpy()
        what = "probability" if denying else "cosine"
        words = [word for word in re.findall(r"\w+", f"{stating} {denying}") if word.lower() not in EMPTY_WORDS]
        pieces, none = {word: self.tokenizer.tokenize(word) for word in words}, self.tokenizer.unk_token
        unknown = tuple(word for word, of_word in pieces.items() if len(of_word) != 1 or of_word == [none])
        return Sentence(what, values, tuple(self.tokenizer.tokenize(stating)), unknown, len(pieces))

    def view(self, index: int) -> tuple[CTVolume, dict[str, np.ndarray]]:
        """A study to look at: a phantom, made again at `VIEW_SHAPE`, with its masks (d, h, w); a real scan without."""
        row = self.rows[index]
        if has_file(row):
            return volume_from_row(row), {}
        study = study_from_row(row, VIEW_SHAPE)
        return study.volume, study.masks


def _scores(classifier: ZeroShotClassifier, embeds: torch.Tensor) -> np.ndarray:
    """Probabilities (n, k); NaN where there is no embedding (n, p)."""
    scores = np.full((len(embeds), len(classifier.findings)), np.nan, np.float32)
    known = ~embeds.isnan().any(1)
    scores[known.cpu().numpy()] = classifier.scores_from_embeddings(embeds[known])
    return scores
