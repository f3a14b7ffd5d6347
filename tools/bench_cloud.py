"""Show what reading from Cloud Storage comes to, with a delay for each request: how fast, whether the encoder waits, memory.

    python tools/bench_cloud.py [--n 500] [--n_memory 5000] [--delay_ms 30] [--model base]

The real client reads from an emulator on this machine, in a process of its own, through the proxy of tests/cloud.py, which
delays each request. Recordings are 1 s of noise, each its own object. Nothing is kept.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from bench import make_model, root
from bench_floor import describe_machine

sys.path.insert(0, str(root / "tests"))
RATE_HZ = 16000


def write_recordings(
    folder: Path,  # to write to
    n: int,  # how many
    length_s: float = 1.0,  # of each, in seconds
) -> pd.DataFrame:
    "Noise as <uid>/waveform.wav; the table."
    import soundfile

    rng, uids = np.random.default_rng(0), [f"{i:05}" for i in range(n)]
    for uid in uids:
        (folder / uid).mkdir(parents=True)
        soundfile.write(folder / uid / "waveform.wav", 0.1 * rng.standard_normal(round(length_s * RATE_HZ)), RATE_HZ)
    return pd.DataFrame({"uid": uids})


def serve(
    folder: Path,  # whose files are put into a bucket
    delay_s: float,  # of each request, in seconds
) -> None:
    "Be a Cloud Storage until standard input ends; says its address and the bucket."
    import cloud

    emulator = cloud.Emulator()
    proxy = cloud.Proxy(emulator)
    bucket = cloud.Bucket(emulator, proxy, f"bench-{os.getpid()}", {})
    bucket.put_folder(folder)
    proxy.delay_s = delay_s
    print(proxy.address, bucket.uri, flush=True)
    for _ in sys.stdin:  # a line asks how many requests there were, and how many at once
        print(len(proxy.requests), proxy.most_at_once(), flush=True)
        proxy.clear()
    proxy.close()
    emulator.close()


class Service:
    "A Cloud Storage in a process of its own."

    def __init__(self, folder: Path, delay_s: float):
        command = [sys.executable, __file__, "serve", str(folder), str(delay_s)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address, self.uri = self.process.stdout.readline().split()

    def count(self) -> tuple[int, int]:
        "Requests since the last call, and how many were on their way at once."
        print(file=self.process.stdin, flush=True)
        n, n_at_once = self.process.stdout.readline().split()
        return int(n), int(n_at_once)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


@contextmanager
def serving(
    folder: Path,  # a new one for recordings
    n: int,  # how many
    delay_s: float,  # of each request, in seconds
) -> Iterator[tuple[Service, pd.DataFrame]]:
    "Context manager: recordings in a service, and their table."
    table = write_recordings(folder, n)
    service = Service(folder, delay_s)
    try:
        yield service, table
    finally:
        service.close()


def use(
    service: Service,  # to work with
    cache: Path,  # a new folder for local copies
) -> None:
    "Have w2v2nb read from a service, as a machine that has read nothing yet."
    from w2v2nb import bucket, storage

    os.environ |= {"STORAGE_EMULATOR_HOST": service.address, "XDG_CACHE_HOME": str(cache)}
    bucket.forget_client()
    storage.forget()
    service.count()


def measure(
    action: Callable[[], object],  # what to do
) -> float:
    "How long it takes, in seconds."
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def make_dataset(
    table: pd.DataFrame,  # of recordings
    prefix: str,  # where they are
) -> object:
    from w2v2nb.data import WaveformDataset
    from w2v2nb.transforms import pipeline

    return WaveformDataset(table, [], pipeline(prefix=prefix))


def measure_reading(
    service: Service,  # to read from
    table: pd.DataFrame,  # of recordings
    work: Path,  # for caches
) -> None:
    "Print how long the recordings take one by one, ahead of the reader, and once they are here."
    from w2v2nb import storage
    from w2v2nb.batch import Batches, Reader

    def one_by_one() -> None:
        reader = Reader(make_dataset(table, service.uri))
        for i in range(len(table)):
            reader[i]

    def ahead() -> None:
        batches = Batches(make_dataset(table, service.uri), max_padded_s=60)
        n_read = sum(map(len, batches))
        batches.close()
        assert n_read == len(table), batches.failures[:1]

    use(service, work / "warm-up")
    storage.names(service.uri)  # the client's import
    found = {}
    plan = [("one by one", one_by_one, 1), ("ahead of the reader", ahead, 3), ("the second time", ahead, 1)]
    for name, action, n_times in plan:
        found[name] = []
        for i in range(n_times):
            if name != "the second time":
                use(service, work / f"{name} {i}")
            found[name].append(measure(action))
            n_requests, n_at_once = service.count()
        times = " ".join(f"{seconds:.2f}" for seconds in found[name])
        print(f"{name:20} {times} s, {n_requests} requests, at most {n_at_once} at once", flush=True)
    ratio = min(found["one by one"]) / min(found["ahead of the reader"])
    print(f"ahead of the reader it is {ratio:.1f} times as fast as one by one")


def stream(
    table: pd.DataFrame,  # of recordings
    prefix: str,  # where they are
    encoder: Callable,  # waveform, lengths -> hidden states
) -> Iterator[tuple[float, float]]:
    "For each batch, how long it was waited for and how long the encoder worked, in seconds."
    import torch

    from w2v2nb.batch import Batches

    batches = Batches(make_dataset(table, prefix), max_padded_s=8)
    begin = time.perf_counter()
    for batch in batches:
        came = time.perf_counter()
        with torch.inference_mode():
            encoder(batch.waveform, batch.lengths)
        done = time.perf_counter()
        yield came - begin, done - came
        begin = done
    batches.close()


def measure_waiting(
    service: Service,  # to read from
    local: Path,  # the same recordings here
    table: pd.DataFrame,  # of recordings
    model: str,  # of the encoder: tiny, base or large
    work: Path,  # for the checkpoint and the cache
) -> None:
    "Print how long an encoder waits for recordings from here and from the bucket."
    from w2v2nb.encoder import Encoder

    encoder = Encoder.from_pretrained(make_model(model, work)).eval()
    use(service, work / "waiting")
    for name, prefix in {"this machine": str(local), "the bucket": service.uri}.items():
        (first, _), *rest = stream(table, prefix, encoder)
        waited, worked = (sum(times) for times in zip(*rest, strict=True))
        share = waited / (waited + worked)
        print(f"from {name:13} the first batch comes after {first:5.2f} s; then the encoder waits {waited:5.2f} s of "
              f"{waited + worked:6.2f} s ({share:.1%})")  # fmt: skip


def count_bytes(
    folder: Path,  # in which files come and go
) -> int:
    "The size of all files below it."
    n_bytes = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                n_bytes += os.path.getsize(os.path.join(place, name))
    return n_bytes


def measure_memory(
    service: Service,  # to read from
    table: pd.DataFrame,  # of recordings
    work: Path,  # for the cache
    max_gb: float,  # of copies
) -> None:
    "Print the memory of this process and the size of the copies while recordings stream through."
    from w2v2nb.batch import Batches

    use(service, work / "memory")
    os.environ["W2V2NB_COPIES_GB"] = str(max_gb)
    batches, n, process = Batches(make_dataset(table, service.uri), max_padded_s=60), 0, psutil.Process()
    steps = iter(range(0, len(table) + 1, max(1, len(table) // 10)))
    begin, step = time.perf_counter(), next(steps)
    for batch in batches:
        n += len(batch)
        if n >= step:
            step = next(steps, float("inf"))
            memory, copies = process.memory_info().rss / 2**20, count_bytes(work / "memory") / 1e6
            print(f"{n:6} recordings  {memory:6.0f} MiB of memory  {copies:6.1f} MB of copies", flush=True)
    seconds = time.perf_counter() - begin
    print(f"{n} of {len(table)} recordings in {seconds:.1f} s, {n / seconds:.0f} a second; copies up to {1000 * max_gb:.0f} MB")
    batches.close()


def main(
    arguments: list[str] | None = None,  # None: those of this process
) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=500, help="recordings to time, 500; 0: none")
    parser.add_argument("--n_encoded", type=int, default=1000, help="recordings that an encoder works through, 1000; 0: none")
    parser.add_argument("--n_memory", type=int, default=5000, help="recordings to stream, 5000; 0: none")
    parser.add_argument("--delay_ms", type=float, default=30, help="of each request, 30")
    parser.add_argument("--model", default="base", help="of the encoder: tiny, base or large, with random weights")
    args = parser.parse_args(arguments)
    print(describe_machine(), f"{args.delay_ms:.0f} ms for each request", sep="\n")
    with tempfile.TemporaryDirectory(prefix="w2v2nb-bench-cloud-") as name:
        work = Path(name)
        if args.n:
            with serving(work / "read", args.n, args.delay_ms / 1000) as (service, table):
                measure_reading(service, table, work)
        if args.n_encoded:
            with serving(work / "encoded", args.n_encoded, args.delay_ms / 1000) as (service, table):
                measure_waiting(service, work / "encoded", table, args.model, work)
        if args.n_memory:
            with serving(work / "streamed", args.n_memory, args.delay_ms / 1000) as (service, table):
                measure_memory(service, table, work, max_gb=0.05)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        main()
