"""Validation sets and cross-validation: no speaker on two sides, every row once, folds alike, the same seed the same folds."""

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from w2v2nb import samples
from w2v2nb.data import check_disjoint, read_annotations, read_groups, read_labels, read_targets
from w2v2nb.folds import choose_folds, hold_out, resolve_share, split_folds


def make_table(n_rows=120, n_subjects=30, seed=0, pair=1):
    "Rows of subjects with unequal numbers of recordings, `pair` of them in a pair, and two labels, one rare, with gaps."
    rng = np.random.default_rng(seed)
    subjects = np.concatenate([np.arange(n_subjects), (n_subjects * rng.random(n_rows - n_subjects) ** 2).astype(int)])
    is_ill, is_rare = rng.random(n_subjects) < 0.4, rng.random(n_subjects) < 0.2
    columns = {"subject": [f"s{i}" for i in subjects], "pair": [f"p{i // pair}" for i in subjects]}
    columns |= {"a": is_ill[subjects].astype(float), "b": is_rare[subjects].astype(float)}
    table = pd.DataFrame({"uid": [f"u{i:03}" for i in range(n_rows)], **columns}).sample(frac=1, random_state=seed)
    table.loc[rng.random(n_rows) < 0.1, "b"] = None
    return table.reset_index(drop=True)


@pytest.mark.parametrize("n_folds, group, seed", [*itertools.product([2, 5, 15], ["subject", "pair"], [0, 1])])
def test_every_row_is_held_out_once_per_repeat_and_no_group_is_divided(n_folds, group, seed):
    table = make_table(pair=2)
    rounds = split_folds(table, ["a", "b"], n_folds, group, seed, n_repeats=2)
    assert [(fold.repeat, fold.number) for fold in rounds] == [(r, k) for r in (1, 2) for k in range(1, n_folds + 1)]
    for fold in rounds:
        check_disjoint(fold.train, fold.test, group)
        together = pd.concat([fold.train, fold.test]).sort_values("uid", ignore_index=True)
        pd.testing.assert_frame_equal(together, table.sort_values("uid", ignore_index=True))
        for part in (fold.train, fold.test):  # rows keep their order
            assert len(part) and part["uid"].tolist() == [uid for uid in table["uid"] if uid in set(part["uid"])]
    for repeat in (1, 2):
        held = pd.concat([fold.test for fold in rounds if fold.repeat == repeat])
        assert sorted(held["uid"]) == sorted(table["uid"])


def folds_of(table, **kwargs):
    "For each repeat the sets of recordings held out together."
    rounds = split_folds(table, ["a", "b"], **kwargs)
    return [
        {frozenset(fold.test["uid"]) for fold in rounds if fold.repeat == repeat} for repeat in range(1, rounds[-1].repeat + 1)
    ]


def test_folds_follow_from_the_seed_and_differ_between_repeats():
    table = make_table()
    one, two, three = folds_of(table, n_repeats=3)
    assert [one, two, three] == folds_of(table, n_repeats=3)
    assert one != two != three != one
    assert folds_of(table) == [one]  # repeats that come after change nothing
    assert folds_of(table, seed=1) != [one]


def test_repeats_differ_where_every_group_has_another_size():
    sizes = np.arange(1, 21)
    table = pd.DataFrame({"subject": np.repeat(sizes, sizes), "a": 1, "b": 0}).assign(uid=lambda t: t.index.astype(str))
    repeats = folds_of(table, n_repeats=5)
    assert len({frozenset(folds) for folds in repeats}) == 5
    assert all(abs(len(fold) - 42) <= 2 for folds in repeats for fold in folds)


def test_as_many_folds_as_groups_leave_one_out():
    table = make_table(n_rows=20, n_subjects=7)
    rounds = split_folds(table, ["a"], n_folds=7)
    assert [fold.test["subject"].nunique() for fold in rounds] == [1] * 7


def spread(targets, folds):
    "Mean over folds and labels of how far a label's share among the ratings is from the whole's."
    whole = np.nanmean(targets, axis=0)
    return np.mean([np.abs(np.nanmean(targets[folds == k], axis=0) - whole) for k in np.unique(folds)])


