"""A model whose layers are on two GPUs is pruned as on one. The GPUs are those of ``tests.several_devices``."""

import gc
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.command_line import refused, sentei
from tests.counting import calls_of
from tests.several_devices import OnGpu, gpus
from tests.toolchain.costs.made import make_costs
from toolchain.architecture.parts import SubBlock
from toolchain.checkpoint.directory import Checkpoint, open_checkpoint
from toolchain.errors import SenteiError
from toolchain.metrics.accuracy import ChoicesMetric
from toolchain.metrics.function import FunctionMetric
from toolchain.metrics.question_metrics import QuestionMetric
from toolchain.metrics.questions import load_questions
from toolchain.metrics.token_metrics import PerplexityMetric, measure
from toolchain.model import disk_layers
from toolchain.model.disk_layers import open_walk
from toolchain.model.loading import load_tokenizer
from toolchain.model.several_gpus import device_map_for
from toolchain.prune import pipeline
from toolchain.prune.block_methods import blockpruner, evopress, shortgpt, sliding_window
from toolchain.prune.budget.target import Measured, parse_targets
from toolchain.prune.memory_needed import device_map_within, memory_needed
from toolchain.prune.methods import DEFAULT, METHODS
from toolchain.prune.pipeline import prepare, prune
from toolchain.prune.settings import Aim, PruneSettings
from toolchain.ranks.ranks import ALONE, Ranks
from toolchain.text.sources import parse_sources

_PLENTY = 10**10


@pytest.fixture(scope="module")
def settings(text: Path) -> PruneSettings:
    """The default method, with something for every stage to do."""
    return PruneSettings(
        sparsity=0.4, calibration=parse_sources([str(text)]), num_samples=9, seq_len=24, align=4, attention_removals=2,
        device="cuda", dtype=torch.float32, seed=0, spread=True, **DEFAULT.settings,
    )  # fmt: skip


def half(checkpoint: Checkpoint) -> tuple[int, int]:
    """What two GPUs have free where the first takes the embeddings and two of four layers, and accelerate its reserve.

    Its reserve is the largest part of the model, as if something were to be fetched from a disk.
    """
    embeddings = checkpoint.read("model.embed_tokens.weight").numel()
    layer = checkpoint.num_block_parameters // 4
    return int((2 * embeddings + 2.5 * layer) * 4 / 0.8), int((embeddings + 3 * layer) * 4 / 0.8)


def files(directory: Path) -> dict[str, bytes]:
    """All that is the same when the same is pruned again: not how long it took."""
    names = ("pruning_summary.json", "README.md")
    return {each.name: each.read_bytes() for each in directory.iterdir() if each.name not in names}


class Interrupted(Exception):
    """Somebody pressed Ctrl-C."""


@contextmanager
def until_three_layers_are_fitted(title: str, total: int) -> Iterator[object]:
    """Progress that ends the run there."""
    left = 3

    def advance() -> None:
        nonlocal left
        left -= title == "Compensation"
        if not left:
            raise Interrupted

    yield advance


