"""Show what fine-tuning comes to: kept features against computed ones, the modes of training, a layer sweep, processes, folds.

    python tools/bench_training.py run [--quick] [--parts cache,modes] [--out training.json]
    python tools/bench_training.py report [training.json]         the tables as markdown and the picture once more

Everything is done by the command line, `w2v2nb finetune`, in processes of its own, on the recordings that W2V2NB_DATA names
(see the README), else on the samples. Tables and models go to a temporary folder; the results keep numbers and names of labels.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from bench import find_versions, make_model, root
from bench_floor import describe_machine
from bench_report import show, with_range

default_out, default_picture = root / "nbs" / "bench" / "training.json", root / "nbs" / "images" / "layers.png"
PACKAGES = ("python", "torch", "transformers", "numpy", "w2v2nb")
CLIP_FRAMES = 32000  # 2 s, so that a part takes minutes
GENTLE = ["--backbone_learning_rate", "0.0003"]  # at the head's 0.001, training all of it learns nothing
MODES = {
    "head": [],
    "head, weighted layers": ["--layer", "weighted"],
    "head, attention pooling": ["--pooling_mode", "attention"],
    "head and last block": ["--tune", "top:1", *GENTLE],
    "all but the convolutions": ["--tune", "transformer", *GENTLE],
    "all": ["--tune", "all", *GENTLE],
    "LoRA": ["--tune", "lora", *GENTLE],
}
MANY = "import json, sys; from w2v2nb.__main__ import main; print([main(a) for a in json.loads(sys.argv[1])])"


class Failed(Exception):
    "A process that ended badly; its message is the last that it said."


@dataclass
class Recordings:
    "A set: where its recordings, its split and its labels are, and what must not be divided."

    name: str
    prefix: Path
    split: Path  # with train.csv and test.csv
    labels: Path
    group: str  # column of the tables

    def table(self) -> pd.DataFrame:
        return pd.concat([pd.read_csv(self.split / f"{part}.csv", dtype=str) for part in ("train", "test")], ignore_index=True)

    def flags(self, table: Path) -> list[str]:
        "What every run on this set has in common."
        given = ["-i", self.prefix, "-d", table, "-l", self.labels, "--group", self.group, "--dataset", "d"]
        return [*map(str, given), "--clip_length", str(CLIP_FRAMES), "--loss", "BCE"]


def find_set(name: str) -> Recordings:
    "A set of W2V2NB_DATA, or the package's samples where there is none."
    folder = Path(os.environ.get("W2V2NB_DATA", "none")).resolve() / name
    if folder.is_dir():
        return Recordings(name, folder / "audio", folder, folder / "labels.txt", "pair" if name == "svd" else "subject")
    from w2v2nb import samples

    split = Path(samples.split_root())
    return Recordings("synthetic samples", Path(samples.prefix()), split, Path(samples.label_txt()), "subject")


def write_table(recordings: Recordings, n: int | None, path: Path) -> int:
    "Write a table of about `n` recordings, whole groups by seeded chance, or of all; how many there are."
    table = recordings.table()
    if n is not None:
        groups = table.groupby(recordings.group).size()
        groups = groups.iloc[np.random.default_rng(0).permutation(len(groups))]
        chosen = groups.index[: max(4, int((groups.cumsum() <= n).sum()))]  # fewer could not be divided
        table = table[table[recordings.group].isin(chosen)]
    table.to_csv(path, index=False)
    return len(table)


def environment() -> dict:
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}


def timed(command: list, log: Path) -> float:
    "Wall time in seconds of a whole process. Raises `Failed`."
    begin = time.perf_counter()
    with open(log, "w") as out:
        done = subprocess.run([str(word) for word in command], stdout=out, stderr=subprocess.STDOUT, env=environment())
    seconds = time.perf_counter() - begin
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        print(f"{said[-2000:]}\n", file=sys.stderr)
        raise Failed(f"a run ended with status {done.returncode}")
    return seconds


def program(*arguments) -> list:
    "A run as typed."
    return [sys.executable, "-m", "w2v2nb", "finetune", *arguments]


def run_many(runs: list[list[str]], log: Path) -> None:
    "Several runs in one process, which saves its start; one that fails leaves no metrics."
    timed([sys.executable, "-c", MANY, json.dumps([["finetune", *map(str, run)] for run in runs])], log)


def read(folder: Path, name: str) -> pd.DataFrame | None:
    path = folder / f"d_{name}.csv"
    return pd.read_csv(path, dtype={"uid": str, "subject": str}) if path.exists() else None


def largest_difference(first: pd.DataFrame, second: pd.DataFrame) -> float:
    "Over all numbers of two tables with the same rows and columns; what is missing should be missing in both."
    a, b = (table.drop(columns="seconds", errors="ignore").select_dtypes("number").to_numpy(float) for table in (first, second))
    if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
        return float("inf")
    return float(np.nanmax(np.abs(a - b), initial=0.0))


def largest_weight_difference(first: Path, second: Path) -> float:
    "Over all weights of two models."
    from safetensors.numpy import load_file

    a, b = (load_file(folder / "d_model" / "model.safetensors") for folder in (first, second))
    if {*a} != {*b}:
        return float("inf")
    return max(float(np.abs(a[name].astype(float) - b[name]).max(initial=0.0)) for name in a)


def rounded(value: float) -> float | None:
    "For the results, where there is no NaN."
    return None if value != value else round(float(value), 4)


# the parts


def measure_cache(args: argparse.Namespace, work: Path) -> dict:
    "A frozen encoder with features kept, from an empty and from a full cache, and computed in every epoch."
    recordings, epochs = find_set("svd"), 2 if args.quick else 20
    n = write_table(recordings, 16 if args.quick else args.n, work / "cache.csv")
    found = {"set": recordings.name, "n": n, "epochs": epochs, "repeats": args.repeats}
    found |= {"load_before": os.getloadavg()[0], "models": {}}  # a machine at rest says less than 0.3
    for model in ["tiny"] if args.quick else ["base", "tiny"]:
        common = [*recordings.flags(work / "cache.csv"), "-c", make_model(model, args.checkpoints), "-e", epochs]
        runs = {"kept": [], "again": [], "each": []}
        differences = []
        for i in range(args.repeats):
            # `again` finds what `kept` has kept; every other time the two come last
            for name in ("kept", "again", "each") if i % 2 == 0 else ("each", "kept", "again"):
                how = ["--cache", "False"] if name == "each" else ["--cache_dir", work / f"cache_{model}_{i}"]
                command = program(*common, *how, "-o", work / name)
                runs[name].append(timed(command, work / f"{model}_{name}.log"))
                shutil.rmtree(work / name / "d_model")  # a base one has 0.4 GB
            differences.append(largest_difference(read(work / "kept", "predictions"), read(work / "each", "predictions")))
            for name in runs:
                shutil.rmtree(work / name)
            taken = ", ".join(f"{name} {seconds[-1]:.0f} s" for name, seconds in runs.items())
            print(f"  {model}, repeat {i + 1} of {args.repeats}: {taken}", flush=True)
        found["models"][model] = {"seconds": runs, "difference": max(differences)}
    return found


def measure_modes(args: argparse.Namespace, work: Path) -> dict:
    "AUC of every mode of training on people who were not trained on."
    from w2v2nb import samples

    epochs = 2 if args.quick else 4
    found = {"epochs": epochs, "sets": {}}
    for recordings in {r.name: r for r in map(find_set, ("svd", "librispeech"))}.values():
        table = work / f"{len(found['sets'])}.csv" if args.quick else recordings.split
        if args.quick:
            write_table(recordings, 16, table)
        common = [*recordings.flags(table), "-c", samples.checkpoint(), "-e", epochs, "-lr", 0.001, "--cache_dir", work / "cache"]
        folders = {mode: work / f"{recordings.name}_{i}".replace(" ", "_") for i, mode in enumerate(MODES)}
        run_many([[*common, *flags, "-o", folders[mode]] for mode, flags in MODES.items()], work / "modes.log")
        sizes = {part: len(pd.read_csv(folders["head"] / "d_split" / f"{part}.csv")) for part in ("train", "test")}
        rows = {}
        for mode, folder in folders.items():
            metrics = read(folder, "metrics")
            rows[mode] = metrics is not None and {
                row["Label"]: [rounded(row[name]) for name in ("AUC", "AUC_low", "AUC_high")] for _, row in metrics.iterrows()
            }
        found["sets"][recordings.name] = {"n": sizes, "modes": rows}
        print(f"  {recordings.name}: {sum(bool(row) for row in rows.values())} of {len(rows)} modes", flush=True)
    return found


def measure_sweep(args: argparse.Namespace, work: Path) -> dict:
    "Validation AUC of a head on every layer, and the test AUC of the best."
    recordings, model = find_set("svd"), "tiny" if args.quick else "base"
    n = write_table(recordings, 24 if args.quick else 160, work / "sweep.csv")
    how = ["-c", make_model(model, args.checkpoints), "--layer", "all", "--val_share", 0.25, "-e", 2 if args.quick else 20]
    timed(
        program(*recordings.flags(work / "sweep.csv"), *how, "--cache_dir", work / "cache", "-o", work / "sweep"),
        work / "sweep.log",
    )
    trials, metrics = read(work / "sweep", "search"), read(work / "sweep", "metrics")
    columns = ["layer", "metric", *(name for name in trials if name.endswith("_AUC"))]
    rows = [{name: int(row[name]) if name == "layer" else rounded(row[name]) for name in columns} for _, row in trials.iterrows()]
    shutil.rmtree(work / "sweep")
    test = dict(zip(metrics["Label"], map(rounded, metrics["AUC"]), strict=True))
    return {"set": recordings.name, "n": n, "model": model, "trials": rows, "test": test}


def kill_after(command: list, history: Path, n_epochs: int, log: Path) -> int:
    "Start a run, kill it (SIGKILL) after some epochs; how many it had recorded. Raises `Failed` if it ended before."
    with open(log, "w") as out:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=subprocess.STDOUT, env=environment())
    try:
        while process.poll() is None and not (history.exists() and len(pd.read_csv(history)) >= n_epochs):
            time.sleep(0.02)
    finally:
        was_running = process.poll() is None
        process.kill()
        process.wait()
    if not was_running:
        raise Failed("the run that should have been killed ended before")
    return len(pd.read_csv(history))


def measure_processes(args: argparse.Namespace, work: Path) -> dict:
    "Two processes against one, and a killed run that went on against one that was left alone."
    from w2v2nb import samples

    recordings, epochs = find_set("svd"), 3 if args.quick else 6
    found = {"set": recordings.name, "n": write_table(recordings, 16 if args.quick else 48, work / "t.csv"), "epochs": epochs}
    common = [*recordings.flags(work / "t.csv"), "-c", samples.checkpoint(), "-e", epochs, "-lr", 0.001]
    common += ["--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found["two"] = {}
    for mode in ("head", "transformer"):
        command, folders = program(*common, "--tune", mode), [work / f"{mode}_{i}" for i in (1, 2)]
        timed([*command, "-o", folders[0], "--cache_dir", work / f"{mode}_cache_1"], work / "one.log")
        timed([*torchrun, *command[1:], "-o", folders[1], "--cache_dir", work / f"{mode}_cache_2"], work / "two.log")
        about = {name: largest_difference(*(read(folder, name) for folder in folders)) for name in ("metrics", "history")}
        about["predictions"] = largest_difference(*(read(folder, "predictions") for folder in folders))
        found["two"][mode] = about | {"weights": largest_weight_difference(*folders)}
        print(f"  two processes, {mode}: metrics differ by {about['metrics']:.0e}", flush=True)
    whole, killed, n = work / "transformer_1", work / "killed", epochs // 2
    command = program(*common, "--tune", "transformer", "-o", killed)
    done = kill_after(command, killed / "d_history.csv", n, work / "killed.log")
    timed([*command, "--resume"], work / "resumed.log")
    about = {name: largest_difference(read(killed, name), read(whole, name)) for name in ("history", "predictions")}
    found["resume"] = {"killed_after": done} | about | {"weights": largest_weight_difference(killed, whole)}
    return found


def measure_folds(args: argparse.Namespace, work: Path) -> dict:
    "Five folds: mean and standard deviation of the AUC."
    from w2v2nb import samples

    recordings = find_set("svd")
    n = write_table(recordings, 40 if args.quick else None, work / "folds.csv")
    how = ["-c", samples.checkpoint(), "-e", 2 if args.quick else 20, "-lr", 0.001, "--folds", 5, "--cache_dir", work / "cache"]
    timed(program(*recordings.flags(work / "folds.csv"), *how, "-o", work / "folds"), work / "folds.log")
    metrics = read(work / "folds", "metrics")
    rows = {row["Label"]: {name: rounded(row[name]) for name in ("AUC_mean", "AUC_sd", "AUC")} for _, row in metrics.iterrows()}
    return {"set": recordings.name, "n": n, "group": recordings.group, "labels": rows}


# part -> what measures it, what it shows, seconds that it takes on two cores
PARTS = {
    "cache": (measure_cache, "whole processes of 20 epochs, features kept against computed in each epoch", 480),
    "modes": (measure_modes, "AUC of each mode of training", 180),
    "sweep": (measure_sweep, "a head on every layer", 65),
    "processes": (measure_processes, "two processes against one, killed and resumed against left alone", 85),
    "folds": (measure_folds, "five folds", 25),
}


# the report


def cache_table(found: dict) -> list[str]:
    lines = [
        f"**Kept features**: whole processes, imports included, {found['epochs']} epochs of a head on a frozen encoder; "
        f"{found['n']} recordings of {found['set']}, a fifth of them for the test; median (lowest-highest) of {found['repeats']} "
        f"repeats, ratios within each, the order alternated. Load before the start {found['load_before']:.1f}.",
        "",
        "| encoder | computed in every epoch, s | kept, s | found from an earlier run, s | times faster, kept | found | "
        "predictions differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in found["models"].items():
        taken = model["seconds"]
        ratios = [with_range([x / y for x, y in zip(taken["each"], taken[k], strict=True)]) for k in ("kept", "again")]
        cells = [show(with_range(taken[k]), ".1f") for k in ("each", "kept", "again")] + [show(ratio, ".1f") for ratio in ratios]
        lines.append(f"| {name} | {' | '.join(cells)} | {difference_text(model['difference'])} |")
    return lines


def difference_text(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def auc_text(values: list) -> str:
    if values[0] is None:
        return "no AUC"
    return f"{values[0]:.2f}" + (f" ({values[1]:.2f}-{values[2]:.2f})" if None not in values else "")


def modes_table(found: dict) -> list[str]:
    lines = []
    for name, about in found["sets"].items():
        labels = list(next((row for row in about["modes"].values() if row), {}))
        lines += [
            "",
            f"**What trains**, {name}: {about['n']['train']} recordings to learn from, {found['epochs']} epochs, tiny encoder, "
            f"learning rate 0.001, of an encoder that trains 0.0003; AUC "
            f"(95% interval) on {about['n']['test']} recordings of other people.",
            "",
            f"| | {' | '.join(labels)} |",
            "|---|" + "---|" * len(labels),
        ]
        for mode, row in about["modes"].items():
            cells = [auc_text(row[label]) for label in labels] if row else ["did not run"] * len(labels)
            lines.append(f"| {mode} | {' | '.join(cells)} |")
    return lines[1:]


def sweep_table(found: dict) -> list[str]:
    trials = found["trials"]
    best = max(trials, key=lambda row: (row["metric"] or 0.0, -row["layer"]))
    test = ", ".join(f"{label} {'no AUC' if auc is None else format(auc, '.2f')}" for label, auc in found["test"].items())
    lines = [
        f"**Layers**: {found['n']} recordings of {found['set']}, {found['model']} encoder, `--layer all`; AUC on validation, "
        f"mean over labels. The best is layer {best['layer']}; on the test it has {test}.",
        "",
        f"| layer | {' | '.join(str(row['layer']) for row in trials)} |",
        "|---|" + "---|" * len(trials),
    ]
    cells = ["" if row["metric"] is None else f"{row['metric']:.2f}" for row in trials]
    return [*lines, f"| AUC | {' | '.join(cells)} |"]


def processes_table(found: dict) -> list[str]:
    lines = [
        f"**The same whatever happens**: {found['n']} recordings of {found['set']}, tiny encoder, {found['epochs']} epochs, "
        "on the CPU; largest difference to one process that was left alone.",
        "",
        "| | metrics | history | predictions | weights |",
        "|---|---|---|---|---|",
    ]
    rows = {f"two processes, {mode}": about for mode, about in found["two"].items()}
    rows[f"killed after epoch {found['resume']['killed_after']}, resumed (transformer)"] = found["resume"]
    for name, about in rows.items():
        cells = [difference_text(about[key]) if key in about else "" for key in ("metrics", "history", "predictions", "weights")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def folds_table(found: dict) -> list[str]:
    lines = [
        f"**Five folds** by {found['group']}: {found['n']} recordings of {found['set']}, tiny encoder, head.",
        "",
        "| | AUC, mean over folds (sd) | AUC over pairs within a fold |",
        "|---|---|---|",
    ]
    for label, about in found["labels"].items():
        mean, sd, whole = (float("nan") if about[name] is None else about[name] for name in ("AUC_mean", "AUC_sd", "AUC"))
        lines.append(f"| {label} | {mean:.2f} ({sd:.2f}) | {whole:.2f} |")
    return lines


TABLES = {"cache": cache_table, "modes": modes_table, "sweep": sweep_table, "processes": processes_table, "folds": folds_table}


LEGEND = """All encoders begin with random weights, seeded, since none were to be had: the AUCs show that every path runs, on
people who were not trained on, and are evidence of nothing else."""


def machine_line(found: dict) -> str:
    machine = found["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"Measured on {machine['cpu']} ({machine['family']}; {', '.join(machine['instructions'])}), {machine['cores']} cores, "
        f"{machine['memory_gb']:.0f} GB; {packages}."
    )


def to_markdown(results: dict) -> str:
    "All tables, with the machine named."
    lines = []
    for name, table in TABLES.items():
        found = results["parts"].get(name)
        if found:
            lines += [*(table(found) if "failure" not in found else [f"**{name}** did not run: {found['failure']}"]), ""]
    return "\n".join([machine_line(results), "", *lines, LEGEND, ""])


def draw(trials: list[dict], path: Path) -> None:
    "The picture of a sweep."
    from w2v2nb.curves import plot_layers

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(trials).astype(float)
    plot_layers(table).savefig(path, dpi=85, pil_kwargs={"optimize": True})


def write_report(results: Path, picture: Path) -> None:
    "The tables and the picture of a results file."
    found = json.loads(results.read_text(encoding="utf-8"))
    if "trials" in found["parts"].get("sweep", {}):
        draw(found["parts"]["sweep"]["trials"], picture)
    print(to_markdown(found), end="")


def run(args: argparse.Namespace) -> int:
    "Measure the parts, each written when it is there; others of an earlier run stay. The number of those that failed."
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"parts": {}}
    versions = {name: number for name, number in find_versions().items() if name in PACKAGES}
    results |= {"machine": describe_machine(), "versions": versions}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    seconds = {name: 30 if args.quick else PARTS[name][2] for name in args.parts}
    if "cache" in seconds and not args.quick:
        seconds["cache"] = round(seconds["cache"] * args.n * args.repeats / 128)
    print(f"about {sum(seconds.values())} s on two cores at rest, on {find_set('svd').name}", flush=True)
    n_failed = 0
    for name in args.parts:
        measure, text, _ = PARTS[name]
        print(f"{name}: {text}, about {seconds[name]} s", flush=True)
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            try:
                found = measure(args, Path(work))
            except Exception as e:  # the other parts go on; what libraries say may name folders of this machine
                traceback.print_exc()
                found, n_failed = {"failure": str(e) if isinstance(e, Failed) else type(e).__name__}, n_failed + 1
        found["took_s"] = round(time.perf_counter() - begin, 1)
        print(f"  took {found['took_s']:.0f} s", flush=True)
        results["parts"][name] = found
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}\n")
    write_report(args.out, pick_picture(args.out))
    return n_failed


def pick_picture(out: Path) -> Path:
    return default_picture if out == default_out else out.with_suffix(".png")


def pick_parts(text: str) -> list[str]:
    if unknown := {*text.split(",")} - {*PARTS}:
        raise argparse.ArgumentTypeError(f"{sorted(unknown)[0]!r} is no part; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in text.split(",")]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure, write the results and the report")
    measure.add_argument("--parts", type=pick_parts, default=[*PARTS], help=f"of {','.join(PARTS)} [all]")
    measure.add_argument("--n", type=int, default=64, help="recordings of the part cache [64]")
    measure.add_argument("--repeats", type=int, default=2, help="of the part cache [2]")
    measure.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="for a folder that is removed again")
    measure.add_argument("--out", type=Path, default=None, help="results [nbs/bench/training.json, of a quick run in WORK]")
    measure.add_argument("--quick", action="store_true", help="a trial of minutes: tiny encoder, few recordings")
    report = commands.add_parser("report", help="write the tables and the picture of results again")
    report.add_argument("results", type=Path, nargs="?", default=default_out)
    report.add_argument("--picture", type=Path, default=None, help="PNG [nbs/images/layers.png, of other results beside them]")
    args = parser.parse_args()
    if args.command == "run":
        args.checkpoints = args.work / "w2v2nb-bench"  # shared with bench.py
        args.repeats = 1 if args.quick else args.repeats
        args.out = args.out or (args.work / "training.json" if args.quick else default_out)
    return args


if __name__ == "__main__":
    args = read_arguments()
    if args.command == "run":
        sys.exit(run(args))
    write_report(args.results, args.picture or pick_picture(args.results))
