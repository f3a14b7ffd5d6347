"""One path for local files and gs:// objects: joining, reading, and writing that is whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cloud import Fault

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
        ("gs://bucket/p", ["/gcs/other/x"], "/gcs/other/x"),
        ("/gcs/bucket", ["x"], "/gcs/bucket/x"),
    ],
)
def test_join(base, parts, expected):
    assert storage.join(base, *parts) == expected


def test_a_foreign_scheme_is_refused():
    with pytest.raises(ValueError, match="not s3"):
        storage.join("a", "s3://bucket/x")


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


# In a bucket


def run_python(code, *arguments, environment):
    command = [sys.executable, "-c", f"import sys\nfrom w2v2nb import storage\n{code}", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def visible(folder):
    return [name for name in storage.names(folder) if not name.startswith(".")]  # a run's folder has a lock


def contents(folder):
    "Name -> content of all files below a folder that are not hidden."
    files = {file.relative_to(folder): file for file in Path(folder).rglob("*") if file.is_file()}
    return {name.as_posix(): file.read_bytes() for name, file in files.items() if not any(p.startswith(".") for p in name.parts)}


@pytest.fixture
def elsewhere(bucket, tmp_path):
    "The environment of another machine."
    return bucket.environment | {"XDG_CACHE_HOME": str(tmp_path / "other-machine")}


@pytest.fixture(params=["local", "gs", "gcs", "mirror"])
def root(request, tmp_path):
    "A folder to work in: on this machine, in a bucket by its two names, and one that stands for a bucket's."
    if request.param == "local":
        return tmp_path / "work"
    bucket = request.getfixturevalue("bucket")
    names = {"gs": f"{bucket.uri}/work", "gcs": f"/gcs/{bucket.name}/work"}
    return names[request.param] if request.param in names else storage.mirror(f"{bucket.uri}/work")


def test_all_kinds_of_paths_behave_alike(root):
    path = storage.join(root, "a", "b é.txt")
    assert not storage.exists(path) and storage.names(storage.join(root, "a")) == []
    storage.write_text(path, "one")
    storage.write_text(path, "two")
    storage.write_text(storage.join(root, "top.txt"), "")
    assert storage.read_text(path) == "two" and storage.read_bytes(storage.join(root, "top.txt")) == b""
    assert visible(root) == ["a", "top.txt"] and storage.names(storage.join(root, "a")) == ["b é.txt"]
    assert storage.exists(path) and not storage.is_folder(path)
    assert storage.exists(storage.join(root, "a")) and storage.is_folder(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "to")), "the beginning of a name is not a name"
    assert storage.stage(path).name == "b é.txt" and storage.stage(path).read_bytes() == b"two"
    assert contents(storage.stage(root)) == {"a/b é.txt": b"two", "top.txt": b""}
    with pytest.raises(FileNotFoundError, match="top.txt2 does not exist; its folder holds: .*a, top.txt"):
        storage.read_bytes(storage.join(root, "top.txt2"))
    with pytest.raises(FileNotFoundError, match="is a folder"):
        storage.read_bytes(storage.join(root, "a"))
    storage.delete(path)
    assert not storage.exists(path) and storage.exists(storage.join(root, "top.txt"))
    storage.delete(root)
    storage.delete(root)  # nothing happens
    assert not storage.exists(storage.join(root, "top.txt"))


def test_a_failed_write_leaves_what_was_there_for_all_kinds_of_paths(root):
    path = storage.join(root, "a.csv")
    storage.write_text(path, "old")
    with pytest.raises(RuntimeError), storage.writing(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert storage.read_text(path) == "old" and visible(root) == ["a.csv"]


def test_a_folder_is_replaced_whole_for_all_kinds_of_paths(root):
    folder = storage.join(root, "model")
    for content in ("one", "two"):
        with storage.writing_folder(folder) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / f"{content}.txt").write_text(content)
            (temporary / "config.json").write_text(content)
    with pytest.raises(RuntimeError), storage.writing_folder(folder) as temporary:
        (temporary / "config.json").write_text("three")
        raise RuntimeError
    found = contents(storage.stage(folder))
    found.pop("manifest.json", None)
    assert found == {"config.json": b"two", "deep/two.txt": b"two"}


def test_what_this_process_changes_it_knows(bucket):
    "Listings are remembered; a change of our own is seen, another's after `forget`."
    old = bucket.put("data/a.csv", b"old")
    storage.remember(f"{bucket.uri}/data")
    assert storage.read_text(old) == "old"
    storage.write_text(old, "new")
    storage.write_text(f"{bucket.uri}/data/deep/b.csv", "b")
    assert storage.read_text(old) == "new" and storage.names(f"{bucket.uri}/data") == ["a.csv", "deep"]
    with storage.writing_folder(f"{bucket.uri}/data/model") as temporary:
        (temporary / "c").write_text("c")
    assert storage.is_folder(f"{bucket.uri}/data/model")
    storage.delete(f"{bucket.uri}/data/deep")
    assert not storage.exists(f"{bucket.uri}/data/deep/b.csv")
    assert storage.names(f"{bucket.uri}/data") == ["a.csv", "model"]
    bucket.put("data/new.csv", b"")
    storage.forget()
    assert storage.exists(f"{bucket.uri}/data/new.csv")


def test_many_files_of_a_remembered_folder_need_one_request_each(bucket):
    uris = [bucket.put(f"data/{i}.wav", b"x" * i) for i in range(10)]
    storage.remember(f"{bucket.uri}/data")
    for uri in uris * 2:
        assert storage.exists(uri) and storage.stage(uri).stat().st_size == uris.index(uri)
    assert len(bucket.proxy.requests) == 11, "one listing, ten downloads"


def test_a_bucket_is_not_deleted_whole_by_a_slip(bucket):
    bucket.put("precious", b"x")
    with pytest.raises(ValueError, match="gs://"):
        storage.delete(bucket.uri)
    with pytest.raises(ValueError, match="gs://"), storage.writing_folder(f"{bucket.uri}/") as temporary:
        (temporary / "a").write_text("a")
    assert bucket.names() == ["precious"]


def write_model(uri, content, names=("a.bin", "b.bin", "config.json")):
    with storage.writing_folder(uri) as temporary:
        for name in names:
            (temporary / name).write_text(content + name)


def test_a_folders_manifest_is_uploaded_last(bucket):
    write_model(f"{bucket.uri}/model", "1")
    whole = json.loads(bucket.get("model/manifest.json"))["files"]
    assert sorted(whole) == ["a.bin", "b.bin", "config.json"]
    assert bucket.generation("model/manifest.json") > max(bucket.generation(f"model/{name}") for name in whole)


@pytest.mark.parametrize("n_uploads", range(5))
def test_a_folder_whose_writing_was_interrupted_is_refused(n_uploads, bucket, monkeypatch):
    """Whatever came through before the connection broke: a reader gets the old folder, the new one or a refusal."""
    monkeypatch.setenv("W2V2NB_STORAGE_TIMEOUT", "1")
    uri = f"{bucket.uri}/model"
    write_model(uri, "old")
    bucket.proxy.add(Fault("nothing", method="POST", n=n_uploads), Fault(403, method="POST"))
    with pytest.raises(PermissionError, match=uri):
        write_model(uri, "new")
    bucket.proxy.clear()
    storage.forget()
    if n_uploads == 0:
        assert storage.read_text(storage.stage(uri) / "a.bin") == "olda.bin"
    else:
        with pytest.raises(OSError, match=f"{uri} is not complete.*write it again"):
            storage.stage(uri)
    write_model(uri, "new")
    assert storage.read_text(storage.stage(uri) / "b.bin") == "newb.bin"


@pytest.mark.parametrize("change", ["missing", "changed", "added"])
def test_a_folder_that_somebody_changed_is_refused(change, bucket):
    uri = f"{bucket.uri}/model"
    write_model(uri, "1")
    if change == "missing":
        bucket.delete("model/a.bin")
    else:
        bucket.put("model/a.bin" if change == "changed" else "model/more.bin", b"x")
    with pytest.raises(OSError, match=f"{uri} is not complete"):
        storage.stage(uri)


def test_the_rest_of_an_old_folder_goes(bucket):
    write_model(f"{bucket.uri}/model", "1")
    bucket.put("model-2/keep", b"x")
    write_model(f"{bucket.uri}/model", "2", names=["only.bin"])
    assert bucket.names() == ["model-2/keep", "model/manifest.json", "model/only.bin"]


def test_paths_are_called_by_what_they_stand_for(bucket, tmp_path):
    root = storage.mirror(f"/gcs/{bucket.name}/run")
    assert storage.place(root / "a" / "b.csv") == f"{bucket.uri}/run/a/b.csv" and storage.place(root) == f"{bucket.uri}/run"
    assert storage.place(tmp_path / "x") == str(tmp_path / "x") and storage.place("gs://b/x") == "gs://b/x"


# A folder that stands for a bucket's


def test_a_mirror_holds_what_the_bucket_holds(bucket):
    bucket.put("run/a.txt", b"a")
    bucket.put("run/deep/b.txt", b"b")
    bucket.put("run-2/c.txt", b"c")
    root = storage.mirror(f"{bucket.uri}/run")
    assert contents(root) == {"a.txt": b"a", "deep/b.txt": b"b"}
    bucket.put("run/a.txt", b"changed")
    bucket.delete("run/deep/b.txt")
    assert contents(storage.mirror(f"{bucket.uri}/run/")) == {"a.txt": b"changed"}
    assert not (root / "deep").exists()


def test_a_mirror_downloads_only_what_has_changed(bucket):
    for i in range(5):
        bucket.put(f"run/{i}", bytes([i]) * 100)
    storage.mirror(f"{bucket.uri}/run")
    bucket.put("run/3", b"new")
    bucket.proxy.clear()
    assert contents(storage.mirror(f"{bucket.uri}/run"))["3"] == b"new"
    assert len(bucket.proxy.seen("GET", "alt=media")) == 1


def test_what_is_written_into_a_mirror_is_in_the_bucket_when_the_call_returns(bucket):
    root = storage.mirror(f"{bucket.uri}/run")
    for i in range(3):
        storage.write_text(root / "state.json", str(i))
        assert bucket.get("run/state.json") == str(i).encode()
        storage.write_text(root / f"{i}.csv", "x")
        assert bucket.generation(f"run/{i}.csv") > bucket.generation("run/state.json"), "in the order of writing"
    with storage.writing_folder(root / "model") as temporary:
        (temporary / "weights").write_bytes(b"w")
    assert bucket.get("run/model/weights") == b"w"
    (root / "events").mkdir()
    (root / "events" / "log").write_bytes(b"1")
    assert "run/events/log" not in bucket.names()
    storage.push(root / "events")
    assert bucket.get("run/events/log") == b"1"
    storage.delete(root / "model")
    storage.delete(root / "0.csv")
    assert bucket.names("run/") == ["run/1.csv", "run/2.csv", "run/events/log", "run/state.json"]


def test_another_machine_sees_the_same(bucket, elsewhere):
    root = storage.mirror(f"{bucket.uri}/run")
    storage.write_text(root / "a.txt", "a")
    with storage.writing_folder(root / "model") as temporary:
        (temporary / "weights").write_bytes(b"w")
    there = Path(run_python("print(storage.mirror(sys.argv[1]))", f"{bucket.uri}/run", environment=elsewhere))
    assert there != root and contents(there) == contents(root)
    code = "root = storage.mirror(sys.argv[1]); storage.delete(root / 'model'); storage.write_text(root / 'b.txt', 'b')"
    run_python(code, f"{bucket.uri}/run", environment=elsewhere)
    assert contents(storage.mirror(f"{bucket.uri}/run")) == contents(there) == {"a.txt": b"a", "b.txt": b"b"}


def test_hidden_files_of_a_mirror_stay_on_this_machine(bucket):
    root = storage.mirror(f"{bucket.uri}/run")
    storage.write_text(root / ".lock-of-mine", "x")
    (root / ".tmp").mkdir()
    (root / ".tmp" / "a").write_text("a")
    storage.push(root)
    assert bucket.names() == []


def test_two_machines_do_not_work_in_the_same_run(bucket, elsewhere):
    "The file that says whose run it is has a precondition: who comes second is told."
    root = storage.mirror(f"{bucket.uri}/run")
    code = "root = storage.mirror(sys.argv[1]); storage.write_text(root / 'run.json', '{}')"
    run_python(code, f"{bucket.uri}/run", environment=elsewhere)
    with pytest.raises(OSError, match=f"{bucket.uri}/run/run.json was written by somebody else"):
        storage.write_text(root / "run.json", "{1}")
    assert bucket.get("run/run.json") == b"{}"
    storage.mirror(f"{bucket.uri}/run")
    storage.write_text(root / "run.json", "{2}")
    storage.write_text(root / "run.json", "{3}")
    assert bucket.get("run/run.json") == b"{3}"


def test_a_write_into_a_mirror_that_fails_is_said_and_repaired_by_the_next_pull(bucket):
    root = storage.mirror(f"{bucket.uri}/run")
    storage.write_text(root / "a.csv", "old")
    bucket.proxy.add(Fault(403, method="POST"))
    with pytest.raises(PermissionError, match=f"{bucket.uri}/run/a.csv: you may not write it"):
        storage.write_text(root / "a.csv", "new")
    bucket.proxy.clear()
    assert contents(storage.mirror(f"{bucket.uri}/run")) == {"a.csv": b"old"}


def test_a_killed_run_leaves_a_bucket_that_another_machine_can_use(bucket, elsewhere):
    code = (
        "import sys, time\nfrom w2v2nb import storage\nroot = storage.mirror(sys.argv[1])\n"
        "for i in range(10000): storage.write_text(root / f'{i % 7}.txt', str(i) * 1000); print(i, flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, f"{bucket.uri}/run"], env=bucket.environment, stdout=subprocess.PIPE, text=True
    )
    last = next(line for line in writer.stdout if int(line) >= 20)
    writer.send_signal(signal.SIGKILL)
    writer.wait(timeout=10)
    last = int((writer.stdout.read().split() or [last])[-1])
    there = Path(run_python("print(storage.mirror(sys.argv[1]))", f"{bucket.uri}/run", environment=elsewhere))
    found = contents(there)
    assert len(found) == 7 and all(text in [str(i).encode() * 1000 for i in range(last + 2)] for text in found.values())
    assert found[f"{last % 7}.txt"] in (str(last).encode() * 1000, str(last + 7).encode() * 1000), "what was printed is there"


def test_local_work_does_not_load_the_cloud(tmp_path):
    code = (
        "import w2v2nb.objects, w2v2nb.bucket\nstorage.write_text(sys.argv[1], 'x'); storage.read_text(sys.argv[1])\n"
        "print([name for name in sys.modules if name.startswith(('google.cloud.', 'google.api_core', 'requests'))])"
    )
    assert run_python(code, tmp_path / "a.txt", environment={**os.environ}) == "[]"


def test_a_folder_whose_writing_was_interrupted_is_not_in_another_machines_view(bucket, elsewhere):
    "On a disk a folder is there whole or not at all, and so it is in a run that goes on elsewhere."
    root = storage.mirror(f"{bucket.uri}/run")
    storage.write_text(root / "a.txt", "a")
    write_model(root / "whole", "1")
    bucket.proxy.add(Fault("nothing", method="POST", n=2), Fault(403, method="POST"))
    with pytest.raises(PermissionError):
        write_model(root / "half", "1")
    bucket.proxy.clear()
    assert [name for name in bucket.names("run/half/") if "manifest" not in name], "something of it is in the bucket"
    there = run_python("print(storage.mirror(sys.argv[1]))", f"{bucket.uri}/run", environment=elsewhere)
    found = {name for name in contents(there) if not name.endswith("manifest.json")}
    assert found == {"a.txt", "whole/a.bin", "whole/b.bin", "whole/config.json"}
