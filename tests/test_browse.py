"""Finding recordings: what is measured, what passes filters, and what the widget reads, lists, shows and says."""

import time

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from w2v2nb import samples
from w2v2nb.browse import N_LISTED, Browser, hear, read_recordings, table
from w2v2nb.selection import (
    ANY,
    EMPTY,
    filter_rows,
    find_labels,
    find_runs,
    join_measured,
    list_values,
    measure,
    sort_rows,
    write_lines,
)
from w2v2nb.transforms import pipeline


def tone(peak, seconds=1.0, rate_hz=16000):
    return peak * np.sin(2 * np.pi * 400 * np.arange(round(seconds * rate_hz)) / rate_hz)


@pytest.fixture
def folder(tmp_path):
    "Recordings good and bad: quiet, clipped, stereo, cut short, no audio, silent, too short for a model."
    waves = {"quiet": tone(0.01), "loud": tone(1.5).clip(-1, 1), "stereo": np.stack([tone(0.5, 2), tone(0.1, 2)], 1)}
    waves |= {"silent": np.zeros(16000), "short": tone(0.5, 0.01)}
    for uid, wave in waves.items():
        soundfile.write(tmp_path / f"{uid}.wav", wave, 16000)
    (tmp_path / "text.wav").write_text("this is no recording")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "quiet.wav").read_bytes()[:5000])
    return tmp_path


@pytest.fixture
def rows(folder):
    uids = ["quiet", "loud", "stereo", "silent", "short", "text", "cut", "gone"]
    subjects = ["Ann", "ann", "Bob", None, "B.b", "<b>", "Bob", "Bob"]
    ratings = {"strained": [1, 0, None, 1, 0, 0, 1, None], "strained_score": np.linspace(0, 1, 8)}
    return pd.DataFrame({"uid": uids, "subject": subjects, "task": ["vowel", "read"] * 4, **ratings})


@pytest.fixture
def view(rows, folder):
    "A browser whose shelf counts the recordings that are read."
    view = table(rows, str(folder))
    view.reads, load = [], view.shelf.load
    view.shelf.load = lambda sample: view.reads.append(sample["uid"]) or load(sample)
    return view


def measure_all(view):
    view.measuring.button.click()
    view.measuring.worker.join(30)


def listed(view):
    return [uid for _, uid in view.pick.options]


# Measurements


@pytest.mark.parametrize("n_run, expected", [(1, []), (2, []), (3, [3]), (700, [700])])
@pytest.mark.parametrize("value", [1.0, -1.0, 32767 / 32768, 1.7])
def test_runs_at_full_scale_count_from_three_samples(n_run, expected, value):
    wave = np.zeros((1, 1000))
    wave[0, 100 : 100 + n_run] = value
    assert find_runs(wave).tolist() == expected


def test_runs_reach_the_ends_but_not_the_next_channel():
    assert find_runs(np.ones((2, 5))).tolist() == [5, 5]
    assert find_runs(np.array([[0, 0, 1, 1], [1, 1, 0, 0]])).size == 0


def test_a_sample_below_full_scale_ends_a_run():
    assert find_runs(np.array([[1, 1, 1, 32766 / 32768, 1, 1, 1, 1]])).tolist() == [3, 4]


@pytest.mark.parametrize("peak, level_dbfs", [(1, 0), (0.5, -6.02), (0.01, -40), (0, -120)])
def test_a_sine_has_the_level_of_its_peak(peak, level_dbfs):
    measured = measure(tone(peak), 16000)
    assert measured["level_dbfs"] == pytest.approx(level_dbfs, abs=0.01)
    assert measured["duration_s"] == 1


def test_a_tensor_of_two_channels_counts_all_samples():
    wave = torch.zeros(2, 8000)
    wave[0, :800] = 1
    measured = measure(wave, 8000)
    assert measured["clipped_percent"] == 5 and measured["n_clips"] == 1
    assert measured["level_dbfs"] == pytest.approx(10 * np.log10(2 * 0.05), abs=0.01)


