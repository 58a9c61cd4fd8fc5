"""Row 2: a mistyped output destroys nothing, and is refused before any work, in every command that writes."""

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from tests.command_line import PROGRAM, refused, sentei

pytestmark = pytest.mark.timeout(120)  # whatever opens a FIFO waits for ever

# No model, text or result named here exists: a command that looked for one first would say so.
DIRECTORIES = [
    ("prune", "none", "--sparsity", 0.25),
    ("prune", "none", "--sweep", "0.1:0.3:0.1"),
    ("prune", "none", "--target", "speedup=1.3", "--costs", "none.json"),
    ("apply", "none", "none"),
    ("plan", "cut", "none", "--step", 1),
    ("heal", "none", "--against", "none", "--data", "none.txt"),
    ("evaluate", "none", "--text", "none.txt"),
    ("export", "vllm", "none"),
    ("export", "onnx", "none"),
    ("export", "nemotron-nas", "none"),
    ("quantize", "none", "--scheme", "fp8"),
    ("import", "none.gguf"),
    ("benchmark", "none", "none", "--engine", "transformers"),
    ("compare-methods", "none", "--text", "none.txt"),
    ("deploy-kit", "none"),
    ("demo",),
]
FILES = [
    ("report", "none"),
    ("plan", "curve", "none"),
    ("calibration-text", "none"),
    ("profile", "none", "--engine", "onnx"),
]


def name(command: tuple) -> str:
    return " ".join(map(str, command[:2]))


def everything(directory: Path) -> list[tuple[str, int, int]]:
    return [(str(path), path.lstat().st_mode, path.lstat().st_size) for path in sorted(directory.rglob("*"))]


def make(kind: str, place: Path) -> str:
    """Puts something in the way; returns the word that the refusal has for it."""
    if kind == "FIFO":
        os.mkfifo(place)
    elif kind == "device":
        os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # a null device of our own
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(place))
    elif kind == "file":
        place.write_text("precious")
    elif kind == "directory":
        place.mkdir()
    elif kind == "symbolic link":
        place.symlink_to(place.with_name("nowhere"))
    return kind


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
@pytest.mark.parametrize("kind", ["FIFO", "device", "socket", "file", "symbolic link"])
@pytest.mark.parametrize("command", DIRECTORIES, ids=name)
def test_a_directory_takes_no_other_things_place(tmp_path: Path, command: tuple, kind: str, force: tuple):
    word = make(kind, tmp_path / "out")
    before = everything(tmp_path)
    refused(sentei(*command, "-o", tmp_path / "out", *force), f"Output {tmp_path / 'out'} is a {word}")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
@pytest.mark.parametrize("kind", ["FIFO", "device", "socket", "directory", "symbolic link"])
@pytest.mark.parametrize("command", FILES, ids=name)
def test_a_file_takes_no_other_things_place(tmp_path: Path, command: tuple, kind: str, force: tuple):
    out = tmp_path / ("out.jsonl" if command[0] == "calibration-text" else "out.html")
    word = make(kind, out)
    before = everything(tmp_path)
    refused(sentei(*command, "-o", out, *force), f"Output {out} is a {word}")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("command", [*DIRECTORIES, *FILES], ids=name)
def test_a_place_where_nothing_can_be_made_is_refused_before_the_work(tmp_path: Path, command: tuple):
    make("file", tmp_path / "file")
    make("FIFO", tmp_path / "fifo")
    make("symbolic link", tmp_path / "link")
    before = everything(tmp_path)
    end = "out.jsonl" if command[0] == "calibration-text" else "out.html"
    refused(sentei(*command, "-o", tmp_path / "file" / end), f"lies below {tmp_path / 'file'}, which is a file")
    refused(sentei(*command, "-o", tmp_path / "fifo" / "a" / end), f"lies below {tmp_path / 'fifo'}, which is a FIFO")
    refused(sentei(*command, "-o", tmp_path / "link" / end), f"{tmp_path / 'link'} cannot be made")
    refused(sentei(*command, "-o", f"/proc/{end}"), f"Output /proc/{end}: nothing can be written in /proc")
    refused(sentei(*command, "-o", f"/proc/a/{end}"), "/proc/a cannot be made")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("command", [*DIRECTORIES[:-1], *FILES], ids=name)  # all but the demo, which has no inputs
