"""Measure arithmetic between the adapters of two hospitals: one adapter for both, made without a study of either.

Trains one adapter for each phantom hospital and, as what it has to stand beside, one on the studies of both. Then every
way of `AdapterBank.combine`, half and half, is scored on the test patients of both. What was trained stays in
runs/arithmetic, and an interrupted run goes on; another base model needs another folder. Writes bench/arithmetic.json
and the table of docs/deploy.md.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from printing import publish
from tqdm.auto import tqdm

from medctkit.common.provenance import made_with
from medctkit.deploy.bank import BASE, AdapterBank
from medctkit.experiments.adapt import DEFAULT
from medctkit.findings import FINDINGS
from medctkit.lora.adapter import add_lora
from medctkit.metrics.scores import evaluate_both
from medctkit.model.base_model import load_mini_base
from medctkit.phantom.study import generate
from medctkit.scans.preprocessing import preprocess
from medctkit.training.loop import finetune

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "runs" / "arithmetic"
HOSPITALS, BOTH = ("source", "target"), "both"
WAYS = ("cat", "svd", "linear", "ties", "dare_linear", "ties_svd", "dare_linear_svd")
SAYS = {
    BASE: "base model",
    "source": "adapter of the source hospital",
    "target": "adapter of the target hospital",
    "own": "each volume through its hospital's adapter",
    "scores": "mean of both adapters' scores",
    BOTH: "adapter trained on the studies of both",
}


def updates(model, name):
    """All updates of an adapter, end to end."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    return torch.cat([layer.get_delta_weight(name).flatten() for layer in layers])


def drawn(config, counts):
    """Studies of each hospital and split, one of each patient, as a data set gives them."""
    found = {(hospital, split): [] for hospital in HOSPITALS for split in counts}
    tasks = [(hospital, split, i) for hospital, split in found for i in range(counts[split])]
    for hospital, split, i in tqdm(tasks, desc="phantoms"):
        patient = f"arithmetic_{hospital}_{split}_{i:04d}"
        study = generate(i, hospital, shape=config.shape, patient=patient)
        item = {"study": f"{patient}_a_1", "patient": patient, "report": study.report}
        labels = torch.tensor([float(study.labels[name]) for name in FINDINGS])
        found[hospital, split].append(item | {"labels": labels, "pixel_values": preprocess(study.volume, config)})
    return found


def moved(model):
    """How far B is from zero: of the start and the last step, which alone are scored, the last is kept."""
    return float(sum(p.norm() for name, p in model.named_parameters() if ".lora_B." in name))


def trained(work, data, settings):
    """The folder of each adapter; nothing is done twice."""
    folders, config = {}, settings.config(0)
    for name, hospitals in {**{h: [h] for h in HOSPITALS}, BOTH: HOSPITALS}.items():
        train = [item for h in hospitals for item in data[h, "train"]]
        base = load_mini_base()
        torch.manual_seed(0)
        model = add_lora(base.model, "paper", r=settings.rank)
        print(f"adapter: {name}", flush=True)
        folders[name] = finetune(model, train, base.tokenizer, config, work / name, moved).adapter_dir
    return folders


def measure(work, patients, settings):
    """Mean AUROC of every way at both hospitals, and its paired difference from the adapter of the hospital."""
    base = load_mini_base()
    data = drawn(base.preprocess_config, patients)
    folders = trained(work, data, settings)
    bank = AdapterBank(base, folders)
    for way in WAYS:
        bank.combine(way, dict.fromkeys(HOSPITALS, 0.5), way)
    exact = updates(bank.model, "cat")
    off = {way: float((updates(bank.model, way) - exact).norm() / exact.norm().clamp_min(1e-9)) for way in WAYS}
    rows = {name: {} for name in (BASE, *HOSPITALS, "own", "scores", BOTH, *WAYS)}
    for hospital in HOSPITALS:
        items = data[hospital, "test"]
        labels, names = np.stack([item["labels"].numpy() for item in items]), [item["patient"] for item in items]
        volumes = torch.stack([item["pixel_values"] for item in items]).split(32)
        scores = {
            name: np.concatenate([bank.scores(v, [name] * len(v)) for v in volumes]) for name in (BASE, *bank.names)
        }
        scores |= {"own": scores[hospital], "scores": (scores["source"] + scores["target"]) / 2}
        for name in rows:
            both = scores[hospital], scores[name]
            _, mean, less = (table.loc["mean"] for table in evaluate_both(labels, both, names))
            keys = {"auroc": mean, "difference": less}
            rows[name][hospital] = {
                f"{key}{end}": float(row[f"auroc{end}"]) for key, row in keys.items() for end in ("", "_low", "_high")
            }
    return {"rows": rows, "off_the_sum": off, "patients": patients, "steps": settings.steps}


def page(found):
    """The table of docs/deploy.md."""
    lines = [
        "| half and half | "
        + " | ".join(f"AUROC at {h}; less its own adapter's" for h in HOSPITALS)
        + " | off the sum |"
    ]
    lines.append("|---|---|---|---|")
    for name, row in found["rows"].items():
        cells = [SAYS.get(name, f"`{name}`")]
        for at in (row[hospital] for hospital in HOSPITALS):
            change = [f"{at[key]:+.3f}" for key in ("difference", "difference_low", "difference_high")]
            cells.append(f"{at['auroc']:.3f}; {change[0]} [{change[1]}, {change[2]}]")
        off = found["off_the_sum"].get(name)
        lines.append(f"| {' | '.join(cells)} | {'' if off is None else f'{off:.1%}'} |")
    patients = ", ".join(f"{n} {split}" for split, n in found["patients"].items())
    note = f"*Mini model; phantom patients of each hospital: {patients}; {found['steps']} steps; mean AUROC*"
    return [*lines, "", note]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few studies and steps, to try the program")
    parser.add_argument("--patients", type=int, nargs=2, default=(200, 100), help="of each hospital: train test")
    parser.add_argument("--steps", type=int, default=60, help="of training, 16 volumes each")
    parser.add_argument("--output", type=Path, help="where to write; by default here and in docs/deploy.md")
    parser.add_argument("--work", type=Path, default=WORK, help="for what is drawn and trained")
    arguments = parser.parse_args()
    patients = dict(zip(("train", "test"), arguments.patients, strict=True))
    settings = replace(DEFAULT, steps=arguments.steps, batch_size=16, evaluate_every=arguments.steps, tracker="none")
    if arguments.tiny:
        patients, settings = dict(train=6, test=6), replace(settings, steps=1, evaluate_every=1, batch_size=3, rank=4)
    print(f"{2 * sum(patients.values())} phantoms are drawn, 3 adapters trained: about 10 minutes", flush=True)
    found = measure(arguments.work, patients, settings)
    found["made_with"] = made_with(0, "python bench/arithmetic.py")
    publish("arithmetic", found, "deploy.md", page(found), arguments.output)


if __name__ == "__main__":
    main()
