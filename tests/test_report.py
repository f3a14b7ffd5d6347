"""Pictures: what is drawn, from what, at the limits, and what wrong input says. Synthetic data only."""

import subprocess
import sys
import time
import warnings

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient

from w2v2nb.report import best_epoch, best_row, envelope, find_labels, mel_levels, plot_history, plot_recording, plot_roc, to_mono


def pixels(picture):
    "The rendered picture, (height, width, 4) uint8."
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def assert_drawn(picture):
    assert isinstance(picture, Figure)
    assert len(np.unique(pixels(picture).reshape(-1, 4), axis=0)) > 20  # a blank page has one color
    assert len(picture._repr_png_()) < 100 * 1024


def tone(seconds, sample_rate_hz, hz=440.0):
    times_s = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    return (0.5 * np.sin(2 * np.pi * hz * times_s)).astype(np.float32)


def history(**columns):
    table = {
        "epoch": [1, 2, 3, 4],
        "train_loss": [0.4, 0.3, 0.2, 0.1],
        "validation_loss": [0.4, 0.2, 0.3, 0.5],
        "metric": [0.5, 0.6, 0.8, 0.7],
        "learning_rate": [3e-4] * 4,
        "seconds": [1.0] * 4,
    }
    return pd.DataFrame(table | columns)


def predictions(labels, one_class=(), n=40, seed=0):
    rng = np.random.default_rng(seed)
    is_present = np.arange(n) % 3 == 0
    table = {"uid": [f"{i:06d}" for i in range(n)]}
    for label in labels:
        table[f"{label}_target"] = np.zeros(n) if label in one_class else is_present.astype(float)
        table[f"{label}_score"] = rng.normal(size=n) + is_present
    return pd.DataFrame(table)


def captions(axes):
    return [line.get_label() for line in axes.lines]


# Recordings


@pytest.mark.parametrize(
    "sample_rate_hz, seconds", [(4000, 0.1), (8000, 0.1), (8000, 3), (16000, 0.1), (22050, 3), (44100, 0.1), (48000, 3)]
)
def test_recording_at_any_rate(sample_rate_hz, seconds):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # librosa warns about windows longer than the clip and about empty mel bands
        picture = plot_recording(tone(seconds, sample_rate_hz), sample_rate_hz, title="000123")
        assert_drawn(picture)
    above, below = picture.axes[:2]
    assert above.get_title() == "000123"
    assert (above.get_ylabel(), below.get_ylabel(), below.get_xlabel()) == ("amplitude", "frequency (Hz)", "time (s)")
    assert above.get_xlim() == below.get_xlim() == pytest.approx((0, seconds))
    top_hz = int(below.get_yticklabels()[-1].get_text())
    assert sample_rate_hz / 4 <= top_hz < sample_rate_hz / 2


@pytest.mark.parametrize("n_frames", [1, 2, 10, 399])
def test_recording_of_a_few_frames(n_frames):
    assert_drawn(plot_recording(tone(0.1, 8000)[:n_frames], 8000))


def test_recording_takes_tensors_arrays_lists_and_channels():
    torch = pytest.importorskip("torch")
    wave = tone(0.2, 8000)
    both = np.stack([wave, 0 * wave])
    expected = pixels(plot_recording(wave / 2, 8000))
    for same in (torch.from_numpy(both), both, both.tolist(), torch.from_numpy(both).requires_grad_(False).double()):
        assert np.array_equal(pixels(plot_recording(same, 8000)), expected)


def test_tensor_that_needs_gradients():
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError, match="detach"):
        to_mono(torch.zeros(100, requires_grad=True))


def test_recording_leaves_its_input_alone():
    wave = tone(0.2, 8000)
    before = wave.copy()
    plot_recording(wave, 8000)
    assert np.array_equal(wave, before)


@pytest.mark.parametrize(
    "waveform, sentence",
    [
        (np.zeros((16000, 2)), "transpose"),
        (np.zeros((1, 2, 3)), r"shape is \(1, 2, 3\)"),
        (np.zeros(0), "at least one frame"),
        (np.zeros((1, 0)), "at least one frame"),
        (0.5, r"shape is \(\)"),
        ([0.0, np.nan], "finite"),
        ([0.0, np.inf], "finite"),
    ],
)
def test_what_is_no_waveform(waveform, sentence):
    with pytest.raises(ValueError, match=sentence):
        plot_recording(waveform, 16000)


