"""Small scans in every file format, for tests."""

from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from hypothesis import strategies as st
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.sr.codedict import codes
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from medctkit.scans.dicom_series import read_dicom
from medctkit.scans.preprocessing import PreprocessConfig

SHAPE, SPACING = (8, 12, 10), (12.5, 8.0, 7.7)  # few voxels, but 100 x 96 x 77 mm of a patient
COMPRESSED = [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless]
SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
SYNTAXES += COMPRESSED
MINI = PreprocessConfig((11.25, 5.625, 5.625), (32, 64, 64), antialias=True)  # what the mini model sees
LPS = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1])  # affine of a NIfTI that lies as slices of DICOM do

orientations = st.permutations(["SI", "PA", "LR"]).flatmap(
    lambda pairs: st.tuples(*map(st.sampled_from, pairs)).map("".join)
)


def chest(shape=SHAPE):
    """Int16 HU that no axis can be flipped or swapped in unnoticed: soft tissue with a corner of air."""
    d, h, w = np.indices(shape)
    hu = (d * 7 + h * 3 + w).astype(np.int16)
    hu[: shape[0] // 2, :, : shape[2] // 2] -= 900
    return hu


def write_nifti(path, hu, affine=None, **header):
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), LPS if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def to_nifti(path, volume, hu=None):
    """A volume, or other values on its voxels, as a NIfTI file that lies where it lies."""
    return write_nifti(path, volume.hu if hu is None else hu, volume.affine[:, [2, 1, 0, 3]])


def write_itk(path, hu, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1), spacing=SPACING, compressed=False):
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing[::-1])
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path), compressed)
    return path


def write_dicom(
    folder,
    hu,
    names=None,
    slope=1,
    intercept=-1024,
    step=(0, 0, SPACING[0]),
    origin=(0, 0, 0),
    series=None,
    syntax=ExplicitVRLittleEndian,
    each=None,
    **tags,
):
    """A series of one file for each slice.

    `tags` replace or, where None, remove those of every header; `each` has lists of tags, a value for each slice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series = series or generate_uid()
    for i, pixels in enumerate(hu):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = syntax
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        slice_ = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        slice_.Modality, slice_.SeriesInstanceUID, slice_.SeriesDescription = "CT", series, "chest"
        slice_.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        slice_.ImagePositionPatient = [float(o + s * i) for o, s in zip(origin, step, strict=True)]
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.PixelSpacing = list(SPACING[1:])
        slice_.Rows, slice_.Columns = pixels.shape
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated = slice_.BitsStored = 16
        slice_.HighBit, slice_.PixelRepresentation = 15, tags.get("PixelRepresentation", 1)
        slice_.RescaleSlope, slice_.RescaleIntercept = slope, intercept
        stored = np.round((pixels - intercept) / slope).astype("<i2" if slice_.PixelRepresentation else "<u2")
        slice_.PixelData = stored.astype(stored.dtype if syntax.is_little_endian else ">i2").tobytes()
        _set_tags(slice_, tags | {tag: values[i] for tag, values in (each or {}).items()})
        if syntax.is_compressed and syntax.is_encapsulated:
            _compress(slice_, stored, syntax)
        file = folder / (names[i] if names else f"{i:03}.dcm")
        encoding = dict(implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
        dcmwrite(file, slice_, **encoding, enforce_file_format=True)
    return folder


def _compress(slice_, stored, syntax):
    if syntax in (RLELossless, JPEGLSLossless):
        slice_.compress(syntax, stored, generate_instance_uid=False)
        return
    with TemporaryDirectory() as folder:  # only the compressed picture of what SimpleITK writes
        writer = sitk.ImageFileWriter()
        writer.SetFileName(f"{folder}/picture.dcm")
        writer.SetUseCompression(True)
        writer.SetCompressor({JPEGLosslessSV1: "JPEG", JPEG2000Lossless: "JPEG2000"}[syntax])
        writer.Execute(sitk.GetImageFromArray(stored[None]))
        picture = dcmread(writer.GetFileName())
    assert picture.file_meta.TransferSyntaxUID == syntax
    slice_.PixelData = picture.PixelData
    slice_["PixelData"].VR, slice_["PixelData"].is_undefined_length = "OB", True


def repack(path, picture, syntax):
    """Put a picture, compressed by another encoder, into a slice."""
    header = dcmread(path)
    header.PixelData, header.file_meta.TransferSyntaxUID = encapsulate([picture]), syntax
    header["PixelData"].VR = "OB"
    header.save_as(path)


def heights(zs):
    """Places (mm) of the slices of a series, for `write_dicom`."""
    return {"ImagePositionPatient": [[0, 0, z] for z in zs]}


def truncate(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def enhanced(files, path):
    """One enhanced CT file at `path` of the slices in `files`, which are taken away; each slice is a frame of it."""
    slices = [dcmread(file) for file in files]
    whole, shared = dcmread(files[0]), Dataset()
    for file in files:
        file.unlink()

    def move(sources, target, sequence, *tags, **renamed):
        group = Dataset()
        for tag in [*tags, *renamed]:
            if tag in sources:
                setattr(group, renamed.get(tag, tag), sources[tag].value)
            whole.pop(tag, None)
        setattr(target, sequence, [group])

    frames = [Dataset() for _ in slices]
    for one, frame in zip(slices, frames, strict=True):
        move(one, frame, "PlanePositionSequence", "ImagePositionPatient")
        move(one, frame, "PixelValueTransformationSequence", "RescaleSlope", "RescaleIntercept", "RescaleType")
        move(one, frame, "FrameContentSequence", AcquisitionNumber="FrameAcquisitionNumber")
    move(slices[0], shared, "PlaneOrientationSequence", "ImageOrientationPatient")
    move(slices[0], shared, "PixelMeasuresSequence", "PixelSpacing")
    move(slices[0], shared, "CTReconstructionSequence", "ConvolutionKernel")
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence = [shared], frames
    whole.NumberOfFrames = len(frames)
    pixels = [one.PixelData for one in slices]
    if whole.file_meta.TransferSyntaxUID.is_encapsulated:
        pixels = [encapsulate([get_frame(data, 0, number_of_frames=1) for data in pixels])]
    whole.PixelData = b"".join(pixels)
    whole.save_as(path)
    return path


def write_drawing(folder, files, mask, description):
    """One reader's segmentation of a nodule, by highdicom; only slices that hold some of it have a frame."""
    import highdicom

    source = [dcmread(file) for file in files]
    code = codes.SCT.Nodule
    told = highdicom.seg.SegmentDescription(1, "Nodule", code, code, "MANUAL")
    drawing = highdicom.seg.Segmentation(
        source, mask.astype(np.uint8), "BINARY", [told], highdicom.UID(), 1, highdicom.UID(), 1,
        "nobody", "phantom", "1", "1", omit_empty_frames=True, series_description=description,
    )  # fmt: skip
    folder.mkdir(parents=True)
    drawing.save_as(folder / "drawing.dcm")


def values(folder, series=None, spacing=None, **choices):
    return read_dicom(folder, spacing, series, **choices).hu


def notes(folder, series=None, **choices):
    return "; ".join(read_dicom(folder, None, series, **choices).notes)


def change(path, **tags):
    """Set tags of a file or, where None, remove them."""
    header = dcmread(path)
    _set_tags(header, tags)
    header.save_as(path)


def _set_tags(header, tags):
    for tag, value in tags.items():
        if value is None:
            delattr(header, tag)
        else:
            setattr(header, tag, value)
