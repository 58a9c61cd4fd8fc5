"""``sentei heal`` in several processes: what they write, and how they end when one of them does."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import sentei
from tests.toolchain.ranks.processes import end_after_a_kill, start_ranks
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.heal import distillation, heal  # loaded before the ranks are forked
from toolchain.model.loading import load_model
from toolchain.plan.plan import load_plan
from toolchain.ranks import joining
from toolchain.ranks.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of os.fork

_ASKED = ("--steps", 6, "--batch-size", 4, "--seq-len", 16, "--dtype", "float32", "--lora-rank", 4,
          "--learning-rate", 0.003)  # fmt: skip


@pytest.fixture
def command(pico_model: Path, pruned_pico: Path, text: Path, tmp_path: Path) -> list[object]:
    return ["heal", pruned_pico, "--against", pico_model, "--data", text, "-o", tmp_path / "out", *_ASKED]


@pytest.fixture(scope="module")
def alone(pico_model: Path, pruned_pico: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = sentei("heal", pruned_pico, "--against", pico_model, "--data", text, "-o", out, *_ASKED)
    finally:
        torch.set_num_threads(before)
    assert done.returncode == 0, done.stderr
    return out


def check_same(out: Path, alone: Path) -> None:
    """The same model but for the order in which gradients are added up."""
    here, there = (load_plan(each).document.healing[-1] for each in (out, alone))
    assert here.divergence_after == pytest.approx(there.divergence_after, rel=1e-3)
    assert here.divergence_after < 0.97 * here.divergence_before
    assert here.model_dump(exclude={"divergence_after", "perplexity_after"}) == there.model_dump(
        exclude={"divergence_after", "perplexity_after"}
    )
    weights, wanted = (load_file(each / "model.safetensors") for each in (out, alone))
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.allclose(weights[name], weight, atol=1e-3), name
    load_model(open_checkpoint(out))


def gets_after_four_steps(number: signal.Signals) -> Callable[[int], None]:
    """Has the second rank send itself a signal."""

    def prepare(rank: int) -> None:
        def end_step(self: object, args: object, state: object, control: object, **_: object) -> None:
            if rank == 1 and state.global_step == 4:
                os.kill(os.getpid(), number)

        distillation._OnStep.on_step_end = end_step

    return prepare


def test_two_ranks_learn_what_one_process_does(command: list[object], alone: Path, tmp_path: Path):
    ranks = start_ranks(tmp_path, [[*command, "--json"]] * 2)
    assert [each.end() for each in ranks] == [0, 0], [each.said for each in ranks]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "rank-0.log", "rank-1.log"]
    result = next(line for line in ranks[0].said.splitlines() if line.startswith("{"))
    assert json.loads(result)["directory"] == str(tmp_path / "out")
    assert "perplexity" not in ranks[1].said
    check_same(tmp_path / "out", alone)


@pytest.mark.acceptance
def test_a_killed_rank_is_named_and_one_process_goes_on(command: list[object], alone: Path, tmp_path: Path):
    ranks = start_ranks(tmp_path, [[*command, "-q"]] * 2, first=gets_after_four_steps(signal.SIGKILL))
    end_after_a_kill(ranks)
    # What is kept does not depend on how many there were.
    done = sentei(*command, "--resume")
    assert done.returncode == 0, done.stderr
    check_same(tmp_path / "out", alone)
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.acceptance
def test_a_stopped_rank_ends_the_job(command: list[object], alone: Path, tmp_path: Path):
    def stops(rank: int) -> None:
        gets_after_four_steps(signal.SIGSTOP)(rank)
        joining._LIBRARY_S = 0.5

    ranks = start_ranks(tmp_path, [[*command, "-q"]] * 2, first=stops, timeout_s=3)
    assert ranks[0].end() == 2
    ranks[1].kill()
    [sentence] = [line for line in ranks[0].said.splitlines() if line.startswith("Error")]
    assert "Rank 1 of 2" in sentence and "3 seconds" in sentence
    done = sentei(*command, "--resume")
    assert done.returncode == 0, done.stderr
    check_same(tmp_path / "out", alone)
    assert not list(tmp_path.glob("out.*"))


def test_what_does_not_help_ends_all_on_the_way(command: list[object], tmp_path: Path):
    def hope_for_nothing(rank: int) -> None:
        heal._HOPELESS = -1.0

    ranks = start_ranks(tmp_path, [[*command, "-q"]] * 2, first=hope_for_nothing)
    assert [each.end() for each in ranks] == [1, 1], [each.said for each in ranks]
    assert "".join(each.said for each in ranks).count("did not help: after 2 of 6 steps") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rank-0.log", "rank-1.log"]


def test_what_cannot_be_divided_is_refused_once(command: list[object], tmp_path: Path):
    ranks = start_ranks(tmp_path, [[*command, "-q", "--batch-size", "3"]] * 2)
    assert [each.end() for each in ranks] == [2, 2]
    assert "".join(each.said for each in ranks).count("--batch-size 3 cannot be divided equally among 2") == 1
    assert not list(tmp_path.glob("out*"))


def test_a_machine_that_does_not_see_the_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Ranks, "from_first", lambda ranks, document: ("checkpoint-4", {}))
    ranks = Ranks(rank=1, size=2, hosts=("first", "second"))
    with pytest.raises(SenteiError, match="checkpoint-4 is not on second"):
        distillation._where_to_go_on(tmp_path, ranks)
