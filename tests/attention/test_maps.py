"""Attention as the model computes it, rolled out, and what speaks for a prompt."""

import numpy as np
import pytest
import torch
from tiny import randomise_adapter, tiny_data, tiny_model, tiny_tokenizer
from torch import nn

from medctkit.attention import maps as attention
from medctkit.attention.maps import Attention, attend, patch_at, patch_map, relevance, relevance_maps
from medctkit.model.vision_tower import Attention as AttentionLayer
from medctkit.phantom.study import generate
from medctkit.scans.preprocessing import PreprocessConfig, as_seen
from medctkit.scans.volumes import CTVolume

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = PreprocessConfig((45.0, 11.25, 11.25), (8, 32, 32))  # the tiny model's input: 2 x 2 x 2 patches


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = tiny_model().eval()
    for module in model.modules():  # an adapter that does something, attention that is not flat
        if isinstance(module, AttentionLayer):
            nn.init.normal_(module.q_scale, 1.0, 0.3)
    return randomise_adapter(model)


@pytest.fixture(scope="module")
def volumes():
    return torch.stack([item["pixel_values"] for item in tiny_data(3)])


def random_attention(grid=(3, 2, 4), layers=2, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    t, n = grid[0], grid[1] * grid[2]
    spatial = [torch.rand(t, heads, n, n, generator=generator).softmax(-1) for _ in range(layers)]
    temporal = [torch.rand(n, heads, t, t, generator=generator).softmax(-1) for _ in range(layers)]
    return Attention(spatial, temporal, grid)


def test_probabilities_are_those_the_model_computes_with(model, volumes):
    captured, inputs = attend(model, volumes[:1]), []
    hooks = [
        m.register_forward_hook(lambda module, given, out: inputs.append((module, given, out)))
        for m in model.modules()
        if isinstance(m, AttentionLayer)
    ]
    with torch.no_grad():
        model.encode_image(volumes[:1])
    for hook in hooks:
        hook.remove()
    probabilities = [*captured.spatial, *captured.temporal]
    assert len(inputs) == len(probabilities) == 2
    for (module, (x, *bias), out), kept in zip(inputs, probabilities, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(kept, module.probabilities(*module.project(x)[:2], *bias), rtol=1e-5, atol=1e-6)
            mixed = module.to_out((kept @ module.project(x)[2]).transpose(1, 2).flatten(2))
        torch.testing.assert_close(mixed, out, rtol=1e-4, atol=1e-5)  # what scaled_dot_product_attention gave
        torch.testing.assert_close(kept.sum(-1), torch.ones(kept.shape[:-1]))


def test_capturing_leaves_no_trace(model, volumes):
    def answers():
        with torch.no_grad():
            return model.encode_image(volumes)

    before, was_training = answers(), model.training
    attend(model, volumes[0])
    relevance_maps(model, volumes, torch.randn(3, 16))
    assert torch.equal(answers(), before) and model.training == was_training
    assert not [m for m in model.modules() if {"forward", "mix"} & set(vars(m))], "a layer still goes the slow way"
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="while it is captured"), attention._explicit(model):
        raise RuntimeError("something went wrong while it is captured")
    assert not [m for m in model.modules() if {"forward", "mix"} & set(vars(m))]


def test_a_query_attends_within_its_slab_or_its_column():
    found = random_attention()
    spatial = found.of_query("spatial", 1, 0, (2, 1, 3))
    assert spatial.sum() == pytest.approx(1) and not spatial[[0, 1]].any()
    np.testing.assert_allclose(spatial[2].ravel(), found.spatial[1][2, 0, 1 * 4 + 3])
    temporal = found.of_query("temporal", 0, None, (2, 1, 3))
    assert temporal.sum() == pytest.approx(1) and np.count_nonzero(temporal) == 3
    np.testing.assert_allclose(temporal[:, 1, 3], found.temporal[0][7, :, 2].mean(0))


def test_attention_received_is_the_mean_over_queries():
    found = random_attention()
    for part in ("spatial", "temporal"):
        each = [found.of_query(part, 0, None, (t, i, j)) for t in range(3) for i in range(2) for j in range(4)]
        np.testing.assert_allclose(found.received(part, 0), np.mean(each, axis=0), rtol=1e-4)


def test_rollout_goes_through_both_transformers():
    found = random_attention()
    (t, h, w), n = found.grid, 8
    whole = np.eye(t * n)  # by hand: one matrix over all tokens for each layer
    for layer in found.spatial:
        step = np.zeros((t, n, t, n))
        for s in range(t):
            step[s, :, s] = (layer[s].mean(0).numpy() + np.eye(n)) / 2
        whole = step.reshape(t * n, t * n) @ whole
    for layer in found.temporal:
        step = np.zeros((t, n, t, n))
        for p in range(n):
            step[:, p, :, p] = (layer[p].mean(0).numpy() + np.eye(t)) / 2
        whole = step.reshape(t * n, t * n) @ whole
    np.testing.assert_allclose(found.rollout(), whole.mean(0).reshape(t, h, w), rtol=1e-5)
    assert found.rollout().sum() == pytest.approx(1)


def test_relevance_without_attention_is_gradient_times_token(model, volumes, monkeypatch):
    """And with it, it is written out here once more, token by token."""
    direction = torch.randn(1, 16)
    monkeypatch.setattr(
        attention, "_related", lambda layers, _: torch.eye(layers[0].shape[-1]).expand_as(layers[0][:, 0])
    )
    found = relevance_maps(model, volumes[:1], direction)[0]
    with torch.no_grad():
        tokens = model.visual_transformer(volumes[:1])
    tokens.requires_grad_()
    image = nn.functional.normalize(model.to_visual_latent(tokens.mean(1).flatten(1)), dim=-1)
    (gradient,) = torch.autograd.grad(model.temperature.exp() * (image * direction).sum(), tokens)
    expected = (gradient * tokens).sum(-1).clamp(min=0)[0].detach().numpy()
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-3, atol=1e-6)