def test_clipped_recordings_of_16_bits_are_found(folder):
    wave, rate_hz = soundfile.read(folder / "loud.wav")
    is_full = np.abs(tone(1.5)) >= 1
    assert measure(wave, rate_hz)["clipped_percent"] == pytest.approx(100 * is_full.mean(), abs=0.5)


def test_measurements_go_before_what_the_table_said():
    given = pd.DataFrame({"uid": ["a", "b"], "duration_s": [1.0, 2.0]})
    joined = join_measured(given, [{"uid": "a", "duration_s": 3.0}])
    assert joined["duration_s"].tolist() == [3, 2] and joined["level_dbfs"].isna().all()
    assert join_measured(given, [])["duration_s"].tolist() == [1, 2]


# Filters


@pytest.mark.parametrize(
    "texts, choices, ranges, expected",
    [
        ({}, {}, {}, "quiet loud stereo silent short text cut gone"),
        ({"uid": "T"}, {}, {}, "quiet stereo silent short text cut"),
        ({"subject": "ANN"}, {}, {}, "quiet loud"),
        ({"subject": " bob "}, {}, {}, "stereo cut gone"),
        ({"subject": "b.b"}, {}, {}, "short"),  # no pattern: the dot is a dot
        ({"subject": "none"}, {}, {}, ""),  # a missing subject is no text
        ({}, {"strained": 1}, {}, "quiet silent cut"),
        ({}, {"strained": 0}, {}, "loud short text"),
        ({}, {"strained": EMPTY}, {}, "stereo gone"),
        ({"subject": "b"}, {"strained": 1, "task": "vowel"}, {}, "cut"),
        ({}, {}, {"strained_score": (0.5, 0.8)}, "short text"),
        ({}, {}, {"strained": (0, 1)}, "quiet loud silent short text cut"),  # what is missing is in no range
    ],
)
def test_rows_that_pass_all_filters(rows, texts, choices, ranges, expected):
    assert filter_rows(rows, texts, choices, ranges)["uid"].tolist() == expected.split()


@pytest.mark.parametrize(
    "column, is_descending, expected",
    [
        (ANY, True, [0, 1, 2, 3]),
        ("number", False, [2, 0, 3, 1]),
        ("number", True, [0, 3, 2, 1]),
        ("text", False, [1, 3, 0, 2]),
        ("mixed", False, [0, 2, 1, 3]),
    ],
)
def test_order(column, is_descending, expected):
    columns = {"number": [10, None, 9, 10], "text": ["b", "B", None, "a"], "mixed": [10, "a", 9, None]}
    assert sort_rows(pd.DataFrame(columns), column, is_descending).index.tolist() == expected


@pytest.mark.parametrize(
    "values, is_label",
    [
        ([0, 1, None], True),
        ([True, False, True], True),
        ([-1, 6, 3], True),
        ([0, 0.5, 1], False),
        ([None, None, None], False),
        (["0", "1", "1"], False),
        ([22, 56, 7], False),
    ],
)
def test_columns_with_ratings(values, is_label):
    found = find_labels(pd.DataFrame({"uid": ["a", "b", "c"], "x": values, "x_score": [0, 1, 1], "n_clips": [0, 1, 2]}))
    assert found == (["x"] if is_label else [])


def test_options_of_a_filter():
    assert list_values() == [("any", ANY)]
    assert list_values(pd.Series([1.0, None, 0.0])) == [("any", ANY), ("0", 0), ("1", 1), ("not rated", EMPTY)]
    assert list_values(pd.Series(["b", None, "a"])) == [("any", ANY), ("a", "a"), ("b", "b"), ("none", EMPTY)]


def test_lines_are_aligned_and_uids_whole():
    rows = pd.DataFrame({"uid": ["a", "b" * 40], "x": ["two\nlines", "y" * 40], "z": [np.nan, 1.23456]})
    header, *lines = write_lines(rows, ["uid", "x", "z"])
    assert len({len(line) for line in (header, *lines)}) == 1
    assert lines[0].split() == ["a", "two", "lines"] and lines[1].split() == ["b" * 40, "y" * 24, "1.235"]


def test_a_folder_is_a_table_with_a_split():
    recordings = read_recordings(samples.split_root())
    assert recordings["split"].value_counts().to_dict() == {"train": 96, "test": 48}
    assert recordings["uid"].is_unique


