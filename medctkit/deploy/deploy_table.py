"""What each way to deploy an adapted model costs, and what it changes: a gate before anything is shipped.

All variants are compared with the model as PyTorch runs it, base and adapter in float32. Thresholds are those that it
gets on validation studies; changes are counted on test studies; nothing is tuned on either. Each variant runs in a
process of its own, in turns with the base, so that what else the machine does meets both; of the times, the least.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from medctkit.cohort.dataset import CTReportDataset, labels_of
from medctkit.common.atomic import alone, replacing
from medctkit.common.digests import digest_of_facts
from medctkit.common.kept import kept
from medctkit.common.provenance import made_with, write_json
from medctkit.deploy.export import export, write_facts
from medctkit.deploy.exported import FACTS, Exported
from medctkit.deploy.quantise import KINDS, quantise
from medctkit.deploy.trial import Variant, outputs, peak_bytes, seconds, trial
from medctkit.lora.adapter import merge_lora
from medctkit.lora.methods import load_trained
from medctkit.metrics.bootstrap import RESAMPLES
from medctkit.metrics.scores import compare, thresholds_from_validation
from medctkit.model.base_model import BaseModel
from medctkit.model.fingerprint import digests
from medctkit.zero_shot.classifier import ZeroShotClassifier
from medctkit.zero_shot.prompts import Prompts

BASE, BATCHES, ROUNDS = "eager float32", (1, 16), 7


@dataclass(frozen=True)
class Limits:
    """What a variant may change before it is marked "do not ship": a choice, state your own."""

    auroc: float = 0.005  # loss of the mean AUROC, at the lower end of its paired 95 % interval
    finding: float = 0.02  # loss of AUROC of the finding that loses most
    score: float = 0.1  # change of any single score; this takes it to another bin of the calibration error
    answers: float = 0.01  # share of answers, yes or no at the thresholds, that become others
    slower: float = 1.5  # times the milliseconds of the base at batch 1

    def broken(self, row: Mapping[str, Any]) -> list[str]:
        """What a row of the table falls through, in words; a change that is not known falls through too."""
        held = {
            f"mean AUROC may lose more than {self.auroc:g}": row["auroc_low"] >= -self.auroc,
            f"a finding loses more than {self.finding:g}": row["finding_change"] >= -self.finding,
            f"a score changes by more than {self.score:g}": row["score"] <= self.score,
            f"more than {self.answers:.0%} of the answers flip": row["answers"] <= self.answers,
            f"more than {self.slower:g} times slower": row["ratio_1"] <= self.slower,
        }
        return [said for said, fine in held.items() if not fine]


def deploy_table(
    base: BaseModel,
    adapter: str | os.PathLike,
    valid: CTReportDataset,
    test: CTReportDataset,
    folder: str | os.PathLike,
    limits: Limits = Limits(),
    prompts: Prompts = "paper",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Build every variant, measure it, and leave in `folder` table.csv, table.json and the exports that pass `limits`.

    Interrupted, the same call goes on: what was measured of the same model and studies is not measured again. The
    `base` is fresh, the `adapter` what `save_trained` wrote; `valid` studies give the thresholds, `test` studies the
    changes, with intervals from `resamples` of the patients, drawn by `seed`. For `prompts` see `ZeroShotClassifier`.

    Returns:
        A row for each variant: `bytes` on disk; `ms_1`, `ms_16`, milliseconds a volume at these batches; `ratio_*` to
        the base; `peak_*`, bytes of memory; `codes`, share of tokens with another code; `auroc`, change of the mean
        AUROC, with _low and _high; `finding` that loses most and its `finding_change`; `score`, the largest change of
        one; `answers`, share that flips, of `asked`; `verdict`.

    Raises:
        ValueError, ImportError: see `export`.
    """
    folder, threads = Path(folder).expanduser(), torch.get_num_threads()
    with alone(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".models-") as scratch:
        model, variants = build(base, adapter, folder, scratch, prompts)
        classifier = ZeroShotClassifier(model, base.tokenizer, prompts)
        known = {"model": digests(model), "studies": [row["study"] for row in [*valid.rows, *test.rows]]}
        sample = _volumes(test, [i % len(test) for i in range(max(BATCHES))])
        total = len(valid) + len(test) * len(variants)
        with trial(variants[BASE], sample, threads) as own, tqdm(total=total, desc="measuring", unit="volume") as bar:

            def measured(name: str) -> dict[str, Any]:
                if name != BASE:
                    with trial(variants[name], sample, threads) as its:
                        return cost((own, its), variants[name]) | _outputs(its, test, bar)
                found = cost((own,), variants[name])
                minutes = found[f"ms_{max(BATCHES)}"] * total / 6e4
                bar.write(f"{total:,} volumes, {len(variants)} variants: {minutes:.0f} minutes if all are as quick")
                return found | {"valid": _outputs(own, valid, bar)["embeds"]} | _outputs(own, test, bar)

            found = {}
            for name in variants:
                key = digest_of_facts(known | {"variant": name, "threads": threads})
                found[name] = kept(_kept_in(folder, name), key, lambda: measured(name))  # noqa: B023
        scores = {name: classifier.scores_from_embeddings(one["embeds"]) for name, one in found.items()}
        on_valid = classifier.scores_from_embeddings(found[BASE]["valid"])
        thresholds, rows = thresholds_from_validation(labels_of(valid.rows), on_valid), {}
        for name, one in found.items():
            row = {key: value for key, value in one.items() if np.ndim(value) == 0}
            row["codes"] = float((one["codes"] != found[BASE]["codes"]).mean())
            row |= changes(test, scores[BASE], scores[name], thresholds, resamples, seed)
            broken = limits.broken(row)
            row["verdict"] = "base" if name == BASE else f"do not ship: {'; '.join(broken)}" if broken else "ship"
            rows[name] = row
            if broken and (folder / slug(name)).is_dir():
                shutil.rmtree(folder / slug(name))
            elif (folder / slug(name) / FACTS).is_file():
                measured_ = f"a score changes by up to {row['score']:.3f}, {row['answers']:.2%} of the answers flip"
                write_facts(folder / slug(name), Exported(folder / slug(name)).facts | {"measured": measured_})
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("variant")
        with replacing(folder / "table.csv") as temporary:
            table.to_csv(temporary)
        facts = {"studies": {"valid": len(valid), "test": len(test)}, "limits": asdict(limits)}
        write_json(facts | {"rows": rows, "made_with": made_with(seed)}, folder / "table.json")
        for name in found:
            _kept_in(folder, name).unlink(missing_ok=True)
        with suppress(OSError):  # there is something else in it
            (folder / "measured").rmdir()
    return table


