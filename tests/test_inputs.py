"""What a run reads and how it computes, from its configuration: splits, folds, targets, effects, objective, model, cache."""

import numpy as np
import pandas as pd
import pytest
import torch

from w2v2nb import samples
from w2v2nb.cache import VectorCache
from w2v2nb.config import ConfigError, configure
from w2v2nb.extract import embed_batch
from w2v2nb.inputs import (
    add_validation,
    find_unused,
    load_encoder,
    read_architecture,
    read_batches,
    read_classifiers,
    read_folds,
    read_parts,
    target_scale,
)
from w2v2nb.methods import check_ratings, make_model, read_cache, read_layers, read_objective, read_recipe, read_weights

SPLIT = samples.split_root()
ONE = f"{SPLIT}/train.csv"


def settings(root=SPLIT, **values):
    given = dict(prefix=samples.prefix(), label_txt=samples.label_txt(), checkpoint=samples.checkpoint(), device="cpu")
    return configure("finetune", **given, data_split_root=str(root), exp_dir="out", **values)


LABELS = sum(read_classifiers(settings()), [])


def people(table):
    return set(table["subject"])


@pytest.fixture(scope="module")
def with_val(tmp_path_factory):
    "A split's folder with a val.csv of people of its own."
    folder = tmp_path_factory.mktemp("split")
    train, test = (pd.read_csv(f"{SPLIT}/{part}.csv", dtype={"uid": str}) for part in ("train", "test"))
    is_held = train["subject"].isin(sorted(people(train))[:2])
    for part, table in {"train": train[~is_held], "val": train[is_held], "test": test}.items():
        table.to_csv(folder / f"{part}.csv", index=False)
    return folder


# Splits


@pytest.mark.parametrize("size", [0.25, 12])
@pytest.mark.parametrize("root", [SPLIT, ONE])
def test_people_to_validate_on_are_a_share_or_a_number_of_recordings(root, size):
    parts = read_parts(settings(root, val_share=size), LABELS)
    whole = len(parts["train"]) + len(parts["val"])
    assert abs(len(parts["val"]) - (size if size > 1 else size * whole)) <= 12
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not people(parts[a]) & people(parts[b])


@pytest.mark.parametrize("asked", [dict(patience=2), dict(layer="0,1"), dict(monitor="loss"), dict(search="dropout=0,0.5")])
def test_what_needs_people_to_validate_on_stops_without_them(asked, with_val):
    with pytest.raises(ConfigError, match=f"{next(iter(asked))} can only be judged on .*give val_share"):
        read_parts(settings(**asked), LABELS)
    with pytest.raises(ConfigError, match="give val_share"):
        read_folds(settings(with_val, **asked, folds=2), LABELS)
    assert "val" in read_parts(settings(with_val, **asked), LABELS)
    assert "val" in read_parts(settings(**asked, val_share=0.2), LABELS)
    assert all("val" in parts for _, parts in read_folds(settings(**asked, folds=2, val_share=0.2), LABELS))


def test_a_val_csv_goes_before_val_share_and_that_is_said(with_val):
    config = settings(with_val, val_share=0.5)
    own = pd.read_csv(with_val / "val.csv", dtype={"uid": str})
    assert read_parts(config, LABELS)["val"]["uid"].tolist() == own["uid"].tolist()
    assert find_unused(config) == ["val_share has no effect: the split has a validation table of its own"]
    assert find_unused(settings(with_val, test_share=0.3)) == ["test_share has no effect: the split has a test table of its own"]
    (sentence,) = find_unused(settings(with_val, val_share=0.5, folds=2))
    assert sentence.startswith("test.csv has no effect") and find_unused(settings(ONE, test_share=0.3)) == []


def test_nothing_is_taken_out_where_nothing_is_asked_for():
    parts = {"train": pd.read_csv(ONE)}
    assert add_validation(settings(), parts, LABELS) is parts


# Folds


