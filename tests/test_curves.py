"""Watching a training, and pictures that compare trainings: what is drawn at the limits, and what is written where."""

import subprocess
import sys
import textwrap
from io import BytesIO

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.container import BarContainer
from matplotlib.image import imread
from nbclient import NotebookClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from w2v2nb.curves import (
    BoardWriter,
    LiveCurves,
    format_row,
    make_tag,
    place,
    plot_folds,
    plot_layer_weights,
    plot_layers,
    plot_search,
)
from w2v2nb.display import split_static

nan = float("nan")


def assert_drawn(picture, max_kb=100):
    png = picture._repr_png_()
    assert len(png) < max_kb * 1024
    assert len(np.unique(imread(BytesIO(png)).reshape(-1, 4), axis=0)) > 20  # a blank page has one color


def captions(picture):
    return [text.get_text() for text in picture.legends[0].get_texts()]


def line(axes, name):
    (found,) = [line for line in axes.lines if line.get_label() == name]
    return found


def marks(axis):
    return [mark.get_text() for mark in axis.get_ticklabels()]


def epochs(n):
    return [
        dict(epoch=e, train_loss=1 / e, validation_loss=1 / e, metric=e / (n + 1), learning_rate=1e-3, seconds=1.0)
        for e in range(1, n + 1)
    ]


def search(n=6, labels=("strained", "breathy"), seed=0, **parameters):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"trial": range(n), **parameters})
    auc = rng.uniform(0.5, 0.9, (n, len(labels)))
    table = table.assign(best_epoch=3, metric=auc.mean(axis=1), validation_loss=1 - auc.mean(axis=1), seconds=1.0)
    return table.assign(**{f"{label}_AUC": auc[:, i] for i, label in enumerate(labels)})


def folds(n_repeats=2, n_folds=5, labels=("strained", "breathy"), seed=0):
    rng = np.random.default_rng(seed)
    rows = [(r, f, label) for r in range(n_repeats) for f in range(n_folds) for label in labels]
    table = pd.DataFrame(rows, columns=["repeat", "fold", "Label"])
    return table.assign(AUC=rng.uniform(0.4, 0.9, len(table)), n_pos=5, n_neg=7, AUC_low=nan, AUC_high=nan, reason="")


# Layers


@pytest.mark.parametrize("n_layers, n_labels", [(1, 3), (2, 1), (2, 8), (13, 9), (49, 8), (49, 40)])
def test_layers_of_any_number(n_layers, n_labels):
    labels = [f"label {i}" for i in range(n_labels)]
    picture = plot_layers(search(n_layers, labels, layer=range(n_layers)))
    assert_drawn(picture, 150 if n_layers > 13 else 100)  # eight lines of noise take more than real ones
    if n_labels > 8:
        assert captions(picture)[0] == f"lowest to highest\nof {n_labels} labels"
    else:
        assert captions(picture)[:n_labels] == labels
        assert len({(line.get_color(), line.get_linestyle()) for line in picture.axes[0].lines[:n_labels]}) == n_labels


def test_layers_show_the_numbers_and_the_best():
    table = search(3, layer=[12, 0, 6]).assign(metric=[0.6, 0.7, 0.8], validation_loss=[0.1, 0.3, 0.2])
    picture = plot_layers(table)
    (axes,) = picture.axes
    assert line(axes, "mean over labels").get_xydata().tolist() == [[0, 0.7], [6, 0.8], [12, 0.6]]
    assert line(axes, "strained").get_ydata().tolist() == table.sort_values("layer")["strained_AUC"].tolist()
    assert list(line(axes, "best: layer 6\n(AUC 0.80)").get_xdata()) == [6, 6]
    assert set(line(axes, "chance").get_ydata()) == {0.5}
    assert marks(axes.xaxis) == ["0", "6", "12"]
    assert "best: layer 12\n(AUC 0.60)" in captions(plot_layers(table, monitor="loss"))


def test_layers_take_the_best_trial_of_each():
    table = search(4, layer=[3, 3, 6, 6]).assign(metric=[0.6, 0.7, 0.8, 0.5])
    assert line(plot_layers(table).axes[0], "mean over labels").get_xydata().tolist() == [[3, 0.7], [6, 0.8]]