@pytest.mark.parametrize("sample_rate_hz", [0, -8000, float("nan")])
def test_no_sample_rate(sample_rate_hz):
    with pytest.raises(ValueError, match="above 0"):
        plot_recording(tone(0.1, 8000), sample_rate_hz)


@pytest.mark.parametrize("n_frames", [1, 7, 1999, 2000, 2001, 100_000])
def test_envelope_keeps_extremes(n_frames):
    wave = np.random.default_rng(n_frames).normal(size=n_frames)
    start_frames, low, high = envelope(wave)
    assert len(start_frames) == len(low) == len(high) == min(n_frames, 2000)
    assert (start_frames[0], low.min(), high.max()) == (0, wave.min(), wave.max())
    assert (low <= high).all()
    if n_frames <= 2000:
        assert np.array_equal(low, wave)


def test_a_single_click_is_seen_in_ten_minutes():
    wave = np.zeros(600 * 16000, dtype=np.float32)
    wave[7_000_001] = 0.9
    start_frames, _, high = envelope(wave)
    assert high.max() == np.float32(0.9)
    assert start_frames[high.argmax()] / 16000 == pytest.approx(7_000_001 / 16000, abs=600 / 2000)
    levels, hop_frames = mel_levels(wave, 16000)
    assert levels.max() > -1  # no column is skipped over
    assert levels.max(axis=0).argmax() * hop_frames == pytest.approx(7_000_001, abs=2 * hop_frames)


@pytest.mark.parametrize("hz", [300, 1000, 3000])
def test_a_tone_is_drawn_at_its_frequency(hz):
    from librosa import hz_to_mel

    picture = plot_recording(tone(1, 16000, hz), 16000)
    image = picture.axes[1].images[0]
    levels = image.get_array()
    _, _, bottom, top = image.get_extent()
    step = (top - bottom) / len(levels)
    drawn_mel = bottom + (levels.mean(axis=1).argmax() + 0.5) * step
    assert drawn_mel == pytest.approx(hz_to_mel(hz), abs=step)


def test_a_sound_is_drawn_at_its_time():
    wave = np.zeros(32000, dtype=np.float32)
    wave[16000:16800] = tone(0.05, 16000)
    levels, hop_frames = mel_levels(wave, 16000)
    is_loud = levels.max(axis=0) > -10
    times_s = np.flatnonzero(is_loud) * hop_frames / 16000
    assert times_s.min() == pytest.approx(1.0, abs=0.02) and times_s.max() == pytest.approx(1.05, abs=0.02)


def test_silence_is_dark():
    levels, _ = mel_levels(np.zeros(16000, dtype=np.float32), 16000)
    assert (levels == -80).all()
    assert_drawn(plot_recording(np.zeros(16000), 16000))


def test_ten_minutes_are_not_slow():
    wave = np.random.default_rng(0).normal(size=600 * 16000).astype(np.float32) * 0.1
    plot_recording(wave[:16000], 16000)._repr_png_()  # imports
    start = time.perf_counter()
    picture = plot_recording(wave, 16000)
    picture._repr_png_()
    assert time.perf_counter() - start < 8  # 1 s on two quiet cores
    assert picture.axes[1].images[0].get_array().shape[1] <= 402


# Training curves


def test_history_draws_losses_and_metric():
    picture = plot_history(history())
    assert_drawn(picture)
    left, right = picture.axes
    assert [left.get_xlabel(), left.get_ylabel(), right.get_ylabel()] == ["epoch", "loss", "validation metric (AUC)"]
    assert captions(left) == ["train loss", "validation loss", "best epoch: 3"]
    assert left.lines[0].get_xydata().tolist() == [[1, 0.4], [2, 0.3], [3, 0.2], [4, 0.1]]
    assert left.lines[1].get_ydata().tolist() == [0.4, 0.2, 0.3, 0.5]
    assert right.lines[0].get_ydata().tolist() == [0.5, 0.6, 0.8, 0.7]
    assert list(right.lines[1].get_xdata()) == [3, 3]


def test_history_from_a_file_is_that_of_its_table(tmp_path):
    history().to_csv(tmp_path / "a_history.csv", index=False)
    expected = pixels(plot_history(history()))
    assert np.array_equal(pixels(plot_history(tmp_path / "a_history.csv")), expected)
    assert np.array_equal(pixels(plot_history(str(tmp_path / "a_history.csv"))), expected)


