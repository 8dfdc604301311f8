"""Free-text reports for phantoms, in the habits of two hospitals.

The source hospital writes full sentences, goes from the airways outwards and names what it did not find. The
target hospital dictates fragments and abbreviations, starts with the mediastinum and skips most absences. The
wordings are a data file, `assets/wordings.json`. None is a prompt of the evaluation
("{finding} is present." / "{finding} is not present."), so that no model reads in training what it will be asked.
"""

import re
from collections.abc import Mapping

import numpy as np

from medctkit.phantom.registry import (
    DISTRACTORS,
    OF_ONE,
    OF_SEVERAL,
    REGISTRY,
    UNTRUE_WITH,
    WITH_CONTRAST,
    Finding,
    label_order,
)

MENTIONED = {"source": 0.97, "target": 0.93}  # how often a finding that is there gets into the report
ABSENCES = {"source": (3, 6), "target": (1, 4)}
ASIDES = {"source": (2, 4), "target": (1, 4)}  # sentences about what is no finding
DETAIL = {"source": 0.7, "target": 0.6}  # how often a detail that is known is told

ORDER = {  # groups of findings in the order in which each hospital speaks of them
    "source": ("airways", "lungs", "pleura", "heart", "mediastinum", "devices"),
    "target": ("mediastinum", "heart", "devices", "pleura", "lungs", "airways"),
}
ABBREVIATIONS = {
    "left anterior descending artery": "LAD",
    "left circumflex artery": "LCX",
    "right coronary artery": "RCA",
}


def _check_hospital(hospital: str) -> None:
    if hospital not in ORDER:
        raise ValueError(f"hospital={hospital!r} is unknown; choose one of {sorted(ORDER)}")


class _Slots(dict):
    """Fills the slots of a wording from the details of a finding; an unknown detail leaves nothing behind."""

    def __init__(self, details: Mapping, told: bool, full: bool):
        known = details if told else {}
        side, location, severity = (str(known.get(k, "")) for k in ("side", "location", "severity"))
        both = side == "bilateral"
        lobe = f"{location}s" if both and location.endswith("lobe") else location
        size = known.get("size_mm")
        kind, count = str(known.get("kind", "")), int(known.get("count", 2))
        if full:
            where = f" in both {lobe}" if both else f" in the {side} {lobe}"
            where = where if side and location else " in both lungs" if both else f" in the {side} lung" if side else ""
            zone = f" in the {location} parts of {'both lungs' if both else f'the {side} lung'}"
            pleura = " on both sides" if both else f" on the {side} side"
            place = f" in the {location}" if "artery" in location else f" in the {location} region"
            size = f", measuring {size} mm" if size else ""
        else:
            where = f", {'bilateral' if both else side} {lobe}".rstrip()
            zone = f", {'bilateral' if both else side} {location}"
            pleura = " bilateral" if both else f" {side}"
            place = f", {location}"
            size = f", {size} mm" if size else ""
        device = kind or "device"
        article = "" if device.endswith("wires") else "an " if device[0] in "aeiou" else "a "
        words = {
            "where": where if side else "",
            "zone": zone if side and location else "",
            "pleura": pleura if side else "",
            "place": place if location else "",
            "abbr": f" {ABBREVIATIONS[location]}" if location in ABBREVIATIONS else "",
            "size": size,
            "sev": f"{severity} " if severity else "",
            "degree": "" if not severity else f", {severity} in degree" if full else f", {severity}",
            "kind": f"{kind} " if kind else "",
            "device": f", {article}{device}" if kind else "",
            "device_a": article + device,
            "device_bare": device,
            "count": str(max(count, 2)),
        }
        words["Count"] = {2: "Two", 3: "Three", 4: "Four"}.get(max(count, 2), "Several")
        for name in ("sev", "kind", "device_a", "device_bare"):
            words[name.capitalize()] = words[name][:1].upper() + words[name][1:]
        super().__init__(words)


