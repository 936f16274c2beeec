"""layouts/: network, noise and target, switch, probe, statistics of pages, table, bad input."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pgraft
from conftest import assert_one_line, run_inside
from layouts import pgraft_layouts
from layouts.judge import FEATURES, alignment, overlap
from layouts.model import (
    BOXES,
    EMBEDDED,
    HALF,
    PAGES,
    Model,
    box_mask,
    boxes_of,
    counts_of,
    derived_seed,
    differences,
    draw_noise,
    edges,
    page_of,
)
from layouts.pgraft_layouts import (
    BLOCKS,
    ROW,
    Args,
    coverage,
    denoise,
    denoising_loss,
    draw,
    evaluate,
    measures,
    probe,
    read_pages,
    read_reward,
    recommend,
    results_table,
    sample,
    sampled_row,
    save_pages,
    shaped_target,
    statistics,
)
from utils.runs import InputError

SIZES = {"width": 16, "pair_width": 8, "heads": 2, "layers": 2}
SCRIPT = "layouts/pgraft_layouts.py"


def random_network(seed=0):
    """A network whose every weight counts."""
    model = Model.new(SIZES, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            spread = 0.3 if parameter.dim() == 1 or "modulation" in name else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def noisy():
    """(x_t, level, counts) of four pages with 12, 5, 2 and 1 boxes."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor([[3, 5, 1, 2, 1], [0, 5, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 1, 0]])
    x = torch.randn(4, BOXES, 9, generator=generator) * box_mask(counts, BOXES)
    return x, torch.rand(4, generator=generator), counts


