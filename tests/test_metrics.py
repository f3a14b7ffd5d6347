"""metrics: figures against independent formulas and another package, and labels for which there is no figure."""

import subprocess
import sys

import numpy as np
import pytest

from w2v2nb.metrics import (
    auc_table,
    compare_aucs,
    compare_grades,
    compute_placements,
    estimate_interval,
    macro_auc,
    number_groups,
    roc_auc,
)

NAN = float("nan")


def make_case(n_pos, n_neg, shift, seed=0):
    "Targets and scores with ties."
    rng = np.random.default_rng(seed)
    score = np.r_[rng.normal(shift, 1, n_pos), rng.normal(0, 1, n_neg)]
    return np.r_[np.ones(n_pos), np.zeros(n_neg)], np.round(score, 1)


def count_pairs(target, score):
    "The AUC by its definition: the share of pairs in order, ties counting half."
    difference = score[target == 1][:, None] - score[target == 0]
    return ((difference > 0) + 0.5 * (difference == 0)).mean()


def delong(target, score):
    "Variance of the AUC, term by term from DeLong et al. (1988), equations 4 to 6."
    pos, neg = score[target == 1], score[target == 0]
    psi = lambda x, y: 1.0 if x > y else 0.5 if x == y else 0.0
    v10 = [np.mean([psi(x, y) for y in neg]) for x in pos]
    v01 = [np.mean([psi(x, y) for x in pos]) for y in neg]
    return np.var(v10, ddof=1) / len(pos) + np.var(v01, ddof=1) / len(neg)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n_pos, n_neg, shift", [(1, 1, 0), (10, 15, 1), (40, 30, -0.5), (3, 200, 2)])
def test_auc_is_the_share_of_pairs_in_order(n_pos, n_neg, shift, seed):
    target, score = make_case(n_pos, n_neg, shift, seed)
    result = roc_auc(target, score)
    assert result.auc == pytest.approx(count_pairs(target, score)) == compute_placements(target == 1, score)[target == 1].mean()
    assert (result.n_pos, result.n_neg, result.reason) == (n_pos, n_neg, "")


# From confidenceinterval 1.0.5 (PyPI, method "delong", float32), on make_case(...) drawn one after the other from one generator.
GOLDEN = [
    (10, 15, 1.0, 0.8566667, 0.7072800, 1.0060533),
    (40, 30, 0.5, 0.6249999, 0.4899686, 0.7600313),
    (8, 100, 2.0, 0.9350000, 0.8578006, 1.0121994),
]


