"""batch: every recording once, a fixed order, bounded memory, failures set aside, workers that end."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from w2v2nb.batch import Batches, Item, Reader, collate, cut, cut_stream
from w2v2nb.transforms import RecordingError
from w2v2nb.workers import WorkerError

LENGTHS = np.random.default_rng(0).integers(100, 5000, size=200)


class Fake:
    """Recordings of known lengths; lives here so that spawned workers can import it."""

    def __init__(self, lengths=LENGTHS, bad=(), bug=None, channels=1, kill=None, n_labels=2, rate=16000):
        self.uids = [f"{i:06}" for i in range(len(lengths))]
        self.lengths, self.bad, self.bug, self.channels, self.kill = list(lengths), set(bad), bug, channels, kill
        self.n_labels, self.rate, self.n_read = n_labels, rate, 0

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        self.n_read += 1
        if i in self.bad:
            raise RecordingError(self.uids[i], f"{self.uids[i]}.wav", "decode", ValueError("not audio"))
        if i == self.bug:
            raise KeyError("sample_rates")
        if i == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return dict(
            uid=self.uids[i],
            waveform=torch.full((self.channels, int(self.lengths[i])), float(i + 1)),
            sample_rate=self.rate,
            targets=np.full(self.n_labels, np.nan, np.float32),
            is_shortened=i % 10 == 0,
            **({"metadata_problem": f"{self.uids[i]}: metadata.json says 8 Hz"} if i % 50 == 0 else {}),
        )


def orders(batches):
    return [batch.index for batch in batches]


LIMITS = [dict(max_items=8), dict(max_padded_s=1.0), dict(max_items=5, max_padded_s=0.5), dict(max_items=1)]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_recording_comes_exactly_once(limits, shuffle):
    batches = Batches(Fake(), shuffle=shuffle, **limits)
    batches.window = 64
    assert sorted(sum(orders(batches), [])) == list(range(200)) == sorted(sum(orders(batches), []))
    assert batches.n_recordings == 200 and batches.n_shortened == 20 and not batches.failures


@pytest.mark.parametrize("limits", LIMITS)
def test_limits_are_kept(limits):
    for batch in Batches(Fake(), **limits):
        assert len(batch) <= limits.get("max_items", math.inf)
        assert batch.padded_s <= limits.get("max_padded_s", math.inf) or len(batch) == 1


def test_recording_beyond_the_limit_goes_alone():
    batches = list(Batches(Fake([100, 40000, 100, 50000]), max_padded_s=1))
    assert [(len(b), b.waveform.shape[1]) for b in batches] == [(2, 100), (1, 40000), (1, 50000)]


def test_rows_hold_their_recording_and_zeros():
    for batch in Batches(Fake(), max_items=7):
        for row, i, n in zip(batch.waveform, batch.index, batch.lengths, strict=True):
            assert n == LENGTHS[i] and (row[:n] == i + 1).all() and (row[n:] == 0).all()
        assert batch.uids == [f"{i:06}" for i in batch.index]
        assert batch.mask.dtype == torch.bool and batch.mask.sum(1).tolist() == batch.lengths.tolist()
        assert (batch.waveform.dtype, batch.lengths.dtype, batch.targets.dtype) == (torch.float32, torch.int64, torch.float32)
        assert batch.targets.isnan().all() and batch.targets.shape == (len(batch), 2)
        assert math.isclose(batch.audio_s, int(batch.lengths.sum()) / 16000)


def test_batch_of_one_and_no_labels():
    (batch,) = Batches(Fake([300], n_labels=0), max_items=8)
    assert batch.waveform.shape == (1, 300) and batch.mask.all() and batch.targets.shape == (1, 0)


def test_no_recordings():
    assert list(Batches(Fake([]), max_items=8)) == [] == list(Batches(Fake([]), max_items=8, shuffle=True))


def test_prediction_order_is_fixed_and_shuffled_order_belongs_to_seed_and_epoch():
    assert orders(Batches(Fake(), max_items=8)) == orders(Batches(Fake(), max_items=8, seed=5))

    def order(seed, epoch):
        batches = Batches(Fake(), max_items=8, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        return orders(batches)

    assert order(0, 0) == order(0, 0) and order(1, 3) == order(1, 3)
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_other_recordings_meet_in_another_epoch():
    batches, met = Batches(Fake(LENGTHS[:48]), max_items=8, shuffle=True), []
    for epoch in range(5):
        batches.set_epoch(epoch)
        met.append({frozenset(index) for index in orders(batches)})
    assert len(set.union(*met)) == 5 * 6


def test_shuffled_batches_are_not_sorted_by_length():
    longest = [batch.waveform.shape[1] for batch in Batches(Fake(), max_items=8, shuffle=True)]
    assert longest != sorted(longest)


@pytest.mark.parametrize("window", [3, 20, 64, 256])
@pytest.mark.parametrize("window_s", [0.1, 1800])
def test_every_training_step_has_its_recordings_but_the_last(window, window_s):
    batches = Batches(Fake(bad=[3, 50, 51, 120]), max_items=8, shuffle=True)
    batches.window, batches.window_s = window, window_s
    assert [len(batch) for batch in batches] == [8] * 24 + [4]


def test_sorting_saves_padding():
    in_order = [collate([Reader(Fake())[i] for i in range(k, k + 8)]) for k in range(0, 200, 8)]
    for shuffle in (False, True):
        batches = list(Batches(Fake(), max_items=8, shuffle=shuffle))
        padded, unsorted = sum(b.padded_s for b in batches), sum(b.padded_s for b in in_order)
        assert padded < 0.7 * unsorted
        assert padded < (1.2 if shuffle else 1.05) * sum(b.audio_s for b in batches)


def test_large_batches_of_short_recordings_are_still_sorted():
    lengths = np.random.default_rng(2).integers(200, 4000, size=4000)
    batches = list(Batches(Fake(lengths), max_padded_s=20))
    assert sum(b.padded_s for b in batches) < 1.15 * sum(b.audio_s for b in batches)


@pytest.mark.parametrize("n_most, n_samples", [(256, math.inf), (50, math.inf), (256, 40_000)])
def test_reader_is_never_far_ahead(n_most, n_samples):
    n_read = n_given = ahead = ahead_samples = given_samples = read_samples = 0
    lengths = np.random.default_rng(1).integers(100, 4000, size=2000)

    def read():
        nonlocal n_read, read_samples
        for i, n in enumerate(lengths):
            n_read, read_samples = n_read + 1, read_samples + n
            yield Item(i, str(i), np.zeros(n, np.float32), np.zeros(0, np.float32))

    for group in cut_stream(read(), max_items=8, n_most=n_most, n_samples=n_samples):
        ahead, ahead_samples = max(ahead, n_read - n_given), max(ahead_samples, read_samples - given_samples)
        n_given, given_samples = n_given + len(group), given_samples + sum(len(item.waveform) for item in group)
    assert n_given == 2000
    assert ahead <= n_most + 8 and ahead_samples <= 2 * n_samples + 8 * 4000


def test_reading_goes_on_between_batches():
    """While a window is handed out the next one fills, a batch at a time."""
    dataset = Fake([100] * 600)
    iterator, counts = iter(Batches(dataset, max_items=8)), []
    for _ in range(40):
        next(iterator)
        counts.append(dataset.n_read)
    assert counts[0] == 256 and max(np.diff(counts)) == 8


def test_cut_equals_a_plain_description():
    items = [Item(i, str(i), np.zeros(n, np.float32), np.zeros(0, np.float32)) for i, n in enumerate(LENGTHS)]
    groups = cut(items, max_items=6, max_padded=12000)
    flat = [len(item.waveform) for group in groups for item in group]
    assert flat == sorted(LENGTHS)
    for group, following in zip(groups, groups[1:], strict=False):
        n, longest = len(group) + 1, len(following[0].waveform)
        assert n > 6 or n * longest > 12000, "the next recording would have fitted"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_failures_are_listed_and_the_rest_comes(num_workers):
    batches = Batches(Fake(bad=[0, 7, 199]), max_items=8, num_workers=num_workers)
    for _ in range(2):  # the list is that of the latest pass
        assert sorted(sum(orders(batches), [])) == sorted(set(range(200)) - {0, 7, 199})
        assert [(f.index, f.uid, f.path, f.stage, f.error) for f in batches.failures] == [
            (i, f"{i:06}", f"{i:06}.wav", "decode", "not audio") for i in (0, 7, 199)
        ]
        assert batches.n_shortened == 19
        # of the recordings that were read, each once, not added to those of the pass before
        assert sorted(batches.metadata_problems) == [f"{i:06}: metadata.json says 8 Hz" for i in (50, 100, 150)]


def test_all_recordings_bad():
    batches = Batches(Fake([100] * 3, bad=range(3)), max_items=2)
    assert list(batches) == [] and len(batches.failures) == 3


def test_workers_give_the_same_batches():
    plain, workers = Batches(Fake(), max_items=8, shuffle=True), Batches(Fake(), max_items=8, shuffle=True, num_workers=2)
    state = torch.get_rng_state()
    for epoch in (0, 1):
        plain.set_epoch(epoch), workers.set_epoch(epoch)
        for a, b in zip(plain, workers, strict=True):
            assert a.uids == b.uids and torch.equal(a.waveform, b.waveform) and torch.equal(a.lengths, b.lengths)
    assert torch.equal(torch.get_rng_state(), state), "workers moved torch's random numbers"


def test_a_batch_moves_whole():
    batch = collate([Item(0, "a", np.ones(3, np.float32), np.zeros(1, np.float32))])
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in (moved.waveform, moved.lengths, moved.targets, moved.mask)} == {"meta"}
    assert moved.uids == ["a"] and batch.waveform.device.type == "cpu"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bug_goes_up_with_the_uid(num_workers):
    with pytest.raises(RuntimeError, match=r"uid 000042: KeyError: 'sample_rates'"):
        list(Batches(Fake(bug=42), max_items=8, num_workers=num_workers))
    assert wait_until_alone()


@pytest.mark.parametrize("fake, match", [(dict(channels=2), "transform Mono"), (dict(rate=8000), r"Resample\(16000\)")])
def test_forgotten_transform_is_a_mistake(fake, match):
    with pytest.raises(RuntimeError, match=match):
        list(Batches(Fake(**fake), max_items=8))


@pytest.mark.parametrize("limits", [{}, dict(max_items=0), dict(max_padded_s=-1), dict(max_items=8, max_padded_s=0)])
def test_limits_are_checked(limits):
    with pytest.raises(ValueError, match="limit|above 0"):
        Batches(Fake(), **limits)


def children():
    "Process ids of the workers that are alive."
    return sorted(process.pid for process in multiprocessing.active_children())


def wait_until_alone(timeout_s=10):
    end = time.time() + timeout_s
    while children() and time.time() < end:
        time.sleep(0.1)
    return not children()


def test_workers_stay_for_the_next_pass_and_end_when_one_is_left():
    batches = Batches(Fake(), max_items=8, num_workers=1, shuffle=True)
    list(batches)
    stayed = children()
    list(batches)
    assert len(stayed) == 1 and children() == stayed
    for _ in batches:
        break
    assert wait_until_alone()
    left = iter(batches)
    next(left)  # as after an interrupt in a notebook, which keeps the interrupted pass alive
    whole = iter(batches)
    next(whole)
    del left
    assert len(list(whole)) == 24, "forgetting the old pass must not end the new one's workers"
    batches.close()
    assert wait_until_alone()


def test_workers_end_with_their_batches():
    batches = Batches(Fake(), max_items=8, num_workers=1)
    list(batches)
    assert children()
    del batches
    assert wait_until_alone()


def test_killed_worker_is_an_error_and_not_a_hang():
    start = time.time()
    with pytest.raises(WorkerError, match="ended before its time.*num_workers.*DataLoader worker") as caught:
        list(Batches(Fake(kill=60), max_items=8, num_workers=2))
    assert isinstance(caught.value, RuntimeError) and "\n" not in str(caught.value)
    assert time.time() - start < 60
    assert wait_until_alone()


def test_thousands_of_recordings_through_workers_use_up_no_file_descriptors():
    before = len(os.listdir(f"/proc/{os.getpid()}/fd")) if os.path.isdir("/proc") else pytest.skip("needs /proc")
    batches = Batches(Fake([50] * 3000), max_items=4, num_workers=1)
    kept = list(batches)
    batches.close()
    assert len(kept) == 750 and len(os.listdir(f"/proc/{os.getpid()}/fd")) < before + 30


def test_importing_batch_imports_no_pandas_or_transformers():
    heavy = ("transformers", "pandas", "librosa", "sklearn", "matplotlib")
    code = f"import sys, w2v2nb.batch; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