def test_default_prune_finds_the_plan_and_weights_of_one_gpu(
    pico_model: Path, settings: PruneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with gpus(_PLENTY, _PLENTY) as used:
        prune(pico_model, tmp_path / "one", settings, model_name="pico")
    assert set(used) == {0}
    opened = calls_of(disk_layers.load_model, monkeypatch)
    with gpus(*half(open_checkpoint(pico_model))) as used:
        with pytest.raises(Interrupted):
            prune(pico_model, tmp_path / "two", settings, model_name="pico", progress=until_three_layers_are_fitted)
        prune(pico_model, tmp_path / "two", settings, model_name="pico", resume=True)
    assert min(used[0], used[1]) > 500
    assert len(opened) == 3
    one, two = (files(tmp_path / name) for name in ("one", "two"))
    assert one == two


def test_published_method_with_another_metric_and_race_and_one_model_at_a_time(
    pico_model: Path, settings: PruneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    published = replace(
        settings, **METHODS["2ssp"].settings, compensate=False, widths="uniform", metric="kl", search="racing"
    )
    with gpus(_PLENTY):
        prune(pico_model, tmp_path / "one", published, model_name="pico")
    models: list[weakref.ref[torch.nn.Module]] = []
    load = disk_layers.load_model

    def watched(*arguments: object, **options: object) -> torch.nn.Module:
        assert not any(each() for each in models), "the model before is still in memory"
        models.append(weakref.ref(model := load(*arguments, **options)))
        return model

    monkeypatch.setattr(disk_layers, "load_model", watched)
    with gpus(*half(open_checkpoint(pico_model))) as used:
        prune(pico_model, tmp_path / "two", published, model_name="pico")
    assert len(models) == 2 and min(used[0], used[1]) > 100
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_engine_of_a_target_finds_the_gpus_empty(
    pico_model: Path, settings: PruneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What hooks hold in circles goes when Python next looks for circles, which may be after the engine has failed."""
    models: list[weakref.ref[torch.nn.Module]] = []
    load = disk_layers.load_model

    def watched(*arguments: object, **options: object) -> torch.nn.Module:
        models.append(weakref.ref(model := load(*arguments, **options)))
        return model

    def measure_nothing(*_: object) -> dict[str, Measured]:
        assert models and not any(each() for each in models), "a model is still in memory"
        raise Interrupted

    monkeypatch.setattr(disk_layers, "load_model", watched)
    costs = make_costs(open_checkpoint(pico_model).config)
    aim = Aim(targets=parse_targets(["speedup=1.25"]), costs=costs, measure=measure_nothing)
    to_a_target = replace(settings, sparsity=0.0, attention_removals=None, aim=aim)
    gc.collect()
    gc.disable()
    try:
        with gpus(*half(open_checkpoint(pico_model))) as used, pytest.raises(Interrupted):
            prune(pico_model, tmp_path / "out", to_a_target, model_name="pico")
    finally:
        gc.enable()
    assert min(used[0], used[1]) > 100


def test_block_methods_and_other_metrics_say_the_same(pico_model: Path, tmp_path: Path):
    checkpoint, ids = open_checkpoint(pico_model), torch.arange(3 * 16).view(3, 16) * 7
    (questions := tmp_path / "questions.jsonl").write_text(
        '{"prompt": "Trees are pruned in", "choices": [" winter", " summer"], "answer": 0}\n'
    )
    accuracy = ChoicesMetric(
        load_questions(questions),
        load_tokenizer(pico_model),
        asked=QuestionMetric(kind="accuracy", file=Path("questions")),
        seq_len=16,
    )

    def whole(model: torch.nn.Module, _tokenizer: object) -> float:
        return float(model(ids.to(model.device)).logits.logsumexp(-1).mean())

    def everything(device_map: dict[str, str] | None) -> list[object]:
        walk = open_walk(checkpoint, dtype=torch.float32, device="cuda", offload=False, device_map=device_map)
        metric = PerplexityMetric(ids)
        removed = blockpruner.removals(walk, metric)
        found: list[object] = [
            shortgpt.block_influence(walk, ids),
            sliding_window.last_token_states(walk, ids).tolist(),
            evopress.KLFitness(walk, ids)([frozenset([SubBlock(1, "ffn"), SubBlock(2, "attention")])], [0, 2]),
            measure(walk, accuracy, without_attention=[2]),
            measure(walk, FunctionMetric("tests:whole", whole, load_tokenizer(pico_model)), without_attention=[1]),
            # Both parts of layers on either GPU go.
            [next(removed) for _ in range(6)],
        ]
        walk.layers.restore()
        return [*found, measure(walk, metric)]

    with gpus(_PLENTY):
        one = everything(None)
    with gpus(*half(checkpoint)) as used:
        two = everything(device_map_for(checkpoint, torch.float32))
    assert min(used[0], used[1]) > 100
    assert one == two


def test_gpus_too_small_together(pico_model: Path, settings: PruneSettings):
    checkpoint = open_checkpoint(pico_model)
    needed = memory_needed(checkpoint, settings, offload=False)
    with gpus(needed.weights // 3, needed.weights // 3), pytest.raises(SenteiError) as error:
        prepare(checkpoint, settings, "pico")
    sentence = (
        f"{needed.weights / 1e9:.2g} GB for weights, in whole layers, and .* on each GPU to compute; free on the 2"
    )
    assert re.search(sentence, error.value.message)
    assert "--offload" in error.value.hint and "--samples" in error.value.hint
    # Weights alone would fit, and nothing could be computed beside them.
    first, second = half(checkpoint)
    more = replace(settings, seq_len=256, num_samples=10**5)
    with gpus(first, second), pytest.raises(SenteiError, match="on each GPU to compute"):
        device_map_within(checkpoint, more, ALONE)
    # Where another GPU is busy, the first one may do.
    with gpus(int(needed.peak * 1.01), 0):
        assert device_map_within(checkpoint, settings, ALONE) is None
    with gpus(needed.peak - 1), pytest.raises(SenteiError, match="of memory on cuda, and"):
        device_map_within(checkpoint, settings, ALONE)


def test_ranks_divide_the_gpus_of_their_machine_and_put_the_same_layers_together(
    pico_model: Path, settings: PruneSettings
):
    assert [list(Ranks(rank=rank, size=4, local_rank=rank, local_size=4).gpus(4)) for rank in range(4)] == [
        [0], [1], [2], [3],
    ]  # fmt: skip
    divided = [list(Ranks(rank=rank, size=2, local_rank=rank, local_size=2).gpus(5)) for rank in range(2)]
    assert divided == [[0, 2], [1, 3]]
    assert list(ALONE.gpus(3)) == [0, 1, 2]

    checkpoint = open_checkpoint(pico_model)
    first, second = half(checkpoint)

    class Beside(Ranks):
        """Rank 1, beside a rank whose second GPU has little free."""

        def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
            other = torch.tensor([_PLENTY, second]) if tensor.dim() else tensor
            return [other, tensor]

    rank = Beside(rank=1, size=2, local_rank=1, local_size=2, hosts=("here", "here"))
    with gpus(_PLENTY, first, _PLENTY, _PLENTY):
        found = device_map_within(checkpoint, settings, rank)
        assert found is not None and set(found.values()) == {"cuda:1", "cuda:3"}
        assert found == {
            part: {"cuda:0": "cuda:1", "cuda:1": "cuda:3"}[gpu]
            for part, gpu in (device_map_for(checkpoint, torch.float32, {0: first, 1: second}) or {}).items()
        }


@pytest.mark.parametrize(
    ("options", "spread"),
    [([], True), (["--offload"], False), (["--device", "cuda"], False), (["--device", "cpu"], False)],
)
def test_command_line(
    options: list[str], spread: bool, pico_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def started(_checkpoint: object, _out: object, settings: PruneSettings, **_: object) -> None:
        asked.append(settings.spread)
        raise SenteiError("Far enough.")

    monkeypatch.setattr(pipeline, "prune", started)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(sentei("prune", pico_model, "--sparsity", 0.3, "-o", tmp_path / "out", "--calibration", text, *options))
    assert asked == [spread]


def test_devices_that_are_not_there_refuse_to_meet():
    with gpus(1, 1):
        one, two = (torch.ones(2, device=f"cuda:{index}") for index in range(2))
        for mixed in (lambda: one + two, lambda: torch.cat([one, two.cpu()]), lambda: one * torch.ones(2)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError):
            one.numpy()
        weight = torch.full((2,), 3.0, device="cuda:1", requires_grad=True)
        [gradient] = torch.autograd.grad((weight.to("cuda:0") * one * torch.tensor(2.0)).sum(), weight)
        assert isinstance(gradient, OnGpu) and gradient.index == 1
        assert gradient.cpu().tolist() == [2.0, 2.0]
