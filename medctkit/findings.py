"""The 18 findings of CT-RATE: names, order, how often they occur and where reports speak of them.

Names and order are those of the zero-shot evaluation of CT-CLIP (arXiv 2403.17834) and of the label
columns of CT-RATE; shares are of scans positive in its training split. The table is a data file,
`assets/findings.csv`, so that it can be read without Python.
"""

import csv
from importlib.resources import files

_TABLE = list(csv.DictReader((files("medctkit") / "assets" / "findings.csv").read_text().splitlines()))

FINDINGS: tuple[str, ...] = tuple(row["finding"] for row in _TABLE)
PREVALENCE: dict[str, float] = {row["finding"]: float(row["train_percent"]) / 100 for row in _TABLE}
GROUPS: dict[str, str] = {row["finding"]: row["group"] for row in _TABLE}
