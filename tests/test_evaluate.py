"""Predictions and metrics as tables: order, columns, what is left out, labels with one class."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from w2v2nb.evaluate import metrics_table, predictions_table

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
