"""Paints the healthy chest of a patient, tissue by tissue, from the outside in.

The order matters: later tissues lie over earlier ones. `Chest` keeps what the lesions need to know
afterwards: how deep every voxel lies in the lung, and what blood and fat measure in this scan.
"""

from dataclasses import dataclass, field

import numpy as np

from medctkit.phantom.anatomy import Anatomy, Canvas, Found, ellipsoid, tubes
from medctkit.phantom.tissue import Tissue


@dataclass
class Chest:
    """A painted chest.

    Attributes:
        canvas: the grid and its Hounsfield units.
        anatomy: the patient.
        tissue: Hounsfield units of this scan.
        heart_scale: 1 for a heart of normal size.
        low: mm by which hyperinflation pushes the diaphragm down.
        lung_depth: (d, h, w) signed distance (mm) from the surface of the lungs, positive inside.
        cavity_depth: (d, h, w) signed distance (mm) from the inside of the rib cage.
        airway: (d, h, w) share of every voxel that is the lumen of a large airway.
    """

    canvas: Canvas
    anatomy: Anatomy
    tissue: Tissue
    heart_scale: float = 1.0
    low: float = 0.0
    lung_depth: np.ndarray = field(init=False)
    cavity_depth: np.ndarray = field(init=False)
    airway: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._wall()
        self._abdomen()
        self._mediastinum()
        self._lungs()
        self._heart_and_vessels()
        self._bones()

    def _wall(self):
        """Skin, fat, muscle with its fat planes; the cavity starts as fat."""
        c, a, t = self.canvas, self.anatomy, self.tissue
        z, y, x = c.z, c.y, c.x
        skin = a.body(z, y, x)
        cavity = a.cavity(z, y, x)
        c.paint(c.everywhere, c.occupancy(skin), 20.0)
        c.paint(c.everywhere, c.occupancy(skin - 2.2), t.fat)
        # muscle: a coat around the cavity, thick beside the spine and over the shoulders, inside the fat
        coat = 17 + 9 * np.exp(-(((y - a.depth) / 40) ** 2) - (x / 55) ** 2) + 12 * np.clip((z - 60) / 60, 0, 1)
        girdle = np.minimum(0.8 * (z - 52 + 0.5 * np.abs(y)), 9.0 + 0.0 * z)  # above, muscle reaches the fat
        muscle = np.minimum(np.maximum(cavity + coat, girdle), skin - 0.72 * a.fat - 2)
        c.paint(c.everywhere, c.occupancy(muscle), t.muscle)
        # thin planes of fat between the muscles of the shoulder girdle and the back
        swirl = np.abs(((cavity + 0.05 * z + 4 * np.sin(x / 26) * np.cos(y / 31)) % 11.0) - 5.5)
        planes = np.minimum(1.1 * np.sin(x / 37 + y / 29) - swirl, np.minimum(muscle - 1.5, -cavity - 11))
        c.paint(c.everywhere, 0.7 * c.occupancy(planes) * min(1.0, 2.2 / c.edge), t.fat)
        if a.breasts:
            for side in (-1, 1):
                centre = (-10.0, -(a.depth + a.fat * 0.75 + a.breasts * 0.35), side * 78.0)
                c.ellipsoid(centre, (26, a.breasts * 0.35, 24), 25.0)
        c.paint(c.everywhere, c.occupancy(cavity), t.fat)
        self.cavity_depth, self._skin = cavity, skin

    def _abdomen(self):
        """What lies under the diaphragm: liver, spleen, stomach with its air bubble, bowel in fat."""
        c, a, t = self.canvas, self.anatomy, self.tissue
        below = 0.8 * (a.diaphragm(c.y, c.x) - self.low - 3.0 - c.z)
        inside = np.minimum(below, self.cavity_depth - 3)
        diaphragm = np.minimum(inside, 3.0 - below)
        liver = np.minimum(inside, (28 - 0.35 * np.maximum(c.y, -40) - c.x) * 0.8)
        liver = np.minimum(liver, c.z + 205 - 0.5 * np.maximum(c.x, -90))
        c.paint(c.everywhere, c.occupancy(diaphragm), t.muscle)
        c.paint(c.everywhere, c.occupancy(liver), t.liver)
        dome = a.dome - 9 - self.low
        c.ellipsoid((dome - 48, 44, 86), (42, 36, 26), t.spleen)
        c.ellipsoid((dome - 44, -14, 56), (36, 38, 32), 32.0)  # stomach, its wall and content
        bubble = np.minimum(
            ellipsoid(c.z, c.y, c.x, (dome - 44, -14, 56), (32, 34, 28)), np.minimum(-(c.y + 22), inside - 4)
        )
        c.paint(c.everywhere, c.occupancy(bubble), -985.0)
        for side in (-1, 1):
            c.ellipsoid((-165, 52, side * 58), (40, 24, 23), t.muscle - 14 + 0.6 * (t.liver - 56))

    def _mediastinum(self):
        """Soft strands in the mediastinal fat, thymus remnant, oesophagus."""
        c, a, t = self.canvas, self.anatomy, self.tissue
        c.ellipsoid((40, -a.depth * 0.62, 2), (34, 9, 15), -45.0)
        path = np.array([(185, 28, 4), (110, 32, 4), (40, 38, 3), (-40, a.depth * 0.5, 8), (-95, 28, 18)])
        c.tube(path, 7.0, 34.0)
        c.tube(path[:3], 1.6, -600.0)
        for side in (-1, 1):
            c.ellipsoid((142, -6, side * 17), (19, 9, 8), t.thyroid)

    def _lungs(self):
        """Parenchyma with a gravity gradient and lobular texture, vessels, fissures."""
        c, a, t = self.canvas, self.anatomy, self.tissue
        depth = np.where(
            c.x >= 0,
            a.lung(c.z, c.y, c.x, 1, self.heart_scale, self.low),
            a.lung(c.z, c.y, c.x, -1, self.heart_scale, self.low),
        )
        self.lung_depth = depth
        rng = np.random.default_rng((a.tree_seed, 55))
        phase = rng.uniform(0, 6.28, 6)
        mottle = (
            np.sin(c.x / 7.1 + phase[0] + np.sin(c.y / 9.0 + phase[1]))
            * np.sin(c.y / 6.3 + phase[2] + np.sin(c.z / 8.2 + phase[3]))
            * np.sin(c.z / 7.7 + phase[4] + np.sin(c.x / 10.0 + phase[5]))
        )
        gravity = 26 * np.clip(c.y / a.depth, -1, 1) - 10 * np.clip(c.z / 120, -1, 1)
        inside = c.occupancy(depth)
        c.paint(c.everywhere, inside, t.lung + gravity + 13 * mottle)
        # fissures: the major ones run down and forward, the minor one is nearly level on the right
        for height, slope, on in ((8, 0.95, c.x > 0), (2, 0.95, c.x < 0)):
            gap = np.abs((c.z - height) - slope * (c.y - 4) + 5 * np.sin(c.x / 30)) / np.hypot(1, slope)
            sheet = np.minimum(0.45 - gap, depth) * 1.0
            c.paint(c.everywhere, on * np.where(sheet > -c.edge, c.occupancy(sheet), 0) * 0.45 / c.edge, -500.0)
        trees = [a.tree(side, kind) for side in (-1, 1) for kind in ("artery", "vein")]
        segments, radii = np.concatenate([t[0] for t in trees]), np.concatenate([t[1] for t in trees])
        keep = radii > 0.1 * c.edge
        vessels = tubes(c, segments[keep], radii[keep])
        if vessels is not None:  # on the coarsest grids none is thick enough
            box, share = vessels
            c.paint(box, share * inside[box], 0.8 * t.blood + 0.2 * t.muscle)
        self.bronchi((0.35 * c.edge, np.inf), wall=0.8, generations=(0, 1))

    def bronchi(self, lumen: tuple[float, float], wall: float, generations: tuple[int, int]) -> Found | None:
        """Paint segmental bronchi with walls of `wall` mm.

        Args:
            lumen: lowest and highest radius (mm) of the bronchi to paint.
            wall: thickness of the wall, mm.
            generations: first and last generation of the tree, 0 beside the lobar bronchi.

        Returns:
            (box, share) of the walls, or None if there is none.
        """
        trees = [self.anatomy.tree(s, "bronchus") for s in (-1, 1)]
        segments, radii, generation = (np.concatenate(part) for part in zip(*trees, strict=True))
        chosen = (generation >= generations[0]) & (generation <= generations[1])
        chosen &= (radii >= lumen[0]) & (radii <= lumen[1])
        return self.rings(segments[chosen], radii[chosen], wall)

    def rings(self, segments: np.ndarray, radii: np.ndarray, wall: float) -> Found | None:
        """Paint airways (n, 2, 3) with lumen radii (n,) and walls in mm; (box, share) of the walls, or None."""
        walls = tubes(self.canvas, segments, radii + wall)
        air = tubes(self.canvas, segments, radii)
        if walls is None or air is None:
            return None
        box, share = walls
        share = share * self.canvas.occupancy(self.cavity_depth[box] - 3)
        self.canvas.paint(box, share, 10.0)
        whole = np.zeros(self.canvas.shape, dtype=self.canvas.dtype)
        whole[box] = share
        lumen = np.minimum(air[1], whole[air[0]]) / np.maximum(whole[air[0]], 1e-6)
        self.canvas.paint(air[0], lumen, -940.0)
        return box, share

    def _heart_and_vessels(self):
        """Heart with its chambers, great vessels, trachea and main bronchi."""
        c, a, t = self.canvas, self.anatomy, self.tissue
        s = a.heart * self.heart_scale
        grown = a.heart_region(c.z, c.y, c.x, self.heart_scale)
        grown = np.minimum(grown, 0.8 * (c.z - a.diaphragm(c.y, c.x) + self.low - 2))
        self.heart_depth = grown
        sac = np.abs(grown + 3.5)
        c.paint(c.everywhere, c.occupancy(grown + 5.5), t.fat)
        c.paint(c.everywhere, c.occupancy(1.0 - sac) * min(1.0, 2.0 / c.edge), 25.0)
        c.paint(c.everywhere, c.occupancy(grown), t.myocardium)
        left = 40 * (self.heart_scale - 1)
        for centre, radii, axis in (
            ((-44, -24, 38 + left), (42 * s, 24 * s, 24 * s), (-0.46, -0.42, 0.78)),
            ((-36, -48, 6), (42 * s, 17 * s, 17 * s), (-0.5, -0.1, 0.7)),
            ((-28, -14, -24), (31 * s, 25 * s, 21 * s), None),
            ((-10, 17, 6), (23 * s, 17 * s, 31 * s), None),
        ):
            c.ellipsoid(centre, radii, t.blood, axis)
        # fat in the groove between atria and ventricles, where the coronary arteries run
        for name, (points, radii) in a.vessels().items():
            venous = "vein" in name or "cava" in name
            c.tube(points, radii + 1.2, t.muscle - 8)
            c.tube(points, radii, t.veins if venous else t.blood)
        self.airway = np.zeros(c.shape, dtype=c.dtype)
        for points, radii in a.airways().values():
            c.tube(points, radii + 1.4, 30.0)
        for points, radii in a.airways().values():
            c.tube(points, radii, -985.0, share=self.airway)

    def _bones(self):
        """Vertebrae with discs and canal, ribs with costal cartilage, sternum, clavicles, scapulae."""
        c, a = self.canvas, self.anatomy
        z, y, x = c.z, c.y, c.x
        body_y, marrow = a.depth * 0.78, a.bone
        level = ((z / a.height + 4) % 25) - 12.5  # 0 in the middle of a vertebral body
        body = np.minimum(16 * (1 - np.sqrt(((y - body_y) / 14.5) ** 2 + (x / 18) ** 2)), 10.3 - np.abs(level))
        disc = np.minimum(15 * (1 - np.sqrt(((y - body_y) / 14) ** 2 + (x / 17.5) ** 2)), 15 + 0 * level)
        canal = 9.0 - np.sqrt((y - body_y - 23) ** 2 + (x * 0.9) ** 2) + 0 * z
        arch = np.minimum(13.0 - np.sqrt((y - body_y - 23) ** 2 + (x * 0.85) ** 2), 8.5 - np.abs(level + 2))
        spinous = np.minimum(3.4 - np.abs(x), np.minimum(y - body_y - 30, body_y + 57 - y))
        spinous = np.minimum(spinous, 8 - np.abs(level + 6 - 0.25 * (y - body_y - 40)))
        across = np.minimum(3.6 - np.abs(y - body_y - 22 + 0.12 * np.abs(x)), 33 - np.abs(x))
        across = np.minimum(across, 5 - np.abs(level))
        box = c.box((-400, body_y - 20, -40), (400, body_y + 62, 40))
        if box is not None:
            for shape, value in ((disc, 75.0), (body, 420.0), (body - 2.2, marrow)):
                c.paint(box, c.occupancy(_crop(shape, box, c.shape)), value)
            for shape in (arch, spinous, across):
                shape = np.minimum(_crop(shape, box, c.shape), self._skin[box] - 5)
                c.paint(box, c.occupancy(shape), 430.0)
                c.paint(box, c.occupancy(shape - 2.0), marrow + 60)
            c.paint(box, c.occupancy(_crop(canal, box, c.shape)), 25.0)
        shell = -self.cavity_depth  # mm outside the cavity
        ring = ((z / a.height - 0.42 * (y - a.depth) + 0.0006 * x**2) % 25.0) - 12.5
        rib = np.minimum(4.2 - np.abs(shell - 6.5), 5.4 - np.abs(ring) * 0.92)
        rib = np.minimum(rib, (z / a.height + 150) * 0.5)
        rib = np.minimum(rib, (132 - z / a.height) * 0.5)
        rib = np.where(self._skin > 4, rib, -9.0)
        front = (y < -0.45 * a.depth) & (np.abs(x) < 0.62 * a.width)
        outer, inner = c.occupancy(rib), c.occupancy(rib - 1.7)
        c.paint(c.everywhere, np.where(front, 0, outer), 560.0)
        c.paint(c.everywhere, np.where(front, 0, inner), marrow + 40)
        c.paint(c.everywhere, np.where(front & (np.abs(x) > 12), outer, 0), 105.0)
        self._girdle()

    def _girdle(self):
        """Sternum, clavicles and scapulae."""
        c, a = self.canvas, self.anatomy
        y0 = -a.depth - 6
        c.ellipsoid((22, y0 + 2, 0), (62, 6.5, 15), 380.0)
        c.ellipsoid((22, y0 + 2, 0), (59, 4.3, 12.5), a.bone * 0.8)
        for side in (-1, 1):
            clavicle = np.array([(92, y0 + 26, side * 16), (104, y0 + 34, side * 60), (118, y0 + 62, side * 110)])
            c.tube(clavicle, 6.2, 520.0)
            c.tube(clavicle, 3.4, a.bone + 60)

            # scapula: a thin plate that lies on the back of the rib cage, leaning outwards
            def blade(z, y, x, side=side):
                along = (side * x - 0.62 * a.width) * 0.8 - (y - a.depth - 12) * 0.6
                across = (side * x - 0.62 * a.width) * 0.6 + (y - a.depth - 12) * 0.8
                plate = 1.6 + 0.05 * np.abs(along - 30) - np.abs(across - 0.004 * (along - 25) ** 2)
                return np.minimum(np.minimum(plate, 34 - np.abs(along - 38)), 0.5 * (58 - np.abs(z - 72)))

            low, high = (10, 0, 20), (132, a.depth + 45, a.width + 60)
            low, high = (low, high) if side > 0 else ((10, 0, -a.width - 60), (132, a.depth + 45, -20))
            c.fill(low, high, blade, 470.0)


def _crop(shape: np.ndarray, box, full) -> np.ndarray:
    """The part of a broadcastable array that lies in a box of the grid."""
    return shape[tuple(s if n > 1 else slice(None) for s, n in zip(box, shape.shape, strict=True))]
