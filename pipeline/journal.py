"""New versions of many files of a run, put in place together or not at all.

    RUN/forgetting/new/<path>      what is to lie at <path>
    RUN/forgetting/journal.json    which files go where and which leave; written when all are there

Killed before the journal, nothing has happened. Killed after it, :func:`apply` does the rest, as
often as it is called, and until then no other command works on the run.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field

from pipeline.errors import RunError
from pipeline.storage import Location

HOME = "forgetting"
JOURNAL = "journal.json"


@dataclass
class Rewrite:
    """What is to be put in place and removed; paths below the run folder."""

    root: Location
    put: list[str] = field(default_factory=list)
    remove: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)  # digest of a stage -> its new one

    def staged(self, at: Location) -> Location:
        """Where the new version of a file is written."""
        path = at.uri.removeprefix(self.root.uri + "/")
        if path not in self.put:
            self.put.append(path)
        return self.root / HOME / "new" / path

    def drop(self, at: Location) -> None:
        """Let a file or a folder leave."""
        self.remove.append(at.uri.removeprefix(self.root.uri + "/"))

    def ready(self) -> None:
        """Write the journal: from now on it will be done."""
        _fault("before-journal")
        (self.root / HOME / JOURNAL).write_json({"put": self.put, "remove": self.remove})
        _fault("journal-written")


def interrupted(root: Location) -> bool:
    """Whether files are being put in place and are not yet."""
    return (root / HOME / JOURNAL).exists()


def require_whole(root: Location) -> None:
    """RunError where putting files in place was interrupted."""
    if interrupted(root):
        raise RunError(f"{root}: `omnifer forget` was interrupted; call it again to finish")


def apply(root: Location, first: str) -> None:
    """Do what the journal says, the file `first` before all others; safe to do again."""
    journal = (root / HOME / JOURNAL).read_json()
    for path in sorted(journal["put"], key=lambda p: p != first):
        _place(root, path)
    for path in journal["remove"]:
        (root / path).remove_tree()


def close(root: Location) -> None:
    """Remove the journal, then what it was about."""
    (root / HOME / JOURNAL).remove_tree()
    (root / HOME).remove_tree()


def _place(root: Location, path: str) -> None:
    staged = root / HOME / "new" / path
    with staged.open() as source, (root / path).replacing() as target:
        shutil.copyfileobj(source, target)
    _fault("placed")


def _fault(step: str) -> None:
    """Die like a killed process if OMNIFER_FAULT names this step, as in the ledger."""
    if os.environ.get("OMNIFER_FAULT") == f"forget-{step}":
        os._exit(137)