def test_every_recording_is_tested_once_in_each_repetition():
    rounds = read_folds(settings(ONE, folds=3, repeats=2, val_share=0.2), LABELS)
    assert [(fold.repeat, fold.number) for fold, _ in rounds] == [(r, f) for r in (1, 2) for f in (1, 2, 3)]
    uids = sorted(pd.read_csv(ONE, dtype={"uid": str})["uid"])
    for repeat in (rounds[:3], rounds[3:]):
        assert sorted(uid for _, parts in repeat for uid in parts["test"]["uid"]) == uids
    assert people(rounds[0][1]["test"]) != people(rounds[3][1]["test"]), "another repetition has other folds"
    for _, parts in rounds:
        assert sorted(uid for table in parts.values() for uid in table["uid"]) == uids
        assert not people(parts["train"]) & people(parts["test"]) and not people(parts["val"]) & people(parts["test"])
        assert not people(parts["train"]) & people(parts["val"])


def test_the_test_table_of_a_folder_is_left_alone(with_val):
    tested = set().union(*(people(parts["test"]) for _, parts in read_folds(settings(with_val, folds=2), LABELS)))
    assert tested == people(pd.read_csv(with_val / "train.csv")) | people(pd.read_csv(with_val / "val.csv"))


def test_people_in_two_files_of_a_folder_are_refused_in_a_cross_validation_too(with_val, tmp_path):
    for part in ("train", "val"):
        pd.read_csv(with_val / f"{part}.csv", dtype={"uid": str}).to_csv(tmp_path / f"{part}.csv", index=False)
    pd.read_csv(with_val / "val.csv", dtype={"uid": str}).to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(ConfigError, match="share 2 subjects"):
        read_folds(settings(tmp_path, folds=2), LABELS)


# Targets, effects and shares of the work


@pytest.mark.parametrize(
    ("scale", "loss", "expected"),
    [(None, "BCE", None), ("clinical", "BCE", "clinical"), ("clinical", "CORN", "grades")],
)
def test_grades_are_for_corn_on_the_clinical_scale(scale, loss, expected):
    config = configure("eval-only", prefix="a", data_split_root="b", exp_dir="c", mdl_path="m", scale=scale)
    assert target_scale(config, loss) == expected
    if loss == "CORN":
        with pytest.raises(ValueError, match="give scale clinical"):
            target_scale(config.model_copy(update={"scale": None}), loss)


def read(config, **options):
    table = pd.read_csv(f"{SPLIT}/test.csv", dtype={"uid": str}).head(8)
    batches = read_batches(config, table, LABELS, read_architecture(config), **options)
    batches.set_epoch(1)
    with torch.no_grad():
        found = {uid: wave[:n].clone() for b in batches for uid, wave, n in zip(b.uids, b.waveform, b.lengths, strict=True)}
    batches.close()
    return found


def test_effects_are_for_training_only():
    plain, changed = read(settings()), read(settings(augment="noise,gain"))
    assert all(torch.equal(changed[uid], wave) for uid, wave in plain.items())
    trained = read(settings(augment="noise,gain"), is_training=True)
    assert trained.keys() == plain.keys() and any(not torch.equal(trained[uid], wave) for uid, wave in plain.items())


def test_effects_come_before_padding_and_checks():
    config = settings(augment="speed", padding="clip", clip_length=8000)
    assert {len(wave) for wave in read(config, is_training=True).values()} == {8000}


def test_processes_share_the_steps():
    config = settings(batch_size=4)
    shares = [read(config, is_training=True, rank=rank, n_ranks=2) for rank in (0, 1)]
    assert not shares[0].keys() & shares[1].keys() and len(shares[0]) + len(shares[1]) == 8


