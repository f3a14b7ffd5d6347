"""One contender of the benchmark, in a process of its own: tools/bench.py starts it and asks for turns over its standard input.

A turn is a line of JSON with the positions of the recordings to embed; the answer is a line with the seconds it took and the peak
memory so far, and the embeddings in a file. Each contender is a function that loads the model and returns a function from a list
of waveforms to their embeddings (n, hidden): everything in that one is timed, from decoded waveforms to vectors on the CPU.
"""

import json
import os
import re
import sys
import time
import warnings

import numpy as np

RATE_HZ, BATCH, CLIP = 16000, 8, 160000  # CLIP: samples that the original's recipe pads every recording to


def load_plain(folder, device, **options):
    "The library's model and its feature extractor, as its documentation loads them."
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    model = Wav2Vec2Model.from_pretrained(folder, **options).eval().to(device)
    return model, Wav2Vec2FeatureExtractor.from_pretrained(folder)


def batches_by_length(waveforms):
    "Positions of the recordings in batches, the longest first."
    order = sorted(range(len(waveforms)), key=lambda i: -len(waveforms[i]))
    return [order[i : i + BATCH] for i in range(0, len(order), BATCH)]


def mean_of_real(hidden, n_frames):
    "Mean over each recording's real frames: (batch, frames, hidden), (batch,) -> (batch, hidden)."
    import torch

    is_real = (torch.arange(hidden.shape[1], device=hidden.device) < n_frames[:, None])[..., None]
    return (hidden * is_real).sum(1) / n_frames[:, None]


def original(folder, device):
    "10 s, padded with the recording's own mean; batches of 8; eager; every map and state kept; mean over all frames."
    import torch

    model, extractor = load_plain(folder, device, attn_implementation="eager")

    def embed(waveforms):
        found = []
        for start in range(0, len(waveforms), BATCH):
            clips = [x[:CLIP] for x in waveforms[start : start + BATCH]]
            padded = [np.pad(x, (0, CLIP - len(x)), constant_values=x.mean()) for x in clips]
            inputs = extractor(padded, sampling_rate=RATE_HZ, return_tensors="pt").input_values.to(device)
            # a name for all of it, so that attention maps and states live until the next batch has been computed
            outputs = model(inputs, output_attentions=True, output_hidden_states=True)
            found.append(outputs.last_hidden_state.mean(1).cpu())
        return torch.cat(found)

    return embed


def plain(folder, device, **options):
    "One recording at a time: nothing is padded, so this is what every other contender's error is measured against."
    import torch

    model, extractor = load_plain(folder, device, **options)

    def embed(waveforms):
        found = []
        for x in waveforms:
            inputs = extractor(x, sampling_rate=RATE_HZ, return_tensors="pt").input_values.to(device, model.dtype)
            found.append(model(inputs).last_hidden_state.float().mean(1).cpu())
        return torch.cat(found)

    return embed


def plain_bf16(folder, device):
    "The same with weights and activations in bfloat16."
    import torch

    return plain(folder, device, dtype=torch.bfloat16)


def padded(folder, device):
    "Batches of 8 sorted by length, padded with zeros, with a mask; mean over real frames."
    import torch

    model, extractor = load_plain(folder, device)

    def embed(waveforms):
        found = torch.empty(len(waveforms), model.config.hidden_size)
        for batch in batches_by_length(waveforms):
            chosen = [waveforms[i] for i in batch]
            options = dict(sampling_rate=RATE_HZ, padding=True, return_attention_mask=True, return_tensors="pt")
            inputs = extractor(chosen, **options).to(device)
            n_frames = model._get_feat_extract_output_lengths(inputs.attention_mask.sum(1))
            found[batch] = mean_of_real(model(**inputs).last_hidden_state, n_frames).cpu()
        return found

    return embed


def sentence_transformers(folder, device):
    "`encode` of a list of waveforms; the library sorts by length, pads and pools by itself."
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device=device)

    def embed(waveforms):
        recordings = [{"array": x, "sampling_rate": RATE_HZ} for x in waveforms]
        return model.encode(recordings, batch_size=BATCH, show_progress_bar=False, convert_to_tensor=True).cpu()

    return embed


def speechbrain(folder, device):
    "Batches of 8 sorted by length, with relative lengths as its recipes give them; mean of the wrapper's real frames."
    import torch
    from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
    from torch.nn.utils.rnn import pad_sequence

    wrapper = Wav2Vec2(folder, save_path=folder, freeze=True).eval().to(device)

    def embed(waveforms):
        found = torch.empty(len(waveforms), wrapper.model.config.hidden_size)
        for batch in batches_by_length(waveforms):
            lengths = torch.tensor([len(waveforms[i]) for i in batch], device=device)
            inputs = pad_sequence([torch.from_numpy(waveforms[i]) for i in batch], batch_first=True).to(device)
            n_frames = wrapper.model._get_feat_extract_output_lengths(lengths)
            found[batch] = mean_of_real(wrapper(inputs, lengths / lengths.max()), n_frames).cpu()
        return found

    return embed


def ours(folder, device, precision="fp32"):
    "`Encoder.embed` of a list of waveforms."
    from w2v2nb.encoder import Encoder

    encoder = Encoder.from_pretrained(folder, precision=precision, device=device)
    if encoder.precision != precision:
        raise RuntimeError(f"{precision} is not for this machine")
    return encoder.embed


def ours_bf16(folder, device):
    "The same in bfloat16."
    return ours(folder, device, "bf16")


def read_audio(settings):
    "All recordings, as views into one file that the processes share."
    everything = np.memmap(settings["audio"], np.float32, mode="r")
    return [np.array(x) for x in np.split(everything, np.cumsum(settings["lengths"])[:-1])]


def peak_mb(device):
    "Peak memory of this process in MB, loading the model included; on a GPU the GPU's."
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def take_turn(embed, waveforms, path):
    "Embed once, into a file; seconds taken."
    import torch

    begin = time.perf_counter()
    with torch.inference_mode():
        embeddings = embed(waveforms)
    seconds = time.perf_counter() - begin
    embeddings.float().numpy().astype(np.float32).tofile(path)
    return seconds


def serve(settings, answer):
    "Load, warm up, and take turns until the input ends."
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(settings["threads"])
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 for every contender
    device = settings["device"]
    if settings["contender"] == "floor":
        from bench_floor import measure_matmul

        def turn(_):
            return {"flops_per_s": {name: measure_matmul(name, settings["shapes"], device) for name in ("fp32", "bf16")}}

    else:
        embed, waveforms = globals()[settings["contender"]](settings["model"], device), read_audio(settings)
        with torch.inference_mode():
            embed([min(waveforms, key=len)])

        def turn(asked):
            seconds = take_turn(embed, [waveforms[i] for i in asked["recordings"]], settings["embeddings"])
            return {"seconds": seconds, "peak_mb": peak_mb(device)}

    answer({"ready": True})
    for line in sys.stdin:
        answer(turn(json.loads(line)))


if __name__ == "__main__":
    # what libraries print goes to standard error; the first standard output is for answers alone
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message):
        print(json.dumps(message), file=channel, flush=True)

    try:
        serve(json.loads(sys.argv[1]), answer)
    except Exception as e:
        # any reason why a contender cannot take part is a result
        line = str(e).strip().splitlines()[0] if str(e).strip() else ""
        answer({"failure": f"{type(e).__name__}: {re.sub(r'(?<![^ (=:])/[^ ]*/', '', line)}"})  # no paths of this machine
        raise
