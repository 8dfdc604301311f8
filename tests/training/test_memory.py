"""Memory, measured: every tensor counts once while it lives; half precision for what is frozen changes no result."""

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny import small_step, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from medctkit.lora.adapter import add_lora
from medctkit.model.fast_paths import quicken
from medctkit.model.vision_tower import Attention, Transformer
from medctkit.training.memory import PeakMemory, cast_frozen


@pytest.fixture(params=["real", "without data"])
def kind_of_tensor(request):
    with nullcontext() if request.param == "real" else FakeTensorMode():
        yield


# --- the highest bytes --------------------------------------------------------------------------------


@pytest.mark.usefixtures("kind_of_tensor")
def test_tensors_count_from_their_making_until_nothing_refers_to_them():
    with PeakMemory() as memory:
        a = torch.zeros(100)  # 400 bytes
        b = a + 1
        assert (memory.now_bytes, memory.peak_bytes) == (800, 800)
        del a
        assert (memory.now_bytes, memory.peak_bytes) == (400, 800)
        c = b.to(torch.bfloat16)  # 200
        held = [b]
        del b
        assert (memory.now_bytes, memory.peak_bytes) == (600, 800)
        held.clear()
        d = torch.tensor([1.0, 2.0])  # 8
        assert (memory.now_bytes, memory.peak_bytes) == (208, 800)
    del c, d
    assert (memory.now_bytes, memory.peak_bytes) == (0, 800)


@pytest.mark.usefixtures("kind_of_tensor")
def test_views_and_changes_in_place_count_nothing():
    with PeakMemory() as memory:
        a = torch.zeros(10, 10)
        views = a.t(), a[3:], a.view(-1).detach(), a.expand(5, 10, 10)
        a += 1
        a.t().mul_(2)
        assert memory.now_bytes == 400
        del a
        assert memory.now_bytes == 400  # a view holds all of it
        del views
        assert memory.now_bytes == 0


@pytest.mark.usefixtures("kind_of_tensor")
def test_what_was_there_before_counts_only_where_it_is_named():
    weights, other = torch.zeros(100), torch.zeros(1000)
    with PeakMemory(alive=[weights, weights.view(10, 10), weights[5:]]) as memory:
        assert memory.now_bytes == memory.peak_bytes == 400
        other += 1
        part = other[:5]
        assert part.shape == (5,) and memory.now_bytes == 400
        del weights
        assert memory.now_bytes == 0 and memory.peak_bytes == 400


@pytest.mark.usefixtures("kind_of_tensor")
def test_a_resized_tensor_counts_with_its_new_size():
    with PeakMemory() as memory:
        out = torch.empty(0)
        torch.add(torch.ones(100), 1, out=out)
        assert memory.now_bytes == 400
        torch.add(torch.ones(200), 1, out=out.resize_(0))
        assert (memory.now_bytes, memory.peak_bytes) == (800, 1600)  # old, new and what is added


@pytest.mark.usefixtures("kind_of_tensor")
def test_what_waits_for_the_backward_pass_and_gradients_count():
    x = torch.zeros(100, requires_grad=True)
    with PeakMemory([x]) as memory:
        y = (x * 2).exp()  # exp keeps its result, the product keeps nothing
        z = y.sum()
        del y
        assert memory.now_bytes == 400 + 400 + 4
        z.backward()
        assert memory.now_bytes == 400 + 400 + 4  # the gradient in place of what exp kept
        # before the product's: x, what exp kept, the sum, its gradient of one number, exp's gradient
        assert memory.peak_bytes == 400 + 400 + 4 + 4 + 400
        x.grad = None
        del z
        assert memory.now_bytes == 400


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # its name in transformers < 5
def test_a_step_without_data_takes_exactly_what_a_real_one_takes():
    plain, saving = (small_step(True, checkpointing) for checkpointing in (False, True))
    assert small_step(False, False) == plain
    assert small_step(False, True) == saving
    assert saving[1] < plain[1] and saving[-1] < plain[-1]


# --- what autograd keeps ------------------------------------------------------------------------------


