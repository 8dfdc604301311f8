"""Where a model looks: attention, rollout and relevance over the slices, with the masks beside them.

Attention is captured when a map first needs it, and kept until `close`: a viewer that shows nothing costs nothing.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import ipywidgets as w
import numpy as np

from medctkit.findings import FINDINGS
from medctkit.scans.heat_map import HeatMap
from medctkit.scans.preprocessing import PreprocessConfig, preprocess
from medctkit.scans.volumes import CTVolume
from medctkit.viewers.drawing.hints import lines
from medctkit.viewers.drawing.messages import Messages
from medctkit.viewers.drawing.rendering import place_of
from medctkit.viewers.slice_viewer import SliceViewer, close_with_children

# what can be shown, and the controls that it needs
SHOWN = {
    "nothing": (),
    "rollout": (),
    "spatial attention of a patch": ("layer", "head"),
    "temporal attention of a patch": ("layer", "head"),
    "spatial attention received": ("layer", "head"),
    "temporal attention received": ("layer", "head"),
    "speaks for a prompt": ("prompt", "stating", "denying"),
}
OF_ALL = ("nothing", "speaks for a prompt")  # the rest is attention of CT-CLIP's two transformers
OWN = "a sentence of my own"
MEAN = "mean of heads"


class AttentionViewer:
    """Slices of a scan with a map of what a model looks at.

    Choose a model, how strong its LoRA is to be, if it has one, and what to show. It starts at the first finding that
    has a mask, outlined. The patch whose attention is shown is the one under the crosshair: click a place. A prompt is
    one of the findings, or any sentence with or without its negation. Patches are shown as the squares that they are,
    in multiples of what each would have if all were alike. The widget is `.widget`, the slices are `.slices`.

    Args:
        volume: the scan, as `preprocess` is to be given it.
        models: a name for each `CTCLIPModel`, with or without an adapter, such as {"base": ..., "adapted": ...}.
        tokenizer: of their text encoders.
        preprocess_config: what the models see.
        masks: named boolean arrays with the volume's shape.
        height: see `SliceViewer`.
        show: one of `SHOWN`, to start with. "nothing" runs no model. Of models other than CT-CLIP there is no attention
            to see, only what speaks for a prompt. None: "rollout", if there is one.

    Raises:
        TypeError: not a CTVolume; models that are not a dict.
        ValueError: a mask of another shape; an unknown `show`.
    """

    def __init__(
        self,
        volume: CTVolume,
        models: Mapping[str, Any],
        tokenizer: Any,
        preprocess_config: PreprocessConfig,
        masks: Mapping[str, np.ndarray] | None = None,
        height: int = 300,
        show: str | None = None,
    ):
        from medctkit.attention.maps import has_rollout

        if not isinstance(models, Mapping) or not models:
            raise TypeError(f"models: expected a dict such as {{'base': model}}, got {models!r:.80}")
        self.offered = SHOWN if all(map(has_rollout, models.values())) else OF_ALL
        show = ("rollout" if "rollout" in self.offered else OF_ALL[-1]) if show is None else show
        if show not in self.offered:
            raise ValueError(f"show={show!r}: expected one of {', '.join(self.offered)}")
        self.slices = SliceViewer(volume, masks, height=height, folded=True)
        self.volume, self.models, self.tokenizer, self.config = volume, dict(models), tokenizer, preprocess_config
        self.masks, self.prompts = dict(masks or {}), _of_findings()
        self._patch: tuple[int, int, int] | None = None
        self._kept: dict[Any, Any] = {}
        self._build(show)
        self._draw()

    def _build(self, show: str) -> None:
        wide = {"width": "320px"}
        self.model = w.ToggleButtons(options=list(self.models), style={"button_width": "auto"})
        self.shown = w.Dropdown(options=list(self.offered), value=show, description="show", layout=wide)
        self.layer = w.IntSlider(min=0, max=0, description="layer", tooltip="layers count from 0", layout=wide)
        self.head = w.Dropdown(description="head", options=[MEAN])
        self.strength = w.FloatSlider(
            1.0, min=0, max=1.5, step=0.25, description="strength", continuous_update=False, layout=wide,
            tooltip="of the adapter: 0 is the base model, 1 what was trained",
        )  # fmt: skip
        marked = next((name for name in FINDINGS if name in self.masks), FINDINGS[0])
        self.prompt = w.Dropdown(options=[*FINDINGS, OWN], value=marked, description="prompt", layout=wide)
        states, denies = self.prompts[marked]
        text = {"continuous_update": False, "layout": wide}  # Enter, or leaving the field
        self.stating = w.Text(states, description="states", placeholder="a sentence", **text)
        self.denying = w.Text(denies, description="denies", placeholder="its negation, or nothing", **text)
        self.caption, self.messages = w.HTML(), Messages()
        for control in (self.model, self.strength, self.shown, self.layer, self.head):
            self.messages.observe(control, self._draw)
        self.messages.observe(self.prompt, self._chose_prompt)
        for control in (self.stating, self.denying):
            self.messages.observe(control, self._typed)
        self.slices.on_move(self._moved)
        first = [w.Label("model"), self.model, self.strength, self.shown]
        second = [self.layer, self.head, self.prompt, self.stating, self.denying]
        boxes = [w.HBox(row, layout={"flex_flow": "row wrap"}) for row in (first, second)]
        self.widget = w.VBox([*boxes, self.slices.widget, self.messages.widget, self.caption])
        if marked in self.masks:
            self.slices.opacity.value = 0
        self._outline(marked)

    # --- what happens when ---

    def _outline(self, finding: str) -> None:
        """Of the masks the one of this finding, if it has one, and the crosshair where most of it is."""
        for name, box in self.slices.mask_boxes.items() if finding in self.masks else ():
            box.value = name == finding

    def _chose_prompt(self) -> None:
        if self.prompt.value != OWN:
            with self.messages.quietly():
                self.stating.value, self.denying.value = self.prompts[self.prompt.value]
            self._outline(self.prompt.value)
            self._draw()

    def _typed(self) -> None:
        with self.messages.quietly():
            stating, denying = self.prompts.get(self.prompt.value, ("", ""))
            if self.stating.value != stating and self.denying.value == denying:
                self.denying.value = ""  # it denied another sentence
            self.prompt.value = OWN
        self._draw()

    def _moved(self, point: np.ndarray) -> None:
        """The crosshair moved: perhaps to another patch."""
        if self.shown.value.endswith("of a patch") and self._patch_under(point) != self._patch:
            self.messages.guarded(self._draw)()

    # --- the map ---

    def _draw(self) -> None:
        with self.messages.quietly():
            self._offer_controls()
        self.caption.value = lines(["computing the map ...", *[""] * (1 + len(self.masks))])  # as many as will be
        try:
            heat_map = self.heat_map()
        except ValueError as error:  # what was given does not fit: no map, and the reason
            heat_map = None
            self.messages.say(str(error))
        self.slices.set_heat_maps({} if heat_map is None else {heat_map.name: heat_map})
        self.caption.value = "" if heat_map is None else self._described(heat_map)

    def _offer_controls(self) -> None:
        """Show the controls that the choice needs, with as many layers and heads as the model has."""
        from medctkit.lora.strength import can_be_scaled

        self.strength.layout.display = None if can_be_scaled(self.models[self.model.value]) else "none"
        needed = SHOWN[self.shown.value]
        for name in {control for controls in SHOWN.values() for control in controls}:
            getattr(self, name).layout.display = None if name in needed else "none"
        if "layer" in needed:
            layers = self.models[self.model.value].vision_encoder.attention_layers()[self.shown.value.split()[0]]
            self.layer.max = len(layers) - 1
            chosen = self.head.value
            heads = range(layers[0].heads)
            self.head.options = [(MEAN, MEAN), *((f"head {i}", i) for i in heads)]
            self.head.value = chosen if chosen in heads else MEAN

    def heat_map(self) -> HeatMap | None:
        """The map (t, h, w) that the controls ask for, of sum 1, in multiples of what a patch would have by chance.

        Raises:
            ValueError: a model of another input size, a crosshair outside of what it sees, no sentence or one too long.
        """
        from medctkit.attention.maps import attend, patch_map, relevance
        from medctkit.lora.strength import at_strength, can_be_scaled

        shown, name = self.shown.value, self.model.value
        head = None if self.head.value == MEAN else self.head.value
        self._patch = None
        if shown == "nothing":
            return None
        pixels = self._once(preprocess, lambda: preprocess(self.volume, self.config))
        model, strength = self.models[name], self.strength.value
        scaled = strength != 1 and can_be_scaled(model)

        def once(see: Callable[[], Any], *of: str | None) -> Any:
            with at_strength(model, strength) if scaled else nullcontext():
                return self._once((name, strength if scaled else 1, *of), see)

        part = shown.split()[0]
        if shown == "speaks for a prompt":
            sentences = self.stating.value.strip(), self.denying.value.strip() or None
            values = once(lambda: relevance(model, self.tokenizer, pixels, *sentences), *sentences)
        elif shown == "rollout":
            values = once(lambda: attend(model, pixels)).rollout()
        elif shown.endswith("received"):
            values = once(lambda: attend(model, pixels)).received(part, self.layer.value, head)
        else:
            self._patch = self._patch_under(self.slices.position)
            if self._patch is None:
                raise ValueError("the crosshair is outside of what the model sees; click a place further inside")
            values = once(lambda: attend(model, pixels)).of_query(part, self.layer.value, head, self._patch)
        if shown == "speaks for a prompt":
            shown = f"speaks for {self.prompt.value}"
        found = patch_map(values * values.size, self.volume, self.config, f"{name}: {shown}, times chance")
        return replace(found, smooth=False)  # patches as the squares that they are

    def _patch_under(self, point: np.ndarray) -> tuple[int, int, int] | None:
        from medctkit.attention.maps import patch_at

        return patch_at(point.tolist(), self.volume, self.config, self.models[self.model.value].config.grid)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is made the first time and kept until `close`."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    # --- what it says ---

    def _described(self, heat_map: HeatMap) -> str:
        """The caption: which map, its range, and how much of it lies in each mask."""
        from medctkit.attention.localisation import patch_shares

        shown, values = self.shown.value, heat_map.values
        what = f"{self.model.value}: {shown}"
        if "layer" in SHOWN[shown]:
            head = MEAN if self.head.value == MEAN else f"head {self.head.value}"
            what += f", layer {self.layer.value} of 0 to {self.layer.max}, {head}"
        if self._patch is not None:
            middle = (heat_map.affine @ [*self._patch, 1])[:3]
            what += f"; patch (t, i, j) = {self._patch} under the crosshair, around {place_of(middle)}"
        if shown == "speaks for a prompt":
            against = f" against {self.denying.value.strip()!r}" if self.denying.value.strip() else ""
            what += f": {self.stating.value.strip()!r}{against}"
        low, high = heat_map.limits
        said = [what, f"a patch has {low:.2g} to {high:.2g} times what it would have if all were alike (chance)"]
        for name, mask in self.masks.items():
            made = partial(patch_shares, mask, self.volume, self.config, values.shape)
            filled = self._once((patch_shares, name, values.shape), made)  # of each patch
            share, size = float((values * filled).sum() / values.sum()), float(filled.mean())
            times = f"{share / size:.1f} times chance" if size else "nothing that the model sees"
            said.append(f"{name}: {times}; {share:.1%} of the map in {size:.1%} of what the model sees")
        return lines(said)

    def close(self) -> None:
        """Free what was captured, and the widget."""
        self._kept.clear()
        self.slices.close()
        close_with_children(self.widget)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.widget._repr_mimebundle_(**kwargs)


def _of_findings() -> dict[str, tuple[str, str]]:
    """The paper's pair for each of the 18 findings."""
    from medctkit.zero_shot.prompts import prompt_sentences

    stating, denying = prompt_sentences("paper")
    return {name: (states[0], denies[0]) for name, states, denies in zip(FINDINGS, stating, denying, strict=True)}
