"""A benchmark asked for in one call, and the models of one without opening them."""

from types import SimpleNamespace

from serving.benchmark.run import benchmark
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.side import Side
from serving.benchmark.workload import make_workloads

_LOAD = ("input_len", "output_len", "concurrency", "request_rate", "num_prompts", "range_ratio", "prompts")
_RUN = ("out", "force", "resume", "on_progress")


def ask_benchmark(original, pruned, *, engine, **asked):
    """Takes the arguments of ``make_workloads``, of ``BenchmarkSettings`` and of ``benchmark`` alike."""
    load, run = ({name: asked.pop(name) for name in names if name in asked} for names in (_LOAD, _RUN))
    workloads = make_workloads(engine=engine, **load)
    return benchmark(original, pruned, BenchmarkSettings(engine=engine, workloads=workloads, **asked), **run)


def sides_of(directory, *, vocab_size=100, max_len=256, served_len=None, **known):
    """Both models in one directory."""
    facts = SimpleNamespace(vocab_size=vocab_size, max_len=max_len, served_len=served_len or max_len)
    return {name: Side(name=name, directory=directory, facts=facts, **known) for name in ("original", "pruned")}
