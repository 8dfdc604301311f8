"""The two hospitals: what each setting does, and what the docs say of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from medctkit.findings import FINDINGS, PREVALENCE
from medctkit.phantom.body import Body
from medctkit.phantom.patient import Patient
from medctkit.phantom.registry import REGISTRY
from medctkit.phantom.report_text import ABSENCES, MENTIONED, ORDER
from medctkit.phantom.scan import DISEASE
from medctkit.phantom.study import HOSPITALS, draw_labels, generate, named_rng
from medctkit.phantom.tissue import Tissue

PAGE = Path(__file__).resolve().parents[2] / "docs" / "phantoms.md"
SHAPE = (32, 48, 48)
SOURCE = HOSPITALS["source"]
STILL = dict(spread=(0.0, 0.0, 0.0), raised=(0.0, 0.0), drift=0.0)


@pytest.fixture
def scanned(monkeypatch):
    """Draws the healthy scan of a patient, or one with findings, with settings of the source hospital replaced."""

    def draw(seed=1, findings=(), **settings):
        monkeypatch.setitem(HOSPITALS, "source", replace(SOURCE, **settings))
        return generate(seed, "source", findings, SHAPE, patient="P1")

    return draw


def middle(study):
    """(z, y, x) mm of the middle of the lungs, from the corner of the scan; what is small is skin and table."""
    parts, _ = ndimage.label((study.volume.hu < -600) & (study.volume.hu > -940))
    sizes = np.bincount(parts.ravel())[1:]
    lungs = 1 + np.flatnonzero(sizes > 0.1 * sizes.max())
    return np.argwhere(np.isin(parts, lungs)).mean(axis=0) * study.volume.spacing


def test_a_smaller_breath_raises_the_domes_and_moves_nothing_above_the_hila():
    person = Patient.sample(np.random.default_rng(3))
    raised = person.breathing(15.0)
    y, x = (axis.ravel() for axis in np.meshgrid((-60, 0, 40), (-80, 0, 80)))
    above, domes = (np.stack([np.full(len(y), z), y, x], 1) for z in (60, -90))
    assert np.array_equal(person.place(above), raised.place(above))
    moved = raised.place(domes) - person.place(domes)
    assert np.allclose(moved[:, 0], 15 * person.scale[0], rtol=0.25, atol=0) and np.abs(moved[:, 1:]).max() < 5
    spacing = (10.0, 7.5, 7.5)
    one, two = (Body(SHAPE, spacing, (40.0, 4.0, 0.0), p, Tissue()) for p in (person, raised))
    high = one.z > 30  # vessels have a width: some mm more than the last place that moves
    assert np.allclose(one.hu[high], two.hu[high], atol=0.5)
    under = np.abs(one.x) > 60
    assert 8 < np.median((two.floor - one.floor)[:, under]) < 20


def test_breath_and_position_move_the_patient_as_told(scanned):
    still = scanned(**STILL)
    assert np.allclose(middle(scanned(seed=2, **STILL)), middle(still), atol=1.5)  # another scan of the same patient
    full, less = ((scanned(**STILL | dict(raised=(r, 0.0))).volume.hu < -600).sum() for r in (0.0, 25.0))
    assert less < full
    steps = np.array(still.volume.spacing) * 2
    moved = scanned(**STILL | dict(centre=tuple(SOURCE.centre - steps), noise=0.0)).volume.hu.astype(int)
    place = scanned(**STILL | dict(noise=0.0)).volume.hu
    assert (np.abs(moved[:-2, :-2, :-2] - place[2:, 2:, 2:]) < 3).mean() > 0.99  # down, to the front and to the right
    places = np.array([middle(scanned(seed, **STILL | dict(spread=SOURCE.spread))) for seed in range(10)])
    assert (places.std(axis=0, ddof=1) > 0.5 * np.array(SOURCE.spread)).all()
    assert (places.std(axis=0, ddof=1) < 2 * np.array(SOURCE.spread)).all()


@pytest.mark.parametrize("up", [-330, -150, 150, 330])
def test_a_patient_half_or_wholly_outside_the_scan_is_drawn(scanned, up):
    study = scanned(findings=FINDINGS, **STILL | dict(centre=(up, 0.0, 0.0)))
    assert set(study.masks) == set(FINDINGS)


@pytest.mark.parametrize("name", FINDINGS)
def test_density_scales_disease_of_the_lungs_alone(scanned, name):
    """Half the density is half the change; what presses aside or replaces lung stays as it is."""
    healthy = scanned(**STILL).volume.hu.astype(int)
    full, half = (scanned(findings=[name], **STILL | dict(density=(d, d))).volume.hu for d in (1.0, 0.5))
    lungs = REGISTRY[name].layer <= DISEASE
    share = np.abs(half - healthy).sum() / np.abs(full - healthy).sum()
    assert abs(share - 0.5) < 0.06 if lungs else np.array_equal(full, half), share


def test_each_hospital_has_the_patients_that_it_tells_of():
    ages = {}
    for name, hospital in HOSPITALS.items():
        assert set(hospital.case_mix) <= set(FINDINGS)
        labels = np.array([list(draw_labels(s, f"p{s}", case_mix=hospital.case_mix).values()) for s in range(6000)])
        expected = np.array([PREVALENCE[f] * hospital.case_mix.get(f, 1.0) for f in FINDINGS])
        assert (np.abs(labels.mean(axis=0) - expected) < 4 * np.sqrt(expected * (1 - expected) / len(labels))).all()
        people = [Patient.sample(named_rng("person", str(p)), hospital.age) for p in range(150)]
        ages[name] = np.mean([p.age for p in people])
        assert abs(ages[name] - hospital.age) < 4
    assert ages["target"] - ages["source"] > 4


def test_the_docs_say_what_the_hospitals_are():
    def row(title, say):
        return f"| {title} | {' | '.join(say(HOSPITALS[name], name) for name in ('source', 'target'))} |"

    rows = [
        row("scans with contrast medium", lambda h, _: f"{h.contrast:.0%}".replace("%", " %")),
        row("kernel: edge enhancement", lambda h, _: f"{h.sharpness:g}"),
        row("noise at 1.5 x 0.7 x 0.7 mm", lambda h, _: f"{h.noise:g} HU, over {h.grain:g} pixels"),
        row("slice thickness", lambda h, _: f"{h.thickness:g} x the spacing"),
        row("field of view", lambda h, _: f"{h.field_of_view:g} mm"),
        row("offset of the calibration", lambda h, _: f"0 ± {h.drift:g} HU"),
        row("table", lambda h, _: h.table),
        *(
            row(f"position: {way}", lambda h, _, i=i: f"{h.centre[i]:g} ± {h.spread[i]:g} mm")
            for i, way in enumerate(("up", "back", "left"))
        ),
        row("breath: diaphragm above a full breath's", lambda h, _: "{:g} ± {:g} mm".format(*h.raised)),
        row("density of disease of lungs and airways", lambda h, _: "{:g} to {:g} of full".format(*h.density)),
        row("age", lambda h, _: f"{h.age:g} ± 15 years"),
        row(
            "case mix: prevalence of CT-RATE times",
            lambda h, _: ", ".join(f"{name} {factor:g}" for name, factor in h.case_mix.items()) or "1 for all",
        ),
        row("findings that get into the report", lambda _, name: f"{MENTIONED[name]:.0%}".replace("%", " %")),
        row("absences that it names", lambda _, name: f"{ABSENCES[name][0]} to {ABSENCES[name][1] - 1}"),
    ]
    page = PAGE.read_text(encoding="utf-8")
    assert [line for line in rows if line not in page] == []
    said = next(line for line in page.splitlines() if line.startswith("| report |"))
    assert [part.split("from the ")[1].split(" on")[0] for part in said.split("|")[2:4]] == [
        ORDER[name][0] for name in ("source", "target")
    ]
    assert len(page.split("| source | target |")[1].split("\n\n")[0].splitlines()) == len(rows) + 3