def test_layers_without_a_result_are_left_out():
    table = search(3, layer=[0, 1, 2]).assign(metric=[0.6, nan, 0.7])
    assert line(plot_layers(table).axes[0], "mean over labels").get_xdata().tolist() == [0, 2]
    assert_drawn(plot_layers(table.assign(metric=nan)))


# Weights of layers


@pytest.mark.parametrize("n_layers", [1, 2, 49])
def test_layer_weights(n_layers):
    torch = pytest.importorskip("torch")
    weights = torch.linspace(0, 2, n_layers, requires_grad=True).softmax(0)
    picture = plot_layer_weights(weights)
    assert_drawn(picture)
    bars = {
        round(bar.get_x() + bar.get_width() / 2): bar.get_height()
        for group in picture.axes[0].containers
        if isinstance(group, BarContainer)
        for bar in group
    }
    assert list(bars) and sorted(bars) == list(range(n_layers))
    assert [bars[layer] for layer in range(n_layers)] == pytest.approx(weights.tolist())
    assert any(caption.startswith(f"largest: layer {n_layers - 1} (") for caption in captions(picture))


@pytest.mark.parametrize(
    "weights, layers",
    [([0.5, 0.6], None), ([1.5, -0.5], None), ([[0.5, 0.5]], None), ([0.5, 0.5], [1]), ([], None), ([nan, 1], None)],
)
def test_what_are_no_weights(weights, layers):
    with pytest.raises(ValueError, match="take the softmax"):
        plot_layer_weights(weights, layers)


# Searches


@pytest.mark.parametrize(
    "values, places, names",
    [
        ([3, 1, 2], [3, 1, 2], []),
        (["0.1", "0.01"], [0.1, 0.01], []),
        ([0.1, None, 0.2], [0.1, nan, 0.2], []),
        ([True, False, True], [1, 0, 1], ["False", "True"]),
        (["mean", "attention"], [1, 0], ["attention", "mean"]),
        (["weighted", "12", "6"], [2, 1, 0], ["6", "12", "weighted"]),
        (["adam", None], [0, 1], ["adam", "none"]),
        ([None, None], [nan, nan], []),
    ],
)
def test_place(values, places, names):
    found = place(pd.Series(values))
    assert found[0].tolist() == pytest.approx(places, nan_ok=True)
    assert found[1] == names


@pytest.mark.parametrize(
    "values, scale",
    [
        ([1e-4, 1e-3, 1e-2, 1e-3, 1e-4, 1e-2], "log"),
        ([1e-4, 3e-4, 5e-4, 6e-4, 8e-4, 1e-3], "linear"),
        ([1e-4, 1.6e-4, 2.5e-4, 4e-4, 6.3e-4, 1e-3], "log"),
        ([1e-5, 3e-5, 1e-4, 2e-4, 1e-3, 2e-3], "log"),
        ([0.03, 0.1, 0.2, 0.3, 0.4, 0.5], "linear"),  # evenly drawn
        ([1, 3, 5, 7, 9, 12], "linear"),  # layers
        ([0.0, 1e-4, 1e-3, 1e-2, 1e-2, 0.0], "linear"),  # a logarithm has no 0
        ([-1, 1, 10, 100, 1000, 10], "linear"),
    ],
)
def test_scale_of_a_parameter(values, scale):
    picture = plot_search(search(weight_decay=values))
    assert_drawn(picture)
    assert picture.axes[1].get_xscale() == scale


def test_search_draws_each_parameter_and_the_best():
    table = search(learning_rate=[1e-4, 1e-3, 1e-2] * 2, pooling=["mean"] * 3 + ["attention"] * 3)
    table["metric"] = [0.5, 0.6, 0.55, 0.7, 0.8, 0.75]
    picture = plot_search(table)
    assert_drawn(picture)
    assert [axes.get_xlabel() for axes in picture.axes] == ["trial", "learning rate", "pooling"]
    assert [axes.get_ylabel() for axes in picture.axes] == ["validation AUC", "", ""]
    assert picture.get_suptitle() == "best: trial 4, validation AUC 0.80: learning rate 0.001, pooling attention"
    stars = [line(axes, "the best trial").get_xydata().tolist() for axes in picture.axes]
    assert stars == [[[4, 0.8]], [[1e-3, 0.8]], [[0, 0.8]]]
    assert line(picture.axes[0], "best so far").get_ydata().tolist() == [0.5, 0.6, 0.6, 0.7, 0.8, 0.8]
    assert marks(picture.axes[1].xaxis) == ["0.0001", "0.001", "0.01"]
    assert marks(picture.axes[2].xaxis) == ["attention", "mean"]
    assert captions(picture) == ["a trial", "the best trial", "best so far"]


