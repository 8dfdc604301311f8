"""Parameters counted: per component, and which placements fit the paper's number."""

import math
import re
from collections.abc import Iterable, Iterator
from itertools import chain, combinations, product

import pandas as pd
import torch
from torch import nn

from medctkit.lora.placement import PRESETS
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel, released_layout
from medctkit.model.protocol import Model

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
    adapted = hasattr(model, "peft_config")
    base, active = (model.get_base_model(), set(model.active_adapters)) if adapted else (model, set())
    named = {name.replace(".base_layer.", "."): p for name, p in base.named_parameters()}
    own = {name: p for name, p in named.items() if not active & set(name.split("."))}
    if isinstance(base, CTCLIPModel):
        layout = released_layout(base.config)
        held = {name: (math.prod(e.shape), e.live) for name, e in layout.items() if e.kind == "parameter"}
    else:
        held = {name: (p.numel(), True) for name, p in own.items()}
    rows = [(name, size, size * live, 0, 0) for name, (size, live) in held.items()]
    rows += [(name, 0, 0, p.numel() * p.requires_grad, p.numel() * (name not in own)) for name, p in named.items()]
    table = pd.DataFrame(rows, columns=["component", "total", "live", "trainable", "adapter"])
    table = table.groupby(table["component"].str.partition(".")[0], sort=False).sum(numeric_only=True)
    table.loc["sum"] = table.sum()
    table.insert(2, "never used", table["total"] - table["live"])
    for column, of in (("share of released total", "total"), ("share of live", "live")):
        table[column] = (table["trainable"] / (table[of] + table["adapter"])).fillna(0.0)
    table["adapter bytes"] = 4 * table.pop("adapter")
    return table.rename_axis("component").reset_index()


def search_placements(
    ranks: tuple[int, ...] = (2, 4, 8, 12, 16, 24, 32, 64), config: CTCLIPConfig | None = None
) -> pd.DataFrame:
    """Redo the search for the placement behind the paper's "1.67 M trainable, 0.38 % of 440 M".

    Counts every rank with every set of attention projections (one rank, all layers of both encoders): a LoRA on a
    (out, in) projection has r (in + out) parameters. Columns: `r`, `vision`, `text`, `trainable`, `percent of total`
    (released total plus adapter), `fits the paper` (1.665-1.675 M), `exactly q, k, v`.
    """
    config = config or CTCLIPConfig()
    with torch.device("meta"):
        linear = {name: m for name, m in CTCLIPModel(config).named_modules() if isinstance(m, nn.Linear)}
    paper = PRESETS["paper"]
    per_rank = {
        projection: sum(m.in_features + m.out_features for name, m in linear.items() if re.fullmatch(pattern, name))
        for projection, pattern in paper.parts.projections.items()
    }
    attention = PRESETS["all-attention"]
    total = sum(math.prod(e.shape) for e in released_layout(config).values() if e.kind == "parameter")
    rows = []
    for vision, text, r in product(_subsets(attention.vision), _subsets(attention.text), ranks):
        trainable = r * sum(per_rank[name] for name in (*vision, *text))
        row = {"r": r, "vision": " + ".join(vision), "text": " + ".join(text), "trainable": trainable}
        rows.append(row | {"exactly q, k, v": (vision, text) == (paper.vision, paper.text)})
    table = pd.DataFrame(rows).query("trainable > 0").reset_index(drop=True)
    table.insert(4, "percent of total", 100 * table["trainable"] / (total + table["trainable"]))
    table.insert(5, "fits the paper", table["trainable"].between(*PAPER_TRAINABLE))
    return table


def _subsets(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    names = list(names)
    return chain.from_iterable(combinations(names, k) for k in range(len(names) + 1))
