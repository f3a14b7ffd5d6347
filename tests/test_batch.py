"""batch: every recording once, a fixed order, bounded memory, failures set aside, workers that end."""

import gc
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from w2v2nb.batch import Batches, Failure, Reader, collate
from w2v2nb.loading import RecordingError
from w2v2nb.memory import padded_seconds, take, with_backoff
from w2v2nb.windows import Item, cut, cut_stream, steps
from w2v2nb.workers import Ahead, WorkerError

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
    if shuffle and "max_items" not in limits:
        with pytest.raises(ValueError, match="need max_items"):
            Batches(Fake(), shuffle=True, **limits)
        return
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


def test_a_step_is_known_before_anything_is_read():
    plain, broken = Batches(Fake(), max_items=8, shuffle=True), Batches(Fake(bad=[3, 50, 51, 120]), max_items=8, shuffle=True)
    assert [len(batch) for batch in plain] == [8] * 25
    assert [[i for i in step if i not in (3, 50, 51, 120)] for step in orders(plain)] == orders(broken)


def test_a_step_without_a_recording_that_can_be_read_is_empty():
    found = list(Batches(Fake(LENGTHS[:16], bad=list(range(16))), max_items=8, shuffle=True))
    assert [len(batch) for batch in found] == [0, 0] and found[0].targets.numel() == 0


def test_pairs_of_a_step_stay_pairs_when_a_recording_cannot_be_read():
    plain, broken = (Batches(Fake(LENGTHS[:16], bad=bad), max_items=8, shuffle=True) for bad in ([], [3, 5]))
    places = {i: place for batch in plain for i, place in zip(batch.index, batch.places, strict=True)}
    assert sorted(places.values()) == sorted([*range(8), *range(8)])
    for batch in broken:
        assert batch.places == [places[i] for i in batch.index] and take(batch, [0]).places == batch.places[:1]


@pytest.mark.parametrize("n, n_items", [(48, 8), (50, 8), (7, 3), (1, 8), (9, 1)])
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 5])
def test_processes_divide_each_step_and_keep_pairs_together(n, n_items, n_ranks):
    whole = steps(n, n_items, np.random.default_rng(0))
    shares = [steps(n, n_items, np.random.default_rng(0), rank, n_ranks) for rank in range(n_ranks)]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    assert sorted(sum(whole, [])) == list(range(n)) and {len(step) for step in whole[:-1]} <= {n_items}
    for share in shares:
        assert all(len(mine) % 2 == 0 or mine[-1] == step[-1] for step, mine in zip(whole, share, strict=True)), "parted"

    def read(rank, n_ranks):
        return orders(Batches(Fake(LENGTHS[:n]), max_items=n_items, shuffle=True, rank=rank, n_ranks=n_ranks))

    parts = [read(rank, n_ranks) for rank in range(n_ranks)]
    assert [sum(some, []) for some in zip(*parts, strict=True)] == read(0, 1)


def test_a_dataset_may_know_the_epoch():
    class Epochs(Fake):
        takes_epoch = True

        def __getitem__(self, key):
            i, epoch = key
            return super().__getitem__(i) | {"uid": f"{i} in {epoch}"}

    batches = Batches(Epochs(), max_items=8, shuffle=True)
    batches.set_epoch(3)
    (batch, *_) = batches
    assert batch.uids == [f"{i} in 3" for i in batch.index]


def test_sorting_saves_padding():
    in_order = [collate([Reader(Fake())[i] for i in range(k, k + 8)]) for k in range(0, 200, 8)]
    batches = list(Batches(Fake(), max_items=8))
    padded, unsorted = sum(b.padded_s for b in batches), sum(b.padded_s for b in in_order)
    assert padded < 0.7 * unsorted and padded < 1.05 * sum(b.audio_s for b in batches)


def test_large_batches_of_short_recordings_are_still_sorted():
    lengths = np.random.default_rng(2).integers(200, 4000, size=10000)
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


def count_reads(dataset, **options):
    """How many recordings were read when each batch was made; no thread ahead, which would blur it."""
    batches, counts = Batches(dataset, **options), []
    batches.background.run = lambda make: make(threading.Event())
    for _ in batches:
        counts.append(dataset.n_read)
    return counts


def test_reading_goes_on_between_batches():
    """While a window is handed out the next one fills, a batch at a time."""
    counts = count_reads(Fake([100] * 1500), max_items=8)
    steady = counts[5 : counts.index(1500)]
    assert len(steady) > 50 and set(np.diff(steady)) == {8}


def test_the_first_batch_comes_soon_and_costs_little_padding():
    dataset = Fake(np.random.default_rng(3).integers(1600, 32000, size=3000))
    counts = count_reads(dataset, max_padded_s=20)
    assert counts[0] <= 128 and max(np.diff([0, *counts[:4]])) <= 256
    whole, growing = (list(cut_stream(read_items(dataset.lengths), max_padded=320_000, n_first=n)) for n in (None, 64))
    padded = [sum(len(group) * max(len(i.waveform) for i in group) for group in groups) for groups in (whole, growing)]
    assert padded[1] < 1.02 * padded[0]
    assert sorted(item.index for group in growing for item in group) == list(range(3000))


