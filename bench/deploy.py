"""What docs/deploy.md shows of `medctkit deploy-table`, and with --full-size time and memory alone, of random weights.

`python bench/deploy.py RUN` takes the table that `medctkit deploy-table RUN` left. `--full-size` measures the released
sizes: 25 minutes on two cores, 12 GB of memory, 5 GB of disk; nothing else should run meanwhile. Each writes its part
of bench/deploy.json, and `--page` prints the lines of the page.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medctkit.common.provenance import made_with, write_json
from medctkit.deploy.deploy_table import BASE, as_text, build, cost
from medctkit.deploy.trial import trial
from medctkit.lora.adapter import add_lora, save_adapter
from medctkit.model.base_model import BaseModel
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel

HERE = Path(__file__).resolve().parent


class Words:
    """Stands in for the tokenizer, whose vocabulary is not at hand."""

    def __call__(self, sentences, **_):
        """Some ids for each sentence."""
        ids = torch.randint(1, 99, (len(sentences), 12), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def of_size(config, folder):
    """The part of deploy.json that needs no trained weights; of one volume at a time."""

    def fresh():
        torch.manual_seed(0)
        return BaseModel(CTCLIPModel(config).eval(), Words())

    save_adapter(add_lora(fresh().model, "paper"), folder / "adapter")
    _, variants = build(fresh(), folder / "adapter", folder, folder)
    volumes, rows, threads = np.zeros((1, 1, *config.volume_shape), np.float32), {}, torch.get_num_threads()
    with trial(variants[BASE], volumes, threads) as own:
        for name, variant in variants.items():
            if name == BASE:
                rows[name] = cost((own,), variant, (1,))
            else:
                with trial(variant, volumes, threads) as its:
                    rows[name] = cost((own, its), variant, (1,))
            print(f"{name}: {rows[name]['ms_1'] / 1e3:.1f} s a volume", flush=True)
    return {"rows": rows, "made_with": made_with(0, "random weights")}


def page(found):
    """Lines of docs/deploy.md."""
    lines = []
    for part, title in (("run", "The mini model, adapted, on {test} test phantoms"), ("full_size", "Full size")):
        if part not in found:
            continue
        table = pd.DataFrame.from_dict(found[part]["rows"], orient="index")
        batches = "batch 1 / 16" if "ms_16" in table else "one volume at a time, random weights"
        title = title.format(**found[part].get("studies", {}))
        lines += [f"*{title} ({found[part]['made_with']['device']}; {batches}):*", "", as_text(table), ""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="folder of `medctkit deploy-table`")
    parser.add_argument("--full-size", action="store_true", help="instead: the released sizes, random weights")
    parser.add_argument("--page", action="store_true", help="print what docs/deploy.md shows")
    parser.add_argument("--output", type=Path, default=HERE / "deploy.json", help="where to write")
    arguments = parser.parse_args()
    found = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    if arguments.full_size:
        print("random weights of full size: about 25 minutes, 12 GB of memory, 5 GB of disk", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found["full_size"] = of_size(CTCLIPConfig(), Path(folder))
    elif arguments.run:
        found["run"] = json.loads((arguments.run / "deploy" / "table.json").read_text(encoding="utf-8"))
    elif not arguments.page:
        parser.error("give RUN, --full-size or --page")
    if arguments.page:
        print(page(found))
        return
    write_json(found, arguments.output)


if __name__ == "__main__":
    main()
