"""The quick ways give the numbers of the plain ones, in less time or memory, and are not taken where they would not."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from golden import BATCH, relative_error, small_model
from torch import nn

from medctkit.model import fast_paths
from medctkit.model.fast_paths import QuickFeedForward, QuickVectorQuantiser, quicken
from medctkit.model.vision_tower import FeedForward, PositionConv, VectorQuantiser, VisionTransformer

# its name in transformers < 5
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


def plain_tower(model):
    """The vision tower of a model as the lesson has it."""
    tower = VisionTransformer(model.config.vision_config).train(model.training)
    tower.load_state_dict(model.visual_transformer.state_dict())
    return tower


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Take the ways of a GPU in half precision; without autocast they compute in float32 here."""
    monkeypatch.setattr(fast_paths, "_half", lambda x: x.dtype)


@pytest.fixture(params=["CPU", "GPU"])
def whose_ways(request):
    if request.param == "GPU":
        request.getfixturevalue("like_a_gpu")


@pytest.mark.parametrize("volumes", [1, 3])
@pytest.mark.parametrize(
    ("training", "precision"), [(False, torch.float32), (False, torch.bfloat16), (True, torch.float32)]
)
def test_a_quick_tower_gives_the_numbers_of_the_plain_one(volumes, training, precision, whose_ways):
    plain, found = plain_tower(small_model().train(training)), []
    quick = quicken(copy.deepcopy(plain))
    assert not [m for m in plain.modules() if type(m).__name__.startswith("Quick")]
    assert quick.state_dict().keys() == plain.state_dict().keys()
    for tower in (plain, quick):
        with torch.set_grad_enabled(training), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            tokens = tower.encode(BATCH["pixel_values"][:volumes])
        if training:
            tokens.float().square().sum().backward()
        # the last bias shifts all scores of a query alike: its gradient is 0 but for rounding
        learned = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None and "net.2.bias" not in n}
        found.append({"tokens": tokens.detach()} | learned)
    assert found[0].keys() == found[1].keys() and len(found[0]) == (len(list(plain.parameters())) if training else 1)
    for name, expected in found[0].items():
        assert relative_error(found[1][name], expected) <= (1e-4 if precision == torch.float32 else 0.05), name


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("way", ["_by_planes", "_by_shifts", "_channels_first"])
def test_the_position_convolution_of_a_gpu_gives_the_same_numbers_and_gradients(way, depth):
    plain, x, found = PositionConv(8), torch.randn(2, depth, 4, 3, 8, requires_grad=True), []
    quick = quicken(copy.deepcopy(plain))
    for block, function in ((plain, plain.forward), (quick, getattr(quick, way))):
        out = function(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)


def test_a_gpu_in_half_precision_chooses_the_codes_of_float32(like_a_gpu, monkeypatch):
    quantiser, x, products = small_model().visual_transformer.vq, torch.randn(7, 50, 64), []
    right = VectorQuantiser.nearest(quantiser, x)
    product = fast_paths._product
    monkeypatch.setattr(fast_paths, "_product", lambda a, b: products.append(a.dtype) or product(a, b))
    monkeypatch.setattr(QuickVectorQuantiser, "max_similarities_in_halves", 100 * len(quantiser._codebook.embed[0]))
    assert torch.equal(quantiser.nearest(x), right) and products == [torch.bfloat16] * 4  # 100 of 350 tokens at a time
    assert torch.equal(quantiser.nearest(x.bfloat16()), VectorQuantiser.nearest(quantiser, x.bfloat16()))


@pytest.mark.parametrize(
    ("device", "dtype", "autocast", "half"),
    [
        ("cpu", torch.bfloat16, True, None),
        ("cuda", torch.float32, False, None),
        ("cuda", torch.float16, False, torch.float16),
        ("cuda", torch.float32, True, torch.bfloat16),
    ],
)
def test_the_ways_of_a_gpu_are_for_half_precision_on_a_gpu(device, dtype, autocast, half, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: autocast)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    assert fast_paths._half(SimpleNamespace(device=torch.device(device), dtype=dtype)) == half


