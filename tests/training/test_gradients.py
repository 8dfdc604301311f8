"""Gradients of a large batch from small ones, and of several processes, against plain autograd."""

import copy
from itertools import product

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from several import in_two_processes
from tiny import PROMPTS, tiny_data, tiny_model, tiny_tokenizer

from medctkit.cohort.dataset import collate
from medctkit.training.batches import StepBatches
from medctkit.training.gradients import seed_from
from medctkit.training.loop import finetune, step_gradients
from medctkit.training.memory import PeakMemory
from medctkit.training.objectives import draw_prompts, joint_loss
from medctkit.training.settings import FineTuneConfig
from medctkit.zero_shot.classifier import ZeroShotClassifier, validation_score

TOKENIZER = tiny_tokenizer()
LARGE = 1e-5  # of the largest gradient: what may differ


@pytest.fixture(scope="module")
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def whole_model(dropout=0.0):
    """Everything trainable, temperature included."""
    return tiny_model(dropout=dropout).unload().requires_grad_(True).train()


def some_prompts():
    import random

    return draw_prompts(PROMPTS, TOKENIZER, random.Random(0))


def in_parts(data, parts):
    """What a loader gives `step_gradients`: every small batch, and again if there are several."""
    size = len(data) // parts
    small = [collate(TOKENIZER)(data[i : i + size]) for i in range(0, len(data), size)]
    return iter(small * (1 if parts == 1 else 2))


def weighted(contrastive=1.0, prompt=1.0, **more):
    return FineTuneConfig(steps=1, contrastive_weight=contrastive, prompt_weight=prompt, prompts=PROMPTS, **more)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_autograd(model, data, weights=(1.0, 1.0)):
    model = copy.deepcopy(model)
    batch, prompts = collate(TOKENIZER)(data), some_prompts()
    losses = joint_loss(
        model.encode_image(batch["pixel_values"]),
        model.encode_text(batch["input_ids"], batch["attention_mask"]),
        model.encode_text(**prompts),
        batch,
        model.temperature,
        *weights,
    )
    losses["loss"].backward()
    return losses, gradients(model)


def by_parts(model, data, parts, accelerator, weights=(1.0, 1.0)):
    model = copy.deepcopy(model)
    prompts = some_prompts() if weights[1] else None
    losses = step_gradients(model, in_parts(data, parts), parts, weighted(*weights), accelerator, prompts)
    return losses, gradients(model)


def at_a_border(model, data, parts):
    """Whether a token lies so near two codes that rounding chooses: in one batch or in small ones, both passes."""
    tower, whole, found = model.vision_encoder, torch.stack([item["pixel_values"] for item in data]), []
    for n, gradients_too in product((1, parts), (False, True)):
        with torch.set_grad_enabled(gradients_too):
            found.append(torch.cat([tower.vq.nearest(tower.encode(volumes)) for volumes in whole.chunk(n)]))
    return any(not torch.equal(found[0], other) for other in found[1:])


def assert_same(one, other, rest=()):
    assert one.keys() - set(rest) == other.keys() - set(rest)
    largest = max(g.abs().max() for g in one.values())
    for name in one.keys() - set(rest):
        assert (one[name] - other[name]).abs().max() <= LARGE * largest, name


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20), power=st.integers(0, 3))
@example(seed=3, power=1)
@example(seed=3, power=3)
@example(seed=2598, power=3)
def test_small_batches_give_the_gradient_of_the_whole(accelerator, weights, seed, power):
    model, data = whole_model(), tiny_data(16, seed)
    data[9] = data[9] | {"report": data[2]["report"]}  # two reconstructions of one scan, in different small batches
    assume(not at_a_border(model, data, 2**power))
    losses, expected = by_autograd(model, data, weights)
    found, got = by_parts(model, data, 2**power, accelerator, weights)
    assert found["loss"].item() == pytest.approx(losses["loss"].item(), rel=1e-6)
    assert "temperature" in got
    assert_same(got, expected)


@pytest.mark.slow
def test_batch_64_in_the_memory_of_batch_2(accelerator):
    model = tiny_model(dropout=0.0).train()

    def peak(studies, parts):
        data = tiny_data(studies)
        with PeakMemory(alive=[*model.parameters(), *model.buffers()]) as memory:
            # a loader that loads when asked, as from a disk
            size = studies // parts
            order = [*range(0, studies, size)] * (1 if parts == 1 else 2)
            small = (collate(TOKENIZER)([copy.deepcopy(item) for item in data[i : i + size]]) for i in order)
            step_gradients(model, small, parts, weighted(1.0, 0.0), accelerator)
        model.zero_grad()
        return memory.peak_bytes

    two, cached, whole = peak(2, 1), peak(64, 32), peak(64, 1)
    embeddings = 2 * 64 * 16 * 4  # 64 volumes and reports, 16 numbers each
    assert cached < two + 8 * embeddings < whole / 4


