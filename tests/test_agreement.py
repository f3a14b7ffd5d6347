"""agreement: kappa and ICC against published values and definitions, and ratings for which there is no figure."""

import numpy as np
import pandas as pd
import pytest

from w2v2nb.agreement import agreement_table, by_rater, compare_raters, complete_rows, disagreements, icc, kappa
from w2v2nb.metrics import compare_grades

NAN = float("nan")
# Shrout and Fleiss (1979), table 2: six targets, four judges
JUDGES = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
# the values of their table 4; the intervals as R's psych::ICC prints them for the same data
PUBLISHED = {
    "ICC(2,1)": (0.29, 0.02, 0.76),
    "ICC(3,1)": (0.71, 0.34, 0.95),
    "ICC(2,k)": (0.62, 0.07, 0.93),
    "ICC(3,k)": (0.91, 0.68, 0.99),
}


@pytest.mark.parametrize("form", PUBLISHED)
def test_icc_against_shrout_and_fleiss(form):
    assert [round(x, 2) for x in icc(JUDGES)[form]] == list(PUBLISHED[form])


def draw(n, k, rng, spread):
    "Ratings of n recordings by k raters, the second of whom is a grade stricter."
    level = rng.integers(1, 5, size=(n, 1))
    return np.clip(level + (np.arange(k) == 1) + np.rint(spread * rng.normal(size=(n, k))), 1, 5)


@pytest.mark.parametrize("n, k, spread", [(20, 2, 0.5), (30, 3, 1.0), (5, 4, 2.0), (2, 2, 1.0)])
def test_icc_is_unchanged_by_what_it_should_ignore(n, k, spread):
    ratings = draw(n, k, np.random.default_rng(n), spread)
    for form, figure in icc(ratings).items():
        for other in (ratings[::-1], ratings[:, ::-1], ratings + 3):
            assert icc(other)[form] == pytest.approx(figure, nan_ok=True)
        if form.startswith("ICC(3"):  # who is strict does not matter where the raters are these
            assert icc(ratings + np.arange(k))[form] == pytest.approx(figure, nan_ok=True)


def test_intervals_hold_what_they_promise():
    rng, n_held, n = np.random.default_rng(0), 0, 300
    for _ in range(n):  # true ICC(3,1) is 1 / (1 + 1)
        low, high = icc(rng.normal(size=(25, 1)) + rng.normal(size=(25, 3)))["ICC(3,1)"][1:]
        n_held += low < 0.5 < high
    assert 0.91 < n_held / n < 0.99


def weighted(a, b, power, grades):
    "Cohen (1968) by its definition: 1 minus observed over expected disagreement."
    miss = lambda x, y: float(x != y) if power == 0 else abs(x - y) ** power
    observed = np.mean([miss(x, y) for x, y in zip(a, b, strict=True)])
    expected = np.mean([miss(x, y) for x in a for y in b])
    return 1 - observed / expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weights, power", [(None, 0), ("linear", 1), ("quadratic", 2)])
def test_kappa_by_its_definition(weights, power, seed):
    ratings = np.random.default_rng(seed).choice([1, 2, 5], size=(25, 3))  # 3 and 4 are grades that nobody gave
    pairs = [weighted(ratings[:, i], ratings[:, j], power, range(1, 6)) for i, j in [(0, 1), (0, 2), (1, 2)]]
    assert kappa(ratings[:, :2], weights) == pytest.approx(pairs[0])
    assert kappa(ratings, weights) == pytest.approx(np.mean(pairs))


def test_quadratic_kappa_is_that_of_metrics():
    ratings = draw(40, 2, np.random.default_rng(1), 1.0)
    assert kappa(ratings, "quadratic") == pytest.approx(compare_grades(*ratings.T).kappa)