def read_items(lengths):
    return (Item(i, str(i), np.zeros(n, np.float32), np.zeros(0, np.float32)) for i, n in enumerate(lengths))


def test_hours_are_not_held_by_the_dozen():
    """Ten recordings beyond window_s, with a limit of eight to a batch: each goes alone, and few are in memory."""
    batches = Batches(dataset := Fake([40000] * 10), max_items=8, max_padded_s=1.0)
    batches.window_s, ahead = 2.0, []
    batches.background.run = lambda make: make(threading.Event())
    for n_given, _ in enumerate(batches):
        ahead.append(dataset.n_read - n_given)
    assert max(ahead) <= 4


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


# The thread that reads ahead


class Slow(Fake):
    """Takes its time for each recording, as decoding does."""

    def __init__(self, *arguments, seconds=0.01, **options):
        super().__init__(*arguments, **options)
        self.seconds, self.threads = seconds, set()

    def __getitem__(self, i):
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        return super().__getitem__(i)


def reader_of(batches):
    (thread,) = batches.background.pool._threads
    return thread


def wait_until(is_so, timeout_s=10):
    end = time.time() + timeout_s
    while not is_so() and time.time() < end:
        time.sleep(0.02)
    return is_so()


@pytest.mark.parametrize("shuffle", [False, True])
def test_reading_overlaps_with_what_the_consumer_does(shuffle):
    dataset = Slow([100] * 320)
    batches, waited = Batches(dataset, max_items=8, shuffle=shuffle), []
    stream = iter(batches)
    while True:
        begun = time.time()
        if next(stream, None) is None:
            break
        waited.append(time.time() - begun)
        time.sleep(0.16)  # the encoder, twice as slow as reading
    assert len(waited) == 40 and sum(waited[8:]) < 0.5 * 32 * 0.08
    assert threading.get_ident() not in dataset.threads
    batches.close()


def test_reading_begins_with_iter_and_stays_two_batches_ahead():
    dataset = Fake([100] * 2000)
    batches = Batches(dataset, max_items=8, shuffle=True)
    stream = iter(batches)
    assert wait_until(lambda: dataset.n_read >= 16)
    time.sleep(0.2)
    assert dataset.n_read == 16
    del stream
    reader = reader_of(batches)
    batches.close()
    assert not reader.is_alive()


def test_leaving_early_ends_the_pass_and_close_the_thread():
    dataset = Slow([100] * 2000)
    batches = Batches(dataset, max_items=8)
    for _ in batches:
        break
    time.sleep(0.3)
    n_read = dataset.n_read
    time.sleep(0.3)
    assert dataset.n_read == n_read < 300
    begun = time.time()
    iter(batches)  # forgotten at once
    reader = reader_of(batches)
    batches.close()
    assert time.time() - begun < 1 and not reader.is_alive()
    assert len(list(Batches(Fake(), max_items=8))) == 25, "another pass is whole"


def test_thread_ends_with_its_batches():
    batches = Batches(Slow([100] * 2000), max_items=8)
    stream = iter(batches)
    next(stream)
    reader = reader_of(batches)
    del batches, stream
    assert wait_until(lambda: not reader.is_alive())


def test_an_exception_of_the_consumer_ends_the_pass():
    dataset, readers = Slow([100] * 2000), []

    def encode():
        batches = Batches(dataset, max_items=8)
        for _ in batches:
            readers.append(reader_of(batches))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        encode()
    assert wait_until(lambda: not readers[0].is_alive())
    assert dataset.n_read < 300


def test_passes_over_the_same_batches_do_not_mix():
    batches = Batches(Fake(bad=[3]), max_items=8)
    pairs = list(zip(batches, batches, strict=True))
    assert len(pairs) == 25 and all(a.uids == b.uids for a, b in pairs)
    assert len(batches.failures) == 1 and batches.n_shortened == 20


def test_a_pass_that_was_ended_does_not_look_complete():
    batches = Batches(Fake(), max_items=8)
    stream = iter(batches)
    next(stream)
    batches.close()
    with pytest.raises(RuntimeError, match="this pass was ended"):
        next(stream)


def test_bug_comes_at_its_place():
    n = 0
    with pytest.raises(RuntimeError, match="uid 000150"):
        for _ in Batches(Fake([100] * 200, bug=150), max_items=8):
            n += 1
    assert n > 0


SCRIPT = """
import sys, time
sys.path.insert(0, {folder!r})
from test_batch import Batches, Slow
batches = Batches(Slow([100] * 5000), max_items=8)
stream = iter(batches)
next(stream)
print("going", flush=True)
{end}
"""
ENDS = {
    "the end of the script": "",
    "an exception": "raise ValueError('mine')",
    "exit": "sys.exit(3)",
    "a pause": "time.sleep(60)",
}


@pytest.mark.parametrize("end", ENDS)
def test_interpreter_ends_in_the_middle_of_a_pass(end):
    code = SCRIPT.format(folder=os.path.dirname(__file__), end=ENDS[end])
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "going\n"
    begun = time.time()
    if end == "a pause":
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert time.time() - begun < 10 and "Exception ignored" not in err
    assert ("KeyboardInterrupt" in err) == (end == "a pause") and process.returncode in {0, 1, 3, 130, -signal.SIGINT}


