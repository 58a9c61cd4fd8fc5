"""The artificial delay of the acceptance test is the factor that it says."""

import asyncio
import time

import pytest

from tests.serving.slow_server import FACTOR, SlowDown


@pytest.mark.parametrize(("path", "factor"), [("/v1/completions", FACTOR), ("/health", 1.0)])
def test_every_part_is_held_back_by_the_factor(path, factor):
    arrived = []

    async def app(scope, receive, send):
        for part in range(3):
            await asyncio.sleep(0.3)
            await send({"part": part})

    async def send(message):
        arrived.append((message["part"], time.monotonic()))

    began = time.monotonic()
    asyncio.run(SlowDown(app)({"type": "http", "path": path}, None, send))
    assert [part for part, _ in arrived] == [0, 1, 2]
    for part, at in arrived:
        assert at - began == pytest.approx(factor * 0.3 * (part + 1), abs=0.1)
