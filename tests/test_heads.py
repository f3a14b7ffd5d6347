"""What is learned between hidden states and labels: attention over frames, weights of layers, heads."""

import pytest
import torch
from torch.nn import functional as F

from w2v2nb.chance import Chance
from w2v2nb.encoder import pool
from w2v2nb.heads import HEAD, AttentionPool, Head, LayerMix, make_heads


@pytest.fixture
def attention():
    torch.manual_seed(0)
    attention = AttentionPool(6)
    torch.nn.init.normal_(attention.score.weight)
    return attention


def test_attention_by_hand(attention):
    hidden = torch.randn(7, 6)
    scores = torch.tanh(hidden @ attention.look.weight.T + attention.look.bias) @ attention.score.weight[0]
    weights = scores.exp() / scores.exp().sum()
    expected = (weights[:, None] * hidden).sum(0)
    assert torch.allclose(attention(hidden[None], torch.tensor([7]))[0], expected, atol=1e-6)


def test_attention_ignores_padding(attention):
    n_frames = torch.tensor([1, 9, 4])
    hidden = torch.randn(3, 9, 6)
    for i, n in enumerate(n_frames):
        hidden[i, n:] = torch.nan
    together = attention(hidden, n_frames)
    for i, n in enumerate(n_frames):
        alone = attention(hidden[i : i + 1, :n], n_frames[i : i + 1])
        assert (together[i] - alone[0]).abs().max() < 1e-6
    assert torch.allclose(together[0], hidden[0, 0], atol=1e-6)  # one frame is all there is
    together.sum().backward()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in attention.parameters())


def test_attention_begins_as_the_mean_in_float32():
    hidden, n_frames = torch.randn(2, 9, 6), torch.tensor([9, 3])
    new = AttentionPool(6)
    assert torch.allclose(new(hidden, n_frames), pool(hidden, n_frames), atol=1e-6)
    assert new(hidden.bfloat16(), n_frames).dtype == torch.float32
    optimizer = torch.optim.Adam(new.parameters(), 0.1)
    before = [weight.clone() for weight in new.parameters()]
    for _ in range(2):  # what looks at a frame moves once its score is not zero
        new(hidden, n_frames).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, new.parameters(), strict=True))


def test_layers_begin_equal_and_their_weights_are_a_softmax():
    mixture, layers = LayerMix(4), list(torch.randn(4, 3, 5))
    assert torch.allclose(mixture(layers), torch.stack(layers).mean(0), atol=1e-6)
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0]))
    assert mixture.weights.sum() == 1 and torch.allclose(mixture(layers), layers[1])
    with pytest.raises(ValueError):
        mixture(layers[:3])


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_mixing_what_was_pooled_is_pooling_what_was_mixed(mode):
    mixture, n_frames = LayerMix(3), torch.tensor([5, 2])
    with torch.no_grad():
        mixture.logits.copy_(torch.randn(3))
    layers = list(torch.randn(3, 2, 5, 4))
    pooled = mixture([pool(x, n_frames, mode) for x in layers])
    assert torch.allclose(pooled, pool(mixture(layers), n_frames, mode), atol=1e-5)


def test_head_is_the_originals():
    head = Head(16, 3)
    assert [tuple(weight.shape) for weight in head.parameters()] == [(16, 16), (16,), (3, 16), (3,)]
    assert [*head.state_dict()] == ["dense.weight", "dense.bias", "output.weight", "output.bias"]
    assert head.dropout.p == 0.25
    x = torch.randn(4, 16)
    expected = head.output(head.dense(x).clamp(min=0))
    assert torch.allclose(head.eval()(x), expected)
    assert torch.allclose(head(x, Chance([1, 2, 3, 4])), expected)  # chance is for training
    torch.manual_seed(0)
    assert not torch.allclose(head.train()(x), expected)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize(("name", "function"), [("relu", F.relu), ("gelu", F.gelu), ("tanh", torch.tanh), ("silu", F.silu)])
def test_options_of_a_head(name, function, layer_norm):
    head, x = Head(16, 3, size=5, activation=name, layer_norm=layer_norm).eval(), torch.randn(4, 16)
    dense = x @ head.dense.weight.T + head.dense.bias
    if layer_norm:
        dense = (dense - dense.mean(1, keepdim=True)) / (dense.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(head.features(x), function(dense), atol=1e-5)
    assert head.features(x).shape == (4, 5) and torch.equal(head(x), head.output(head.features(x)))


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.99])
def test_dropout_belongs_to_the_recording(rate):
    head, x = Head(16, 3, size=64, dropout=rate).train(), torch.randn(3, 16)
    together = head(x, Chance([5, 6, 7]))
    alone = torch.cat([head(row[None], Chance([seed])) for row, seed in zip(x, (5, 6, 7), strict=True)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(together, head.eval()(x), atol=1e-6) == (rate == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(activation="sigmoid"), "activation is 'sigmoid'; it should be one of relu, gelu, tanh, silu"),
        (dict(size=0), "size of the dense layer is 0; it should be at least 1"),
        (dict(dropout=1.0), "dropout is 1.0; it should be a share from 0 to less than 1"),
        (dict(dropout=-0.1), "dropout is -0.1"),
        (dict(width=3, units=4), "the head has no option width, units; its options are size, activation"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_heads(16, [3], options)


def test_every_classifier_has_its_own_head_or_all_share_one():
    own, shared = make_heads(16, [2, 3]), make_heads(16, [2, 3], {"shared": True})
    assert [head.output.out_features for head in own] == [2, 3]
    assert [head.output.out_features for head in shared] == [5]
    assert [*make_heads(16, [2], HEAD).state_dict()] == [*make_heads(16, [2]).state_dict()]
