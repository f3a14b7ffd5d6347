"""rating and session: keys, the file of ratings through reopening, other raters, faults and a kill, and back into finetune."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import soundfile

from w2v2nb import samples, storage
from w2v2nb.config import configure
from w2v2nb.data import merge_raters, read_annotations, read_targets
from w2v2nb.rating import annotate, new_keys
from w2v2nb.run import start
from w2v2nb.session import SCALES

LABELS = ["strained", "breathy"]
TEST = f"{samples.split_root()}/test.csv"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "ratings.csv"


@pytest.fixture
def session(out):
    "Open a session on the shipped recordings."
    return lambda labels=LABELS, table=TEST, **given: annotate(table, labels, samples.prefix(), **{"out": out, **given})


def read(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def type_keys(view, text):
    "Type as in a browser: the field's value key by key."
    for key in text:
        view.key.value = key
        assert view.key.value == ""


def where(view):
    return view.progress.value.partition(">")[2].partition("<")[0]


# Keys


@pytest.mark.parametrize(
    "text, before, is_there, keys",
    [
        ("3", "", False, "3"),
        ("345", "", False, "345"),
        ("34", "3", True, "4"),  # went on before the field was emptied
        ("34", "3", False, "4"),  # was on its way when it was
        ("3", "3", False, "3"),  # again
        ("4", "3", False, "4"),
        ("3", "34", True, ""),  # deleted
        ("3", "34", False, "3"),
        ("", "3", True, ""),
        ("4cold", "", False, "4c"),
        ("4cold", "4c", True, ""),
    ],
)
def test_keys_of_a_field(text, before, is_there, keys):
    assert new_keys(text, before, is_there) == keys


def test_a_burst_is_taken_key_by_key(session, out):
    view = session()
    view.key.value = "345"
    assert read(out)[LABELS].values.tolist() == [["3", "4"], ["5", ""]]
    assert where(view) == "recording 2 of 48, label 2 of 2: breathy" and view.key.value == ""


def test_a_key_that_was_on_its_way_is_not_taken_twice(session, out):
    view = session()
    view.key.value = "3"
    view.key.value = "34"
    assert read(out)[LABELS].values.tolist() == [["3", "4"]]


def test_the_actions(session, out):
    view = session()
    type_keys(view, "1")
    type_keys(view, "b")
    assert where(view) == "recording 1 of 48, label 1 of 2: strained, rated 1"
    type_keys(view, "4")
    assert where(view) == "recording 1 of 48, label 2 of 2: breathy"
    type_keys(view, "s")
    assert where(view) == "recording 2 of 48, label 1 of 2: strained"
    type_keys(view, "?")
    assert "p play again" in view.notice.value
    type_keys(view, "x")
    assert "x is no key" in view.notice.value
    assert read(out)[LABELS].values.tolist() == [["4", ""]]


def test_buttons_do_what_keys_do(session, out, tmp_path):
    keys, buttons = session(), session(out=tmp_path / "buttons.csv")
    for key in "23sb4?":
        type_keys(keys, key)
        buttons.buttons[key].click()
        assert keys.progress.value == buttons.progress.value
    assert out.read_text() == (tmp_path / "buttons.csv").read_text()
    assert all(button.description for button in buttons.buttons.values())
    assert set(buttons.buttons) == {*"12345", *"pbscr?"}


def test_yes_and_no(session, out):
    view = session(scale="yes/no")
    for key in "yN10":
        type_keys(view, key)
    type_keys(view, "4")
    assert "4 is no key" in view.notice.value
    assert read(out)[LABELS].values.tolist() == [["1", "0"], ["1", "0"]]
    assert read_targets(read_annotations(out), LABELS).tolist() == [[1, 0], [1, 0]]


# Sound


def test_the_next_recording_is_played_and_the_first_waits(session):
    view = session()
    first = view.sound.player.value
    assert not view.sound.player.autoplay and len(first) > 44
    type_keys(view, "1")
    assert view.sound.player.value == first and not view.sound.player.autoplay  # the next label of the same recording
    type_keys(view, "1")
    assert view.sound.player.value != first and view.sound.player.autoplay


def test_played_again_is_a_change_that_the_browser_sees(session):
    view, seen = session(), []
    view.sound.player.observe(lambda change: seen.append(change["new"]), "autoplay")
    for key in "ppp":
        type_keys(view, key)
    assert seen[-2:] == [False, True] and seen.count(True) == 3


def test_nobody_is_shown_a_picture_unasked(session):
    view = session()
    assert view.sound.picture.value == ""
    view.sound.is_seen.value = True
    assert "<img alt=" in view.sound.picture.value
    view.sound.is_seen.value = False
    assert view.sound.picture.value == ""


def test_a_recording_that_cannot_be_read_is_told_and_can_be_skipped(tmp_path, out):
    for uid in "abc":
        soundfile.write(tmp_path / f"{uid}.wav", np.zeros(1600), 16000)
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    table = pd.DataFrame({"uid": [*"abc"], "path": [f"{uid}.wav" for uid in "abc"]})
    view = annotate(table, ["strained"], str(tmp_path), out=out)
    type_keys(view, "1")
    assert "b: decode" in view.sound.notice.value and view.sound.player.value == b""
    type_keys(view, "s")
    assert view.sound.notice.value.count("decode") == 0 and len(view.sound.player.value) > 44
    type_keys(view, "2")
    assert read(out)[["uid", "path", "strained"]].values.tolist() == [["a", "a.wav", "1"], ["c", "c.wav", "2"]]


# The file


def test_a_session_goes_on_where_it_stopped_and_asks_again_for_what_was_skipped(session):
    type_keys(session(), "12s4")
    view = session()
    assert where(view) == "recording 2 of 48, label 1 of 2: strained"
    type_keys(view, "5")
    assert where(view) == "recording 3 of 48, label 1 of 2: strained"


def test_the_end(session, out):
    table = read_annotations(TEST).head(2)
    view = session(table=table)
    type_keys(view, "1234")
    assert where(view) == "the end: 4 of 4 ratings are given; a new session asks for the others again"
    assert view.comment.disabled
    for key in "1psc":
        type_keys(view, key)
    assert read(out)[LABELS].values.tolist() == [["1", "2"], ["3", "4"]]
    type_keys(view, "b")
    assert where(view) == "recording 2 of 2, label 2 of 2: breathy, rated 4" and not view.comment.disabled
    assert where(session(table=table)).startswith("the end")


def test_comments_stay_with_their_recording(session, out):
    view = session()
    view.comment.value = 'a "loud", distant voice; NA; 007'
    type_keys(view, "12")
    assert view.comment.value == ""
    view.comment.value = "007"
    type_keys(view, "bs")
    again = session()
    type_keys(again, "b")
    assert again.comment.value == 'a "loud", distant voice; NA; 007'
    assert read(out)["comment"].tolist() == ['a "loud", distant voice; NA; 007', "007"]
    assert read(out)[LABELS].values.tolist() == [["1", "2"], ["", ""]]


def test_a_second_rater_writes_rows_of_their_own(session, out):
    ann, bo = session(rater="Ann"), session(rater="Bo")
    type_keys(ann, "12")
    type_keys(bo, "34")
    type_keys(ann, "5")  # after Bo, and from a session that was opened before
    rows = read(out)
    assert rows[["rater", *LABELS]].values.tolist() == [["Ann", "1", "2"], ["Bo", "3", "4"], ["Ann", "5", ""]]
    merged = merge_raters(read_annotations(out, several_raters=True), LABELS)
    assert merged[LABELS].head(1).values.tolist() == [[3, 4]] and len(merged) == 2
    view = session(rater="Cy")
    assert "Ann, Bo" in view.notice.value and where(view).startswith("recording 1 of 48, label 1")


def test_the_order_is_that_of_the_seed(session, tmp_path):
    orders = []
    for seed in (None, 1, 1, 2):
        view = session(["strained"], read_annotations(TEST).head(8), seed=seed, out=tmp_path / f"{len(orders)}.csv")
        orders.append([uid for uid, _ in view.session.questions])
    assert orders[0] == read_annotations(TEST)["uid"].tolist()[:8]
    assert orders[1] == orders[2] and len({tuple(order) for order in orders}) == 3 and len({frozenset(o) for o in orders}) == 1


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "has the columns of no table"),
        (b"uid,strained\n01,1\n", "give another file as out"),
        (b"uid,strained,breathy,comment,rater,age\n01,1,1,,A,60\n", "give another file as out"),
        (b"uid,strained,comment,rater\n01,1,,A\n", "give another file as out"),
        (b"uid,strained,breathy,comment,rater\n01,9,1,,A\n", "ratings.csv: label 'strained' has the value 9"),
        (b"uid,strained,breathy,comment,rater\n01,1,1,,A\n01,2,1,,A\n", "more than one row of a rater"),
        (b"uid,strained,breathy,comment,rater\n01,1,1,,A,,\n", "not a table of 5 columns"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_file_of_another_shape_is_left_alone(session, out, content, sentence):
    out.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        session()
    assert out.read_bytes() == content


@pytest.mark.parametrize(
    "given, error, sentence",
    [
        (dict(labels=[]), ValueError, "one name or more"),
        (dict(labels=["a", "a"]), ValueError, "each once"),
        (dict(labels=["rater"]), ValueError, "column of another kind"),
        (dict(labels="no/labels.txt"), FileNotFoundError, "no/labels.txt"),
        (dict(scale="1-7"), ValueError, "1-5, yes/no"),
        (dict(table=pd.DataFrame({"name": ["a"]})), ValueError, "uid should be one"),
    ],
)
def test_wrong_arguments(session, given, error, sentence):
    with pytest.raises(error, match=sentence):
        session(**given)


def test_of_yes_and_no_each_rater_has_a_file(session, out):
    type_keys(session(scale="yes/no", rater="Ann"), "y")
    with pytest.raises(ValueError, match="holds ratings by Ann; of yes and no each rater has a file"):
        session(scale="yes/no", rater="Bo")


def test_what_could_not_be_saved_was_not_rated(session, out):
    view = session()
    type_keys(view, "1")
    kept = out.read_bytes()
    out.write_bytes(b"uid,other\n")  # somebody else wrote there
    type_keys(view, "5")
    assert 'role="alert"' in view.notice.value and "uid, other" in view.notice.value
    assert where(view) == "recording 1 of 48, label 2 of 2: breathy" and out.read_bytes() == b"uid,other\n"
    out.write_bytes(kept)
    type_keys(view, "4")
    assert read(out)[LABELS].values.tolist() == [["1", "4"]] and "alert" not in view.notice.value


def test_ratings_in_a_bucket(session, bucket):
    out = f"{bucket.uri}/ratings.csv"
    type_keys(session(out=out, rater="Ann"), "12")
    storage.forget()
    type_keys(session(out=out, rater="Ann"), "3")
    rows = [line.split(",")[2:] for line in storage.read_text(out).splitlines()[1:]]
    assert rows == [["1", "2", "", "Ann"], ["3", "", "", "Ann"]]


RATES = """
import sys
from w2v2nb import samples
from w2v2nb.rating import annotate
view = annotate(f"{samples.split_root()}/test.csv", ["strained", "breathy"], samples.prefix(), out=sys.argv[1])
print("ready", flush=True)
while view.session.question:
    view.key.value = "3"
    print(view.session.place, flush=True)
