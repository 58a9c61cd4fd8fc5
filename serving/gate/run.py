"""Asks Prometheus about both sides, and both sides where that is wanted, and decides."""

from pathlib import Path

from serving.gate.counts import BLOCKS, NAMES, STEPS_PER_BLOCK, count
from serving.gate.decide import Decision, decide
from serving.gate.document import GateDocument
from serving.gate.prometheus import Prometheus
from serving.gate.shadow import compare, read_prompts


def judge(asked: GateDocument, prometheus: Prometheus, place: Path) -> Decision:
    """Reads both sides over the same window and decides; changes nothing.

    Args:
        asked: What to compare.
        prometheus: What has watched both sides.
        place: The directory from which a file of prompts is named.

    Raises:
        SenteiError: Prometheus or a side cannot be asked, or answers something else, or there are no such prompts.
    """
    prompts = read_prompts(place / asked.shadow.prompts) if asked.shadow else ()
    window = prometheus.window_ending_now(asked.window_s, steps=BLOCKS * STEPS_PER_BLOCK)
    original, candidate = (
        count(prometheus.samples(NAMES, labels, window), window) for labels in (asked.original, asked.candidate)
    )
    # After the metrics were read, in which the prompts would be traffic.
    shadow = compare(asked.shadow, prompts) if asked.shadow and original.servers_now and candidate.servers_now else None
    return decide(original, candidate, asked, shadow)
