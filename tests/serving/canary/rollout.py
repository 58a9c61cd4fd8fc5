"""A canary from 10 to 100 %, and then faults, each rolled back: what an operator does, and a record of it."""

import json
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.command_line import sentei
from tests.serving.canary.load import Load, Request
from tests.serving.canary.machine import Machine

# The kit's gate.yaml waits for 1000 requests in half an hour, and allows 10 % slower. Here 10 % are 180 in two minutes,
# on a small machine that does other things: its swings are most of what is measured, so only what is far off is worse.
FEWER = {
    "window": "2m", "min_requests": 100, "looks": 12, "errors": {"max_increase": 0.05},
    "ttft": {"max_ratio": 4, "max_slow_increase": 0.9}, "tpot": {"max_ratio": 3, "max_slow_increase": 0.9},
    "queue": {"max_increase": 20},
}  # fmt: skip
WINDOW_S = 120.0
_ASK_AGAIN_S, _LOOK_S, _TIMEOUT_S = 15.0, 2.0, 150.0


Told = Callable[[Mapping[str, Any]], bool]


@dataclass
class Fault:
    """One fault and its end; times are seconds since the load began.

    Attributes:
        name: What was done to the candidate.
        begun_s: When.
        reason: The gate's sentence, which said to roll back.
        told_s: When it said so.
        rolled_back_s: When the weight of the candidate was 0 in the router's file.
        last_sent_s: When the last request was sent that the candidate answered or broke.
        ended_s: When the fault was over.
    """

    name: str
    begun_s: float
    reason: str = ""
    told_s: float = 0.0
    rolled_back_s: float = 0.0
    last_sent_s: float = 0.0
    ended_s: float = 0.0


@dataclass
class Record:
    """What happened.

    Attributes:
        steps: When the candidate was given which share, in %.
        answers: When the gate said what.
        faults: See there.
        requests: Each one; times since the load began.
    """

    steps: list[tuple[float, int]] = field(default_factory=list)
    answers: list[tuple[float, str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def during(self, fault: Fault) -> list[Request]:
        """The requests that were under way while a fault lasted."""
        return [each for each in self.requests if each.ended_s >= fault.begun_s and each.sent_s <= fault.ended_s]


class Rollout:
    """Steps, looks and faults, on a machine under load."""

    def __init__(self, machine: Machine, load: Load) -> None:
        """The load runs; the candidate has no share yet."""
        self._machine, self._load, self._begun_s = machine, load, time.monotonic()
        self.record = Record()
        settings = FEWER | _sides(machine.kit / "gate.yaml")
        self._gate = machine.kit / "gate-of-the-test.yaml"
        self._gate.write_text(json.dumps({"version": 1, **settings}))

    def step(self, share: int) -> None:
        """Gives the candidate a share."""
        self._machine.step(share)
        self.record.steps.append((self._now(), share))

    def promoted(self) -> None:
        """Waits for a window, and then until the gate promotes."""
        time.sleep(WINDOW_S)
        self._until("promote", lambda answer: True, _ASK_AGAIN_S)

    def fault(self, name: str, begin: Callable[[], None], end: Callable[[], None], is_told: Told) -> None:
        """Breaks the candidate, and rolls back when the gate says so.

        Args:
            name: What is done.
            begin: Does it.
            end: Undoes it.
            is_told: Whether the gate's reason is this fault; others may still be in its window.
        """
        begin()
        fault = Fault(name=name, begun_s=self._now())
        self.record.faults.append(fault)
        found = self._until("roll_back", is_told, _LOOK_S)
        fault.reason, fault.told_s = found["sentence"], self._now()
        self.step(0)
        fault.rolled_back_s = self._now()
        time.sleep(10)
        end()
        time.sleep(5)
        fault.ended_s = self._now()

    def finish(self) -> Record:
        """When the load has ended."""
        for each in self._load.requests:
            times = {"sent_s": each.sent_s - self._begun_s, "ended_s": each.ended_s - self._begun_s}
            self.record.requests.append(Request(**(asdict(each) | times)))
        for fault in self.record.faults:
            fault.last_sent_s = max(
                (each.sent_s for each in self.record.during(fault) if each.side == "candidate" or each.problem),
                default=fault.begun_s,
            )
        return self.record

    def _now(self) -> float:
        return time.monotonic() - self._begun_s

    def _until(self, wanted: str, is_it: Told, pause_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            done = sentei("gate", self._gate, "--prometheus", self._machine.prometheus, "--json")
            assert done.returncode in (0, 1, 3), done.stderr
            answer: dict[str, Any] = json.loads(done.stdout)
            self.record.answers.append((self._now(), answer["decision"], answer["sentence"]))
            if answer["decision"] == wanted and is_it(answer):
                return answer
            assert time.monotonic() < deadline, self.record.answers[-3:]
            time.sleep(pause_s)


def roll_out(machine: Machine, load: Load) -> Rollout:
    """All of it, in about 8 minutes; the load must run."""
    rollout = Rollout(machine, load)
    time.sleep(10)
    for share in (10, 50):
        rollout.step(share)
        rollout.promoted()
    rollout.step(100)
    time.sleep(15)

    def is_gone(answer: Mapping[str, Any]) -> bool:
        return "servers are gone" in answer["sentence"]

    for name, begin, end, is_told in (
        ("slow", lambda: machine.break_candidate(delay_s=0.03), machine.break_candidate, _is_worse("tpot")),
        ("errors", lambda: machine.break_candidate(failing=0.5), machine.break_candidate, _is_worse("error_answers")),
        (
            "stuck", lambda: machine.kill_candidate(signal.SIGSTOP), lambda: machine.kill_candidate(signal.SIGCONT),
            is_gone,
        ),
        ("killed", lambda: machine.kill_candidate(signal.SIGKILL), lambda: None, is_gone),
    ):  # fmt: skip
        rollout.step(50)
        time.sleep(8)
        rollout.fault(name, begin, end, is_told)
    return rollout


def _is_worse(check: str) -> Told:
    return lambda answer: any(each["name"] == check and each["state"] == "worse" for each in answer["checks"])


def _sides(gate: Path) -> dict[str, Any]:
    written = yaml.safe_load(gate.read_text())
    return {side: written[side] for side in ("original", "candidate")}
