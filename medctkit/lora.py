"""LoRA in both encoders of CT-CLIP: from scratch, through peft, and counted.

LoRA (Hu et al. 2021, arXiv 2106.09685) freezes a weight matrix W (out, in) and learns a low-rank update
beside it,

    y = W x + (alpha / r) B A x,      A (r, in) random,  B (out, r) zero at the start,

so that training starts exactly at the base model, `r (in + out)` numbers are learned instead of
`in * out`, and afterwards B A can be added into W at no cost. `LoRALinear` is that equation; everything
else here hands the work to peft and says *where* in CT-CLIP the update goes.

The paper (MedCT-VLM, arXiv 2512.00597) reports 1.67 M trainable parameters, 0.38 % of 440 M. Its full text
was not at hand, so the placement of preset "paper" is inferred: `search_placements` shows that of all ranks
and attention projections only rank 24 fits, and of those only one set is "q, k and v of both encoders". Its
alpha is not known to us; alpha = 2 r and no dropout are our choice.
"""

from __future__ import annotations

import copy
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from medctkit.ctclip import CTCLIPConfig, CTCLIPModel, released_layout
from medctkit.fingerprint import digests

if TYPE_CHECKING:
    import pandas as pd
    from peft import LoraConfig, PeftConfig, PeftModel


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update: `W x + b + (alpha / r) B A x`.

    The lesson version; the package itself uses peft, which a test holds equal to this in output, gradient and
    merge.

    Args:
        base: the linear layer to adapt, `weight` (out, in). Its parameters are frozen in place.
        r: rank of the update, at least 1.
        alpha: scale of the update; `alpha / r` keeps its size about constant when r changes.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        if r < 1:
            raise ValueError(f"rank r must be at least 1, got {r}; usual values are 4 to 64")
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, r))  # zero: starts as the base exactly
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as nn.Linear starts its own weight
        self.scaling = alpha / r
        self.merged = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., in) to (..., out)."""
        y = self.base(x)
        if self.merged:
            return y
        return y + self.scaling * F.linear(F.linear(x, self.A), self.B)  # (..., in) -> (..., r) -> (..., out)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update into W: same output, no extra work per call."""
        if not self.merged:
            self.base.weight += self.scaling * self.B @ self.A  # (out, r) (r, in) -> (out, in)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out of W again (equal to the base up to rounding)."""
        if self.merged:
            self.base.weight -= self.scaling * self.B @ self.A
            self.merged = False


# Where a projection lives inside CTCLIPModel, at any depth. peft matches the whole module name.
VISION_LAYER = r"visual_transformer\.enc_(?:spatial|temporal)_transformer\.layers\.\d+\."
TEXT_LAYER = r"text_transformer\.encoder\.layer\.\d+\."
VISION_PROJECTIONS = {name: rf"{VISION_LAYER}1\.{name}" for name in ("to_q", "to_kv", "to_out")}
TEXT_PROJECTIONS = {
    "query": TEXT_LAYER + r"attention\.self\.query",
    "key": TEXT_LAYER + r"attention\.self\.key",
    "value": TEXT_LAYER + r"attention\.self\.value",
    "attention.output.dense": TEXT_LAYER + r"attention\.output\.dense",
}


@dataclass(frozen=True)
class Placement:
    """Which attention projections get a LoRA, in all layers of each encoder, and its rank.

    Args:
        vision: names out of `VISION_PROJECTIONS` (to_kv holds keys and values in one matrix).
        text: names out of `TEXT_PROJECTIONS`.
        r: rank, the same everywhere.
    """

    vision: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    r: int = 24

    def __post_init__(self):
        for side, known in (("vision", VISION_PROJECTIONS), ("text", TEXT_PROJECTIONS)):
            if unknown := [name for name in getattr(self, side) if name not in known]:
                raise ValueError(f"unknown {side} projection {unknown[0]!r}; choose from {', '.join(known)}")
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"rank r must be a whole number of at least 1, got {self.r!r}; usual values are 4 to 64")

    @property
    def patterns(self) -> dict[str, str]:
        """One regular expression per projection."""
        known = VISION_PROJECTIONS | TEXT_PROJECTIONS
        return {name: known[name] for name in (*self.vision, *self.text)}


PRESETS: dict[str, Placement] = {
    "paper": Placement(vision=("to_q", "to_kv"), text=("query", "key", "value")),
    "vision": Placement(vision=("to_q", "to_kv")),
    "text": Placement(text=("query", "key", "value")),
    "all-attention": Placement(vision=tuple(VISION_PROJECTIONS), text=tuple(TEXT_PROJECTIONS)),
}


