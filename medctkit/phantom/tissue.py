"""Hounsfield units of tissues; ordinary textbook values for adults, none fitted to a data set."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tissue:
    """Hounsfield units of the tissues in one scan; contrast medium changes most of them."""

    fat: float = -98.0
    muscle: float = 48.0
    blood: float = 41.0
    veins: float = 40.0
    myocardium: float = 44.0
    liver: float = 57.0
    spleen: float = 48.0
    thyroid: float = 95.0
    lung: float = -862.0

    @classmethod
    def sample(cls, rng: np.random.Generator, contrast: bool) -> "Tissue":
        """Draw the tissues of one scan, with or without intravenous contrast medium."""
        n = rng.normal
        shared = dict(fat=n(-100, 5), lung=n(-858, 16))
        if not contrast:
            return cls(muscle=n(48, 4), blood=n(41, 3), veins=n(40, 3), liver=n(56, 7), spleen=n(48, 3), **shared)
        return cls(
            muscle=n(58, 5), blood=n(205, 38), veins=n(185, 60), myocardium=n(98, 10), liver=n(92, 14),
            spleen=n(112, 14), thyroid=n(150, 20), **shared,
        )  # fmt: skip