def build(
    base: BaseModel, adapter: str | os.PathLike, folder: Path, scratch: str | os.PathLike, prompts: Prompts = "paper"
) -> tuple[Any, dict[str, Variant]]:
    """The adapted model, and every variant of it that can be made here: exports in `folder`, others in `scratch`."""
    own, merged, adapter = Path(scratch) / "base", Path(scratch) / "merged", Path(adapter).expanduser()
    base.model.save_pretrained(own)
    model = load_trained(base.model, adapter)
    merge_lora(model).save_pretrained(merged)
    onnx = export(model, base.tokenizer, folder / "onnx-float32", prompts)
    variants = {BASE: Variant(own, adapter), "merged float32": Variant(merged)}
    variants |= {"merged bf16": Variant(merged, bf16=True), "onnx float32": Variant(onnx)}
    for kind in KINDS:
        try:
            variants[kind] = Variant(quantise(onnx, folder / slug(kind), kind))
        except ImportError as error:
            print(f"{kind} is left out: {error}")
    return model, variants


def slug(name: str) -> str:
    """The name of a variant as that of a folder."""
    return name.replace(" ", "-")


def cost(trials: Sequence[Callable[..., Any]], variant: Variant, batches: Sequence[int] = BATCHES) -> dict[str, Any]:
    """Columns `bytes`, `ms_*`, `ratio_*`, `peak_*` of the variant in the last of `trials`; the first runs the base."""
    row: dict[str, Any] = {"bytes": variant.bytes}
    for batch in batches:
        taken = [[do(seconds, batch) for do in trials] for _ in range(ROUNDS + 1)][1:]  # the first warms up
        least = 1e3 / batch * np.min(taken, axis=0)
        row |= {f"ms_{batch}": float(least[-1]), f"ratio_{batch}": float(least[-1] / least[0])}
        row[f"peak_{batch}"] = trials[-1](peak_bytes)
    return row