def test_search_by_loss():
    table = search(dropout=[0.1, 0.2] * 3).assign(validation_loss=[0.5, 0.4, nan, 0.3, 0.6, 0.3])
    picture = plot_search(table.assign(metric=nan), monitor="loss")
    assert picture.get_suptitle().startswith("best: trial 3, validation loss 0.30: dropout 0.2")
    assert line(picture.axes[0], "best so far").get_ydata().tolist() == [0.5, 0.4, 0.4, 0.3, 0.3, 0.3]


def test_trials_without_a_result_are_counted():
    table = search(dropout=[0.1, 0.2] * 3)
    picture = plot_search(table.assign(metric=table["metric"].where(table["trial"] > 1)))
    assert picture.get_suptitle().endswith("\n2 of 6 trials without a result, not drawn")


def test_search_of_nothing_is_its_trials():
    metric = search()["metric"]
    assert plot_search(search()).get_suptitle() == f"best: trial {metric.idxmax()}, validation AUC {metric.max():.2f}"


@pytest.mark.parametrize("n_parameters, n_trials", [(0, 1), (1, 200), (3, 5), (4, 1), (9, 50)])
def test_search_of_any_size(n_parameters, n_trials):
    parameters = {f"parameter_{i}": np.random.default_rng(i).uniform(0, 1, n_trials) for i in range(n_parameters)}
    picture = plot_search(search(n_trials, **parameters))
    assert_drawn(picture, 150 if n_parameters > 4 else 100)
    assert [axes.get_xlabel() for axes in picture.axes] == ["trial", *[f"parameter {i}" for i in range(n_parameters)]]


# Folds


def test_folds_draw_every_one_and_their_mean():
    table = folds()
    picture = plot_folds(table)
    assert_drawn(picture)
    (axes,) = picture.axes
    points = line(axes, "a fold")
    assert points.get_xdata().tolist() == table["AUC"].tolist()
    assert [round(y) for y in points.get_ydata()] == [0, 1] * 10  # each in its label's row
    assert len(set(np.round(points.get_ydata(), 6))) == 20  # none hides another
    auc = table.groupby("Label", sort=False)["AUC"]
    assert marks(axes.yaxis) == [f"{k}\n{auc.mean()[k]:.2f} ± {auc.std()[k]:.2f}" for k in ("strained", "breathy")]
    assert axes.containers[0].lines[0].get_xdata().tolist() == pytest.approx(auc.mean().tolist())
    assert captions(picture) == ["chance", "a fold", "mean ± standard deviation"]
    assert axes.yaxis_inverted()  # the first label on top
    assert not picture.get_supxlabel()


def test_folds_without_an_auc_are_said():
    table = folds(n_repeats=1)
    table.loc[table.index[table["Label"] == "breathy"][:2], "AUC"] = nan
    table.loc[table["AUC"].isna(), "reason"] = ["only one class: 0 rated 1 and 9 rated 0", "no recording is rated"]
    picture = plot_folds(table)
    note = "breathy: 2 of 5 folds without AUC (only one class, no recording is rated)"
    assert picture.get_supxlabel() == note
    expected = table.loc[table["Label"] == "breathy", "AUC"].mean()
    assert marks(picture.axes[0].yaxis)[1].startswith(f"breathy\n{expected:.2f} ± ")


def test_folds_that_all_miss_a_label():
    table = folds()
    table.loc[table["Label"] == "breathy", ["AUC", "reason"]] = [nan, "no recording is rated"]
    picture = plot_folds(table)
    assert_drawn(picture)
    assert marks(picture.axes[0].yaxis)[1] == "breathy\nno AUC"


