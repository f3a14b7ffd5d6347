"""The mistakes of whole runs: which they are for each kind of loss, and what a second's score is."""

import io
import shutil
from html import unescape

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from w2v2nb import samples
from w2v2nb.config import configure
from w2v2nb.folder import RunFolder
from w2v2nb.mistakes import errors, find_kinds, gather_facts, make_shelf, rank_errors, read_run
from w2v2nb.model import Classifier, score_recordings
from w2v2nb.run import start
from w2v2nb.seconds import cut_windows, find_culprit, heard_waveform, score_windows

RATINGS = {
    "BCE": ("strained,breathy", lambda table: table),
    "CE": ("low,high,middle", lambda table: add_classes(table)),
    "CORN": ("strained", lambda table: table.assign(strained=[1 + i % 5 for i in range(len(table))])),
}


def add_classes(table):
    "Three labels that exclude one another; one recording is not rated."
    columns = {name: [float(i % 3 == k) for i in range(len(table))] for k, name in enumerate(("low", "high", "middle"))}
    table = table.assign(**columns)
    table.loc[2, list(columns)] = np.nan
    return table


def write_split(folder, loss):
    labels, change = RATINGS[loss]
    folder.mkdir()
    (folder / "labels.txt").write_text(labels + "\n")
    for name, n in (("train", 16), ("test", 12)):
        table = pd.read_csv(f"{samples.split_root()}/{name}.csv", dtype={"uid": str}).head(n)
        change(table).to_csv(folder / f"{name}.csv", index=False)
    return folder


def finetune(split, exp_dir, **values):
    about = dict(prefix=samples.prefix(), data_split_root=str(split), label_txt=f"{split}/labels.txt", exp_dir=str(exp_dir))
    about |= dict(checkpoint=samples.checkpoint(), dataset="few", epochs=2, cache=False, device="cpu") | values
    return start(configure(**about)).path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Runs by loss, and eval-only and a cross-validation."
    root, found = tmp_path_factory.mktemp("runs"), {}
    for loss in RATINGS:
        split = write_split(root / f"split-{loss}", loss)
        scale = dict(scale="clinical") if loss == "CORN" else {}
        found[loss] = finetune(split, root / loss, loss=loss, trim=loss == "BCE", **scale)
    about = dict(prefix=samples.prefix(), data_split_root=f"{root}/split-CE/test.csv", exp_dir=str(root / "eval"), device="cpu")
    found["eval-only"] = start(configure("eval-only", **about, mdl_path=str(found["CE"] / "few_model"), dataset="x")).path
    found["folds"] = finetune(root / "split-BCE", root / "folds", folds=2, repeats=2, epochs=1)
    return found


@pytest.mark.parametrize("run", ["BCE", "CE", "CORN", "eval-only", "folds"])
def test_mistakes_are_sorted_and_every_rated_recording_is_of_one_kind(runs, run):
    judged = read_run(runs[run])
    for label in judged.labels:
        rows = rank_errors(judged, label)
        assert len(rows) == judged.predictions[f"{label}_target"].notna().sum() > 0
        assert rows["error"].is_monotonic_decreasing and rows["uid"].is_unique
        assert np.allclose(rows["error"], (rows["target"] - rows["score"]).abs())
        parts = [rank_errors(judged, label, kind) for kind in ("missed", "false alarm", "right")]
        assert sorted(pd.concat(parts)["uid"]) == sorted(rows["uid"])


@pytest.mark.parametrize("run", ["CE", "eval-only"])
def test_of_exclusive_labels_the_highest_score_decides(runs, run):
    judged = read_run(runs[run])
    scores = judged.predictions.set_index("uid")[[f"{name}_score" for name in ("low", "high", "middle")]]
    assert judged.loss == "CE" and (scores.max(axis=1) < 0.5).any()  # where half would be the wrong border
    for label in judged.labels:
        rows = rank_errors(judged, label).set_index("uid")
        winner = scores.loc[rows.index].idxmax(axis=1).str.removesuffix("_score")
        assert (rows["chosen"] == winner).all()
        wrong = np.where(winner == label, "false alarm", "missed")
        expected = np.where((winner == label) == (rows["target"] == 1), "right", wrong)
        assert (rows["kind"] == expected).all()


