"""One training of a run: features are computed once, and what is kept changes nothing but the time."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_split

from w2v2nb import samples
from w2v2nb.__main__ import main
from w2v2nb.config import configure
from w2v2nb.encoder import Encoder
from w2v2nb.fitting import Material, describe, describe_time, find_layers, keeps_features, make_batches, make_trainer
from w2v2nb.folder import RunFolder
from w2v2nb.model import Classifier
from w2v2nb.run import start

LABELS = ["slow rate", "rapid rate", "strained", "breathy", "monopitch"]


def read(path):
    return pd.read_csv(path, dtype={"uid": str, "subject": str})


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("split"), n_val_people=2, n_train=16, n_test=12)


def tune(split, exp_dir, **changes):
    given = dict(prefix=samples.prefix(), data_split_root=str(split), label_txt=samples.label_txt(), device="cpu")
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


@pytest.mark.parametrize(
    ("changes", "is_kept"),
    [
        (dict(), True),
        (dict(layer="weighted"), True),
        (dict(pooling_mode="mean+std"), True),
        (dict(cache=False), False),
        (dict(tune="top:1"), False),
        (dict(tune="lora"), False),
        (dict(pooling_mode="attention"), False),
        (dict(augment="noise"), False),
        (dict(augment="specaugment"), False),
    ],
)
def test_features_are_kept_where_they_are_the_same_in_every_epoch(split, tmp_path, changes, is_kept):
    config = tune(split, tmp_path, **changes)
    model = Material(config, read(split / "train.csv")).make_model(config, [LABELS])
    assert keeps_features(config, model, is_training=True) == is_kept
    assert keeps_features(config, model) == (is_kept or "augment" in changes), "nothing augments what is measured"


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        (dict(), [3]),
        (dict(layer=-1), [3]),
        (dict(layer="weighted"), [0, 1, 2, 3]),
        (dict(layer="0,2,-1", val_share=0.2), [0, 2, 3]),
        (dict(search="layer=1,-1; dropout=0,0.5", val_share=0.2), [1, 3]),
        (dict(search="layer=weighted,2", val_share=0.2), [0, 1, 2, 3]),
    ],
)
def test_the_layers_that_some_training_needs(split, tmp_path, changes, layers):
    found = find_layers(tune(split, tmp_path, **changes), 3)
    assert {*layers} <= {*found} <= {*layers, 3}, "the layer that is the default may be there besides"


def test_each_recording_is_encoded_once_and_a_second_run_encodes_none(split, tmp_path, encoded):
    given = dict(cache_dir=str(tmp_path / "cache"), epochs=5)
    first = start(tune(split, tmp_path / "a", **given))
    assert sum(encoded) == 16 + 12 + 12
    encoded.clear()
    second = start(tune(split, tmp_path / "b", **given))
    assert sum(encoded) == 0
    for name in ("history.csv", "predictions.csv"):
        pd.testing.assert_frame_equal(*(read(run / name).drop(columns="seconds", errors="ignore") for run in (first, second)))
    encoded.clear()  # extraction of the same layer takes them from there as well
    given = dict(prefix=samples.prefix(), data_split_root=str(split / "test.csv"), checkpoint=samples.checkpoint(), device="cpu")
    given |= dict(clip_length=32000, cache_dir=str(tmp_path / "cache"))
    start(configure("extraction", **given, exp_dir=str(tmp_path / "x")))
    assert sum(encoded) == 0
    start(configure("extraction", **given | dict(clip_length=16000), exp_dir=str(tmp_path / "y")))
    assert sum(encoded) > 0, "other sound has other features"


@pytest.mark.parametrize("changes", [dict(), dict(layer="weighted", mixup=0.4, loss="BCE"), dict(pooling_mode="mean+std")])
def test_a_run_with_kept_features_is_the_run_without(split, tmp_path, changes):
    kept, plain = (start(tune(split, tmp_path / f"{cache}", cache=cache, epochs=3, **changes)) for cache in (True, False))
    for name in ("history.csv", "predictions.csv", "metrics.csv"):
        first, second = (read(run / name).drop(columns="seconds", errors="ignore") for run in (kept, plain))
        pd.testing.assert_frame_equal(first, second, rtol=0, atol=1e-5)


def test_batches_of_kept_features_are_the_rows_of_their_recordings(split, tmp_path):
    config = tune(split, tmp_path, cache_dir=str(tmp_path / "cache"))
    tables = [read(split / f"{part}.csv") for part in ("val", "test")]
    material = Material(config, pd.concat(tables))
    model = material.make_model(config, [LABELS])
    shuffled = tables[1].sample(frac=1, random_state=0)
    (batch,) = make_batches(config, material, model, shuffled)
    assert batch.uids == shuffled.uid.tolist()
    np.testing.assert_array_equal(batch.targets.numpy(), shuffled[LABELS].to_numpy(np.float32))
    (alone,) = make_batches(tune(split, tmp_path, cache=False), material, model, shuffled.iloc[3:4])
    with torch.inference_mode():
        expected = model.eval().embed(alone.waveform, alone.lengths)
    np.testing.assert_allclose(batch.features[3:4, 0].numpy(), expected.numpy(), atol=1e-5)


def test_before_training_it_says_what_there_is_to_learn(split, tmp_path, capsys):
    start(tune(split, tmp_path / "x", tune="top:1"))
    out = capsys.readouterr().out
    table, lines = {part: read(split / f"{part}.csv") for part in ("train", "val", "test")}, out.splitlines()
    header = next(line for line in lines if {"train", "val", "test"} <= {*line.split()}).split()
    for label in LABELS:
        (line,) = [line for line in lines if line.startswith(f"{label} ") and " of " in line]
        for part, cell in zip(header, line.removeprefix(label).strip().split("  "), strict=False):
            assert cell.strip() == f"{int((table[part][label] == 1).sum())} of {int(table[part][label].notna().sum())}"
    model = Classifier.load(RunFolder(tmp_path / "x") / "model", device="cpu")
    n_all = sum(weight.numel() for weight in model.parameters())
    block = sum(weight.numel() for name, weight in model.named_parameters() if ".layers.2." in name)
    n_trained = block + sum(weight.numel() for weight in model.heads.parameters())
    assert f"{n_trained:,} of {n_all:,} parameters are trained" in lines
    assert out.index("parameters are trained") < out.index("an epoch will take") < out.index("epoch   1")


def test_the_time_of_an_epoch_is_estimated_in_words(split, tmp_path, monkeypatch):
    config = tune(split, tmp_path)
    material, train = Material(config, read(split / "train.csv")), read(split / "train.csv")
    model = material.make_model(config, [LABELS])
    trainer, batches = make_trainer(config, model, train), make_batches(config, material, model, train, True)
    assert describe_time(trainer, batches) == "an epoch will take less than a second"
    for seconds, words in ((7.4, "about 7 seconds"), (600, "about 10 minutes")):
        monkeypatch.setattr("w2v2nb.fitting.estimate_epoch_s", lambda *_, seconds=seconds: seconds)
        assert describe_time(trainer, batches) == f"an epoch will take {words}"
    assert "6,885 of 286,325 parameters are trained" in describe({"train": train}, model)


def test_tensorboard_has_the_history_that_the_table_has(split, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain, shown = (start(tune(split, tmp_path / name, epochs=3, log=log)) for name, log in (("a", None), ("b", "tensorboard")))
    assert not (plain / "tensorboard").exists() and len(read(plain / "history.csv")) == 3
    history, events = read(shown / "history.csv"), EventAccumulator(str(shown / "tensorboard"))
    events.Reload()
    found = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert any(np.allclose(values, history.train_loss, atol=1e-5) for values in found.values())
    assert any(np.allclose(values, history.metric, atol=1e-5) for values in found.values())


@pytest.mark.parametrize("flags", ["", "--cache False", "--tune top:1"])
def test_a_training_that_runs_away_is_one_line_and_exit_status_1(split, tmp_path, capsys, flags):
    arguments = [
        "-i",
        samples.prefix(),
        "-d",
        str(split),
        "-l",
        samples.label_txt(),
        "-c",
        samples.checkpoint(),
        "--device",
        "cpu",
    ]
    assert main(["finetune", *arguments, "-o", str(tmp_path / "x"), *"-e 3 -lr 1e30 --dataset s".split(), *flags.split()]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("w2v2nb: the ") and "lower --learning_rate" in error and "--overwrite begins anew" in error
    assert any(uid in error for uid in read(split / "train.csv").uid)
    assert RunFolder(tmp_path / "x").about["state"] == "failed" and not (tmp_path / "x" / "s_model").exists()
