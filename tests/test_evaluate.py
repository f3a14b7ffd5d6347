"""Predictions and metrics as tables: order, columns, what is left out, labels with one class."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from w2v2nb import samples
from w2v2nb.batch import Batches
from w2v2nb.data import WaveformDataset, read_features
from w2v2nb.encoder import Encoder
from w2v2nb.evaluate import evaluate, metrics_table, predictions_table
from w2v2nb.model import Classifier
from w2v2nb.transforms import pipeline

NAN = float("nan")
TABLE = pd.DataFrame({"uid": ["000123", "7", "a", "b"], "subject": ["s1", "s1", "s2", "s3"], "age": [1, 2, 3, 4]})
TARGETS = np.array([[1, 0], [0, NAN], [NAN, 1], [1, 1]], dtype=np.float32)
SCORES = np.array([[0.9, 0.1], [0.2, 0.8], [NAN, NAN], [0.1, 0.7]], dtype=np.float32)


def test_columns_rows_and_uids():
    table = predictions_table(TABLE, ["x", "y"], TARGETS, SCORES)
    assert list(table) == ["uid", "subject", "x_target", "x_score", "y_target", "y_score"]
    assert table.uid.tolist() == ["000123", "7", "b"]
    assert np.isnan(table.y_target[1]) and table.y_score[1] == pytest.approx(0.8)


def test_no_subject_no_column():
    assert list(predictions_table(TABLE[["uid"]], ["x", "y"], TARGETS, SCORES))[:2] == ["uid", "x_target"]


def test_metrics_are_those_of_the_predictions():
    metrics = metrics_table(predictions_table(TABLE, ["x", "y"], TARGETS, SCORES), ["x", "y"]).set_index("Label")
    assert metrics.AUC["x"] == pytest.approx(roc_auc_score([1, 0, 1], [0.9, 0.2, 0.1]))
    assert metrics[["n_pos", "n_neg"]].to_numpy().tolist() == [[2, 1], [1, 1]]


def test_one_class_has_no_auc_but_a_reason():
    predictions = predictions_table(TABLE, ["x", "y"], np.where(np.isnan(TARGETS), NAN, 1), SCORES)
    metrics = metrics_table(predictions, ["x", "y"])
    assert metrics.AUC.isna().all() and metrics.reason.str.len().gt(0).all()


def test_grades_are_compared_as_grades():
    predictions = predictions_table(TABLE, ["x"], np.array([[1], [3], [NAN], [5]]), np.array([[1.5], [3], [2], [4]]))
    metrics = metrics_table(predictions, ["x"], is_graded=True)
    assert predictions.x_target.tolist()[::3] == [1, 5]
    assert metrics[["AUC", "n_pos", "n_neg", "MAE", "spearman"]].to_numpy().tolist() == [[1, 2, 1, 0.5, 1]]
    assert metrics.kappa[0] == pytest.approx(0.8), "2, 3 and 4 for 1, 3 and 5"


@pytest.mark.parametrize("loss", ["MSE", "BCE", "focal", "CE", "CORN"])
def test_tables_of_each_loss(loss):
    table = read_features(["000289", "000228", "000356", "nobody"], samples.prefix())
    labels = ["slow rate", "rapid rate", "breathy"]
    torch.manual_seed(0)
    encoder = Encoder.from_pretrained(samples.checkpoint(), device="cpu")
    model = Classifier(encoder, [labels[:2], labels[2:]], loss=loss)
    is_graded = loss == "CORN"
    dataset = WaveformDataset(table, labels, pipeline(samples.prefix()), scale="grades" if is_graded else "clinical")
    batches = Batches(dataset, max_items=2)
    predictions, metrics = evaluate(model, batches, table)
    assert predictions.uid.tolist() == table.uid.tolist()[:3] and [failure.uid for failure in batches.failures] == ["nobody"]
    np.testing.assert_array_equal(predictions[[f"{label}_target" for label in labels]], dataset.targets[:3])
    scores = predictions[[f"{label}_score" for label in labels]].to_numpy()
    low, high = {"MSE": (-np.inf, np.inf), "CORN": (1, 5)}.get(loss, (0, 1))
    assert ((scores > low) & (scores < high) | (loss == "CE")).all()
    assert metrics.Label.tolist() == labels and ("kappa" in metrics) == is_graded
    if loss == "CE":
        assert scores[:, :2].sum(1) == pytest.approx(1) and scores[:, 2] == pytest.approx(1)
