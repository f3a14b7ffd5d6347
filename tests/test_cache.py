"""What a cache keeps, how large its file is, and what happens to it: kills, damage, threads, processes, no access."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from w2v2nb.cache import CacheFile, VectorCache, count_bytes
from w2v2nb.objects import cache_dir

WIDE = 10**9


def vector(i, n=768):
    return np.random.default_rng(i).random(n, np.float32)


def key(i):
    return b"key %06d" % i


def put(cache, numbers):
    cache.put({key(i): vector(i) for i in numbers})


def held(cache, numbers):
    "The numbers that are there; each with its own values."
    found = cache.get([key(i) for i in numbers])
    for i in numbers:
        if key(i) in found:
            np.testing.assert_array_equal(found[key(i)], vector(i))
    return [i for i in numbers if key(i) in found]


def write_code(code, *arguments):
    "A process of its own that has a cache in the folder of its first argument."
    start = "import sys; import numpy as np; from w2v2nb.cache import VectorCache; cache = VectorCache(sys.argv[1], 10**9)\n"
    make = "put = lambda ns: cache.put({b'key %06d' % i: np.random.default_rng(i).random(768, np.float32) for i in ns})\n"
    command = [sys.executable, "-c", start + make + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("given", "xdg", "expected"),
    [
        (None, None, "home/.cache/w2v2nb"),
        (None, "xdg", "xdg/w2v2nb"),
        ("~/mine", "xdg", "home/mine"),
        ("other/deep", None, "other/deep"),
    ],
)
def test_the_folder(given, xdg, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / xdg) if xdg else "")
    monkeypatch.chdir(tmp_path)
    folder = cache_dir(given)
    assert folder.resolve() == tmp_path / expected and folder.stat().st_mode & 0o777 == 0o700
    assert cache_dir(given) == folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: "gs://bucket/cache", "on this machine"),
        (lambda path: path.touch() or path, "cannot be made"),
        (lambda path: path.touch() or path / "below", "cannot be made"),
        (lambda path: path.mkdir(mode=0o500) or path, "cannot be written to"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(make, message, tmp_path):
    if message == "cannot be written to" and os.geteuid() == 0:
        pytest.skip("root can write everywhere")
    with pytest.raises(OSError, match=message):
        cache_dir(make(tmp_path / "x"))


def test_only_the_owner_can_read_it(tmp_path):
    folder = tmp_path / "new"
    put(VectorCache(folder, WIDE), range(3))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_many_keys_at_once(tmp_path):
    cache = VectorCache(tmp_path, WIDE)
    put(cache, range(0, 2600, 2))
    assert held(cache, range(2600)) == list(range(0, 2600, 2))


def test_the_file_is_never_larger_than_it_should_be(tmp_path):
    cache = VectorCache(tmp_path, limit := 2_000_000)
    for start in range(0, 3000, 100):  # 9 MB
        put(cache, range(start, start + 100))
        assert cache.file.path.stat().st_size <= limit
    last = held(cache, range(3000))
    assert last == list(range(last[0], 3000)) and len(last) * 768 * 4 > 0.7 * limit
    cache.max_bytes = 1_000_000
    put(cache, [3000])
    assert cache.file.path.stat().st_size <= 1_000_000 and held(cache, [3000])


def test_more_than_fits_leaves_what_fits(tmp_path):
    cache = VectorCache(tmp_path, 2_000_000)
    put(cache, range(2000))
    assert len(held(cache, range(2000))) * 768 * 4 > 0.5 * cache.max_bytes
    tiny = VectorCache(tmp_path / "tiny", 1)
    put(tiny, range(3))
    assert held(tiny, range(3)) == []


def test_what_is_used_stays(tmp_path):
    cache = VectorCache(tmp_path, 2_000_000)
    put(cache, range(100))
    for start in range(1000, 4000, 100):
        put(cache, range(start, start + 100))
        assert held(cache, range(100)) == list(range(100))


def test_another_value_of_a_key_replaces_the_first(tmp_path):
    cache = VectorCache(tmp_path, WIDE)
    for values in (np.zeros(3), np.ones((2, 2))):
        cache.put({b"k": values})
        np.testing.assert_array_equal(cache.get([b"k"])[b"k"], values)
    assert cache.file.attempt(lambda connection: connection.execute("SELECT count(*) FROM uses").fetchone()) == (1,)


def test_a_killed_process_leaves_what_it_had_put(tmp_path):
    for k in range(4):
        first = 100_000 * k
        writer = write_code(
            "for n in range(int(sys.argv[2]), 10**9, 40):\n    put(range(n, n + 40)); print(n, flush=True)", tmp_path, first
        )
        reached = [int(writer.stdout.readline()) for _ in range(2)]
        time.sleep(0.02 + 0.013 * k)
        os.kill(writer.pid, signal.SIGKILL)
        reached += map(int, writer.stdout.read().split())
        assert writer.wait() == -signal.SIGKILL
        cache = VectorCache(tmp_path, WIDE)
        told = range(first, reached[-1] + 40)
        assert held(cache, told) == list(told)
        assert len(held(cache, range(told[-1] + 1, told[-1] + 41))) in (0, 40)  # the last was written, or not at all
        put(cache, [first + 99_999])
        assert cache.file.attempt(lambda connection: connection.execute("PRAGMA integrity_check").fetchone()) == ("ok",)
        cache.close()
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.sqlite3"]


def test_processes_write_at_once(tmp_path):
    writers = [write_code("n = int(sys.argv[2])\nfor i in range(60): put([n + i])", tmp_path, 1000 * k) for k in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    numbers = [1000 * k + i for k in range(3) for i in range(60)]
    assert held(VectorCache(tmp_path, WIDE), numbers) == numbers
    assert "".join(writer.stdout.read() for writer in writers) == ""


def test_threads_share_a_cache(tmp_path):
    cache, problems = VectorCache(tmp_path, WIDE), []

    def work(k):
        for i in range(1000 * k, 1000 * k + 30):
            put(cache, [i])
            if held(cache, [i]) != [i]:
                problems.append(i)

    threads = [threading.Thread(target=work, args=[k]) for k in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not problems


def damage(path, what):
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    if what == "text":
        path.write_text("Dear colleague " * 100)
    elif what == "cut":
        path.write_bytes(content[: len(content) // 2 + 77])
    elif what == "scrambled":
        path.write_bytes(content[:200] + rng.bytes(len(content) - 200))
    elif what == "values":  # sqlite's own bookkeeping stays as it is
        at = content.index(vector(7).tobytes())
        path.write_bytes(content[: at + 9] + b"\x00" + content[at + 10 :])
    elif what == "other":
        path.unlink()
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE patients (name)")
        other.commit(), other.close()


@pytest.mark.parametrize("what", ["text", "cut", "scrambled", "values", "other"])
def test_a_damaged_or_foreign_file_is_moved_aside(what, tmp_path, capsys):
    cache = VectorCache(tmp_path, WIDE)
    put(cache, range(100))
    cache.close()
    damage(cache.file.path, what)
    damaged = cache.file.path.read_bytes()
    assert len(held(cache, range(100))) == 0
    put(cache, range(50))
    assert held(cache, range(100)) == list(range(50))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "a new one is begun" in said
    assert cache.file.path.with_name("vectors.sqlite3.damaged").read_bytes() == damaged


@pytest.mark.parametrize("what", ["text", "cut", "scrambled", "values", "other"])
def test_a_file_that_is_damaged_while_it_is_open(what, tmp_path):
    cache = VectorCache(tmp_path, WIDE)
    put(cache, range(100))
    damage(cache.file.path, what)
    for start in range(0, 200, 20):  # SQLite keeps some pages in memory, which are good
        held(cache, range(start, start + 40)), put(cache, range(start, start + 40))
    assert held(cache, range(180, 220)) == list(range(180, 220)) and not cache.file.is_off


def test_the_new_file_of_another_process_is_not_moved_aside(tmp_path, capsys):
    first, second = VectorCache(tmp_path, WIDE), VectorCache(tmp_path, WIDE)
    put(first, range(100)), held(second, [0])
    damage(first.file.path, "values")
    first.close()  # the second has the file open
    for cache in (first, second):
        held(cache, range(100))
        put(cache, range(5))
    assert held(second, range(5)) == held(first, range(5)) == list(range(5))
    assert capsys.readouterr().out.count("a new one is begun") == 1


def test_a_cache_that_is_removed_while_it_is_used_begins_anew(tmp_path, capsys):
    cache = VectorCache(tmp_path / "cache", WIDE)
    put(cache, range(5))
    cache.file.path.unlink(), cache.file.path.parent.rmdir()
    held(cache, range(5)), put(cache, range(9)), put(cache, range(9))
    assert held(VectorCache(tmp_path / "cache", WIDE), range(9)) == list(range(9))
    assert capsys.readouterr().out == ""


def use_without(cache, capsys):
    "Whatever is asked of it, there is nothing in it, and it says so once."
    for _ in range(3):
        put(cache, range(5))
        assert held(cache, range(5)) == []
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "everything goes on without it" in said
    return said


def test_a_locked_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CacheFile, "timeout_s", 0.05)
    other = VectorCache(tmp_path, WIDE)
    put(other, range(5))
    other.file.connection.execute("BEGIN EXCLUSIVE")
    assert "database is locked" in use_without(VectorCache(tmp_path, WIDE), capsys)
    other.file.connection.execute("COMMIT")
    assert held(other, range(5)) == list(range(5))


def test_a_full_disk(tmp_path, capsys):
    cache = VectorCache(tmp_path, WIDE)
    cache.file.attempt(count_bytes)
    cache.file.connection.execute("PRAGMA max_page_count = 9")  # SQLite then says what it says when the disk is full
    cache.put({key(i): vector(i, 100_000) for i in range(5)})
    assert "disk is full" in use_without(cache, capsys)
    assert held(VectorCache(tmp_path, WIDE), range(5)) == []


@pytest.mark.parametrize("kind", ["no folder", "a folder to read only", "a file to read only"])
def test_no_access(kind, tmp_path, capsys):
    if kind == "no folder":
        (tmp_path / "file").touch()
        use_without(VectorCache(tmp_path / "file" / "cache", WIDE), capsys)
        return
    if os.geteuid() == 0:
        pytest.skip("root can write everywhere")
    put(cache := VectorCache(tmp_path, WIDE), range(5))
    cache.close()
    path, mode = (tmp_path, 0o500) if "folder" in kind else (cache.file.path, 0o400)
    path.chmod(mode)
    try:
        use_without(VectorCache(tmp_path, WIDE), capsys)
    finally:
        path.chmod(0o700)


def test_an_interruption_leaves_what_was_there(tmp_path):
    cache = VectorCache(tmp_path, WIDE)
    put(cache, range(5))

    def interrupt(connection):
        connection.execute("DELETE FROM vectors")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.file.attempt(interrupt)
    assert held(cache, range(5)) == list(range(5))
