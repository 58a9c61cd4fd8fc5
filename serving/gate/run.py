"""Asks Prometheus about both sides, and decides."""

from serving.gate.counts import BLOCKS, NAMES, STEPS_PER_BLOCK, count
from serving.gate.decide import Decision, decide
from serving.gate.document import GateDocument
from serving.gate.prometheus import Prometheus


def judge(asked: GateDocument, prometheus: Prometheus) -> Decision:
    """Reads both sides over the same window and decides; changes nothing.

    Raises:
        SenteiError: Prometheus cannot be asked, or answers something else.
    """
    window = prometheus.window_ending_now(asked.window_s, steps=BLOCKS * STEPS_PER_BLOCK)
    original, candidate = (
        count(prometheus.samples(NAMES, labels, window), window) for labels in (asked.original, asked.candidate)
    )
    return decide(original, candidate, asked)
