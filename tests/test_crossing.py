"""Cross-validation: what is compared with what, and tables that come back as they went in."""

import math

import numpy as np
import pandas as pd
import pytest

from w2v2nb.crossing import measure_folds, read_round, weigh_folds
from w2v2nb.metrics import roc_auc


def predict(rng, n_folds=10, n=40, knows=0.0):
    "Out-of-fold scores of models that know the share of positives among the others, and `knows` of the truth."
    target = rng.permutation(np.arange(n) % 2).astype(float)
    fold = np.arange(n) % n_folds
    score = np.array([target[fold != f].mean() for f in fold]) + knows * target + rng.normal(0, 1e-9 + knows, n)
    return pd.DataFrame({"repeat": 1, "fold": fold + 1, "a_target": target, "a_score": score})


def test_a_model_that_knows_only_the_share_of_positives_is_at_chance():
    rng = np.random.default_rng(0)
    tables = [predict(rng) for _ in range(60)]
    within = np.mean([measure_folds(table, ["a"])[1]["AUC"][0] for table in tables])
    pooled = np.mean([roc_auc(table["a_target"], table["a_score"]).auc for table in tables])
    assert abs(within - 0.5) < 0.05 and pooled < 0.42


def test_pairs_are_counted_within_folds():
    table = predict(np.random.default_rng(1), n_folds=4, knows=1.0)
    folds, metrics = measure_folds(table, ["a"])
    pairs = [
        (a > b) + (a == b) / 2
        for _, rows in table.groupby("fold")
        for a in rows.a_score[rows.a_target == 1]
        for b in rows.a_score[rows.a_target == 0]
    ]
    assert metrics["AUC"][0] == pytest.approx(np.mean(pairs)) and 0.5 < metrics["AUC"][0] < 1
    assert metrics["AUC_low"][0] < metrics["AUC"][0] < metrics["AUC_high"][0]
    assert metrics[["AUC_mean", "AUC_sd", "AUC_folds"]].iloc[0].tolist() == pytest.approx([folds.AUC.mean(), folds.AUC.std(), 4])
    assert metrics[["n_pos", "n_neg"]].iloc[0].tolist() == [20, 20]


def test_of_several_repeats_the_mean_is_taken():
    tables = [predict(np.random.default_rng(k), n_folds=4, knows=1.0).assign(repeat=k) for k in (1, 2)]
    alone = [measure_folds(table, ["a"])[1] for table in tables]
    together = measure_folds(pd.concat(tables), ["a"])[1]
    for name in ("AUC", "AUC_low", "AUC_high"):
        assert together[name][0] == pytest.approx(np.mean([metrics[name][0] for metrics in alone]))


def test_folds_of_one_class_count_for_nothing_and_none_left_is_a_reason():
    table = pd.DataFrame({"repeat": 1, "fold": [1, 1, 2, 2], "a_target": [0, 1, 1, 1], "a_score": [0.1, 0.2, 0.3, 0.1]})
    folds, metrics = measure_folds(table, ["a"])
    assert metrics["AUC"][0] == 1 and metrics["AUC_folds"][0] == 1 and folds["reason"].str.contains("one class").sum() == 1
    _, metrics = measure_folds(table.assign(a_target=[0, 0, 1, 1]), ["a"])
    assert math.isnan(metrics["AUC"][0]) and metrics["reason"][0] == "no fold has both classes"
    assert all(map(math.isnan, weigh_folds(folds.iloc[:0])))


def test_a_table_comes_back_as_it_was_written(tmp_path):
    scores = np.random.default_rng(0).normal(size=50).astype(np.float32)
    table = pd.DataFrame({"uid": [f"{i:03}" for i in range(50)], "subject": ["NA", "null", *["nan"] * 48], "a_score": scores})
    table["a_target"] = np.float32([1, np.nan] * 25)
    table.to_csv(tmp_path / "a.csv", index=False)
    again = read_round(tmp_path / "a.csv")
    again.to_csv(tmp_path / "b.csv", index=False)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert again["subject"].tolist() == table["subject"].tolist() and (again["a_score"].to_numpy() == scores).all()
    history = pd.DataFrame({"epoch": [1], "train_loss": [0.6427622012749403], "metric": [np.nan]})
    history.to_csv(tmp_path / "h.csv", index=False)
    pd.concat([read_round(tmp_path / "h.csv"), history]).to_csv(tmp_path / "both.csv", index=False)
    assert len(set((tmp_path / "both.csv").read_text().splitlines())) == 2