def test_interval_against_another_package():
    rng = np.random.default_rng(0)
    for n_pos, n_neg, shift, auc, low, high in GOLDEN:
        target = np.r_[np.ones(n_pos), np.zeros(n_neg)]
        score = np.round(np.r_[rng.normal(shift, 1, n_pos), rng.normal(0, 1, n_neg)], 1)
        result = roc_auc(target, score)
        assert [result.auc, result.low, result.high] == pytest.approx([auc, low, min(high, 1)], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_interval_against_the_formula(seed):
    target, score = make_case(20, 25, 0.3, seed)
    low, high = estimate_interval(target == 1, score, np.arange(45))
    assert high - low == pytest.approx(2 * 1.959964 * delong(target, score) ** 0.5)
    assert (low + high) / 2 == pytest.approx(count_pairs(target, score))


def make_speakers(rng, n_speakers, per, is_mixed):
    "Speakers with several recordings that are alike; a speaker has one class, or both where mixed."
    speaker = np.repeat(np.arange(n_speakers), per)
    is_pos = rng.random(len(speaker)) < 0.4 if is_mixed else speaker % 2 == 0
    return speaker, is_pos, is_pos + rng.normal(size=n_speakers)[speaker] + 0.3 * rng.normal(size=len(speaker))


@pytest.mark.parametrize("is_mixed", [False, True])
def test_interval_by_speaker_against_a_bootstrap_over_speakers(is_mixed):
    rng = np.random.default_rng(3)
    speaker, is_pos, score = make_speakers(rng, 60, 4, is_mixed)
    rows = speaker.argsort(kind="stable").reshape(60, 4)
    draws = [rows[rng.integers(0, 60, 60)].ravel() for _ in range(1000)]
    spread = np.std([count_pairs(is_pos[d], score[d]) for d in draws])
    low, high = estimate_interval(is_pos, score, speaker)
    assert (high - low) / (2 * 1.959964) == pytest.approx(spread, rel=0.12)


def test_interval_covers_the_truth_only_when_speakers_are_known():
    rng, hits = np.random.default_rng(0), []
    truth = 0.75610  # P(a > b) for normals that differ by 1, each with variance 1 + 0.3 ** 2
    for _ in range(300):
        speaker, is_pos, score = make_speakers(rng, 40, 4, is_mixed=False)
        intervals = [estimate_interval(is_pos, score, groups) for groups in (speaker, np.arange(160))]
        hits.append([low <= truth <= high for low, high in intervals])
    by_speaker, by_recording = np.mean(hits, axis=0)
    assert by_speaker > 0.88 and by_recording < 0.75


@pytest.mark.parametrize(
    "target, score, expected",
    [
        ([], [], "no recording is rated"),
        ([NAN, NAN], [0.1, 0.2], "no recording is rated"),
        ([1, 1, NAN], [0.1, 0.2, 0.3], "only one class: 2 rated 1 and 0 rated 0"),
        ([0], [0.1], "only one class: 0 rated 1 and 1 rated 0"),
        ([0, 1, 1], [0.1, NAN, np.inf], "2 of 3 scores are not finite"),
        ([1, 1], [NAN, NAN], "only one class: 2 rated 1 and 0 rated 0"),
    ],
)
def test_no_auc_but_a_reason(target, score, expected):
    result = roc_auc(target, score)
    assert np.isnan([result.auc, result.low, result.high]).all() and result.reason == expected


@pytest.mark.filterwarnings("error")
def test_limits():
    assert roc_auc([0, 1], [0.5, 0.5]).auc == 0.5
    assert roc_auc([0, 1, NAN], [0.1, 0.2, NAN]).auc == 1.0, "a score that nothing is compared with may be anything"
    assert roc_auc([0, 1], [0.2, 0.1]).auc == 0.0
    assert roc_auc(np.float32([0, 1]), np.float16([1, 2])).auc == 1.0
    assert roc_auc([True, False], [2, 1]).auc == 1.0


def test_an_interval_needs_overlap_and_two_groups_of_each_class():
    assert np.isnan(roc_auc([1, 1, 0, 0], [4, 3, 2, 1]).low)
    assert np.isnan(roc_auc([1, 0, 0, 0], [2, 1, 3, 4]).low)
    assert np.isnan(roc_auc([1, 1, 0, 0], [2, 4, 1, 3], groups=["a", "a", "b", "c"]).low)
    assert not np.isnan(roc_auc([1, 1, 0, 0], [2, 4, 1, 3], groups=["a", "d", "b", "c"]).low)


def test_missing_groups_are_all_different():
    assert len(set(number_groups(["a", None, NAN, "a", None], 5))) == 4
    assert len(number_groups(None, 0)) == 0


@pytest.mark.parametrize(
    "target, score, match",
    [
        ([0, 1, 2], [1, 2, 3], "map other ratings first"),
        ([0.5, 1], [1, 2], "map other ratings first"),
        ([0, 1], [1, 2, 3], r"target is \(2,\), score \(3,\)"),
        ([[0, 1]], [[1, 2]], "those of one label"),
    ],
)
def test_wrong_arguments(target, score, match):
    with pytest.raises(ValueError, match=match):
        roc_auc(target, score)


# grades


def make_grades(n=30, seed=0):
    "Grades, a few of them missing, and expected grades with ties."
    rng = np.random.default_rng(seed)
    grade = rng.integers(1, 6, n).astype(float)
    score = np.round((grade + rng.normal(size=n)).clip(1, 5), 1)
    grade[rng.random(n) < 0.2] = NAN
    return grade, score


def rank_correlation(x, y):
    "Spearman's, by pairs: a rank is how many are below, ties counting half."
    x, y = (((v[:, None] > v).sum(1) + 0.5 * (v[:, None] == v).sum(1)) for v in (x, y))
    return np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std())


