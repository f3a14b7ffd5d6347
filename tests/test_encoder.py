import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import VARIANTS, make_model, save_checkpoint

from w2v2nb.backbone import PREPARED, find_bf16, pick_device
from w2v2nb.encoder import Encoder, group_by_length, pool
from w2v2nb.frontend import count_frames, refuse_short
from w2v2nb.reference import load_reference, reference_states
from w2v2nb.transforms import normalize


def error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


def test_a_path_is_not_a_recording(checkpoints):
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    with pytest.raises(TypeError, match="decode it first"):
        encoder.embed(["a.wav"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_equals_plain_transformers_alone(variant, checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints[variant], device="cpu")
    model = load_reference(checkpoints[variant])
    layers = list(range(encoder.n_layers + 1))
    padded = torch.nn.utils.rnn.pad_sequence(recordings, batch_first=True)
    with torch.no_grad():
        states, n_frames = encoder(padded, torch.tensor([len(x) for x in recordings]), layers)
    for i, waveform in enumerate(recordings):
        expected = reference_states(model, waveform)
        assert n_frames[i] == len(expected[0])
        for layer in layers:
            assert error(states[layer][i, : n_frames[i]], expected[layer]) < 1e-5, (i, layer)
            frames, times_s = encoder.frames(waveform, layer)
            assert error(frames, expected[layer]) < 1e-5, (i, layer)
            assert len(times_s) == len(frames)


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_embedding_is_the_same_whatever_its_batch(variant, pooling, checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints[variant], device="cpu")
    layers = list(range(encoder.n_layers + 1))
    together = encoder.embed(recordings, layers, pooling)
    assert together.shape == (len(recordings), len(layers), encoder.hidden_size) and together.dtype == torch.float32
    for i, waveform in enumerate(recordings):
        assert error(together[i], encoder.embed([waveform], layers, pooling)[0]) < 1e-5
    backwards = encoder.embed(recordings[::-1], layers, pooling).flip(0)
    assert error(backwards, together) < 1e-5


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("variant", ["wav2vec2", "hubert", "wavlm", "unispeech-sat", "data2vec-audio", "hubert-batch-norm"])
def test_plain_padded_batch_differs(variant, checkpoints, recordings):
    "The tests above can fail: the library's own padded batch is far outside their tolerance."
    model = load_reference(checkpoints[variant])
    pair = [normalize(x) for x in recordings[1:3]]
    padded = torch.nn.utils.rnn.pad_sequence(pair, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[len(x)] for x in pair])
    with torch.no_grad():
        together = model(padded, attention_mask=mask.long()).last_hidden_state[0]
    alone = reference_states(model, recordings[1])[-1]
    assert error(together[: len(alone)], alone) > 1e-3


HEADS = {
    "Wav2Vec2ForCTC": "wav2vec2",
    "Wav2Vec2ForPreTraining": "wav2vec2",
    "HubertForSequenceClassification": "hubert",
    "WavLMForXVector": "wavlm",
    "Data2VecAudioForCTC": "data2vec-audio",
    "UniSpeechSatForPreTraining": "unispeech-sat",
}


@pytest.mark.parametrize("head", HEADS)
def test_checkpoint_with_a_head_gives_its_encoder(head, tmp_path, recordings):
    model = make_model(HEADS[head], head)
    encoder = Encoder.from_pretrained(save_checkpoint(tmp_path, model), device="cpu")
    model.base_model.is_normalized = True
    expected = reference_states(model.base_model, recordings[2])
    assert error(encoder.frames(recordings[2])[0], expected[-1]) < 1e-5


def test_without_normalization_and_preprocessor(tmp_path, recordings):
    model = make_model("wav2vec2-stable")
    raw = Encoder.from_pretrained(save_checkpoint(tmp_path, model, do_normalize=False), device="cpu")
    assert not raw.do_normalize
    with torch.no_grad():
        expected = model(recordings[0][None]).last_hidden_state[0]
    assert error(raw.frames(recordings[0])[0], expected) < 1e-5
    (tmp_path / "preprocessor_config.json").unlink()
    default = Encoder.from_pretrained(tmp_path, device="cpu")
    assert default.do_normalize and default.sample_rate == 16000
    nested = {"feature_extractor": {"do_normalize": False, "sampling_rate": 8000}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    nested = Encoder.from_pretrained(tmp_path, device="cpu")
    assert not nested.do_normalize and nested.sample_rate == 8000


def test_preprocessing_equals_the_feature_extractor(checkpoints, recordings):
    from transformers import Wav2Vec2FeatureExtractor

    extract = Wav2Vec2FeatureExtractor(do_normalize=True)
    loud_offset = recordings[2] * 3 + 5
    expected = torch.tensor(np.asarray(extract(loud_offset.numpy(), sampling_rate=16000)["input_values"][0]))
    assert (normalize(loud_offset) - expected).abs().max() < 1e-5


def test_half_precision_is_read_as_float32(tmp_path):
    encoder = Encoder.from_pretrained(save_checkpoint(tmp_path, make_model("wav2vec2").half()), device="cpu")
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}


@pytest.mark.skipif(not find_bf16(), reason="this CPU has no instructions for bfloat16")
@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_is_close(variant, checkpoints, recordings):
    reference = Encoder.from_pretrained(checkpoints[variant], device="cpu").embed(recordings, [0, 1, 2, 3])
    encoder = Encoder.from_pretrained(checkpoints[variant], precision="bf16", device="cpu")
    embeddings = encoder.embed(recordings, [0, 1, 2, 3])
    assert embeddings.dtype == torch.float32 and encoder.precision == "bf16"
    assert torch.cosine_similarity(embeddings, reference, dim=-1).min() > 0.999


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_reaches_every_weight(variant, checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints[variant], device="cpu").train()
    padded = torch.nn.utils.rnn.pad_sequence(recordings[:3], batch_first=True)
    (states,), n_frames = encoder(padded, torch.tensor([len(x) for x in recordings[:3]]))
    pool(states, n_frames, "mean").sum().backward()
    assert not [name for name, weight in encoder.named_parameters() if weight.grad is None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_plain_transformers(variant, checkpoints, recordings):
    "One recording at a time without dropout; a batch's gradient is their sum."
    encoder = Encoder.from_pretrained(checkpoints[variant], device="cpu")
    model, pair = load_reference(checkpoints[variant]), recordings[1:3]
    padded = torch.nn.utils.rnn.pad_sequence(pair, batch_first=True)
    (states,), n_frames = encoder(padded, torch.tensor([len(x) for x in pair]))
    pool(states, n_frames).square().sum().backward()
    sum(model(normalize(x)[None]).last_hidden_state[0].mean(0).square().sum() for x in pair).backward()
    ours = {name.removeprefix("model."): weight.grad for name, weight in encoder.named_parameters()}
    for name, weight in model.named_parameters():
        if name != "masked_spec_embed":
            assert (ours[name] - weight.grad).abs().max() <= 2e-4 * max(weight.grad.abs().max().item(), 1e-3), name


def test_dropout_only_while_training(checkpoints, recordings):
    encoder, length = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu"), torch.tensor([len(recordings[1])])
    calm, other = (encoder(recordings[1][None], length)[0][0] for _ in range(2))
    encoder.train()
    drops = [encoder(recordings[1][None], length)[0][0] for _ in range(2)]
    assert torch.equal(calm, other) and not torch.equal(drops[0], drops[1])


def test_a_changed_weight_is_noticed(checkpoints, recordings):
    "Weights are prepared once and kept, until torch counts a change of one."
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    weight, state = encoder.model.encoder.layers[0].attention.q_proj.weight, encoder.state_dict()
    state = {name: value.clone() for name, value in state.items()}
    first = encoder.embed(recordings[:2])
    with torch.no_grad():
        weight.mul_(2)
    second = encoder.embed(recordings[:2])
    encoder.load_state_dict(state)
    assert not torch.equal(first, second) and torch.equal(encoder.embed(recordings[:2]), first)
    encoder.load_state_dict({name: value * 2 if "q_proj" in name else value for name, value in state.items()}, assign=True)
    assert not torch.equal(encoder.embed(recordings[:2]), first)


def test_a_copy_has_weights_of_its_own(checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    expected = encoder.embed(recordings[:2])
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert copied not in PREPARED and torch.equal(copied.embed(recordings[:2]), expected)
        with torch.no_grad():
            copied.model.encoder.layers[0].attention.q_proj.weight.mul_(2)
        assert not torch.equal(copied.embed(recordings[:2]), expected) and torch.equal(encoder.embed(recordings[:2]), expected)


def test_made_and_used_under_inference_mode(checkpoints, recordings):
    expected = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu").embed(recordings[:2])
    with torch.inference_mode():
        encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
        assert torch.equal(encoder.embed(recordings[:2]), expected)


def test_embedding_while_training(checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints["hubert-batch-norm"], device="cpu")
    assert not encoder.training
    expected = encoder.embed(recordings)
    encoder.train()
    statistics = {name: value.clone() for name, value in encoder.named_buffers()}
    embeddings = encoder.embed(recordings)
    assert torch.equal(embeddings, expected) and encoder.training and not embeddings.requires_grad
    encoder(recordings[0][None], torch.tensor([len(recordings[0])]))
    assert all(torch.equal(value, statistics[name]) for name, value in encoder.named_buffers())
    # an ordinary tensor: a head of one's own can be trained on it
    torch.nn.Linear(16, 1)(embeddings).sum().backward()


def test_values_in_the_padding_do_not_matter(checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    pair = torch.nn.utils.rnn.pad_sequence(recordings[1:3], batch_first=True)
    lengths = torch.tensor([len(x) for x in recordings[1:3]])
    spoiled = pair.clone()
    spoiled[0, lengths[0] :] = torch.nan
    with torch.no_grad():
        (clean,), n_frames = encoder(pair, lengths)
        (other,), _ = encoder(spoiled, lengths)
    assert torch.equal(pool(clean, n_frames), pool(other, n_frames))


def test_accepted_recordings(checkpoints):
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    samples = np.random.default_rng(0).standard_normal(4000)
    expected = encoder.embed([torch.tensor(samples, dtype=torch.float32)])
    for same in (samples, samples.astype(np.float32), samples[::-1][::-1], samples.tolist(), torch.tensor(samples)):
        assert torch.equal(encoder.embed([same]), expected)
    assert encoder.embed(np.stack([samples, samples])).shape == (2, 16)


@pytest.mark.parametrize(
    ("recordings", "message"),
    [
        ([], "the list of recordings is empty"),
        ([np.zeros((2, 4000))], r"recording 0 has shape \(2, 4000\).*averaged first"),
        (np.zeros(4000), "embed takes a list of them"),
        ([np.zeros(4000), np.zeros(4000, dtype=np.int16)], "recording 1 holds int16 values.*32768"),
        ([np.full(4000, np.nan)], "recording 0 holds NaN"),
        ([np.zeros(4000), np.zeros(399), np.zeros(0)], r"1 \(399 samples\), 2 \(0 samples\).*at least 400 samples"),
    ],
)
def test_refused_recordings(recordings, message, checkpoints):
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    with pytest.raises(ValueError, match=message):
        encoder.embed(recordings)


def test_refused_arguments(checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    for layer in (4, -2, True, 1.0, "last"):
        with pytest.raises(ValueError, match="layers 0 to 3, and -1"):
            encoder.embed(recordings, layer)
    with pytest.raises(ValueError, match="mean, sum or max"):
        encoder.embed(recordings, pooling="median")
    with pytest.raises(ValueError, match="one of fp32, bf16, fp16, auto"):
        Encoder.from_pretrained(checkpoints["wav2vec2"], precision="int8")
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        Encoder.from_pretrained(checkpoints["wav2vec2"], precision="fp16", device="cpu")


@pytest.mark.parametrize(
    ("there", "asked", "chosen", "sentence"),
    [
        ({}, "bf16", "fp32", "precision bf16 is slower than fp32 on this CPU, which has no instructions for it: fp32 is used"),
        ({}, "auto", "fp32", "precision auto: fp32, since this cpu has no fast bf16"),
        ({"avx512_bf16": True}, "auto", "bf16", "precision auto: bf16, which this CPU computes by AVX512-BF16"),
        ({"avx512_bf16": True, "amx_bf16": True}, "auto", "bf16", "precision auto: bf16, which this CPU computes by AMX"),
        ({"avx512_bf16": True}, "bf16", "bf16", ""),
        ({}, "fp32", "fp32", ""),
    ],
)
def test_precision_follows_the_cpu_and_says_so(there, asked, chosen, sentence, checkpoints, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there)
    assert Encoder.from_pretrained(checkpoints["wav2vec2"], asked, "cpu").precision == chosen
    assert capsys.readouterr().out.strip() == sentence


@pytest.mark.parametrize("n_cuda, has_mps", [(0, False), (2, False), (0, True)])
def test_devices(monkeypatch, n_cuda, has_mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    there = ["cpu", *["cuda", "cuda:0", "cuda:1"] * (n_cuda == 2), *["mps"] * has_mps]
    for wish in there:
        assert pick_device(wish) == pick_device(torch.device(wish)) == torch.device(wish)
    assert pick_device() == torch.device("cuda" if n_cuda else "mps" if has_mps else "cpu")
    for wish in {"cuda", "cuda:0", "cuda:2", "cuda:7", "cuda:-1", "mps", "mps:1", "meta", "gpu", "the big one", ""} - set(there):
        with pytest.raises(ValueError, match=f"device {wish} is not there; this machine has .*cpu: name one of these") as e:
            pick_device(wish)
        assert "\n" not in str(e.value) and ("cuda:1" in str(e.value)) == (n_cuda == 2 or wish == "cuda:1")


def test_many_short_recordings_are_not_all_named():
    with pytest.raises(ValueError, match=r"by position: 0 \(3 samples\), .* and 35 more; a recording should have"):
        refuse_short([3] * 40, 400)


def test_layers_in_any_order(checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2-stable"], device="cpu")
    several = encoder.embed(recordings, (3, 0, -1, 3))
    for position, layer in enumerate([3, 0, 3, 3]):
        assert torch.equal(several[:, position], encoder.embed(recordings, layer))
    assert torch.equal(encoder.embed(recordings), encoder.embed(recordings, 3))


def test_all_layers_and_several_poolings(checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    everything = encoder.embed(recordings, "all", ["mean", "max", "sum"])
    assert everything.shape == (len(recordings), 4, 3, 16)
    for layer in range(4):
        for k, pooling in enumerate(["mean", "max", "sum"]):
            assert torch.equal(everything[:, layer, k], encoder.embed(recordings, layer, pooling))
    assert torch.equal(encoder.embed(recordings, -1, ["max"])[:, 0], everything[:, 3, 1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_with_enough_context_is_the_whole(variant, checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints[variant], device="cpu")
    for waveform in recordings[:4]:
        with torch.no_grad():
            whole, _ = encoder(waveform[None], torch.tensor([len(waveform)]), [0, 2, 3])
        chunks = list(encoder.stream(waveform, [0, 2, 3], chunk_s=0.5, context_s=10.0))
        assert [start for start, _ in chunks] == list(range(0, whole[0].shape[1], 25))
        for k, states in enumerate(whole):
            assert error(torch.cat([found[k] for _, found in chunks]), states[0]) < 1e-5


def test_a_stream_without_context_is_exact_up_to_the_positions(checkpoints, recordings):
    "Statistics over the whole recording: what enters the positional convolution does not know of chunks."
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    with torch.no_grad():
        for layer in encoder.model.encoder.pos_conv_embed.parameters():
            layer.zero_()
        encoder.model.encoder.pos_conv_embed.conv.parametrizations.weight.original1.fill_(1)
    whole, _ = encoder.frames(recordings[0], 0)
    chunks = torch.cat([states[0] for _, states in encoder.stream(recordings[0], [0], chunk_s=0.3, context_s=0.0)])
    assert error(chunks, whole) < 1e-5


def test_a_stream_needs_memory_for_a_chunk_only(checkpoints):
    "Twenty minutes in a process of its own: the peak grows by a few copies of the samples, not by the frames' states."
    code = f"""if True:
        import resource, torch
        from w2v2nb.encoder import Encoder
        encoder = Encoder.from_pretrained({str(checkpoints["wavlm"])!r}, device="cpu")
        waveform = torch.randn(20 * 60 * 16000)
        for _ in encoder.stream(waveform[:16000 * 60], [3], chunk_s=20.0): pass
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        n = sum(len(states[0]) for _, states in encoder.stream(waveform, [3], chunk_s=20.0))
        print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * len(waveform)))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    n, copies = run.stdout.split()
    assert int(n) == 59999 and float(copies) < 5


def test_a_chunk_of_nothing_is_refused(checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    with pytest.raises(ValueError, match="a chunk of 0 s with 5 s of context is too short"):
        next(encoder.stream(recordings[0], [3], chunk_s=0, context_s=5))


def test_stops_at_the_highest_layer(checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints["wavlm"], device="cpu")
    encoder.model.encoder.layers[2].layer_norm.forward = None
    assert encoder.embed(recordings, [1, 2]).shape == (len(recordings), 2, 16)


def test_frames_have_times(checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    assert (encoder.min_frames, encoder.stride, encoder.sample_rate) == (400, 320, 16000)
    states, times_s = encoder.frames(recordings[2])
    assert states.shape == (49, 16) and times_s.shape == (49,)
    assert times_s[:2].tolist() == pytest.approx([0.0125, 0.0325]) and times_s[-1] < 1.0


def test_count_frames_is_what_the_convolutions_do():
    model = make_model("wav2vec2")
    for n in [400, 401, 719, 720, 1039, 1040, 15999, 16000, 16001, 48000, 100_003]:
        assert count_frames(n, 400, 320) == int(model._get_feat_extract_output_lengths(torch.tensor(n)))


def test_full_convolutions_leaves_the_setting_as_it_was(checkpoints, recordings):
    encoder = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")
    before, seen = torch.backends.cudnn.conv.fp32_precision, []
    encoder.model.encoder.layers[0].layer_norm.register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision)
    )
    encoder.embed(recordings[:1])
    assert seen == ["ieee"] and torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda(variant, checkpoints, recordings):
    reference = Encoder.from_pretrained(checkpoints[variant], device="cpu").embed(recordings, [0, 1, 2, 3])
    encoder = Encoder.from_pretrained(checkpoints[variant], device="cuda")
    together = encoder.embed(recordings, [0, 1, 2, 3])
    assert error(together, reference) < 1e-4
    for i, waveform in enumerate(recordings):
        assert error(encoder.embed([waveform], [0, 1, 2, 3])[0], together[i]) < 1e-5
    for precision in ("bf16", "fp16"):
        encoder = Encoder.from_pretrained(checkpoints[variant], precision, "cuda")
        assert torch.cosine_similarity(encoder.embed(recordings, [0, 1, 2, 3]), reference, dim=-1).min() > 0.999


def test_groups_hold_every_recording_once():
    lengths = [5, 40, 9, 10, 4, 1, 1, 1, 100, 20]
    for limit in (1, 10, 20, 50, 1000):
        batches = group_by_length(lengths, limit)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= limit for b in batches)


def test_embedding_imports_little(checkpoints):
    "The library's modelling code takes seconds to import, torch's compiler one or two."
    code = f"""if True:
        import sys, torch
        from w2v2nb.encoder import Encoder
        Encoder.from_pretrained({str(checkpoints["wavlm"])!r}, device="cpu").embed([torch.randn(4000)])
        print([name for name in ("transformers", "torch._dynamo", "librosa", "matplotlib") if name in sys.modules])"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_import_takes_no_transformers_or_pandas():
    code = "import sys, w2v2nb.encoder, w2v2nb.model; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['torch']"
