"Blocks over packed frames: each recording by itself or padded, WavLM's bias, the positional product of transforms."

from functools import partial

import pytest
import torch
from conftest import VARIANTS, make_model
from torch.nn import functional as F

from w2v2nb.architecture import build, complete
from w2v2nb.positions import convolve_blocks, transform_kernel
from w2v2nb.transformer import Layout, Pass, attend, distance_bias, each_recording, prepare_transformer, run_transformer


def transformer(variant):
    library = make_model(variant)
    config = complete(library.config.to_dict())
    model = build(config)
    model.load_state_dict({name: weight for name, weight in library.state_dict().items() if name != "masked_spec_embed"})
    return prepare_transformer(model, config, torch.float32), config


@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_as_on_a_gpu_equals_one_at_a_time(variant):
    "The way a GPU takes, run here on the CPU."
    torch.manual_seed(0)
    weights, config = transformer(variant)
    n_frames, layers = [40, 1, 13, 90], [0, 1, 3]
    hidden = torch.randn(sum(n_frames), config["hidden_size"])
    found = []
    for is_padded in (False, True):
        how = Pass(config, Layout(n_frames, is_padded=is_padded))
        with torch.inference_mode():
            found.append(torch.stack(run_transformer(weights, hidden, how, layers)))
    assert ((found[0] - found[1]).abs().max() / found[0].abs().max()).item() < 1e-5


@pytest.mark.parametrize("kernel", [2, 16, 64, 128])
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 129, 130, 500])
def test_product_of_transforms_is_the_convolution(kernel, n):
    torch.manual_seed(0)
    weight, x = torch.randn(12, 4, kernel), torch.randn(n, 12)
    expected = F.conv1d(x.double().T[None], weight.double(), padding=kernel // 2, groups=3)[0, :, :n].T
    found = convolve_blocks(x, transform_kernel(weight, 3), 3, kernel)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-6


@pytest.mark.parametrize("n", [1, 2, 50, 400, 1200])
def test_distance_bias_is_the_library_s(n):
    library = make_model("wavlm")
    attention = library.encoder.layers[0].attention
    expected = attention.compute_bias(n, n)  # (heads, queries, keys)
    bias = distance_bias(attention.rel_attn_embed.weight, n + 7, library.config.max_bucket_distance)
    i = torch.arange(n)
    assert torch.equal(bias[:, i[None] - i[:, None] + n + 6], expected)


@pytest.mark.parametrize("is_padded", [False, True])
def test_bias_in_portions_of_queries_is_the_bias_at_once(is_padded, monkeypatch):
    "Long recordings: the mask is made for some queries at a time."
    torch.manual_seed(0)
    n, n_heads = 300, 2
    qkv, gate, bias = torch.randn(2, n, 3 * 16), torch.randn(2, n, n_heads), torch.randn(n_heads, 2 * n + 19)
    mask = torch.arange(n)[None] < torch.tensor([[n], [170]]) if is_padded else None
    i = torch.arange(n)
    added = bias[:, i[None] - i[:, None] + n + 9] * gate.transpose(1, 2)[..., None]
    if is_padded:
        added = added.masked_fill(~mask[:, None, None], -torch.inf)
    q, k, v = qkv.view(2, n, 3, n_heads, 8).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(2, 3) / 8**0.5 + added).softmax(-1) @ v
    found = attend(qkv, mask, n_heads, bias, gate)  # 2**22 // 300 queries at a time: all
    assert torch.allclose(found, expected.transpose(1, 2).reshape(2, n, 16), atol=1e-5)
    import w2v2nb.transformer

    monkeypatch.setattr(w2v2nb.transformer, "MAX_MASK", 300 * 70)
    assert torch.allclose(attend(qkv, mask, n_heads, bias, gate), found, atol=1e-5)


def test_each_recording_passes_gradients_in_both_ways():
    x = torch.randn(10, 3, requires_grad=True)
    for is_padded in (False, True):
        y = each_recording(lambda x, mask: x.cumsum(1), x, Layout([4, 6], is_padded=is_padded))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient[:, 0].tolist() == [4, 3, 2, 1, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("tune", ["head", "all"])
def test_features_are_masked_in_training_only_and_by_the_recording_s_own_chance(tune):
    from w2v2nb import samples
    from w2v2nb.augment import mask_spans
    from w2v2nb.chance import Chance
    from w2v2nb.encoder import Encoder

    encoder = Encoder.from_pretrained(samples.checkpoint(), device="cpu")
    encoder.requires_grad_(tune == "all").train(tune == "all")
    torch.manual_seed(0)
    waveform, lengths = torch.randn(3, 16000), torch.tensor([16000, 9000, 12000])
    waveform[1, 9000:], waveform[2, 12000:] = 0, 0

    def run(rows, chance=None):
        (states,), n_frames = encoder(waveform[rows], lengths[rows], [-1], chance)
        return states.detach(), n_frames.tolist()

    encoder.eval()
    plain, _ = run([0, 1, 2])
    encoder.mask_features = partial(mask_spans, time_share=0.5)
    assert torch.equal(run([0, 1, 2])[0], plain), "without chance nothing is masked"
    encoder.train(tune == "all")
    together, n_frames = run([0, 1, 2], Chance([5, 6, 7]))
    assert all((together[i, :n] - plain[i, :n]).abs().max() > 1e-3 for i, n in enumerate(n_frames))
    for i, seed in enumerate((5, 6, 7)):
        alone, (n,) = run([i], Chance([seed]))
        assert torch.allclose(alone[0, :n], together[i, :n], atol=1e-5)
