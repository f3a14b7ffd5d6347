"""status: what is said about a run that goes on, was killed, ended, or is not there; and the lines of progress in a log."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from datetime import datetime, timezone

import numpy as np
import pytest

from w2v2nb import samples, storage
from w2v2nb.__main__ import main
from w2v2nb.config import ConfigError
from w2v2nb.folder import RunFolder, is_locked, locked
from w2v2nb.status import status

sf = pytest.importorskip("soundfile")


def told(path):
    return {line[:12].strip(): line[13:] for line in status(path).splitlines()}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "Flags for an extraction that takes a while, by many names of one recording."
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    sf.write(folder / "one.wav", (0.1 * rng.standard_normal(160000)).astype(np.float32), 16000)
    (folder / "table.csv").write_text("uid,path\n" + "".join(f"{i:04},one.wav\n" for i in range(1500)))
    # without the cache, which knows a recording by its sound
    return ["-i", str(folder), "-d", str(folder / "table.csv"), "-c", samples.checkpoint(), "--device", "cpu", "--cache", "False"]


def begin(flags, exp_dir):
    command = [sys.executable, "-m", "w2v2nb", "extraction", *flags, "-o", str(exp_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def wait_for(happened, process, timeout_s=90):
    end = time.time() + timeout_s
    while not happened():
        assert time.time() < end and process.poll() is None, "the run ended before it was looked at"
        time.sleep(0.05)


def n_done(exp_dir):
    path = exp_dir / "table_work" / "progress.json"
    return json.loads(path.read_text())["done"] if path.exists() else 0


def test_a_run_that_goes_on_and_is_then_killed(many, tmp_path):
    process = begin(many, tmp_path / "x")
    try:
        wait_for(lambda: n_done(tmp_path / "x") > 0, process)
        first = told(tmp_path / "x")
        for _ in range(50):  # asking does not disturb the run
            status(tmp_path / "x")
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert first["state"] == "running" and first["done"].endswith(" of 1500 recordings")
    done = int(first["done"].split()[0])
    assert 0 < done < 1500 and int(first["remaining"]) == 1500 - done and first["failed"] == "0"
    assert float(first["rate"].split()[0]) > 0 and first["rate"].endswith("s of audio/s") and ":" in first["time left"]
    then = told(tmp_path / "x")
    assert then["state"].startswith("killed") and "--resume" in then["state"] and "time left" not in then
    assert int(then["done"].split()[0]) >= done
    with locked(RunFolder(tmp_path / "x")):  # asking left no lock behind
        pass


def test_a_finished_run_from_the_command_line(tmp_path, capsys):
    flags = ["-i", samples.prefix(), "-d", f"{samples.split_root()}/test.csv", "-c", samples.checkpoint(), "--device", "cpu"]
    assert main(["extraction", *flags, "-o", str(tmp_path / "x"), "--dataset", "clinic"]) == 0
    capsys.readouterr()
    assert main(["status", str(tmp_path / "x")]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "extraction, clinic" in lines[0] and not err and "time left" not in out
    assert "state        finished" in lines and "done         48 of 48 recordings" in lines and "failed       0" in lines


def test_no_run_is_one_line_and_exit_status_2(tmp_path, capsys):
    (tmp_path / "run.json.txt").write_text("")
    for path in (tmp_path, tmp_path / "none"):
        assert main(["status", str(path)]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and err.startswith("w2v2nb: ")
    (tmp_path / "run.json").write_text("[]")
    assert main(["status", str(tmp_path)]) == 2 and "not the record of a run" in capsys.readouterr().err
    assert main(["status"]) == 2 and main(["status", "a", "b"]) == 2 and main(["status", "--resume"]) == 2


def make_run(path, mode="extraction", state="running", **changes):
    folder = RunFolder(path)
    parameters = {"epochs": 4} | changes.pop("parameters", {})
    folder.write(name="t", mode=mode, state=state, parameters=parameters, counts={}, error=None, seconds=0, **changes)
    return folder


@pytest.mark.parametrize("state, part", [("interrupted", "--resume"), ("failed", "OSError: no space"), ("running", "killed")])
def test_how_it_ended(state, part, tmp_path):
    make_run(tmp_path, state=state).write(error="OSError: no space")
    assert part in told(tmp_path)["state"]


def test_epochs_of_a_finetuning(tmp_path):
    folder = make_run(tmp_path, mode="finetune")
    assert told(tmp_path)["done"] == "0 of 4 epochs"
    storage.write_text(folder / "history.csv", "epoch,train_loss,seconds\n1,0.5,60\n2,,120\n")
    with locked(folder):
        said = told(tmp_path)
    assert (said["state"], said["done"], said["remaining"], said["time left"]) == ("running", "2 of 4 epochs", "2", "0:03:00")
    assert told(tmp_path)["rate"] == "90.0 s per epoch"


def test_an_evaluation_says_its_state(tmp_path):
    assert told(make_run(tmp_path, mode="eval-only", state="finished").path)["state"] == "finished"


def test_rate_and_time_left_are_the_latest_process_s(tmp_path):
    folder = make_run(tmp_path)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    counts = dict(total=1000, done=500, n_new=100, failed=20, audio_s=800.0, seconds=50.0, updated=now)
    storage.write_text(folder / "work" / "progress.json", json.dumps(counts))
    with locked(folder):
        said = told(tmp_path)
    assert (said["remaining"], said["rate"], said["time left"]) == ("480", "2.0 recordings/s, 16 s of audio/s", "0:04:00")
    assert said["failed"] == "20" and said["updated"].startswith("0:00:0")


def test_asking_does_not_keep_a_run_from_starting(tmp_path):
    folder = make_run(tmp_path)
    with open(tmp_path / ".lock", "w") as asked:  # as `is_locked` does it, with a long pause before it lets go
        fcntl.flock(asked, fcntl.LOCK_SH)
        threading.Timer(0.3, fcntl.flock, (asked, fcntl.LOCK_UN)).start()
        assert not is_locked(tmp_path), "several may ask at once"
        with locked(folder):
            assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_a_second_run_is_still_refused(tmp_path):
    with locked(make_run(tmp_path)), pytest.raises(ConfigError, match="another process"), locked(RunFolder(tmp_path)):
        pass


def test_status_reads_a_folder_that_cannot_be_written_to(tmp_path):
    folder = make_run(tmp_path)
    with locked(folder):
        (tmp_path / ".lock").chmod(0o444)
        tmp_path.chmod(0o555)
        try:
            assert told(tmp_path)["state"] == "running"
        finally:
            tmp_path.chmod(0o755)


def test_status_loads_nothing_heavy(tmp_path):
    make_run(tmp_path)
    code = (
        f"import sys; from w2v2nb.__main__ import main; main(['status', {str(tmp_path)!r}]);"
        "sys.exit(bool({'torch', 'pandas', 'numpy', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# Progress, as it appears while one waits

WORK = """
import time
from w2v2nb.progress import progress
with progress(40, "extract") as bar:
    for _ in range(10):
        time.sleep({pause})
        bar.advance(4, audio_s=20.0)
"""


@pytest.mark.parametrize("pause, n_lines", [(0.15, 1), (0.0, 0)])
def test_a_log_ends_with_the_totals(pause, n_lines):
    err = subprocess.run([sys.executable, "-c", WORK.format(pause=pause)], capture_output=True, text=True).stderr
    assert len(err.splitlines()) == n_lines
    if n_lines:
        assert "40/40" in err and 50 < int(err.split(" s of audio/s")[0].split()[-1]) < 140


def test_a_terminal_shows_audio_seconds_per_second():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120)) if hasattr(termios, "tcsetwinsize") else pytest.skip("needs Python 3.11")
    process = subprocess.Popen([sys.executable, "-c", WORK.format(pause=0.1)], stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # how Linux says that the other side is closed
        pass
    process.wait()
    os.close(ours)
    assert b"s of audio/s" in shown and shown.count(b"\r") >= 2 and b"40/40" in shown
