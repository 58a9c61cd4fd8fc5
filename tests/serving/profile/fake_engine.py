"""An engine whose clock is a formula: what each part of a model costs is known exactly."""

from dataclasses import dataclass, field

from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.workload import make_workloads
from serving.profile.measure import Bench
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.costs.parts import PartCosts

# The engine of a checkpoint, which needs no export; it is never started.
ENGINE = "transformers"


@dataclass
class FakeEngine:
    """Answers with costs in ms, by phase.

    Attributes:
        prefill: Of all prompts of a batch.
        decode: Of a step of a batch.
        drift: What each repeat's times are multiplied by.
        noise: By model and repeat, likewise.
        asked: Names of the models, in the order in which they were measured.
    """

    prefill: PartCosts
    decode: PartCosts
    drift: tuple[float, ...] = (1.0,)
    noise: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    fails_after: int | None = None
    both_up: bool = False

    def __call__(self, settings, sides, out):
        return self

    def measure(self, side, repeat, workload, *, name, slo=None):
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise KeyboardInterrupt
        self.asked.append(side.name)
        factor = self.drift[repeat % len(self.drift)] * self.noise.get((side.name, repeat), 1.0)
        ttft, tpot = (factor * costs.of(side.layout) for costs in (self.prefill, self.decode))
        one = workload.output_len == 1
        e2el = ttft + (workload.output_len - 1) * tpot
        return {
            "mean_ttft_ms": ttft,
            "mean_tpot_ms": None if one else tpot,
            "output_throughput": 1000 * workload.concurrency * workload.output_len / e2el,
            "failed": 0,
        }

    def drop(self, side):
        pass

    def close(self):
        pass


def bench_of(model, engine, *, repeats=3, concurrency=2, output_len=9, **more):
    workloads = make_workloads(engine=ENGINE, input_len=16, output_len=output_len, concurrency=[concurrency])
    settings = BenchmarkSettings(engine=ENGINE, workloads=workloads, repeats=repeats, device="cpu", **more)
    return Bench(checkpoint=open_checkpoint(model), settings=settings, open_session=engine)
