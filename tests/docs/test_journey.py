"""README's and the guides' commands, run in their order, in an empty directory, on a model of random weights."""

from pathlib import Path

import pytest

from tests.docs.commands import DOCUMENTS, ROOT, sentei_commands
from tests.docs.workplace import Workplace, is_run

FOLDERS = (ROOT, ROOT / "docs" / "guides", ROOT / "docs" / "ja")
JOURNEYS = [document for document in DOCUMENTS if document.parent in FOLDERS]


@pytest.mark.acceptance
@pytest.mark.usefixtures("vllm")
@pytest.mark.timeout(2400)  # README's benchmark starts vLLM six times
@pytest.mark.parametrize(
    "document",
    [document for document in JOURNEYS if any(map(is_run, sentei_commands(document)))],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_the_commands_work_one_after_the_other(
    document: Path, narrow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    workplace = Workplace(tmp_path, narrow_model)
    for command in filter(is_run, sentei_commands(document)):
        workplace.run(command.words)


def test_most_of_what_is_shown_is_run() -> None:
    """What is not has its reason in tests/docs/workplace.py."""
    shown = [command for document in JOURNEYS for command in sentei_commands(document)]
    assert sum(map(is_run, shown)) > len(shown) / 2
