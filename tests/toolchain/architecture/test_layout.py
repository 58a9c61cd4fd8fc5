import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from toolchain.architecture.layout import LayerLayout, read_layout, write_per_layer_config
from toolchain.errors import SenteiError

WIDTH = 48
CONFIG = {"num_hidden_layers": 12, "intermediate_size": WIDTH, "attention_dropout": 0.0}

layers = st.builds(LayerLayout, attention=st.booleans(), intermediate_size=st.integers(0, WIDTH))


@given(st.lists(layers, min_size=12, max_size=12))
def test_layout_survives_config_json_and_transformers(layout: list[LayerLayout]):
    config = {**CONFIG, "per_layer_config": write_per_layer_config(layout, CONFIG)}
    assert read_layout(json.loads(json.dumps(config))) == tuple(layout)
    assert read_layout(LlamaConfig(hidden_size=32, num_attention_heads=4, **config).to_dict()) == tuple(layout)


@given(st.lists(layers, min_size=12, max_size=12))
def test_whatever_is_removed_stock_transformers_sees_a_layer_that_differs(layout: list[LayerLayout]):
    overrides = write_per_layer_config(layout, CONFIG)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, **CONFIG, per_layer_config=overrides)
    pruned = any(not layer.attention or layer.intermediate_size < WIDTH for layer in layout)
    # These are the attributes that Transformers' layers read from the global config; a differing one raises.
    assert bool({"intermediate_size", "attention_dropout"} & (config.per_layer_attributes or set())) == pruned


def test_keys_are_zero_padded_as_transformers_writes_them():
    layout = [LayerLayout(attention=i != 3, intermediate_size=WIDTH - i) for i in range(12)]
    assert list(write_per_layer_config(layout, CONFIG))[:3] == ["01", "02", "03"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ({"12": {"intermediate_size": 8}}, "names layer '12', but num_hidden_layers is 12"),
        ({"-1": {}}, "names layer '-1'"),
        ({"1": {}, "01": {}}, "names layer 1 twice"),
        ({"1": {"skip": ["norm"]}}, "layer 1 skips"),
        ({"1": {"skip": "attention"}}, "layer 1 skips"),
        ({"1": {"hidden_size": 8}}, "layer 1 has ['hidden_size']"),
        ({"1": {"intermediate_size": 49}}, "intermediate_size 49 is not a whole number from 1 to 48"),
        ({"1": {"intermediate_size": 0}}, 'Write "skip": ["mlp"]'),
        ({"1": {"intermediate_size": True}}, "intermediate_size True"),
        ({"1": []}, "must be an object"),
        ([], ""),
    ],
)
def test_bad_overrides_are_one_sentence(override: object, sentence: str):
    config = {**CONFIG, "per_layer_config": override}
    if not override:
        assert len(read_layout(config)) == 12
        return
    with pytest.raises(SenteiError) as caught:
        read_layout(config)
    assert sentence in str(caught.value)
