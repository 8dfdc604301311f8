"""Ships an adapter to look into: `python -m tools.shipped_adapter runs/notebooks`, where notebook 03 has left its run.

The package gets a copy of it and `by_rank.json`: the validation AUROC with each update cut down to so many directions,
which notebook 02 shows. A few minutes on two cores.
"""

import json
import sys
from pathlib import Path

from tqdm.auto import tqdm

from medctkit.cohort.dataset import load_split, prepared_dir
from medctkit.cohort.manifest import load_manifest
from medctkit.common.provenance import made_with, write_json
from medctkit.experiments.adapt import Origin
from medctkit.lora import at_rank, load_adapter, save_adapter
from medctkit.training.checkpoints import finished_run
from medctkit.zero_shot.classifier import validation_score

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "medctkit" / "assets" / "adapter"
RANKS = (0, 1, 2, 3, 4, 6, 8, 12, 16)


def ship(run: Path) -> dict:
    """Copy the adapter of a finished run on the mini model, and measure it at each of `RANKS`; returns the record."""
    record, origin = finished_run(run), Origin.of(run)
    base, manifest = origin.load(), load_manifest(ROOT / "data_manifest.csv")
    cache_dir = prepared_dir(ROOT / "data_manifest.csv", run)
    valid = load_split(manifest, origin.hospital, "valid", base.preprocess_config, cache_dir)
    score, model = validation_score(valid, base.tokenizer), load_adapter(base.model, run / "adapter")
    found = {}
    for rank in tqdm(RANKS, desc="ranks", unit="rank"):
        with at_rank(model, rank):
            found[rank] = round(score(model), 4)
    if abs(found[RANKS[-1]] - record["best_score"]) > 1e-3:
        raise ValueError(f"{run}: its adapter scores {found[RANKS[-1]]}, its run said {record['best_score']:.4f}")
    save_adapter(model, SHIPPED)
    said = {"validation_auroc": found, "studies": len(valid), "best_step": record["best_step"]}
    said["made_with"] = made_with(0) | {"command": "python -m tools.shipped_adapter runs/notebooks"}
    write_json(said, SHIPPED / "by_rank.json")
    return said


if __name__ == "__main__":
    print(json.dumps(ship(Path(sys.argv[1])), indent=1))
