"""What the benchmark's numbers come to: rates, ratios and shares, the table as markdown, and the plot."""

import json
from pathlib import Path
from statistics import median

WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind a number, so that no line crosses it
GRAY, COLORS = "#8c8c8c", {"fp32": "#0072b2", "bf16": "#d55e00"}  # safe for colour-blind readers


LEGEND = """Median (lowest-highest) over rounds, in which the contenders take turns on the same recordings, their order rotated;
ratios within a round. Weights are random. Error: largest difference to (b) over the largest value of the embedding, worst
recording; cosine: the lowest. Peak: one process with its model. Of the floor: the time that the model's operations for the
unpadded recordings take at the fastest matrix product measured in the same run at that precision, over the time taken. (a) reads
10 s of a recording at most, and no more is counted for it."""


def with_range(values: list[float]) -> dict:
    return {"median": median(values), "min": min(values), "max": max(values)}


def summarize(results: dict) -> dict:
    "The results with medians and ranges: audio per second, ratio to the reference in the same round, share of the floor."
    for model in results["models"].values():
        reference = model["contenders"]["plain"]
        for entry in model["contenders"].values():
            if entry["failure"] is not None:
                continue
            rates = [entry["audio_s"] / s for s in entry["seconds"]]
            entry["rate"] = with_range(rates)
            base = [reference["audio_s"] / s for s in reference["seconds"]]
            entry["ratio"] = with_range([x / y for x, y in zip(rates, base, strict=True)])
            entry["share"] = entry["flops"] / model["flops_per_s"][entry["precision"]] / median(entry["seconds"])
    if results["whole"]:
        taken = {name: entry["seconds"] for name, entry in results["whole"]["contenders"].items()}
        for name, entry in results["whole"]["contenders"].items():
            entry["ratio"] = with_range([x / y for x, y in zip(taken["original"], taken[name], strict=True)])
    return results


def show(found: dict, digits: str = ".2f") -> str:
    "A median with its range."
    return f"{found['median']:{digits}} ({found['min']:{digits}}-{found['max']:{digits}})"


def row(entry: dict) -> str:
    if entry["failure"] is not None:
        return f"| {entry['group']} | {entry['label']} | did not run: {entry['failure']} | | | | | |"
    is_reference = entry["error"] == 0 and entry["group"] == "b"
    error = "reference" if is_reference else f"{entry['error']:.0e}"
    cosine = "" if is_reference else f"{entry['cosine']:.6f}"
    return (
        f"| {entry['group']} | {entry['label']} | {show(entry['rate'], '.1f')} | {show(entry['ratio'])} | "
        f"{entry['peak_mb']:.0f} | {error} | {cosine} | {entry['share']:.0%} |"
    )


def model_table(name: str, model: dict, device: str) -> list[str]:
    "Lines of markdown: what was measured, then a row for each contender."
    lengths, rates = model["lengths_s"], model["flops_per_s"]
    # one hour of audio per hour is one second of audio per second
    rate = "audio s/s" if device == "cpu" else "hours of audio per GPU-hour"
    flops = f"{model['flops'] / sum(lengths) / 1e9:.1f} GFLOP per second of audio"
    products = f"{rates['fp32'] / 1e9:.0f} GFLOP/s in fp32, {rates['bf16'] / 1e9:.0f} in bf16"
    return [
        f"**{name}**, {model['n']} recordings of {model['set']}, {min(lengths):.1f} to {max(lengths):.1f} s, {sum(lengths):.0f} "
        f"s in all, {model['rounds']} rounds; {flops}, matrix products at {products}; two recordings' embeddings differ by "
        f"{model['spread']:.2f}.",
        "",
        f"| | | {rate} | times (b) | peak MB | error | cosine | of the floor |",
        "|---|---|---|---|---|---|---|---|",
        *(row(entry) for entry in model["contenders"].values()),
        "",
    ]


