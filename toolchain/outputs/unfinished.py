"""Work that takes long stays beside its output until it is finished, and ``--resume`` goes on with it.

The work lies in one directory, ``<out>.search`` and the like (:class:`toolchain.outputs.names.Kind`), with what it
depends on in a file: it is only ever gone on with from the same inputs. The owner keeps there whatever files it likes,
each written whole (:func:`toolchain.outputs.writing.whole_file`): a process that is killed leaves at any instant what
can be resumed.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain.errors import SenteiError
from toolchain.json_files import first_difference, read_json_object
from toolchain.outputs.checks import is_empty_directory, kind_of
from toolchain.outputs.claims import delete
from toolchain.outputs.names import PARTIAL, Kind, beside
from toolchain.outputs.writing import write_text

Identity = Mapping[str, Any]
START_OVER = "Use --force to start over."


class Unfinished:
    """The directory of work that is not finished.

    Attributes:
        directory: Where it lies; it need not exist.
        resumed: Whether earlier work is there and is gone on with.
        worth_keeping: Whether the directory stays if the work ends badly. It is false at first, true for work that is
            resumed; the owner sets it once there is something that took long. Where there is no file in the directory
            but the identity, nothing stays.
        what_stays: What a person is told if the directory stays; a note on the error, which the command line prints.
    """

    def __init__(self, out: Path, kind: Kind, *, force: bool, resume: bool) -> None:
        """Looks for earlier work and refuses what is in the way. Changes nothing yet.

        Args:
            out: What the work will become.
            kind: Of work.
            force: Forget earlier work, unless ``resume`` is given too.
            resume: Go on with earlier work, if there is any.

        Raises:
            SenteiError: Something is there that no command of ours left; or earlier work, and neither ``force`` nor
                ``resume`` was asked for.
        """
        self.directory = kind.directory(out)
        self._out, self._kind = out, kind
        _refuse_others(self.directory, kind)
        found = _holds_work(self.directory, kind)
        if found and not (force or resume):
            raise SenteiError(
                f"{self.directory} holds an interrupted {kind.noun}.",
                "Add --resume to continue, or --force to start over.",
            )
        self.resumed = self.worth_keeping = found and resume
        self.what_stays = (
            f"{self.directory} holds what was done so far. The same command with --resume continues from there."
        )

    @contextmanager
    def working(
        self, identity: Identity | None = None, *, read: Callable[[Path], Identity | None] | None = None
    ) -> Iterator[None]:
        """Runs the work: the directory is there meanwhile, and gone after a good end.

        After a bad end, whichever error it was, the directory stays if it is :attr:`worth_keeping`.

        Args:
            identity: What the work depends on, as JSON; ``None`` where each of the owner's files says that for itself.
            read: See :func:`begin_with`.

        Raises:
            SenteiError: See :func:`begin_with`; earlier work stays as it is.
        """
        if not self.resumed:
            self._forget()
        try:
            if identity is not None:
                begin_with(self.directory, self._kind, identity, read=read)
            yield
        except BaseException as error:
            if self.worth_keeping and _holds_work(self.directory, self._kind):
                error.add_note(self.what_stays)
            else:
                self._forget()
            raise
        self._forget()

    def _forget(self) -> None:
        """Deletes the directory. It goes all at once: killed on the way, it is not half there."""
        aside = beside(self._out, PARTIAL)  # whose remains the next command clears away
        try:
            self.directory.rename(aside)
        except OSError:  # nothing is there, or something is at the other name
            aside = self.directory
        delete(aside)


def begin_with(
    directory: Path, kind: Kind, identity: Identity, *, read: Callable[[Path], Identity | None] | None = None
) -> None:
    """Compares what work depends on with what the work in a directory was begun with; writes it if there is none.

    Args:
        directory: Of the work, or of a part of it that has inputs of its own.
        kind: Of work.
        identity: As JSON.
        read: Says what the work was begun with, ``None`` if the directory does not; by default it looks into the kind's
            file alone.

    Raises:
        SenteiError: They differ; the message names the first field. Or the directory holds work and does not say what
            that was begun with.
    """
    assert kind.identity_file is not None
    now = json.loads(json.dumps(identity))
    before = (read or (lambda place: identity_on_disk(place, kind)))(directory)
    if before is None and _holds_work(directory, kind):
        raise SenteiError(f"{directory} does not say what it was begun with ({kind.identity_file}).", START_OVER)
    if before is not None and (found := first_difference(json.loads(json.dumps(before)), now)):
        field, then, here = found
        raise SenteiError(
            f"{directory} was begun with another {field}: {then} then, {here} now.",
            "Run the same command as before, or use --force to start over.",
        )
    if not (directory / kind.identity_file).exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / kind.identity_file, json.dumps(now, indent=1) + "\n")


def identity_on_disk(directory: Path, kind: Kind) -> Identity | None:
    """What the work in a directory was begun with; ``None`` if no file says so.

    Raises:
        SenteiError: The file is damaged.
    """
    assert kind.identity_file is not None
    file = directory / kind.identity_file
    return read_json_object(file, hint=START_OVER) if file.exists() else None


def _refuse_others(directory: Path, kind: Kind) -> None:
    """Refuses to take for ours what is somebody else's: it would be deleted in the end."""
    if not os.path.lexists(directory) or is_empty_directory(directory):
        return
    if kind_of(directory) != "directory" or not any(any(directory.glob(sign)) for sign in kind.signs):
        raise SenteiError(
            f"{directory} is where what is unfinished would lie, and something is there that no interrupted command "
            "left.",
            "Choose another output, or move that away.",
        )


def _holds_work(directory: Path, kind: Kind) -> bool:
    """Whether there is any file but the identity, and but those that were being written."""
    return any(
        not path.is_dir() and path.name != kind.identity_file and path.suffix != f".{PARTIAL}"
        for path in directory.rglob("*")
    )
