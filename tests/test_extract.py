"""Parts and the table made of them: order, types, what is done, what is set aside."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from w2v2nb import samples
from w2v2nb.batch import Batches
from w2v2nb.data import WaveformDataset, read_annotations
from w2v2nb.encoder import Encoder
from w2v2nb.extract import column_names, extract, merge_parts, part_paths, rows_done, rows_table, write_part
from w2v2nb.transforms import pipeline

TABLE = read_annotations(f"{samples.split_root()}/test.csv").head(10)


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_pretrained(samples.checkpoint(), device="cpu")


def batches(table=TABLE, **options):
    return Batches(WaveformDataset(table, [], pipeline(samples.prefix())), **options or {"max_padded_s": 20})


def table_of(rows, width=3):
    embeddings = torch.tensor(rows, dtype=torch.float32)[:, None, None].expand(-1, 1, width)
    return rows_table(rows, [f"{row:03}" for row in rows], embeddings.contiguous(), ["embedding"], [row % 2 == 0 for row in rows])


@pytest.mark.parametrize(
    ("layers", "names"), [([12], ["embedding"]), ([0, 6, 12], ["embedding_0", "embedding_6", "embedding_12"])]
)
def test_column_names(layers, names):
    assert column_names(layers) == names


def test_parts_in_any_order_become_one_table_in_row_order(tmp_path):
    for rows in ([5, 2], [0, 9, 1], [2, 7]):
        write_part(tmp_path / "work", table_of(rows))
    assert rows_done(tmp_path / "work") == {row: row % 2 == 0 for row in (0, 1, 2, 5, 7, 9)}
    assert merge_parts(tmp_path / "work", tmp_path / "t.parquet", {"layer": "12"}) == 6
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["uid"].to_pylist() == ["000", "001", "002", "005", "007", "009"]
    assert np.stack(table["embedding"].to_numpy())[:, 0].tolist() == [0, 1, 2, 5, 7, 9]
    assert table.schema.metadata == {b"layer": b"12"}


def test_an_unfinished_part_is_not_a_part(tmp_path):
    write_part(tmp_path, table_of([0]))
    (tmp_path / ".part-000001.parquet.abc").mkdir()
    (tmp_path / ".part-000001.parquet.abc" / "part-000001.parquet").write_bytes(b"PAR1 half")
    assert set(rows_done(tmp_path)) == {0} and write_part(tmp_path, table_of([1])).name == "part-000001.parquet"


def test_no_parts_no_table(tmp_path):
    assert merge_parts(tmp_path, tmp_path / "t.parquet", {}) == 0 and not (tmp_path / "t.parquet").exists()


def test_embeddings_do_not_depend_on_the_batch(encoder, tmp_path):
    found = []
    for name, options in dict(one={"max_items": 1}, many={"max_padded_s": 60}).items():
        extract(encoder, batches(**options), tmp_path / name, layers=[0, 2, -1], pooling="max")
        merge_parts(tmp_path / name, tmp_path / f"{name}.parquet", {})
        table = pq.read_table(tmp_path / f"{name}.parquet")
        assert table["uid"].to_pylist() == TABLE.uid.tolist()
        assert table.schema.names[1:] == ["embedding_0", "embedding_2", "embedding_3"]
        found.append(np.stack([np.stack(table[c].to_numpy()) for c in table.schema.names[1:]]))
    np.testing.assert_allclose(*found, atol=1e-5, rtol=1e-5)


def test_a_part_is_closed_after_some_seconds(encoder, tmp_path):
    extract(encoder, batches(max_items=2), tmp_path / "often", part_s=0.0)
    extract(encoder, batches(max_items=2), tmp_path / "once", part_s=1e9)
    assert len(part_paths(tmp_path / "often")) == 5 and len(part_paths(tmp_path / "once")) == 1


def test_an_embedding_that_is_not_finite_is_set_aside(tmp_path):
    broken = Encoder.from_pretrained(samples.checkpoint(), device="cpu")
    with torch.no_grad():
        broken.model.encoder.layers[-1].final_layer_norm.bias[0] = float("nan")
    data = batches()
    extract(broken, data, tmp_path / "work")
    assert [failure.stage for failure in data.failures] == ["encode"] * 10 and not part_paths(tmp_path / "work")
