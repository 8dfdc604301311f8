"""Parameters counted: per component, and which placements fit the paper's number."""

from __future__ import annotations

import math
from itertools import chain, combinations
from typing import TYPE_CHECKING

from medctkit.lora.placement import PRESETS, TEXT_PROJECTIONS, VISION_PROJECTIONS
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel, released_layout

if TYPE_CHECKING:
    import pandas as pd
    from peft import PeftModel


COMPONENTS = (
    "visual_transformer",
    "text_transformer",
    "to_visual_latent",
    "to_text_latent",
    "to_visual_latent_extra",
    "to_text_latent_extra",
    "temperature",
)


def parameter_table(model: CTCLIPModel | PeftModel) -> pd.DataFrame:
    """Count the parameters of each component: what the released checkpoint holds, what runs, what is trained.

    Columns: `component`; `total`, parameters in the released layout at this model's sizes (438,148,761 at
    full size); `live`, those that take part in the forward pass; `never used`, the rest, which this package
    does not instantiate; `trainable`; `share of released total` and `share of live`, trainable as a fraction
    of that count plus the adapter's own (0.0038 for preset "paper", as the paper counts); `adapter bytes`,
    the active adapter in float32. The last row is the sum. Works on the meta device.
    """
    import pandas as pd

    base, active = model, set()
    if hasattr(model, "peft_config"):
        base, active = model.get_base_model(), set(model.active_adapters)
    layout = {name: entry for name, entry in released_layout(base.config).items() if entry.kind == "parameter"}
    counts = {name: {"total": 0, "live": 0, "trainable": 0, "adapter": 0} for name in COMPONENTS}
    for name, entry in layout.items():
        row = counts[name.split(".")[0]]
        row["total"] += math.prod(entry.shape)
        row["live"] += math.prod(entry.shape) if entry.live else 0
    for name, parameter in base.named_parameters():
        row = counts[name.split(".")[0]]
        row["trainable"] += parameter.numel() if parameter.requires_grad else 0
        in_base = name.replace(".base_layer.", ".") in layout
        if not in_base and active & set(name.split(".")):
            row["adapter"] += parameter.numel()

    table = pd.DataFrame.from_dict(counts, orient="index").rename_axis("component")
    table.loc["sum"] = table.sum()
    table.insert(2, "never used", table["total"] - table["live"])
    for column, of in (("share of released total", "total"), ("share of live", "live")):
        table[column] = (table["trainable"] / (table[of] + table["adapter"])).fillna(0.0)
    table["adapter bytes"] = 4 * table.pop("adapter")
    return table.reset_index()


PAPER_TRAINABLE = (1_665_000, 1_675_000)  # what "1.67 M" can stand for


def search_placements(
    ranks: tuple[int, ...] = (2, 4, 8, 12, 16, 24, 32, 64), config: CTCLIPConfig | None = None
) -> pd.DataFrame:
    """Redo the search for the placement behind the paper's "1.67 M trainable, 0.38 % of 440 M".

    Counts, without building a model, every rank with every set of attention projections (one rank, all layers
    of both encoders): a LoRA on a (out, in) projection has r (in + out) parameters. Columns: `r`, `vision`,
    `text`, `trainable`, `percent of total` (released total plus adapter), `fits the paper` (1.665-1.675 M),
    `exactly q, k, v`.

    Args:
        ranks: ranks to try.
        config: sizes of the model; the released ones by default.
    """
    import pandas as pd

    config = config or CTCLIPConfig()
    v, t = config.vision_config, config.text_config
    inner = v["heads"] * v["dim_head"]
    vision_layers, hidden = v["spatial_depth"] + v["temporal_depth"], t["hidden_size"]
    per_rank = {"to_q": v["dim"] + inner, "to_kv": v["dim"] + 2 * inner, "to_out": inner + v["dim"]}
    per_rank = {name: vision_layers * n for name, n in per_rank.items()}
    per_rank |= {name: t["num_hidden_layers"] * 2 * hidden for name in TEXT_PROJECTIONS}
    total = sum(math.prod(e.shape) for e in released_layout(config).values() if e.kind == "parameter")

    def subsets(names):
        return chain.from_iterable(combinations(names, k) for k in range(len(names) + 1))

    paper = PRESETS["paper"]
    rows = []
    for vision in subsets(VISION_PROJECTIONS):
        for text in subsets(TEXT_PROJECTIONS):
            for r in ranks if vision or text else ():
                trainable = r * sum(per_rank[name] for name in (*vision, *text))
                rows.append(
                    {
                        "r": r,
                        "vision": " + ".join(vision),
                        "text": " + ".join(text),
                        "trainable": trainable,
                        "percent of total": 100 * trainable / (total + trainable),
                        "fits the paper": PAPER_TRAINABLE[0] <= trainable <= PAPER_TRAINABLE[1],
                        "exactly q, k, v": (vision, text) == (paper.vision, paper.text),
                    }
                )
    return pd.DataFrame(rows)
