"""Pretraining of the mini base model, at a tiny size."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from medctkit.experiments import pretrain, warm_start
from medctkit.experiments.pretrain import CodebookLearner, PretrainConfig
from medctkit.experiments.warm_start import (
    BANDS,
    WarmStart,
    band_roots,
    common_phrases,
    project,
    projection_of,
    read,
    reconstruct,
    ridge,
)
from medctkit.model.base_model import load_mini_base

WARM = WarmStart(reconstruct_steps=2, reconstruct_batch=4, phrases=20, read_steps=2, read_batch=8)
TINY = PretrainConfig(16, 16, WARM, steps=6, align_every=3, batch_size=8, vocabulary=400)
SHAPE = (16, 32, 32)
VISION = pretrain.MINI_VISION | dict(image_size=32, num_frames=16)


@pytest.fixture(scope="module", autouse=True)
def small(one_thread):
    vision = VISION | dict(dim=16, dim_head=8, heads=2, codebook_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "CHUNK", 8)
        patch.setattr(pretrain, "MINI_VISION", vision)
        patch.setattr(pretrain, "MINI_PROJECTION", 8)
        patch.setattr(pretrain, "make_pool", lambda n, at: [at / f"chunk_{i:04d}.npy" for i in range(-(-n // 8))])
        patch.setattr(pretrain, "score", lambda *_: 0.5)
        yield


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "SHAPE", SHAPE)
        patch.setattr(pretrain, "MINI_SPACING", (20.0, 11.25, 11.25))
        patch.setattr(pretrain, "MINI_VISION", VISION)
        for i in range(4):
            pretrain._make_chunk((i, folder))
    return folder


@pytest.fixture(scope="module")
def whole(pool, tmp_path_factory):
    """The folder of a model that was made in one go, and its record."""
    folder = tmp_path_factory.mktemp("whole") / "mini"
    record = pretrain.pretrain(folder, pool, TINY)
    (pool / "checkpoint.pt").unlink()
    return folder, record


@pytest.mark.slow
def test_the_result_loads_and_says_how_it_was_made(whole):
    folder, record = whole
    mini = load_mini_base(folder)
    assert mini.preprocess_config.shape == SHAPE
    assert mini.preprocess_config.spacing == pretrain.MINI_SPACING
    assert json.loads((folder / "pretraining.json").read_text()) == json.loads(json.dumps(record))
    assert record["config"]["steps"] == 6
    words = mini.tokenizer("Kerley lines, GGO; a major zebra-like quiz: XYZ 42 mm")
    assert mini.tokenizer.unk_token_id not in words["input_ids"]
    volumes = torch.zeros(2, 1, *SHAPE)
    assert mini.model.encode_image(volumes).shape == (2, pretrain.MINI_PROJECTION)


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_uninterrupted_one(pool, whole, tmp_path, monkeypatch):
    advance = pretrain.Pretraining.advance

    def advance_then_stop(run, texts):
        row = advance(run, texts)
        if run.step == 4:
            run.history.append(row)
            run.save(pool / "checkpoint.pt")
            torch.manual_seed(99)
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(pretrain.Pretraining, "advance", advance_then_stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "parts", pool, TINY)
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(pretrain.Pretraining, "advance", advance)
    pretrain.pretrain(tmp_path / "parts", pool, TINY)
    expected, found = (load_mini_base(at).model.state_dict() for at in (whole[0], tmp_path / "parts"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(ValueError, match="other settings"):
        pretrain.pretrain(tmp_path / "other", pool, replace(TINY, seed=9))
    (pool / "checkpoint.pt").unlink()


@pytest.mark.slow
def test_a_run_interrupted_in_its_warm_start_ends_like_an_uninterrupted_one(pool, tmp_path, monkeypatch):
    config = replace(TINY, warm=replace(WARM, reconstruct_steps=5), steps=1, evaluate_every=1)
    pretrain.pretrain(tmp_path / "whole", pool, config)
    (pool / "checkpoint.pt").unlink()
    calls = []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 5:  # one at the start, one in each step
            torch.manual_seed(99)
            raise KeyboardInterrupt
        return band_roots(*arguments)

    monkeypatch.setattr(warm_start, "band_roots", stopped)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "parts", pool, config)
    with pytest.raises(ValueError, match=r"reconstruction\.pt is of a run with other settings"):
        pretrain.pretrain(tmp_path / "other", pool, replace(config, seed=9))
    pretrain.pretrain(tmp_path / "parts", pool, config)
    assert len(calls) == 5 + 1 + 1 + 2  # the other run's start, and this one's, with the two steps that were left
    whole, parts = (load_mini_base(tmp_path / name).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    (pool / "checkpoint.pt").unlink()


def test_the_codebook_follows_the_tokens_and_is_then_left_alone():
    from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel

    torch.manual_seed(0)
    text = pretrain.MINI_TEXT | {"vocab_size": 50}
    model = CTCLIPModel(CTCLIPConfig(pretrain.MINI_VISION, text, 8))
    learner = CodebookLearner(model, decay=0.5, seed=0)
    model.train().encode_image(torch.randn(2, 1, *SHAPE))
    before = learner.codes.clone()
    learner.update()
    assert torch.equal(before, learner.codes)  # bypassed until it starts
    learner.start(model.vision_encoder, torch.randn(3, 2, 1, *SHAPE))
    learner.update()
    assert not torch.equal(before, learner.codes)
    assert torch.allclose(learner.codes.norm(dim=-1), torch.ones(1, learner.codes.shape[1]), atol=1e-5)
    best = (learner.tokens @ learner.codes[0].T).max(dim=1).values.mean()
    random = (learner.tokens @ before[0].T).max(dim=1).values.mean()
    assert best > random + 0.05
    assert 0 < learner.finish() <= 1
    after = learner.codes.clone()
    model.encode_image(torch.randn(2, 1, *SHAPE)).sum().backward()
    assert torch.equal(after, model.visual_transformer.vq._codebook.embed)


def test_the_vocabulary_is_the_same_each_time_and_spells_what_it_lacks(tmp_path):
    reports = ["A nodule is seen.", "No nodule is seen.", "Zebra."]
    vocabularies = [pretrain.make_tokenizer(order, 200, tmp_path).get_vocab() for order in (reports, reports[::-1])]
    assert vocabularies[0] == vocabularies[1] and "nodule" in vocabularies[0] and "zebra" not in vocabularies[0]


@given(st.integers(0, 2**32))
def test_a_volume_is_moved_whole_and_air_comes_in(seed):
    volumes = torch.arange(2 * 20 * 10 * 10).reshape(2, 1, 20, 10, 10).float()
    out = pretrain.moved(volumes, torch.Generator().manual_seed(seed))
    for after in out:
        kept = after[after >= 0].long()
        assert kept.unique().numel() == kept.numel() >= 12 * 7 * 7 and (after[after < 0] == -1).all()
        came_from = torch.stack(torch.unravel_index(kept % 2000, (20, 10, 10)), dim=1)
        moves = (after >= 0).nonzero()[:, 1:] - came_from
        assert (moves == moves[0]).all() and (moves[0].abs() <= torch.tensor(pretrain.SHIFT)).all()


@pytest.fixture
def run(pool, tmp_path):
    train = pretrain.Pool([pool / "chunk_0000.npy", pool / "chunk_0001.npy"])
    words = pretrain.make_tokenizer([train.report(i, 0) for i in range(len(train))], 300, tmp_path / "words")
    return pretrain.Pretraining(TINY, words, train)


def test_roots_of_bands_are_of_their_patch():
    volumes = torch.full((2, 1, 16, 16, 16), -1.0)
    volumes[1, 0, 8:, :8, 8:] = 0.7  # one patch of bone
    volumes[1, 0, :4, :8, :8] = 0.05  # half a patch of soft tissue
    shares = band_roots(volumes, (8, 8, 8)) ** 2
    assert shares.shape == (2, 2, 2, 2, len(BANDS) + 1) and torch.allclose(shares.sum(-1), torch.ones(2, 2, 2, 2))
    soft = shares[1, 0, 0, 0]
    assert shares[1, 1, 0, 1, -1] == 1 and soft[[0, BANDS.index(80)]].tolist() == pytest.approx([0.5, 0.5])
    assert (shares[0, ..., 0] == 1).all()


def test_common_phrases_are_neither_rare_nor_everywhere_and_none_stands_for_another():
    reports = ["No nodule is seen."] * 5 + ["Nodule is seen."] * 4 + ["Zebra."]
    found = common_phrases(reports, 10)
    assert found["no"] == 0.5 and "nodule" not in found  # 90 % have it
    assert "no nodule" not in found and found["zebra"] == 0.1  # "no" says as much
    assert list(common_phrases(reports, 1)) == ["no"]


def test_ridge_tells_each_row_as_a_regression_on_all_others_does():
    x, y = torch.randn(12, 20, dtype=torch.double), torch.randn(12, 3, dtype=torch.double)
    weights, by_itself, by_others = ridge(x, y, 2.0)
    assert torch.allclose(by_itself, x @ x.T @ weights)
    for i in range(12):
        rest = torch.arange(12) != i
        assert torch.allclose(by_others[i], x[i] @ x[rest].T @ ridge(x[rest], y[rest], 2.0)[0])


def test_what_hardly_varies_at_home_hardly_counts():
    torch.manual_seed(0)
    told = torch.randint(0, 2, (60, 4)).float()  # phrases
    seen = told @ torch.randn(4, 12) + 0.3 * torch.randn(60, 12)
    air = 5.0 + 1e-3 * torch.randn(60, 12)  # corners of a scan: the same in all of them
    matrix, embeds = projection_of(torch.cat([seen, air], 1), told, 3.0, 3)
    assert matrix[:, 12:].norm() < 0.2 * matrix[:, :12].norm()
    assert torch.allclose(embeds.norm(dim=-1), torch.ones(60))
    noisy = torch.cat([seen, 5.0 + 0.3 * torch.randn(60, 12)], 1)  # another hospital's noise in the corners
    assert F.cosine_similarity(noisy @ matrix.T, torch.cat([seen, air], 1) @ matrix.T).min() > 0.9


def test_words_are_swapped_in_training_and_only_there(run):
    text = run.reader.ids(["No pleural effusion is seen."] * 20)
    run.model.eval()
    assert torch.equal(run.embed(text), run.embed(text))
    run.model.train()
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert not torch.equal(run.embed(text), run.embed(text))
    run.config = replace(TINY, swapped_words=0.0)
    assert torch.equal(run.embed(text), run.embed(text))


@pytest.mark.slow
def test_a_warm_start_lowers_each_loss(run, tmp_path):
    run.config = replace(TINY, warm=replace(WARM, reconstruct_steps=40, read_steps=30))
    volumes = run.train.pixels(range(4))
    target = band_roots(volumes, (8, 8, 8))

    def explained():  # how well a linear map of the tokens tells the shares
        with torch.no_grad():
            tokens = F.normalize(run.model.vision_encoder.eval().encode(volumes), dim=-1).flatten(0, -2)
        shares = target.flatten(0, -2)
        fitted = tokens @ torch.linalg.lstsq(tokens, shares).solution
        return 1 - ((shares - fitted) ** 2).sum() / ((shares - shares.mean(0)) ** 2).sum()

    before = explained()
    reconstruct(run, tmp_path / "reconstruction.pt")
    assert explained() > before + 0.05
    embeds = project(run)
    with torch.no_grad():
        run.codebook.vq.eval()
        own = run.model.eval().encode_image(run.moved(list(range(8)), run.generator("project")))
    assert (own * embeds[:8]).sum(-1).mean() > 0.1  # the model's own embeddings know the study, these do not
    assert (embeds @ embeds.T).mean() < 0.5
    (texts,) = run.reading([(list(range(16)), 0)])
    losses = [run.sentence_loss(embeds, texts).item()]
    read(run, embeds)
    losses.append(run.sentence_loss(embeds, texts).item())
    assert losses[1] < losses[0] - 0.1
