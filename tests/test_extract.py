"""Batches to rows: layers, poolings, windows, frames, heads, long recordings; when parts close; what is set aside."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from w2v2nb import samples
from w2v2nb.batch import Batches
from w2v2nb.cache import VectorCache
from w2v2nb.data import WaveformDataset, read_annotations
from w2v2nb.encoder import Encoder, pool
from w2v2nb.extract import EXACT_S, Parts, Recipe, extract
from w2v2nb.model import Classifier
from w2v2nb.parts import merge_parts, part_paths, read_progress, rows_done, rows_table, write_progress
from w2v2nb.transforms import pipeline

TABLE = read_annotations(f"{samples.split_root()}/test.csv").head(10)
TRANSFORM = pipeline(samples.prefix())


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_pretrained(samples.checkpoint(), device="cpu").eval()


@pytest.fixture(scope="module")
def waveforms():
    return [TRANSFORM({"uid": uid})["waveform"][0] for uid in TABLE.uid]


def batches(dataset=None, **options):
    return Batches(dataset or WaveformDataset(TABLE, [], TRANSFORM), **options or {"max_padded_s": 20})


class Tones:
    "Recordings of given lengths in seconds, row by row."

    def __init__(self, *lengths_s):
        self.lengths_s, self.uids = lengths_s, [f"{i:03}" for i in range(len(lengths_s))]

    def __len__(self):
        return len(self.lengths_s)

    def __getitem__(self, i):
        torch.manual_seed(i)
        waveform = torch.randn(1, round(self.lengths_s[i] * 16000))
        return dict(uid=self.uids[i], waveform=waveform, sample_rate=16000, targets=np.zeros(0))


def embed(encoder, folder, recipe, dataset=None, cache=None, **options):
    "The table that `extract` and `merge_parts` make, as one."
    data = batches(dataset, **options)
    extract(encoder, data, folder / "work", recipe, cache=cache)
    merge_parts(folder / "work", folder / "t.parquet", {})
    assert not data.failures
    return pq.read_table(folder / "t.parquet")


def matrix(table, column="embedding"):
    return torch.from_numpy(np.stack(table[column].to_numpy()))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (Recipe([12]), ["embedding"]),
        (Recipe([0, 6, 12]), ["embedding_0", "embedding_6", "embedding_12"]),
        (Recipe([12], ["max", "mean"]), ["embedding_max", "embedding_mean"]),
        (Recipe([0, 12], ["mean", "sum"]), ["embedding_0_mean", "embedding_0_sum", "embedding_12_mean", "embedding_12_sum"]),
        (Recipe([12], []), ["embedding"]),
        (Recipe([0, 12], []), ["embedding_0", "embedding_12"]),
        (Recipe([3], dense=[torch.nn.Linear(2, 2)]), ["embedding"]),
        (Recipe([0, 12], embed=torch.nn.Identity()), ["embedding"]),
        (Recipe([3], dense=[torch.nn.Linear(2, 2)] * 2), ["embedding_0", "embedding_1"]),
    ],
)
def test_column_names(recipe, names):
    assert recipe.columns == names


def test_every_layer_and_pooling_of_one_pass_is_that_of_each_recording_alone(encoder, waveforms, tmp_path):
    table = embed(encoder, tmp_path, Recipe([0, 1, 2, 3], ["mean", "max", "sum"]))
    assert table["uid"].to_pylist() == TABLE.uid.tolist()
    assert table.schema.names[1:] == [f"embedding_{k}_{p}" for k in range(4) for p in ("mean", "max", "sum")]
    for layer in range(4):
        for pooling in ("mean", "max", "sum"):
            alone = torch.cat([encoder.embed([w], layer=layer, pooling=pooling) for w in waveforms])
            close(matrix(table, f"embedding_{layer}_{pooling}"), alone, 1e-4 if pooling == "sum" else 1e-5)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_windows_pool_the_frames_centered_in_them(encoder, waveforms, tmp_path, pooling):
    table = embed(encoder, tmp_path, Recipe([3], [pooling], window_s=0.5, hop_s=0.2))
    assert table.schema.names == ["uid", "start_s", "end_s", "embedding"]
    rows, found = table.select(["uid", "start_s", "end_s"]).to_pylist(), matrix(table)
    k = 0
    for uid, waveform in zip(TABLE.uid, waveforms, strict=True):
        hidden, times = encoder.frames(waveform, layer=3)
        start, n = 0.0, 0
        while n == 0 or start + 0.5 - 0.2 < len(waveform) / 16000 - 1e-9:
            end = min(start + 0.5, len(waveform) / 16000)
            assert rows[k] == pytest.approx(dict(uid=uid, start_s=start, end_s=end))
            inside = hidden[(times >= start - 1e-9) & (times < end - 1e-9)]
            inside = inside if len(inside) else hidden[-1:]
            close(found[k], inside.amax(0) if pooling == "max" else inside.mean(0))
            k, n = k + 1, n + 1
            start = 0.2 * n
    assert k == len(rows)


def test_a_window_without_a_frame_takes_the_last_one(encoder, tmp_path):
    # two whole windows and 2 ms; a recording shorter than a window; one of a single frame
    dataset = Tones(1.002, 0.3, 0.025)
    table = embed(encoder, tmp_path, Recipe([3], window_s=0.5), dataset)
    assert table["uid"].to_pylist() == ["000", "000", "000", "001", "002"]
    assert table["end_s"].to_pylist() == [0.5, 1.0, 1.002, 0.3, 0.025] and matrix(table).isfinite().all()
    close(matrix(table)[2], encoder.frames(dataset[0]["waveform"][0], 3)[0][-1])


def test_frames_are_the_encoder_s_with_their_times(encoder, waveforms, tmp_path):
    table = embed(encoder, tmp_path, Recipe([0, 3], []))
    assert table.schema.names == ["uid", "time_s", "embedding_0", "embedding_3"]
    expected = [encoder.frames(w, 3) for w in waveforms]
    assert table["uid"].to_pylist() == [u for u, (h, _) in zip(TABLE.uid, expected, strict=True) for _ in h]
    close(matrix(table, "embedding_3"), torch.cat([h for h, _ in expected]))
    close(matrix(table, "embedding_0"), torch.cat([encoder.frames(w, 0)[0] for w in waveforms]))
    close(torch.tensor(table["time_s"].to_pylist()), torch.cat([t for _, t in expected]).float())


def test_seconds_are_the_recording_s_whatever_rate_the_encoder_expects(encoder, tmp_path):
    class Slow(Tones):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"sample_rate": 8000}

    for recipe in (Recipe([3], []), Recipe([3], window_s=2.0)):
        data = Batches(Slow(1.0), max_items=1, sample_rate=8000)  # 16000 samples: two seconds
        extract(encoder, data, work := tmp_path / str(bool(recipe.poolings)), recipe)
        merge_parts(work, tmp_path / "t.parquet", {})
        table = pq.read_table(tmp_path / "t.parquet")
        last = table["end_s"][-1].as_py() if recipe.poolings else table["time_s"][-1].as_py()
        assert last == pytest.approx(2.0 if recipe.poolings else (48 * 320 + 200) / 8000)


def run_model(model, waveforms):
    "What a model's own forward makes of recordings: embeddings, what goes into each head's last layer, outputs."
    lengths = torch.tensor([len(w) for w in waveforms])
    padded, seen = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), []
    hooks = [head.output.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for head in model.heads]
    with torch.no_grad():
        embedding, outputs = model.embed(padded, lengths), model(padded, lengths)
    [hook.remove() for hook in hooks]
    return embedding, seen, outputs


@pytest.mark.parametrize("options", [{}, {"activation": "tanh", "layer_norm": True, "size": 8}])
@pytest.mark.parametrize("classifiers", [[["a", "b"]], [["a"], ["b", "c"]]])
def test_heads_get_and_make_what_the_model_s_own_forward_does(encoder, waveforms, tmp_path, classifiers, options):
    model = Classifier(encoder, classifiers, pooling="max", layer=2, head=options).eval()
    embedding, inside, _ = run_model(model, waveforms)
    close(matrix(embed(encoder, tmp_path / "pooled", Recipe([model.layer], [model.pooling]))), embedding)
    dense = embed(encoder, tmp_path / "dense", Recipe([model.layer], [model.pooling], dense=[h.features for h in model.heads]))
    names = ["embedding"] if len(classifiers) == 1 else ["embedding_0", "embedding_1"]
    assert dense.schema.names[1:] == names
    for name, expected in zip(names, inside, strict=True):
        close(matrix(dense, name), expected)


@pytest.mark.parametrize("options", [{"pooling": "attention", "layer": 2}, {"layer": "weighted"}])
def test_a_model_that_has_learned_to_pool_does_it_by_itself(encoder, waveforms, tmp_path, options):
    model = Classifier(encoder, [["a", "b"]], **options).eval()
    embedding, (inside,), _ = run_model(model, waveforms)
    recipe = Recipe(model.layers, [], embed=model.embed)
    close(matrix(embed(encoder, tmp_path / "pooled", recipe, max_items=3)), embedding)
    recipe.dense = [model.heads[0].features]
    close(matrix(embed(encoder, tmp_path / "dense", recipe)), inside)


def test_a_cached_extraction_is_that_without_a_cache(encoder, tmp_path, passes):
    cache, classifier = VectorCache(tmp_path / "cache", 10**8), Classifier(encoder, [["a"]], layer=3).eval()
    dense = Recipe([3], dense=[classifier.heads[0].features])
    for k, recipe in enumerate((Recipe([0, 3], ["mean", "max"]), Recipe([3]), Recipe([3], chunk_s=20.0), dense)):
        plain = embed(encoder, tmp_path / f"plain{k}", recipe)
        for again in range(2):
            passes.clear()
            found = embed(encoder, tmp_path / f"{k}{again}", recipe, cache=cache)
            assert sum(passes) == (0 if k or again else len(TABLE))  # the first has made what the others need
            assert found.schema == plain.schema and found["uid"] == plain["uid"]
            for name in recipe.columns:
                close(matrix(found, name), matrix(plain, name), 1e-6)


def test_an_extraction_with_a_cache_resumes(encoder, tmp_path, passes):
    cache = VectorCache(tmp_path / "cache", 10**8)
    expected = embed(encoder, tmp_path / "plain", Recipe([3]))
    passes.clear()
    for rows in (range(0, 10, 2), range(10)):  # the second finds half of it in the cache
        some = WaveformDataset(TABLE.iloc[list(rows)], [], TRANSFORM)
        extract(encoder, batches(some, max_items=4), work := tmp_path / f"work{len(rows)}", Recipe([3]), rows, 10, cache=cache)
    merge_parts(work, tmp_path / "t.parquet", {})
    found = pq.read_table(tmp_path / "t.parquet")
    assert sum(passes) == 10 and found["uid"] == expected["uid"]
    close(matrix(found), matrix(expected), 1e-6)


@pytest.mark.parametrize("recipe", [Recipe([3], window_s=0.5), Recipe([3], []), Recipe([3], embed=lambda x, n: x[:, :2])])
def test_windows_frames_and_learned_pooling_are_not_cached(encoder, tmp_path, recipe):
    cache = VectorCache(tmp_path / "cache", 10**8)
    embed(encoder, tmp_path, recipe, cache=cache)
    assert not cache.file.path.exists()


def test_nothing_that_is_not_finite_is_kept(tmp_path):
    broken = Encoder.from_pretrained(samples.checkpoint(), device="cpu")
    with torch.no_grad():
        broken.get_parameter([n for n, _ in broken.named_parameters() if "final_layer_norm.bias" in n][-1])[0] = float("nan")
    cache = VectorCache(tmp_path / "cache", 10**8)
    for _ in range(2):
        data = batches()
        extract(broken, data, tmp_path / "work", Recipe([3]), cache=cache)
        assert [failure.stage for failure in data.failures] == ["encode"] * 10
    assert cache.file.attempt(lambda connection: connection.execute("SELECT count(*) FROM vectors").fetchone()) == (0,)


@pytest.mark.parametrize(
    "recipe", [Recipe([0, 3], ["mean", "max", "sum"]), Recipe([3], ["mean", "max"], window_s=1.0, hop_s=0.4), Recipe([0, 3], [])]
)
def test_a_recording_in_pieces_is_pooled_from_the_frames_of_its_stream(encoder, tmp_path, recipe):
    recipe = Recipe(recipe.layers, recipe.poolings, recipe.window_s, recipe.hop_s, chunk_s=1.5, context_s=0.5)
    dataset = Tones(0.8, 4.1, 1.4, 3.03)
    table = embed(encoder, tmp_path, recipe, dataset)
    for i, uid in enumerate(dataset.uids):
        waveform = dataset[i]["waveform"][0]
        if len(waveform) > 1.5 * 16000:
            with torch.inference_mode():
                pieces = [hidden for _, hidden in encoder.stream(waveform, recipe.layers, chunk_s=1.5, context_s=0.5)]
            hidden = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
            assert len(pieces) > 1
        else:
            hidden = [encoder.frames(waveform, layer)[0] for layer in recipe.layers]
        rows = table.filter(np.array(table["uid"].to_pylist()) == uid)
        times = encoder.frame_times(len(hidden[0]))
        spans = [slice(None)] if not recipe.window_s else [(times >= 0.4 * k) & (times < 0.4 * k + 1) for k in range(len(rows))]
        for name, values in zip(
            recipe.columns, [(h, p) for h in hidden for p in recipe.poolings or [None]], strict=True
        ):  # fmt: skip
            h, pooling = values
            if pooling is None:
                close(matrix(rows, name), h)
            else:
                expected = [pool(h[span][None], torch.tensor([len(h[span])]), pooling)[0] for span in spans]
                close(matrix(rows, name), torch.stack(expected), 1e-4)


def test_frames_of_a_long_recording_are_written_while_it_is_encoded(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("w2v2nb.extract.Parts.__init__.__defaults__", (0, 3.0, 20_000))
    recipe = Recipe([3], [], chunk_s=1.0, context_s=0.5)
    table = embed(encoder, tmp_path, recipe, Tones(0.5, 6.0, 0.5), max_items=3)
    assert table["uid"].to_pylist() == ["000"] * 24 + ["001"] * 299 + ["002"] * 24
    uids = [set(pq.read_table(part)["uid"].to_pylist()) for part in part_paths(tmp_path / "work")]
    assert {"001"} in uids  # a part of its own
    assert table["time_s"].to_pylist()[24:323] == encoder.frame_times(299).tolist()


def test_a_recording_that_is_too_long_is_set_aside_with_what_to_do(encoder, tmp_path):
    data = batches(Tones(0.5, EXACT_S + 1, 0.5))
    extract(encoder, data, tmp_path, Recipe([3]))
    assert rows_done(tmp_path)[0].tolist() == [0, 2]
    (failure,) = data.failures
    assert (failure.uid, failure.stage) == ("001", "encode")
    for part in ("601 s long", "600 s", "--chunk_s 30", "--clip_length"):
        assert part in failure.error


def test_embeddings_do_not_depend_on_the_batch(encoder, tmp_path):
    found = []
    for name, options in dict(one={"max_items": 1}, many={"max_padded_s": 60}).items():
        table = embed(encoder, tmp_path / name, Recipe([0, 2, 3], ["max"]), **options)
        found.append(torch.stack([matrix(table, column) for column in table.schema.names[1:]]))
    close(*found)


def test_a_part_is_closed_after_some_seconds_of_encoding(encoder, tmp_path):
    extract(encoder, batches(max_items=2), tmp_path / "often", Recipe([3]), part_s=0.0)
    extract(encoder, batches(max_items=2), tmp_path / "once", Recipe([3]), part_s=1e9)
    assert len(part_paths(tmp_path / "often")) == 5 and len(part_paths(tmp_path / "once")) == 1


def test_only_encoding_counts_and_no_part_holds_more_than_it_should(tmp_path):
    row = rows_table([0], ["0"], [False], [1], {"embedding": np.zeros((1, 4), "float32")})
    parts = Parts(tmp_path, n_total=9, part_s=3.0)
    for expected, seconds, n_parts in [(0, 1.0, 0), (1.0, 1.0, 0), (1.5, 1.5, 1), (5.0, 5.0, 3), (5.0, 0.5, 3), (1.0, 2.6, 4)]:
        parts.expect(expected)
        parts.add(row, 1, seconds)
        assert len(part_paths(tmp_path)) == n_parts
    many = Parts(tmp_path / "large", n_total=9, part_s=1e9, part_bytes=100)
    for _ in range(20):
        many.add(row, 1, 0.0)
    assert len(part_paths(tmp_path / "large")) >= 4


def test_what_is_encoded_is_kept_when_something_raises(encoder, tmp_path):
    class Broken(Tones):
        def __getitem__(self, i):
            if i == 599:  # read when some hundred have been encoded
                raise MemoryError("no memory")
            return super().__getitem__(i)

    with pytest.raises(RuntimeError, match="no memory"):
        extract(encoder, batches(Broken(*[0.1] * 600), max_items=8), tmp_path, Recipe([3]), part_s=1e9)
    assert len(part_paths(tmp_path)) == 1 and len(rows_done(tmp_path)[0]) > 0


def test_a_part_that_cannot_be_written_is_not_tried_again(encoder, tmp_path, monkeypatch):
    tried = []

    def fail(work, tables):
        tried.append(work)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("w2v2nb.extract.write_part", fail)
    with pytest.raises(OSError, match="No space left"):
        extract(encoder, batches(max_items=2), tmp_path, Recipe([3]), part_s=0.0)
    assert len(tried) == 1


def test_progress_tells_how_far_it_is(encoder, tmp_path):
    extract(encoder, batches(max_items=2), tmp_path, Recipe([3]), rows=range(5, 15), n_total=20, part_s=0.0)
    about = json.loads((tmp_path / "progress.json").read_text())
    assert set(about) == {"total", "done", "n_new", "failed", "audio_s", "seconds", "updated", "metadata_problems"}
    seconds = sum(len(TRANSFORM({"uid": uid})["waveform"][0]) for uid in TABLE.uid) / 16000
    assert (about["total"], about["done"], about["n_new"], about["failed"]) == (20, 20, 10, 0)
    assert about["audio_s"] == pytest.approx(seconds, abs=0.01) and about["seconds"] > 0


@pytest.mark.parametrize("recipe", [Recipe([3]), Recipe([3], window_s=0.5), Recipe([3], []), Recipe([3], chunk_s=1.0)])
def test_an_embedding_that_is_not_finite_is_set_aside(tmp_path, recipe):
    broken = Encoder.from_pretrained(samples.checkpoint(), device="cpu")
    with torch.no_grad():
        broken.get_parameter([n for n, _ in broken.named_parameters() if "final_layer_norm.bias" in n][-1])[0] = float("nan")
    data = batches()
    extract(broken, data, tmp_path / "work", recipe)
    assert [failure.stage for failure in data.failures] == ["encode"] * 10 and not part_paths(tmp_path / "work")


def test_only_the_bad_recording_of_a_batch_is_set_aside(encoder, tmp_path, monkeypatch):
    from w2v2nb import extract as module

    class One(Tones):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"is_shortened": i == 2}

    monkeypatch.setattr(module, "find_finite", lambda columns: ~(torch.arange(len([*columns][-1])) == 4))
    data = batches(One(1.0, 1.0, 1.0), max_items=3)
    extract(encoder, data, tmp_path, Recipe([3], window_s=0.25))  # four windows each
    assert [failure.uid for failure in data.failures] == ["001"]
    rows, is_shortened = rows_done(tmp_path)
    assert rows.tolist() == [0, 2] and is_shortened.tolist() == [False, True]


def test_a_batch_that_does_not_fit_is_halved_and_a_recording_that_does_not_fit_is_set_aside(encoder, tmp_path, monkeypatch):
    "An encoder that has room for six seconds, padding included."
    expected = embed(encoder, tmp_path / "expected", Recipe([3]), Tones(2, 3, 1, 2.5))
    forward, sizes = Encoder.forward, []

    def forward_if_it_fits(self, waveform, lengths, layers):
        sizes.append(waveform.numel() / 16000)
        if sizes[-1] > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, waveform, lengths, layers)

    monkeypatch.setattr(Encoder, "forward", forward_if_it_fits)
    found = embed(encoder, tmp_path / "found", Recipe([3]), Tones(2, 3, 1, 2.5), max_padded_s=60)
    assert sizes[0] > 6 and found["uid"] == expected["uid"]
    np.testing.assert_allclose(*(np.stack(t["embedding"].to_numpy()) for t in (found, expected)), rtol=1e-5, atol=1e-5)
    data = batches(Tones(1, 8), max_padded_s=60)
    extract(encoder, data, tmp_path / "long", Recipe([3]))
    assert [(failure.uid, failure.stage) for failure in data.failures] == [("001", "encode")]
    assert rows_done(tmp_path / "long")[0].tolist() == [0]


def test_a_piece_that_does_not_fit_sets_its_recording_aside(encoder, tmp_path, monkeypatch):
    def stream(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Encoder, "stream", stream)
    data = batches(Tones(1, 8), max_padded_s=60)
    extract(encoder, data, tmp_path, Recipe([3], chunk_s=4.0))
    assert [(failure.uid, failure.stage) for failure in data.failures] == [("001", "encode")]
    assert "give a smaller --chunk_s" in data.failures[0].error and rows_done(tmp_path)[0].tolist() == [0]


def test_what_an_earlier_process_found_in_metadata_is_kept(encoder, tmp_path):
    write_progress(tmp_path, 20, 10, 10, 0, 5.0, 1.0, ["000007: metadata.json says 8000 Hz"])
    extract(encoder, batches(), tmp_path, Recipe([3]), rows=range(10, 20), n_total=20)
    assert "000007: metadata.json says 8000 Hz" in read_progress(tmp_path)["metadata_problems"]
