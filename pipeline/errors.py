"""The exception tree. Every message is one line: what was given, what was expected, where.

OmniferError
    UserError                 the person can fix it; exit code 2
        ConfigError           a recipe or an option is wrong
        SourceError           a path, file or column is missing or not what it claims to be
        LabelError            a class name or code that no vocabulary knows
        IdentityError         a finished stage was made with other settings
        ModelError            weights or a model folder that do not fit
    RunError                  the run failed; exit code 1
        BudgetError           more bad records than the error budget allows
        LedgerError           a commit or a manifest contradicts another one
        ResourceError         the arithmetic of a pass would hang or spill
    PartDone                  a part of a pass is done, the others are not; exit code 0
    RecordError               one bad record; becomes a quarantined row, never ends a run
"""


class OmniferError(Exception):
    """Root of all errors that this package raises on purpose."""

    exit_code = 1


class UserError(OmniferError):
    """Something the person who started the command can fix."""

    exit_code = 2


class ConfigError(UserError):
    """A recipe or an option is wrong; the message may hold several lines, one per fault."""


class SourceError(UserError):
    """A path, file or column is missing or is not what it claims to be."""


class LabelError(UserError):
    """A class name or code that no vocabulary knows."""


class IdentityError(UserError):
    """A stage was started before with other settings; the message names the field."""


class ModelError(UserError):
    """Weights or a model folder that do not fit."""


class RunError(OmniferError):
    """The run failed."""


class BudgetError(RunError):
    """More bad records than the error budget allows; the message names the first culprits."""


class LedgerError(RunError):
    """A commit, a seal or a manifest contradicts another one."""


class ResourceError(RunError):
    """The arithmetic of a pass would hang or spill; the message holds the numbers."""


class PartDone(OmniferError):
    """A driver has done its part of a pass and others have not: it ends well, with this line."""

    exit_code = 0


class RecordError(OmniferError):
    """One bad record. `reason` is a value of :data:`pipeline.schema.REASONS`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def told(cause: BaseException, what: str) -> UserError | RunError:
    """What a worker raised, in one line: ours keep their class, others become a RunError.

    Ray appends advice to our messages in further lines; it is dropped.

    Args:
        cause: the exception as the worker raised it.
        what: what failed; in front of a message that is not ours.
    """
    if isinstance(cause, UserError | RunError):
        return type(cause)(str(cause).split("\n")[0])
    return RunError(f"{what}: {type(cause).__name__}: {' '.join(str(cause).split())}")