def with_random_lora(model, seed=2):
    """The model with a LoRA that has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.add_lora(3, 6.0, 0):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def page(*boxes):
    """(boxes (1, 12, 4), kind (1, 12)) of (class, centre x, centre y, width, height)."""
    places, kind = torch.zeros(1, BOXES, 4), torch.full((1, BOXES), -1)
    for i, (k, *place) in enumerate(boxes):
        places[0, i], kind[0, i] = torch.tensor(place), k
    return places, kind


# ---------------------------------------------------------------- the space of pages


def test_pages_and_back():
    boxes, kind = page((1, 0.5, 0.25, 0.8, 0.1), (4, 0.2, 0.9, 0.1, 0.05), (0, 0.5, 0.5, 1, 1))
    x_0 = page_of(boxes, kind)
    assert x_0.shape == (1, BOXES, 9) and not x_0[0, 3:].any()
    assert x_0[0, 0].tolist() == pytest.approx([0, -1, 1.2, -0.2, 0, HALF, 0, 0, 0], abs=1e-6)
    counts = counts_of(kind)
    assert counts.tolist() == [[1, 1, 0, 0, 1]]
    again, kinds = boxes_of(x_0 + 0.2 * (kind < 0).unsqueeze(2), counts)  # gaps may hold anything
    assert torch.allclose(again[0, 1:3], boxes[0, 1:3], atol=1e-6) and torch.equal(kinds, kind)
    assert not again[0, 3:].any()
    x_0[0, 0, 2] = -3  # no box has a negative size
    assert boxes_of(x_0, counts)[0][0, 0].tolist() == pytest.approx([0.5, 0.25, 0, 0.1], abs=1e-6)
    assert box_mask(counts, 4)[0, :, 0].tolist() == [1, 1, 1, 0]


def test_edges_and_their_differences():
    boxes, kind = page((1, 0.3, 0.2, 0.2, 0.1), (1, 0.5, 0.6, 0.2, 0.3))
    edge = edges(page_of(boxes, kind)[:, :2, :4])
    sides = [[-0.3, -0.2, -0.1], [-0.35, -0.3, -0.25]], [[-0.1, 0, 0.1], [-0.05, 0.1, 0.25]]
    assert torch.allclose(edge, torch.tensor([sides]), atol=1e-6)
    apart = differences(edge, torch.tensor([0.4]))
    assert apart.shape == (1, 2, 2, 40)
    # left, middle, right by left, middle, right; left by right, right by left; the same from top to bottom
    expected = torch.tensor([-0.2, -0.2, -0.2, -0.4, 0.0, -0.3, -0.4, -0.5, -0.6, -0.2])
    for i, scale in enumerate((1, 0.1, 0.02, 2 * 0.1 + 0.005)):
        part = apart[0, 0, 1, 10 * i : 10 * i + 10]
        assert torch.allclose(part, (expected / scale).tanh(), atol=1e-4)
    same = apart[0, 0, 0, :10].atanh()
    assert torch.allclose(same, torch.tensor([0, 0, 0, -0.2, 0.2, 0, 0, 0, -0.1, 0.1]), atol=1e-6)


# ---------------------------------------------------------------- the network and its noise


def test_network_is_equivariant(noisy):
    model, (x, level, counts) = random_network(), noisy
    v = model.predict(x, level, counts)
    assert v[0].std() > 0.1 and (v[0, 0] - v[0, 1]).abs().max() > 0.1
    order = torch.tensor([4, 2, 0, 1, 3, 11, 6, 10, 9, 8, 7, 5])
    assert torch.allclose(model.predict(x[:1, order], level[:1], counts[:1]), v[:1, order], atol=1e-5)


def test_gaps_are_nothing(noisy):
    model, (x, level, counts) = random_network(), noisy
    v = model.predict(x, level, counts)
    for i, n in enumerate(counts.sum(1)):
        assert not v[i, n:].any()
        one = slice(i, i + 1)
        assert torch.allclose(model.predict(x[one, :n], level[one], counts[one])[0], v[i, :n], atol=1e-5)
        filled = x[one] + 7 * (1 - box_mask(counts[one], BOXES))
        assert torch.allclose(model.predict(filled, level[one], counts[one])[0, :n], v[i, :n], atol=1e-5)


def test_boxes_see_each_other(noisy):
    """Also by the differences of their edges alone."""
    model, (x, level, counts) = random_network(), noisy
    moved = x.clone()
    moved[0, 3, 0] += 0.5
    with torch.no_grad():
        change = model.predict(moved, level, counts) - model.predict(x, level, counts)
        assert change[0, [0, 1, 2, 4]].abs().amax(1).min() > 1e-3 and change[1:].abs().max() < 1e-5
        for layer in model.network.layers:  # nothing of what the others are, nor the weight of what they are
            layer.qkv.weight[2 * SIZES["width"] :] = 0
            layer.bias.weight.zero_()
        change = model.predict(moved, level, counts) - model.predict(x, level, counts)
        assert change[0, [0, 1, 2, 4]].abs().amax(1).min() > 1e-3
        for layer in model.network.layers:
            layer.mixed.weight[:, SIZES["width"] :] = 0
        change = model.predict(moved, level, counts) - model.predict(x, level, counts)
        assert change[0, [0, 1, 2, 4]].abs().max() < 1e-5


def test_the_bias_of_attention_counts(noisy):
    model, (x, level, counts) = random_network(), noisy
    v = model.predict(x, level, counts)
    with torch.no_grad():
        for layer in model.network.layers:
            layer.bias.weight.zero_()
    assert not torch.allclose(model.predict(x, level, counts)[0], v[0], atol=1e-3)


def test_layer_by_a_loop():
    """What a box receives is of what it sees of the others, not of what they see of it."""
    layer, generator = random_network().network.layers[0], torch.Generator().manual_seed(0)
    states, pairs = torch.randn(3, 16, generator=generator), torch.randn(3, 3, 8, generator=generator)
    given = torch.randn(6, 1, 16, generator=generator)
    shift, scale, gate, shift_2, scale_2, gate_2 = (given + layer.modulation)[:, 0]
    gaps = torch.tensor([0, 0, -math.inf])

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    q, k, v = layer.qkv(norm(states) * (1 + scale) + shift).split(16, 1)
    for i in range(3):
        received, seen = [], []
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            scores = torch.stack([q[i, part] @ k[j, part] / 8**0.5 for j in range(3)])
            weight = (scores + layer.bias(pairs[i])[:, head] + gaps).softmax(0)
            received.append(sum(weight[j] * v[j, part] for j in range(3)))
            seen.append(sum(weight[j] * pairs[i, j] for j in range(3)))
        state = states[i] + gate * layer.mixed(torch.cat(received + seen))
        hidden = torch.nn.functional.silu(layer.hidden(norm(state) * (1 + scale_2) + shift_2))
        expected = state + gate_2 * layer.hidden_out(hidden)
        got = layer(states[None], pairs[None], gaps.view(1, 1, 1, 3), given[None])[0, i]
        assert torch.allclose(got, expected, atol=1e-4)


def test_prediction_depends_on_level_and_classes(noisy):
    model, (x, level, counts) = random_network(), noisy
    v = model.predict(x, level, counts)
    assert not torch.allclose(v, model.predict(x, level / 2, counts), atol=1e-2)
    low = [model.predict(x, torch.full((4,), a), counts) for a in (0.002, 0.004)]
    assert not torch.allclose(*low, atol=1e-2)  # low levels are told apart
    other = counts[:, [1, 0, 2, 3, 4]]  # as many boxes, of other classes
    assert not torch.allclose(v[:3], model.predict(x, level, other)[:3], atol=1e-2)
    blind = torch.tensor([0.0, 1, 0, 1])
    seen = model.predict(x, level, counts, blind)
    assert torch.equal(seen[[1, 3]], v[[1, 3]]) and not torch.allclose(seen[[0, 2]], v[[0, 2]], atol=1e-2)
    assert torch.equal(model.predict(x, level, other, torch.zeros(4))[[0, 2]], seen[[0, 2]])


def test_a_new_network_predicts_nothing(noisy):
    x, level, counts = noisy
    assert not Model.new(SIZES, "cpu").predict(x, level, counts).any()


def test_noise_is_of_the_seed_alone():
    noise = draw_noise([5, 6, 7], 4)
    assert noise.shape == (5, 3, BOXES, 9)
    assert torch.equal(noise[:, 1:2], draw_noise([6], 4)) and abs(noise.std() - 1) < 0.1


def test_levels():
    model = random_network()
    assert model.levels(4) == [1, 0.5625, 0.25, 0.0625]
    assert model.levels(10) == [1, 0.81, 0.64, 0.49, 0.36, 0.25, 0.16, 0.09, 0.04, 0.01]
    assert model.alpha_sigma(0.0) == (1, 0) and model.alpha_sigma(1 / 3) == pytest.approx((0.75**0.5, 0.5))
    alpha, sigma = model.alpha_sigma(torch.tensor([1 / 3, 1.0]))
    assert torch.allclose(alpha, torch.tensor([0.75**0.5, 0]), atol=1e-6)
    assert torch.allclose(sigma, torch.tensor([0.5, 1]))


# ---------------------------------------------------------------- the target and the loss

LEVELS = [(0.0, 0.02), (0.0, 1.0), (0.3, 0.31), (0.3, 0.9), (0.7, 1.0)]  # at the switch, above


@pytest.mark.parametrize("s, t", LEVELS)
def test_target_is_that_of_pgraft(s, t):
    x_s, noise = torch.randn(2, 3, BOXES, 9, generator=torch.Generator().manual_seed(0))
    level = [torch.full((3,), value) for value in Model.alpha_sigma(None, t)]
    mine = shaped_target(x_s, noise, *Model.alpha_sigma(None, s), *level)
    theirs = pgraft.shaped_target(x_s, noise, *Model.alpha_sigma(None, s), *level, "v_prediction")
    for one, other in zip(mine, theirs):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    if s == 0:
        assert torch.equal(mine[2], torch.ones(3, 1, 1))


@pytest.mark.parametrize("s, t", LEVELS)
def test_regression_of_the_target_on_a_gaussian(s, t):
    """The mean of the target given x_t is the v wanted: for x_0 ~ N(0, 0.7^2), exactly and from draws."""
    (alpha_s, sigma_s), (alpha, sigma) = (Model.alpha_sigma(None, level) for level in (s, t))
    std = math.hypot(alpha_s * 0.7, sigma_s)  # of x_s
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    level = (alpha_s, sigma_s, torch.tensor([alpha]), torch.tensor([sigma]))
    (a, of_x, weight), (b, of_noise, _) = (
        shaped_target(*pair, *level) for pair in ((one, zero), (zero, one))
    )
    slope = (a * of_x * std**2 + b * of_noise) / (
        a**2 * std**2 + b**2
    )  # least squares, x_s and eps' independent
    variance = (alpha * 0.7) ** 2 + sigma**2
    wanted = (
        alpha * sigma / variance - sigma * alpha * 0.7**2 / variance
    )  # of v, with E[eps | x_t] and E[x_0 | x_t]
    assert slope.item() == pytest.approx(wanted, abs=2e-5)
    assert weight.item() == pytest.approx((b.item() / sigma) ** 2, rel=1e-4)
    generator = torch.Generator().manual_seed(1)
    x_s = std * torch.randn(1, 40_000, 9, generator=generator)
    x_t, target, _ = shaped_target(x_s, torch.randn(1, 40_000, 9, generator=generator), *level)
    error = (target.std() / x_t.std() / x_t.numel() ** 0.5).item()
    assert ((x_t * target).mean() / x_t.square().mean()).item() == pytest.approx(wanted, abs=5 * error)


def test_loss_by_hand():
    counts = torch.tensor([[1, 1, 0, 0, 0], [0, 2, 2, 0, 0]])
    generator = torch.Generator().manual_seed(5)
    x_s = torch.randn(2, BOXES, 9, generator=generator) * box_mask(counts, BOXES)
    noise, t = torch.randn(2, BOXES, 9, generator=generator), torch.tensor([0.5, 0.8], dtype=torch.float64)
    asked = []

    def predict(x, level, counts, seen):
        asked.append((x, level, counts, seen))
        return torch.full_like(x, 0.25) * (x != 0)

    model = SimpleNamespace(alpha_sigma=random_network().alpha_sigma, predict=predict)
    for s in (0.0, 0.3):
        level_s = model.alpha_sigma(s)
        total = 0.0
        for i, n in enumerate((2, 4)):
            alpha, sigma = model.alpha_sigma(t[i].item())
            a = alpha / level_s[0]
            b = math.sqrt(sigma**2 - (a * level_s[1]) ** 2)
            target = sigma * (noise[i, :n] * a / b - x_s[i, :n]) / level_s[0]
            total += (b / sigma) ** 2 * (0.25 - target).square().sum().item()
            x_t = a * x_s[i, :n] + b * noise[i, :n]
            denoising_loss(model, x_s, level_s, counts, t, noise)
            assert torch.allclose(asked[-1][0][i, :n], x_t, atol=1e-6) and not asked[-1][0][i, n:].any()
        loss = denoising_loss(model, x_s, level_s, counts, t, noise, "mask")
        assert loss.item() == pytest.approx(total / (6 * 9), rel=1e-5)
        assert asked[-1][1].dtype == torch.float32 and asked[-1][2] is counts and asked[-1][3] == "mask"


# ---------------------------------------------------------------- the sampler and the switch


class Known:
    """A model of data N(mean, scale^2), whose best prediction is known."""

    device = "cpu"
    levels, alpha_sigma = Model.levels, Model.alpha_sigma

    def __init__(self, mean, scale):
        self.mean, self.scale, self.asked = mean, scale, []

    def predict(self, x, level, counts):
        self.asked.append((x.clone(), level, counts))
        alpha, sigma = (part.float() for part in self.alpha_sigma(level.double()))
        variance = alpha**2 * self.scale**2 + sigma**2
        eps = sigma * (x - alpha * self.mean) / variance
        v = alpha * eps - sigma * (self.mean + alpha * self.scale**2 * (x - alpha * self.mean) / variance)
        return v * box_mask(counts, x.shape[1])


def trajectory(model, noise, counts, eta):
    levels = [*model.levels(len(noise) - 1), 0]
    return denoise(model, noise[0] * box_mask(counts, BOXES), levels, noise[1:], counts, eta)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_sampler_finds_the_only_page(eta):
    counts = torch.tensor([[2, 3, 4, 0, 0], [1, 1, 1, 1, 0]])
    mean = torch.randn(2, BOXES, 9, generator=torch.Generator().manual_seed(3)) * box_mask(counts, BOXES)
    x_0 = trajectory(Known(mean, 0.0), draw_noise([1, 2], 7), counts, eta)
    assert torch.allclose(x_0, mean, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampler_keeps_the_data_s_variance(eta):
    counts = torch.tensor([[1, 1, 1, 1, 1]]).expand(300, 5)
    x_0 = trajectory(Known(torch.zeros(9), 0.5), draw_noise(list(range(300)), 200), counts, eta)
    assert not x_0[:, 5:].any() and x_0[:, :5].std().item() == pytest.approx(0.5, rel=0.03)


def test_noise_of_the_sampler():
    """Steps by hand: the first state, and with eta 1 all of the noise of DDPM."""
    counts, model, noise = torch.tensor([[0, 3, 0, 0, 0]]), Known(torch.zeros(9), 1.0), draw_noise([4], 2)
    x_0 = trajectory(model, noise, counts, 1.0)
    (first, t_1, _), (second, t_2, _) = model.asked
    assert (t_1, t_2) == (1.0, 0.25) and torch.equal(first[:, :3], noise[0, :, :3])
    alpha, sigma = model.alpha_sigma(0.25)  # at level 1 alpha is 0: all noise is new
    assert torch.allclose(second[:, :3], noise[1, :, :3] * sigma, atol=1e-5)
    assert not second[:, 3:].any() and torch.allclose(x_0, second * alpha, atol=1e-5)


@pytest.mark.parametrize("switch_at", [1, 3, 5])
def test_tuned_above_the_switch_and_base_below(switch_at):
    """Exactly: as two models, one after the other. Rows that all pages leave empty make no difference."""
    model, plain = with_random_lora(random_network()), random_network()
    counts, noise = torch.tensor([[1, 2, 0, 0, 1], [0, 3, 2, 0, 0]]), draw_noise([1, 2], 5)
    levels = [*model.levels(5), 0]
    rows = noise[:, :, :5]
    with model.lora_merged():
        above = denoise(model, rows[0] * box_mask(counts, 5), levels[: switch_at + 1], rows[1:], counts, 0.7)
    below = denoise(plain, above, levels[switch_at:], rows[switch_at + 1 :], counts, 0.7)
    x_s, x_0 = sample(model, noise, counts, 0.7, switch_at)
    assert x_s.shape == x_0.shape == (2, BOXES, 9) and not x_0[:, 5:].any()
    assert torch.equal(x_s[:, :5], above) and torch.equal(x_0[:, :5], below)
    assert torch.equal(x_s, x_0) == (switch_at == 5)  # then the tuned model takes all steps
    base = sample(model, noise, counts, 0.7, switch_at, tuned=False)
    assert torch.equal(base[1], sample(plain, noise, counts, 0.7, 5)[1])
    assert not torch.allclose(base[0], x_s, atol=1e-2) and not torch.allclose(base[1], x_0, atol=1e-2)


def test_lora_starts_without_effect_and_merges(noisy, tmp_path):
    model, (x, level, counts) = random_network(), noisy
    before = model.predict(x, level, counts)
    parameters = model.add_lora(4, 8.0, 0)
    layers = sum(isinstance(m, torch.nn.Linear) for m in random_network().network.modules())
    assert len(parameters) == 2 * layers and all(p.requires_grad for p in parameters)
    assert torch.equal(model.predict(x, level, counts), before)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05
    tuned = model.predict(x, level, counts).detach()
    assert (tuned - before).abs().max() > 0.01
    with model.lora_merged():
        assert torch.allclose(model.predict(x, level, counts), tuned, atol=1e-4)
    assert torch.equal(model.predict(x, level, counts), tuned)
    with model.lora_off():
        assert torch.equal(model.predict(x, level, counts), before)
    assert torch.equal(model.predict(x, level, counts), tuned) and all(p.requires_grad for p in parameters)
    model.save_tuned(tmp_path, 0.4)
    saved = Model.load(f"{tmp_path}/tuned.safetensors", "cpu")
    assert saved.switch == 0.4 and saved.sizes == SIZES
    assert torch.allclose(saved.predict(x, level, counts), tuned, atol=1e-4)


def test_recommended_switch():
    rows = [{"switch": 0.8, "unresolved": 0.9, "se": 0.1}, {"switch": 0.5, "unresolved": 0.08, "se": 0.03}]
    rows += [{"switch": 0.2, "unresolved": 0.05, "se": 0.01}, {"switch": 0.1, "unresolved": 0.0, "se": 0.0}]
    assert (
        recommend(rows, 0.1)[0] == 0.2 and recommend(rows, 0.12)[0] == 0.5 and recommend(rows, 0.0)[0] == 0.1
    )
    assert recommend(rows[:2], 0.01) == (0.5, "the cleanest level: V(t) + s.e. is nowhere at most 0.01")
    with pytest.raises(InputError, match="saw no reward differ; raise --probe_groups"):
        recommend([row | {"unresolved": math.nan} for row in rows], 0.1)


def test_probe_by_hand():
    """V(t) from all pairs of rewards of one state and of two states of one multiset."""
    model, counts = random_network(), torch.tensor([[1, 2, 0, 0, 1], [0, 3, 2, 0, 0], [2, 0, 0, 1, 0]])
    args = Args(probe=True, steps=4, probe_restarts=3, sample_batch=5, eta=0.8, seed=6)

    def reward(boxes, kind):
        return boxes[..., 0].sum(1)

    rows = probe(model, reward, counts, args)
    assert [(row["step"], row["switch"]) for row in rows] == [(1, 0.5625), (2, 0.25), (3, 0.0625)]
    levels = [1, 0.5625, 0.25, 0.0625, 0]
    for step, row in enumerate(rows, 1):
        values = np.zeros((3, 2, 3))
        for i, j in itertools.product(range(3), range(2)):
            seed = derived_seed(6, "probe", i, j)
            noise, asked = draw_noise([seed], 4), counts[i : i + 1]
            x = noise[0] * box_mask(asked, BOXES)
            state = denoise(model, x, levels[: step + 1], noise[1 : step + 1], asked, 0.8)
            for k in range(3):
                fresh = draw_noise([derived_seed(seed, step, k)], 3 - step)
                x_0 = denoise(model, state, levels[step:], fresh, asked, 0.8)
                values[i, j, k] = reward(*boxes_of(x_0, asked))
        same = [(a - b) ** 2 for part in values.reshape(6, 3) for a, b in itertools.combinations(part, 2)]
        other = [(a - b) ** 2 for first, second in values for a in first for b in second]
        assert row["unresolved"] == pytest.approx(np.mean(same) / np.mean(other), rel=1e-3)
        assert (row["unresolved"] > 0) == (row["se"] > 0) == (step < 3)  # the last step has no noise


# ---------------------------------------------------------------- rewards, statistics, the table


PAGE = page((1, 0.5, 0.25, 0.5, 0.25), (2, 0.5, 0.6, 0.5, 0.2), (2, 0.4, 0.6, 0.5, 0.2))


def test_rewards_are_larger_for_better_pages(tmp_path):
    apart = page((1, 0.5, 0.25, 0.5, 0.25), (2, 0.5, 0.6, 0.5, 0.2))
    for name in ("overlap", "both"):
        assert read_reward(name)(*PAGE) < -10 and read_reward(name)(*apart).abs() < 1e-4
    moved = page((1, 0.53, 0.25, 0.5, 0.25), (2, 0.5, 0.6, 0.5, 0.2))
    assert read_reward("alignment")(*moved) < -1 and read_reward("alignment")(*apart).abs() < 1e-4
    assert torch.equal(read_reward("both")(*PAGE), -(alignment(*PAGE) + overlap(*PAGE)))


def test_rewards_of_the_user(tmp_path):
    (tmp_path / "own.py").write_text(
        "def boxes(page):\n    return len(page) + 10 * page[0][2]\n\n"
        "def nan(page):\n    return float('nan')\n\n"
        "def fails(page):\n    return page.no_such\n\n"
        "def drawn(page):\n    import random\n    return random.random()\n"
    )
    assert read_reward(f"{tmp_path}/own.py:boxes")(*PAGE).tolist() == pytest.approx([3 + 1.25])
    drawn = read_reward(f"{tmp_path}/own.py:drawn")
    assert torch.equal(drawn(*PAGE), drawn(*PAGE))  # the same random numbers for the same page
    with pytest.raises(InputError, match="own.py:nan: is nan for a page; must be finite"):
        read_reward(f"{tmp_path}/own.py:nan")(*PAGE)
    with pytest.raises(InputError, match=r"own.py:fails: AttributeError: .*own.py, line 8"):
        read_reward(f"{tmp_path}/own.py:fails")(*PAGE)
    for spec in ("Overlap", f"{tmp_path}/own.py:none", f"{tmp_path}/none.py:boxes"):
        with pytest.raises(InputError, match="--reward"):
            read_reward(spec)


def test_page_of_the_user(tmp_path, capsys):
    (tmp_path / "own.py").write_text("def shown(page):\n    print(page)\n    return 0\n")
    read_reward(f"{tmp_path}/own.py:shown")(*page((0, 0.5, 0.25, 0.5, 0.25), (3, 0.5, 0.75, 1, 0.5)))
    assert capsys.readouterr().out == (
        "[('title', 0.25, 0.125, 0.75, 0.375), ('figure', 0.0, 0.5, 1.0, 1.0)]\n"
    )


def test_coverage():
    cells = coverage(
        *page((1, 0.25, 0.5, 0.5, 1), (3, 0.5, 0.5, 1 / 8, 1 / 32), (3, 0.5, 0.5, 1 / 8, 1 / 32))
    )
    assert cells.shape == (1, 5, 16, 16)
    assert torch.allclose(cells[0, 1], (torch.arange(16) < 8).float().expand(16, 16))
    figure = torch.zeros(16, 16)
    figure[7:9, 7:9] = 0.5  # two boxes of a quarter each, in four cells
    assert torch.allclose(cells[0, 3], figure, atol=1e-5) and not cells[0, [0, 2, 4]].any()
    assert coverage(*page((1, 0.5, 0.5, 2, 2), (1, 0.5, 0.5, 1, 1)))[0, 1].eq(1).all()


def test_statistics():
    """Four pages of one multiset: two alike, one with two boxes half outside, one with a wrong class."""
    half = page((1, 1.0, 0.25, 0.5, 0.25), (2, 0.0, 0.6, 0.5, 0.2), (2, 0.4, 0.6, 0.5, 0.2))
    wrong = page((1, 0.5, 0.25, 0.5, 0.25), (1, 0.5, 0.6, 0.5, 0.2), (2, 0.4, 0.6, 0.5, 0.2))
    boxes, kind = (torch.cat(parts) for parts in zip(PAGE, PAGE, half, wrong))
    asked = torch.tensor([[0, 1, 2, 0, 0]]).expand(4, 5)
    found = statistics(lambda boxes, kind: boxes.sum((1, 2))[:, None], boxes, kind, asked)
    assert found["classes"].tolist() == [1, 1, 1, 0]
    area = 0.125 + 0.1 + 0.1
    assert found["box_area"].tolist() == pytest.approx([area / 3] * 4)
    assert found["outside"].tolist() == pytest.approx([0, 0, 0.1125 / area, 0], abs=1e-6)
    covered = 0.125 + 0.6 * 0.2
    assert found["coverage"][:3].tolist() == pytest.approx([covered, covered, 0.0625 + 0.65 * 0.2], abs=0.02)
    assert torch.equal(found["overlap"], overlap(boxes, kind))
    assert torch.equal(found["alignment"], alignment(boxes, kind))
    cells = coverage(boxes, kind)
    pairs = [(cells[i] - cells[j]).abs().sum() / 256 for i in range(4) for j in range(i)]
    assert found["diversity"].tolist() == pytest.approx([sum(pairs).item() / 6]) and pairs[0] == 0
    assert found["features"].shape == (4, 1)


def found_of(seed, shift=0.0):
    """What evaluate returns of 40 multisets, of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    found = {"reward": torch.randn(160, generator=generator) + shift}
    found["diversity"] = torch.randn(40, generator=generator) + shift
    return found | {"features": torch.randn(160, 3, generator=generator)}