# Memory


def make_batch(*lengths):
    items = [Item(i, f"{i:06}", np.full(n, i + 1, np.float32), np.full(1, i, np.float32), i == 1) for i, n in enumerate(lengths)]
    return collate(items)


def room_for(n_samples, calls):
    """A step with that much room, which really raises what torch raises."""

    def step(batch):
        calls.append(batch.waveform.numel())
        if batch.waveform.numel() > n_samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return batch.waveform.sum(1)

    return step


@pytest.mark.parametrize("room", [10**6, 2000, 700, 500])
def test_backing_off_gives_every_recording_its_result_in_order(room):
    batch, calls = make_batch(100, 120, 300, 300, 310, 450, 500), []
    pieces = with_backoff(room_for(room, calls), batch)
    assert [uid for piece, _ in pieces for uid in piece.uids] == batch.uids
    assert torch.cat([result for _, result in pieces]).tolist() == batch.waveform.sum(1).tolist()
    assert all(piece.waveform.numel() <= room and piece.waveform.shape[1] == piece.lengths.max() for piece, _ in pieces)
    assert len(pieces) == 1 if room == 10**6 else len(calls) > len(pieces) > 1


def test_a_recording_that_does_not_fit_alone_is_set_aside_and_the_rest_comes():
    pieces = with_backoff(room_for(400, []), make_batch(100, 120, 300, 900))
    (failure,) = [result for _, result in pieces if isinstance(result, Failure)]
    assert (failure.index, failure.uid, failure.stage) == (3, "000003", "encode") and "clip_length" in failure.error
    assert sum(len(piece) for piece, result in pieces if not isinstance(result, Failure)) == 3


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def step(batch):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side"):
        with_backoff(step, make_batch(1, 2))


def test_a_part_of_a_batch_is_a_whole_batch():
    batch = make_batch(5, 3, 4)
    first, second = take(batch, [0]), take(batch, [1, 2])
    assert (first.index, second.index, first.is_shortened, second.is_shortened) == ([0], [1, 2], [False], [True, False])
    assert (first.waveform.shape, second.waveform.shape, second.targets.tolist()) == ((1, 5), (2, 4), [[1.0], [2.0]])
    assert second.mask.sum(1).tolist() == [3, 4] and second.sample_rate == 16000


def test_padded_seconds_on_a_cpu_follow_the_size_of_the_model():
    assert padded_seconds("cpu", 768, 12) == 20 and 5 <= padded_seconds("cpu", 1024, 24) < 7
    assert padded_seconds("cpu", 16, 3) == 60 and padded_seconds("cpu", 4096, 48) == 5


def test_a_pass_can_begin_before_it_is_asked_for():
    dataset = Fake([300] * 40)
    batches, end = Batches(dataset, max_items=8), time.monotonic() + 20
    batches.begin()
    while dataset.n_read < 8 and time.monotonic() < end:
        time.sleep(0.01)
    assert dataset.n_read >= 8
    assert sorted(sum(orders(batches), [])) == list(range(40)) and dataset.n_read == 40
    assert len(orders(batches)) == 5 and dataset.n_read == 80
    batches.close()


def test_padded_seconds_follow_the_free_memory(monkeypatch):
    def seconds(free_gb, *model):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((free_gb - 1) * 10**9, 80 * 10**9))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**9)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 10**9)  # 1 GB that torch keeps for later
        return padded_seconds("cuda", *model)

    assert seconds(80, 768, 12) == 320 and 40 < seconds(4, 768, 12) < 100
    assert seconds(2, 1024, 24) < seconds(2, 768, 12) < seconds(4, 768, 12) and seconds(0, 768, 12) == 5


def test_pinning_without_a_gpu_changes_nothing():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (batch,) = Batches(Fake([300]), max_items=8, pin_memory=True)
    assert not batch.waveform.is_pinned()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    (batch,) = Batches(Fake([300] * 4), max_items=8, pin_memory=True)
    assert batch.waveform.is_pinned() and batch.lengths.is_pinned() and batch.to("cuda").waveform.is_cuda
    assert 1 < padded_seconds("cuda", 768, 12) <= 320
    free = torch.cuda.mem_get_info()[0]

    def step(piece):  # more than there is for the whole batch, little for one recording
        n_bytes = free // 2 if len(piece) == 1 else 2 * free
        return torch.empty(n_bytes, dtype=torch.uint8, device="cuda").numel()

    assert [len(piece) for piece, _ in with_backoff(step, batch)] == [1] * 4


def test_an_interrupt_while_a_pass_begins_is_all_that_is_told(monkeypatch):
    class Interrupted:
        def submit(self, *arguments):
            raise KeyboardInterrupt

    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with pytest.raises(KeyboardInterrupt):
        Ahead(iter(()), Interrupted(), threading.Event())
    gc.collect()
    assert told == [], "what is thrown away half made ends quietly"
