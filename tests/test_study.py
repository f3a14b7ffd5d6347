"""Many trainings: the best is chosen on validation and by nothing else, each person is tested once, nothing is done twice."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import write_split
from sklearn.metrics import roc_auc_score

from w2v2nb import crossing, fitting, samples, study
from w2v2nb.config import ConfigError, configure
from w2v2nb.crossing import measure_folds
from w2v2nb.data import read_annotations
from w2v2nb.encoder import Encoder
from w2v2nb.model import Classifier
from w2v2nb.run import start

LABELS = ["slow rate", "rapid rate", "strained", "breathy", "monopitch"]


def read(path):
    return pd.read_csv(path, dtype={"uid": str, "subject": str})


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("split"), n_val_people=4, n_train=30, n_test=20)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "One table of 40 recordings, with the voices in pairs."
    path = tmp_path_factory.mktemp("table") / "all.csv"
    table = read_annotations(f"{samples.split_root()}/train.csv").iloc[::2].head(40)
    table.assign(pair=table.subject.map({s: f"p{i // 2}" for i, s in enumerate(table.subject.unique())})).to_csv(
        path, index=False
    )
    return path


def tune(split, exp_dir, **changes):
    given = dict(prefix=samples.prefix(), data_split_root=str(split), label_txt=samples.label_txt(), device="cpu", epochs=3)
    given |= dict(checkpoint=samples.checkpoint(), exp_dir=str(exp_dir), learning_rate=3e-3, clip_length=32000, dataset="s")
    return configure("finetune", **given | changes)


@pytest.fixture
def encoded(monkeypatch):
    "The number of recordings of each real pass through the encoder."
    sizes, forward = [], Encoder.forward

    def counted(self, waveform, lengths, *more, **options):
        sizes.append(len(lengths))
        return forward(self, waveform, lengths, *more, **options)

    monkeypatch.setattr(Encoder, "forward", counted)
    return sizes


@pytest.fixture
def interrupted(monkeypatch):
    "Have the n-th training end as by Ctrl-C after an epoch; the trainings that were begun."
    begun, train_model, fit = [], study.train_model, fitting.fit

    def counted(config, *more, **options):
        begun.append(config)
        return train_model(config, *more, **options)

    def stop_at(n, epoch):
        def until(trainer, train, validation, n_epochs, after):
            def stop(row):
                after(row)
                if len(begun) == n and row["epoch"] == epoch:
                    raise KeyboardInterrupt

            fit(trainer, train, validation, n_epochs, stop)

        monkeypatch.setattr(fitting, "fit", until)
        return begun

    monkeypatch.setattr(study, "train_model", counted)
    yield stop_at


# sweeps and searches


def test_a_sweep_encodes_once_and_keeps_the_layer_that_is_best_on_validation(split, tmp_path, encoded, capsys):
    given = dict(cache_dir=str(tmp_path / "cache"))
    folder = start(tune(split, tmp_path / "x", layer="0,1,-1", **given))
    assert sum(encoded) == sum(len(read(split / f"{part}.csv")) for part in ("train", "val", "test"))
    trials = read(folder / "search.csv")
    columns = ["trial", "layer", "best_epoch", "metric", "validation_loss", "seconds", *(f"{label}_AUC" for label in LABELS)]
    assert list(trials) == columns and trials.trial.tolist() == [1, 2, 3] and trials.layer.tolist() == [0, 1, 3]
    np.testing.assert_allclose(trials[columns[6:]].mean(axis=1), trials.metric, atol=1e-6)
    best = trials.layer[trials.metric.idxmax()]
    assert Classifier.load(folder / "model", device="cpu").layer == best
    assert f"best of 3 trials: layer {best}" in capsys.readouterr().out
    history, row = read(folder / "history.csv"), trials.loc[trials.metric.idxmax()]
    assert history.metric.max() == row.metric and history.epoch[history.metric.idxmax()] == row.best_epoch
    alone = start(tune(split, tmp_path / "y", layer=int(best), **given))  # the same training by itself
    pd.testing.assert_frame_equal(*(read(f / "history.csv").drop(columns="seconds") for f in (folder, alone)))
    pd.testing.assert_frame_equal(*(read(f / "predictions.csv") for f in (folder, alone)))


@pytest.mark.parametrize("monitor", ["auc", "loss"])
def test_a_grid_is_tried_in_full_and_judged_as_asked(split, tmp_path, monitor):
    space = "learning_rate=0.01,0.00001; dropout=0,0.5; head_size=4"
    folder = start(tune(split, tmp_path / "x", search=space, monitor=monitor))
    trials = read(folder / "search.csv")
    assert list(trials)[:4] == ["trial", "learning_rate", "dropout", "head_size"]
    tried = {*trials[["learning_rate", "dropout"]].itertuples(index=False, name=None)}
    assert len(trials) == 4 and tried == {(rate, drop) for rate in (0.01, 0.00001) for drop in (0, 0.5)}
    best = trials.loc[trials.metric.idxmax() if monitor == "auc" else trials.validation_loss.idxmin()]
    history = read(folder / "history.csv")
    assert history.learning_rate.unique().tolist() == [best.learning_rate]
    assert history.iloc[int(best.best_epoch) - 1].validation_loss == pytest.approx(best.validation_loss)
    model = Classifier.load(folder / "model", device="cpu")
    assert model.head["dropout"] == best.dropout and model.heads[0].features(model.encoder.embed([np.zeros(16000)])).shape == (
        1,
        4,
    )


def test_a_study_has_its_number_of_trials_in_the_ranges_and_can_be_repeated(split, tmp_path):
    space = dict(search="learning_rate=1e-5:1e-2; head_size=4:64", trials=4, epochs=1)
    runs = [start(tune(split, tmp_path / name, **space)) for name in ("a", "b")]
    first, second = (read(run / "search.csv").drop(columns="seconds") for run in runs)
    pd.testing.assert_frame_equal(first, second)
    assert len(first) == 4 and first.learning_rate.between(1e-5, 1e-2).all() and first.head_size.between(4, 64).all()
    assert first.learning_rate.nunique() == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(search="learning_rate=0.1,-3"), "learning_rate -3"),
        (dict(search="learnin_rate=0.1,0.2"), "learning_rate"),
        (dict(search="dropout=0,1.5"), "dropout 1.5"),
        (dict(search="learning_rate=1e-5:1e-3"), "--trials"),
        (dict(search="layer=1,9"), "layers 0 to 3"),
        (dict(search="layer=0:9", trials=3), "layers 0 to 3"),
        (dict(layer="0,7"), "layers 0 to 3"),
        (dict(search="epochs=2,x"), "epochs"),
        (dict(search="monitor=auc,loss"), "monitor"),
        (dict(search="loss=MSE,CORN"), "CORN"),
        (dict(search="dropout=-0.5:0.5", trials=3), "dropout"),
    ],
)
def test_a_wrong_value_of_a_search_is_refused_before_any_work(split, tmp_path, encoded, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        start(tune(split, tmp_path / "x", **changes))
    assert not (tmp_path / "x").exists() and not encoded


def test_a_search_without_recordings_to_judge_by_is_refused(split, tmp_path):
    there = shutil.copytree(split, tmp_path / "split")
    (there / "val.csv").unlink()
    for changes in (dict(layer="0,1"), dict(search="dropout=0,0.5"), dict(patience=2)):
        with pytest.raises(ConfigError, match="give val_share, or a split with a val.csv"):
            start(tune(there, tmp_path / "x", **changes))


def test_the_test_table_has_no_say_in_the_choice(split, tmp_path):
    other, found = shutil.copytree(split, tmp_path / "split"), []
    table = read(other / "test.csv")
    table[LABELS] = 1 - table[LABELS]
    table.to_csv(other / "test.csv", index=False)
    for place in (split, other):
        folder = start(tune(place, tmp_path / f"x{len(found)}", search="layer=0,2,-1; learning_rate=0.01,0.0001"))
        found.append((read(folder / "search.csv").drop(columns="seconds"), read(folder / "predictions.csv")))
    pd.testing.assert_frame_equal(found[0][0], found[1][0])
    pd.testing.assert_frame_equal(*(predictions.filter(like="_score") for _, predictions in found))
    assert not found[0][1].filter(like="_target").equals(found[1][1].filter(like="_target"))


@pytest.mark.parametrize(
    "changes",
    [dict(search="learning_rate=0.01,0.003,0.0001"), dict(search="learning_rate=1e-4:1e-2", trials=3), dict(layer="0,1,-1")],
)
def test_a_search_that_was_stopped_repeats_no_trial(split, tmp_path, interrupted, monkeypatch, changes):
    whole = start(tune(split, tmp_path / "whole", **changes))
    begun = interrupted(2, 2)
    begun.clear()
    with pytest.raises(KeyboardInterrupt):
        start(tune(split, tmp_path / "x", **changes))
    assert len(begun) == 2 and json.loads((tmp_path / "x" / "run.json").read_text())["state"] == "interrupted"
    begun = interrupted(-1, 0)
    begun.clear()
    folder = start(tune(split, tmp_path / "x", resume=True, **changes))
    assert len(begun) == 3, "the second and third trial, and the best one once more, which is read"
    pd.testing.assert_frame_equal(*(read(f / "search.csv").drop(columns="seconds") for f in (folder, whole)))
    pd.testing.assert_frame_equal(*(read(f / "history.csv").drop(columns="seconds") for f in (folder, whole)))
    pd.testing.assert_frame_equal(*(read(f / "predictions.csv") for f in (folder, whole)))


# cross-validation


@pytest.mark.parametrize("group", ["subject", "pair"])
def test_everybody_is_tested_once_in_each_repeat_and_nobody_is_on_both_sides(table, tmp_path, group, monkeypatch):
    seen, predict_fold = [], crossing.predict_fold

    def watched(config, classifiers, fold, parts, *more):
        seen.append((fold, parts))
        return predict_fold(config, classifiers, fold, parts, *more)

    monkeypatch.setattr(crossing, "predict_fold", watched)
    folder = start(tune(table, tmp_path / "x", folds=3, repeats=2, group=group, val_share=0.3, epochs=2))
    everyone, predictions = read(table), read(folder / "predictions.csv")
    assert list(predictions)[:6] == ["repeat", "fold", "uid", "subject", "slow rate_target", "slow rate_score"]
    assert len(seen) == 6
    for _, rows in predictions.groupby("repeat"):
        assert sorted(rows.uid) == sorted(everyone.uid) and rows.fold.nunique() == 3
    for fold, parts in seen:
        held = predictions[(predictions.repeat == fold.repeat) & (predictions.fold == fold.number)]
        assert held.uid.tolist() == parts["test"].uid.tolist() and {*parts} == {"train", "val", "test"}
        for column in {group, "subject"}:
            sets = [{*part[column]} for part in parts.values()]
            assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    first, second = (predictions[predictions.repeat == k].sort_values("uid").fold.tolist() for k in (1, 2))
    assert first != second, "another repeat has other folds"
    targets = everyone.set_index("uid").loc[predictions.uid, LABELS].to_numpy(float)
    np.testing.assert_array_equal(predictions[[f"{label}_target" for label in LABELS]].to_numpy(float), targets)


def test_the_tables_of_a_cross_validation_say_what_its_predictions_say(table, tmp_path):
    folder = start(tune(table, tmp_path / "x", folds=3, repeats=2, epochs=2))
    assert {path.name for path in folder.path.iterdir()} >= {"s_folds.csv", "s_metrics.csv", "s_predictions.csv"}
    assert not (folder / "model").exists() and not (folder / "work").exists()
    predictions, folds, metrics = (read(folder / f"{name}.csv") for name in ("predictions", "folds", "metrics"))
    assert list(folds)[:6] == ["repeat", "fold", "Label", "AUC", "n_pos", "n_neg"] and len(folds) == 2 * 3 * len(LABELS)
    assert metrics.Label.tolist() == LABELS and {"AUC", "n_pos", "n_neg", "AUC_mean", "AUC_sd"} <= {*metrics}
    for row in folds.itertuples():
        held = predictions[(predictions.repeat == row.repeat) & (predictions.fold == row.fold)]
        held = held.dropna(subset=f"{row.Label}_target")
        target, score = held[f"{row.Label}_target"], held[f"{row.Label}_score"]
        assert (target == 1).sum() == row.n_pos and (target == 0).sum() == row.n_neg
        if target.nunique() == 2:
            assert row.AUC == pytest.approx(roc_auc_score(target, score))
        else:
            assert np.isnan(row.AUC) and isinstance(row.reason, str)
    for row in metrics.itertuples():
        values = folds[folds.Label == row.Label].AUC
        assert (row.AUC_mean, row.AUC_sd) == (pytest.approx(values.mean()), pytest.approx(values.std()))
        assert row.AUC_folds == values.notna().sum()
        pairs = []  # in each repeat the share of ordered pairs, of a present and an absent rating in the same fold
        for _, rows in folds[folds.Label == row.Label].dropna(subset="AUC").groupby("repeat"):
            pairs.append(np.average(rows.AUC, weights=rows.n_pos * rows.n_neg))
        assert row.AUC == pytest.approx(np.mean(pairs))


def test_folds_of_one_class_are_left_out_of_mean_and_spread():
    predictions = pd.DataFrame({"repeat": 1, "fold": [1, 1, 2, 2, 3, 3], "uid": [*"abcdef"]})
    predictions["x_target"], predictions["x_score"] = [0, 1, 0, 1, 1, 1], [0.1, 0.9, 0.8, 0.2, 0.5, 0.5]
    folds, metrics = measure_folds(predictions, ["x"])
    assert folds.AUC.tolist()[:2] == [1.0, 0.0] and np.isnan(folds.AUC[2])
    assert (metrics.AUC_mean[0], metrics.AUC_sd[0]) == (0.5, pytest.approx(0.5**0.5))


def test_a_search_in_every_fold_sees_nobody_who_is_held_out(table, tmp_path, encoded, monkeypatch):
    seen, run_trial = [], study.run_trial

    def watched(config, params, classifiers, parts, material, work):
        seen.append((work, {part: {*rows.subject} for part, rows in parts.items() if part != "test"}))
        return run_trial(config, params, classifiers, parts, material, work)

    monkeypatch.setattr(study, "run_trial", watched)
    given = dict(folds=2, val_share=0.3, search="learning_rate=0.01,0.0001; layer=1,-1", epochs=2, cache_dir=str(tmp_path / "c"))
    folder = start(tune(table, tmp_path / "x", **given))
    predictions = read(folder / "predictions.csv")
    assert len(seen) == 2 * 4 and sum(encoded) == 40, "once for all folds and trials"
    for k in (1, 2):
        held = {*predictions[predictions.fold == k].subject}
        for work, parts in seen:
            if f"fold_1_{k}" in str(work):
                assert not held & (parts["train"] | parts["val"]) and not parts["train"] & parts["val"]
    assert sorted(predictions.uid) == sorted(read(table).uid)


def test_a_cross_validation_that_was_stopped_repeats_no_fold(table, tmp_path, interrupted, encoded):
    given = dict(folds=3, tune="top:1", cache=False, epochs=2, clip_length=16000)
    whole = start(tune(table, tmp_path / "whole", **given))
    begun = interrupted(2, 1)
    begun.clear()
    with pytest.raises(KeyboardInterrupt):
        start(tune(table, tmp_path / "x", **given))
    begun = interrupted(-1, 0)
    begun.clear(), encoded.clear()
    folder = start(tune(table, tmp_path / "x", resume=True, **given))
    assert len(begun) == 2
    for name in ("folds.csv", "predictions.csv", "metrics.csv"):
        pd.testing.assert_frame_equal(read(folder / name), read(whole / name))
