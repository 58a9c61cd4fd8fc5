"""Too few GPUs are bought, or too much is promised to be saved: that is what a wrong sheet costs."""

import csv
import io
import math

from hypothesis import given
from hypothesis import strategies as st

from serving.decision.capacity import as_csv, capacity_rows, gpus_saved
from serving.decision.document import CapacityInputs, Interval, LoadRecord, OriginalRecord
from tests.serving.decision.making import INPUTS, ORIGINAL, WITHOUT_LIMITS, candidate, interval


def test_the_numbers_of_a_sheet_made_by_hand():
    original, pruned = capacity_rows(ORIGINAL, [candidate(gain=interval(1.3))], INPUTS, output_len=100)
    # 10 / 2.1 = 4.8, 10 / 2.73 = 3.7 servers.
    assert original.gpus == Interval(value=5, low=5, high=5)
    assert pruned.gpus.value == 4
    # 5 servers x 2 an hour, for 10 requests/s x 100 tokens x 3600 s = 3.6 million tokens an hour.
    assert math.isclose(original.cost_per_million_tokens.value, 10 / 3.6)
    assert math.isclose(pruned.cost_per_million_tokens.value, 8 / 3.6)


@given(st.floats(0.01, 500), st.floats(0.1, 1000), st.floats(1, 3), st.floats(0.5, 1), st.floats(1, 2))
def test_the_servers_always_carry_the_peak_and_one_less_does_not(rate, peak, gain, low, high):
    original = OriginalRecord(load=LoadRecord(requests_per_s=Interval(value=rate, low=rate, high=rate), goodput=True))
    found = Interval(value=gain, low=gain * low, high=gain * high)
    inputs = CapacityInputs(price_per_hour=1, peak_requests_per_s=peak)
    rows = capacity_rows(original, [candidate(gain=found)], inputs, output_len=10)
    for row in rows:
        servers, per_server = row.gpus.value, row.requests_per_s.value
        assert servers >= 1 and servers == int(servers)
        assert servers * per_server >= peak * (1 - 1e-6)
        assert (servers - 1) * per_server < peak
        assert row.gpus.low <= row.gpus.value <= row.gpus.high
    saved, before = gpus_saved(rows, "25 %")
    assert before == rows[0].gpus.value and saved.low <= saved.value <= saved.high <= before


def test_conversations_that_fit_are_what_the_server_said_or_else_what_memory_leaves():
    inputs = CapacityInputs(conversation_tokens=1000, memory_gb=1.7)
    rows = capacity_rows(
        ORIGINAL.model_copy(update={"kv_bytes_per_token": 1000, "weight_bytes": 700_000_000}),
        [candidate(kv_cache_tokens=5999, kv_bytes_per_token=1000)], inputs, output_len=1,
    )  # fmt: skip
    assert [row.conversations for row in rows] == [1000, 5]
    # What does not fit at all holds none, not less than none.
    small = CapacityInputs(conversation_tokens=1000, memory_gb=0.1)
    [row] = capacity_rows(
        ORIGINAL.model_copy(update={"kv_bytes_per_token": 1000, "weight_bytes": 700_000_000}), [], small, output_len=1
    )  # fmt: skip
    assert row.conversations == 0


def test_what_is_not_known_stays_empty():
    rows = capacity_rows(ORIGINAL, [candidate(gain=None), candidate("x")], CapacityInputs(), output_len=1)
    assert [row.name for row in rows] == ["original", "x"]
    assert all(row.gpus is row.cost_per_million_tokens is row.conversations is None for row in rows)
    assert gpus_saved(rows, "x") is None
    [alone] = capacity_rows(OriginalRecord(), [candidate()], INPUTS, output_len=1)
    assert alone.requests_per_s is alone.gpus is None


def test_a_rate_that_a_server_may_exceed_counts_no_gpus_and_no_cost():
    rows = capacity_rows(WITHOUT_LIMITS, [candidate()], INPUTS, output_len=100)
    assert [row.name for row in rows] == ["original", "25 %"]
    assert all(row.requests_per_s and row.gpus is row.cost_per_million_tokens is None for row in rows)
    assert gpus_saved(rows, "25 %") is None


def test_the_csv_holds_rows_and_inputs_and_no_formula_of_a_stranger():
    named = candidate("=HYPERLINK(1)")
    inputs = CapacityInputs(price_per_hour=2.5, currency="+EUR", peak_requests_per_s=10)
    text = as_csv(capacity_rows(ORIGINAL, [named], inputs, output_len=100), inputs, "goodput")
    read = list(csv.reader(io.StringIO(text)))
    assert read[1][:2] == ["original", "2.1"] and read[2][0] == "'=HYPERLINK(1)"
    assert ["price_per_hour", "2.5"] in read and ["currency", "'+EUR"] in read
    assert not any(cell[:1] in ("=", "+", "@") for row in read for cell in row)
