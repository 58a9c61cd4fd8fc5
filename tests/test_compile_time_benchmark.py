"""``benchmarks/compile_time.py`` loses one start when it is killed, and starts warm only on what a cold start left."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import make_pico
from toolchain.checkpoint.directory import open_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs it with engines that note their start; it is killed before the start of the number given."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compile_time

    def run(killed_before: int | None = None) -> list[str]:
        asked: list[str] = []

        def start(model: Path, cache: Path, kind: str) -> dict[str, float]:
            assert cache.exists() == (kind == "warm")
            cache.mkdir(parents=True, exist_ok=True)
            if len(asked) == killed_before:
                raise KeyboardInterrupt
            asked.append(f"{model.name} {kind}")
            return dict.fromkeys(("start_s", "start_processor_s", "compiled_files", *compile_time._COUNTS), len(asked))

        monkeypatch.setattr(compile_time, "_measured", start)
        monkeypatch.setattr(compile_time, "generate", lambda directory, shape: make_pico(directory, **shape))
        monkeypatch.setattr(compile_time, "has_cxx_compiler", lambda: True)
        out, work = tmp_path / "out.json", tmp_path / "work"
        try:
            compile_time.main(out=out, work=work, widths=[1, 3], layers=4, hidden_size=64, repeats=1)
        except KeyboardInterrupt:
            asked.append("killed")
        return asked

    return run


def test_a_killed_run_goes_on(bench, tmp_path: Path):
    assert bench(killed_before=4) == ["1-widths cold", "1-widths warm", "1-widths eager", "3-widths cold", "killed"]
    assert bench() == ["3-widths warm", "3-widths eager"]
    assert bench() == []
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["widths"], row["cold"]["starts"], row["warm"]["start_s"]) for row in rows] == [(1, 1, 2), (3, 1, 1)]


def test_a_warm_start_is_never_cold(bench, tmp_path: Path):
    """If the caches are gone, or only begun, they are filled again, and that start does not count."""
    bench(killed_before=4)
    for caches in (tmp_path / "work").glob("caches-*"):
        shutil.rmtree(caches)
    assert bench(killed_before=0) == ["killed"]
    assert bench() == ["3-widths cold", "3-widths warm", "3-widths eager"]
    assert json.loads((tmp_path / "out.json").read_text())["cells"]["3 widths/cold/0"]["start_s"] == 4


def test_models_differ_in_their_widths_alone(bench, tmp_path: Path):
    bench()
    one, three = (open_checkpoint(tmp_path / "work" / f"{number}-widths").layout for number in (1, 3))
    assert Counter(layer.intermediate_size for layer in one) == {192: 4}
    assert Counter(layer.intermediate_size for layer in three) == {128: 2, 192: 1, 256: 1}
    assert all(layer.attention for layer in (*one, *three))
