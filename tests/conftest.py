"""Tiny random checkpoints of the five families, made once per session, and small helpers; no test needs the hub."""

import atexit
import json
import os
import secrets
import shutil
import tempfile

import cloud
import pytest

from w2v2nb.reference import CLASSES

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="w2v2nb-cache-")  # no test reads or writes the person's own
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 64,  # long enough for the product of transforms
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 6,
}
# what makes the published models of a family differ for an encoder that must be exact
VARIANTS = {
    "wav2vec2": ("wav2vec2", {}),
    "wav2vec2-stable": ("wav2vec2", {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}),
    "wav2vec2-adapter": (
        "wav2vec2",
        {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "adapter_attn_dim": 4},
    ),
    "hubert": ("hubert", {}),
    "hubert-batch-norm": ("hubert", {"conv_pos_batch_norm": True, "feat_proj_layer_norm": False}),
    "hubert-stable": ("hubert", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "wavlm": ("wavlm", {"num_buckets": 32, "max_bucket_distance": 80}),
    "wavlm-stable": ("wavlm", {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_buckets": 32}),
    "data2vec-audio": ("data2vec-audio", {"num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19}),
    "unispeech-sat": ("unispeech-sat", {"num_conv_pos_embeddings": 16}),
    "unispeech-sat-stable": ("unispeech-sat", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
}


def make_model(variant, head=None):
    "The library's own model of a variant, seeded, all weights away from their trivial initial values."
    import torch
    import transformers

    family, settings = VARIANTS[variant]
    model_class = getattr(transformers, head or CLASSES[family])
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SMALL, **settings})).eval()
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            # zero biases and unit scales would hide what padding does
            if weight.is_floating_point():
                weight.add_(torch.rand_like(weight) * 0.2 if "running_var" in name else torch.randn_like(weight) * 0.1)
    return model


def save_checkpoint(folder, model, do_normalize=True):
    model.save_pretrained(folder)
    preprocessor = {"do_normalize": do_normalize, "sampling_rate": 16000}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    "Variant -> folder of a tiny random checkpoint."
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_checkpoint(root / name, make_model(name)) for name in VARIANTS}


@pytest.fixture(scope="session")
def recordings():
    "Seeded noise with a drift, 0.1 to 3 s at 16 kHz, so that no two recordings have the same statistics."
    import torch

    torch.manual_seed(1)
    lengths = [48000, 1600, 16000, 400, 7777, 30000, 719, 720]
    return [torch.randn(n) * (0.02 + 0.05 * i) + 0.02 * i for i, n in enumerate(lengths)]


@pytest.fixture
def write(tmp_path):
    "Write a file of text or bytes into `tmp_path`; its path."

    def write(content, name="table.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def passes(encoder):
    "The sizes of the batches that go through the encoder, a fixture of the test's module."
    sizes = []
    hook = encoder.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(inputs[0])))
    yield sizes
    hook.remove()


def write_split(folder, n_val_people, n_train, n_test):
    "A split of few of the shipped recordings, with a validation table of its own."
    from w2v2nb import samples
    from w2v2nb.data import read_annotations

    train, test = (read_annotations(f"{samples.split_root()}/{part}.csv") for part in ("train", "test"))
    val = train[train.subject.isin(train.subject.unique()[:n_val_people])]
    for name, table in dict(train=train.drop(val.index).head(n_train), val=val, test=test.head(n_test)).items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


@pytest.fixture(scope="session")
def emulator():
    "Cloud Storage on this machine."
    pytest.importorskip("gcp_storage_emulator")
    found = cloud.Emulator()
    yield found
    found.close()


@pytest.fixture
def make_bucket(emulator, monkeypatch, tmp_path):
    "Make a fresh bucket, behind a proxy of its own, that this test reaches as if it were Google's, with an empty cache."
    from w2v2nb import bucket as module

    proxy = cloud.Proxy(emulator)
    environment = {"STORAGE_EMULATOR_HOST": proxy.address, "XDG_CACHE_HOME": str(tmp_path / "machine-cache")}
    environment |= {"W2V2NB_STORAGE_TIMEOUT": "5", "GOOGLE_CLOUD_PROJECT": "test"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    module.forget_client()
    yield lambda: cloud.Bucket(emulator, proxy, f"test-{secrets.token_hex(6)}", {**os.environ})
    module.forget_client()
    proxy.close()


@pytest.fixture
def bucket(make_bucket):
    "An empty bucket."
    return make_bucket()
