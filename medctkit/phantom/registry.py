"""The registry of findings: for each its name, how often it occurs, who paints it and what reports call it.

Drawing, labels and reports walk over a registry and know no finding by name; docs/extending.md adds one. Names,
prevalences and groups are `assets/findings.csv`, wordings `assets/wordings.json`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import numpy as np

from medctkit.findings import CT_RATE, CT_RATE_PREVALENCE, GROUPS
from medctkit.phantom import airway_findings, body_findings, lung_findings
from medctkit.phantom.body import Body

Painter = Callable[[Body, np.random.Generator], tuple[np.ndarray, dict[str, Any]]]
Wordings = Mapping[str, Mapping[str, list[str]]]


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        name: as in a label column.
        prevalence: share of scans that have it, 0 to 1.
        paint: takes a chest and a source of randomness, changes the Hounsfield units, and returns the share of every
            voxel (d, h, w) that the finding fills and what a report may tell: side, location, size_mm, count,
            severity, kind.
        wordings: for each hospital the sentences that state it ("present") and deny it ("absent"); slots such as
            {where} and {size} are filled from what the painter told.
        group: where reports speak of it: airways, lungs, pleura, heart, mediastinum or devices.
        layer: low layers are painted first: what lies diffuse in the lung, then single things, metal last.
    """

    name: str
    prevalence: float
    paint: Painter
    wordings: Wordings
    group: str = "lungs"
    layer: int = 3


_TEXTS = json.loads((files("medctkit") / "assets" / "wordings.json").read_text(encoding="utf-8"))
DISTRACTORS: Mapping[str, list[str]] = _TEXTS["distractors"]  # sentences about what is no finding
OF_ONE, OF_SEVERAL = frozenset(_TEXTS["of_one"]), frozenset(_TEXTS["of_several"])  # wordings that say a number
UNTRUE_WITH: Mapping[str, list[str]] = _TEXTS["untrue_with"]  # denials that other findings make untrue
WITH_CONTRAST = frozenset(_TEXTS["with_contrast"])  # sentences that need contrast medium

# In the order in which reports speak of them within a group.
_PAINTED: tuple[tuple[str, int, Painter], ...] = (
    ("Peribronchial thickening", 2, airway_findings.peribronchial),
    ("Bronchiectasis", 2, airway_findings.bronchiectasis),
    ("Emphysema", 1, lung_findings.emphysema),
    ("Mosaic attenuation pattern", 1, lung_findings.mosaic),
    ("Interlobular septal thickening", 1, lung_findings.septal_thickening),
    ("Lung opacity", 1, lung_findings.opacity),
    ("Consolidation", 4, lung_findings.consolidation),  # water in place of air: no hospital sees it paler
    ("Atelectasis", 4, lung_findings.atelectasis),  # a collapsed lobe moves what lies in its neighbours
    ("Lung nodule", 3, lung_findings.nodule),
    ("Pulmonary fibrotic sequela", 2, lung_findings.fibrosis),
    ("Pleural effusion", 5, lung_findings.pleural_effusion),
    ("Cardiomegaly", 4, body_findings.cardiomegaly),
    ("Pericardial effusion", 4, body_findings.pericardial_effusion),
    ("Coronary artery wall calcification", 8, body_findings.coronary_calcification),
    ("Arterial wall calcification", 7, body_findings.arterial_calcification),
    ("Lymphadenopathy", 6, body_findings.lymphadenopathy),
    ("Hiatal hernia", 5, body_findings.hiatal_hernia),
    ("Medical material", 9, body_findings.medical_material),
)
REGISTRY: Mapping[str, Finding] = MappingProxyType(
    {
        name: Finding(name, CT_RATE_PREVALENCE[name], paint, _TEXTS["findings"][name], GROUPS[name], layer)
        for name, layer, paint in _PAINTED
    }
)


def label_order(registry: Mapping[str, Finding]) -> list[str]:
    """The names of a registry as label columns: the 18 findings in their order, then what was added."""
    return [*(name for name in CT_RATE if name in registry), *(name for name in registry if name not in CT_RATE)]
