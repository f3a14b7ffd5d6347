"""Groups, optimisers and schedules on classifiers of several families: who learns how fast, and that it can be resumed."""

import copy
import itertools
import math

import pytest
import torch
from conftest import make_model, save_checkpoint

from w2v2nb import samples
from w2v2nb.encoder import Encoder
from w2v2nb.model import Classifier
from w2v2nb.optim import OPTIMIZERS, SCHEDULES, find_blocks, group_parameters, make_optimizer, make_schedule


@pytest.fixture
def model():
    return Classifier(Encoder.from_pretrained(samples.checkpoint()), [["a", "b"], ["c"]]).requires_grad_(True)


def rates(model, **kwargs):
    "The rate and the weight decay of every weight that is in a group, by name; each is in exactly one."
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = group_parameters(model, **kwargs)
    assert all(group["params"] for group in groups)
    found = [(names[id(w)], (g["lr"], g["weight_decay"])) for g in groups for w in g["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_rates_fall_from_the_head_to_the_front_end(model):
    found = rates(model, learning_rate=1.0, backbone_learning_rate=0.5, layer_decay=0.1, weight_decay=0.01)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (rate, decay) in found.items():
        expected = 1.0 if not name.startswith("encoder.") else 0.5 * 0.1**3
        for k in range(3):
            if f".encoder.layers.{k}." in name:
                expected = 0.5 * 0.1 ** (2 - k)
        assert math.isclose(rate, expected), name
        assert decay == (0.01 if model.get_parameter(name).ndim > 1 else 0.0), name


def test_the_first_group_is_the_head(model):
    for backbone in (1e-5, 1e-3):
        first = group_parameters(model, 3e-4, backbone, 0.9, 0.01)[0]
        assert first["lr"] == 3e-4
        assert not {id(w) for w in first["params"]} & {id(w) for w in model.encoder.parameters()}


def test_one_rate_is_one_group_and_equals_plain_adam(model):
    assert [len(group["params"]) for group in group_parameters(model, 3e-4)] == [len(list(model.parameters()))]
    twin = copy.deepcopy(model)
    for one, optimizer in [(model, make_optimizer(model)), (twin, torch.optim.Adam(twin.parameters(), lr=3e-4, fused=True))]:
        for _ in range(3):
            sum((weight**2).sum() for weight in one.parameters()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, plain), name


def test_what_is_frozen_is_in_no_group_and_does_not_count_as_depth(model):
    model.encoder.requires_grad_(False)
    assert not any(name.startswith("encoder.") for name in rates(model, learning_rate=1.0))
    layers = model.encoder.model.encoder.layers
    layers[0].requires_grad_(True)
    layers[1].requires_grad_(True)
    found = rates(model, learning_rate=1.0, layer_decay=0.5)
    assert {rate for name, (rate, _) in found.items() if ".layers.1." in name} == {1.0}  # the highest that trains
    assert {rate for name, (rate, _) in found.items() if ".layers.0." in name} == {0.5}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no weight of the model trains; .*--tune"):
        group_parameters(model, 1.0)


@pytest.mark.parametrize(
    "variant, block",
    [("wav2vec2", 0), ("wav2vec2-stable", 3), ("wavlm", 0), ("wavlm-stable", 3), ("data2vec-audio", 0), ("hubert-stable", 3)],
)
def test_blocks_of_all_families(variant, block, tmp_path):
    save_checkpoint(tmp_path, make_model(variant))
    blocks = find_blocks(Classifier(Encoder.from_pretrained(str(tmp_path)), [["a"]]).requires_grad_(True))
    assert set(blocks.values()) == {0, 1, 2, 3}
    assert all((k == 0) == (".encoder.layers." not in name) for name, k in blocks.items() if ".encoder.layer_norm." not in name)
    assert {k for name, k in blocks.items() if ".encoder.layer_norm." in name} == {block}


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(optim="sgd"), "optim is 'sgd'; it should be one of adam, adamw: "),
        (dict(learning_rate=0), "learning_rate is 0; it should be above 0, such as 0.0003: give --learning_rate"),
        (dict(learning_rate=math.nan), "learning_rate is nan; "),
        (dict(learning_rate=math.inf), "learning_rate is inf; "),
        (dict(backbone_learning_rate=-1e-5), "backbone_learning_rate is -1e-05; "),
        (dict(layer_decay=0), "layer_decay is 0; it should be above 0 and at most 1"),
        (dict(layer_decay=1.01), "layer_decay is 1.01; "),
        (dict(weight_decay=-0.1), "weight_decay is -0.1; it should be 0 or more"),
    ],
)
def test_wrong_optimisers(model, kwargs, match):
    with pytest.raises(ValueError, match=match):
        make_optimizer(model, **kwargs)


