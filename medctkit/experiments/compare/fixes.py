"""Ways to move scans, Hounsfield units and embeddings of one hospital to where another has them; no label needed.

Volumes are `pixel_values` as `CTReportDataset` gives them: (1, d, h, w) of HU / 1,000, d along the patient.
"""

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from medctkit.scans.preprocessing import moved_by

AIR, TISSUE = -0.95, -0.5  # below: the air around a patient; above: the body without its lungs
LEVELS = np.linspace(0, 1, 257)  # quantiles: 0.4 % of the body between two, a calcification may be less
BANDS = (-1000, -950, -900, -850, -700, -500, -200, -50, 30, 70, 150, 300, 600, 1001)  # HU; a band has its upper end
BOXES = 4  # along each axis
IN_PLANE = ndimage.generate_binary_structure(2, 1)[None]


def lung_centre(volume: torch.Tensor) -> np.ndarray:
    """Centre (3,) in voxels along (d, h, w) of the air that the body encloses, slice by slice; NaN if there is none.

    Neither the air around the patient nor what noise makes of it counts; lungs with emphysema, thinner than they should
    be, do.
    """
    body = volume[0].numpy() > TISSUE
    places = np.argwhere(ndimage.binary_fill_holes(body, IN_PLANE) & ~body)
    return places.mean(0) if len(places) else np.full(3, np.nan)


def registered(volume: torch.Tensor, centre: np.ndarray) -> torch.Tensor:
    """The volume, moved by whole voxels to bring its lungs to `centre` (3,); air comes in. Without lungs it stays."""
    move = centre - lung_centre(volume)
    if np.isnan(move).any():
        return volume
    return moved_by(volume, np.floor(np.round(move + 0.5, 6)).astype(int).tolist())


def body_quantiles(volume: torch.Tensor) -> np.ndarray:
    """Quantiles (257,) at `LEVELS` of all that is denser than air in a volume (1, d, h, w); NaN if nothing is."""
    body = volume[volume > AIR].numpy()
    return np.quantile(body, LEVELS) if len(body) else np.full(len(LEVELS), np.nan)


def matched(volume: torch.Tensor, to: np.ndarray, of: np.ndarray | None = None) -> torch.Tensor:
    """The volume with the HU of its body mapped so that quantiles `of`, by default its own, become the quantiles `to`.

    Its own (Nyul and Udupa 1999) take off what one scan differs by, and with it some of what disease adds to it; those
    of all scans of a hospital leave disease alone, and what differs from scan to scan.
    """
    body, out = volume > AIR, volume.clone()
    own = body_quantiles(volume) if of is None else of
    out[body] = torch.from_numpy(np.interp(volume[body].numpy(), own, to)).float()
    return out


def recentred(embeddings: torch.Tensor, of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """Embeddings (n, p) moved from the mean of `of` (m, p) to the mean of `to` (k, p).

    It adds the same number to a finding's margin in all scans: calibration changes, but their order, and so the AUROC,
    hardly does (only because embeddings are brought to unit length afterwards).
    """
    return embeddings - of.mean(0) + to.mean(0)


def coral(embeddings: torch.Tensor, of: torch.Tensor, to: torch.Tensor, shrink: float = 0.1) -> torch.Tensor:
    """Embeddings (n, p) whitened by mean and covariance of `of` (m, p) and coloured by those of `to` (k, p).

    Correlation alignment (Sun et al. 2016, arXiv 1511.05547); `shrink` of each covariance is its mean variance.
    """

    def power(seen: torch.Tensor, exponent: float) -> torch.Tensor:
        covariance = torch.cov(seen.double().T)
        mean = covariance.trace() / len(covariance)
        values, vectors = torch.linalg.eigh((1 - shrink) * covariance + shrink * mean * torch.eye(len(covariance)))
        return vectors @ torch.diag(values**exponent) @ vectors.T

    return ((embeddings - of.mean(0)).double() @ power(of, -0.5) @ power(to, 0.5)).float() + to.mean(0)


def hu_boxes(volume: torch.Tensor) -> np.ndarray:
    """Shares of `BANDS` of HU in `BOXES` x `BOXES` x `BOXES` boxes of a volume: (bands * boxes,)."""
    band = torch.bucketize(volume.contiguous(), torch.tensor(BANDS[1:-1]) / 1000)  # (1, d, h, w)
    is_in = band == torch.arange(len(BANDS) - 1)[:, None, None, None]  # (bands, d, h, w)
    return F.adaptive_avg_pool3d(is_in.float(), BOXES).flatten().numpy()
