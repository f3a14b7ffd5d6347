"""Several processes give what one gives: real ones, started by torchrun on the CPU."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from w2v2nb import samples
from w2v2nb.__main__ import main
from w2v2nb.config import ConfigError, configure
from w2v2nb.data import read_annotations
from w2v2nb.folder import RunFolder
from w2v2nb.processes import add_gradients, add_numbers, count_processes, gather, merge_rows, process_number

NOBODY = ["nobody", "noone", "nowhere"]
LABELS = ["slow rate", "rapid rate", "strained", "breathy", "monopitch"]
torchrun = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def read(path):
    return pd.read_csv(path, dtype={"uid": str, "subject": str})


def command(n):
    "What starts `python -m w2v2nb` in n processes, at a free port."
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(n),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    return [sys.executable, *launcher, "-m", "w2v2nb"]


def run(n, arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command(n), *arguments], capture_output=True, text=True, env=environment, timeout=300, **options)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    "21 recordings to learn from, rated unevenly, three of them not there: with steps of 10 the last has one recording."
    folder = tmp_path_factory.mktemp("split")
    train, test = (read_annotations(f"{samples.split_root()}/{part}.csv") for part in ("train", "test"))
    val = train[train.subject.isin(train.subject.unique()[:2])].head(9)
    train = train[~train.subject.isin(val.subject)].head(21).copy()
    train.loc[train.index[::3], LABELS[1:]] = np.nan
    train.loc[train.index[[4, 9, 10]], "uid"] = NOBODY
    for name, table in dict(train=train, val=val, test=test.head(13)).items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


def flags(split, exp_dir, text):
    where = ["-i", samples.prefix(), "-d", str(split), "-l", samples.label_txt(), "-c", samples.checkpoint(), "-o", str(exp_dir)]
    return ["finetune", *where, "--device", "cpu", "--dataset", "s", "--clip_length", "32000", "-bs", "10", *text.split()]


def compare(first, second):
    "Assert that two runs have the same results, to 1e-4."
    folders = [RunFolder(path) for path in (first, second)]
    assert [folder.about["state"] for folder in folders] == ["finished"] * 2
    for name in ("history.csv", "predictions.csv", "metrics.csv", "failures.csv"):
        one, other = (read(folder / name).drop(columns="seconds", errors="ignore") for folder in folders)
        if name == "failures.csv":
            one, other = (table.sort_values("uid", ignore_index=True) for table in (one, other))
        pd.testing.assert_frame_equal(one, other, rtol=0, atol=1e-4)
    assert [sorted(read(folder / "failures.csv").uid) for folder in folders] == [NOBODY] * 2
    names = [sorted(path.name for path in folder.path.iterdir()) for folder in folders]
    assert names[0] == names[1] and folders[0].about["counts"] == folders[1].about["counts"]


KEPT = "-e 6 -lr 0.003 --mixup 0.3 --schedule cosine --clip_norm 1 --loss BCE --pos_weight auto"
MOVING = "-e 5 -lr 0.001 --tune top:1 --cache False --mixup 0.3 --loss focal --augment noise,gain,specaugment"


@torchrun
@pytest.mark.parametrize(("n", "text", "more"), [(2, KEPT, ""), (2, MOVING, ""), (3, MOVING, "--accumulate 2")])
def test_several_processes_give_what_one_gives(split, tmp_path, n, text, more):
    assert main(flags(split, tmp_path / "one", text)) == 0
    done = run(n, flags(split, tmp_path / "several", f"{text} {more}"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("rows written to") == 1, "only the first process speaks"
    compare(tmp_path / "one", tmp_path / "several")


@torchrun
def test_a_search_in_several_processes_chooses_what_one_chooses(split, tmp_path):
    text = "-e 2 --folds 2 --search learning_rate=0.01,0.0001 --val_share 0.3 --patience 1"
    assert main(flags(split, tmp_path / "one", text)) == 0
    done = run(2, flags(split, tmp_path / "two", text))
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (RunFolder(tmp_path / name) for name in ("one", "two"))
    for name in ("folds.csv", "predictions.csv", "metrics.csv"):
        pd.testing.assert_frame_equal(read(one / name), read(two / name), rtol=0, atol=1e-4)


@torchrun
def test_several_processes_that_are_killed_go_on_as_one(split, tmp_path):
    text = MOVING.replace("-e 5", "-e 9")
    killed, history = flags(split, tmp_path / "killed", text), tmp_path / "killed" / "s_history.csv"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([*command(2), *killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while not (history.exists() and len(read(history)) > 1) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    for each in [process := psutil.Process(process.pid), *process.children(recursive=True)]:
        each.kill()
        each.wait()
    assert RunFolder(tmp_path / "killed").about["state"] == "running" and len(read(history)) < 9
    assert main([*killed, "--resume"]) == 0
    assert main(flags(split, tmp_path / "whole", text)) == 0
    compare(tmp_path / "killed", tmp_path / "whole")


@torchrun
def test_what_stops_one_process_stops_all_with_a_sentence(split, tmp_path):
    done = run(2, flags(split, tmp_path / "x", "-e 3 --cache False -lr 1e30"))
    assert done.returncode != 0 and "w2v2nb: the " in done.stderr and "lower --learning_rate" in done.stderr
    assert RunFolder(tmp_path / "x").about["state"] == "failed"
    assert "FloatingPointError" not in done.stderr  # what follows is torchrun's own


# without torchrun


def test_one_process_is_all_there_is():
    assert (count_processes(), process_number()) == (1, 0)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 3.0)
    add_gradients([weight])
    assert weight.grad.tolist() == [3.0, 3.0] and add_numbers(torch.tensor(2.0)) == 2
    table = np.array([[1.0, 2.0], [np.nan, np.nan]])
    assert gather({"a": 1}) == [{"a": 1}]
    np.testing.assert_array_equal(merge_rows(table), table)


def test_only_fine_tuning_runs_in_several_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = dict(prefix=samples.prefix(), data_split_root=f"{samples.split_root()}/test.csv", exp_dir=str(tmp_path / "x"))
    with pytest.raises(ConfigError, match="2 processes were started but extraction runs in one"):
        configure("extraction", checkpoint=samples.checkpoint(), **given)


FEW = """
import json, sys
from pathlib import Path
import numpy as np, torch
from w2v2nb.processes import add_gradients, add_numbers, gather, leave_processes, make_accelerator, merge_rows, process_number
make_accelerator()
import torch._dynamo  # as an optimiser does
k = process_number()
weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
if k != 1:
    weights[0].grad = torch.full((2,), float(k + 1))  # one process has no gradient at all
add_gradients(weights)
rows = np.full((3, 2), np.nan)
rows[k] = k
found = [w.grad.tolist() for w in weights], add_numbers(torch.tensor(float(k))).item(), gather(k), merge_rows(rows).tolist()
gather(None)
leave_processes()
left = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]  # this process's threads
if k == 2:
    print(json.dumps([*found, [name for name in left if "gloo" in name]]))
"""


@torchrun
def test_gradients_and_rows_of_three_processes_are_put_together(write):
    launch = [*command(3)[:-2], str(write(FEW, "few.py"))]
    done = subprocess.run(launch, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    gradients, number, order, rows, left = json.loads(done.stdout.strip().splitlines()[-1])
    assert (gradients, number, order) == ([[4.0, 4.0], [0.0]], 3.0, [0, 1, 2]) and rows == [[0, 0], [1, 1], [2, 2]]
    assert left == [], "gloo's threads still run: a process that ends with them may abort"
