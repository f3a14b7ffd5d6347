"""objectives: each loss against its formula written anew, what is rated and nothing else, and sums that add up over pieces."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from w2v2nb.objectives import LOSSES, Objective, check_exclusive, count_outputs, find_pos_weight, make_scores

NAN = float("nan")
SIZES = [3, 2]


def make_case(loss, n=12, missing=0.3, seed=0):
    "Outputs and targets of a few recordings, some ratings missing."
    generator = torch.Generator().manual_seed(seed)
    outputs = 2 * torch.randn(n, count_outputs(loss, sum(SIZES)), generator=generator)
    targets = torch.randint(0, 2, (n, sum(SIZES)), generator=generator).float()
    if loss == "CE":
        classes = [torch.randint(0, size, (n,), generator=generator) for size in SIZES]
        targets = torch.cat([F.one_hot(k, size) for k, size in zip(classes, SIZES, strict=True)], 1).float()
    if loss == "CORN":
        targets = torch.randint(1, 6, targets.shape, generator=generator).float()
    targets[torch.rand(targets.shape, generator=generator) < missing] = NAN
    return outputs.requires_grad_(), targets


def make(loss, **options):
    weights = torch.tensor([1.0, 2, 3, 4, 5]) if loss in ("BCE", "focal") else None
    return Objective(loss, SIZES, **{"pos_weight": weights} | options)


def mean_of(objective, outputs, targets):
    return (objective.total(outputs, targets) / objective.count(targets)).item()


def entries_of(outputs, targets):
    "Output, target and label of each rated entry, as plain numbers."
    return [(outputs[i, k].item(), targets[i, k].item(), k) for i, k in (~targets.isnan()).nonzero().tolist()]


# each loss against its formula


def test_mse_is_the_mean_square_over_rated_entries():
    outputs, targets = make_case("MSE")
    expected = np.mean([(o - t) ** 2 for o, t, _ in entries_of(outputs, targets)])
    assert mean_of(make("MSE"), outputs, targets) == pytest.approx(expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [1.0, 2, 3, 4, 5]])
def test_bce_is_torch_s(smoothing, weights):
    outputs, targets = make_case("BCE")
    weights = weights and torch.tensor(weights)
    soft = torch.where(targets == 1, 1 - smoothing / 2, smoothing / 2)
    is_rated = ~targets.isnan()
    expected = F.binary_cross_entropy_with_logits(outputs, soft, pos_weight=weights, reduction="none")[is_rated].mean()
    objective = Objective("BCE", SIZES, pos_weight=weights, smoothing=smoothing)
    assert mean_of(objective, outputs, targets) == pytest.approx(expected.item(), rel=1e-6)


def focal(o, t, gamma):
    "Lin et al. (2017), equation 4, as torchvision.ops.sigmoid_focal_loss has it without alpha."
    p = 1 / (1 + math.exp(-o))
    p_t = p if t else 1 - p
    return -((1 - p_t) ** gamma) * math.log(p_t)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_is_its_formula(gamma):
    outputs, targets = make_case("focal")
    expected = np.mean([(1 + k if t else 1) * focal(o, t, gamma) for o, t, k in entries_of(outputs, targets)])
    assert mean_of(make("focal", gamma=gamma), outputs, targets) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ce_is_the_mean_over_rated_groups(smoothing):
    outputs, targets = make_case("CE", missing=0.15)
    losses = []
    for start, size in [(0, 3), (3, 2)]:
        part, logits = targets[:, start : start + size], outputs[:, start : start + size].log_softmax(1)
        spread = part * (1 - smoothing) + smoothing / size
        losses += [-(t * o).sum().item() for t, o in zip(spread, logits, strict=True) if not t.isnan().any()]
    assert 0 < len(losses) < 24 and make("CE").count(targets) == len(losses)
    assert mean_of(make("CE", smoothing=smoothing), outputs, targets) == pytest.approx(np.mean(losses), rel=1e-6)


def corn_loss(logits, y_train, n_classes):
    "As coral-pytorch's losses.corn_loss, for one label with classes from 0: its sum and its number of terms."
    total, n_examples = 0.0, 0
    for task in range(n_classes - 1):
        mask = y_train > task - 1
        answers = (y_train[mask] > task).float()
        pred = logits[mask, task]
        n_examples += len(answers)
        total -= torch.sum(F.logsigmoid(pred) * answers + (F.logsigmoid(pred) - pred) * (1 - answers)).item()
    return total, n_examples


def test_corn_is_its_formula():
    outputs, targets = make_case("CORN")
    parts = []
    for k in range(sum(SIZES)):
        is_rated = ~targets[:, k].isnan()
        parts.append(corn_loss(outputs[is_rated, 4 * k : 4 * k + 4], targets[is_rated, k] - 1, 5))
    total, n_examples = np.sum(parts, 0)
    assert make("CORN").count(targets) == n_examples
    assert make("CORN").total(outputs, targets).item() == pytest.approx(total, rel=1e-6)


def test_gamma_is_the_focal_loss_s_alone():
    outputs, targets = make_case("BCE")
    assert mean_of(make("BCE", gamma=5.0), outputs, targets) == mean_of(make("BCE"), outputs, targets)
    assert mean_of(make("focal", gamma=0.0), outputs, targets) == mean_of(make("BCE"), outputs, targets)


# what holds for all of them


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_add_up_over_pieces_of_a_batch(loss):
    objective, (outputs, targets) = make(loss), make_case(loss)
    for sizes in ([1] * 12, [5, 0, 7], [11, 1]):
        pieces = list(zip(outputs.split(sizes), targets.split(sizes), strict=True))
        assert sum(objective.count(t) for _, t in pieces) == objective.count(targets)
        total = sum(objective.total(o, t) for o, t in pieces)
        assert total.item() == pytest.approx(objective.total(outputs, targets).item(), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_do_not_touch_each_other(loss):
    "Without the ratings of the first classifier, what is left is the second's loss by itself."
    outputs, targets = make_case(loss)
    first = count_outputs(loss, 3)
    alone = Objective(loss, [2])
    expected = alone.total(outputs[:, first:], targets[:, 3:]), alone.count(targets[:, 3:])
    targets[:, :3] = NAN
    both = Objective(loss, SIZES)
    assert [both.total(outputs, targets).item(), both.count(targets)] == [pytest.approx(expected[0].item()), expected[1]]


@pytest.mark.parametrize("bad", [0.0, math.inf, NAN])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_not_rated_moves_nothing(loss, bad):
    outputs, targets = make_case(loss)
    targets[0] = NAN
    values, is_bad = outputs.detach().clone(), torch.zeros(outputs.shape, dtype=torch.bool)
    is_bad[0] = True
    if loss in ("MSE", "BCE", "focal"):
        is_bad |= targets.isnan()
    values[is_bad] = bad
    values.requires_grad_()
    make(loss).total(values, targets).backward()
    assert not values.grad[is_bad].any() and values.grad.any() and values.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_rated(loss):
    outputs, targets = make_case(loss, missing=1.1)
    total = make(loss).total(outputs, targets)
    total.backward()
    assert total == 0 == make(loss).count(targets) and not outputs.grad.any()
    assert make(loss).total(outputs[:0], targets[:0]) == 0 == make(loss).count(targets[:0])


VARIANTS = [(loss, {}) for loss in LOSSES] + [(loss, {"smoothing": 0.1}) for loss in ("BCE", "focal", "CE")]


@pytest.mark.parametrize("loss, options", [*VARIANTS, ("focal", {"gamma": 0.5}), ("focal", {"gamma": 0.0})])
def test_gradients_stay_finite_for_large_outputs(loss, options):
    for scale in (30, 1e3, 1e6):
        outputs, targets = make_case(loss)
        large = (scale * outputs.detach()).requires_grad_()
        total = make(loss, **options).total(large, targets)
        total.backward()
        assert total.isfinite() and large.grad.isfinite().all() and large.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_all_is_computed_in_float32(loss, dtype):
    outputs, targets = make_case(loss)
    found, expected = outputs.detach().to(dtype), outputs.detach().to(dtype).float()
    assert make(loss).total(found, targets).dtype == make(loss).count(targets).dtype == torch.float32
    assert make(loss).total(found, targets) == make(loss).total(expected, targets)
    assert make_scores(found, loss, SIZES).dtype == torch.float32


# scores


@pytest.mark.parametrize("loss", LOSSES)
def test_scores_have_a_column_per_label_and_their_range(loss):
    outputs, _ = make_case(loss)
    scores = make_scores(outputs, loss, SIZES)
    assert scores.shape == (12, 5) and make_scores(outputs[:0], loss, SIZES).shape == (0, 5)
    if loss == "MSE":
        assert torch.equal(scores, outputs)
    elif loss == "CORN":
        assert scores.min() >= 1 and scores.max() <= 5
    else:
        assert scores.min() >= 0 and scores.max() <= 1
    if loss == "CE":
        torch.testing.assert_close(scores.split(SIZES, 1)[0].sum(1), torch.ones(12))
        torch.testing.assert_close(scores.split(SIZES, 1)[1].sum(1), torch.ones(12))


def test_the_score_of_grades_is_their_mean_over_the_probabilities():
    outputs, _ = make_case("CORN")
    answers = outputs[3, 8:12].sigmoid()  # of the third label
    above = [1.0, *(answers[:k].prod().item() for k in range(1, 5)), 0.0]
    expected = sum(grade * (above[grade - 1] - above[grade]) for grade in range(1, 6))
    assert make_scores(outputs, "CORN", SIZES)[3, 2].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_recording_set_aside_has_no_scores(loss):
    outputs = torch.full((2, count_outputs(loss, 5)), NAN)
    assert make_scores(outputs, loss, SIZES).isnan().all()


def test_corn_finds_the_grades_it_was_taught():
    grades = torch.arange(1.0, 6).repeat_interleave(4)[:, None]
    noise = 0.1 * torch.randn(20, 1, generator=torch.Generator().manual_seed(0))
    layer, objective = torch.nn.Linear(1, 4), Objective("CORN", [1])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        objective.total(layer(grades - 3 + noise), grades).backward()
        optimizer.step()
    assert (make_scores(layer(grades - 3 + noise), "CORN", [1]) - grades).abs().mean() < 0.2


# weights, classes and options


def test_pos_weight_makes_both_classes_count_the_same():
    targets = torch.tensor([[1.0, 1, 0, 1], [0, 1, NAN, 1], [0, NAN, 0, NAN], [0, 0, 0, 1]])
    weights = find_pos_weight(targets.numpy())
    assert weights.tolist() == [3, 0.5, 1, 1] and weights.dtype == torch.float32
    objective, outputs = Objective("BCE", [2], pos_weight=weights[:2]), torch.zeros(4, 2, requires_grad=True)
    objective.total(outputs, targets[:, :2]).backward()
    assert outputs.grad.sum(0).abs().max() < 1e-6


@pytest.mark.parametrize(
    "targets, match",
    [
        ([[1, 0, 0, 1, 0], [0, 0, 0, 1, 0]], "of a, b, c has more or fewer than one label present in recording u1; "),
        ([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0]], "of a, b, c .* in recording u0, u1; CE needs exactly one: correct or empty"),
        ([[1, 0, 0, 1, 1], [0, NAN, 1, 1, 0]], "of d, e .* in recording u0; "),
    ],
)
def test_classes_that_do_not_exclude_each_other_are_refused(targets, match):
    for uids in (["u0", "u1"], np.array(["u0", "u1"])):
        with pytest.raises(ValueError, match=match):
            check_exclusive(np.float32(targets), ["abc", "de"], uids)
    with pytest.raises(ValueError, match="present in recording [01]"):
        check_exclusive(torch.tensor(targets), ["abc", "de"])


def test_exclusive_classes_pass_whether_rated_or_not():
    check_exclusive(np.float32([[1, 0, 0, 0, 1], [NAN, 1, 1, 1, 0], [NAN, NAN, NAN, NAN, NAN]]), ["abc", "de"])
    check_exclusive(np.zeros((0, 2)), ["ab"])
    with pytest.raises(ValueError, match="classifier of 'c' has no other label; CE chooses .* take the loss BCE"):
        check_exclusive(np.zeros((0, 3)), ["ab", "c"])


@pytest.mark.parametrize(
    "loss, options, match",
    [
        ("Focal", {}, "loss is 'Focal'; it should be one of MSE, BCE, focal, CE, CORN: give"),
        ("BCE", dict(smoothing=1.0), "smoothing is 1.0; it should be at least 0 and below 1: give"),
        ("BCE", dict(smoothing=-0.1), "smoothing is -0.1; "),
        ("BCE", dict(smoothing=NAN), "smoothing is nan; "),
        ("MSE", dict(smoothing=0.1), "smoothing is 0.1 and the loss MSE; it is for BCE, focal and CE: leave"),
        ("CORN", dict(smoothing=0.1), "smoothing is 0.1 and the loss CORN; "),
        ("focal", dict(gamma=-1.0), "gamma is -1.0; it should be a number from 0: give"),
        ("focal", dict(gamma=NAN), "gamma is nan; "),
        ("MSE", dict(pos_weight=[1.0] * 5), "pos_weight is given and the loss is MSE; it is for BCE and focal: leave"),
        ("CE", dict(pos_weight=[1.0] * 5), "pos_weight is given and the loss is CE"),
        ("BCE", dict(pos_weight=[1.0, 2.0]), r"pos_weight is \[1.0, 2.0\]; it should be a number above 0 for each of 5 labels"),
        ("BCE", dict(pos_weight=[1.0, 1, 1, 1, 0]), "above 0 for each of 5 labels: give these"),
        ("BCE", dict(pos_weight=[1.0, 1, 1, 1, NAN]), "above 0 for each of 5 labels"),
        ("focal", dict(pos_weight=3.0), "above 0 for each of 5 labels"),
    ],
)
def test_wrong_options(loss, options, match):
    with pytest.raises(ValueError, match=match):
        Objective(loss, SIZES, **options)