def test_relevance_weights_attention_with_its_gradient():
    layer = torch.tensor([[[[0.9, 0.1], [0.4, 0.6]], [[0.5, 0.5], [0.2, 0.8]]]])  # 1 sequence, 2 heads, 2 tokens
    gradient = torch.tensor([[[[1.0, -2.0], [0.5, 0.0]], [[0.0, 2.0], [1.0, -1.0]]]])
    weighted = torch.tensor([[[0.45, 0.5], [0.2, 0.0]]])  # mean over heads of max(0, gradient * attention)
    weighted[0, 1, 0] = (0.2 + 0.2) / 2
    torch.testing.assert_close(attention._related([layer], [gradient]), torch.eye(2) + weighted)
    twice = torch.eye(2) + weighted + weighted @ (torch.eye(2) + weighted)
    torch.testing.assert_close(attention._related([layer, layer], [gradient, gradient]), twice)


def test_relevance_of_a_volume_does_not_depend_on_its_batch(model, volumes):
    directions = torch.randn(3, 16)
    together = relevance_maps(model, volumes, directions)
    alone = np.concatenate([relevance_maps(model, v[None], d[None]) for v, d in zip(volumes, directions, strict=True)])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(together.sum((1, 2, 3)), 1, rtol=1e-5)
    assert together.min() >= 0


def test_a_denial_asks_the_opposite_question(model, volumes):
    words = tiny_tokenizer()
    for_it = relevance(model, words, volumes[0], "Emphysema seen", "no Emphysema")
    against = relevance(model, words, volumes[0], "no Emphysema", "Emphysema seen")
    alone = relevance(model, words, volumes[0], "Emphysema seen")
    assert for_it.shape == model.config.grid
    assert not np.allclose(for_it, against, atol=1e-3) and not np.allclose(for_it, alone, atol=1e-3)


@pytest.mark.parametrize("orientation", ["SPL", "LAS", "PIR"])
def test_a_map_lies_where_the_model_saw_it(orientation):
    """A block in one patch, through `preprocess`: that patch's mean, put back, is highest in the block."""
    volume = generate(3, shape=(36, 40, 40), findings=[]).volume
    hu = np.full(volume.shape, -1000, np.int16)
    hu[4:10, 25:33, 6:12] = 1000
    block = CTVolume(hu, volume.spacing).reoriented(orientation)
    inside = np.argwhere(block.hu > 0)
    middle = block.affine[:3, :3] @ inside.mean(0) + block.affine[:3, 3]
    for config, grid in ((CONFIG, (2, 2, 2)), (PreprocessConfig((22.5, 5.625, 5.625), (16, 64, 64)), (8, 8, 8))):
        seen = as_seen(block, config).hu.transpose(0, 2, 1)  # the model's axes
        t, h, w = grid
        patches = seen.reshape(t, seen.shape[0] // t, h, seen.shape[1] // h, w, seen.shape[2] // w).mean((1, 3, 5))
        highest = np.unravel_index(patches.argmax(), grid)
        assert patch_at(middle, block, config, grid) == highest
        heat = patch_map(patches, block, config)
        nearest = np.linalg.inv(heat.affine) @ [*middle, 1]
        assert np.abs(nearest[:3] - highest).max() <= 0.5 + 1e-6
        on_voxels = heat.on_voxels(block)
        assert on_voxels[tuple(inside.T)].mean() > np.nanmean(on_voxels)
    assert patch_at(block.affine[:3, 3] - 1000, block, CONFIG, (2, 2, 2)) is None


def test_bad_input_is_refused(model, volumes):
    words = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"shape \(3, 1, 8, 32, 32\): expected one, \(1, D, H, W\)"):
        attend(model, volumes)
    with pytest.raises(ValueError, match=r"this model expects \(batch, 1, 8, 32, 32\)"):
        attend(model, torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="40 tokens, the text encoder takes 32; shorten it"):
        relevance(model, words, volumes[0], "scan " * 40)
    with pytest.raises(ValueError, match="the sentence is ' '; expected words"):
        relevance(model, words, volumes[0], " ")
    found = random_attention()
    with pytest.raises(ValueError, match="unknown part 'text'; choose one of spatial, temporal"):
        found.received("text", 0)
    with pytest.raises(IndexError, match="spatial layer 2: the model has layers 0 to 1"):
        found.received("spatial", 2)
    with pytest.raises(IndexError, match="head 5: the model has heads 0 to 1"):
        found.received("spatial", 0, 5)
    with pytest.raises(IndexError, match=r"patch \(3, 0, 0\): the model has 3 x 2 x 4 patches"):
        found.of_query("spatial", 0, None, (3, 0, 0))
    volume = generate(3, findings=[]).volume
    with pytest.raises(ValueError, match=r"map of shape \(3, 2, 4\).*is it the map of another model"):
        patch_map(np.ones((3, 2, 4)), volume, CONFIG)