@pytest.mark.parametrize("dim", [64, 48, 96])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_the_quick_feed_forward_gives_the_same_numbers(dim, tokens, whose_ways):
    torch.manual_seed(0)
    plain, x = FeedForward(dim), torch.randn(2, tokens, dim)
    block = quicken(copy.deepcopy(plain))
    block.tokens_at_a_time = 16
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain(x), atol=1e-6, rtol=1e-5)
        assert block.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_an_adapter_or_a_hook_is_not_passed_over(whose_ways):
    for block, x, last in (
        (QuickFeedForward(32), torch.randn(1, 4, 32), "4"),
        (quicken(PositionConv(8)), torch.randn(1, 3, 2, 2, 8), "dsconv"),
    ):
        seen = []
        handle = block.get_submodule(last).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        with torch.no_grad():
            block(x)
            handle.remove()
            plain = block(x)
            # as peft puts a layer of its own in a layer's place
            block.set_submodule(last, nn.Sequential(block.get_submodule(last), nn.Tanh()))
            assert seen == [1]
            torch.testing.assert_close(block(x), plain.tanh())


@pytest.mark.slow
def test_the_compiler_sees_one_graph(whose_ways):
    tower = small_model().train().visual_transformer
    compiled = torch.compile(tower, backend="eager", fullgraph=True)
    assert relative_error(compiled(BATCH["pixel_values"]), tower(BATCH["pixel_values"])) <= 1e-5


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain, saving = small_model().train(), small_model().train()
    saving.gradient_checkpointing_enable()
    calls = []
    saving.visual_transformer.enc_spatial_transformer.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert saving.is_gradient_checkpointing
    for model in (plain, saving):
        model.text_transformer.embeddings.requires_grad_(False)  # re-entrant checkpointing would lose BERT here
        model.visual_transformer.to_patch_emb.requires_grad_(False)
        model(**BATCH, return_loss=True).loss.backward()
    assert len(calls) == 2
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def frozen_below_the_latents():
    """In training mode, with everything frozen but what a vision LoRA would train."""
    model = small_model().train().requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_(".1.to_q." in name or ".1.to_kv." in name)
    return model


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_frozen_feed_forward_in_parts_gives_the_same_gradients_and_runs_twice(precision, monkeypatch, whose_ways):
    monkeypatch.setattr(QuickFeedForward, "tokens_in_training", 7)
    found, tokens = [], []
    for checkpointing in (False, True):
        model = frozen_below_the_latents()
        if checkpointing:
            model.gradient_checkpointing_enable()
            block = model.visual_transformer.enc_spatial_transformer.layers[1]["3"]
            block[2].register_forward_hook(lambda module, args, out: tokens.append(len(out)))
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = model(**BATCH, return_loss=True).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) == 1 + 2 * 4  # the loss; to_q and to_kv of four layers
    tolerance = 1e-5 if precision == torch.float32 else 0.02  # products of other sizes round otherwise
    for plain, in_parts in zip(*found, strict=True):
        assert relative_error(in_parts, plain) <= tolerance and plain.any()
    assert sum(tokens) == 2 * 3 * math.prod(model.config.grid) and max(tokens) == 7, "twice, not three times"


def test_a_feed_forward_in_parts_refuses_a_second_backward_pass(monkeypatch):
    monkeypatch.setattr(QuickFeedForward, "tokens_in_training", 4)
    block = QuickFeedForward(6).double().requires_grad_(False)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    y = block(x).exp().sum()
    y.backward(retain_graph=True)
    (plain,) = torch.autograd.grad(y, x)  # not in parts: as often as you like
    x.grad = None
    block.gradient_checkpointing = True
    y = block(x).exp().sum()
    y.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, plain)
    with pytest.raises(RuntimeError, match="can be backed through only once"):
        y.backward()


def test_a_feed_forward_that_learns_gets_its_gradients_with_checkpointing():
    gradients = []
    for model in (frozen_below_the_latents(), small_model().train()):
        weight = model.visual_transformer.enc_spatial_transformer.layers[1]["3"][4].weight.requires_grad_(True)
        if not gradients:
            model.gradient_checkpointing_enable()
        gradients += torch.autograd.grad(model(**BATCH, return_loss=True).loss, weight)
    torch.testing.assert_close(*gradients)


def test_frozen_patches_are_cut_slab_by_slab_in_training_too():
    shapes = []
    for frozen in (False, True):
        model = small_model().train()
        model.visual_transformer.to_patch_emb.requires_grad_(not frozen)
        model.visual_transformer.to_patch_emb[0].register_forward_hook(lambda *args: shapes.append(args[2].shape[1]))
        model.visual_transformer.encode(BATCH["pixel_values"])
    t, volumes = model.config.grid[0], len(BATCH["pixel_values"])
    assert shapes == [t] + [1] * t * volumes
    volumes = BATCH["pixel_values"].clone().requires_grad_(True)  # as for a saliency map
    model(volumes, BATCH["input_ids"]).logits_per_image.sum().backward()
    assert volumes.grad.any()