# The widget


def test_nothing_is_read_before_a_pick(view):
    view.filters["subject"].value = "bob"
    view.sort.value = "uid"
    assert listed(view) == ["cut", "gone", "stereo"] and view.pick.value is None and not view.reads
    view.pick.value = "stereo"
    assert view.reads == ["stereo"] and view.player.value[:4] == b"RIFF" and "2.00 s at 16000 Hz" in view.card.picture.value


def test_filters_work_together(view):
    view.filters["label"].value = "strained"
    assert [text for text, _ in view.filters["rating"].options] == ["any", "0", "1", "not rated"]
    view.filters["rating"].value = 1
    assert listed(view) == ["quiet", "silent", "cut"] == view.rows["uid"].tolist()
    view.filters["task"].value = "read"
    assert listed(view) == ["silent"]
    view.filters["label"].value = ANY  # and so no rating either
    assert listed(view) == ["loud", "silent", "text", "gone"]
    view.sort.value, view.is_descending.value = "strained_score", True
    assert listed(view) == ["gone", "text", "silent", "loud"]


def test_only_filters_that_make_sense(folder):
    view = table(pd.DataFrame({"uid": ["quiet", "loud"]}), str(folder))
    shown = [name for name, widget in view.filters.items() if widget.layout.display != "none"]
    assert shown == ["uid"]


def test_what_still_passes_stays_picked_and_is_not_read_again(view):
    view.pick.value = "stereo"
    view.filters["uid"].value = "st"
    assert view.pick.value == "stereo" and listed(view) == ["stereo"]
    view.filters["uid"].value = "quiet"
    assert view.pick.value is None and view.reads == ["stereo"]


@pytest.mark.parametrize("uid, said", [("text", "not a recording"), ("cut", "cut short"), ("gone", "neither")])
def test_a_bad_recording_has_a_sentence(view, uid, said):
    view.pick.value = "quiet"
    view.pick.value = uid
    assert said in view.notice.value and 'role="alert"' in view.notice.value
    assert not view.player.value and not view.card.picture.value  # nor those of another one
    view.pick.value = "quiet"
    assert said not in view.notice.value and view.player.value


def test_ratings_scores_and_the_rest_are_told(view):
    view.pick.value = "text"
    assert "&lt;b&gt;" in view.facts.value and "<b>" not in view.facts.value
    assert "<td>strained</td>" in view.facts.value and "<td>0.714</td>" in view.facts.value


def test_as_the_model_hears_it(view):
    view.pick.value = "stereo"
    raw = view.player.value
    view.sound.value = "as the model hears it"
    assert len(view.player.value) == len(raw)
    view.clip_s.value = 0.5
    assert len(view.player.value) == 44 + 2 * 8000 and "0.50 s" in view.card.picture.value
    view.pick.value = "short"
    assert "at least 400" in view.notice.value
    view.pick.value, view.is_trimmed.value = "silent", True
    assert "silent" in view.notice.value and not view.player.value
    view.sound.value = "as recorded"
    assert "silent" not in view.notice.value and view.player.value
    assert view.reads == ["stereo", "short", "silent"]


@pytest.mark.parametrize("is_trimmed, clip_s", [(False, 10), (True, 10), (False, 0.7), (True, 0.7), (False, 0)])
def test_it_is_what_the_model_hears(is_trimmed, clip_s):
    recordings = read_recordings(samples.split_root()).head(12)
    transform = pipeline(samples.prefix(), trim=is_trimmed, clip_length=round(16000 * clip_s))
    heard = hear(Browser(recordings, samples.prefix()).shelf, is_trimmed, clip_s)
    for uid in recordings["uid"]:
        # a pipeline reads no more than it needs, which moves the last bits of resampling
        torch.testing.assert_close(heard.read(uid)["waveform"], transform({"uid": uid})["waveform"], rtol=0, atol=1e-6)