def test_a_single_fold_has_no_spread():
    picture = plot_folds(folds(1, 1).assign(AUC=[0.75, 0.5]))
    assert_drawn(picture)
    assert marks(picture.axes[0].yaxis) == ["strained\n0.75", "breathy\n0.50"]


@pytest.mark.parametrize("n_labels", [1, 8, 15])
def test_folds_of_any_number_of_labels(n_labels):
    assert_drawn(plot_folds(folds(2, 5, [f"label {i}" for i in range(n_labels)])))


# Tables


@pytest.mark.parametrize(
    "plot, table", [(plot_layers, search(layer=range(6))), (plot_search, search(pooling=list("abcabc"))), (plot_folds, folds())]
)
def test_a_file_is_drawn_as_its_table(tmp_path, plot, table):
    table.to_csv(tmp_path / "x.csv", index=False)
    pictures = [plot(source)._repr_png_() for source in (table, tmp_path / "x.csv", str(tmp_path / "x.csv"))]
    assert len(set(pictures)) == 1


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: plot_layers(search(dropout=0.1)), "has no column layer;"),
        (lambda: plot_layers(search(layer=["0", "6", "weighted"] * 2)), "layers should be numbers; plot_search"),
        (lambda: plot_search(folds()), "has no column trial, best_epoch, metric;"),
        (lambda: plot_search(search().assign(metric=nan)), "no trial has a metric"),
        (lambda: plot_search(search(), monitor="metric"), "auc or loss"),
        (lambda: plot_search(search().head(0)), "has no rows yet"),
        (lambda: plot_folds(search()), "has no column Label, AUC, reason;"),
    ],
)
def test_wrong_tables(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# The log


def test_format_row():
    row = epochs(3)[2] | {"train_loss": 0.4123, "metric": nan, "seconds": 4.23}
    assert format_row(row) == "epoch   3  train_loss 0.412  validation_loss 0.333  learning_rate 0.001     4.2 s"
    assert format_row({"epoch": 12, "train_loss": float("inf")}) == "epoch  12  train_loss inf"


def test_log_lines_are_aligned():
    rates = {1: 1e-3, 10: 9.8765e-4, 100: 1.2345e-5}
    rows = [epochs(1)[0] | {"epoch": epoch, "learning_rate": rate} for epoch, rate in rates.items()]
    lines = [format_row(row) for row in rows]
    assert len({tuple(text.index(word) for word in ("train_loss", "metric", "learning_rate", "1.0 s")) for text in lines}) == 1


# TensorBoard


def read_board(folder):
    "The steps and values of each curve, as TensorBoard reads them."
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def write_board(folder, rows):
    board = BoardWriter(folder)
    for row in rows:
        board.write(row)
    return board


def test_board_is_read_by_tensorboard(tmp_path):
    write_board(tmp_path / "board", epochs(3)).close()
    curves = read_board(tmp_path / "board")
    assert sorted(curves) == sorted(
        ["train/loss", "validation/loss", "validation/metric", "train/learning_rate", "train/seconds"]
    )
    assert curves["validation/metric"] == [(e, pytest.approx(e / 4)) for e in (1, 2, 3)]


def test_board_is_read_while_it_is_written(tmp_path):
    board = write_board(tmp_path, epochs(2))
    assert len(read_board(tmp_path)["train/loss"]) == 2
    board.close()


@pytest.mark.parametrize("again_from", [1, 3, 4])
def test_resumed_board_has_each_epoch_once(tmp_path, again_from):
    write_board(tmp_path, epochs(3)).close()
    rows = [row | {"train_loss": 9.0} for row in epochs(5)[again_from - 1 :]]
    write_board(tmp_path, rows[:-1])  # killed, not closed
    write_board(tmp_path, rows[-1:]).close()
    expected = [(e, pytest.approx(1 / e) if e < again_from else 9.0) for e in range(1, 6)]
    assert read_board(tmp_path)["train/loss"] == expected


def test_board_goes_on_after_a_torn_record(tmp_path):
    write_board(tmp_path, epochs(3)).close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])  # killed while the third epoch was written
    write_board(tmp_path, epochs(4)[2:]).close()
    assert [step for step, _ in read_board(tmp_path)["train/loss"]] == [1, 2, 3, 4]


