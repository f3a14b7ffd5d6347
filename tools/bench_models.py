"""Write a wav2vec2 checkpoint of published size with random weights: python tools/bench_models.py base|large|tiny FOLDER"""

import json
import shutil
import sys
from pathlib import Path

LARGE = dict(
    feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
)  # fmt: skip


def make(name: str, folder: Path) -> None:
    "The model with seeded weights, or for `tiny` the package's own, and the files that come with published ones."
    if name == "tiny":
        from w2v2nb import samples

        shutil.copytree(samples.checkpoint(), folder)
    else:
        import torch
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        torch.manual_seed(0)
        Wav2Vec2Model(Wav2Vec2Config(**(LARGE if name == "large" else {}))).eval().save_pretrained(folder)
    preprocessor = {
        "do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "padding_side": "right",
        "padding_value": 0.0, "return_attention_mask": name == "large", "sampling_rate": 16000,
    }  # fmt: skip
    # sentence-transformers loads a checkpoint's tokenizer, needed or not
    tokenizer = {"tokenizer_class": "Wav2Vec2CTCTokenizer"}
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|"])}
    files = {"preprocessor_config": preprocessor, "tokenizer_config": tokenizer, "vocab": vocabulary}
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    make(name, part)
    part.rename(folder)  # whole or not there
