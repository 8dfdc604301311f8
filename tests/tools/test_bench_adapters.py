"""Many adapters on one base, and arithmetic between two: the programs run, and the page says what they found."""

import json
import math
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
PAGE = BENCH.parent / "docs" / "deploy.md"
pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")


@pytest.mark.parametrize("name", ["adapters", "arithmetic"])
def test_the_page_says_what_was_measured(bench, name):
    found = json.loads((BENCH / f"{name}.json").read_text())
    lines = bench(name).page(found)
    assert bench("printing").block(name, lines) in PAGE.read_text(), f"run: python bench/{name}.py"


def test_a_hundred_adapters_take_less_than_two_models_and_a_mixed_batch_less_than_one_by_one():
    found = json.loads((BENCH / "adapters.json").read_text())
    model, adapter = found["full"]["model"], found["full"]["adapter"]
    assert all(100 * adapter[where] < model[where] for where in ("bytes_on_disk", "bytes_in_memory"))
    assert adapter["numbers"] == 1_671_168 and list(found["full"]["aboard"]) == ["1", "20", "100"]
    assert all(row["ms"]["mixed"] < row["ms"]["one_by_one"] for row in found["mini"]["aboard"].values())


@pytest.mark.slow
def test_adapters_on_board_are_measured(tmp_path, run_bench):
    _, said = run_bench("adapters", "--tiny", "--output", tmp_path / "adapters.json")
    found = json.loads((tmp_path / "adapters.json").read_text())
    one, two = (found["full"]["aboard"][n]["bytes_in_memory"] for n in ("1", "2"))
    base, adapter = found["full"]["model"]["bytes_in_memory"], found["full"]["adapter"]["numbers"]
    assert one - base == two - one == 4 * adapter
    assert found["mini"]["adapter"]["bytes_on_disk"] > 4 * adapter and "| mini, 2 |" in said


@pytest.mark.slow
def test_arithmetic_is_measured_beside_what_it_competes_with(tmp_path, run_bench):
    run_bench("arithmetic", "--tiny", "--output", tmp_path / "arithmetic.json", "--work", tmp_path / "work")
    found = json.loads((tmp_path / "arithmetic.json").read_text())
    rows, off = found["rows"], found["off_the_sum"]
    assert {"__base__", "source", "target", "own", "scores", "both", *off} == set(rows)
    for hospital in ("source", "target"):
        assert rows["own"][hospital] == rows[hospital][hospital] and rows[hospital][hospital]["difference"] == 0
        assert all(0 <= row[hospital]["auroc"] <= 1 for row in rows.values())
    assert off["cat"] == 0 and all(map(math.isfinite, off.values()))
