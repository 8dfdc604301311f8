"""Pretraining of the mini base model, at a tiny size."""

import json
from dataclasses import replace

import pytest
import torch

from medctkit.experiments import pretrain
from medctkit.experiments.pretrain import DEFAULT, CodebookLearner
from medctkit.model.base_model import load_mini_base

TINY = replace(DEFAULT, studies=16, validation_studies=16, steps=6, batch_size=8, quantise_from=3, vocabulary=400)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    vision = pretrain.MINI_VISION | dict(dim=16, dim_head=8, heads=2, codebook_size=16)
    monkeypatch.setattr(pretrain, "CHUNK", 8)
    monkeypatch.setattr(pretrain, "MINI_VISION", vision)
    monkeypatch.setattr(pretrain, "make_pool", lambda n, at: [at / f"chunk_{i:04d}.npz" for i in range(-(-n // 8))])
    monkeypatch.setattr(pretrain, "score", lambda *_: 0.5)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "CHUNK", 8)
        for i in range(4):
            pretrain._make_chunk((i, folder))
    return folder


@pytest.mark.slow
def test_the_result_loads_and_says_how_it_was_made(pool, tmp_path):
    record = pretrain.pretrain(tmp_path / "mini", pool, TINY)
    (pool / "checkpoint.pt").unlink()
    mini = load_mini_base(tmp_path / "mini")
    assert mini.preprocess_config.shape == (32, 64, 64)
    assert json.loads((tmp_path / "mini" / "pretraining.json").read_text()) == json.loads(json.dumps(record))
    assert record["config"]["steps"] == 6
    words = mini.tokenizer("Kerley lines, GGO; a major zebra-like quiz: XYZ 42 mm")
    assert mini.tokenizer.unk_token_id not in words["input_ids"]
    volumes = torch.zeros(2, 1, 32, 64, 64)
    assert mini.model.encode_image(volumes).shape == (2, pretrain.MINI_PROJECTION)


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_uninterrupted_one(pool, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    pretrain.pretrain(tmp_path / "whole", pool, TINY)
    (pool / "checkpoint.pt").unlink()
    advance, calls = pretrain.Run.advance, []

    def advance_then_stop(run):
        row = advance(run)
        calls.append(run.step)
        if run.step == 4:
            run.history.append(row)
            run.save(pool / "checkpoint.pt")
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(pretrain.Run, "advance", advance_then_stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "parts", pool, TINY)
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(pretrain.Run, "advance", advance)
    pretrain.pretrain(tmp_path / "parts", pool, TINY)
    whole, parts = (load_mini_base(tmp_path / name).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(ValueError, match="other settings"):
        pretrain.pretrain(tmp_path / "other", pool, replace(TINY, steps=9))
    (pool / "checkpoint.pt").unlink()


def test_the_codebook_follows_the_tokens_and_is_then_left_alone():
    from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel

    torch.manual_seed(0)
    text = pretrain.MINI_TEXT | {"vocab_size": 50}
    model = CTCLIPModel(CTCLIPConfig(pretrain.MINI_VISION, text, 8))
    learner = CodebookLearner(model, decay=0.5, seed=0)
    model.train().encode_image(torch.randn(2, 1, 32, 64, 64))
    before = learner.codes.clone()
    learner.update()
    assert torch.equal(before, learner.codes)  # bypassed until it starts
    learner.start()
    learner.update()
    assert not torch.equal(before, learner.codes)
    assert torch.allclose(learner.codes.norm(dim=-1), torch.ones(1, learner.codes.shape[1]), atol=1e-5)
    best = (learner.tokens @ learner.codes[0].T).max(dim=1).values.mean()
    random = (learner.tokens @ before[0].T).max(dim=1).values.mean()
    assert best > random + 0.05
    assert 0 < learner.finish() <= 1
    after = learner.codes.clone()
    model.encode_image(torch.randn(2, 1, 32, 64, 64)).sum().backward()
    assert torch.equal(after, model.visual_transformer.vq._codebook.embed)