"""


def test_a_kill_leaves_a_whole_file(out):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        n_before = 2 * len(read(out)) if out.exists() else 0
        rater = subprocess.Popen([sys.executable, "-c", RATES, str(out)], stdout=subprocess.PIPE, text=True, env=environment)
        assert rater.stdout.readline() == "ready\n"
        said = [rater.stdout.readline() for _ in range(5)]
        time.sleep(0.01 * (_ + 1))
        rater.send_signal(signal.SIGKILL)
        assert rater.wait() == -signal.SIGKILL
        said += rater.stdout.read().split()
        rater.stdout.close()
        given = read(out)[LABELS].to_numpy().ravel()
        assert set(given) <= {"3", ""} and n_before < (given == "3").sum() and len([x for x in given if x]) >= int(said[-1])
    assert len(read_annotations(out)) == len(read(out)["uid"].unique())


# The raters compared


def test_raters_of_one_file_are_compared(session):
    for rater, keys in {"Ann": "1223455", "Bo": "1225415"}.items():
        type_keys(view := session(["strained"], rater=rater), keys)
    type_keys(view, "r")
    comparison = view.comparison.children[0]
    assert comparison.agreement[["Label", "raters", "n"]].values.tolist() == [["strained", "Ann, Bo", 7]]
    assert comparison.differences["difference"].tolist() == [4, 2]
    assert comparison.pick.options[0].endswith("strained, 4 apart") and comparison.card.uid is None
    comparison.pick.index = 0
    assert comparison.card.uid == comparison.differences["uid"][0] and len(comparison.card.player.value) > 44
    assert "Ann" in comparison.card.facts.value and "Bo" in comparison.card.facts.value
    assert "kappa_quadratic" in comparison.static()


def test_raters_of_two_files_are_compared(session, tmp_path):
    type_keys(session(scale="yes/no", out=tmp_path / "a.csv"), "yyyn")
    view = session(scale="yes/no", out=tmp_path / "b.csv", other=tmp_path / "a.csv")
    type_keys(view, "yynn")
    view.buttons["r"].click()
    assert set(view.comparison.children[0].agreement["raters"]) == {"b.csv, a.csv"}


def test_one_rater_alone_is_told(session):
    view = session(rater="Ann")
    type_keys(view, "1r")
    assert "agreement needs two raters" in view.notice.value and not view.comparison.children


def test_nothing_of_others_is_shown_while_one_rates(session):
    type_keys(session(rater="Ann"), "44")
    view = session(rater="Bo")
    assert "rated" not in where(view) and not view.comparison.children and "Ann</td>" not in view.static()


# Elsewhere


def test_the_static_form_says_where_one_is(session):
    view = session(rater="Ann")
    view.comment.value = "<script>"
    type_keys(view, "12")
    form = view.static()
    assert "recording 2 of 48, label 1 of 2: strained" in form and "Ann" in form and "<script>" not in form


def test_ratings_go_back_into_finetune(session, tmp_path):
    (tmp_path / "split").mkdir()
    (tmp_path / "labels.txt").write_text("strained\nbreathy\n")
    for part, n in {"train": 10, "test": 6}.items():
        table = read_annotations(f"{samples.split_root()}/{part}.csv").groupby("subject").head(1).head(n)
        for rater in ("Ann", "Bo"):
            view = session(table=table, rater=rater, out=tmp_path / "split" / f"{part}.csv")
            type_keys(view, ("14" + "21" + "s5") * (n // 3) + "3")
    given = dict(prefix=samples.prefix(), device="cpu", checkpoint=samples.checkpoint(), epochs=1, val_share=0.2)
    given |= dict(data_split_root=str(tmp_path / "split"), label_txt=str(tmp_path / "labels.txt"), exp_dir=str(tmp_path / "run"))
    run = start(configure("finetune", scale="clinical", **given))
    predictions = read(next(run.path.glob("*predictions.csv")))
    test = merge_raters(read_annotations(tmp_path / "split" / "test.csv", several_raters=True), LABELS)
    expected = read_targets(test, LABELS, "clinical")
    found = predictions[["strained_target", "breathy_target"]].replace("", "nan").astype(float).to_numpy()
    assert predictions["uid"].tolist() == test["uid"].tolist() and np.array_equal(found, expected, equal_nan=True)
    assert np.isnan(expected).any() and {0, 1} <= set(expected[~np.isnan(expected)])


def test_each_answer_has_a_button_and_no_key_means_two_things():
    for scale in SCALES.values():
        assert set(scale.buttons) <= set(scale.keys) and not set(scale.keys) & set("pbscr?")
        assert {scale.keys[key] for key in scale.buttons} == set(scale.keys.values())
