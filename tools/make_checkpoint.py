"""Make the tiny wav2vec 2.0 checkpoint that ships with w2v2nb: python tools/make_checkpoint.py [folder].

Random weights, never trained, for trying things and for tests: the same seed and torch give the same bytes.
"""

import math
import sys
from pathlib import Path

import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

SEED = 2
FOLDER = Path(__file__).resolve().parents[1] / "w2v2nb" / "assets" / "checkpoint"
CONFIG = {  # the base architecture's front end, narrower, and few small layers; kernels and strides are the standard ones
    "conv_dim": [64] * 7,
    "feat_extract_norm": "group",
    "conv_bias": False,
    "hidden_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}


def draw(model: Wav2Vec2Model, seed: int) -> None:
    """Random weights that keep differences between recordings alive through the layers, as the usual tiny ones do not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith("weight.original0"):  # the positional convolution's norms: as they were
                continue
            if weight.dim() > 1:
                gain = 1.6 if "conv_layers" in name else 0.5  # large in the front end, small in the residual branches
                weight.normal_(0, gain / math.sqrt(weight[0].numel()), generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1, generator=generator)
        # pooled vectors differ by about a fifth of their length: a wider scale lets a head see it at its usual rate
        model.encoder.layers[-1].final_layer_norm.weight.fill_(3.0)


def main(folder: Path = FOLDER) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json."""
    torch.manual_seed(SEED)
    model = Wav2Vec2Model(Wav2Vec2Config(**CONFIG))
    draw(model, SEED)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)


if __name__ == "__main__":
    main(*[Path(folder) for folder in sys.argv[1:2]])