@pytest.mark.parametrize(
    "columns, best",
    [
        ({}, 3),
        ({"metric": [np.nan] * 4}, None),  # as train, which then keeps the last
        ({"metric": [None] * 4}, None),
        ({"metric": [None, 0.5, None, 0.6]}, 4),
        ({"metric": [np.nan, 0.5, np.nan, 0.5]}, 2),  # of equal ones the first
        ({"epoch": [5, 6, 7, 8]}, 7),
    ],
)
def test_best_epoch(columns, best):
    assert best_epoch(history(**columns)) == best


@pytest.mark.parametrize(
    "columns, best",
    [
        ({}, 2),
        ({"metric": [np.nan] * 4}, 2),  # the loss is enough
        ({"validation_loss": [np.nan] * 4}, None),
        ({"validation_loss": [np.nan, 0.3, 0.2, 0.2]}, 3),  # of equal ones the first
        ({"validation_loss": [np.inf, 0.3, np.inf, np.nan]}, 2),
    ],
)
def test_best_epoch_by_loss(columns, best):
    table = history(**columns)
    assert best_epoch(table, monitor="loss") == best
    marks = [line for line in plot_history(table, monitor="loss").axes[0].lines if line.get_label().startswith("best")]
    assert [list(line.get_xdata()) for line in marks] == ([] if best is None else [[best, best]])


def test_best_row_goes_by_place_not_by_index():
    assert best_row(history().set_index(pd.Index([7, 7, 7, 7])))["epoch"] == 3


def test_history_without_validation_has_one_panel(tmp_path):
    history(metric=[np.nan] * 4, validation_loss=[np.nan] * 4).to_csv(tmp_path / "history.csv", index=False)
    picture = plot_history(tmp_path / "history.csv")
    assert_drawn(picture)
    assert [captions(axes) for axes in picture.axes] == [["train loss"]]


def test_history_of_one_epoch_is_seen():
    picture = plot_history(history().head(1))
    assert_drawn(picture)
    assert picture.axes[0].lines[0].get_marker() == "o"


def test_history_of_a_run_that_diverged():
    assert_drawn(plot_history(history(train_loss=[0.4, np.inf, np.nan, np.nan])))
    assert_drawn(plot_history(history(**{c: [np.nan] * 4 for c in ("train_loss", "validation_loss", "metric")})))


# ROC curves


def test_roc_draws_each_label_with_auc_and_counts():
    from sklearn.metrics import roc_auc_score

    table = predictions(["slow rate", "strained"])
    picture = plot_roc(table)
    assert_drawn(picture)
    (axes,) = picture.axes
    auc = roc_auc_score(table["strained_target"], table["strained_score"])
    assert captions(axes)[1:] == [f"strained\nAUC {auc:.2f} (14 with, 26 without)", "chance"]
    assert captions(axes)[0].startswith("slow rate\nAUC ")
    assert [t.get_text() for t in picture.legends[0].get_texts()] == captions(axes)
    assert axes.get_box_aspect() == 1 and axes.get_xlim() == axes.get_ylim()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("false positive rate", "true positive rate")
    for line in axes.lines:
        assert line.get_xydata()[0].tolist() == [0, 0] and line.get_xydata()[-1].tolist() == [1, 1]
    area = np.trapezoid if hasattr(np, "trapezoid") else np.trapz
    assert area(axes.lines[1].get_ydata(), axes.lines[1].get_xdata()) == pytest.approx(auc)


def test_roc_leaves_out_what_was_not_rated():
    table = predictions(["strained"])
    rated = table.iloc[10:]
    table.loc[:9, "strained_target"] = np.nan
    assert captions(plot_roc(table).axes[0]) == captions(plot_roc(rated).axes[0])


def test_roc_lists_labels_with_one_class():
    picture = plot_roc(predictions(["strained", "breathy"], one_class=["breathy"]))
    assert_drawn(picture)
    name, reason = captions(picture.axes[0])[1].split("\n", 1)
    assert name == "breathy (not drawn)" and reason.strip()
    assert picture.axes[0].lines[1].get_xydata().size == 0


def test_roc_of_one_class_only_is_no_crash():
    assert_drawn(plot_roc(predictions(["breathy"], one_class=["breathy"])))


def test_roc_from_a_file_is_that_of_its_table(tmp_path):
    table = predictions(["strained"])
    table.to_csv(tmp_path / "a_predictions.csv", index=False)
    assert np.array_equal(pixels(plot_roc(tmp_path / "a_predictions.csv")), pixels(plot_roc(table)))


