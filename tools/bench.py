"""Compare embeddings by w2v2nb with the alternatives, side by side in one run: speed, peak memory, error, share of the floor.

    python tools/bench.py run [--quick] [--models base,large] [--out results.json]
    python tools/bench.py report [results.json]         the table as markdown and the plot as PNG once more

Every contender is a process that loads its model once and waits; turns go round and round over the contenders on the same
recordings, the order rotated, so that whatever else the machine does hits all alike. Ratios are taken within a round. This
process stays small and imports no torch: a child's peak memory is never below its parent's size when it was started.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions, version
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from bench_floor import count_flops, describe_machine, typical_shapes
from bench_report import summarize, write_report

tools = Path(__file__).resolve().parent
root = tools.parent
extra = root / ".bench"  # what tools/bench_requirements.txt names, for the two contenders that need it
default_out, default_picture = root / "nbs" / "bench" / "results.json", root / "nbs" / "images" / "bench.png"
RATE_HZ, CLIP_S = 16000, 10.0

# name -> group of the comparison, what the table calls it, its precision
CONTENDERS = {
    "original": ("a", "the original's recipe: 10 s, eager, attention maps", "fp32"),
    "plain": ("b", "transformers, one at a time", "fp32"),
    "plain_bf16": ("b", "transformers, one at a time, bf16", "bf16"),
    "padded": ("c", "transformers, padded batches of 8", "fp32"),
    "sentence_transformers": ("d", "sentence-transformers, batches of 8", "fp32"),
    "speechbrain": ("d", "SpeechBrain, batches of 8", "fp32"),
    "ours": ("e", "w2v2nb, fp32", "fp32"),
    "ours_bf16": ("e", "w2v2nb, bf16", "bf16"),
}


def environment(threads: int, name: str = "") -> dict:
    "The environment of a contender: the same number of threads for all, the hub never asked."
    path = [str(extra)] if CONTENDERS.get(name, " ")[0] == "d" else []
    names = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return os.environ | names | {"PYTHONPATH": os.pathsep.join([*path, str(tools), str(root)])}


class Worker:
    "A contender's process. `failure` is None, or why it does not take part."

    def __init__(self, name: str, settings: dict, work: Path):
        self.name, self.failure = name, None
        self.log = work / f"{name}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(tools / "bench_worker.py"), json.dumps(settings | {"contender": name})],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(settings["threads"], name),
            )  # fmt: skip

    def answer(self) -> dict:
        "The next answer; a process that ended, or says why it cannot, has failed."
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"failure": f"its process ended with status {self.process.wait()}"}
        self.failure = found.get("failure")
        return found

    def ask(self, question: dict) -> dict:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def find_recordings(name: str) -> tuple[str, list[Path]]:
    "A set of W2V2NB_DATA, or the package's samples where there is none: what it is called and its 16 kHz files."
    from w2v2nb import samples

    folder = Path(os.environ.get("W2V2NB_DATA", "none")) / name / "audio"
    label, folder = (name, folder) if folder.is_dir() else ("synthetic samples", Path(samples.prefix()))
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".flac", ".wav", ".ogg", ".mp3"))
    return label, [p for p in paths if label == name or soundfile.info(p).samplerate == RATE_HZ]


def choose(paths: list[Path], n: int, seed: int) -> list[Path]:
    "`n` of them by seeded chance, or all."
    chosen = np.random.default_rng(seed).permutation(len(paths))[:n]
    return [paths[i] for i in sorted(chosen)]


def make_model(name: str, work: Path) -> Path:
    "The folder of a checkpoint, made if it is not there."
    folder = work / f"{name}-transformers-{version('transformers')}"
    if not folder.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(tools / "bench_models.py"), name, str(folder)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment(1))
        if done.returncode:
            raise SystemExit(f"the checkpoint {name} could not be made:\n{done.stderr}")
    return folder


def turns(workers: list, floor: Worker, n: int, rounds: int, settle_s: float) -> tuple[dict, list]:
    "Seconds, peak memory and the machine's rates of all rounds."
    found, rates = {worker.name: [] for worker in workers}, []
    for i in range(rounds):
        rates.append(floor.ask({})["flops_per_s"])
        k = i % len(workers)
        for worker in workers[k:] + workers[:k]:
            if worker.failure is None:
                time.sleep(settle_s)  # until the last one's threads have stopped spinning
                done = worker.ask({"recordings": list(range(n))})
                found[worker.name] += [done] if worker.failure is None else []
        print(f"  round {i + 1} of {rounds}", flush=True)
    return found, rates


def measure_model(name: str, args: argparse.Namespace, device: str) -> dict:
    "All contenders on one model: raw measurements, JSON types."
    work = args.work / name
    work.mkdir(parents=True, exist_ok=True)
    folder = make_model(name, args.work)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    label, paths = find_recordings("librispeech")
    is_large = name == "large"
    n, rounds = max(2, args.n // (1 + is_large)), max(1, args.rounds - is_large)
    waveforms = [soundfile.read(p, dtype="float32", always_2d=True)[0].mean(1) for p in choose(paths, n, args.seed)]
    np.concatenate(waveforms).tofile(work / "audio.f32")
    lengths = [len(x) for x in waveforms]
    common = dict(model=str(folder), audio=str(work / "audio.f32"), lengths=lengths, threads=args.threads, device=device)
    print(f"{name}: {len(lengths)} recordings of {label}, {sum(lengths) / RATE_HZ:.0f} s; starting the contenders", flush=True)
    workers = [Worker(c, common | {"embeddings": str(work / f"{c}.f32")}, work) for c in args.contenders]
    floor = Worker("floor", common | {"shapes": typical_shapes(config)}, work)
    for worker in (*workers, floor):
        worker.answer()
    taken, rates = turns(workers, floor, len(lengths), rounds, args.settle)
    for worker in (*workers, floor):
        worker.close()
    flops = [count_flops(config, n) for n in lengths]
    cut = [count_flops(config, min(n, int(CLIP_S * RATE_HZ))) for n in lengths]
    result = dict(set=label, n=len(lengths), lengths_s=[n / RATE_HZ for n in lengths], rounds=rounds, flops=sum(flops))
    result["flops_per_s"] = {p: max(rate[p] for rate in rates) for p in ("fp32", "bf16")}
    result["contenders"] = {}
    for worker in workers:
        is_cut = worker.name == "original"
        group, text, precision = CONTENDERS[worker.name]
        entry = dict(group=group, label=text, precision=precision, failure=worker.failure)
        entry["audio_s"] = sum(min(n / RATE_HZ, CLIP_S) if is_cut else n / RATE_HZ for n in lengths)
        entry["flops"] = sum(cut if is_cut else flops)
        entry["seconds"] = [turn["seconds"] for turn in taken[worker.name]]
        entry["peak_mb"] = max((turn["peak_mb"] for turn in taken[worker.name]), default=None)
        if worker.failure is None:
            entry |= compare(work / f"{worker.name}.f32", work / "plain.f32", config["hidden_size"])
        result["contenders"][worker.name] = entry
    result["spread"] = spread(work / "plain.f32", config["hidden_size"])
    return result


def compare(path: Path, reference: Path, hidden_size: int) -> dict:
    "Worst relative error and lowest cosine of the embeddings in one file against those in another."
    x, y = (np.fromfile(p, np.float32).reshape(-1, hidden_size).astype(np.float64) for p in (path, reference))
    error = np.abs(x - y).max(1) / np.abs(y).max(1)
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    return {"error": float(error.max()), "cosine": float(cosine.min())}


def spread(reference: Path, hidden_size: int) -> float:
    "By how much the embeddings of two recordings differ, as errors are measured: the median over pairs."
    y = np.fromfile(reference, np.float32).reshape(-1, hidden_size)
    pairs = [(i, j) for i in range(len(y)) for j in range(len(y)) if i != j]
    return float(np.median([np.abs(y[i] - y[j]).max() / np.abs(y[j]).max() for i, j in pairs]))


def run_process(command: list, threads: int, parts: Path | None = None) -> dict:
    "Wall time, peak memory, and when the first part of the results appeared below `parts`, of a whole process."
    begin, first_s = time.perf_counter(), None
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(threads))
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if parts and first_s is None and next(parts.rglob("part-*.parquet"), None):
            first_s = time.perf_counter() - begin
        time.sleep(0.01)
    seconds, process.returncode = time.perf_counter() - begin, os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{process.stderr.read().decode()[-2000:]}")
    process.stderr.close()
    return {"seconds": seconds, "peak_mb": usage.ru_maxrss * 1024 / 1e6, "first_s": first_s}


def measure_whole(name: str, args: argparse.Namespace) -> dict:
    "The original's recipe against the command line, from typing to the last file: raw measurements."
    folder, work = make_model(name, args.work), args.work / "whole"
    work.mkdir(parents=True, exist_ok=True)
    label, paths = find_recordings("svd")
    paths = choose(paths, args.whole_n, args.seed)
    uids = [p.stem if p.stem != "waveform" else p.parent.name for p in paths]
    table = work / "table.csv"
    pd.DataFrame({"uid": uids, "path": [str(p) for p in paths]}).to_csv(table, index=False)
    audio_s = sum(soundfile.info(p).duration for p in paths)
    print(f"whole processes: {len(paths)} recordings of {label}, {audio_s:.0f} s", flush=True)
    original = [sys.executable, tools / "bench_original.py", folder, "/", table, work / "original.parquet", str(args.threads)]
    ours = [sys.executable, "-m", "w2v2nb", "extraction", "-i", "/", "-d", table, "-c", folder]
    commands = {
        "original": (original, None),
        "ours": ([*ours, "-o", work / "fp32", "--precision", "fp32"], work / "fp32"),
        "ours_bf16": ([*ours, "-o", work / "bf16", "--precision", "bf16"], work / "bf16"),
    }
    names, taken = list(commands), {x: [] for x in commands}
    for i in range(args.whole_rounds):
        k = i % len(names)
        for x in names[k:] + names[:k]:
            command, parts = commands[x]
            if parts:
                shutil.rmtree(parts, ignore_errors=True)
            taken[x].append(run_process([str(word) for word in command], args.threads, parts))
        print(f"  round {i + 1} of {args.whole_rounds}", flush=True)
    contenders = {
        x: dict(
            group=CONTENDERS[x][0],
            label=CONTENDERS[x][1],
            seconds=[turn["seconds"] for turn in taken[x]],
            peak_mb=max(turn["peak_mb"] for turn in taken[x]),
            first_s=[turn["first_s"] for turn in taken[x] if turn["first_s"] is not None],
        )
        for x in names
    }
    return dict(model=name, set=label, n=len(paths), audio_s=audio_s, rounds=args.whole_rounds, contenders=contenders)


def find_versions() -> dict:
    "Versions of what takes part."
    there = {d.metadata["Name"].lower(): d.version for d in distributions(path=[str(extra)])} if extra.is_dir() else {}
    names = ("torch", "transformers", "numpy", "w2v2nb")
    others = {name: there[name] for name in ("sentence-transformers", "speechbrain") if name in there}
    return {"python": sys.version.split()[0]} | {name: version(name) for name in names} | others


def run(args: argparse.Namespace) -> None:
    "Measure everything and write the results."
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    gpu = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    device, begin = "cuda" if gpu else "cpu", time.perf_counter()
    settings = {k: getattr(args, k) for k in ("n", "rounds", "threads", "seed", "whole_n", "whole_rounds", "contenders")}
    results = {"machine": describe_machine(gpu), "device": device, "versions": find_versions(), "settings": settings}
    results["load_before"] = os.getloadavg()[0]  # a machine at rest says less than 0.3
    results |= {"models": {}, "whole": None}
    steps = [(results["models"], name, measure_model, (name, args, device)) for name in args.models]
    if args.whole_rounds:
        steps.append((results, "whole", measure_whole, (args.models[0], args)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for place, key, measure, arguments in steps:
        place[key] = measure(*arguments)
        results["seconds"] = time.perf_counter() - begin
        # after each step, so that a later one's failure costs nothing
        args.out.write_text(json.dumps(summarize(results), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out} after {results['seconds'] / 60:.0f} minutes\n")
    write_report(args.out, default_picture if args.out == default_out else args.out.with_suffix(".png"))


def pick_contenders(text: str) -> list[str]:
    "Names from names or letters of groups, separated by commas; the reference is always among them."
    words = text.split(",")
    if unknown := [w for w in words if w not in CONTENDERS and w not in {c[0] for c in CONTENDERS.values()}]:
        there = f"there are {', '.join(CONTENDERS)}, and a to e for groups of them"
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no contender; {there}")
    return [name for name, (group, *_) in CONTENDERS.items() if name == "plain" or {name, group} & {*words}]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure, write the results and the report")
    measure.add_argument("--models", default="base,large", help="of base, large, tiny [base,large]")
    measure.add_argument("--contenders", type=pick_contenders, default="a,b,c,d,e", help="names, or groups [a,b,c,d,e]")
    measure.add_argument("--n", type=int, default=12, help="recordings; large takes half as many [12]")
    measure.add_argument("--rounds", type=int, default=3, help="of turns; large takes one less [3]")
    measure.add_argument("--whole-n", type=int, default=60, help="recordings for whole processes [60]")
    measure.add_argument("--whole-rounds", type=int, default=3, help="of whole processes, 0 for none [3]")
    measure.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every contender [all cores]")
    measure.add_argument("--settle", type=float, default=0.5, help="pause before each turn, in seconds [0.5]")
    measure.add_argument("--seed", type=int, default=0, help="of the choice of recordings [0]")
    default_work = Path(tempfile.gettempdir()) / "w2v2nb-bench"
    measure.add_argument("--work", type=Path, default=default_work, help="checkpoints and scratch")
    measure.add_argument("--out", type=Path, default=None, help="results [nbs/bench/results.json, of a quick run in WORK]")
    measure.add_argument("--quick", action="store_true", help="a minute's trial: tiny checkpoint, few recordings, no d")
    report = commands.add_parser("report", help="write the table and the plot of results again")
    report.add_argument("results", type=Path, nargs="?", default=default_out)
    report.add_argument("--picture", type=Path, default=default_picture)
    report.add_argument("--table", type=Path, default=None, help="markdown file [standard output]")
    args = parser.parse_args()
    if args.command == "run":
        if args.quick:
            args.models, args.contenders = "tiny", pick_contenders("a,plain,c,e")
            args.out = args.out or args.work / "results.json"  # no trial takes the place of measured results
            args.n, args.rounds, args.whole_n, args.whole_rounds, args.settle = 9, 2, 4, 1, 0.0
        args.out, args.models = args.out or default_out, args.models.split(",")
    return args


if __name__ == "__main__":
    args = read_arguments()
    run(args) if args.command == "run" else write_report(args.results, args.picture, args.table)
