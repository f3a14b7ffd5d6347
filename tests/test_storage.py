"""One path for local files and gs:// objects: joining, reading, and writing that is whole or not at all."""

import os
import signal
import subprocess
import sys
import time

import pytest

from w2v2nb import storage


@pytest.mark.parametrize(
    ("base", "parts", "expected"),
    [
        ("a", ["b", "c.wav"], "a/b/c.wav"),
        ("a/", [None, "", "c"], "a/c"),
        ("/", ["c"], "/c"),
        ("a", ["/abs/c.wav"], "/abs/c.wav"),
        ("gs://bucket", ["prefix", "x"], "gs://bucket/prefix/x"),
        ("gs://bucket/", ["x"], "gs://bucket/x"),
        ("a", ["gs://other/x"], "gs://other/x"),
        ("", ["x"], "x"),
    ],
)
def test_join(base, parts, expected):
    assert storage.join(base, *parts) == expected


def test_a_foreign_scheme_is_refused():
    with pytest.raises(ValueError, match="not s3"):
        storage.join("a", "s3://bucket/x")


@pytest.mark.parametrize("action", [storage.stage, storage.exists, storage.names, storage.read_bytes])
def test_gs_paths_say_what_to_do_for_now(action):
    with pytest.raises(ValueError, match="gcloud storage cp -r gs://bucket/x"):
        action("gs://bucket/x")


def test_names_are_sorted_and_empty_for_no_folder(tmp_path):
    for name in ("b", "a", "C"):
        (tmp_path / name).touch()
    assert storage.names(tmp_path) == ["C", "a", "b"]
    assert storage.names(tmp_path / "none") == []


def test_read_text_drops_a_byte_order_mark_and_refuses_other_encodings(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfuid\n")
    assert storage.read_text(tmp_path / "bom.txt") == "uid\n"
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        storage.read_text(tmp_path / "latin.txt")


def test_reading_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "train.csv").touch()
    with pytest.raises(FileNotFoundError, match="its folder holds: train.csv"):
        storage.read_bytes(tmp_path / "trian.csv")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        storage.read_bytes(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    storage.write_text(tmp_path / "a.csv", "old")
    with pytest.raises(RuntimeError), storage.writing(tmp_path / "a.csv") as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert (tmp_path / "a.csv").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("one", "two"):
        with storage.writing_folder(tmp_path / "model") as temporary:
            (temporary / f"{content}.txt").write_text(content)
    assert storage.names(tmp_path / "model") == ["two.txt"]
    with pytest.raises(RuntimeError), storage.writing_folder(tmp_path / "model") as temporary:
        raise RuntimeError
    assert storage.names(tmp_path / "model") == ["two.txt"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    storage.write_text(tmp_path / "a.csv", "old")
    code = (
        "import sys, time\nfrom w2v2nb import storage\n"
        "with storage.writing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, tmp_path / "a.csv"], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"writing\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait(timeout=10)
    assert (tmp_path / "a.csv").read_text() == "old"


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "a.csv"
    code = "import sys\nfrom w2v2nb import storage\nfor i in range(300): storage.write_text(sys.argv[1], str(i % 10) * 100_000)\n"
    writer = subprocess.Popen([sys.executable, "-c", code, path])
    seen = set()
    while writer.poll() is None:
        if path.exists():
            text = path.read_text()
            assert len(text) == 100_000 and len(set(text)) == 1
            seen.add(text[0])
        time.sleep(0.001)
    assert writer.returncode == 0 and len(seen) > 1
