"""The three modes on real speech, where W2V2NB_DATA names the folder; the checkpoint is untrained, so no AUC is asserted."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from w2v2nb import samples
from w2v2nb.config import ConfigError, configure
from w2v2nb.crossing import measure_folds
from w2v2nb.run import start

DATA = Path(os.environ.get("W2V2NB_DATA", "none"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="real recordings: W2V2NB_DATA should name their folder")
WITH_SUBJECTS = ["svd", "librispeech", "fsdd"]


def read(path):
    return pd.read_csv(path, dtype={"uid": str, "subject": str})


def given(name, **changes):
    return dict(prefix=str(DATA / name / "audio"), checkpoint=samples.checkpoint(), device="cpu") | changes


@pytest.mark.parametrize("name", WITH_SUBJECTS)
def test_three_modes_on_unseen_speakers(name, tmp_path):
    for part, n in (("train", 60), ("test", 40)):
        table = read(DATA / name / f"{part}.csv")
        table.sample(n, random_state=0).sort_index().to_csv(tmp_path / f"{part}.csv", index=False)
    labels = str(DATA / name / "labels.txt")
    where = dict(data_split_root=str(tmp_path), exp_dir=str(tmp_path / "t"))
    tuned = start(configure("finetune", **given(name), **where, label_txt=labels))
    predictions, test = read(tuned / "predictions.csv"), read(tmp_path / "test.csv")
    assert predictions.uid.tolist() == test.uid.tolist() and not set(test.subject) & set(read(tmp_path / "train.csv").subject)
    assert np.isfinite(predictions.filter(like="_score")).all(axis=None) and tuned.about["counts"]["failures"] == 0

    model = str(tuned / "model")
    where = dict(prefix=str(DATA / name / "audio"), data_split_root=str(tmp_path / "test.csv"), device="cpu", mdl_path=model)
    measured = start(configure("eval-only", **where, exp_dir=str(tmp_path / "e")))
    pd.testing.assert_frame_equal(read(measured / "metrics.csv"), read(tuned / "metrics.csv"))
    extracted = start(configure("extraction", **where, exp_dir=str(tmp_path / "x")))
    table = pd.read_parquet(extracted / "embeddings.parquet")
    assert table.uid.tolist() == test.uid.tolist() and np.isfinite(np.stack(table.embedding)).all()


def test_extraction_without_subjects(tmp_path):
    read(DATA / "coffee" / "all.csv").head(30).to_csv(tmp_path / "t.csv", index=False)
    where = dict(data_split_root=str(tmp_path / "t.csv"), exp_dir=str(tmp_path / "x"))
    folder = start(configure("extraction", **given("coffee"), **where))
    assert folder.about["counts"]["rows"] == 30


def test_labels_that_were_shuffled_are_not_found_on_people_who_were_held_out(tmp_path):
    "What would find them sees the people it is measured on; the same recipe finds the labels that are true."
    table, found = read(DATA / "svd" / "all.csv"), {}
    (tmp_path / "labels.txt").write_text("female\n")
    for kind in ("true", "shuffled"):
        if kind == "shuffled":
            people = table.drop_duplicates("subject").set_index("subject").female
            shuffled = pd.Series(np.random.default_rng(1).permutation(people), people.index)
            table["female"] = table.subject.map(shuffled)
        table.to_csv(tmp_path / f"{kind}.csv", index=False)
        where = dict(data_split_root=str(tmp_path / f"{kind}.csv"), label_txt=str(tmp_path / "labels.txt"))
        how = dict(loss="BCE", learning_rate=0.003, epochs=10, layer=1, folds=4, val_share=0.2, clip_length=32000)
        folder = start(configure("finetune", **given("svd"), **where, **how, exp_dir=str(tmp_path / f"x-{kind}")))
        predictions, metrics = read(folder / "predictions.csv"), read(folder / "metrics.csv")
        assert sorted(predictions.uid) == sorted(table.uid)
        found[kind] = metrics.AUC_mean[0]
        assert measure_folds(predictions, ["female"])[1].AUC_mean[0] == pytest.approx(found[kind])
    assert found["true"] > 0.7 and 0.35 < found["shuffled"] < 0.62, found


def test_matched_pairs_stay_together(tmp_path):
    table = read(DATA / "svd" / "all.csv").head(120)
    table.to_csv(tmp_path / "t.csv", index=False)
    labels = str(DATA / "svd" / "labels.txt")
    folder = start(configure("finetune", **given("svd"), data_split_root=str(tmp_path / "t.csv"), label_txt=labels,
                             exp_dir=str(tmp_path / "x"), group="pair", val_share=0.2))  # fmt: skip
    train, val, test = (set(read(folder / "split" / f"{part}.csv").pair) for part in ("train", "val", "test"))
    assert not train & test and not train & val and not val & test

    split = tmp_path / "split"
    split.mkdir()
    table.iloc[::2].to_csv(split / "train.csv", index=False)
    table.iloc[1::2].to_csv(split / "test.csv", index=False)
    config = dict(given("svd"), data_split_root=str(split), label_txt=labels, exp_dir=str(tmp_path / "y"))
    with pytest.raises(ConfigError, match="pair"):
        start(configure("finetune", **config, group="pair"))