def weighted_kappa(grade, nearest):
    "Cohen (1968): 1 less the observed by the expected mean square of the difference, over all pairs of raters' marginals."
    return 1 - np.mean((grade - nearest) ** 2) / np.mean((grade[:, None] - nearest) ** 2)


@pytest.mark.parametrize("seed", range(5))
def test_grades_against_other_formulas(seed):
    grade, score = make_grades(seed=seed)
    found, rated = compare_grades(grade, score), ~np.isnan(grade)
    grade, score = grade[rated], score[rated]
    nearest = np.array([round(x) for x in score])
    expected = np.mean(np.abs(grade - score)), rank_correlation(grade, score), weighted_kappa(grade, nearest)
    assert found == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "grade, score, expected",
    [
        ([], [], (NAN, NAN, NAN)),
        ([NAN, NAN], [1, 2], (NAN, NAN, NAN)),
        ([1, 2], [1, NAN], (NAN, NAN, NAN)),
        ([1, NAN], [1, np.inf], (0, NAN, NAN)),
        ([1, 2, 3], [1, 2, 3], (0, 1, 1)),
        ([1, 2, 3], [2, 2, 2], (2 / 3, NAN, 0)),
        ([3, 3, 3], [2, 3, 4], (2 / 3, NAN, 0)),
        ([2], [2.4], (0.4, NAN, NAN)),
        ([1, 5], [0.2, 5.9], (0.85, 1, 1)),
        ([1, 5], [5, 1], (4, -1, -1)),
    ],
)
def test_grades_at_their_limits(grade, score, expected):
    assert compare_grades(grade, score) == pytest.approx(expected, nan_ok=True)


def test_the_auc_of_grades_is_of_present_against_absent():
    grade, score = make_grades(60)
    present = np.where(np.isnan(grade), NAN, grade >= 2)
    assert roc_auc(grade, score, is_graded=True) == roc_auc(present, score) and roc_auc(present, score).auc > 0.5


@pytest.mark.parametrize("target", [[0, 1], [1, 6], [1, 2.5], [-1, 1]])
def test_what_is_no_grade_is_refused(target):
    with pytest.raises(ValueError, match=r"targets should be 1 to 5 \(grades\) or NaN; map"):
        roc_auc(target, [1, 2], is_graded=True)


def test_table_of_grades():
    targets = np.array([[1, 1, 3, NAN], [2, 1, 4, NAN], [5, NAN, 5, NAN]])
    scores = np.array([[1.2, 1.1, 3, 1], [2.2, 1.3, 4, 1], [4.2, 5, 5, 1]])
    table = auc_table(targets, scores, list("abcd"), is_graded=True)
    assert list(table.columns[:7]) == list(auc_table(np.zeros((1, 1)), np.zeros((1, 1)), ["a"]).columns)
    assert list(table.columns[7:]) == ["MAE", "spearman", "kappa"]
    assert table[["n_pos", "n_neg"]].to_numpy().tolist() == [[2, 1], [0, 2], [3, 0], [0, 0]]
    assert table["reason"].tolist() == [
        "",
        "only one class: 0 rated 2 to 5 and 2 rated 1",
        "only one class: 3 rated 2 to 5 and 0 rated 1",
        "no recording is rated",
    ]
    assert table["MAE"].tolist() == pytest.approx([0.4, 0.2, 0, NAN], nan_ok=True)
    assert table["spearman"].isna().tolist() == [False, True, False, True] and macro_auc(table) == 1
    assert len(auc_table(np.zeros((3, 0)), np.zeros((3, 0)), [], is_graded=True).columns) == 10


