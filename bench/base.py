"""Measures what the mini base model sees at home, on test patients of the source hospital, and after a shift by 4 cm.

Bars: mean AUROC at least 0.80, the interval of at most two findings holds 0.5, 4 cm along the body cost at most 0.01.
It writes bench/base.json and its place in docs/phantoms.md; about 4 minutes on two cores.
"""

import argparse
from pathlib import Path

import torch
from printing import all_met, made_with, publish
from tqdm.auto import tqdm

from medctkit.cohort.dataset import CTReportDataset
from medctkit.cohort.manifest import load_manifest
from medctkit.findings import FINDINGS
from medctkit.metrics.scores import compare, evaluate
from medctkit.model.base_model import load_mini_base
from medctkit.scans.preprocessing import moved_by
from medctkit.zero_shot.classifier import ZeroShotClassifier

HERE = Path(__file__).resolve().parent
MOVED = {"4 cm up": (8, 0, 0), "4 cm down": (-8, 0, 0), "1 cm across": (0, 0, 3)}  # slices of 5 mm, pixels of 3.75


def measured(cache_dir=None):
    """AUROC of each finding with its interval, and what each of `MOVED` changes in the mean."""
    table, mini = load_manifest(HERE.parent / "data_manifest.csv"), load_mini_base()
    rows = table[(table["hospital"] == "source") & (table["split"] == "test")]
    dataset, embeds = CTReportDataset(rows, mini.preprocess_config, cache_dir), {name: [] for name in ("", *MOVED)}
    for part in tqdm(torch.arange(len(dataset)).split(16), desc="source test", unit="batch"):
        pixels = [dataset[i]["pixel_values"] for i in part.tolist()]
        for name in embeds:
            seen = torch.stack([moved_by(each, MOVED[name]) if name else each for each in pixels])
            with torch.no_grad():
                embeds[name].append(mini.model.encode_image(seen))
    ask = ZeroShotClassifier(mini.model, mini.tokenizer)
    scores = {name: ask.scores_from_embeddings(torch.cat(each)) for name, each in embeds.items()}
    labels, patients = rows[list(FINDINGS)].to_numpy(float), rows["patient"].to_numpy()
    columns = ["auroc", "auroc_low", "auroc_high"]
    found = evaluate(labels, scores[""], patients)[columns].round(4).T.to_dict("list")
    moved = {}
    for name in MOVED:
        row = compare(labels, scores[""], scores[name], patients).loc["mean"]
        moved[name] = [round(float(row[column]), 4) for column in columns]
    return {"studies": len(rows), "patients": int(rows["patient"].nunique()), "findings": found, "moved": moved}


def blind(found):
    """Findings whose interval holds 0.5."""
    return [name for name, (_, low, high) in found["findings"].items() if name != "mean" and low <= 0.5 <= high]


def bars(found):
    """Whether each bar is met, and what was found."""
    mean, worst = (
        found["findings"]["mean"][0],
        min(change[0] for name, change in found["moved"].items() if "4 cm" in name),
    )
    yield mean >= 0.80, f"mean AUROC at home {mean:.3f}, at least 0.80"
    yield len(blind(found)) <= 2, f"findings whose interval holds 0.5: {', '.join(blind(found)) or 'none'}; at most two"
    yield worst >= -0.01, f"4 cm along the body change the mean AUROC by {worst:+.4f} at most, -0.01 allowed"


def page(found):
    """Lines of Markdown."""
    of = f"{found['studies']} studies of {found['patients']} test patients of the source hospital"
    lines = [f"{of}, 95 % intervals over patients.", ""]
    lines += ["| finding | AUROC |", "|---|---|"]
    lines += [f"| {name} | {a:.3f} [{low:.3f}, {high:.3f}] |" for name, (a, low, high) in found["findings"].items()]
    lines += ["", "Every scan moved, and the change of the mean:", "", "| moved | change |", "|---|---|"]
    lines += [f"| {name} | {a:+.3f} [{low:+.3f}, {high:+.3f}] |" for name, (a, low, high) in found["moved"].items()]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write, in place of bench/base.json and the page")
    parser.add_argument("--cache-dir", type=Path, help="prepared volumes")
    arguments = parser.parse_args()
    found = measured(arguments.cache_dir)
    all_met(bars(found))
    found["made_with"] = made_with("python bench/base.py", "medctkit torch")
    publish("base", found, "phantoms.md", page(found), arguments.output)


if __name__ == "__main__":
    main()