def test_of_grades_half_a_grade_is_the_border(runs):
    rows = rank_errors(read_run(runs["CORN"]), "strained")
    assert set(rows["target"]) > {1, 5} and rows["score"].between(1, 5).all() and "chosen" not in rows
    nearest = (rows["score"] - rows["target"]).abs() < 0.5
    assert ((rows["kind"] == "right") == nearest).all() and (rows["kind"] == "missed").any()


KIND_CASES = [(1, 0.4, "missed"), (1, 1.6, "right"), (0, 0.6, "false alarm"), (0, -0.7, "right")]
GRADE_CASES = [(1, 1.7, "false alarm"), (4, 5, "false alarm"), (4, 3.4, "missed"), (4, 3.7, "right")]


@pytest.mark.parametrize("is_graded, cases", [(False, KIND_CASES), (True, GRADE_CASES)])
def test_kinds(is_graded, cases):
    for target, score, kind in cases:
        assert find_kinds(np.array([float(target)]), np.array([score]), is_graded=is_graded).tolist() == [kind]


def test_a_cross_validation_counts_each_recording_once_with_its_mean_score(runs):
    judged = read_run(runs["folds"])
    table = pd.read_csv(runs["folds"] / "few_predictions.csv", dtype={"uid": str})
    assert len(table) == 2 * len(judged.predictions)
    expected = table.groupby("uid")["strained_score"].mean()
    assert np.allclose(judged.predictions.set_index("uid")["strained_score"], expected.loc[judged.predictions["uid"]])
    view = errors(judged.folder)
    view.pick.index = 0
    assert view.seconds.ask.disabled and "model is not there" in view.seconds.notice.value


