"""A small imitation of CT-RATE's folder: its layout and its names, with phantoms and invented tables.

Nothing in it is of CT-RATE: volumes, reports, labels and metadata are made up here.
"""

import csv

import nibabel as nib
import numpy as np

from medctkit.cohort.ct_rate import TABLES, parse_volume_name, volume_path
from medctkit.findings import FINDINGS
from medctkit.phantom.study import generate

SHAPE = (24, 48, 48)  # 360 mm each way: voxels of 15 x 7.5 x 7.5 mm
# patient -> scan -> number of reconstructions
PATIENTS = {
    "train_1": {"a": 2, "b": 1},
    "train_2": {"a": 1},
    "train_3": {"a": 1},
    "train_4": {"a": 1},
    "valid_1": {"a": 2},
    "valid_2": {"a": 1},
}
NO_CHEST = ("train_3_a_1",)
NO_REPORT = ("train_4_a",)  # "Not given." all over
NO_FINDINGS = ("valid_2_a",)  # "Not given." but for the impressions
INTERCEPTS = (-1024, -8192)  # both occur


def names_of(patients):
    return [f"{p}_{scan}_{i + 1}" for p, scans in patients.items() for scan, n in scans.items() for i in range(n)]


def row_of(name, labels, findings, intercept=-1024, spacing=(15.0, 7.5, 7.5)):
    """One row for each of the three tables, as a dict from kind to row."""
    scan = name.rpartition("_")[0]
    number = int(parse_volume_name(name).patient.split("_")[1])
    reports = dict(
        ClinicalInformation_EN="Cough.",
        Technique_EN="An invented scan.",
        Findings_EN="Not given." if scan in (*NO_REPORT, *NO_FINDINGS) else findings,
        Impressions_EN="Not given." if scan in NO_REPORT else f"Invented impression,\nof {scan}.",
    )
    metadata = dict(
        Manufacturer="Phantom Works",
        SeriesDescription=f"series {name[-1]}",
        PatientSex="FM"[number % 2],
        PatientAge=f"{30 + number % 60:03}Y",
        ConvolutionKernel="soft" if name.endswith("_1") else "sharp",
        NumberofSlices=SHAPE[0],
        XYSpacing=str(list(spacing[1:])),
        ZSpacing=spacing[0],
        RescaleIntercept=intercept,
        RescaleSlope=1,
    )
    kinds = dict(labels={f: labels[f] for f in FINDINGS}, reports=reports, metadata=metadata)
    return {kind: {"VolumeName": f"{name}.nii.gz"} | row for kind, row in kinds.items()}


def write_tables(root, rows, no_chest=NO_CHEST):
    """The tables and lists of both splits.

    Args:
        rows: dicts as `row_of` gives them.
        no_chest: names of volumes.
    """
    for split, tables in TABLES.items():
        here = [row for row in rows if row["labels"]["VolumeName"].startswith(split)]
        for kind in ("labels", "reports", "metadata"):
            path = root / tables[kind]
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0][kind]))
                writer.writeheader()
                writer.writerows(row[kind] for row in here)
        names = [f"{name}.nii.gz\n" for name in no_chest if name.startswith(split)]
        (root / tables["no_chest"]).write_text("".join(names))


def write_volume(root, name, study, version, intercept=-1024):
    """Version 1: stored values under a blank header; version 2: HU under the true one."""
    path = root / volume_path(name, version)
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = study.volume.hu.transpose(2, 1, 0)  # d h w -> x y z
    if version == 1:
        image = nib.Nifti1Image((voxels - np.int16(intercept)).astype(np.int16), None)
    else:
        image = nib.Nifti1Image(voxels, study.volume.affine[:, [2, 1, 0, 3]])
    nib.save(image, path)
    return path


def write_ct_rate(root, patients=PATIENTS, versions=(1, 2), no_chest=NO_CHEST, shape=SHAPE):
    """Write the whole folder; the same arguments give the same values.

    Args:
        root: gets the folder `dataset`.
        patients: patient -> scan letter -> number of reconstructions.
        versions: which versions of the volumes to write.
        no_chest: volumes that the lists name as no chests (phantoms like the others).
        shape: voxels (d, h, w) of every volume.

    Returns:
        Volume name -> `PhantomStudy`.
    """
    studies, rows = {}, []
    for i, name in enumerate(names_of(patients)):
        _, patient, scan, reconstruction = parse_volume_name(name)
        seed = 1000 * int(patient.split("_")[1]) + ord(scan)
        study = generate(seed, "source", shape=shape, patient=patient, reconstruction=reconstruction - 1)
        intercept = INTERCEPTS[i % 2]
        for version in versions:
            write_volume(root, name, study, version, intercept)
        studies[name] = study
        rows.append(row_of(name, study.labels, study.report, intercept, study.volume.spacing))
    write_tables(root, rows, no_chest)
    return studies
