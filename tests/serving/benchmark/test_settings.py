from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.workload import make_workloads


def test_the_key_of_a_server_is_neither_shown_nor_written():
    settings = BenchmarkSettings(engine="vllm", workloads=make_workloads(engine="vllm"), api_key="secret")
    assert "secret" not in f"{settings} {settings.options}"