def test_runs_without_predictions_are_refused(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        errors(tmp_path / "nowhere")
    shutil.copytree(runs["BCE"], tmp_path / "run")
    (tmp_path / "run" / "few_predictions.csv").unlink()
    with pytest.raises(FileNotFoundError, match="has no predictions .mode finetune"):
        errors(tmp_path / "run")


@pytest.mark.parametrize("n, window, hop", [(16000, 8000, 3000), (500, 8000, 10), (8001, 8000, 9), (1, 1, 1)])
def test_windows_cover_the_recording_and_differ(n, window, hop):
    limits = cut_windows(n, window, hop)
    is_heard = np.zeros(n, bool)
    for first, end in limits:
        assert end - first == min(window, n)
        is_heard[first:end] = True
    assert is_heard.all() and len(set(limits)) == len(limits) and limits == sorted(limits)
    assert len(cut_windows(n, n, hop)) == 1


@pytest.mark.parametrize("run", ["BCE", "CE", "CORN", "eval-only"])
def test_a_window_as_long_as_the_recording_has_the_score_of_the_run(runs, run):
    judged = read_run(runs[run])
    shelf, model = make_shelf(judged), Classifier.load(judged.model_place, device="cpu")
    for uid in judged.predictions["uid"][:3]:
        windows = score_windows(model, *heard_waveform(judged.parameters, shelf.read(uid)), window_s=60)
        expected = gather_facts(judged, uid).set_index("label")["score"]
        assert len(windows) == 1 and np.allclose(windows.iloc[0][expected.index].astype(float), expected, atol=1e-4)


def test_a_windows_score_is_that_of_its_sound_alone(runs):
    judged = read_run(runs["CE"])
    model = Classifier.load(judged.model_place, device="cpu")
    wave, rate_hz = heard_waveform(judged.parameters, make_shelf(judged).read(judged.predictions["uid"][0]))
    windows = score_windows(model, wave, rate_hz, 0.5, 0.2)
    assert np.allclose(windows[model.labels].sum(axis=1), 1, atol=1e-5)  # probabilities of exclusive labels
    alone = score_recordings(model, [torch.from_numpy(wave[6400:14400])])[0]
    assert windows["start_s"][2] == 0.4 and np.allclose(windows[model.labels].iloc[2], alone, atol=1e-5)


@pytest.mark.parametrize("target, score, k", [(1, 0.2, 0), (0, 0.7, 1), (5, 3, 0)])
def test_the_second_that_made_the_score_is_on_the_side_of_the_error(target, score, k):
    assert find_culprit([0.1, 0.9, 0.4], target, score) == k


@pytest.mark.parametrize("run", ["BCE", "CE", "CORN"])
def test_from_the_list_to_the_second(runs, run):
    view = errors(runs[run], device="cpu")
    assert view.pick.index is None and not view.seconds.shelf.kept and view.seconds.model is None
    for label in view.label.options:
        view.label.value = label
        assert view.pick.index is None and view.seconds.ask.disabled
        view.pick.index = 0
        row = view.ranking.rows.iloc[0]
        assert view.card.uid == row["uid"] and view.pick.options[0].startswith(row["uid"]) and view.card.player.value
        assert view.card.facts.value.count("<tr") == 1 + len(view.judged.labels) and not view.seconds.player.value
        view.seconds.ask.click()
        assert "img" in view.seconds.picture.value and "alert" not in view.seconds.notice.value
        values = view.seconds.windows[label]
        assert view.seconds.pick.index == (values.idxmax() if row["score"] >= row["target"] else values.idxmin())
        wave, rate_hz = view.seconds.sound
        view.seconds.pick.index = 1
        heard, heard_hz = soundfile.read(io.BytesIO(view.seconds.player.value), dtype="float32")
        assert heard_hz == rate_hz and np.allclose(heard, wave[rate_hz // 4 : rate_hz // 4 + len(heard)], atol=1e-4)
        model = view.seconds.model
        view.seconds.ask.click()
        assert view.seconds.model is model
    view.pick.index = 1
    assert not view.seconds.picture.value and not view.seconds.pick.options


def test_kinds_filter_the_list_and_an_empty_one_is_no_error(runs):
    view = errors(runs["BCE"])
    for kind in ("missed", "false alarm", "right"):
        view.kind.value = kind
        assert len(view.pick.options) == len(rank_errors(view.judged, view.label.value, kind))
        assert f"{len(view.pick.options)} of" in view.ranking.notice.value
        form = view.static()
        assert ("<img" in form) == bool(view.pick.options)


def test_a_recording_that_is_gone_is_said_in_a_sentence(runs, tmp_path):
    view = errors(runs["BCE"], prefix=str(tmp_path))
    view.pick.index = 0
    assert "neither" in view.card.notice.value
    view.seconds.ask.click()
    assert "neither" in view.seconds.notice.value and view.seconds.windows is None and not view.seconds.pick.options


def test_a_column_path_says_where_recordings_are(tmp_path, runs):
    judged = read_run(runs["BCE"])
    place = tmp_path / "run"
    shutil.copytree(runs["BCE"], place)
    table = pd.read_csv(place / "few_split" / "test.csv", dtype={"uid": str})
    paths = [f"{samples.prefix()}/{uid}/waveform.flac" for uid in table["uid"]]
    table.assign(path=paths).to_csv(place / "few_split" / "test.csv", index=False)
    shelf = make_shelf(read_run(place), prefix=str(tmp_path))
    assert shelf.read(judged.predictions["uid"][0])["waveform"].shape[1] > 0


def test_text_from_the_table_is_escaped(runs, tmp_path):
    shutil.copytree(runs["BCE"], tmp_path / "run")
    path = tmp_path / "run" / "few_predictions.csv"
    table = pd.read_csv(path, dtype={"uid": str})
    table["uid"] = "<script>" + table["uid"]
    table.columns = [c.replace("strained", "<i>strained") for c in table.columns]
    table.to_csv(path, index=False)
    view = errors(RunFolder(tmp_path / "run"))
    form = view.static()
    assert "<script" not in form and "<i>" not in form and "<script>" in unescape(form)
    assert "<script" not in view.card.notice.value + view.ranking.notice.value