def _placement(preset: str, overrides: dict) -> Placement:
    """The preset with its placement overrides taken out of `overrides`."""
    if preset not in PRESETS:
        raise ValueError(f"unknown LoRA preset {preset!r}; choose from {', '.join(PRESETS)}")
    changes = {field: overrides.pop(field) for field in ("vision", "text", "r") if field in overrides}
    for side in changes.keys() & {"vision", "text"}:
        changes[side] = (changes[side],) if isinstance(changes[side], str) else tuple(changes[side])
    return replace(PRESETS[preset], **changes)


def lora_config(preset: str = "paper", **overrides) -> LoraConfig:
    """A peft configuration for CT-CLIP.

    Args:
        preset: "paper" (r = 24 on q, k, v of both encoders), "vision", "text" (one encoder of it) or
            "all-attention" ("paper" plus both output projections).
        **overrides: `r`; `vision` and `text`, projection names in place of the preset's; and any field of
            `peft.LoraConfig` (`lora_alpha`, default 2 r; `lora_dropout`, default 0; `use_dora`, `use_rslora`;
            `target_modules` in place of the whole placement; ...).

    Raises:
        ValueError: unknown preset, projection or field; rank below 1; no projection left.
    """
    from peft import LoraConfig

    placement = _placement(preset, overrides)
    fields = {
        "lora_alpha": 2 * placement.r,
        "target_modules": "|".join(placement.patterns.values()),
    } | overrides
    if not fields["target_modules"]:
        raise ValueError(
            f"preset {preset!r} with vision={placement.vision} and text={placement.text} adapts nothing; "
            "name at least one projection"
        )
    if unknown := [name for name in fields if name not in LoraConfig.__dataclass_fields__]:
        raise ValueError(
            f"unknown LoRA setting {unknown[0]!r}; expected r, vision, text or a field of peft.LoraConfig "
            "such as lora_alpha, lora_dropout, use_dora"
        )
    return LoraConfig(r=placement.r, **fields)