def test_dropout_is_the_same_both_times(accelerator):
    model, data = whole_model(dropout=0.3), tiny_data(8)
    seen = {"image": [], "text": []}
    for side, outputs in seen.items():
        encode = getattr(model, f"encode_{side}")
        setattr(model, f"encode_{side}", lambda *a, _e=encode, _o=outputs: _o.append(_e(*a)) or _o[-1])
    step_gradients(model, in_parts(data, 4), 4, weighted(1.0, 0.0, seed=5), accelerator, step=3)
    for outputs in seen.values():
        assert len(outputs) == 8
        for first, again in zip(outputs[:4], outputs[4:], strict=True):
            torch.testing.assert_close(first, again, rtol=0, atol=1e-6)
    first = seen["text"][0]
    step_gradients(model, in_parts(data, 4), 4, weighted(1.0, 0.0, seed=5), accelerator, step=4)
    assert not torch.allclose(first, seen["text"][8])  # another step, other noise


def test_the_study_that_is_to_blame_is_named(accelerator):
    data = tiny_data(8)
    data[5]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 7, studies study_5\. Look at these volumes"):
        step_gradients(whole_model(), in_parts(data, 2), 2, weighted(1.0, 0.0), accelerator, step=7)


def test_seeds_depend_on_every_part():
    assert len({seed_from(1, 23), seed_from(12, 3), seed_from(1, 2, 3), seed_from("1", "epoch", 3)}) == 4
    assert seed_from(0, 1) == seed_from(0, 1) < 2**63


# --- several processes ----------------------------------------------------------------------------------


def in_one_process(folder):
    """Gradients, an evaluation and a whole run, as one of the processes or as the only one."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    n, mine = accelerator.num_processes, accelerator.process_index
    data, model = tiny_data(8), whole_model()
    share = data[mine * 8 // n : (mine + 1) * 8 // n]
    found = {}
    for parts in (1, 2):
        model.zero_grad()
        losses = step_gradients(model, in_parts(share, parts), parts, weighted(), accelerator, some_prompts())
        found[f"parts {parts}"] = gradients(model) | {"loss": losses["loss"]}
    classifier = ZeroShotClassifier(model.eval(), TOKENIZER)
    seen = classifier.embed(tiny_data(7), batch_size=2, progress=False)
    found["evaluation"] = {
        "embeddings": seen.embeddings,
        "labels": torch.tensor(seen.labels),
        "studies": torch.tensor([int(name.removeprefix("study_")) for name in seen.studies]),
        "auroc": torch.tensor(validation_score(tiny_data(7), TOKENIZER)(model)),
    }
    config = FineTuneConfig(steps=6, batch_size=4, micro_batch_size=2, prompts=PROMPTS, evaluate_every=2)
    adapted = tiny_model(dropout=0.2)
    result = finetune(adapted, data, TOKENIZER, config, folder / f"run {n}", validation_score(tiny_data(7), TOKENIZER))
    found["run"] = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
    found["history"] = {"losses": torch.tensor(result.history["loss"].dropna().to_numpy())}
    torch.save(found, folder / f"{n} processes, {mine}.pt")


@pytest.fixture(scope="module")
def several(one_thread, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    in_one_process(folder)
    in_two_processes(folder, in_one_process, folder)
    names = ("1 processes, 0", "2 processes, 0", "2 processes, 1")
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_give_the_gradient_of_one_on_the_joint_batch(several, parts):
    one, first, second = (found[f"parts {parts}"] for found in several)
    assert len(one) > 30 and "temperature" in one
    assert_same(first, one)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_an_evaluation_shared_by_two_processes_is_that_of_one(several):
    one, first, second = (found["evaluation"] for found in several)
    torch.testing.assert_close(first["embeddings"], one["embeddings"], rtol=0, atol=1e-6)
    for name in ("labels", "studies", "auroc"):
        assert torch.equal(first[name], one[name]), name
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one["studies"].tolist() == list(range(7))


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one_dropout_included(several):
    one, first, second = several
    torch.testing.assert_close(first["history"]["losses"], one["history"]["losses"], rtol=1e-4, atol=1e-5)
    for name, tensor in one["run"].items():
        assert torch.equal(first["run"][name], second["run"][name])
        torch.testing.assert_close(first["run"][name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("processes", "micro"), [(1, None), (2, 2), (4, 1), (2, None)])
def test_processes_share_what_one_would_have_done(processes, micro):
    config = FineTuneConfig(steps=9, batch_size=8, micro_batch_size=micro, prompts=PROMPTS)
    alone = StepBatches(20, FineTuneConfig(steps=9, batch_size=8, prompts=PROMPTS), range(1, 6))
    shares = [StepBatches(20, config, range(1, 6), i, processes) for i in range(processes)]
    read = [list(share) for share in shares]
    assert [len(part) for part in read] == [len(share) for share in shares]
    per_step = shares[0].parts * shares[0].rounds
    for step, whole in enumerate(alone):
        mine = [small for part in read for small in part[step * per_step : step * per_step + shares[0].parts]]
        assert sum(mine, []) == whole
    first = [i for batch in list(alone)[:2] for i in batch]
    assert len(set(first)) == 16  # within an epoch nothing comes twice
