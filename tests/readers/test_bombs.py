"""Files that take far more than their size: refused within two seconds and 500 MB, in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readers.conftest import READ
from tests.readers.files import READERS
from tests.readers.spoiling import spoiled_json

_ROOT = Path(__file__).resolve().parents[2]
_MOST_BYTES, _MOST_SECONDS = 500_000_000, 4.0
_JSON = [name for name, reader in READERS.items() if reader.spoiled is spoiled_json]
# Memory is counted from what the imports take; what the first good file makes libraries load is not the file's.
_PROGRAM = """
import json, resource, sys, tempfile, time
from pathlib import Path
from tests.readers.files import READERS
from tests.readers.spoiling import BOMBS
from toolchain.errors import SenteiError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

reader = READERS[sys.argv[1]]
directory = Path(tempfile.mkdtemp(dir=sys.argv[2]))
reader.make(directory)
reader.read(directory)
before, found = peak(), {}
for name, bomb in BOMBS.items():
    (directory / reader.file).parent.mkdir(parents=True, exist_ok=True)
    (directory / reader.file).write_bytes(bomb)
    began = time.process_time()
    try:
        reader.read(directory)
        said = "nothing"
    except SenteiError as error:
        said = str(error)[:200]
    found[name] = [said, time.process_time() - began, peak() - before]
print(json.dumps(found))
"""


def check(name: str, directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, name, directory], cwd=_ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for bomb, (said, seconds, num_bytes) in json.loads(done.stdout.splitlines()[-1]).items():
        READ[f"{name} {bomb} refused"] += 1
        assert seconds < _MOST_SECONDS, f"{bomb}: {seconds:.1f} s ({said})"
        assert num_bytes < _MOST_BYTES, f"{bomb}: {num_bytes:,} bytes ({said})"


def test_bombs_in_a_plan(tmp_path: Path):
    check("plan", tmp_path)


@pytest.mark.acceptance
@pytest.mark.parametrize("name", _JSON)
def test_bombs_in_every_json_file(name: str, tmp_path: Path):
    check(name, tmp_path)
