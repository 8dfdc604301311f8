"""Parameters counted: per component, and which placements fit the paper's number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from itertools import chain, combinations
from typing import TYPE_CHECKING

import torch
from torch import nn

from medctkit.lora.placement import PRESETS
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel, released_layout
from medctkit.model.protocol import Model
from medctkit.model.released_checkpoint import ReleasedTensor

if TYPE_CHECKING:
    import pandas as pd

PAPER_TRAINABLE = (1_665_000, 1_675_000)  # what "1.67 M" can stand for


def count_trainable(model: nn.Module) -> int:
    """Number of parameters that require gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def parameter_table(model: Model) -> pd.DataFrame:
    """Count the parameters of each component: what the released checkpoint holds, what runs, what is trained.

    Columns: `component`; `total`, parameters in the released layout at this model's sizes (438,148,761 at
    full size); `live`, those that take part in the forward pass; `never used`, the rest, which this package
    does not instantiate; `trainable`; `share of released total` and `share of live`, trainable as a fraction
    of that count plus the adapter's own (0.0038 for preset "paper", as the paper counts); `adapter bytes`,
    the active adapter in float32. The last row is the sum. Works on the meta device.
    """
    import pandas as pd

    adapted = hasattr(model, "peft_config")
    base, active = (model.get_base_model(), set(model.active_adapters)) if adapted else (model, set())
    named = {name.replace(".base_layer.", "."): p for name, p in base.named_parameters()}
    if hasattr(base, "checkpoint_layout"):
        layout = {name: entry for name, entry in base.checkpoint_layout().items() if entry.kind == "parameter"}
    else:
        layout = {
            name: ReleasedTensor(tuple(p.shape), "parameter", True)
            for name, p in named.items()
            if not active & set(name.split("."))
        }
    counts = {name.split(".")[0]: {"total": 0, "live": 0, "trainable": 0, "adapter": 0} for name in layout}
    for name, entry in layout.items():
        row = counts[name.split(".")[0]]
        row["total"] += math.prod(entry.shape)
        row["live"] += math.prod(entry.shape) if entry.live else 0
    for name, parameter in named.items():
        row = counts[name.split(".")[0]]
        row["trainable"] += parameter.numel() if parameter.requires_grad else 0
        if name not in layout and active & set(name.split(".")):
            row["adapter"] += parameter.numel()

    table = pd.DataFrame.from_dict(counts, orient="index").rename_axis("component")
    table.loc["sum"] = table.sum()
    table.insert(2, "never used", table["total"] - table["live"])
    for column, of in (("share of released total", "total"), ("share of live", "live")):
        table[column] = (table["trainable"] / (table[of] + table["adapter"])).fillna(0.0)
    table["adapter bytes"] = 4 * table.pop("adapter")
    return table.reset_index()


def search_placements(
    ranks: tuple[int, ...] = (2, 4, 8, 12, 16, 24, 32, 64), config: CTCLIPConfig | None = None
) -> pd.DataFrame:
    """Redo the search for the placement behind the paper's "1.67 M trainable, 0.38 % of 440 M".

    Counts every rank with every set of attention projections (one rank, all layers of both encoders): a LoRA on a
    (out, in) projection has r (in + out) parameters. Columns: `r`, `vision`, `text`, `trainable`, `percent of total`
    (released total plus adapter), `fits the paper` (1.665-1.675 M), `exactly q, k, v`.

    Args:
        ranks: ranks to try.
        config: sizes of the model; the released ones by default.
    """
    import pandas as pd

    config = config or CTCLIPConfig()
    with torch.device("meta"):
        linear = {name: m for name, m in CTCLIPModel(config).named_modules() if isinstance(m, nn.Linear)}
    paper = PRESETS["paper"]
    per_rank = {
        projection: sum(m.in_features + m.out_features for name, m in linear.items() if re.fullmatch(pattern, name))
        for projection, pattern in paper.parts.projections.items()
    }
    total = sum(math.prod(e.shape) for e in released_layout(config).values() if e.kind == "parameter")
    rows = []
    for vision in _subsets(paper.parts.vision):
        for text in _subsets(paper.parts.text):
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


def _subsets(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    names = list(names)
    return chain.from_iterable(combinations(names, k) for k in range(len(names) + 1))
