"""Search spaces as text, grids, and proposals that depend on nothing but the seed and the finished trials."""

import json
import math
import subprocess
import sys

import pytest

from w2v2nb.search import best_trial, grid, make_distributions, parse_space, propose


@pytest.mark.parametrize(
    "text, space",
    [
        ("learning_rate=0.001,3e-4; dropout=0,0.25", {"learning_rate": [0.001, 0.0003], "dropout": [0, 0.25]}),
        (" learning_rate = 1e-4 : 1e-2 ;dropout=0:0.5;", {"learning_rate": (0.0001, 0.01), "dropout": (0, 0.5)}),
        ("layer=-1,weighted,6\n;tune=head,top:2, lora", {"layer": [-1, "weighted", 6], "tune": ["head", "top:2", "lora"]}),
        ("rank=2:16", {"rank": (2, 16)}),
        ("shift=-1:1.0", {"shift": (-1, 1.0)}),
        ("tune=top:2", {"tune": ["top:2"]}),
        ("path=gs://bucket/a", {"path": ["gs://bucket/a"]}),
        ("epochs=5", {"epochs": [5]}),
        ("layer_norm=True,False", {"layer_norm": ["True", "False"]}),
        ("a=b=c", {"a": ["b=c"]}),
    ],
)
def test_spaces(text, space):
    found = parse_space(text)
    assert found == space
    assert [[type(value) for value in values] for values in found.values()] == [
        [type(value) for value in values] for values in space.values()
    ]


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "the search space '' is empty; .*: write for example"),
        (" ; ", "is empty; "),
        ("dropout", "has 'dropout'; it should be NAME=VALUES, .*: correct it"),
        ("--dropout=0", "has '--dropout=0'; "),
        ("=0,1", "has '=0,1'; "),
        ("dropout=", "dropout has an empty value in ''; .*: fill it in"),
        ("dropout=0,,1", "dropout has an empty value in '0,,1'"),
        ("dropout=0,0.0", "dropout has the value 0.0 twice; .*: delete one"),
        ("dropout=0;dropout=1", "has dropout twice; "),
        ("dropout=0.5:0.5", "the range of dropout is '0.5:0.5'; it should go from a number to a higher one: correct"),
        ("dropout=1:0", "the range of dropout is '1:0'; "),
        ("dropout=0:inf", "the range of dropout is '0:inf'; "),
        ("dropout=nan:1", "the range of dropout is 'nan:1'; "),
    ],
)
def test_wrong_spaces(text, match):
    with pytest.raises(ValueError, match=match):
        parse_space(text)


def test_a_grid_has_all_combinations_in_order():
    found = grid(parse_space("a=1,2; b=x; c=0.5,0.25,0"))
    assert found == [{"a": a, "b": "x", "c": c} for a in (1, 2) for c in (0.5, 0.25, 0)]


@pytest.mark.parametrize("wide", ["0.0001:0.01", "0.001:0.01", "1:64", "0.03:0.3", "0.07:0.7", "1:10"])
@pytest.mark.parametrize("narrow", ["0.01:0.05", "0:1", "-1:100", "1:9", "-100:-1"])
def test_wide_positive_ranges_are_logarithmic(wide, narrow):
    found = make_distributions(parse_space(f"a={wide}; b={narrow}"))
    assert found["a"].log and not found["b"].log


SPACE = parse_space("learning_rate=0.00001:0.1; dropout=0:0.5; rank=1:8; pooling=mean,max,sum")


def value_of(settings):
    "Highest, 0, at a rate of 0.001, a dropout of 0.25, rank 4 and max."
    distance = (math.log10(settings["learning_rate"]) + 3) ** 2 + (settings["dropout"] - 0.25) ** 2
    return -distance - 0.01 * (settings["rank"] - 4) ** 2 - (settings["pooling"] != "max")


def study(n_trials, seed, trials=(), space=SPACE, value_of=value_of):
    trials = list(trials)
    while len(trials) < n_trials:
        settings = propose(space, n_trials, seed, trials)
        trials.append((settings, value_of(settings)))
    return trials


def test_proposals_are_in_the_space_and_of_its_types():
    for settings, _ in study(12, seed=0):
        assert list(settings) == list(SPACE)
        assert 1e-5 <= settings["learning_rate"] <= 0.1 and 0 <= settings["dropout"] <= 0.5
        assert type(settings["rank"]) is int and 1 <= settings["rank"] <= 8 and settings["pooling"] in SPACE["pooling"]


def test_a_study_learns():
    for seed in range(3):
        values = [value for _, value in study(40, seed)]
        assert max(values) > -0.3 > values[0]
        assert sum(values[-10:]) > sum(values[:10])


@pytest.mark.parametrize("n_done", [0, 1, 5, 11])
def test_interrupted_equals_uninterrupted(n_done):
    whole = study(12, seed=3)
    kept = [tuple(trial) for trial in json.loads(json.dumps(whole[:n_done]))]  # as a folder keeps them
    assert study(12, seed=3, trials=kept) == whole


def test_another_seed_is_another_study():
    proposals = [str(settings) for seed in range(3) for settings, _ in study(15, seed)[:5]]
    assert len(set(proposals)) == 15  # neighbouring seeds share nothing


def test_another_process_proposes_the_same():
    trials = study(6, seed=0)
    code = f"from w2v2nb.search import propose; print(propose({SPACE!r}, 6, 0, {trials[:5]!r}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, stderr=subprocess.STDOUT).strip() == str(trials[5][0])


def test_failed_trials_are_neither_best_nor_in_the_way():
    trials = study(8, seed=0, value_of=lambda settings: math.nan if settings["dropout"] < 0.25 else value_of(settings))
    assert any(math.isnan(value) for _, value in trials)
    assert trials[best_trial(trials)][1] == max(value for _, value in trials if not math.isnan(value))
    assert all(0 <= settings["dropout"] <= 0.5 for settings, _ in study(4, seed=0, value_of=lambda settings: math.nan))


def test_listed_values_are_not_tried_twice_while_others_are_left():
    space = parse_space("a=1,2,3; b=x,y")
    trials = study(6, seed=0, space=space, value_of=lambda settings: settings["a"])
    assert {tuple(settings.values()) for settings, _ in trials} == {(a, b) for a in (1, 2, 3) for b in "xy"}
    assert propose(space, 7, 0, trials) in grid(space)


@pytest.mark.parametrize(
    "values, best",
    [([0.5], 0), ([0.5, 0.7, 0.7], 1), ([math.nan, 0.1], 1), ([0.3, math.nan, 0.2], 0), ([-math.inf, math.nan], 0)],
)
def test_the_first_of_the_highest_is_best(values, best):
    assert best_trial([({}, value) for value in values]) == best


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_no_best_without_a_value(values):
    with pytest.raises(ValueError, match=f"none of {len(values)} trials has a value; "):
        best_trial([({}, value) for value in values])


def test_a_range_is_no_grid():
    with pytest.raises(ValueError, match="dropout is a range; a grid needs its values: .*--trials"):
        grid(parse_space("learning_rate=0.001,0.0003; dropout=0:0.5"))
