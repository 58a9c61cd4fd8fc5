"""``sentei prune`` in several processes: what they write, and how they end when one of them does."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import PROGRAM, sentei
from tests.toolchain.ranks.processes import end_after_a_kill, free_port, start_ranks
from toolchain.errors import INTERRUPTED, SenteiError
from toolchain.prune.search import attention, two_stage
from toolchain.prune.search.divided_candidates import even_ranges
from toolchain.ranks import heartbeat, joining
from toolchain.ranks.heartbeat import Heartbeats
from toolchain.ranks.launch import launch
from toolchain.ranks.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of os.fork

_ASKED = ("--sparsity", "0.3", "--align", "8", "--samples", "9", "--seq-len", "64", "--attention-removals", "2")


def command(model: Path, out: Path, *more: object) -> list[object]:
    return ["prune", model, "-o", out, *_ASKED, *more]


@pytest.fixture(scope="module")
def alone(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = sentei(*command(pico_model, out))
    finally:
        torch.set_num_threads(before)
    assert done.returncode == 0, done.stderr
    return out


def check_same(out: Path, alone: Path) -> None:
    for name in ("plan.json", "plan.safetensors"):
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
    here, there = (load_file(each / "model.safetensors") for each in (out, alone))
    assert here.keys() == there.keys()
    for name, weight in there.items():
        assert float((here[name] - weight).abs().max()) <= 1e-6 * float(weight.abs().max()), name


def test_two_ranks_that_torchrun_started_write_what_one_process_does(pico_model: Path, alone: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
         "--master-port", str(free_port()), "--no-python", PROGRAM,
         *map(str, command(pico_model, tmp_path / "out", "--json"))],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_same(tmp_path / "out", alone)
    # One of them tells, and nothing is left beside the output.
    assert json.loads(done.stdout)["directory"] == str(tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_limit_stops_several_ranks_where_it_stops_one(pico_model: Path, tmp_path: Path):
    """What lies beyond it is not measured: there a metric may be NaN."""

    def measures_one_at_a_time(rank: int) -> None:
        real = two_stage.Search._try_each

        def tried(search, plan, several):
            assert len(several) == 1
            return real(search, plan, several)

        two_stage.Search._try_each = tried

    more = ("-q", "--no-compensate", "--metric", "kl", "--max-metric", "0.01")
    one = sentei(*command(pico_model, tmp_path / "one", *more))
    asked = [command(pico_model, tmp_path / "two", *more)] * 2
    ranks = start_ranks(tmp_path, asked, first=measures_one_at_a_time)
    assert {each.end() for each in ranks} == {one.returncode}, ranks[0].said
    assert (tmp_path / "two/plan.json").read_bytes() == (tmp_path / "one/plan.json").read_bytes()
    assert json.loads((tmp_path / "one/plan.json").read_text())["stopped_because"]


def test_a_killed_rank_is_named_and_one_process_goes_on(pico_model: Path, alone: Path, tmp_path: Path):
    def dies_after_a_step(rank: int) -> None:
        if rank == 1:
            real = attention._best
            calls: list[int] = []

            def best(metric, scores):
                calls.append(1)
                if len(calls) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(metric, scores)

            attention._best = best

    ranks = start_ranks(tmp_path, [command(pico_model, tmp_path / "out", "-q")] * 2, first=dies_after_a_step)
    end_after_a_kill(ranks)
    trace = json.loads((tmp_path / "out.search/plan.json").read_text())["trace"]
    assert trace, "The first removal was found before."
    assert sentei(*command(pico_model, tmp_path / "out", "--resume")).returncode == 0
    assert (tmp_path / "out/plan.json").read_bytes() == (alone / "plan.json").read_bytes()


def test_a_stopped_rank_is_named_after_a_while(pico_model: Path, tmp_path: Path):
    def stops(rank: int) -> None:
        if rank == 1:
            two_stage.neuron_sensitivity = lambda *args, **kw: os.kill(os.getpid(), signal.SIGSTOP)

    ranks = start_ranks(tmp_path, [command(pico_model, tmp_path / "out")] * 2, first=stops, timeout_s=4)
    assert ranks[0].end() == 2
    ranks[1].kill()
    [sentence] = [line for line in ranks[0].said.splitlines() if line.startswith("Error")]
    assert "Rank 1 of 2" in sentence and "4 seconds" in sentence
    assert "Traceback" not in ranks[0].said


def test_a_rank_that_fails_is_quoted_once(pico_model: Path, tmp_path: Path):
    def fails(rank: int) -> None:
        if rank == 1:

            def refuse(*args, **kw):
                raise SenteiError("This machine is full.", "Make room.")

            two_stage.neuron_sensitivity = refuse

    ranks = start_ranks(tmp_path, [command(pico_model, tmp_path / "out", "-q")] * 2, first=fails)
    assert [each.end() for each in ranks] == [2, 2]
    said = "".join(each.said for each in ranks)
    assert said.count("Error") == said.count("This machine is full. Make room.") == 1
    assert "Rank 1 of 2" in ranks[0].said


def test_rank_0_keeps_the_store_until_the_others_have_looked(pico_model: Path, tmp_path: Path):
    """Else a rank that is slow to look takes an interrupt for the death of rank 0."""

    def is_interrupted(rank: int) -> None:
        def interrupted(*args, **kw):
            raise KeyboardInterrupt

        two_stage.neuron_sensitivity = interrupted
        if rank == 1:
            real = Heartbeats._look

            def look(beats):
                time.sleep(0.5 if beats._last_word else 0)
                real(beats)

            Heartbeats._look = look

    ranks = start_ranks(tmp_path, [command(pico_model, tmp_path / "out", "-q")] * 2, first=is_interrupted)
    assert [each.end() for each in ranks] == [INTERRUPTED, INTERRUPTED], [each.said for each in ranks]
    assert "Interrupted" in ranks[0].said and "Interrupted" not in ranks[1].said
    assert "Error" not in ranks[0].said + ranks[1].said


@pytest.mark.parametrize("exit_code", [2, INTERRUPTED])
def test_a_store_that_does_not_answer_holds_up_no_rank_that_ends(exit_code: int, monkeypatch: pytest.MonkeyPatch):
    """Where rank 0 was stopped, a rank that runs out of disk is to end: signals are ignored by then."""
    busy, never = threading.Lock(), threading.Event()

    class Stopped:
        def set(self, key: str, value: str) -> None:
            with busy:
                pass

        def multi_get(self, keys: list[str]) -> list[bytes]:
            with busy:
                never.wait()
            return [b"{}"]

    monkeypatch.setattr(heartbeat, "_DEAD_S", 0.5)
    hosts = ("here", "here")
    beats = Heartbeats(Stopped(), rank=1, hosts=hosts, silence_s=60, first_holds_store=True)
    beats.start()
    monkeypatch.setattr(joining, "_joined", Ranks(rank=1, size=2, hosts=hosts, heartbeats=beats))
    said: list[tuple[str, int]] = []
    ending = threading.Thread(target=lambda: said.append(joining.last_word("Why.", exit_code)), daemon=True)
    ending.start()
    ending.join(timeout=10)
    assert said == [("Why.", exit_code)]
    never.set()


def test_ranks_with_different_models_are_refused(pico_model: Path, demo_model: Path, tmp_path: Path):
    other = tmp_path / "other" / pico_model.name
    other.mkdir(parents=True)
    for file in pico_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    [weights] = other.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    ranks = start_ranks(tmp_path, [command(each, tmp_path / "out", "-q") for each in (pico_model, other)])
    assert [each.end() for each in ranks] == [2, 2]
    said = "".join(each.said for each in ranks)
    assert said.count("Error") == 1
    assert "Rank 1 of 2" in ranks[0].said and "base_model.weights_sha256" in ranks[0].said
    assert not (tmp_path / "out.search").exists()


def test_more_ranks_than_windows_or_candidates_go_on_with_what_one_process_began(
    pico_model: Path, alone: Path, tmp_path: Path
):
    def dies(rank: int) -> None:
        real = attention._best

        def best(metric, scores):
            if len(scores) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(metric, scores)

        attention._best = best

    [one] = start_ranks(tmp_path, [command(pico_model, tmp_path / "out", "-q")], first=dies)
    assert one.end() == -signal.SIGKILL
    ranks = start_ranks(tmp_path, [command(pico_model, tmp_path / "out", "-q", "--resume")] * 5)
    assert [each.end() for each in ranks] == [0] * 5, [each.said for each in ranks]
    check_same(tmp_path / "out", alone)


def test_nobody_at_the_launchers_address(pico_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joining, "_is_joining", False)  # put back afterwards: other tests share this process
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**variables, "SENTEI_RANK_TIMEOUT_S": "2"}.items():
        monkeypatch.setenv(name, value)
    done = sentei(*command(pico_model, tmp_path / "out"))
    assert done.returncode == 2
    assert f"nobody answers at MASTER_ADDR 127.0.0.1, port {variables['MASTER_PORT']}" in done.stderr


def test_a_command_of_one_process_says_so_once(pico_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        done = sentei("doctor")
        assert (done.returncode, done.stderr.count("one process")) == (2, times)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is 2, and WORLD_SIZE is 2"),
        (
            {
                "WORLD_SIZE": "4",
                "RANK": "2",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "1",
                "LOCAL_RANK": "2",
                "LOCAL_WORLD_SIZE": "2",
            },
            "LOCAL_RANK is 2, and LOCAL_WORLD_SIZE is 2",
        ),
        ({"WORLD_SIZE": "x", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE is 'x'"),
    ],
)
def test_variables_that_make_no_sense(variables: dict[str, str], said: str):
    with pytest.raises(SenteiError, match=said):
        launch(variables)


def test_ranges_of_candidates_cost_the_same():
    # The first step: every candidate branches off, and goes through what is above it and the head.
    num_layers, head = 30, 8
    costs = [num_layers - layer + head for layer in range(num_layers)]
    [end, last] = even_ranges(costs, list(range(num_layers)), 2)
    loads = [sum(costs[:end]) + end - 1, sum(costs[end:]) + num_layers - 1]
    assert last == num_layers
    assert max(loads) < 1.05 * sum(loads) / 2
    assert even_ranges([1.0, 1.0], [None, None], 5) == [1, 2, 2, 2, 2]
