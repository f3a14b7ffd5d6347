"""The benchmark: its count of operations, what its numbers come to, and a real run on the tiny checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from torch.utils.flop_counter import FlopCounterMode

from w2v2nb.backbone import find_bf16

root = Path(__file__).parent.parent
sys.path.insert(0, str(root / "tools"))
from bench import pick_contenders
from bench_floor import count_flops
from bench_report import summarize, to_markdown


@pytest.mark.parametrize("variant", ["wav2vec2", "wav2vec2-stable"])
@pytest.mark.parametrize("n_samples", [400, 16000, 33333])
def test_operations_are_those_that_torch_counts(variant, n_samples):
    model = make_model(variant)
    model.set_attn_implementation("eager")  # torch does not count a CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, n_samples))
    config = model.config.to_dict()
    kernel, groups, hidden = config["num_conv_pos_embeddings"], config["num_conv_pos_embedding_groups"], config["hidden_size"]
    dropped = 2 * hidden * kernel * hidden // groups  # an even kernel makes one frame more, which the model throws away
    assert counter.get_total_flops() == count_flops(config, n_samples) + dropped


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["original", "plain"]),
        ("ours", ["plain", "ours"]),
        ("b,e", ["plain", "plain_bf16", "ours", "ours_bf16"]),
        ("d", ["plain", "sentence_transformers", "speechbrain"]),
    ],
)
def test_contenders_are_chosen_by_name_or_group(text, names):
    assert pick_contenders(text) == names


def entry(*seconds, failure=None, **changes):
    about = dict(group="b", label="some", precision="fp32", failure=failure, audio_s=60.0, flops=6e9, seconds=list(seconds))
    return about | dict(peak_mb=100.0, error=0.0, cosine=1.0) | changes


def as_results(**contenders):
    model = dict(set="svd", n=2, lengths_s=[20.0, 40.0], rounds=3, flops=6e9, flops_per_s={"fp32": 3e9, "bf16": 6e9})
    machine = dict(cpu="A CPU", family="family 1", instructions=["avx2"], cores=2, memory_gb=8.0)
    about = dict(machine=machine, device="cpu", versions={"torch": "1"}, settings={"threads": 2}, whole=None)
    about |= {"load_before": 0.1}
    return about | {"models": {"base": model | {"spread": 0.3, "contenders": contenders}}}


def test_ratios_are_taken_within_a_round():
    # the machine is three times slower in the second round, for both
    found = summarize(as_results(plain=entry(4.0, 12.0, 5.0), ours=entry(2.0, 6.0, 2.0, group="e")))
    ours = found["models"]["base"]["contenders"]["ours"]
    assert ours["ratio"] == {"median": 2.0, "min": 2.0, "max": 2.5}
    assert ours["rate"] == {"median": 30.0, "min": 10.0, "max": 30.0}
    assert ours["share"] == 1.0  # 6e9 operations at 3e9 a second, in 2 s


def test_who_could_not_run_is_in_the_table_with_the_reason():
    found = summarize(as_results(plain=entry(4.0), speechbrain=entry(failure="ImportError: no", error=None, group="d")))
    assert "| d | some | did not run: ImportError: no |" in to_markdown(found)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "A quick run of the whole program on the samples, and its report."
    if not find_bf16():
        pytest.skip("this CPU has no instructions for bfloat16, one of what is compared")
    folder = tmp_path_factory.mktemp("bench")
    script, environment = str(root / "tools" / "bench.py"), {k: v for k, v in os.environ.items() if k != "W2V2NB_DATA"}
    measure = ["run", "--quick", "--threads", "1", "--work", str(folder / "work"), "--out", str(folder / "results.json")]
    report = ["report", str(folder / "results.json"), "--picture", str(folder / "bench.png"), "--table", str(folder / "table.md")]
    for arguments in (measure, report):
        done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(quick):
    return json.loads((quick / "results.json").read_text())


def test_every_contender_ran_every_round(results):
    contenders = results["models"]["tiny"]["contenders"]
    assert set(contenders) == {"original", "plain", "padded", "ours", "ours_bf16"}
    for name, about in contenders.items():
        assert about["failure"] is None and len(about["seconds"]) == 2, name
        assert min(about["seconds"]) > 0 and about["share"] > 0 and about["peak_mb"] > 50, name


def test_ours_is_exact_and_the_padded_are_not(results):
    model = results["models"]["tiny"]
    errors = {name: about["error"] for name, about in model["contenders"].items()}
    assert errors["plain"] == 0 and errors["ours"] < 1e-4
    assert model["contenders"]["ours_bf16"]["cosine"] > 0.999
    assert model["spread"] > 0.05, "embeddings of different recordings are alike, so errors mean nothing"
    assert errors["padded"] > 1e-3 and errors["original"] > 1e-3, "the tiny model has a group norm, padding should show"


def test_whole_processes_were_timed(results):
    contenders = results["whole"]["contenders"]
    assert set(contenders) == {"original", "ours", "ours_bf16"}
    for about in contenders.values():
        assert len(about["seconds"]) == 1 and about["peak_mb"] > 50
    assert 0 < contenders["ours"]["first_s"][0] <= contenders["ours"]["seconds"][0]


def test_results_name_machine_versions_and_recordings(results):
    assert results["machine"]["cores"] > 0 and results["machine"]["memory_gb"] > 0
    assert {"python", "torch", "transformers", "w2v2nb"} <= set(results["versions"])
    assert results["models"]["tiny"]["set"] == "synthetic samples" and results["settings"]["threads"] == 1
    assert str(root) not in json.dumps(results), "a path of this machine among the results"


def test_report_has_table_and_picture(quick):
    table = (quick / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith(("| a |", "| b |", "| c |", "| e |"))]
    assert "**tiny**" in table and len(rows) == 5 + 3, "five contenders and three whole processes"
    picture = (quick / "bench.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 100 * 1024
