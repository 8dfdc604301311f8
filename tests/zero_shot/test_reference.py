"""A score's place among those of other scans."""

import numpy as np
import pytest

from medctkit.findings import FINDINGS
from medctkit.lora.adapter import add_lora
from medctkit.model.base_model import FOLDER, load_mini_base
from medctkit.zero_shot.reference import places, write_reference


def test_a_place_is_how_many_of_100_score_lower(tmp_path):
    mini, rng = load_mini_base(), np.random.default_rng(0)
    assert places(tmp_path, mini.model, mini.tokenizer, "paper", np.zeros(18)) is None
    seen = rng.random((400, 18)) ** np.linspace(0.5, 3, 18)
    write_reference(tmp_path, mini.model, mini.tokenizer, seen, "400 numbers")
    asked = rng.random(18)
    found = places(tmp_path, mini.model, mini.tokenizer, "paper", asked)
    assert found == pytest.approx(100 * (seen < asked).mean(0), abs=1)
    assert places(tmp_path, mini.model, mini.tokenizer, "paper", seen.max(0) + 1) == pytest.approx([100] * 18)
    assert places(tmp_path, mini.model, mini.tokenizer, "ensemble", asked) is None
    adapted = add_lora(load_mini_base().model, r=2)
    assert places(tmp_path, adapted, mini.tokenizer, "paper", asked) is None, "an adapter's scores lie elsewhere"


def test_the_mini_model_knows_its_places():
    mini = load_mini_base()
    found = places(FOLDER, mini.model, mini.tokenizer, "paper", np.linspace(0, 1, 18))
    assert found.shape == (len(FINDINGS),) and found[0] == 0 and found[-1] == 100