def test_of_a_checkpointed_transformer_with_frozen_feed_forwards_only_the_layers_inputs_stay():
    transformer = quicken(Transformer(16, 3, 2, 8)).train().requires_grad_(False)
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.to_q.requires_grad_(True)
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    x = torch.randn(2, 12, 16)
    with PeakMemory([x, *transformer.parameters(), *transformer.buffers()]) as memory:
        before = memory.now_bytes
        y = transformer(x, (1, 2, 3, 4))
        # what enters the second and third layer and the norm, what leaves it, and the norm's means and deviations
        assert memory.now_bytes - before == 4 * x.nbytes + 2 * (24 * 4)
        y.sum().backward()
        del y
        assert memory.now_bytes - before == sum(4 * 16 * 16 for _ in transformer.layers)  # the gradients of to_q


# --- frozen weights in half precision -----------------------------------------------------------------


def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.rand(3, 1, 8, 32, 32, generator=generator) * 2 - 1,
        "input_ids": torch.randint(1, 100, (3, 12), generator=generator),
    }


def adapted(preset="paper", **fields):
    """A tiny model whose adapter and norms do something."""
    model = tiny_model(preset, dropout=0.0, **fields)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.train()


def outputs_and_gradients(model, dtype):
    with torch.autocast("cpu", dtype):
        out = model(**batch(), return_loss=True)
    out.loss.float().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"images": out.image_embeds, "texts": out.text_embeds, "loss": out.loss} | gradients


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_frozen_weights_in_half_precision_change_not_one_bit(dtype, checkpointing):
    model = adapted()
    cast = copy.deepcopy(model)
    saved = cast_frozen(cast, dtype)
    if checkpointing:
        cast.get_base_model().gradient_checkpointing_enable()
        model.get_base_model().gradient_checkpointing_enable()
    expected, found = outputs_and_gradients(model, dtype), outputs_and_gradients(cast, dtype)
    assert found.keys() == expected.keys() and len(found) == 3 + 2 * 7  # A and B of to_q, to_kv twice, and of q, k, v
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert tensor.any(), name

    def size(model):
        return sum(p.numel() * p.itemsize for p in model.parameters())

    assert saved == size(model) - size(cast) > 0.6 * size(cast)


def test_only_frozen_linear_layers_and_convolutions_are_cast():
    model = adapted()
    model.get_base_model().to_text_latent.requires_grad_(True)
    cast_frozen(model)
    cast = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    layer = "base_model.model.visual_transformer.enc_spatial_transformer.layers.0"
    assert cast >= {
        f"{layer}.0.dsconv.weight",
        f"{layer}.0.dsconv.bias",
        f"{layer}.1.to_q.base_layer.weight",
        f"{layer}.1.to_out.weight",
        f"{layer}.3.4.weight",
        "base_model.model.visual_transformer.to_patch_emb.2.bias",
        "base_model.model.to_visual_latent.weight",
        "base_model.model.text_transformer.encoder.layer.0.intermediate.dense.weight",
    }
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert cast < frozen
    left = " ".join(frozen - cast)
    assert "spatial_rel_pos_bias.net.1.0.weight" in left and "temperature" in left and "word_embeddings" in left
    assert "dense" not in left and "base_layer" not in left
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    assert cast_frozen(model) == 0  # nothing left to do


def test_what_an_adapter_trains_or_reads_itself_stays_exact():
    waiting = adapted()
    waiting.add_adapter("other", waiting.peft_config["default"])
    cast_frozen(waiting)
    assert {p.dtype for name, p in waiting.named_parameters() if "lora_" in name} == {torch.float32}
    dora = add_lora(tiny_model().unload(), "vision", use_dora=True, r=4)  # reads the weight of its base layer
    cast_frozen(dora)
    base = {p.dtype for name, p in dora.named_parameters() if "base_layer" in name}
    others = {p.dtype for name, p in dora.named_parameters() if name.endswith("dense.weight")}
    assert (base, others) == ({torch.float32}, {torch.bfloat16})


def test_float16_refuses_a_weight_beyond_its_range_and_casts_nothing():
    model = adapted()
    with torch.no_grad():
        model.get_base_model().to_visual_latent.weight[1, 2] = -7e4
    with pytest.raises(ValueError, match=r"to_visual_latent\.weight holds 70000, more than float16 can \(65,504\)"):
        cast_frozen(model, torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    cast_frozen(model, torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 or torch.float16, got torch.float32"):
        cast_frozen(model, torch.float32)


def test_a_model_on_the_meta_device_is_cast_too():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).requires_grad_(False)
    assert cast_frozen(model) == 40 and model[0].weight.dtype == torch.bfloat16
    assert F.linear(torch.zeros(1, 4, device="meta", dtype=torch.bfloat16), model[0].weight).shape == (1, 4)