@pytest.mark.parametrize(
    "args, match",
    [
        (("exponential", 10), "schedule is 'exponential'; it should be one of constant, linear, cosine, onecycle: "),
        (("linear", 0), "n_steps is 0; a schedule needs at least 1 step: "),
        (("linear", 10, 1.0), "warmup is 1.0; it should be a share of the steps from 0 to below 1.*: give --warmup"),
        (("onecycle", 10, -0.1), "warmup is -0.1; "),
    ],
)
def test_wrong_schedules(args, match):
    with pytest.raises(ValueError, match=match):
        make_schedule(torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]), *args)


def start(optim="adamw", lrs=(1.0, 0.1)):
    weights = [torch.nn.Parameter(torch.full((2,), 0.5)) for _ in lrs]
    return OPTIMIZERS[optim]([{"params": [w], "lr": lr} for w, lr in zip(weights, lrs, strict=True)])


def walk(optimizer, scheduler, n_steps):
    "The groups' rates at each step, on a loss with a gradient that differs from step to step."
    found = []
    for _ in range(n_steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        sum((w**2).sum() for w in weights).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("schedule, warmup", [*itertools.product(["constant", "linear", "cosine"], [0.0, 0.1, 0.25, 0.99])])
@pytest.mark.parametrize("n_steps", [1, 2, 7, 40])
def test_rates_rise_reach_the_full_one_and_fall_to_zero(schedule, warmup, n_steps):
    optimizer = start()
    found = walk(optimizer, scheduler := make_schedule(optimizer, schedule, n_steps, warmup), n_steps)
    n_warmup, first = min(round(warmup * n_steps), n_steps - 1), [rates[0] for rates in found]
    assert all(math.isclose(a, 10 * b) for a, b in found)
    assert all(0 < rate <= 1 for rate in first)
    assert first[:n_warmup] == sorted(set(first[:n_warmup]))
    rising = [b - a for a, b in zip(first, first[1 : n_warmup + 1], strict=False)]
    assert all(math.isclose(step, 1 / (n_warmup + 1)) for step in rising)
    assert first[n_warmup] == 1.0
    if schedule == "constant":
        assert set(first[n_warmup:]) <= {1.0}
    else:
        assert first[n_warmup:] == sorted(set(first[n_warmup:]), reverse=True)
        assert scheduler.get_last_lr() == [0.0, 0.0]
        scheduler.step()
        assert scheduler.get_last_lr() == [0.0, 0.0]  # and stays there


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 4, 5, 10, 20])
def test_one_cycle_takes_every_length(warmup, n_steps):
    optimizer = start()
    found = walk(optimizer, make_schedule(optimizer, "onecycle", n_steps, warmup), n_steps)
    assert all(0 < rate <= base for rates in found for rate, base in zip(rates, (1.0, 0.1), strict=True))
    if n_steps >= 10 and 0 < warmup < 0.5:
        at = max(range(n_steps), key=lambda i: found[i][0])
        assert abs(at - max(warmup * n_steps, 2) + 1) <= 1 and found[-1][0] < 1e-4


def test_one_cycle_moves_the_momentum_the_other_way():
    optimizer = start("adam")
    scheduler = make_schedule(optimizer, "onecycle", 10, 0.5)
    betas = []
    for _ in range(10):
        betas.append(optimizer.param_groups[1]["betas"][0])
        optimizer.step()
        scheduler.step()
    assert math.isclose(betas[0], 0.95) and math.isclose(betas[4], 0.85) and math.isclose(betas[-1], 0.95)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("n_before", [1, 3, 9])
def test_resumed_equals_uninterrupted(optim, schedule, n_before, tmp_path):
    whole = start(optim)
    expected = walk(whole, make_schedule(whole, schedule, 10, 0.3), 10)
    killed = start(optim)
    scheduler = make_schedule(killed, schedule, 10, 0.3)
    found = walk(killed, scheduler, n_before)
    weights = [w for group in killed.param_groups for w in group["params"]]
    torch.save({"weights": weights, "states": [killed.state_dict(), scheduler.state_dict()]}, tmp_path / "state")

    saved, resumed = torch.load(tmp_path / "state", weights_only=True), start(optim)
    scheduler = make_schedule(resumed, schedule, 10, 0.3)
    for group, weight in zip(resumed.param_groups, saved["weights"], strict=True):
        group["params"][0].data.copy_(weight)
    resumed.load_state_dict(saved["states"][0])
    scheduler.load_state_dict(saved["states"][1])
    assert found + walk(resumed, scheduler, 10 - n_before) == expected
    for ours, theirs in zip(resumed.param_groups, whole.param_groups, strict=True):
        assert torch.equal(ours["params"][0], theirs["params"][0])