@pytest.mark.parametrize("n_labels, n_frames", [(1, 1), (8, 1), (9, 9)])
def test_many_labels_get_frames_of_their_own(n_labels, n_frames):
    labels = [f"label {k}" for k in range(n_labels)]
    picture = plot_roc(predictions(labels, one_class=["label 3"]))
    assert len(picture.axes) == n_frames
    if n_frames > 1:
        assert [axes.get_title().split("\n")[0].removesuffix(" (not drawn)") for axes in picture.axes] == labels
        assert not picture.legends
    else:
        looks = [(line.get_color(), line.get_linestyle()) for line in picture.axes[0].lines if len(line.get_xdata())]
        assert len(set(looks)) == len(looks)  # no two curves look alike
    assert len(np.unique(pixels(picture).reshape(-1, 4), axis=0)) > 20


def test_labels_can_be_chosen():
    table = predictions(["strained", "breathy", "slow rate"])
    assert find_labels(table) == ["strained", "breathy", "slow rate"]
    drawn = captions(plot_roc(table, ["breathy", "strained"]).axes[0])
    assert [caption.split("\n")[0] for caption in drawn] == ["breathy", "strained", "chance"]


def test_a_column_of_the_users_is_no_label():
    table = predictions(["strained"]).assign(reading_score=1.0)
    assert find_labels(table) == ["strained"]


# Wrong tables


@pytest.mark.parametrize(
    "call, error, sentence",
    [
        (lambda: plot_history(predictions(["a"])), ValueError, "has no column epoch, train_loss, .*; it has uid, "),
        (lambda: plot_history(history().drop(columns="metric")), ValueError, "has no column metric;"),
        (lambda: plot_history(history().head(0)), ValueError, "has no rows yet"),
        (lambda: plot_history(history(), monitor="metric"), ValueError, "monitor is 'metric'; it should be auc or loss"),
        (lambda: plot_history("no/such_history.csv"), FileNotFoundError, "no/such_history.csv does not exist"),
        (lambda: plot_history("s3://bucket/history.csv"), ValueError, "gs://"),
        (lambda: plot_roc(history()), ValueError, "no label has both a _target and a _score column"),
        (lambda: plot_roc(predictions(["a"]), ["hoarse"]), ValueError, "has no column hoarse_target, hoarse_score"),
        (lambda: plot_roc(predictions(["a"]).head(0)), ValueError, "has no rows yet"),
        (lambda: plot_roc(predictions(["a"]).drop(columns="a_target")), ValueError, "no label has both"),
    ],
)
def test_wrong_tables(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.parametrize("content", [b"", b'a,b\n"1,2\n3', b"\xff\xfe\x00binary"])
def test_files_that_are_no_csv(tmp_path, content):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match="x.csv"):
        plot_history(tmp_path / "x.csv")


# The module


def test_import_takes_nothing_heavy_and_pictures_no_pyplot():
    code = """if True:
        import sys
        from w2v2nb.report import plot_recording
        print([m for m in ("torch", "librosa", "sklearn", "matplotlib.pyplot") if m in sys.modules])
        plot_recording([0.0] * 800, 8000)._repr_png_()
        print([m for m in ("torch", "matplotlib.pyplot") if m in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_a_picture_shows_once_in_a_notebook():
    shown = "plot_recording([0.0] * 800, 8000)"
    sources = [f"from w2v2nb.report import plot_recording\n{shown}"]  # in a kernel that has seen no pyplot
    sources += [f"import matplotlib.pyplot as plt\n{shown}", f"%matplotlib inline\n{shown}"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    for cell in nb.cells:
        assert ["image/png" in o.get("data", {}) for o in cell.outputs if o.output_type != "stream"] == [True]


def test_the_curve_of_grades_is_that_of_present_against_absent():
    graded = pd.DataFrame({"a_target": [1, 1, 3, 5, np.nan], "a_score": [1.2, 2.0, 1.9, 4.0, 3.0], "b_target": 1, "b_score": 2.0})
    present = graded.assign(a_target=[0, 0, 1, 1, np.nan], b_target=0)
    drawn = [[line.get_xydata().tolist() for line in plot_roc(table).axes[0].lines] for table in (graded, present)]
    assert drawn[0] == drawn[1] and len(drawn[0]) > 1
