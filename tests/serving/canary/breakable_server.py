"""``sentei`` as it is, but for an engine that a test can break while it serves: a file says how.

``python -m tests.serving.canary.breakable_server FILE serve DIR -- options``. While the file holds a JSON object,
``delay_s`` is how much longer each step takes, and ``failing`` is the share of prompts whose first step raises what
ONNX Runtime would.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.engines.onnxruntime import Cache, OnnxEngine
from toolchain.cli.entry import main


def break_engine(faults: Path) -> None:
    """Has every engine of this process read the file before each step."""
    step, draw = OnnxEngine.step, random.Random(0)

    def breakable(self: OnnxEngine, cache: Cache, rows: Sequence[Sequence[int]]) -> Any:
        fault = json.loads(faults.read_text() or "{}") if faults.exists() else {}
        time.sleep(fault.get("delay_s", 0))
        if len(rows[0]) > 1 and draw.random() < fault.get("failing", 0):
            raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : a kernel has failed")
        return step(self, cache, rows)

    OnnxEngine.step = breakable  # type: ignore[method-assign]


if __name__ == "__main__":
    break_engine(Path(sys.argv[1]))
    sys.argv[:2] = ["sentei"]
    main()
