"Names, sizes and defaults are those of the transformers library, which defines the published checkpoints."

import pytest
import torch
from conftest import SMALL, VARIANTS, make_model

from w2v2nb.architecture import FAMILIES, build, complete
from w2v2nb.reference import CLASSES


def library_config(family, **settings):
    import transformers

    return getattr(transformers, CLASSES[family]).config_class(**settings)


@pytest.mark.parametrize("family, settings", VARIANTS.values())
def test_weights_have_the_names_and_sizes_of_the_library(family, settings):
    import transformers

    config = library_config(family, **{**SMALL, **settings})
    with torch.device("meta"):
        expected = getattr(transformers, CLASSES[family])(config).state_dict()
        ours = build(complete(config.to_dict())).state_dict()
    expected.pop("masked_spec_embed", None)
    assert {name: weight.shape for name, weight in ours.items()} == {name: weight.shape for name, weight in expected.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_library(family):
    theirs = library_config(family).to_dict()
    ours = complete({"model_type": family})
    for name in set(ours) & set(theirs) - {"feat_extract_norm"}:
        assert (list(ours[name]) if isinstance(ours[name], list) else ours[name]) == (
            list(theirs[name]) if isinstance(theirs[name], (list, tuple)) else theirs[name]
        ), name
    assert ours["feat_extract_norm"] == theirs.get("feat_extract_norm", "layer")


def test_conftest_and_the_package_know_the_same_families():
    assert set(CLASSES) == set(FAMILIES) == {make_model(variant).config.model_type for variant in VARIANTS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act is 'mish' and not gelu"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm is 'batch' and not group or layer"),
        ({"hidden_size": 770}, "hidden_size 770 is no multiple"),
        ({"conv_dim": [512] * 6}, r"have \[6, 7\] entries and not the same number"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        complete({"model_type": "wav2vec2", **change})
