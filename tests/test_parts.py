"""Parts and the table made of them: order, types, what is done, kills, and memory."""

import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from w2v2nb.parts import (
    BLOCK_BYTES,
    cut_blocks,
    find_runs,
    merge_parts,
    part_paths,
    read_progress,
    remove_unfinished,
    rows_done,
    rows_table,
    write_part,
    write_progress,
)


def table_of(rows, width=3, counts=None):
    "A table whose vectors say which recording and which row of it they are."
    counts = counts or [1] * len(rows)
    values = np.repeat(rows, counts)[:, None] + np.concatenate([np.arange(n) / 1024 for n in counts])[:, None]
    embedding = np.broadcast_to(values, (len(values), width)).astype("float32")
    uids, is_shortened = [f"{row:06}" for row in rows], [row % 2 == 0 for row in rows]
    return rows_table(rows, uids, is_shortened, counts, {"time_s": values[:, 0], "embedding": embedding})


def test_parts_in_any_order_become_one_table_in_row_order(tmp_path):
    for rows in ([5, 2], [0, 9, 1], [2, 7]):
        write_part(tmp_path / "work", [table_of(rows)])
    rows, is_shortened = rows_done(tmp_path / "work")
    assert rows.tolist() == [0, 1, 2, 5, 7, 9] and is_shortened.tolist() == [True, False, True, False, False, False]
    assert merge_parts(tmp_path / "work", tmp_path / "t.parquet", {"layer": "12"}) == 6
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["uid"].to_pylist() == ["000000", "000001", "000002", "000005", "000007", "000009"]
    assert np.stack(table["embedding"].to_numpy())[:, 0].tolist() == [0, 1, 2, 5, 7, 9]
    assert table.schema.metadata == {b"layer": b"12"}
    assert table.schema.types == [pa.string(), pa.float64(), pa.list_(pa.float32(), 3)]


def test_an_unfinished_part_is_not_a_part(tmp_path):
    write_part(tmp_path, [table_of([0])])
    (tmp_path / ".part-000001.parquet.abc").mkdir()
    (tmp_path / ".part-000001.parquet.abc" / "part-000001.parquet").write_bytes(b"PAR1 half")
    write_progress(tmp_path, 2, 1, 1, 0, 1.0, 1.0, [])
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert rows_done(tmp_path)[0].tolist() == [0]
    assert write_part(tmp_path, [table_of([1])]).name == "part-000001.parquet"
    remove_unfinished(tmp_path)
    (tmp_path / ".DS_Store").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part-000000.parquet", "part-000001.parquet", "progress.json"]


def test_no_parts_no_table(tmp_path):
    write_progress(tmp_path, 2, 0, 0, 2, 0.0, 1.0, [])
    for name, is_folder in (("t.parquet", False), ("frames", True)):
        assert merge_parts(tmp_path, tmp_path / name, {}, is_folder) == 0 and not (tmp_path / name).exists()


def test_a_recording_in_two_parts_comes_from_the_first_with_all_its_rows(tmp_path):
    write_part(tmp_path, [table_of([4, 3], counts=[2, 3])])
    write_part(tmp_path, [table_of([3, 5], counts=[9, 1])])
    assert merge_parts(tmp_path, tmp_path / "t.parquet", {}) == 6
    assert pq.read_table(tmp_path / "t.parquet")["uid"].to_pylist() == ["000003"] * 3 + ["000004"] * 2 + ["000005"]


@pytest.mark.parametrize("block_rows", [5, 64, 10_000])
@pytest.mark.parametrize("group_bytes", [12, 200, 2**21])
def test_blocks_and_groups_of_any_size_give_the_same_table(tmp_path, monkeypatch, block_rows, group_bytes):
    rng = np.random.default_rng(0)
    rows = rng.permutation(90)
    counts = {int(row): int(rng.integers(1, 12)) for row in rows}
    monkeypatch.setattr("w2v2nb.parts.BLOCK_BYTES", block_rows * 12)
    monkeypatch.setattr("w2v2nb.parts.write_tables.__defaults__", (group_bytes, None))
    for some in np.array_split(rows, 11):
        # a table for each recording, as a stream would bring them
        write_part(tmp_path / "work", [table_of([int(r)], counts=[counts[r]]) for r in some])
    expected = [np.float32(row + i / 1024) for row in range(90) for i in range(counts[row])]
    n_rows = merge_parts(tmp_path / "work", tmp_path / "t.parquet", {"a": "b"})
    merge_parts(tmp_path / "work", tmp_path / "frames", {"a": "b"}, is_folder=True, n_blocks=2)
    files = sorted((tmp_path / "frames").iterdir())
    assert n_rows == len(expected) and len(files) == -(-n_rows // (2 * block_rows))
    for table in (pq.read_table(tmp_path / "t.parquet"), pa.concat_tables(pq.read_table(file) for file in files)):
        assert [v[0] for v in table["embedding"].to_pylist()] == expected
        assert table["time_s"].cast("float32").to_pylist() == expected and table.schema.metadata == {b"a": b"b"}


def test_blocks_hold_equally_many_rows(tmp_path):
    write_part(tmp_path, [table_of([0, 1, 2], counts=[10, 1, 5])])
    blocks = list(cut_blocks(find_runs(tmp_path), 4))
    assert [int(block["count"].sum()) for block in blocks] == [4, 4, 4, 4]


def test_a_large_table_is_merged_in_bounded_memory(tmp_path):
    rng, n_rows, width = np.random.default_rng(0), 40_000, 768
    for window in np.array_split(np.arange(n_rows), n_rows // 1000):
        for rows in np.array_split(rng.permutation(window), 5):
            write_part(tmp_path / "work", [table_of(rows.tolist(), width)])
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        assert merge_parts(tmp_path / "work", tmp_path / "t.parquet", {}) == n_rows
        peak = pool.max_memory() + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert peak < 7 * BLOCK_BYTES < n_rows * width * 4  # which is all the vectors
    with pq.ParquetFile(tmp_path / "t.parquet") as file:
        uids = file.read(columns=["uid"])["uid"].to_pylist()
    assert uids == [f"{row:06}" for row in range(n_rows)]


def test_progress_is_one_json_object(tmp_path):
    write_progress(tmp_path / "work", 9, 4, n_new=3, failed=1, audio_s=12.34567, seconds=2.0, metadata_problems=["x"])
    about = json.loads((tmp_path / "work" / "progress.json").read_text())
    assert about == read_progress(tmp_path / "work") and read_progress(tmp_path / "none") == {}
    assert about.pop("updated").endswith("+00:00") and about.pop("metadata_problems") == ["x"]
    assert about == {"total": 9, "done": 4, "n_new": 3, "failed": 1, "audio_s": 12.346, "seconds": 2.0}
    assert part_paths(tmp_path / "work") == []
