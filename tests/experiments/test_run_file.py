"""A run's file: it says all, gives the same run again, and what is wrong in it is named."""

from dataclasses import fields, replace

import pytest
import yaml

from medctkit.experiments.adapt import DEFAULT, FULL_SIZE, Adaptation
from medctkit.experiments.run_file import ASKED, read_run_file, settings_of, write_run_file


@pytest.mark.parametrize("settings", [DEFAULT, replace(FULL_SIZE, epochs=1.5, steps=None, alpha=8, method="dora")])
def test_every_field_is_written_and_comes_back(settings, tmp_path):
    asked = {"manifest": "a.csv", "seed": 3, "model": "mini", "hospital": "T\u00fcbingen", "tokenizer": None}
    path = write_run_file(tmp_path / "run.yaml", asked, settings)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(written["settings"]) == {field.name for field in fields(Adaptation)} - {"seed"}
    assert set(written) == {*ASKED, "settings"}
    there, given = read_run_file(path)
    assert there == {name: value for name, value in asked.items() if value is not None}
    assert Adaptation(**given) == settings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])  # as PowerShell writes
def test_what_a_file_leaves_out_is_the_model_s_default(tmp_path, encoding):
    file = tmp_path / "run.yaml"
    file.write_text("settings:\n  learning_rate: 3e-4\n  epochs: 2\n", encoding)
    there, given = read_run_file(file)
    assert there == {} and settings_of("mini", given) == replace(DEFAULT, learning_rate=3e-4, epochs=2.0, steps=None)
    assert settings_of("released.pt", given).rank == FULL_SIZE.rank


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("settings: {learnign_rate: 1}", "unknown 'learnign_rate'; expected steps, epochs"),
        ("manifets: a.csv", "unknown 'manifets'; expected manifest, cache_dir"),
        ("seed: yes", "seed must be int or nothing, got True"),
        ("hospital: 007", "hospital must be text (in quotes, if it looks like a number) or nothing, got 7"),
        ("seed: !!int x", "is not YAML: invalid literal"),
        ("hospital: 2026-02-30", "is not YAML: day is out of range"),
        ("settings: {rank: [" + "9, " * 99 + "]}", "rank must be int, got [9, 9, 9, 9, 9, 9, ...]"),
        ("settings: {rank: many}", "rank must be int, got 'many'"),
        ("settings: {dropout: fast}", "dropout must be float, got 'fast'"),
        ("settings: [1]", "expected names with values"),
        ("settings: {prompts: {Emphysema: [a, b]}}", "prompts must be {finding: {states"),
        ("settings: {prompts: {Emphysema: {states: It is seen., denies: [b]}}}", "prompts must be {finding: {states"),
        ("settings: {prompts: {Emphysema: {states: [1], denies: [b]}}}", "prompts must be {finding: {states"),
        ("settings:\n  rank: 8\n  rank: 16\n", "'rank' stands there twice"),
        ("settings: {alpha: %s}" % ("9" * 400), "alpha must be float or nothing, got 999"),
        ("a: [", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="run.yaml") as caught:
        read_run_file(file)
    assert message in str(caught.value)
