"""Good scans with something odd in their headers: each a function of a folder that writes one and gives its path."""

import gzip
from functools import partial

import nibabel as nib
import numpy as np
from nibabel import nifti1
from scan_files import LPS, chest, write_itk, write_nifti


def nifti(name="scan.nii", **fields):
    """A writer of the good scan with some fields of its header replaced byte for byte."""

    def write(folder):
        path = write_nifti(folder / name, chest())
        data = bytearray(gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes())
        header = np.frombuffer(data, nifti1.header_dtype, count=1)
        for field, value in fields.items():
            header[field] = value
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        return path

    return write


def dim(*sizes):
    return [len(sizes), *sizes, *[1] * (7 - len(sizes))]


def pixdim(*steps):
    return [1, *steps, 0, 0, 0, 0]


def saved(array, affine=None, name="scan.nii"):
    def write(folder):
        nib.save(nib.Nifti1Image(array, LPS if affine is None else affine), folder / name)
        return folder / name

    return write


def itk(name, old="", new="", compressed=False):
    """A writer of the good scan with a piece of its text header replaced."""

    def write(folder):
        write_itk(folder / name, chest(), compressed=compressed)
        data = (folder / name).read_bytes()
        assert data.count(old.encode()) == 1 or not old, f"{old!r} is not in the header once"
        (folder / name).write_bytes(data.replace(old.encode(), new.encode()) if old else data)
        return folder / name

    return write


nrrd, nhdr, mha, mhd = (partial(itk, f"scan.{suffix}") for suffix in ("nrrd", "nhdr", "mha", "mhd"))