def test_board_holds_numbers_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "ward7-pc")
    values = {"uid": "000123", "metric": nan, "n": np.float32(2), "k": np.int64(3), "notes": ["x"], "none": None}
    write_board(tmp_path, [{"epoch": np.int64(1), **values}]).close()
    assert read_board(tmp_path) == {"train/n": [(1, 2.0)], "train/k": [(1, 3.0)]}
    (path,) = tmp_path.iterdir()
    assert "ward7" not in path.name
    assert not any(secret in path.read_bytes() for secret in (b"000123", b"ward7", str(tmp_path).encode()))


def test_names_in_tensorboard_are_apart():
    names = ["train_loss", "validation_loss", "metric", "train_metric", "learning_rate", "backbone_learning_rate", "train"]
    assert len({make_tag(name) for name in names}) == len(names)


# Live curves


def execute(*sources):
    "The executed cells of a notebook."
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(source)) for source in sources]
    nb = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    return nb.cells


setup = """
    from w2v2nb.curves import LiveCurves
    def epochs(n):
        return [dict(epoch=e, train_loss=1 / e, validation_loss=1 / e, metric=e / 20) for e in range(1, n + 1)]
    """
draw = "\nfrom w2v2nb.report import plot_history\nimport pandas as pd\nplot_history(pd.DataFrame(epochs({n})))"


def pictures(cell):
    "The pictures that a cell shows, or a widget's static form in it."
    shown = [part for output in cell.outputs for part in split_static(output.get("data", {})) or [output.get("data", {})]]
    return [data["image/png"].strip() for data in shown if "image/png" in data]


@pytest.mark.parametrize("interval_s", [0.0, 60.0])
def test_a_notebook_keeps_one_picture_of_the_last_epoch(interval_s):
    training = f"""
        rows, live = [], LiveCurves(interval_s={interval_s})
        live.update(rows)
        for row in epochs(6):
            rows.append(row)
            live.update(rows)
        live.close()
        live.close()
        """
    _, trained, expected, other = execute(setup, training, draw.format(n=6), draw.format(n=5))
    assert len(trained.outputs) == 2  # the picture, and the widget for where there is a kernel
    assert pictures(trained) == pictures(expected) != pictures(other)


def test_pictures_are_not_drawn_faster_than_the_interval():
    training = """
        from unittest.mock import patch
        from w2v2nb import report
        live, lengths = LiveCurves(interval_s=60), []
        with patch.object(report, "plot_history", lambda history, monitor: lengths.append(len(history)) or report.Picture()):
            for n in range(1, 9):
                live.update(epochs(n))
            live.close()
        print(lengths)
        """
    cell = execute(setup, training)[1]
    assert "[1, 8]" in "".join(output.get("text", "") for output in cell.outputs)


def test_an_interrupted_training_leaves_its_picture_in_its_cell():
    training = """
        live = LiveCurves(interval_s=60)
        try:
            for n in range(1, 4):
                live.update(epochs(n))
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            print("stopped")
        finally:
            live.close()
        """
    _, trained, expected = execute(setup, training, draw.format(n=3))
    assert pictures(trained) == pictures(expected)


def test_two_trainings_have_their_own_pictures():
    training = """
        for n in (2, 3):
            live = LiveCurves()
            live.update(epochs(n))
            live.close()
        """
    _, trained, two, three = execute(setup, training, draw.format(n=2), draw.format(n=3))
    assert pictures(trained) == pictures(two) + pictures(three)


def test_nothing_happens_outside_a_notebook(capsys):
    live = LiveCurves()
    live.update(epochs(2))
    live.close()
    assert not live.is_shown and capsys.readouterr() == ("", "")


def test_a_terminal_loads_nothing_heavy():
    code = """if True:
        import sys
        from w2v2nb.curves import LiveCurves, format_row
        live = LiveCurves()
        live.update([{"epoch": 1, "train_loss": 0.5}])
        live.close()
        format_row({"epoch": 1, "train_loss": 0.5})
        heavy = ("pandas", "matplotlib", "torch", "tensorboard", "sklearn", "IPython")
        print([m for m in heavy if m in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