def compare_spreads(table, labels, group, n_folds=5):
    "Ours, scikit-learn's stratified by the first label, and that of folds by chance, as means over five seeds."
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    found, targets, groups = [], read_targets(table, labels), read_groups(table, group)
    for seed in range(5):
        rows = {uid: i for i, uid in enumerate(table["uid"])}
        folds = np.empty((3, len(table)), dtype=int)
        for fold in split_folds(table, labels, n_folds, group, seed):
            folds[0, [rows[uid] for uid in fold.test["uid"]]] = fold.number
        for i, method in enumerate([StratifiedGroupKFold, GroupKFold], 1):
            splitter = method(n_folds, shuffle=True, random_state=seed)
            for number, (_, held) in enumerate(splitter.split(table, targets[:, 0], groups)):
                folds[i, held] = number
        found.append([spread(targets, one) for one in folds])
    return np.mean(found, axis=0)


def test_labels_are_spread_evenly():
    for seed in range(3):
        ours, theirs, chance = compare_spreads(make_table(seed=seed), ["a", "b"], "subject")
        assert ours < theirs < chance and ours < 0.6 * chance
        ours, theirs, _ = compare_spreads(make_table(seed=seed), ["a"], "subject")
        assert ours < 1.2 * theirs


@pytest.mark.skipif("W2V2NB_DATA" not in os.environ, reason="W2V2NB_DATA does not name a folder of real recordings")
@pytest.mark.parametrize("name, group", [("svd", "pair"), ("svd", "subject"), ("librispeech", "subject")])
def test_labels_of_real_data_are_spread_evenly(name, group):
    folder = Path(os.environ["W2V2NB_DATA"]) / name
    table, labels = read_annotations(folder / "all.csv", group), read_labels(folder / "labels.txt")[0]
    for label in labels:
        ours, theirs, _ = compare_spreads(table, [label], group)
        assert ours <= theirs + 1e-3, label
    ours, theirs, chance = compare_spreads(table, labels, group)
    assert ours < 0.2 * chance and ours <= theirs + 1e-3


def test_folds_without_labels_and_on_the_clinical_scale():
    table = pd.DataFrame({"uid": list("abcdef"), "subject": list("uvwxyz"), "a": [2, 1, 6, -1, 5, 1]})
    assert [len(fold.test) for fold in split_folds(table, [], n_folds=3)] == [2, 2, 2]
    assert [len(fold.test) for fold in split_folds(table, ["a"], n_folds=2, scale="clinical")] == [3, 3]


def test_no_fold_is_empty_whatever_the_strata():
    rng = np.random.default_rng(0)
    for seed in range(20):
        strata = rng.random((8, 3)) * rng.choice([1e-3, 1], size=(8, 1))
        assert len(set(choose_folds(strata, 8, seed))) == 8


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(n_folds=4), "4 folds need as many parts that share no subject; the table has 3: give fewer folds"),
        (dict(n_folds=1), "1 folds 1 times; it should be 2 folds or more"),
        (dict(n_folds=2, n_repeats=0), "2 folds 0 times; "),
        (dict(n_folds=2, group="pair"), "no column 'pair'"),
    ],
)
def test_wrong_folds(kwargs, match):
    table = pd.DataFrame({"uid": list("abcd"), "subject": ["s1", "s2", "s3", "s3"], "a": [0, 1, 1, 0]})
    with pytest.raises(ValueError, match=match):
        split_folds(table, ["a"], **kwargs)


@pytest.mark.parametrize("size, share", [(0.2, 0.2), (1, 0.01), (40, 0.4), (40.0, 0.4), (np.int64(99), 0.99)])
def test_sizes_are_shares_or_numbers(size, share):
    assert resolve_share(size, 100) == share


@pytest.mark.parametrize("size", [0, -0.2, -3, 1.5, math.nan, math.inf, 100, 101])
def test_impossible_sizes(size):
    with pytest.raises(ValueError, match="the size is .*; .*: give "):
        resolve_share(size, 100)


@pytest.mark.parametrize("size, n", [(24, 24), (0.2, 24), (1, 1), (60, 60)])
def test_a_size_is_met_as_nearly_as_groups_allow(size, n):
    table = make_table()
    rest, held = hold_out(table, ["a", "b"], size, seed=3)
    check_disjoint(rest, held)
    assert len(rest) + len(held) == len(table) and abs(len(held) - n) <= 2


def test_the_samples_can_be_held_out_by_number():
    table = read_annotations(f"{samples.split_root()}/train.csv")
    assert len(hold_out(table, read_labels(samples.label_txt())[0], 4)[1]) >= 2