def test_targets_are_read_on_the_scale_that_is_asked_for():
    table = pd.read_csv(ONE, dtype={"uid": str})[["uid"]].head(2).assign(monopitch=[3, 6])
    config = settings(scale="clinical")
    for scale, expected in {None: 1, "grades": 3}.items():
        batches = read_batches(config, table, ["monopitch"], read_architecture(config), scale=scale)
        found = {uid: row.item() for b in batches for uid, row in zip(b.uids, b.targets, strict=True)}
        batches.close()
        assert np.array_equal([found[uid] for uid in table["uid"]], [expected, np.nan], equal_nan=True)


# How a run computes


def ratings(*rows):
    return pd.DataFrame(np.array(rows, dtype=float), columns=["a", "b"]).assign(uid=[f"u{i}" for i in range(len(rows))])


@pytest.mark.parametrize(
    ("pos_weight", "weights"),
    [(None, None), ("auto", [3.0, 1.0]), ("2", [2.0, 2.0]), ("2,0.5", [2.0, 0.5]), (4, [4.0, 4.0])],
)
def test_weights_of_positive_ratings(pos_weight, weights):
    config = settings(loss="BCE", pos_weight=pos_weight)
    objective = read_objective(config, [["a", "b"]], ratings((1, 1), (0, 0), (0, np.nan), (0, np.nan)))
    assert (None if objective.pos_weight is None else objective.pos_weight.tolist()) == weights


def test_as_many_weights_as_labels():
    with pytest.raises(ValueError, match="pos_weight has 3 numbers but there are 2 labels; give one"):
        read_weights(settings(loss="BCE", pos_weight="1,2,3"), torch.zeros(4, 2))


@pytest.mark.parametrize("values", [dict(loss="CE"), dict(search="loss=BCE,CE", val_share=0.2)])
@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_classes_that_do_not_exclude_each_other_stop_a_run(values, part):
    parts = dict.fromkeys(("train", "val", "test"), ratings((1, 0), (0, 1)))
    assert check_ratings(settings(**values), [["a", "b"]], parts) == []
    with pytest.raises(ValueError, match="exactly one"):
        check_ratings(settings(**values), [["a", "b"]], parts | {part: ratings((1, 0), (1, 1))})


def test_ratings_that_nothing_can_be_learned_or_chosen_by_stop_a_run():
    nothing, one_class, both = (ratings(*([x, x] for x in some)) for some in ([np.nan, np.nan], [1, 1], [1, 0]))
    with pytest.raises(ValueError, match="none of 2 recordings to learn from is rated"):
        check_ratings(settings(), [["a"]], {"train": nothing})
    parts = {"train": both, "val": one_class}
    (sentence,) = check_ratings(settings(val_share=0.2), [["a"]], parts)
    assert "the last epoch is taken" in sentence and check_ratings(settings(val_share=0.2), [["a"]], parts | {"val": both}) == []
    with pytest.raises(ValueError, match="rated both present and absent"):
        check_ratings(settings(val_share=0.2, patience=2), [["a"]], parts)
    assert check_ratings(settings(val_share=0.2, patience=2, monitor="loss"), [["a"]], parts) == []


def test_the_objective_has_what_the_configuration_says():
    config = settings(loss="focal", focal_gamma=1.5, label_smoothing=0.1)
    objective = read_objective(config, [["a"], ["b"]], ratings((1, 0), (0, 1)))
    assert (objective.loss, list(objective.sizes), objective.gamma, objective.smoothing) == ("focal", [1, 1], 1.5, 0.1)
    assert read_objective(settings(loss="CORN", scale="clinical"), [["a", "b"]], ratings((1, 5), (6, 2))).loss == "CORN"


@pytest.mark.parametrize(
    ("values", "trains"),
    [
        ({}, lambda name: False),
        (dict(tune="all", layer="weighted"), lambda name: True),
        (dict(tune="top:1"), lambda name: "layers.2" in name or "encoder.layer_norm" in name),
        (dict(tune="lora", lora_targets="k_proj"), lambda name: "lora_" in name),
    ],
)
def test_of_the_encoder_trains_what_the_configuration_says(values, trains):
    model = make_model(settings(**values), [LABELS])
    named = dict(model.encoder.named_parameters())
    moving = {name for name, weight in named.items() if weight.requires_grad}
    assert (not moving) == (not values)
    assert moving <= {name for name in named if trains(name)} and all(w.requires_grad for w in model.heads.parameters())