# tables


def test_table():
    targets = np.array([[1, 0, NAN], [0, 0, NAN], [1, NAN, NAN], [0, 0, NAN]])
    scores = np.array([[0.9, 0, 0], [0.2, 0, 0], [0.3, 0, 0], [0.4, 0, 0]])
    table = auc_table(targets, scores, ["a", "b", "c"])
    assert list(table.columns) == ["Label", "AUC", "n_pos", "n_neg", "AUC_low", "AUC_high", "reason"]
    assert table["Label"].tolist() == ["a", "b", "c"] and table["AUC"].isna().tolist() == [False, True, True]
    assert table[["n_pos", "n_neg"]].to_numpy().tolist() == [[2, 2], [0, 3], [0, 0]]
    assert table["reason"].tolist() == ["", "only one class: 0 rated 1 and 3 rated 0", "no recording is rated"]
    assert macro_auc(table) == table["AUC"][0] == 0.75
    assert ",0.75,2,2," in table.to_csv(index=False) and "b,,0,3,,,only one class" in table.to_csv(index=False)


def test_groups_reach_the_table():
    rng = np.random.default_rng(0)
    speaker, is_pos, score = make_speakers(rng, 20, 4, is_mixed=False)
    columns = is_pos[:, None].astype(float), score[:, None]
    plain, grouped = auc_table(*columns, ["a"]), auc_table(*columns, ["a"], groups=[f"s{k}" for k in speaker])
    assert grouped["AUC_low"][0] < plain["AUC_low"][0] and grouped["AUC"][0] == plain["AUC"][0]


def test_no_labels():
    table = auc_table(np.zeros((3, 0)), np.zeros((3, 0)), [])
    assert len(table) == 0 and np.isnan(macro_auc(table))


@pytest.mark.parametrize("targets, scores, labels", [((3, 2), (3, 2), "a"), ((3, 2), (3, 1), "ab"), ((3,), (3,), "a")])
def test_table_of_another_shape(targets, scores, labels):
    with pytest.raises(ValueError, match="give a column per label"):
        auc_table(np.zeros(targets), np.zeros(scores), list(labels))


def test_importing_metrics_imports_no_torch_and_no_sklearn():
    code = "import sys, w2v2nb.metrics; print([m for m in ('torch', 'sklearn', 'scipy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_difference_of_two_aucs_is_delong_s():
    rng = np.random.default_rng(3)
    is_pos = rng.random(60) < 0.4
    first = is_pos + rng.normal(size=60)
    second = first + 0.5 * is_pos + 0.5 * rng.normal(size=60)

    def components(score):  # the kernel over all pairs, as in the paper
        pairs = score[is_pos][:, None] - score[~is_pos][None]
        kernel = (pairs > 0) + 0.5 * (pairs == 0)
        return kernel.mean(axis=1), kernel.mean(axis=0)

    (pos_1, neg_1), (pos_2, neg_2) = components(first), components(second)
    contrast = np.array([-1, 1])
    covariance = np.cov(pos_1, pos_2) / is_pos.sum() + np.cov(neg_1, neg_2) / (~is_pos).sum()
    half = 1.959964 * np.sqrt(contrast @ covariance @ contrast)
    difference = pos_2.mean() - pos_1.mean()
    expected = [difference, difference - half, difference + half]
    np.testing.assert_allclose(compare_aucs(is_pos, first, second, np.arange(60)), expected, rtol=1e-6)
    same = compare_aucs(is_pos, first, first, np.arange(60))
    assert same[0] == 0 and np.isnan(same[1:]).all(), "a model does not differ from itself, and no width is claimed"