def changes(
    test: CTReportDataset, before: np.ndarray, after: np.ndarray, thresholds: np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    """Columns `auroc` to `asked`, of scores (n, 18) `before` and `after` of the studies of `test`.

    The `thresholds` (18,) are the same for both: a hospital has set them before it gets the variant. The other
    arguments are those of `compare`.
    """
    patients = [row["patient"] for row in test.rows]
    table = compare(
        labels_of(test.rows), before, after, patients, thresholds, thresholds, resamples=resamples, seed=seed
    )
    of_findings = table["auroc"].drop("mean").fillna(np.inf)
    flips = (before >= thresholds) != (after >= thresholds)
    return {f"auroc{end}": float(table.loc["mean", f"auroc{end}"]) for end in ("", "_low", "_high")} | {
        "finding": of_findings.idxmin(),
        "finding_change": float(of_findings.min()),
        "score": float(np.abs(after - before).max()),
        "answers": float(flips.mean()),
        "asked": flips.size,
    }


def as_text(table: pd.DataFrame) -> str:
    """The table in Markdown, as `deploy_table` gives it, or only costs."""
    batches, rows = [name.removeprefix("ms_") for name in table if name.startswith("ms_")], table.to_dict("records")

    def each(column: str, form: str, unit: float = 1) -> list[str]:
        return [" / ".join(format(row[f"{column}_{batch}"] / unit, form) for batch in batches) for row in rows]

    shown = {
        "variant": list(table.index),
        "file, MB": [f"{row['bytes'] / 1e6:.2f}" for row in rows],
        "memory, MB": each("peak", ".0f", 1e6),
        "ms a volume": each("ms", ".1f"),
        "times the base": each("ratio", ".2f"),
    }
    if "verdict" in table:
        shown |= {
            "codes flipped": [f"{row['codes']:.1%}" for row in rows],
            "mean AUROC": ["{auroc:+.4f} ({auroc_low:+.4f} to {auroc_high:+.4f})".format_map(row) for row in rows],
            "worst finding": ["{finding_change:+.3f} {finding}".format_map(row) for row in rows],
            "largest change of a score": [f"{row['score']:.3f}" for row in rows],
            "answers that flip": [f"{row['answers'] * row['asked']:,.0f} of {row['asked']:,}" for row in rows],
            "": [row["verdict"] for row in rows],
        }
    lines = [shown, ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _volumes(dataset: CTReportDataset, indices: Sequence[int]) -> np.ndarray:
    return np.stack([dataset[i]["pixel_values"].numpy() for i in indices])


def _outputs(do: Callable[..., Any], dataset: CTReportDataset, bar: Any) -> dict[str, np.ndarray]:
    """Embeddings (n, p) and codes (n, t * h * w) of a data set."""
    found = []
    for at in range(0, len(dataset), max(BATCHES)):
        indices = range(at, min(at + max(BATCHES), len(dataset)))
        found.append(do(outputs, _volumes(dataset, indices)))
        bar.update(len(indices))
    embeds, codes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return {"embeds": embeds, "codes": codes.astype(np.int32)}


def _kept_in(folder: Path, name: str) -> Path:
    return folder / "measured" / f"{slug(name)}.npz"
