"""Features read once: what their keys depend on, what is encoded and what is kept, what is set aside, and batches of them."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from w2v2nb import features as module
from w2v2nb import samples
from w2v2nb.batch import Batch, Batches
from w2v2nb.cache import VectorCache
from w2v2nb.encoder import Encoder
from w2v2nb.features import FeatureBatches, FeatureReader, fingerprint_encoder, read_features
from w2v2nb.loading import RecordingError


def load():
    return Encoder.from_pretrained(samples.checkpoint(), device="cpu")


@pytest.fixture(scope="module")
def encoder():
    return load()


@pytest.fixture
def cache(tmp_path):
    return VectorCache(tmp_path / "cache", 10**8)


class Noises:
    "Seeded noise of 0.1 to 0.5 s with two labels; some cannot be read."

    def __init__(self, n=12, bad=(), first=0):
        self.uids, self.bad, self.first = [f"{first + i:03}" for i in range(n)], bad, first

    def __len__(self):
        return len(self.uids)

    def __getitem__(self, i):
        if i in self.bad:
            raise RecordingError(self.uids[i], "", "decode", "no sound")
        rng = np.random.default_rng(self.first + i)
        waveform = torch.from_numpy(rng.normal(size=(1, rng.integers(1600, 8000)))).float()
        return dict(uid=self.uids[i], waveform=waveform, sample_rate=16000, targets=np.array([i % 2, np.nan]))


def embed(encoder, dataset, **options):
    return encoder.embed([dataset[i]["waveform"][0] for i in range(len(dataset))], **options)


def make_batch(waveform, uid="000", target=0.0):
    waveform = torch.as_tensor(waveform)
    return Batch([0], [uid], waveform[None], torch.tensor([len(waveform)]), torch.tensor([[target]]), is_shortened=[False])


def keys_of(encoder, waveform, layers=(3,), poolings=("mean",), cache=True, **about):
    columns = FeatureReader(encoder, list(layers), list(poolings), cache).columns
    return module.make_keys(make_batch(waveform, **about), columns)[0]


def change_weight(encoder):
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1e-6


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        lambda encoder: setattr(encoder, "precision", "bf16"),
        lambda encoder: encoder.preprocessor.update(do_normalize=not encoder.do_normalize),
        lambda encoder: encoder.config.update(layer_norm_eps=1e-3),
    ],
)
def test_what_is_of_another_encoder_has_another_key(change):
    encoder, waveform = load(), torch.randn(1600)
    before = keys_of(encoder, waveform)
    assert keys_of(load(), waveform) == before
    change(encoder)
    assert keys_of(encoder, waveform) != before


def test_what_is_of_other_audio_or_another_column_has_another_key(encoder, monkeypatch):
    waveform = torch.randn(1600)
    louder, shorter = waveform.clone(), waveform[:-1]
    louder[800] += 1e-6
    found = [keys_of(encoder, x) for x in (waveform, louder, shorter)]
    found += [keys_of(encoder, waveform, layers=[2]), keys_of(encoder, waveform, poolings=["max"])]
    monkeypatch.setattr(module, "NUMERICS", 0)
    found += [keys_of(encoder, waveform)]
    assert len({key for keys in found for key in keys}) == 6


def test_names_targets_and_padding_do_not_matter(encoder):
    waveform = torch.randn(1600)
    batch = make_batch(waveform)
    padded = replace(batch, waveform=torch.cat([batch.waveform, torch.zeros(1, 99)], 1))
    (key,) = keys_of(encoder, waveform)
    assert keys_of(encoder, waveform, uid="other", target=1.0) == [key]
    assert key in module.make_keys(padded, FeatureReader(encoder, [3], ["mean"], cache=True).columns)[0]


def test_the_fingerprint_takes_weights_of_any_type():
    encoder = load()
    encoder.register_buffer("brain", torch.ones(3, dtype=torch.bfloat16))
    encoder.register_buffer("scalar", torch.tensor(7))
    before = fingerprint_encoder(encoder)
    encoder.brain[1] = 2
    assert len({before, fingerprint_encoder(encoder), fingerprint_encoder(load())}) == 3


@pytest.mark.parametrize("options", [{"max_items": 5}, {"max_padded_s": 2}, {"max_items": 4, "shuffle": True, "seed": 3}])
@pytest.mark.parametrize("pooling", ["mean", "sum", "max", "mean+std"])
def test_features_are_the_encoder_s_embeddings(encoder, cache, pooling, options):
    dataset = Noises()
    expected = embed(encoder, dataset, layer=[0, 2, 3], pooling=pooling)
    for kept in (None, cache, cache):
        table = read_features(encoder, Batches(dataset, **options), [0, 2, 3], pooling, kept)
        torch.testing.assert_close(table.features, expected, rtol=1e-5, atol=1e-4 if pooling == "sum" else 1e-5)
        assert table.uids == dataset.uids and table.features.dtype == torch.float32
        assert table.targets[:, 0].tolist() == [i % 2 for i in range(12)] and table.targets[:, 1].isnan().all()


def test_a_pooling_that_does_not_exist_is_refused(encoder):
    with pytest.raises(ValueError, match="pooling is 'median'"):
        read_features(encoder, Batches(Noises(), max_items=4), [3], "median")


def test_only_what_is_missing_is_encoded(encoder, cache, passes):
    def count(dataset, layers, pooling="mean", **options):
        passes.clear()
        read_features(encoder, Batches(dataset, **options or {"max_items": 5}), layers, pooling, cache)
        return sum(passes)

    assert count(Noises(6), [0, 3]) == 6
    assert count(Noises(6), [0, 3], max_items=2) == count(Noises(6), [3]) == count(Noises(6), [3, 0]) == 0
    assert count(Noises(12), [3]) == 6  # the first six are there
    assert count(Noises(12), [0, 3]) == 6  # the others lack layer 0
    assert count(Noises(4, first=10), [3]) == 2  # two of them under another name in another table
    assert count(Noises(12), [0, 3], "max") == 12
    assert count(Noises(12), [0, 3]) == 0


def test_another_process_finds_them(encoder, cache, passes):
    code = """if True:
        import sys; sys.path.insert(0, sys.argv[1])
        from test_features import *
        read_features(load(), Batches(Noises(), max_items=4), [3], "mean", VectorCache(sys.argv[2], 10**8))
    """
    folder = cache.file.path.parent
    subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__), folder], check=True)
    table = read_features(encoder, Batches(Noises(), max_items=4), [3], "mean", cache)
    assert not passes
    torch.testing.assert_close(table.features, embed(encoder, Noises(), layer=[3]), rtol=1e-5, atol=1e-5)


def test_a_killed_run_keeps_what_it_has(encoder, cache, passes):
    code = """if True:
        import sys; sys.path.insert(0, sys.argv[1])
        from test_features import *
        def wait(*_):
            if sum(sizes) == 8:
                print("eight", flush=True); sys.stdin.read()
        encoder, sizes = load(), []
        encoder.register_forward_pre_hook(wait)
        encoder.register_forward_hook(lambda _, inputs, outputs: sizes.append(len(inputs[0])))
        read_features(encoder, Batches(Noises(), max_items=4), [3], "mean", VectorCache(sys.argv[2], 10**8))
    """
    command = [sys.executable, "-c", code, os.path.dirname(__file__), cache.file.path.parent]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "eight\n"  # two batches are done, the third is about to be
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    run.stdin.close(), run.stdout.close()
    read_features(encoder, Batches(Noises(), max_items=4), [3], "mean", cache)
    assert sum(passes) == 4


def test_what_cannot_be_read_or_is_not_finite_is_set_aside(cache):
    encoder, dataset = load(), Noises(8, bad=[2])

    def spoil(_, inputs, outputs):
        for k, n in enumerate(inputs[1].tolist()):
            if n == dataset[5]["waveform"].shape[1]:
                outputs[0][0][k, 0] = torch.nan

    encoder.register_forward_hook(spoil)
    for kept in (None, cache, cache):
        table = read_features(encoder, batches := Batches(dataset, max_items=3), [1, 3], "mean", kept)
        found = [(failure.index, failure.uid, failure.stage) for failure in table.notes.failures]
        assert sorted(found) == [(2, "002", "decode"), (5, "005", "encode")] and batches.failures == table.notes.failures
        assert table.features.isfinite().all((1, 2)).tolist() == [i not in (2, 5) for i in range(8)]
        assert table.features[[2, 5]].isnan().all() and table.uids == dataset.uids
        assert table.targets[5, 0] == 1 and table.targets[2].isnan().all()


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_recording_that_does_not_fit_is_set_aside(encoder, cache, is_cached, monkeypatch):
    forward, dataset = Encoder.forward, Noises(8)
    longest = max(range(8), key=lambda i: dataset[i]["waveform"].shape[1])
    room = sorted(dataset[i]["waveform"].shape[1] for i in range(8))[-2]

    def forward_if_it_fits(self, waveform, lengths, layers):
        if waveform.numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, waveform, lengths, layers)

    monkeypatch.setattr(Encoder, "forward", forward_if_it_fits)
    table = read_features(encoder, Batches(dataset, max_items=8), [3], "mean", cache if is_cached else None)
    assert [failure.index for failure in table.notes.failures] == [longest]
    assert table.features.isnan().any((1, 2)).nonzero().flatten().tolist() == [longest]


def test_nothing_readable_gives_a_table_of_nothing(encoder):
    table = read_features(encoder, Batches(Noises(3, bad=[0, 1, 2]), max_items=2), [0, 3])
    assert table.features.shape == (3, 2, encoder.hidden_size) and table.features.isnan().all()
    assert len(table.notes.failures) == 3 and table.targets.shape == (3, 0)


def test_processes_read_their_shares(encoder):
    tables = [
        read_features(encoder, Batches(Noises(), max_items=4, shuffle=True, rank=rank, n_ranks=2), [3], "mean") for rank in (0, 1)
    ]
    there = [table.features.isfinite().all((1, 2)) for table in tables]
    assert (there[0] ^ there[1]).all() and not any(table.notes.failures for table in tables)
    for table, mine in zip(tables, there, strict=True):
        assert [bool(uid) for uid in table.uids] == mine.tolist()
        torch.testing.assert_close(table.features[mine], embed(encoder, Noises(), layer=[3])[mine], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_shuffled", [False, True])
@pytest.mark.parametrize(("rank", "n_ranks"), [(0, 1), (0, 3), (1, 3), (2, 3)])
def test_steps_are_those_of_the_recordings(encoder, rank, n_ranks, is_shuffled):
    dataset = Noises(13, bad=[0, 7, 11])
    table = read_features(encoder, Batches(dataset, max_items=20), [3])
    options = dict(max_items=4, shuffle=is_shuffled, seed=5, rank=rank, n_ranks=n_ranks)
    features = FeatureBatches(table.uids, table.features, table.targets, **options, notes=table.notes)
    recordings = Batches(dataset, **options)
    for epoch in (1, 2):
        for batches in (features, recordings):
            batches.set_epoch(epoch)
        found, expected = [*features], [*recordings]
        if is_shuffled:
            assert [batch.uids for batch in found] == [batch.uids for batch in expected]
            assert [batch.index for batch in found] == [batch.index for batch in expected]
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one.targets, other.targets.reshape(one.targets.shape))
        else:  # recordings come sorted by length
            assert sum((batch.index for batch in found), []) == [i for i in range(13) if i not in (0, 7, 11)]
        for batch in found:
            assert torch.equal(batch.features, table.features[batch.index]) and len(batch) == len(batch.uids)


def test_a_step_of_nothing_is_empty_and_places_stay():
    features = torch.zeros(5, 1, 2)
    order = np.random.default_rng([0, 0]).permutation(5)
    features[order[[0, 1, 2]]] = torch.nan  # the first step, and the first of the second

    def read(**share):
        batches = FeatureBatches("abcde", features, np.zeros((5, 1)), max_items=2, shuffle=True, **share)
        return [batch.places for batch in batches]

    assert read() == [[], [1], [0]]
    assert sorted(read(rank=rank, n_ranks=2) for rank in (0, 1)) == [[[], [], []], [[], [1], [0]]]  # a pair stays together


def test_adapters_count_by_what_they_do():
    from w2v2nb.adapt import add_lora

    found = []
    for alpha in (16, 64):
        one = load()
        add_lora(one, rank=4, alpha=alpha, seed=0)
        with torch.no_grad():
            for name, weight in one.named_parameters():
                if "lora_B" in name:
                    weight.fill_(0.1)
        found.append(fingerprint_encoder(one))
    assert len({*found, fingerprint_encoder(load())}) == 3
    untouched = load()
    add_lora(untouched, rank=4, alpha=16)
    assert fingerprint_encoder(untouched) == fingerprint_encoder(load())  # adapters begin as nothing


def test_what_a_pass_adds_to_the_failures_does_not_pile_up(encoder):
    table = read_features(encoder, Batches(Noises(6, bad=[1]), max_items=3), [3])
    batches = FeatureBatches(table.uids, table.features.numpy(), table.targets.numpy(), max_items=3, notes=table.notes)
    for _ in range(3):
        for _batch in batches:
            batches.failures.append("one more")
        assert len(batches.failures) == 3 and len(table.notes.failures) == 1
    assert (batches.n_recordings, batches.n_shortened, batches.metadata_problems) == (6, 0, [])
    batches.close()
