"""Whatever is in a file, the answer is a result or a ``SenteiError``, within two seconds."""

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.readers.conftest import READ
from tests.readers.files import READERS, Reader
from toolchain.errors import SenteiError

_SECONDS = 2.0
_EXAMPLES, _ACCEPTED_EXAMPLES = 30, 1500


def answered(name: str, reader: Reader, directory: Path, content: bytes) -> None:
    """Reads a spoiled file; the time is this process's own, so that a busy machine does not count."""
    file = directory / reader.file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    began = time.process_time()
    outcome = "read"
    try:
        reader.read(directory)
    except SenteiError as error:
        outcome = "refused"
        assert "\n" not in error.message, error.message
        assert len(str(error)) < 5000
    took = time.process_time() - began
    READ[f"{name} {outcome}"] += 1
    assert took < _SECONDS, f"{took:.1f} s"


def check(name: str, directory: Path, examples: int) -> None:
    reader = READERS[name]
    reader.make(directory)
    good = (directory / reader.file).read_bytes()
    reader.read(directory)

    @settings(
        max_examples=max(1, examples // reader.slow),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def spoil(data: st.DataObject) -> None:
        answered(name, reader, directory, data.draw(reader.spoiled(good)))

    spoil()


@pytest.mark.parametrize("name", READERS)
def test_a_spoiled_file_is_read_or_refused(name: str, tmp_path: Path):
    check(name, tmp_path, _EXAMPLES)


@pytest.mark.acceptance
@pytest.mark.parametrize("name", READERS)
def test_many_spoiled_files_are_read_or_refused(name: str, tmp_path: Path):
    check(name, tmp_path, _ACCEPTED_EXAMPLES)