def whole_table(whole: dict) -> list[str]:
    "The same for whole processes."
    lines = [
        f"**Whole processes**, imports included: {whole['model']}, {whole['n']} recordings of {whole['set']}, "
        f"{whole['audio_s']:.0f} s in all, cut at 10 s; {whole['rounds']} rounds.",
        "",
        "| | | seconds | times faster than (a) | peak MB | first results after, s |",
        "|---|---|---|---|---|---|",
    ]
    for entry in whole["contenders"].values():
        first = show(with_range(entry["first_s"]), ".1f") if entry["first_s"] else ""
        numbers = f"{show(with_range(entry['seconds']), '.1f')} | {show(entry['ratio'])} | {entry['peak_mb']:.0f} | {first} |"
        lines.append(f"| {entry['group']} | {entry['label']} | {numbers}")
    return [*lines, ""]


def machine_line(results: dict) -> str:
    machine, versions = results["machine"], results["versions"]
    where = machine.get("gpu") or f"{machine['cpu']} ({machine['family']}; {', '.join(machine['instructions'])})"
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    threads = f"{results['settings']['threads']} threads of {machine['cores']} cores"
    where += f", {threads}, {machine['memory_gb']:.0f} GB, load before the start {results['load_before']:.1f}"
    return f"Measured on {where}; {packages}."


def to_markdown(results: dict) -> str:
    "The tables, with the machine named and what the columns mean."
    lines = [machine_line(results), ""]
    for name, model in results["models"].items():
        lines += model_table(name, model, results["device"])
    lines += whole_table(results["whole"]) if results["whole"] else []
    return "\n".join([*lines, LEGEND, ""])


def draw(
    results: dict,  # summarized
    path: Path,  # PNG
) -> None:
    "Bars of audio per second with their ranges, a panel for each model, the floors as lines."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = results["models"]
    n_bars = [sum(e["failure"] is None for e in m["contenders"].values()) for m in models.values()]
    size = (9, 1.2 + 0.42 * sum(n_bars) + 0.6 * len(n_bars))
    layout = dict(squeeze=False, height_ratios=n_bars, layout="constrained")
    figure, axes = plt.subplots(len(models), 1, figsize=size, **layout)
    for axis, (name, model) in zip(axes[:, 0], models.items(), strict=True):
        entries = [e for e in model["contenders"].values() if e["failure"] is None]
        for y, entry in enumerate(entries):
            rate, color = entry["rate"], COLORS[entry["precision"]] if entry["group"] == "e" else GRAY
            spread = [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]]
            axis.barh(y, rate["median"], color=color, xerr=spread, error_kw={"capsize": 3, "linewidth": 1.2})
            beside = dict(textcoords="offset points", va="center", fontsize=11, bbox=WHITE)
            axis.annotate(f"{rate['median']:.1f}", (rate["max"], y), (5, 0), **beside)
        axis.set_yticks(range(len(entries)), [f"({e['group']}) {e['label']}" for e in entries], fontsize=11)
        axis.invert_yaxis()
        floors = {p: sum(model["lengths_s"]) * model["flops_per_s"][p] / model["flops"] for p in COLORS}
        shown = [p for p in COLORS if any(e["precision"] == p for e in entries)]
        for p in shown:
            axis.axvline(floors[p], color=COLORS[p], linestyle="--", linewidth=1.6, label=f"matrix products alone, {p}")
        axis.set_xlim(0, 1.12 * max([floors[p] for p in shown] + [e["rate"]["max"] for e in entries]))
        axis.set_title(f"wav2vec2 {name}, {model['set']}", loc="left", fontsize=12)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=11, frameon=False, loc="outside upper center", ncols=2)
    unit = "seconds of audio per second" if results["device"] == "cpu" else "hours of audio per GPU-hour"
    axes[-1, 0].set_xlabel(f"{unit} (median and range)", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=85, pil_kwargs={"optimize": True})
    plt.close(figure)


def write_report(
    results: Path,  # what `bench.py run` wrote
    picture: Path,  # PNG to write
    table: Path | None = None,  # markdown to write; None: standard output
) -> None:
    "The table and the plot of a results file."
    found = json.loads(results.read_text(encoding="utf-8"))
    draw(found, picture)
    if table:
        table.write_text(to_markdown(found), encoding="utf-8")
    else:
        print(to_markdown(found), end="")
