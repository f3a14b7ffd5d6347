"""The original's recipe as a whole program: python tools/bench_original.py CHECKPOINT PREFIX TABLE.csv OUT.parquet THREADS

It imports only what this recipe needs, less than the original did, so that the comparison of whole processes errs on its side.
"""

import sys

import numpy as np
import pandas as pd
import soundfile
import torch
import torchaudio
from bench_worker import RATE_HZ, original

checkpoint, prefix, table, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))


def read(path):
    "Mono at 16 kHz."
    x, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    x = torch.from_numpy(x.mean(1))
    return (x if rate_hz == RATE_HZ else torchaudio.functional.resample(x, rate_hz, RATE_HZ)).numpy()


rows = pd.read_csv(table, dtype={"uid": str})
embed = original(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
found = []
with torch.no_grad():
    for start in range(0, len(rows), 8):
        found.append(embed([read(f"{prefix}/{path}") for path in rows.path[start : start + 8]]).numpy())
pd.DataFrame({"uid": rows.uid, "embedding": list(np.concatenate(found))}).to_parquet(out)