def _true(wording: str, found: Mapping, labels: Mapping[str, int]) -> bool:
    """Whether a wording fits the number of things found, and denies nothing that another finding is."""
    several = found.get("count", 0) > 1
    if "count" in found and wording in (OF_ONE if several else OF_SEVERAL):
        return False
    return not any(labels.get(name) for name in UNTRUE_WITH.get(wording, ()))


# What a report says of a finding by turns, so that no single word comes to stand for "is there": then a word that no
# report holds, such as that of the evaluation's prompts, is understood as one of them.
PREDICATES = (
    "seen", "observed", "noted", "found", "identified", "detected", "visible", "evident", "demonstrated", "shown",
    "recognised", "appreciated", "apparent", "recorded", "depicted", "visualised",
)  # fmt: skip
_PREDICATE = re.compile(r"\b(?:seen|observed|noted|found|identified)\b")


def _fill(wording: str, details: Mapping, told: bool, hospital: str) -> str:
    text = wording.format_map(_Slots(details, told, hospital == "source"))
    return text[:1].upper() + text[1:]


def finding_sentences(finding: str, present: bool, hospital: str) -> tuple[str, ...]:
    """Wordings in which a hospital's reports state or deny a finding, without details.

    Args:
        finding: one of the 18 names.
        present: True for sentences that state it, False for sentences that deny it.
        hospital: "source" or "target".

    Raises:
        ValueError: unknown finding or hospital.
    """
    _check_hospital(hospital)
    if finding not in REGISTRY:
        raise ValueError(f"unknown finding {finding!r}; the 18 names are in medctkit.phantom.REGISTRY")
    wordings = REGISTRY[finding].wordings[hospital]["present" if present else "absent"]
    return tuple(_fill(w, {}, False, hospital) for w in wordings)


def write_report(
    labels: Mapping[str, int],
    details: Mapping[str, Mapping],
    hospital: str,
    rng: np.random.Generator,
    registry: Mapping[str, Finding] = REGISTRY,
    contrast: bool = False,
) -> str:
    """Write the findings section of a report.

    Args:
        labels: 0 or 1 for each finding of the registry.
        details: for findings present, what a report may tell: side, location, size_mm, count, severity, kind.
        hospital: "source" or "target".
        rng: chooses wordings, details and which absences are named.
        registry: the findings; by default the 18.
        contrast: whether the scan has contrast medium.

    Returns:
        One paragraph. A finding that is present is left out now and then, as in life; nothing absent is stated.

    Raises:
        ValueError: unknown hospital, or labels that are not those of the registry.
    """
    _check_hospital(hospital)
    if set(labels) != set(registry):
        wrong = sorted(set(labels) ^ set(registry))
        raise ValueError(f"labels must have the {len(registry)} findings as keys; missing or unknown: {wrong}")
    absent = [name for name in label_order(registry) if not labels[name]]
    low, high = ABSENCES[hospital]
    denied = (
        set(rng.choice(absent, size=min(len(absent), int(rng.integers(low, high))), replace=False)) if absent else set()
    )
    sentences = []
    for name, finding in sorted(registry.items(), key=lambda item: ORDER[hospital].index(item[1].group)):
        wordings = finding.wordings[hospital]
        if labels[name] and rng.random() < MENTIONED[hospital]:
            choices, told = wordings["present"], rng.random() < DETAIL[hospital]
        elif name in denied:
            choices, told = wordings["absent"], False
        else:
            continue
        found = details.get(name, {}) if labels[name] else {}
        choices = [wording for wording in choices if _true(wording, found, labels)]
        if not told:  # the number is known even where no detail is told
            found, told = {key: found[key] for key in ("count",) if key in found}, True
        if choices:
            sentences.append(_fill(choices[int(rng.integers(len(choices)))], found, told, hospital))
    if hospital == "source":
        sentences = [_PREDICATE.sub(PREDICATES[int(rng.integers(len(PREDICATES)))], s) for s in sentences]
    extra = [s for s in DISTRACTORS[hospital] if contrast or s not in WITH_CONTRAST]
    for i in rng.choice(len(extra), size=int(rng.integers(*ASIDES[hospital])), replace=False):
        sentences.insert(int(rng.integers(len(sentences) + 1)), extra[int(i)])
    return " ".join(sentences)
