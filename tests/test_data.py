"""data: missing stays missing, values off the scale are refused in one sentence, splits share no subject."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from w2v2nb import samples
from w2v2nb.data import (
    PARTS,
    WaveformDataset,
    check_disjoint,
    merge_raters,
    read_annotations,
    read_features,
    read_groups,
    read_labels,
    read_split,
    read_targets,
    save_split,
    split_by_group,
)

NAN = float("nan")


@pytest.fixture(scope="module")
def sample_table():
    return pd.concat([read_annotations(f"{samples.split_root()}/{part}.csv") for part in ("train", "test")], ignore_index=True)


# targets


def targets_of(values, scale=None):
    return read_targets(pd.DataFrame({"a": values}), ["a"], scale).ravel()


@pytest.mark.parametrize(
    "values, scale, expected",
    [
        ([0, 1], None, [0, 1]),
        ([0.0, 1.0, NAN], None, [0, 1, NAN]),
        (["0", "1", None, "1.0"], None, [0, 1, NAN, 1]),
        ([True, False], None, [1, 0]),
        ([NAN, NAN], None, [NAN, NAN]),
        ([None, None], None, [NAN, NAN]),
        ([-1, 1, 2, 3, 4, 5, 6], "clinical", [NAN, 0, 1, 1, 1, 1, NAN]),
        ([NAN, 1.0, 6.0], "clinical", [NAN, 0, NAN]),
        ([-1, 1, 2, 3, 4, 5, 6], "grades", [NAN, 1, 2, 3, 4, 5, NAN]),
        (["5", None, "1.0"], "grades", [5, NAN, 1]),
    ],
)
def test_scales(values, scale, expected):
    targets = targets_of(values, scale)
    assert targets.dtype == np.float32
    np.testing.assert_array_equal(targets, np.float32(expected))


def test_nullable_columns():
    np.testing.assert_array_equal(targets_of(pd.array([1, None, 0], dtype="Int64")), [1, NAN, 0])
    np.testing.assert_array_equal(targets_of(pd.array(["1", None], dtype="string")), [1, NAN])


@pytest.mark.parametrize(
    "values, scale, match",
    [
        ([0, 0.5, 2], None, "label 'a' has the value 0.5, 2.0 in row 2, 3.*correct or empty"),
        (["yes", None], None, "has the value yes in row 1 "),
        ([np.inf, 0], None, "has the value inf"),
        ([1, 2, 5], None, "say --scale clinical"),
        ([1, -1], None, "say --scale clinical"),
        ([0, 1], "clinical", "has the value 0 in row 1 .*-1, 1, 2, 3, 4, 5, 6 or empty"),
        ([2.5], "clinical", "has the value 2.5"),
        ([0, 1], "grades", "has the value 0 in row 1 .*-1, 1, 2, 3, 4, 5, 6 or empty"),
        ([1], "Clinical", r"scale is 'Clinical'; it should be one of \[None, 'clinical', 'grades'\]"),
    ],
)
def test_values_off_the_scale(values, scale, match):
    with pytest.raises(ValueError, match=match):
        targets_of(values, scale)


def test_missing_labels_come_with_the_nearest_column():
    table = pd.DataFrame({"uid": ["1"], "slow rate": [1], "Strained": [0]})
    with pytest.raises(ValueError, match=r"'slowrate' \(nearest column: 'slow rate'\), 'strained' \(.*: 'Strained'\)"):
        read_targets(table, ["slowrate", "strained"])
    with pytest.raises(ValueError, match="no column for label 'zzz'; its columns are: uid, slow rate, Strained"):
        read_targets(table, ["zzz"])


def test_no_labels():
    assert read_targets(pd.DataFrame({"uid": ["1", "2"]}), []).shape == (2, 0)


def test_raters_are_merged_by_maximum_in_order_of_first_appearance(write):
    table = read_annotations(
        write("uid,rater,subject,a,b\n02,x,s2,1,6\n01,x,s1,5,-1\n02,y,s2,3,\n01,y,s1,6,1\n03,y,s3,-1,\n"), several_raters=True
    )
    merged = merge_raters(table, ["a", "b"])
    assert merged["uid"].tolist() == ["02", "01", "03"] and merged["rater"].tolist() == ["x", "x", "y"]
    np.testing.assert_array_equal(merged[["a", "b"]].to_numpy(), [[3, NAN], [5, 1], [NAN, NAN]])
    np.testing.assert_array_equal(read_targets(merged, ["a", "b"], "clinical"), [[1, NAN], [1, 0], [NAN, NAN]])
    pd.testing.assert_frame_equal(merge_raters(merged, ["a", "b"]), merged)
    assert merge_raters(table, []).shape == (3, 5)


def test_features_of_the_samples_agree_with_their_table(sample_table):
    labels = read_labels(samples.label_txt())[0]
    features = read_features(sample_table["uid"], samples.prefix())
    assert features["uid"].tolist() == sample_table["uid"].tolist()
    np.testing.assert_array_equal(read_targets(features, labels, "clinical"), read_targets(sample_table, labels))


@pytest.mark.parametrize("listed", ['{"name": "a"}', '[{"name": "a"}]', '["a"]', '[{"score": 1}]'])
def test_features_of_another_form_are_refused(tmp_path, listed):
    (tmp_path / "01").mkdir()
    (tmp_path / "01" / "metadata.json").write_text(f'{{"features": {listed}}}')
    with pytest.raises(ValueError, match="01: features in metadata.json"):
        read_features(["01"], tmp_path)


def test_no_features(tmp_path):
    assert read_features(["01", "02"], tmp_path).to_dict("list") == {"uid": ["01", "02"]}


# the dataset


def echo(sample):
    return sample


def test_dataset_items():
    table = pd.DataFrame({"uid": ["007", "8"], "path": ["a/007.wav", None], "a": [1, None], "b": [0, 1]})
    dataset = pickle.loads(pickle.dumps(WaveformDataset(table, ["b", "a"], echo)))
    assert len(dataset) == 2 and dataset.target_labels == ["b", "a"] and dataset.uids == ["007", "8"]
    first, second = dataset[0], dataset[1]
    assert (first["uid"], first["path"], second["path"]) == ("007", "a/007.wav", None)
    np.testing.assert_array_equal([first["targets"], second["targets"]], np.float32([[0, 1], [1, NAN]]))
    first["targets"][:] = 9
    assert dataset[0]["targets"].max() == 1, "a transform may change its sample, not the dataset"
    with pytest.raises(IndexError):
        dataset[2]


def test_dataset_without_labels_path_or_default_index():
    table = pd.DataFrame({"uid": ["a", "b", "c"]}).iloc[[2, 0]]
    dataset = WaveformDataset(table, [], echo)
    assert [sample["uid"] for sample in dataset] == ["c", "a"]
    assert dataset[1]["targets"].shape == (0,) and dataset[1]["path"] is None


def test_dataset_on_the_clinical_scale():
    assert WaveformDataset(pd.DataFrame({"uid": ["1"], "a": [4]}), ["a"], echo, scale="clinical")[0]["targets"] == 1


# splits


def imbalance(whole, part, labels):
    return np.abs(np.nanmean(read_targets(part, labels), 0) - np.nanmean(read_targets(whole, labels), 0)).max()


def random_split(table, group, share, seed):
    groups = table[group].unique()
    held = np.random.default_rng(seed).permutation(groups)[: round(share * len(groups))]
    return table[table[group].isin(held)]


def check_split(table, labels, group, n_seeds=20):
    ours, random = [], []
    for seed in range(n_seeds):
        rest, held = split_by_group(table, labels, share=0.2, group=group, seed=seed)
        assert not set(rest[group]) & set(held[group])
        assert sorted([*rest["uid"], *held["uid"]]) == sorted(table["uid"])
        assert 0.15 < len(held) / len(table) < 0.25
        ours.append(imbalance(table, held, labels))
        random.append(imbalance(table, random_split(table, group, 0.2, seed), labels))
    assert np.mean(ours) < 0.7 * np.mean(random)


def test_split_of_the_samples(sample_table):
    check_split(sample_table, read_labels(samples.label_txt())[0], "subject")


@pytest.mark.skipif("W2V2NB_DATA" not in os.environ, reason="W2V2NB_DATA does not name a folder of real recordings")
@pytest.mark.parametrize("name, group", [("svd", "pair"), ("svd", "subject"), ("librispeech", "subject")])
def test_split_of_real_data(name, group):
    folder = Path(os.environ["W2V2NB_DATA"]) / name
    check_split(read_annotations(folder / "all.csv", group), read_labels(folder / "labels.txt")[0], group)


def test_split_is_deterministic_keeps_order_and_follows_the_seed(sample_table):
    labels = read_labels(samples.label_txt())[0]
    splits = [split_by_group(sample_table, labels, seed=seed)[1]["uid"].tolist() for seed in (0, 0, 1, 2, 3)]
    assert splits[0] == splits[1] and len({str(uids) for uids in splits}) > 1
    position = {uid: i for i, uid in enumerate(sample_table["uid"])}
    assert splits[0] == sorted(splits[0], key=position.get)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("n_groups", [2, 3, 7])
def test_neither_part_is_ever_empty(share, n_groups):
    table = pd.DataFrame({"uid": [str(i) for i in range(20)], "subject": [i % n_groups for i in range(20)], "a": [0, 1] * 10})
    rest, held = split_by_group(table, ["a"], share=share)
    assert len(rest) and len(held)


def test_split_with_few_ratings_and_on_the_clinical_scale():
    table = pd.DataFrame({"uid": list("abcdef"), "subject": list("uvwxyz"), "a": [None] * 6, "b": [2, 1, 6, -1, 5, 1]})
    assert len(split_by_group(table, ["a"], share=0.5)[1]) == 3
    assert len(split_by_group(table, ["b"], share=0.5, scale="clinical")[1]) == 3
    assert len(split_by_group(table, [], share=0.5)[1]) == 3


def test_every_grade_is_divided_where_grades_are_targets():
    grades = np.random.default_rng(0).permutation(np.repeat([1, 2, 3, 4, 5], 20))
    table = pd.DataFrame({"uid": [str(i) for i in range(100)], "subject": [f"s{i}" for i in range(100)], "a": grades})
    held = split_by_group(table, ["a"], share=0.25, scale="grades")[1]
    assert held["a"].value_counts().sort_index().tolist() == [5] * 5


def test_groups_of_very_different_size():
    subjects = ["big"] * 60 + [f"s{i}" for i in range(40)]
    table = pd.DataFrame({"uid": [str(i) for i in range(100)], "subject": subjects, "a": [i % 2 for i in range(100)]})
    rest, held = split_by_group(table, ["a"], share=0.2)
    assert set(held["subject"]) < {f"s{i}" for i in range(40)} and abs(len(held) - 20) <= 2


def pairs_of_few_subjects(**columns):
    "Forty rows, each a pair of its own, of eight subjects."
    rows = range(40)
    table = pd.DataFrame({"uid": [f"u{i}" for i in rows], "pair": [f"p{i}" for i in rows], "a": [i // 8 % 2 for i in rows]})
    return table.assign(**{"subject": [f"s{i % 8}" for i in rows], **columns})


def test_no_subject_is_divided_when_another_group_is_kept_together():
    for seed in range(5):
        rest, held = split_by_group(pairs_of_few_subjects(), ["a"], share=0.25, group="pair", seed=seed)
        assert len(held) == 10 and not set(rest["subject"]) & set(held["subject"])
        check_disjoint(rest, held, "pair")


def test_groups_and_subjects_hold_together_over_several_steps():
    pairs, subjects = list("aabbccd"), ["s1", "s2", "s2", "s3", "s4", None, None]
    table = pd.DataFrame({"uid": list("1234567"), "pair": pairs, "subject": subjects}, index=[3] * 7)
    assert read_groups(table, "pair").tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert read_groups(table.assign(subject=None), "pair").tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert read_groups(table.drop(columns="subject"), "pair").tolist() == [0, 0, 1, 1, 2, 2, 3]
    with pytest.raises(ValueError, match="subject is empty for uid 6, 7;"):
        read_groups(table, "subject")


def test_groups_that_all_hang_together_cannot_be_split():
    with pytest.raises(ValueError, match="pair has groups that share subjects"):
        split_by_group(pairs_of_few_subjects(subject="s"), ["a"], group="pair")


@pytest.mark.parametrize(
    "change, kwargs, match",
    [
        ({}, dict(group="pair"), "no column 'pair' to keep together; its columns are: uid, subject, a.*--group"),
        ({"subject": ["s1", None, "s2"]}, {}, "subject is empty for uid 2; "),
        ({"subject": ["s1"] * 3}, {}, "same value everywhere"),
        ({}, dict(share=0), "between 0 and 1"),
        ({}, dict(share=1.0), "between 0 and 1"),
    ],
)
def test_wrong_splits(change, kwargs, match):
    table = pd.DataFrame({"uid": ["1", "2", "3"], "subject": ["s1", "s2", "s3"], "a": [0, 1, 1]}).assign(**change)
    with pytest.raises(ValueError, match=match):
        split_by_group(table, ["a"], **kwargs)


def table_of(uids, subjects=None, **columns):
    table = pd.DataFrame({"uid": list(uids), **columns})
    return table if subjects is None else table.assign(subject=subjects)


def test_disjoint_tables_pass():
    check_disjoint(table_of("ab", ["s1", "s2"]), table_of("cd", ["s3", "s3"]))
    check_disjoint(table_of("ab", ["s1", None]), table_of("cd", [None, "s3"]))
    check_disjoint(table_of("ab"), table_of("cd"))
    check_disjoint(table_of("ab", ["s1", "s2"]), table_of("cd"))


def test_shared_subjects_are_counted_and_located():
    train = table_of([f"r{i}" for i in range(9)], ["anna"] * 7 + ["ben", "carl"])
    test = table_of(["t0", "t1", "t2"], ["anna", "carl", "dora"])
    with pytest.raises(ValueError) as e:
        check_disjoint(train, test)
    message = str(e.value)
    assert "train.csv and test.csv share 2 subjects" in message and "--allow_overlap" in message
    assert "train.csv: r0, r1, r2, r3, r4 and 3 more; test.csv: t0, t1)" in message
    assert "anna" not in message, "no identifiers beyond the uid"


def test_another_group_does_not_switch_the_subject_check_off():
    train = table_of("ab", ["s1", "s2"], pair=["p", "q"])
    test = table_of("cd", ["s1", "s3"], pair=["r", "s"])
    with pytest.raises(ValueError, match="share 1 subject .*train.csv: a; test.csv: c"):
        check_disjoint(train, test, group="pair")
    check_disjoint(train.drop(columns="subject"), test, group="pair")


@pytest.mark.parametrize("group", ["subject", "pair", "not there"])
def test_overlap_is_allowed_for_people_but_never_for_recordings(group):
    train, test = table_of("ab", ["s1", "s2"], pair=["p", "q"]), table_of("cd", ["s1", "s3"], pair=["p", "r"])
    check_disjoint(train, test, group, allow_overlap=True)
    with pytest.raises(ValueError, match="share 1 uid ") as e:
        check_disjoint(train, test.assign(uid=["c", "b"]), group, allow_overlap=True)
    assert "allow_overlap" not in str(e.value)


def test_shared_recordings_are_refused_with_and_without_subjects():
    for subjects in (None, ["s1", "s2"]):
        other = None if subjects is None else ["s3", "s4"]
        with pytest.raises(ValueError, match="a.csv and b.csv share 1 uid .*a.csv: y; b.csv: y"):
            check_disjoint(table_of("xy", subjects), table_of("yz", other), names=("a.csv", "b.csv"))


def test_named_group_must_be_there():
    with pytest.raises(ValueError, match="do not both have a column 'pair'"):
        check_disjoint(table_of("a", pair=["1"]), table_of("b"), group="pair")
    with pytest.raises(ValueError, match="share 1 pair "):
        check_disjoint(table_of("a", pair=["1"]), table_of("b", pair=["1"]), group="pair")


def test_the_samples_share_no_voice():
    check_disjoint(**read_split(samples.split_root()))


# a split's folder


@pytest.mark.parametrize("val", [None, "val.csv", "validation.csv"])
def test_read_split(write, tmp_path, val):
    for k, name in enumerate(["train.csv", "test.csv", *([val] if val else [])]):
        write(f"uid,pair\n0{k},07\n", name)
    parts = read_split(tmp_path, group="pair")
    assert list(parts) == ["train", "test", "val"][: 2 + bool(val)]
    assert [table["uid"][0] for table in parts.values()] == ["00", "01", "02"][: len(parts)]
    assert parts["train"]["pair"][0] == "07"


@pytest.mark.parametrize(
    "files, error, match",
    [
        (["test.csv", "notes.txt"], FileNotFoundError, "lacks train.csv; it holds: notes.txt, test.csv"),
        (["validation.csv"], FileNotFoundError, "lacks train.csv and test.csv; it holds: validation.csv"),
        ([], FileNotFoundError, "it holds: nothing"),
        (["train.csv", "test.csv", "val.csv", "validation.csv"], ValueError, "both val.csv and validation.csv"),
    ],
)
def test_wrong_split_folders(write, tmp_path, files, error, match):
    for name in files:
        write("uid\n1\n", name)
    with pytest.raises(error, match=match):
        read_split(tmp_path)


def test_split_round_trip(tmp_path, sample_table):
    labels = read_labels(samples.label_txt())[0]
    rest, val = split_by_group(sample_table, labels)
    save_split(tmp_path / "new" / "split", {"train": rest, "val": val, "test": val})
    parts = read_split(tmp_path / "new" / "split")
    assert sorted(os.listdir(tmp_path / "new" / "split")) == ["test.csv", "train.csv", "val.csv"]
    for table, part in [(rest, "train"), (val, "val")]:
        pd.testing.assert_frame_equal(parts[part], table, check_dtype=False)
        np.testing.assert_array_equal(read_targets(parts[part], labels), read_targets(table, labels))
    assert ".0" not in (tmp_path / "new" / "split" / "val.csv").read_text()


def test_unknown_parts_are_refused_before_anything_is_written(tmp_path, sample_table):
    with pytest.raises(ValueError, match="no part dev; its parts are train, test, val"):
        save_split(tmp_path / "split", {"train": sample_table, "dev": sample_table})
    assert not (tmp_path / "split").exists() and list(PARTS) == ["train", "test", "val"]


def test_importing_data_imports_no_torch():
    code = "import sys, w2v2nb.data; print([m for m in ('torch', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
