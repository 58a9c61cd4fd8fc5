"""Every long command is interrupted, killed, and robbed of disk, memory and files; then the same command runs again.

``make reliability`` runs all of it and writes down in ``docs/reliability.md`` what was left and what the next run did.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.jobs import JOBS, Job, older_output, tree
from tests.faults.place import Place, is_bound_by_permissions, plain_place, small_disk, unshare
from tests.faults.running import Ended, Running, running
from tests.faults.table import Observed

RecordProperty = Callable[[str, object], None]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A command, what it reads, and where it writes."""

    job: Job
    inputs: Path
    place: Place
    scratch: Path

    @property
    def out(self) -> Path:
        return self.place.seen / "out"

    def essence(self) -> Any:
        return self.job.essence(self.out)

    @contextmanager
    def started(
        self, *more: object, memory_bytes: int | None = None, file_bytes: int | None = None
    ) -> Iterator[Running]:
        words = self.job.command(self.inputs, self.place.path / "out", *more)
        variables = {name: value.replace("IN/", f"{self.inputs}/") for name, value in self.job.environment.items()}
        with running(
            words, self.place, self.scratch, environment=variables, memory_bytes=memory_bytes, file_bytes=file_bytes
        ) as run:
            yield run

    def once_more(self, *more: object) -> Ended:
        """The command without any fault."""
        with self.started(*more) as run:
            return run.wait()

    def has_begun(self, stage: str, run: Running) -> bool:
        sign = self.job.stages[stage]
        return (self.place.seen / f"out{sign}").exists() if sign.startswith(".") else sign in run.text()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        cause: Makes it happen.
        endings: Exit codes that are right, and what must be said then.
        needs_disk: Whether the output must be on a disk of its own.
        over_older: Whether the command runs with ``--force`` over an older output.
        from_start: Whether it is there before the command starts.
    """

    cause: Callable[[Scene, Running], None]
    endings: Mapping[int, str]
    needs_disk: bool = False
    over_older: bool = False
    from_start: bool = False


def _remove_output(scene: Scene, _: Running) -> None:
    """Like ``rm -rf OUT*``; what the command writes meanwhile may be in its way."""
    for _ in range(5):
        for path in scene.place.seen.glob("out*"):
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink()


def _remove_inputs(scene: Scene, _: Running) -> None:
    (scene.inputs / _ELSEWHERE).mkdir()
    for name in scene.job.reads:
        (scene.inputs / name).rename(scene.inputs / _ELSEWHERE / name)


def _bring_inputs_back(scene: Scene) -> None:
    if (elsewhere := scene.inputs / _ELSEWHERE).is_dir():
        for path in elsewhere.iterdir():
            path.rename(scene.inputs / path.name)
        elsewhere.rmdir()


_ELSEWHERE = "elsewhere"
_INTERRUPTED = {130: r"Interrupted\."}
_TOLD = {0: "", 2: "Error: "}
# Without memory: the loader of shared libraries, Rust's and C++'s allocators, and what looks at no result.
_ENDED_BY_A_LIBRARY = {127, 134, 139}
FAULTS: Mapping[str, Fault] = {
    "Ctrl-C": Fault(cause=lambda _, run: run.press_ctrl_c(), endings=_INTERRUPTED),
    "SIGTERM": Fault(cause=lambda _, run: run.process.terminate(), endings=_INTERRUPTED, over_older=True),
    "SIGKILL": Fault(cause=lambda _, run: run.process.kill(), endings={137: ""}),
    "disk full": Fault(
        cause=lambda scene, _: scene.place.fill(), endings={2: "No space left"}, needs_disk=True, over_older=True
    ),
    "output removed": Fault(cause=_remove_output, endings=_TOLD),
    "output read-only": Fault(
        cause=lambda scene, _: scene.place.make_read_only(), endings={2: "Error: "}, needs_disk=True, from_start=True
    ),
    "input removed": Fault(cause=_remove_inputs, endings=_TOLD, over_older=True),
}
# Some faults on what is quickly done; "make reliability" has all of both.
_QUICK = {
    ("Ctrl-C", "apply", "compensation"),
    ("disk full", "export vllm", "writing"),
    ("output read-only", "export vllm", "start"),
}


def _cells() -> Iterator[Any]:
    for fault_name, fault in FAULTS.items():
        for command, job in JOBS.items():
            for stage in ["start"] if fault.from_start else job.stages:
                cell = (fault_name, command, stage)
                marks = () if cell in _QUICK else pytest.mark.acceptance
                yield pytest.param(*cell, marks=marks, id="-".join(cell).replace(" ", "_"))


@pytest.fixture(scope="session")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, int]]:
    """What a command writes when nothing goes wrong, and how much address space it takes; run once each."""
    known: dict[str, tuple[Any, int]] = {}

    def find(command: str) -> tuple[Any, int]:
        if command not in known:
            scratch = tmp_path_factory.mktemp("undisturbed")
            scene = Scene(job=JOBS[command], inputs=inputs, place=plain_place(scratch / "place"), scratch=scratch)
            ended = scene.once_more()
            assert ended.exit_code == 0, ended.stderr
            assert scene.place.names() == ["out"]
            known[command] = scene.essence(), ended.peak_bytes
        return known[command]

    return find


@contextmanager
def _scene(fault: Fault, job: Job, inputs: Path, scratch: Path) -> Iterator[Scene]:
    directory = scratch / "place"
    with small_disk(directory) if fault.needs_disk else nullcontext(plain_place(directory)) as place:
        scene = Scene(job=job, inputs=inputs, place=place, scratch=scratch)
        try:
            yield scene
        finally:
            _bring_inputs_back(scene)


def _disturb(scene: Scene, fault: Fault, stage: str) -> Ended:
    """Runs the command into the fault; nothing that it started may live on."""
    more = ["--force"] if fault.over_older else []
    # Without a disk of its own, a limit of the files' size stands in for a full disk.
    file_bytes = 1 << 20 if fault.needs_disk and not fault.from_start and not scene.place.is_disk else None
    if fault.from_start:
        fault.cause(scene, None)  # type: ignore[arg-type]
    with scene.started(*more, file_bytes=file_bytes) as run:
        if not fault.from_start:
            run.wait_until(lambda: scene.has_begun(stage, run))
            with run.held():
                fault.cause(scene, run)
        ended = run.wait()
        assert run.wait_for_relatives() == []
    return ended


def _run_again(scene: Scene, fault: Fault, ended: Ended) -> str:
    """Runs the same command again, as a user would who reads what it says; returns what it took."""
    more = ["--force"] if fault.over_older else []
    if "--resume" in ended.stderr:
        more.append("--resume")
    again = scene.once_more(*more)
    asked = ""
    if again.exit_code == 2:
        option = next(each for each in ("--resume", "--force") if each in again.said)
        asked = f"says what is left and asks for `{option}`; "
        more.append(option)
        again = scene.once_more(*more)
    assert again.exit_code == 0, again.stderr
    taken = "with `--resume`: " if "--resume" in more else ""
    return f"{asked}{taken}the same result"


@pytest.mark.parametrize(("fault_name", "command", "stage"), _cells())
def test_a_fault(
    fault_name: str, command: str, stage: str, inputs: Path, undisturbed: Callable[[str], tuple[Any, int]],
    tmp_path: Path, record_property: RecordProperty,
) -> None:  # fmt: skip
    fault, job = FAULTS[fault_name], JOBS[command]
    if fault_name == "output read-only" and not (unshare() or is_bound_by_permissions()):
        pytest.skip("Root may open no namespace here, so nothing can be made read-only for it.")
    expected, _ = undisturbed(command)
    with _scene(fault, job, inputs, tmp_path) as scene:
        before = tree(scene.inputs)
        if fault.over_older:
            older_output(scene.out)
        older = tree(scene.place.seen)
        ended = _disturb(scene, fault, stage)
        _check_ending(ended, fault)
        scene.place.mend()
        _bring_inputs_back(scene)
        assert tree(scene.inputs) == before
        left = [name for name in scene.place.names() if name != "out" or not fault.over_older]
        next_run = ""
        if ended.exit_code:
            # Exports are complete before they are verified.
            assert stage == "verifying" or older.items() <= tree(scene.place.seen).items()
            next_run = _run_again(scene, fault, ended)
        assert scene.place.names() == ["out"]
        assert scene.essence() == expected
        if ended.exit_code != 137:
            assert list((tmp_path / "tmp").iterdir()) == []
    observed = Observed(
        fault=fault_name,
        command=command,
        stage=stage,
        exit_code=ended.exit_code,
        said=_in_short(ended, scene),
        left=_named(left),
        next_run=next_run,
    )
    record_property("reliability", observed.as_json())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("command", JOBS)
@pytest.mark.acceptance
def test_a_memory_limit(
    command: str, share: float, inputs: Path, undisturbed: Callable[[str], tuple[Any, int]], tmp_path: Path,
    record_property: RecordProperty,
) -> None:  # fmt: skip
    """As by ``ulimit -v``. At 0.3 of its need a command cannot load its libraries, at 0.9 it may lack a tensor.

    Code that is not Python may end the whole process; then what is on the disk must be right all the same.
    """
    job = JOBS[command]
    expected, peak_bytes = undisturbed(command)
    fault = Fault(cause=_remove_output, endings={0: "", 2: "[Mm]emory"}, over_older=True)
    scene = Scene(job=job, inputs=inputs, place=plain_place(tmp_path / "place"), scratch=tmp_path)
    older_output(scene.out)
    older = tree(scene.place.seen)
    with scene.started("--force", memory_bytes=int(share * peak_bytes)) as run:
        ended = run.wait()
        assert run.wait_for_relatives() == []
    if ended.exit_code in _ENDED_BY_A_LIBRARY:
        assert "Traceback" not in ended.stderr
    else:
        _check_ending(ended, fault)
    left = [name for name in scene.place.names() if name != "out"]
    next_run = ""
    if ended.exit_code:
        # Exports are complete before they are verified.
        assert command.startswith("export") or older.items() <= tree(scene.place.seen).items()
        next_run = _run_again(scene, fault, ended)
    assert scene.place.names() == ["out"]
    assert scene.essence() == expected
    observed = Observed(
        fault="memory limit", command=command, stage=f"{share:.0%} of its need", exit_code=ended.exit_code,
        said=_in_short(ended, scene), left=_named(left), next_run=next_run,
    )  # fmt: skip
    record_property("reliability", observed.as_json())


def _check_ending(ended: Ended, fault: Fault) -> None:
    assert ended.exit_code in fault.endings, ended.stderr
    assert "Traceback" not in ended.stderr
    assert re.search(fault.endings[ended.exit_code], ended.said), ended.stderr
    assert len(re.findall("^Error:", ended.stderr, re.M)) <= 1, ended.stderr
    assert "report this" not in ended.stderr


def _named(left: list[str]) -> str:
    return ", ".join(f"`{name.replace('out', 'OUT', 1)}`" for name in left) or "nothing"


def _in_short(ended: Ended, scene: Scene) -> str:
    """The first sentence, without the test's own directories."""
    text = ended.said
    for directory in (scene.place.path, scene.inputs):
        text = text.replace(f"{directory}/", "").replace(str(directory), "the directory above it")
    return text.replace("|", "\\|").partition(". ")[0]
