"""The traffic lights: does a candidate hold each guard rail, break it, or can that not be told?

Green and red need the whole interval on one side of the limit: who deploys on a green light relies on it. Where the
interval crosses the limit, or nothing was measured, it cannot be told. Nor can perplexity be told to be good enough on
a text that the candidate was made with.
"""

from serving.decision.document import CandidateRecord, GuardRails, Interval, LightRecord, Rail, Status
from toolchain.metrics.question_metrics import parse_question_metric

# What pruning further makes worse, and never better.
DAMAGE: tuple[Rail, ...] = ("perplexity", "accuracy", "group", "least_metric", "most_metric")
GB = 10**9
# The share of a text's passages (32 tokens each) that may be known: texts on one subject can have a sentence in common.
MOST_SEEN = 0.01


def lights_of(candidate: CandidateRecord, rails: GuardRails) -> list[LightRecord]:
    """Judges a candidate by every guard rail that is set, and always by its speed and its verification."""
    lights = [_of_text(candidate, text, rails.most_perplexity) for text in candidate.perplexity]
    if not candidate.perplexity:
        lights.append(_light("perplexity", None, rails.most_perplexity))
    if rails.least_accuracy is not None:
        lights.append(_light("accuracy", candidate.accuracy, rails.least_accuracy))
    lights += [_light("group", candidate.groups.get(name), floor, name) for name, floor in rails.groups.items()]
    for asked, limit in rails.metrics.items():
        metric = parse_question_metric(asked)
        assert metric is not None, "guard rails are checked when they are read"
        rail: Rail = "least_metric" if metric.higher_is_better else "most_metric"
        lights.append(_light(rail, candidate.metrics.get(metric.label), limit, metric.label))
    lights.append(_light("gain", candidate.gain, rails.least_gain))
    if rails.most_memory_gb is not None:
        used = candidate.memory_bytes
        exact = None if used is None else Interval(value=used, low=used, high=used)
        lights.append(_light("memory", exact, rails.most_memory_gb * GB))
    verified: dict[bool | None, Status] = {True: "green", False: "red", None: "cannot be told"}
    lights.append(
        LightRecord(rail="verified", subject=None, limit=None, measured=None, status=verified[candidate.verified])
    )
    return lights


def all_green(candidate: CandidateRecord) -> bool:
    """Whether a candidate may be deployed. One that no guard rail judged may not."""
    return bool(candidate.lights) and all(light.status == "green" for light in candidate.lights)


def damage_is_green(lights: list[LightRecord]) -> bool:
    """Whether the quality of a candidate is shown to be within the guard rails."""
    damage = [light for light in lights if light.rail in DAMAGE]
    return bool(damage) and all(light.status == "green" for light in damage)


def was_seen(candidate: CandidateRecord, text: str | None) -> bool:
    """Whether so much of a text was read while the candidate was made that its perplexity there looks too good."""
    return candidate.seen.get(text or "", 0) > MOST_SEEN


def _of_text(candidate: CandidateRecord, text: str, limit: float) -> LightRecord:
    light = _light("perplexity", candidate.perplexity[text], limit, text)
    # What is too bad although it looks too good stays red.
    if light.status == "green" and was_seen(candidate, text):
        return light.model_copy(update={"status": "cannot be told"})
    return light


def _light(rail: Rail, measured: Interval | None, limit: float, subject: str | None = None) -> LightRecord:
    status: Status = "cannot be told"
    if measured is not None and measured.low is not None and measured.high is not None:
        status = _status(rail, measured.low, measured.high, limit)
    return LightRecord(rail=rail, subject=subject, limit=limit, measured=measured, status=status)


def _status(rail: Rail, low: float, high: float, limit: float) -> Status:
    if rail in ("perplexity", "most_metric", "memory"):
        return "green" if high <= limit else "red" if low > limit else "cannot be told"
    # A gain of exactly 1 is none.
    if rail == "gain" and limit == 1:
        return "green" if low > 1 else "red" if high < 1 else "cannot be told"
    return "green" if low >= limit else "red" if high < limit else "cannot be told"
