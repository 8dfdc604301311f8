"""Who was scanned, and with what: the characteristics by which a report tells patients apart."""

from collections.abc import Sequence

import pandas as pd

from medctkit.cohort.manifest import has_file
from medctkit.phantom.patient import Patient
from medctkit.phantom.study import person_of

COLUMNS = {"sex": "PatientSex", "age": "PatientAge", "manufacturer": "Manufacturer", "kernel": "ConvolutionKernel"}
AGES = {"under 50": 0, "50 to 64": 50, "65 to 79": 65, "80 and over": 80}  # years from which a band begins
KERNELS = ("standard", "smooth", "sharp")  # of a phantom's reconstructions 0, 1, 2
MOST = 6  # values of a characteristic that stand alone; the rest are "other"


def characteristics(rows: Sequence[dict]) -> pd.DataFrame:
    """Sex, age band, manufacturer and kernel of studies, as text; "" where unknown.

    A real scan has them in columns of the manifest by the names of DICOM, which CT-RATE's metadata fill; a phantom has
    its person's, its hospital for a scanner, and a kernel by the number of its reconstruction.

    Args:
        rows: of a manifest, as dicts.

    Returns:
        (n, 4): columns sex, age, manufacturer, kernel.
    """
    people: dict[tuple[str, str], Patient] = {}
    found: list[list] = []
    for row in rows:
        if has_file(row):
            found.append([row.get(column) for column in COLUMNS.values()])
            continue
        who = (row["patient"], row["hospital"])
        person = people[who] = people.get(who) or person_of(*who)
        kernel = KERNELS[int(row["reconstruction"]) % len(KERNELS)]
        found.append([person.sex, person.age, f"phantom, {row['hospital']}", kernel])
    table = pd.DataFrame(found, columns=list(COLUMNS)).astype(object)
    years = pd.to_numeric(table["age"], errors="coerce")
    table["age"] = pd.cut(years, [*AGES.values(), 150], right=False, labels=list(AGES)).astype(object)
    table = table.where(table.notna(), "").astype(str).apply(lambda column: column.str.strip())
    for name in ("manufacturer", "kernel"):
        often = table.loc[table[name] != "", name].value_counts().index[:MOST]
        table[name] = table[name].where(table[name].isin(often) | (table[name] == ""), "other")
    return table
