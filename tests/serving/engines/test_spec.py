"""The table of engines agrees with itself and with the command line."""

import pytest

from serving.benchmark.metrics import METRICS
from serving.engines.spec import ENGINES, engine_spec
from toolchain.cli.commands.benchmark import BenchmarkEngine
from toolchain.errors import SenteiError


def test_the_command_line_offers_every_engine():
    assert {each.value for each in BenchmarkEngine} == set(ENGINES)
    assert all(engine_spec(name).name == name for name in ENGINES)


def test_an_unknown_engine_is_refused():
    with pytest.raises(SenteiError, match="Engine 'llama' is not known"):
        engine_spec("llama")


def test_each_engine_runs_in_one_way():
    for engine in ENGINES.values():
        assert not (engine.in_worker and (engine.is_server or engine.is_vllm))
        assert not (engine.reads_onnx and engine.is_vllm)
        assert engine.undefined <= {metric.name for metric in METRICS}