def add_lora(model: CTCLIPModel, preset: str = "paper", **overrides) -> PeftModel:
    """Freeze `model` and add a trainable LoRA adapter to it, in place.

    The random A matrices come from torch's generator: call `torch.manual_seed` before for a repeatable start.

    Args:
        model: a plain CT-CLIP.
        preset: see `lora_config`.
        **overrides: see `lora_config`.

    Raises:
        ValueError: as `lora_config`; a projection that no layer of this model has; a model that has adapters
            already.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        raise ValueError(
            f"this model already carries the adapter(s) {', '.join(model.peft_config)}; add another with "
            "model.add_adapter(name, lora_config(...)), or merge_lora(model) first"
        )
    config = lora_config(preset, **overrides)
    if "target_modules" in overrides:
        targets = overrides["target_modules"]  # peft: one pattern, or a list of last parts of names
        patterns = {name: rf"(?:.*\.)?{re.escape(name)}" for name in targets}
        patterns = {targets: targets} if isinstance(targets, str) else patterns
    else:
        patterns = _placement(preset, dict(overrides)).patterns
    _refuse_unmatched(model, patterns)
    return add_adapter(model, config)


def add_adapter(model: CTCLIPModel, config: PeftConfig) -> PeftModel:
    """Freeze a plain `model` and add the trainable adapter of any peft configuration to it, in place.

    The digest of the base model becomes part of the configuration, so that `load_adapter` refuses any other.
    """
    from peft import get_peft_model

    with _quiet():
        adapted = get_peft_model(model, config)
    (config,) = adapted.peft_config.values()
    config.base_model_name_or_path = f"{_DIGEST}{digests(adapted)[0]}" if _has_exact_weights(adapted) else None
    return adapted


_DIGEST = "sha256:"


def _has_exact_weights(model: nn.Module) -> bool:
    """Whether there are weights to tell one base model from another by: not on the meta device, not rounded."""
    return all(type(p.data) is torch.Tensor and not p.is_meta and p.dtype == torch.float32 for p in model.parameters())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the FutureWarning that peft earns by asking transformers 5 for gradient checkpointing by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def _refuse_unmatched(model: nn.Module, patterns: Mapping[str, str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for label, pattern in patterns.items():
        if not any(re.fullmatch(pattern, name) for name in names):
            linear = {re.sub(r"\d+", "N", n) for n, module in model.named_modules() if isinstance(module, nn.Linear)}
            raise ValueError(
                f"LoRA placement {label!r} (pattern {pattern}) matches no module of {type(model).__name__}; "
                f"its linear layers (N: layer number) are: {', '.join(sorted(linear)) or 'none'}"
            )


def merge_lora(model: PeftModel) -> CTCLIPModel:
    """A plain CT-CLIP with the active adapter added into its weights; `model` itself is left as it is.

    Both copies are in memory at once (1.1 GB each at full size). To swap adapters instead, use peft's own
    `model.set_adapter(name)`, and `with model.disable_adapter():` for the base.

    Raises:
        ValueError: weights in half precision, where the update would be rounded away.
    """
    half = [name for name, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    if half:
        raise ValueError(
            f"{half[0]} and {len(half) - 1} more weights are in half precision, which would round the update away; "
            "load the adapter on a base model in float32 and merge it there"
        )
    return copy.deepcopy(model).merge_and_unload(safe_merge=True)


_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def save_adapter(model: PeftModel, directory: str | os.PathLike, name: str = "default") -> Path:
    """Write adapter `name` in peft's format; a crash midway leaves the previous files whole."""
    if name not in model.peft_config:
        raise ValueError(f"no adapter {name!r} on this model; it has {', '.join(model.peft_config)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        model.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
        written = Path(scratch) if name == "default" else Path(scratch) / name
        for file in _ADAPTER_FILES:
            os.replace(written / file, directory / file)
    return directory


def load_adapter(
    model: CTCLIPModel | PeftModel,
    directory: str | os.PathLike,
    name: str = "default",
    trainable: bool = False,
) -> PeftModel:
    """Put a saved adapter on `model` and make it the active one.

    peft alone passes over tensors that are missing or left over with a warning, and the adapter then silently
    does half its work; here the file has to fit the model exactly.

    Args:
        model: a plain CT-CLIP, or one that already carries other adapters.
        directory: where `save_adapter` or peft's `save_pretrained` wrote.
        name: the name to swap by, `model.set_adapter(name)`.
        trainable: True to train on, False for inference.

    Raises:
        FileNotFoundError: no adapter in `directory`.
        ValueError: the adapter was made for another architecture or base model; names taken twice.
    """
    from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from safetensors import safe_open

    for file in _ADAPTER_FILES:
        if not (Path(directory) / file).is_file():
            raise FileNotFoundError(f"{directory} has no {file}; expected a folder written by save_adapter")
    wrapped = isinstance(model, PeftModel)
    if wrapped and name in model.peft_config:
        raise ValueError(f"an adapter named {name!r} is already on this model; pass another name")

    base = model.get_base_model() if wrapped else model
    config = PeftConfig.from_pretrained(str(directory))
    with torch.device("meta"), _quiet():  # shapes only: what this adapter would look like on this architecture
        twin = type(base)(copy.deepcopy(base.config))
        if isinstance(config.target_modules, str):
            _refuse_unmatched(twin, {f"of {directory}": config.target_modules})
        plain = copy.deepcopy(config)
        plain.base_model_name_or_path = None
        expected = get_peft_model_state_dict(get_peft_model(twin, plain), save_embedding_layers=False)
    expected = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    with safe_open(str(Path(directory) / _ADAPTER_FILES[0]), "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    wrong = [
        f"{key}: adapter {found.get(key, 'none')}, model {expected.get(key, 'none')}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]
    if wrong:
        listed = "\n  ".join(wrong[:5] + ([f"... {len(wrong) - 5} more"] if len(wrong) > 5 else []))
        raise ValueError(
            f"the adapter in {directory} was made for another architecture; "
            f"load the base model it was trained on. Tensors that differ:\n  {listed}"
        )
    made_on = config.base_model_name_or_path or ""
    if made_on.startswith(_DIGEST) and _has_exact_weights(model):
        here = digests(model)[0]
        if made_on != f"{_DIGEST}{here}":
            raise ValueError(
                f"the adapter in {directory} was trained on a base model with other weights ({made_on}; this one is "
                f"{_DIGEST}{here}): load that one"
            )
    if not wrapped:
        with _quiet():
            return PeftModel.from_pretrained(model, str(directory), adapter_name=name, is_trainable=trainable)
    model.load_adapter(str(directory), name, is_trainable=trainable)
    model.set_adapter(name)
    return model if trainable else model.requires_grad_(False)


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
