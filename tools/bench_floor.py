"""What the benchmark holds times against: a model's operations for one recording, and the machine's rate of matrix products."""

import os
import platform
import time
from pathlib import Path


def count_flops(
    config: dict,  # of a wav2vec2 checkpoint
    n_samples: int,  # length of the recording
) -> int:
    "Multiplications and additions of the model for one recording without padding: convolutions, linear layers and attention."
    total, n, channels_in = 0, n_samples, 1
    for channels, kernel, stride in zip(config["conv_dim"], config["conv_kernel"], config["conv_stride"], strict=True):
        n = (n - kernel) // stride + 1
        total += 2 * n * kernel * channels_in * channels
        channels_in = channels
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    total += 2 * n * channels_in * hidden
    total += 2 * n * hidden * config["num_conv_pos_embeddings"] * hidden // config["num_conv_pos_embedding_groups"]
    linear = 2 * n * (4 * hidden * hidden + 2 * hidden * inner)
    attention = 4 * n * n * hidden
    return total + config["num_hidden_layers"] * (linear + attention)


def typical_shapes(
    config: dict,  # of a wav2vec2 checkpoint
) -> list[tuple[int, int, int]]:
    "Rows, inputs and outputs of the products that take most of the model's time, for 30 and 60 s of audio."
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return [(1500, hidden, inner), (1500, inner, hidden), (3000, hidden, hidden)]


def measure_matmul(
    precision: str,  # fp32 or bf16
    shapes: list,  # rows, inputs, outputs
    device: str,  # cpu or cuda
    wait_s: float = 0.3,  # how long each shape is repeated, in seconds
) -> float:
    "Operations per second of the fastest linear layer among `shapes`, the best of several repetitions."
    import torch

    from w2v2nb.frontend import multiply

    dtype, best = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], 0.0
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    for rows, n_in, n_out in shapes:
        x, weight = torch.randn(rows, n_in, dtype=dtype, device=device), torch.randn(n_out, n_in, dtype=dtype, device=device)
        n_calls = 1 if device == "cpu" else 20
        end = time.perf_counter() + wait_s
        with torch.inference_mode():
            multiply(x, weight)
            while time.perf_counter() < end:
                synchronize()
                begin = time.perf_counter()
                for _ in range(n_calls):  # as w2v2nb does it, which on a CPU is faster than torch's own linear layer
                    multiply(x, weight)
                synchronize()
                best = max(best, n_calls * 2 * rows * n_in * n_out / (time.perf_counter() - begin))
    return best


def describe_machine(
    gpu: str = "",  # its name, if one is used
) -> dict:
    "Processor, cores, memory in GB, the instruction sets that matter here, and the GPU if one is used."
    about = {"cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    about["cpu"] = fields.get("model name", about["cpu"])
    about["family"] = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    flags = fields.get("flags", "").split()
    about["instructions"] = [x for x in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if x in flags]
    about["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return about | ({"gpu": gpu} if gpu else {})
