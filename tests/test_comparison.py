"""comparison: what differs comes first, differences are about the same recordings, odd runs are told."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from w2v2nb import samples
from w2v2nb.comparison import compare, compare_metrics, compare_settings, read_runs, share, write_intervals
from w2v2nb.config import configure
from w2v2nb.folder import RunFolder
from w2v2nb.run import start


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Two trainings that differ in what they do, and an evaluation on other recordings."
    place = tmp_path_factory.mktemp("runs")
    inputs = dict(prefix=samples.prefix(), data_split_root=samples.split_root(), dataset="demo", cache=False)
    train = dict(label_txt=samples.label_txt(), checkpoint=samples.checkpoint())
    start(configure(**inputs, **train, exp_dir=place / "a"))
    start(configure(**inputs, **train, exp_dir=place / "b", epochs=2, dropout=0.2))
    pd.read_csv(f"{samples.split_root()}/test.csv", dtype={"uid": str}).iloc[:30].to_csv(place / "some.csv", index=False)
    inputs["data_split_root"] = place / "some.csv"
    start(configure("eval-only", **inputs, exp_dir=place / "c", mdl_path=place / "b" / "demo_model"))
    return place


def test_settings_that_differ_and_no_others(folders):
    found, equal = compare_settings(read_runs([folders / "a", folders / "b"]))
    found = found.set_index("parameter")
    assert found["a"].to_dict() == {"epochs": "1", "dropout": str(configure_default("dropout"))}
    assert found["b"].to_dict() == {"epochs": "2", "dropout": "0.2"}
    assert equal["learning_rate"] == str(configure_default("learning_rate")) and not {"epochs", "dropout", "exp_dir"} & set(equal)


def configure_default(name):
    from w2v2nb.settings import Config

    return Config.model_fields[name].default


def test_differences_are_those_of_the_predictions(folders):
    runs = read_runs({"first": folders / "a", "second": RunFolder(folders / "b")})
    found = compare_metrics(share(runs)).set_index("Label")
    a, b = (pd.read_csv(folders / name / "demo_predictions.csv") for name in "ab")
    for label in runs["first"].labels:
        is_rated = a[f"{label}_target"].notna()
        auc_a, auc_b = (roc_auc_score(t[f"{label}_target"][is_rated], t[f"{label}_score"][is_rated]) for t in (a, b))
        row = found.loc[label]
        aucs = [row["AUC of first"], row["AUC of second"], row["second higher by"]]
        np.testing.assert_allclose(aucs, [auc_a, auc_b, auc_b - auc_a], atol=1e-9)
        for name in ("AUC of first", "AUC of second", "second higher by"):
            assert row[f"{name}, low"] < row[name] < row[f"{name}, high"]
        assert row["n"] == is_rated.sum()


def test_intervals_are_those_of_the_run_s_own_metrics(folders):
    runs = read_runs({"first": folders / "a", "second": folders / "b"})
    found = compare_metrics(share(runs))
    own = pd.read_csv(folders / "b" / "demo_metrics.csv").set_index("Label").loc[found["Label"]]
    shown = found[["AUC of second", "AUC of second, low", "AUC of second, high"]].to_numpy()
    np.testing.assert_allclose(shown, own[["AUC", "AUC_low", "AUC_high"]].to_numpy(), atol=1e-6)
    row = write_intervals(found).iloc[0]
    assert row["second higher by"][0] in "+-" and row["AUC of second"] == "{:.2f} ({:.2f} to {:.2f})".format(*shown[0])


def test_other_recordings_are_said_and_left_out(folders):
    runs = read_runs([folders / "b", folders / "c"])
    shared = share(runs)
    assert len(shared.tables["b"]) == 30 and "different recordings (b 48, c 30)" in shared.warning
    found = compare_metrics(shared)
    assert (found["n"] <= 30).all()
    np.testing.assert_allclose(found["c higher by"].dropna(), 0, atol=1e-6, err_msg="the same model on the same recordings")
    assert "different recordings" in compare([folders / "b", folders / "c"]).tables.value


def test_the_view_draws_the_label_that_is_chosen(folders):
    view = compare([folders / "a", folders / "b"])
    before = view.curves.value
    view.label.value = view.label.options[-1]
    assert view.curves.value != before and f"of {view.label.options[-1]} in" in view.curves.value
    form = view.static()
    assert "what was set differently" in form and samples.split_root() not in form
    assert "settings are equal" in view.equal.value and samples.split_root() in view.equal.value
    assert form.count("<img alt=") == len(view.label.options), "the curves of each label"


def test_names_are_text_not_html(folders):
    view = compare({"<b>bold</b>": folders / "b", "c": folders / "c"})
    assert "<b>bold" not in view.tables.value and "&lt;b&gt;bold" in view.tables.value


@pytest.mark.parametrize(
    "runs, words",
    [("a", "there is one run"), (["a"], "there is one run"), (["a", "a"], "twice"), (["a", "none"], "no run")],
)
def test_what_cannot_be_compared_is_told(folders, runs, words):
    runs = str(folders / runs) if isinstance(runs, str) else [folders / name for name in runs]
    with pytest.raises((ValueError, OSError), match=words):
        compare(runs)
