"""Which layers slide: by hand for each family, and in files of strangers."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.families import VARIANTS
from toolchain.architecture.families import FAMILIES
from toolchain.errors import SenteiError
from toolchain.model.sliding_window import SlidingWindow, sliding_window

ALTERNATING, ALL = (True, False, True, False), (True,) * 4
SLIDING = {
    ("mistral", "sliding-tied"): ALL,
    ("qwen2", "alternating"): ALTERNATING,
    ("qwen3", "alternating"): ALTERNATING,
    ("phi3", "sliding-tied"): ALL,
    ("gemma3_text", "alternating"): ALTERNATING,
    ("gemma3_text", "biased-untied"): ALL,  # by the family's rule, the sixth of its layers would be the first full one
}
VALUES = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["", "x", "6"]) | st.lists(
    st.sampled_from(["sliding_attention", "full_attention", "chunked", 3]), max_size=6
)  # fmt: skip
KEYS = st.sampled_from(
    ["sliding_window", "layer_types", "use_sliding_window", "max_window_layers", "sliding_window_pattern"]
)


def config_of(family: str, **settings: Any) -> dict[str, Any]:
    return {"model_type": family, "num_hidden_layers": 4, **settings}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_slide(family: str):
    for variant, settings in VARIANTS[family].items():
        layers = SLIDING.get((family, variant))
        assert sliding_window(config_of(family, **settings)) == (SlidingWindow(6, layers) if layers else None)


def test_gemma_as_it_is_published():
    """Without a list of layers: each sixth attends to all tokens."""
    published = {"model_type": "gemma3_text", "num_hidden_layers": 26, "sliding_window": 512}
    for pattern in ({}, {"sliding_window_pattern": 6}):
        found = sliding_window(published | pattern)
        assert found is not None
        assert found.tokens == 512
        assert [index for index, slides in enumerate(found.layers) if not slides] == [5, 11, 17, 23]


def test_a_llama_does_not_slide_whatever_its_file_says():
    assert sliding_window(config_of("llama", sliding_window=6, layer_types=["sliding_attention"] * 4)) is None


@given(st.sampled_from(list(FAMILIES)), st.dictionaries(KEYS, VALUES))
@example("mistral", {"sliding_window": -1})
def test_files_of_strangers_are_read_or_refused(family: str, settings: dict[str, Any]):
    try:
        found = sliding_window(config_of(family, **settings))
    except SenteiError as error:
        assert "sliding window" in str(error)
    else:
        assert found is None or (found.tokens > 0 and len(found.layers) == 4)