def test_measuring(view):
    assert view.filters["level_dbfs"].layout.display == "none"
    measure_all(view)
    assert sorted(view.reads) == sorted(view.table["uid"])
    assert "8 of 8 recordings measured: 1 of them clip, 3 can&#x27;t" in view.measuring.notice.value
    assert view.measuring.button.description == "Measure"
    assert view.table.set_index("uid")["problem"].dropna().index.tolist() == ["text", "cut", "gone"]
    assert all(uid in view.measuring.problems.value for uid in ("text", "cut", "gone"))
    assert view.filters["level_dbfs"].layout.display is None and len(listed(view)) == 8
    view.filters["level_dbfs"].value = (view.filters["level_dbfs"].min, -35)
    assert listed(view) == ["quiet", "silent"]
    view.filters["level_dbfs"].value = (view.filters["level_dbfs"].min, view.filters["level_dbfs"].max)
    view.filters["clipped_percent"].value = (0.01, 100)
    assert listed(view) == ["loud"]
    measure_all(view)
    assert len(view.reads) == 8  # what is known is not measured again


def test_where_all_are_alike_there_is_no_slider_and_all_are_listed(rows, folder):
    view = table(rows.head(1), str(folder))
    measure_all(view)
    assert listed(view) == ["quiet"] and view.filters["clipped_percent"].layout.display == "none"


def test_measuring_can_be_stopped_and_goes_on(view):
    load, view.shelf.load = view.shelf.load, lambda sample: time.sleep(0.05) or load(sample)
    view.measuring.button.click()
    view.measuring.button.click()
    view.measuring.worker.join(30)
    n_measured = len(view.measuring.measured)
    assert 0 < n_measured < 8
    measure_all(view)
    assert len(view.measuring.measured) == 8 and view.table["duration_s"].notna().sum() == 5


def test_a_table_with_measurements_has_their_filters(view, folder):
    measure_all(view)
    again = table(view.table, str(folder))
    again.filters["duration_s"].value = (1.5, 2)
    assert listed(again) == ["stereo"]


def test_a_bucket_that_does_not_answer_is_a_sentence(view):
    from w2v2nb.bucket import StorageError

    load = view.shelf.load

    def fail(sample):
        if sample["uid"] == "silent":
            raise StorageError("the bucket does not answer; try again")
        return load(sample)

    view.shelf.load = fail
    measure_all(view)
    assert "does not answer" in view.measuring.notice.value and len(view.measuring.measured) == 3
    view.shelf.load = load
    measure_all(view)
    assert len(view.measuring.measured) == 8


def test_the_static_form_is_the_table_and_a_picture(view):
    view.filters["subject"].value = "bob"
    form = view.static()
    assert "3 of 8 recordings" in form and "<td>cut</td>" in form and "<td>loud</td>" not in form
    assert '<img alt="waveform and mel spectrogram of stereo' in form
    view.pick.value = "cut"
    form = view.static()
    assert "cut short" in form and "<img" not in form and view.reads == ["stereo", "cut"]


def test_a_static_form_without_rows(view):
    view.filters["uid"].value = "nobody"
    assert "0 of 8 recordings" in view.static() and not view.reads


def test_five_thousand_rows(folder):
    rng = np.random.default_rng(0)
    uids = [f"{k:06d}" for k in range(5000)]
    columns = {"subject": rng.integers(0, 400, 5000).astype(str), "strained": rng.integers(0, 2, 5000)}
    columns |= {"duration_s": rng.uniform(1, 9, 5000), "task": rng.choice(["vowel", "read"], 5000)}
    view = table(pd.DataFrame({"uid": uids, **columns}), str(folder))
    assert len(view.pick.options) == N_LISTED == 500
    assert "5000 of 5000 recordings" in view.count.value and "narrow the filters" in view.count.value
    times_s = []
    for name, value in {"subject": "1", "task": "read", "label": "strained", "rating": 1, "duration_s": (2, 8)}.items():
        began = time.perf_counter()
        view.filters[name].value = value
        times_s.append(time.perf_counter() - began)
    assert np.median(times_s) < 0.2, times_s
    expected = (columns["strained"] == 1) & (columns["task"] == "read") & (abs(columns["duration_s"] - 5) <= 3)
    assert len(view.rows) == sum(e and "1" in s for e, s in zip(expected, columns["subject"], strict=True))