@pytest.mark.parametrize(
    "ratings, reason, missing",
    [
        ([[NAN, 1], [2, NAN]], "no recording is rated by all", {"agreed_percent", "kappa", "ICC(2,1)", "ICC(3,k)"}),
        ([[3, 4], [NAN, 1]], "1 recording is rated by all", {"kappa", "kappa_quadratic", "ICC(2,1)"}),
        ([[3, 3], [3, 3]], "only one value: all are rated 3", {"kappa", "kappa_linear", "ICC(2,1)", "ICC(3,1)"}),
        ([[1, 2], [1, 2], [1, 2]], "each rater gave one value only", {"ICC(3,1)", "ICC(3,k)", "ICC(2,1)_low"}),
        ([[1, 1], [2, 2], [5, 5]], "", {"ICC(2,1)_low", "ICC(3,1)_high"}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_said_is_nan_with_a_reason(ratings, reason, missing):
    row = compare_raters(np.array(ratings))
    assert row["reason"].startswith(reason) and bool(row["reason"]) == bool(reason)
    assert all(np.isnan(row[name]) for name in missing)


@pytest.mark.filterwarnings("error")
def test_complete_agreement_is_one():
    row = compare_raters([[1, 1], [2, 2], [5, 5]])
    assert [row[name] for name in ("agreed_percent", "kappa", "kappa_quadratic", "ICC(2,1)", "ICC(3,k)")] == [100, 1, 1, 1, 1]


def make_table():
    rows = {"Ann": [1, 2, 4, 5, 3], "Bo": [1, 4, 3, 6, NAN], "Cy": [2, 2, 2, -1, 3]}
    parts = [pd.DataFrame({"uid": [*"vwxyz"], "rater": name, "strained": x, "breathy": 1}) for name, x in rows.items()]
    return pd.concat(parts, ignore_index=True)


def test_missing_ratings_are_left_out_by_pairs():
    table = agreement_table(make_table(), ["strained", "breathy"])
    strained = table[table["Label"] == "strained"].set_index("raters")
    assert strained["n"].to_dict() == {"Ann, Bo": 3, "Ann, Cy": 4, "Bo, Cy": 3, "Ann, Bo, Cy": 3}
    assert strained["agreed_percent"].round(1).to_dict() == {"Ann, Bo": 33.3, "Ann, Cy": 50, "Bo, Cy": 0, "Ann, Bo, Cy": 0}
    assert set(table[table["Label"] == "breathy"]["reason"]) == {"only one value: all are rated 1"}


def test_order_of_rows_does_not_matter():
    table = make_table()
    mixed = table.sample(frac=1, random_state=1)
    raters = ["Ann", "Bo", "Cy"]
    pd.testing.assert_frame_equal(by_rater(mixed, "strained").loc[[*"vwxyz"], raters], by_rater(table, "strained"))


def test_disagreements_are_sorted_by_size():
    found = disagreements(make_table(), ["breathy", "strained"])
    assert found[["uid", "difference"]].values.tolist() == [["w", 2], ["x", 2], ["v", 1]]
    assert found.loc[0, ["rated by Ann", "rated by Bo", "rated by Cy"]].tolist() == [2, 4, 2]


def test_yes_and_no():
    table = make_table().assign(strained=[1, 0, 1, 0, 1] * 2 + [0, 1, 0, 1, 0])
    assert agreement_table(table, ["strained"], scale=None)["kappa"].iloc[:2].tolist() == [1, pytest.approx(-12 / 13)]


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: complete_rows([[1], [2]]), "two or more"),
        (lambda: complete_rows([[1.5, 2]]), "whole numbers"),
        (lambda: by_rater(make_table().drop(columns="rater"), "strained"), "rater should be one"),
        (lambda: by_rater(make_table().assign(rater=None), "strained"), "v, w, x, y, z and 5 more stands twice"),
        (lambda: agreement_table(make_table().head(5), ["strained"]), r"one person \(Ann\)"),
        (lambda: agreement_table(make_table(), ["hoarse"]), "no column for label 'hoarse'"),
        (lambda: agreement_table(make_table().assign(strained=9), ["strained"]), "has the value 9"),
    ],
)
def test_wrong_tables(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