def test_table_and_its_standard_errors():
    """Of a mean the jackknife's error is the spread of the blocks' means over the root of their number."""
    base, tuned, reference = found_of(0), found_of(1, 1.0), torch.randn(500, 3)
    table = {row["metric"]: row for row in results_table(base, tuned, reference)}
    assert table.keys() == {"reward", "diversity", "frechet"}
    for name, pages in (("reward", ROW), ("diversity", 1)):
        gaps = (tuned[name] - base[name]).view(-1, pages).mean(1).numpy()
        blocks = np.array([gaps[i::BLOCKS].mean() for i in range(BLOCKS)])
        assert table[name]["difference"] == pytest.approx(gaps.mean(), abs=1e-6)
        assert table[name]["se"] == pytest.approx(blocks.std(ddof=1) / BLOCKS**0.5, rel=1e-4)
    assert table["frechet"]["base"] == measures(base, reference)["frechet"] and table["frechet"]["se"] > 0
    assert json.loads(json.dumps(list(table.values())))[0]["metric"] == "reward"


class Net:
    """Features that tell pages apart."""

    def __call__(self, boxes, kind):
        return torch.cat([boxes.mean(1), boxes.std(1)], 1)


def test_an_evaluation(noisy):
    """Four pages of each multiset, with seeds of the page's number alone."""
    model, counts = random_network(), noisy[2]
    args = Args(steps=3, sample_batch=5, switch="0")
    found, (boxes, kind) = evaluate(model, read_reward("both"), Net(), counts, args, 3, False, "")
    assert boxes.shape == (16, BOXES, 4) and found["diversity"].shape == (4,)
    for i in (0, 5, 15):
        x_0 = sample(model, draw_noise([derived_seed("eval", i)], 3), counts[i // 4][None], 1.0, 3)[1]
        one, its = boxes_of(x_0, counts[i // 4][None])
        assert torch.allclose(one[0], boxes[i], atol=1e-5) and torch.equal(its[0], kind[i])
        assert found["reward"][i].item() == pytest.approx(read_reward("both")(one, its).item(), abs=1e-3)


def test_rows_of_a_round():
    rewards = torch.tensor([[1.0, -3.0], [2.0, 2.0]])
    got = sampled_row(3, Args(samples=2), rewards, torch.tensor([0]), {"top_k": 1})
    assert got == {"round": 3, "reward_sampled": 0.5, "reward_accepted": 1, "acceptance_rate": 0.25} | {
        "flat_groups": 0.5, "kl": got["kl"]
    }  # fmt: skip
    with pytest.raises(InputError, match="--rule topk accepted nothing: 50% of the groups"):
        sampled_row(1, Args(samples=2), rewards, torch.tensor([]), {"top_k": 1})
    high = Args(samples=2, rule="exponential", beta=1.0, reward_max=1.5)
    options = {"beta": 1.0, "reward_max": 1.5}
    assert sampled_row(1, high, rewards, torch.tensor([0]), options)["flat_groups"] == 0


def test_pages_are_drawn(tmp_path):
    image = draw(*(part[0] for part in page((3, 0.5, 0.5, 1, 1), (0, 0.5, 0.25, 0.5, 0.25))))
    width, height = image.size
    assert image.getpixel((width // 2, height // 4)) != image.getpixel((width // 2, 3 * height // 4))
    assert draw(*(part[0] for part in page())).getpixel((width // 2, height // 2)) == (255, 255, 255)
    boxes, kind = (part.expand(8, *part.shape[1:]) for part in PAGE)
    save_pages(tmp_path / "grid.png", (boxes, kind), (boxes, kind))
    assert (tmp_path / "grid.png").stat().st_size > 1000


# ---------------------------------------------------------------- files and bad input


def test_held_out_pages():
    args = Args(eval_pages=100)
    counts, held_out, boxes, kind = read_pages(args)
    assert len(counts) >= 1000 and len(held_out) == 25 and len(boxes) == len(kind) >= 2000
    assert (
        torch.equal(held_out, counts_of(kind[:100:4]))
        and counts.sum(1).min() >= 1
        and counts.sum(1).max() <= BOXES
    )
    assert 0 <= boxes.min() and 0.9 < boxes.max() <= 1 and not boxes[kind < 0].any()
    with pytest.raises(InputError, match="--groups_per_round 1000000: there are"):
        read_pages(Args(groups_per_round=10**6))
    with pytest.raises(InputError, match="--probe_groups 1000000: there are"):
        read_pages(Args(probe_groups=10**6))
    with pytest.raises(InputError, match="--eval_pages 1000000: half of the"):
        read_pages(Args(eval_pages=10**6))


def test_embedded_files_are_small():
    assert Path(EMBEDDED).stat().st_size < 3_000_000 and Path(FEATURES).stat().st_size <= 500_000
    assert PAGES.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--switch 1", "--switch 1: must be auto or a level from 0 to below 1"),
        ("--switch clean", "--switch clean: must be auto or a level"),
        ("--switch 0.005 --steps 10", "--switch 0.005: with --steps 10 it must be 0 or at least 0.01"),
        ("--eta 0", "--eta 0: nothing to probe in a deterministic sampler"),
        ("--steps 1", "--steps 1: no level lies between noise and page"),
        ("--eval_pages 3", "--eval_pages 3: must be between 80"),
        ("--eval_pages 90", "--eval_pages 90: must be a multiple of 4"),
        ("--samples 4 --top_k 5", "--top_k 5: must be between 1 and 4"),
        ("--rule threshold", "--rule threshold needs --threshold"),
        ("--threshold 1", "--threshold 1.0: works only with --rule threshold"),
        ("--model no.safetensors", "--model no.safetensors: cannot be loaded"),
        ("--reward no.py:f", "--reward no.py:f: no file no.py"),
        ("--reward Both", "--reward Both: no file"),
        ("--lr 0", "--lr 0.0: must be between"),
    ],
)
def test_bad_input(flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside(flags.split(), SCRIPT)
    assert_one_line(code, error, named)
    assert not list(tmp_path.iterdir())


def test_a_tuned_network_of_some_levels_is_no_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = random_network()
    model.save_tuned(tmp_path, 0.4)
    code, _, error = run_inside(["--model", "tuned.safetensors"], SCRIPT)
    assert_one_line(
        code, error, "--model tuned.safetensors: is tuned for the levels above 0.4 only; give the base"
    )


def test_equation_functions_are_those_of_pgraft():
    rewards = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for rule, options in (("topk", {"top_k": 2}), ("threshold", {"threshold": 0.1}), ("none", {})):
        masks = [
            script.accept(rewards, rule, **options, generator=torch.Generator().manual_seed(1))
            for script in (pgraft, pgraft_layouts)
        ]
        assert torch.equal(*masks)
    values = torch.randn(5, 2, 3)
    assert pgraft.unresolved_share(values) == pgraft_layouts.unresolved_share(values)
