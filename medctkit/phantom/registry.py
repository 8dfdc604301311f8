"""The registry of findings: for each its name, how often it occurs, who paints it and what reports call it.

Drawing, labels and reports walk over a registry and know no finding by name; docs/extending.md adds one. Names,
prevalences and groups are `assets/findings.csv`, wordings `assets/wordings.json`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import numpy as np

from medctkit.findings import FINDINGS, GROUPS, PREVALENCE
from medctkit.phantom import airway_findings, body_findings, lesions, lung_findings, lung_lesions
from medctkit.phantom.lung_lesions import Painted

Painter = Callable[[Any, np.random.Generator], Painted]  # of a `Chest` (first drawing) or a `Body` (second)
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
    ("Peribronchial thickening", 2, lung_lesions.peribronchial),
    ("Bronchiectasis", 2, lung_lesions.bronchiectasis),
    ("Emphysema", 1, lung_lesions.emphysema),
    ("Mosaic attenuation pattern", 1, lung_lesions.mosaic),
    ("Interlobular septal thickening", 1, lung_lesions.septal_thickening),
    ("Lung opacity", 1, lung_lesions.opacity),
    ("Consolidation", 3, lung_lesions.consolidation),
    ("Atelectasis", 3, lung_lesions.atelectasis),
    ("Lung nodule", 3, lung_lesions.nodule),
    ("Pulmonary fibrotic sequela", 2, lung_lesions.fibrosis),
    ("Pleural effusion", 5, lung_lesions.pleural_effusion),
    ("Cardiomegaly", 4, lesions.cardiomegaly),
    ("Pericardial effusion", 4, lesions.pericardial_effusion),
    ("Coronary artery wall calcification", 8, lesions.coronary_calcification),
    ("Arterial wall calcification", 7, lesions.arterial_calcification),
    ("Lymphadenopathy", 6, lesions.lymphadenopathy),
    ("Hiatal hernia", 5, lesions.hiatal_hernia),
    ("Medical material", 9, lesions.medical_material),
)
REGISTRY: Mapping[str, Finding] = MappingProxyType(
    {
        name: Finding(name, PREVALENCE[name], paint, _TEXTS["findings"][name], GROUPS[name], layer)
        for name, layer, paint in _PAINTED
    }
)
_REDRAWN: dict[str, Painter] = {
    "Peribronchial thickening": airway_findings.peribronchial,
    "Bronchiectasis": airway_findings.bronchiectasis,
    "Emphysema": lung_findings.emphysema,
    "Mosaic attenuation pattern": lung_findings.mosaic,
    "Interlobular septal thickening": lung_findings.septal_thickening,
    "Lung opacity": lung_findings.opacity,
    "Consolidation": lung_findings.consolidation,
    "Atelectasis": lung_findings.atelectasis,
    "Lung nodule": lung_findings.nodule,
    "Pulmonary fibrotic sequela": lung_findings.fibrosis,
    "Pleural effusion": lung_findings.pleural_effusion,
    "Cardiomegaly": body_findings.cardiomegaly,
    "Pericardial effusion": body_findings.pericardial_effusion,
    "Coronary artery wall calcification": body_findings.coronary_calcification,
    "Arterial wall calcification": body_findings.arterial_calcification,
    "Lymphadenopathy": body_findings.lymphadenopathy,
    "Hiatal hernia": body_findings.hiatal_hernia,
    "Medical material": body_findings.medical_material,
}
REGISTRIES: Mapping[int, Mapping[str, Finding]] = {  # by drawing
    1: REGISTRY,
    2: MappingProxyType(
        {  # a collapsed lobe moves its neighbours: after what lies in them
            name: replace(finding, paint=_REDRAWN[name], layer=4 if name == "Atelectasis" else finding.layer)
            for name, finding in REGISTRY.items()
        }
    ),
}


def label_order(registry: Mapping[str, Finding]) -> list[str]:
    """The names of a registry as label columns: the 18 findings in their order, then what was added."""
    return [*(name for name in FINDINGS if name in registry), *(name for name in registry if name not in FINDINGS)]