def test_a_refusal_of_the_inputs_leaves_no_empty_directory(tmp_path: Path, command: tuple):
    end = "out.jsonl" if command[0] == "calibration-text" else "out.html"
    done = sentei(*command, "-o", tmp_path / "a" / "b" / end)
    assert done.returncode == 2, done.stderr
    assert not everything(tmp_path)


def test_a_read_only_place_is_refused_before_the_work(tmp_path: Path):
    script = (
        f'mount -t tmpfs -o ro none "{tmp_path}" && exec "{PROGRAM}" prune none --sparsity 0.25 -o "{tmp_path}/out"'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=100, check=False
    )
    refused(done, f"Output {tmp_path}/out: nothing can be written in {tmp_path} (Read-only file system)")


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("x" * 250, "at most 244 fit"),
        (b"caf\xe9", "UTF-8"),
        (b"caf\xe9/out", "UTF-8"),
        ("gone/../out", "which does not exist"),
        ("there/inner/..", "does not end in a name"),
        ("..", "is a working directory"),
        (".", "is a working directory"),
        ("/", "is a mount point"),
    ],
)
def test_names_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path, monkeypatch, out, says: str):
    work = tmp_path / "work"
    (work / "there" / "inner").mkdir(parents=True)
    monkeypatch.chdir(work)
    before = everything(tmp_path)
    refused(sentei("prune", "none", "--sparsity", 0.25, "-o", os.fsdecode(out)), says)
    assert everything(tmp_path) == before


READING = [
    ("prune", "FIFO", "--sparsity", 0.25, "-o", "OUT"),
    ("prune", "MODEL", "--sparsity", 0.25, "--calibration", "FIFO.txt", "-o", "OUT"),
    ("prune", "MODEL", "--sparsity", 0.25, "--metric", "accuracy:FIFO.jsonl", "-o", "OUT"),
    ("apply", "FIFO", "MODEL", "-o", "OUT"),
    ("plan", "show", "FIFO"),
    ("plan", "show", "FIFO.json"),
    ("plan", "curve", "FIFO"),
    ("plan", "diff", "FIFO", "FIFO"),
    ("estimate", "FIFO", "MODEL"),
    ("heal", "FIFO", "--against", "MODEL", "--data", "FIFO.txt", "-o", "OUT"),
    ("evaluate", "FIFO", "--text", "FIFO.txt"),
    ("evaluate", "MODEL", "--text", "FIFO.txt"),
    ("evaluate", "MODEL", "--questions", "FIFO.jsonl"),
    ("evaluate", "MODEL", "--task", "arc_easy=FIFO.jsonl"),
    ("quantize", "FIFO", "--scheme", "fp8", "-o", "OUT"),
    ("quantize", "MODEL", "--scheme", "w4a16", "--calibration", "FIFO.txt", "-o", "OUT"),
    ("import", "FIFO.gguf", "-o", "OUT"),
    ("benchmark", "FIFO", "MODEL", "--engine", "transformers", "-o", "OUT"),
    ("benchmark", "MODEL", "MODEL", "--engine", "vllm", "--prompts", "FIFO.jsonl", "-o", "OUT"),
    ("compare", "FIFO", "FIFO.json"),
    ("report", "FIFO", "-o", "OUT.html"),
    ("export", "vllm", "FIFO", "-o", "OUT"),
    ("export", "onnx", "FIFO", "-o", "OUT"),
    ("verify", "FIFO", "--against", "MODEL"),
    ("verify", "MODEL", "--against", "MODEL", "--text", "FIFO.txt", "--engine", "transformers"),
    ("generate", "FIFO", "--prompt", "hi"),
    ("serve", "FIFO"),
]


@pytest.mark.parametrize("command", READING, ids=lambda command: " ".join(map(str, command)))
def test_no_command_waits_for_a_fifo(pico_model: Path, tmp_path: Path, command: tuple):
    words = []
    for word in map(str, command):
        if "FIFO" in word:
            fifo = tmp_path / word[word.index("FIFO") :]
            if not fifo.exists():
                os.mkfifo(fifo)
            word = word.replace("FIFO", f"{tmp_path}/FIFO", 1)
        words.append(word.replace("MODEL", str(pico_model)).replace("OUT", str(tmp_path / "out")))
    done = sentei(*words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
