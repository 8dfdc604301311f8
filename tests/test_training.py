"""Losses against hand-computed values, and the loop on a tiny model and random data."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from medctkit.ctclip import CTCLIPConfig, CTCLIPModel
from medctkit.findings import FINDINGS
from medctkit.lora import add_lora, load_adapter
from medctkit.training import (
    FineTuneConfig,
    contrastive_loss,
    finding_prompt_loss,
    finetune,
    learning_rate_factor,
    report_prompts,
)

PROMPTS = {f: ((f"{f} seen", f"there is {f}"), (f"no {f}", f"without {f}")) for f in FINDINGS}


def tiny_model(preset="paper", dropout=0.1):
    torch.manual_seed(0)
    vision = {
        "dim": 32,
        "codebook_size": 24,
        "image_size": 32,
        "num_frames": 8,
        "patch_size": 16,
        "temporal_patch_size": 4,
        "spatial_depth": 1,
        "temporal_depth": 1,
        "dim_head": 8,
        "heads": 4,
    }
    text = {
        "vocab_size": 100,
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    config = CTCLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    return add_lora(CTCLIPModel(config), preset, r=4)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Bit-for-bit claims are about the CPU, also where there is a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for f in FINDINGS for w in f.lower().split()} | set("seen there is no without scan".split()))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words, *map(str, range(12))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def tiny_data(n=8):
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "study": f"study_{i}",
            "patient": f"patient_{i}",
            "pixel_values": torch.rand(1, 8, 32, 32, generator=generator) * 2 - 1,
            "report": f"scan {i}",
            "labels": torch.randint(0, 2, (18,), generator=generator).float(),
        }
        for i in range(n)
    ]


def settings(**changes):
    return FineTuneConfig(**({"steps": 4, "batch_size": 4, "prompts": PROMPTS, "evaluate_every": 2} | changes))


def run(tokenizer, path, model=None, data=None, score_fn=None, callback=None, **changes):
    model = model or tiny_model()
    return model, finetune(
        model,
        data or tiny_data(),
        tokenizer,
        settings(**changes),
        path,
        score_fn or (lambda m: 0.5),
        callback,
    )


# --- objectives ---------------------------------------------------------------------------------


def test_contrastive_loss_by_hand():
    images, texts = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    # cosines: image 0 against texts 0.6, 0.0; image 1: 0.8, 1.0; factor exp(0) = 1
    per_image = [math.log(math.exp(0.6) + 1) - 0.6, math.log(math.exp(0.8) + math.e) - 1]
    per_text = [math.log(math.exp(0.6) + math.exp(0.8)) - 0.6, math.log(1 + math.e) - 1]
    expected = (sum(per_image) / 2 + sum(per_text) / 2) / 2
    assert contrastive_loss(images, texts, 0.0).item() == pytest.approx(expected, rel=1e-6)
    sharper = contrastive_loss(images, texts, torch.tensor(3.0))
    logits = math.exp(3) * images @ texts.T
    truth = torch.arange(2)
    assert sharper.item() == pytest.approx(
        (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)).item() / 2, rel=1e-6
    )


def test_contrastive_loss_equals_the_loss_of_the_model():
    model = tiny_model().eval()
    batch = torch.stack([item["pixel_values"] for item in tiny_data(3)])
    ids = torch.arange(2, 8).reshape(3, 2)
    out = model(pixel_values=batch, input_ids=ids, attention_mask=torch.ones_like(ids), return_loss=True)
    ours = contrastive_loss(out.image_embeds, out.text_embeds, model.temperature)
    torch.testing.assert_close(ours, out.loss)


def test_two_reconstructions_of_one_scan_are_not_negatives_of_each_other():
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(3, 8), dim=1), F.normalize(torch.randn(3, 8), dim=1)
    texts[2] = texts[1]
    groups = torch.tensor([4, 7, 7])
    got = contrastive_loss(images, texts, 1.0, groups)
    # volumes 1 and 2 each see the batch without the other; volume 0 still sees both
    logits = math.e * images @ texts.T
    first = sum(F.cross_entropy(m[:1], torch.zeros(1, dtype=torch.long)) for m in (logits, logits.T)) / 2
    others = [
        sum(F.cross_entropy(m[1:], torch.ones(1, dtype=torch.long)) for m in (sub, sub.T)) / 2
        for sub in (logits[[0, k]][:, [0, k]] for k in (1, 2))
    ]
    assert got.item() == pytest.approx((first + sum(others)).item() / 3, rel=1e-5)
    assert got < contrastive_loss(images, texts, 1.0)


def test_finding_prompt_loss_is_the_cross_entropy_of_the_pair():
    torch.manual_seed(0)
    images = F.normalize(torch.randn(2, 5), dim=1)
    stated, denied = (F.normalize(torch.randn(18, 5), dim=1) for _ in range(2))
    labels = torch.randint(0, 2, (2, 18))
    scale, terms = 3.0, []
    for i in range(2):
        for k in range(18):
            s, d = math.exp(scale * (images[i] @ stated[k])), math.exp(scale * (images[i] @ denied[k]))
            terms.append(-math.log((s if labels[i, k] else d) / (s + d)))
    assert finding_prompt_loss(images, stated, denied, labels, scale).item() == pytest.approx(sum(terms) / 36, rel=1e-5)


def test_learning_rate_rises_then_falls_along_a_cosine():
    factors = [learning_rate_factor(step, 20, 0.2) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[12] == pytest.approx(0.5) and factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True) and 0 < factors[-1] < 0.02


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "give either steps or epochs, got steps=None and epochs=None"),
        ({"epochs": 2}, "give either steps or epochs, got steps=4 and epochs=2"),
        ({"steps": 0}, "FineTuneConfig.steps must be at least 1, got 0"),
        ({"learning_rate": -1e-3}, "FineTuneConfig.learning_rate must be a number above 0, got -0.001"),
        ({"learning_rate": math.nan}, "FineTuneConfig.learning_rate must be a number above 0, got nan"),
        ({"warmup_fraction": 1.0}, "FineTuneConfig.warmup_fraction must be at least 0 and below 1, got 1.0"),
        (
            {"mixed_precision": "fp8"},
            "FineTuneConfig.mixed_precision must be 'no', 'bf16' or 'fp16', got 'fp8'",
        ),
        ({"batch_size": 1}, "batch_size must be at least 2 for the contrastive objective"),
        ({"contrastive_weight": 0, "prompt_weight": 0}, "are both 0: nothing to learn from; raise one"),
        ({"prompts": {}}, "none for Medical material, Arterial wall calcification"),
        (
            {"prompts": PROMPTS | {"Atelectasis": (("atelectasis is present",), ("none",))}},
            "'atelectasis is present' is a prompt of the zero-shot evaluation",
        ),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**changes)


@pytest.mark.parametrize("hospital", ["source", "target"])
def test_report_wordings_are_complete_and_are_not_the_evaluation_prompts(hospital):
    assert list(report_prompts(hospital)) == list(FINDINGS)
    FineTuneConfig(steps=1, prompts=report_prompts(hospital))


# --- the loop -----------------------------------------------------------------------------------


def test_only_the_adapter_changes_and_the_base_stays_bit_for_bit(tokenizer, tmp_path):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = iter([0.1, 0.2, 0.3])
    run(tokenizer, tmp_path, model, score_fn=lambda m: next(scores))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tokenizer, tmp_path):
    runs = []
    for i, seed in enumerate((1, 1, 2)):
        model = tiny_model()
        torch.manual_seed(100 + i)  # what torch's generator did before must not matter
        runs.append(run(tokenizer, tmp_path / str(i), model, seed=seed))
    (a, first), (b, second), (_, other) = runs
    columns = ["step", "contrastive", "prompts", "loss", "learning_rate", "grad_norm"]
    assert first.history[columns].equals(second.history[columns])
    assert not first.history[columns].equals(other.history[columns])
    for (name, one), (_, two) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


def test_the_first_step_moves_by_the_warm_up_rate(tokenizer, tmp_path):
    model, moved = tiny_model(), []

    def largest_b(row):
        moved.append(max(p.abs().max().item() for n, p in model.named_parameters() if ".lora_B." in n))

    _, result = run(tokenizer, tmp_path, model, callback=largest_b, learning_rate=1e-3, warmup_fraction=0.5)
    assert result.history["learning_rate"].dropna().tolist() == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    # Adam's first step is the learning rate times the gradient's sign, and B starts at zero
    assert moved[:2] == [0.0, pytest.approx(5e-4, rel=1e-3)]


def test_the_loss_falls_on_data_it_can_learn(tokenizer, tmp_path):
    _, result = run(tokenizer, tmp_path, steps=60, learning_rate=1e-2, evaluate_every=60)
    loss = result.history["loss"]
    assert loss.iloc[-5:].mean() < loss.iloc[1:6].mean() - 0.1


def test_the_best_validation_score_decides_the_adapter(tokenizer, tmp_path):
    scores, seen, modes = iter([0.50, 0.60, 0.55]), [], []
    weights = {}

    def score_fn(model):
        modes.append((model.training, torch.is_grad_enabled()))
        weights[len(modes)] = {n: p.clone() for n, p in model.named_parameters() if ".lora_" in n}
        return next(scores)

    model, result = run(tokenizer, tmp_path, score_fn=score_fn, callback=seen.append)
    assert modes == [(False, False)] * 3
    assert (result.best_step, result.best_score) == (2, 0.60)
    assert result.history["step"].tolist() == [0, 1, 2, 3, 4] == [row["step"] for row in seen]
    assert result.history["score"].dropna().tolist() == [0.50, 0.60, 0.55]
    assert {"loss", "contrastive", "prompts", "learning_rate", "grad_norm", "seconds"} <= set(result.history)
    kept = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights[2].items())
    loaded = load_adapter(tiny_model().unload(), result.adapter_dir)
    assert all(torch.equal(p, weights[2][n]) for n, p in loaded.named_parameters() if ".lora_" in n)


def test_early_stopping(tokenizer, tmp_path):
    _, result = run(tokenizer, tmp_path, steps=20, evaluate_every=1, patience=3)
    assert result.history["step"].iloc[-1] == 3 and result.best_step == 0


def test_accumulation_equals_the_larger_batch_for_the_prompt_objective(tokenizer, tmp_path):
    one_wording = {f: (pair[0][:1], pair[1][:1]) for f, pair in PROMPTS.items()}
    same = {"contrastive_weight": 0, "prompts": one_wording, "steps": 1}
    norms = []
    for i, split in enumerate(({"batch_size": 8}, {"batch_size": 4, "accumulation": 2})):
        model = tiny_model(dropout=0.0)
        norms.append(run(tokenizer, tmp_path / str(i), model, **same, **split)[1].history["grad_norm"].iloc[1])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_epochs_are_counted_in_batches(tokenizer, tmp_path):
    _, result = run(tokenizer, tmp_path, steps=None, epochs=1.5)
    assert result.history["step"].iloc[-1] == 3  # 8 studies in batches of 4: two per epoch


def test_a_non_finite_loss_stops_with_step_and_studies(tokenizer, tmp_path):
    data = tiny_data(4)
    data[2]["pixel_values"][0, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1, studies .*study_2.*lower learning_rate"):
        run(tokenizer, tmp_path, data=data)


def test_a_score_that_is_not_a_number_stops(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="score_fn returned nan at step 0; expected a finite number"):
        run(tokenizer, tmp_path, score_fn=lambda m: math.nan)


def test_the_silent_trap_is_caught(tokenizer, tmp_path):
    model = tiny_model()
    tower = model.get_base_model().visual_transformer
    tower.train = lambda mode=True: type(tower).train(tower, False)
    with pytest.raises(RuntimeError, match="no gradient reached the vision encoder's adapter in the first step"):
        run(tokenizer, tmp_path, model)
    run(tokenizer, tmp_path, tiny_model("text"))  # nothing in the vision encoder to reach: no complaint


def test_a_model_without_adapter_or_too_few_studies_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no trainable adapter; make one with add_lora"):
        run(tokenizer, tmp_path, tiny_model().unload())
    with pytest.raises(ValueError, match="3 training studies are fewer than one batch of 4"):
        run(tokenizer, tmp_path, data=tiny_data(3))