def test_heads_are_built_as_the_configuration_says():
    values = dict(head_size=12, activation="gelu", layer_norm=True, dropout=0.5, shared_dense=True, separate_heads=True)
    config = settings(**values, pooling_mode="mean+std", loss="BCE")
    model = make_model(config, read_classifiers(config))
    assert model.head == dict(size=12, activation="gelu", layer_norm=True, dropout=0.5, shared=True)
    assert model.pooling == "mean+std" and model.loss == "BCE" and len(model.classifiers) == len(LABELS)


def test_first_weights_follow_from_the_seed_even_on_an_encoder_that_is_reused():
    encoder = load_encoder(settings())
    one, same, other = (make_model(settings(seed=seed), [LABELS], encoder).heads.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_sweep_names_each_layer_once():
    encoder = load_encoder(settings())
    assert read_layers(settings(layer="0,-1", val_share=0.2), encoder) == [0, encoder.n_layers]
    with pytest.raises(ValueError, match="names one layer twice"):
        read_layers(settings(layer=f"-1,{encoder.n_layers}"), encoder)


def extraction(**values):
    return configure("extraction", prefix="a", data_split_root="b", exp_dir="c", mdl_path="m", **values)


@pytest.mark.parametrize("embedding", ["pooled", "dense"])
@pytest.mark.parametrize("values", [{}, dict(pooling_mode="mean+std"), dict(layer="weighted"), dict(pooling_mode="attention")])
def test_a_model_s_embedding_is_what_its_heads_get(values, embedding):
    model = make_model(settings(**values, head_size=6, activation="tanh"), [LABELS[:2], LABELS[2:]]).eval()
    recipe = read_recipe(extraction(embedding=embedding), model.encoder, model)
    table = pd.read_csv(f"{SPLIT}/test.csv", dtype={"uid": str}).head(3)
    batch = next(iter(read_batches(settings(), table, [], model.encoder.config)))
    with torch.no_grad():
        expected = model.embed(batch.waveform, batch.lengths)
        expected = [head.features(expected) for head in model.heads] if embedding == "dense" else [expected]
    _, columns = embed_batch(model.encoder, batch, recipe)
    assert len(columns) == len(expected)
    for found, value in zip(columns.values(), expected, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("values", [dict(layer="weighted"), dict(pooling_mode="attention")])
@pytest.mark.parametrize("cut", [dict(window=1), dict(chunk_s=5, clip_length=0)])
def test_a_model_that_takes_whole_recordings_is_not_given_parts(values, cut):
    model = make_model(settings(**values), [LABELS])
    with pytest.raises(ValueError, match=f"of whole recordings: leave out {next(iter(cut))}"):
        read_recipe(extraction(embedding="pooled", **cut), model.encoder, model)
    plain = make_model(settings(), [LABELS])
    assert read_recipe(extraction(embedding="pooled", **cut), plain.encoder, plain)


def test_the_cache_is_where_and_as_large_as_it_is_said(tmp_path, monkeypatch, capsys):
    assert read_cache(settings(cache=False)) is None and read_cache(settings(cache_gb=0)) is None
    cache = read_cache(settings(cache_dir=tmp_path / "here", cache_gb=0.5))
    assert isinstance(cache, VectorCache) and cache.max_bytes == 500_000_000
    cache.put({b"key": np.zeros(3)})
    cache.close()
    assert any((tmp_path / "here").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        read_cache(settings(cache_dir=tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read_cache(settings()) is None and "features are not kept for later runs" in capsys.readouterr().out
