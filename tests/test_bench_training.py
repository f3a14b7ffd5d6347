"""What shows what training comes to: its tables from known numbers, and one part for real on the samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

root = Path(__file__).parent.parent
sys.path.insert(0, str(root / "tools"))
from bench_training import PARTS, TABLES, Recordings, largest_difference, pick_parts, to_markdown, write_table


def as_results(**parts):
    machine = dict(cpu="A CPU", family="family 1", instructions=["avx2"], cores=2, memory_gb=8.0)
    return {"machine": machine, "versions": {"torch": "1"}, "parts": parts}


def test_every_part_has_a_table():
    assert list(PARTS) == list(TABLES)


def test_ratios_are_taken_within_a_repeat():
    # the machine is three times slower in the second repeat, for all
    seconds = {"each": [100.0, 300.0], "kept": [10.0, 30.0], "again": [5.0, 15.0]}
    model = {"seconds": seconds, "difference": 0.0}
    found = dict(set="svd", n=64, epochs=20, repeats=2, load_before=0.1, models={"base": model})
    text = to_markdown(as_results(cache=found))
    assert "| 10.0 (10.0-10.0) | 20.0 (20.0-20.0) | 0 |" in text and "64 recordings of svd" in text
    assert "random weights" in text, "the reader should know what the numbers are no evidence of"


def test_modes_have_intervals_and_what_is_missing_is_said():
    rows = {"head": {"a": [0.617, 0.52, 0.7], "b": [None, None, None]}, "LoRA": False}
    found = dict(epochs=5, sets={"svd": {"n": {"train": 334, "test": 142}, "modes": rows}})
    text = to_markdown(as_results(modes=found))
    assert "| | a | b |" in text and "| head | 0.62 (0.52-0.70) | no AUC |" in text
    assert "| LoRA | did not run | did not run |" in text


def test_the_best_layer_is_the_first_of_equals():
    trials = [{"layer": k, "metric": auc, "a_AUC": auc} for k, auc in enumerate([None, 0.6, 0.7, 0.7])]
    text = to_markdown(as_results(sweep=dict(set="svd", n=9, model="base", trials=trials, test={"a": 0.55, "b": None})))
    assert "The best is layer 2; on the test it has a 0.55, b no AUC." in text and "| AUC |  | 0.60 | 0.70 | 0.70 |" in text


def test_differences_and_folds_are_shown():
    two = {"head": dict(metrics=0.0, history=1e-8, predictions=2e-8, weights=3e-8)}
    resume = dict(killed_after=3, history=0.0, predictions=0.0, weights=0.0)
    folds = dict(set="svd", n=476, group="pair", labels={"a": {"AUC_mean": 0.6, "AUC_sd": 0.05, "AUC": None}})
    text = to_markdown(as_results(processes=dict(set="svd", n=64, epochs=6, two=two, resume=resume), folds=folds))
    assert "| two processes, head | 0 | 1e-08 | 2e-08 | 3e-08 |" in text
    assert "| killed after epoch 3, resumed (transformer) |  | 0 | 0 | 0 |" in text
    assert "| a | 0.60 (0.05) | nan |" in text


def test_a_part_that_failed_is_named():
    assert "**folds** did not run: status 1" in to_markdown(as_results(folds={"failure": "status 1", "took_s": 1.0}))


def test_parts_are_chosen_by_name():
    assert pick_parts("folds,cache") == ["cache", "folds"]
    with pytest.raises(Exception, match="'speed' is no part; there are cache, modes"):
        pick_parts("speed")


def test_what_is_missing_in_one_table_only_is_a_difference():
    table = pd.DataFrame({"Label": ["a", "b"], "AUC": [0.5, float("nan")], "seconds": [1.0, 2.0]})
    assert largest_difference(table, table.assign(seconds=9.0)) == 0.0
    assert largest_difference(table, table.assign(AUC=[0.75, float("nan")])) == 0.25
    assert largest_difference(table, table.assign(AUC=[0.5, 0.5])) == float("inf")
    assert largest_difference(table, table[:1]) == float("inf")


def test_a_subset_has_whole_pairs(tmp_path):
    rows = pd.DataFrame({"uid": [f"{i:02}" for i in range(40)], "pair": [i % 20 for i in range(40)]})
    rows[:30].to_csv(tmp_path / "train.csv", index=False)
    rows[30:].to_csv(tmp_path / "test.csv", index=False)
    recordings = Recordings("some", tmp_path, tmp_path, tmp_path / "labels.txt", "pair")
    n = write_table(recordings, 17, tmp_path / "subset.csv")
    subset = pd.read_csv(tmp_path / "subset.csv", dtype=str)
    assert n == len(subset) == 16 and (subset.groupby("pair").size() == 2).all()
    assert subset.uid.str.len().eq(2).all(), "uids keep their zeros"
    assert write_table(recordings, None, tmp_path / "all.csv") == 40


def test_a_sweep_on_the_samples_has_numbers_a_table_and_a_picture(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "W2V2NB_DATA"}
    command = [sys.executable, root / "tools" / "bench_training.py", "run", "--quick", "--parts", "sweep", "--work", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "training.json").read_text()
    trials = json.loads(text)["parts"]["sweep"]["trials"]
    assert [row["layer"] for row in trials] == [0, 1, 2, 3]
    assert str(root) not in text and str(tmp_path) not in text, "a path of this machine among the results"
    assert "of synthetic samples, tiny encoder" in done.stdout
    picture = (tmp_path / "training.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 100 * 1024
    assert {*os.listdir(tmp_path)} == {"training.json", "training.png", "w2v2nb-bench"}, "work is removed"
