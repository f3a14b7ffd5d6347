"""Runs with everything in a bucket: the files and numbers of a local run, also after a kill, also from another machine."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from cloud import Fault

from w2v2nb import mirror, samples, storage
from w2v2nb.__main__ import main
from w2v2nb.batch import Batches
from w2v2nb.bucket import DamagedError, unpack
from w2v2nb.config import ConfigError
from w2v2nb.data import WaveformDataset
from w2v2nb.folder import RunFolder
from w2v2nb.status import status
from w2v2nb.transforms import pipeline

LABELS = ["slow rate", "rapid rate", "strained", "breathy", "monopitch"]
QUICK = ["--device", "cpu", "--clip_length", "16000", "--dataset", "s"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "A folder with recordings, a small split, the labels and the checkpoint."
    folder = tmp_path_factory.mktemp("inputs")
    tables = {"train": 12, "test": 8}
    for name, n in tables.items():
        table = pd.read_csv(f"{samples.split_root()}/{name}.csv", dtype={"uid": str}).head(n)
        (folder / "split").mkdir(exist_ok=True)
        table.to_csv(folder / "split" / f"{name}.csv", index=False)
        for uid in table.uid:
            shutil.copytree(f"{samples.prefix()}/{uid}", folder / "audio" / uid)
    shutil.copytree(samples.checkpoint(), folder / "checkpoint")
    shutil.copy(samples.label_txt(), folder / "labels.txt")
    return folder


@pytest.fixture
def there(bucket, inputs):
    "The bucket with the same."
    bucket.put_folder(inputs, "in")
    return bucket


def command(mode, root, out, *more):
    "The command line of a mode with its inputs below `root`."
    where = ["-i", f"{root}/audio", "-o", f"{out}/{mode}", *QUICK]
    if mode == "finetune":
        where += ["-d", f"{root}/split", "-l", f"{root}/labels.txt", "-c", f"{root}/checkpoint"]
        where += ["-e", "3", "--log", "tensorboard"]
    else:
        where += ["-d", f"{root}/split/test.csv"]
        where += ["-c", f"{root}/checkpoint"] if mode == "extraction" else ["-mp", f"{out}/finetune/s_model"]
    return [mode, *where, *more]


def another_machine(monkeypatch, folder):
    "From now on as if on a machine that has never seen the bucket."
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    storage.forget()


def same(first, second):
    "Assert that two runs' files are the same, but for times and places."
    names = [{path.relative_to(f.path).as_posix() for path in f.path.rglob("*") if path.is_file()} for f in (first, second)]
    assert {name for name in names[0] if not name.endswith(".lock")} == {name for name in names[1] if not name.endswith(".lock")}
    for name in names[0]:
        one, other = first.path / name, second.path / name
        if name.endswith("history.csv"):
            pd.testing.assert_frame_equal(*(pd.read_csv(path).drop(columns="seconds") for path in (one, other)))
        elif name.endswith((".csv", ".safetensors", "config.json", "sound.json")):
            assert one.read_bytes() == other.read_bytes(), name
        elif name.endswith(".parquet"):
            pd.testing.assert_frame_equal(pd.read_parquet(one), pd.read_parquet(other))


def test_three_modes_in_a_bucket_give_the_files_of_the_local_ones(there, inputs, tmp_path, monkeypatch, capsys):
    uri = f"{there.uri}/out"
    for mode in ("finetune", "eval-only", "extraction"):
        assert main(command(mode, inputs, tmp_path / "out")) == 0
        assert main(command(mode, f"{there.uri}/in", uri)) == 0
        assert f"rows written to {uri}/{mode}," in capsys.readouterr().out
        another_machine(monkeypatch, tmp_path / f"elsewhere-{mode}")
        here, remote = RunFolder(tmp_path / "out" / mode), RunFolder(f"{uri}/{mode}")
        assert remote.about["state"] == "finished" and remote.about["counts"] == here.about["counts"]
        same(here, remote)
    assert not [name for name in there.names("out") if "/." in name or "work" in name]
    assert [name for name in there.names("out") if "tfevents" in name]


def test_a_bucket_can_be_named_in_three_ways(there, tmp_path):
    table, checkpoint = f"{there.uri}/in/split/test.csv", f"/gcs/{there.name}/in/checkpoint"
    ways = [["-i", f"{there.uri}/in/audio"], ["-i", f"/gcs/{there.name}/in", "-s", "audio"]]
    ways.append(["-b", there.name, "-i", "in/audio", "-p", "x"])
    for k, way in enumerate(ways):
        out = f"{f'/gcs/{there.name}' if k else there.uri}/way{k}"
        assert main(["extraction", *way, "-d", table, "-c", checkpoint, "-o", out, *QUICK]) == 0
    frames = [pd.read_parquet(RunFolder(f"{there.uri}/way{k}") / "embeddings.parquet") for k in range(3)]
    pd.testing.assert_frame_equal(frames[0], frames[1])
    pd.testing.assert_frame_equal(frames[0], frames[2])


def test_a_path_column_may_name_another_bucket(there, inputs, make_bucket, tmp_path):
    other, table = make_bucket(), pd.read_csv(inputs / "split" / "test.csv", dtype={"uid": str}).head(3)
    files = [next((inputs / "audio" / uid).glob("waveform.*")) for uid in table.uid]
    table["path"] = [other.put(f"x/{file.parent.name}{file.suffix}", file.read_bytes()) for file in files]
    table.to_csv(tmp_path / "t.csv", index=False)
    arguments = ["extraction", "-i", str(inputs / "audio"), "-d", str(tmp_path / "t.csv"), "-c", samples.checkpoint()]
    assert main([*arguments, "-o", str(tmp_path / "x"), *QUICK]) == 0
    assert RunFolder(tmp_path / "x").about["counts"] == {"rows": 3, "failures": 0, "shortened": 3}


def test_a_bad_recording_is_set_aside_and_a_bucket_that_does_not_answer_stops(there, tmp_path, capsys, monkeypatch):
    uids = pd.read_csv(f"{samples.split_root()}/test.csv", dtype={"uid": str}).uid[:8]
    waveforms = [name for name in there.names("in/audio") if "waveform" in name and name.split("/")[2] in set(uids)]
    there.delete(waveforms[0])
    there.proxy.add(Fault("corrupt", path=waveforms[1], method="GET"))
    assert main(command("extraction", f"{there.uri}/in", f"{there.uri}/out")) == 0
    failures = pd.read_csv(RunFolder(f"{there.uri}/out/extraction") / "failures.csv", dtype=str)
    assert sorted(failures.uid) == sorted(name.split("/")[2] for name in waveforms[:2])
    assert "came damaged three times" in " ".join(failures.error) and set(failures.stage) <= {"find", "decode"}
    there.proxy.clear()
    another_machine(monkeypatch, tmp_path / "elsewhere")
    monkeypatch.setenv("W2V2NB_STORAGE_TIMEOUT", "1")
    there.proxy.add(Fault(503, path=waveforms[2], method="GET"))
    capsys.readouterr()
    assert main(command("extraction", f"{there.uri}/in", f"{there.uri}/second")) == 1
    assert "503" in (told := capsys.readouterr().err) and "--resume goes on" in told


def test_a_bucket_that_may_not_be_read_stops_the_run_before_any_work(there, capsys):
    there.proxy.add(Fault(403))
    assert main(command("extraction", f"{there.uri}/in", f"{there.uri}/out")) in (1, 2)
    told = capsys.readouterr().err.strip()
    assert "403" in told and "roles/storage.object" in told and len(told.splitlines()) == 1
    assert not there.names("out")


@pytest.mark.parametrize("part", [("-d", "in/none.csv"), ("-c", "in/none"), ("-i", "in/none")])
def test_what_is_missing_in_a_bucket_is_one_sentence_before_any_work(there, part, capsys):
    flag, name = part
    assert main([*command("extraction", f"{there.uri}/in", f"{there.uri}/out"), flag, f"{there.uri}/{name}"]) in (1, 2)
    told = capsys.readouterr().err.strip()
    assert f"{there.uri}/{name}" in told and len(told.splitlines()) == 1
    assert not there.names("out")


def test_the_status_of_a_folder_without_a_run_is_one_sentence(there, capsys):
    assert main(["status", f"{there.uri}/out"]) == 2
    told = capsys.readouterr().err
    assert f"{there.uri}/out holds no run" in told and told.count("\n") == 1


def start_until(arguments, environment, happened):
    "Start a run in a process of its own; kill it (SIGKILL) once `happened()`."
    process = subprocess.Popen([sys.executable, "-m", "w2v2nb", *arguments], env=environment, stdout=-3, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    was_running = process.poll() is None
    process.kill()
    _, errors = process.communicate(timeout=30)
    assert was_running, errors.decode()


def test_a_killed_training_is_resumed_by_another_machine(there, inputs, tmp_path, monkeypatch):
    more = ["-e", "40", "--tune", "top:1", "--cache", "False"]
    arguments = command("finetune", f"{there.uri}/in", f"{there.uri}/out", *more)
    start_until(arguments, there.environment, lambda: any(name.endswith("state.pt") for name in there.names("out")))
    assert json.loads(there.get("out/finetune/run.json"))["state"] == "running"
    another_machine(monkeypatch, tmp_path / "elsewhere")
    assert "another machine" in status(f"{there.uri}/out/finetune")
    assert main([*arguments, "--resume"]) == 0
    assert main(command("finetune", inputs, tmp_path / "out", *more)) == 0
    first, second = RunFolder(tmp_path / "out/finetune"), RunFolder(f"{there.uri}/out/finetune")
    for name in ("predictions.csv", "metrics.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    histories = [pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in (first, second)]
    pd.testing.assert_frame_equal(*histories)
    assert (first / "model" / "model.safetensors").read_bytes() == (second / "model" / "model.safetensors").read_bytes()


def test_a_killed_extraction_is_resumed_by_another_machine(there, inputs, tmp_path, monkeypatch):
    table = pd.read_csv(inputs / "split" / "train.csv", dtype={"uid": str})
    files = [next((inputs / "audio" / uid).glob("waveform.*")).relative_to(inputs / "audio") for uid in table.uid]
    many = pd.DataFrame({"uid": [f"{i:05d}" for i in range(2400)], "path": [str(file) for file in files] * (2400 // len(files))})
    there.put("in/many.csv", many.to_csv(index=False))
    where = ["extraction", "-i", f"{there.uri}/in/audio", "-d", f"{there.uri}/in/many.csv", "-c", f"{there.uri}/in/checkpoint"]
    arguments = [*where, "-o", f"{there.uri}/out", "-bs", "4", "--cache", "False", *QUICK]
    start_until(arguments, there.environment, lambda: any("part-" in name for name in there.names("out")))
    before = [name for name in there.names("out") if "part-" in name]
    another_machine(monkeypatch, tmp_path / "elsewhere")
    assert main([*arguments, "--resume"]) == 0
    assert main([*where, "-o", str(tmp_path / "whole"), "--cache", "False", "-bs", "4", *QUICK]) == 0
    folders = (RunFolder(f"{there.uri}/out"), RunFolder(tmp_path / "whole"))
    found = [pd.read_parquet(folder / "embeddings.parquet") for folder in folders]
    assert before and list(found[0].uid) == list(found[1].uid) == [*many.uid]
    values = [table.select_dtypes("number").to_numpy() for table in found]
    np.testing.assert_allclose(*values, atol=1e-5)


def test_two_machines_do_not_work_in_one_folder(there, tmp_path, monkeypatch):
    first = RunFolder(f"{there.uri}/out")
    another_machine(monkeypatch, tmp_path / "elsewhere")
    second = RunFolder(f"{there.uri}/out")
    about = dict(name="s", mode="extraction", state="running", parameters={})
    second.write(**about)
    with pytest.raises(ConfigError, match=f"another process has been at work in {there.uri}/out meanwhile"):
        first.write(**about, started="later")


def test_overwriting_removes_what_is_in_the_bucket(there, capsys):
    arguments = command("extraction", f"{there.uri}/in", f"{there.uri}/out")
    assert main(arguments) == 0
    there.put("out/extraction/notes.txt", b"mine")
    assert main(arguments) == 2 and "already holds a run" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--layer", "0,1"]) == 0
    assert there.get("out/extraction/notes.txt") == b"mine"
    assert main([*arguments, "-o", f"{there.uri}/in", "--overwrite"]) == 2
    assert "overwrite would remove prefix" in capsys.readouterr().err


def test_a_whole_bucket_is_no_folder_for_results(there, capsys):
    assert main([*command("extraction", f"{there.uri}/in", there.uri), "-o", there.uri]) == 2
    assert "is a whole bucket" in capsys.readouterr().err


def test_what_a_console_puts_into_a_folder_does_not_hide_it(bucket):
    bucket.put("rec/", b"")
    bucket.put("rec/a.wav", b"x")
    assert storage.is_folder(f"{bucket.uri}/rec") and storage.exists(f"{bucket.uri}/rec/") and storage.names(f"{bucket.uri}/rec")


def test_a_run_that_was_taken_over_writes_nothing_more(there, tmp_path, monkeypatch):
    about = dict(name="s", mode="extraction", state="running", parameters={})
    first = RunFolder(f"{there.uri}/out")
    first.write(**about)
    another_machine(monkeypatch, tmp_path / "elsewhere")
    RunFolder(f"{there.uri}/out").write(started="later")
    writes = [lambda: storage.write_text(first / "metrics.csv", "old"), lambda: storage.delete(first / "metrics.csv")]
    for write in writes:
        with pytest.raises(OSError, match=f"another process has been at work in {there.uri}/out meanwhile"):
            write()
    with pytest.raises(OSError, match="meanwhile"), storage.writing_folder(first / "model") as folder:
        (folder / "config.json").write_text("{}")
    assert there.names("out") == ["out/run.json"]


def test_only_a_run_s_own_files_are_fetched(there, capsys):
    there.proxy.requests.clear()
    assert main(["status", f"{there.uri}/in"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not there.proxy.seen("GET", "alt=media")


def test_a_run_that_is_still_writing_can_be_looked_at(there, tmp_path, monkeypatch):
    about = dict(name="s", mode="finetune", state="running", parameters={"epochs": 3}, counts={}, error=None, seconds=0)
    writer = RunFolder(f"{there.uri}/out")
    writer.write(**about)
    for k in range(20):
        storage.write_text(writer / f"split/{k}.csv", str(k))
    storage.write_text(writer / "history.csv", "epoch\n1\n")
    another_machine(monkeypatch, tmp_path / "elsewhere")
    listed = mirror.list_objects

    def list_and_write(uri):
        found = listed(uri)
        there.put("out/s_history.csv", "epoch\n1\n2\n")
        there.delete("out/s_split/3.csv")
        return found

    monkeypatch.setattr(mirror, "list_objects", list_and_write)
    reader = RunFolder(f"{there.uri}/out")
    assert (reader / "history.csv").read_text() == "epoch\n1\n2\n" and not (reader / "split" / "3.csv").exists()


def test_a_path_column_costs_no_more_requests_than_a_listing(there, inputs, make_bucket, tmp_path):
    other, table = make_bucket(), pd.read_csv(inputs / "split" / "test.csv", dtype={"uid": str}).head(6)
    files = [next((inputs / "audio" / uid).glob("waveform.*")) for uid in table.uid]
    table["path"] = [other.put(f"x/{file.parent.name}{file.suffix}", file.read_bytes()) for file in files]
    transform = pipeline(f"{there.uri}/in/audio")
    batches = Batches(WaveformDataset(table, [], transform), max_items=3)
    other.proxy.requests.clear()
    assert sum(len(batch) for batch in batches) == 6
    assert len(other.proxy.seen("GET", other.name)) <= 3 * 6  # exists, look-up and download, all of them ahead of the reader
    batches.close()


def test_a_folder_given_for_a_file_is_not_downloaded(there):
    there.proxy.requests.clear()
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        storage.read_text(f"{there.uri}/in")
    assert not there.proxy.seen("GET", "alt=media")


def test_a_slash_at_the_end_of_a_folder_does_not_count(bucket):
    with storage.writing_folder(f"{bucket.uri}/m/") as folder:
        (folder / "config.json").write_text("{}")
    assert bucket.names() == ["m/config.json", "m/manifest.json"]


def test_what_only_says_that_it_is_gzip_is_a_damaged_recording(tmp_path):
    import gzip

    whole = tmp_path / "x"
    whole.write_bytes(gzip.compress(b"abc" * 1000))
    unpack(whole, "gs://b/x")
    assert whole.read_bytes() == b"abc" * 1000
    for content in (b"RIFF", gzip.compress(b"abc" * 1000)[:-9]):
        whole.write_bytes(content)
        with pytest.raises(DamagedError, match="gs://b/x says that it is gzip"):
            unpack(whole, "gs://b/x")
