"""What ends a command with one sentence instead of a traceback."""


class UserError(ValueError):
    """A mistake in a setting, a file or an environment, told in one sentence.

    The message names the setting or the file, what it was and what to write instead. The command line prints it
    without a traceback and exits with code 2.
    """


class RunStopped(RuntimeError):
    """A run that cannot go on (a loss that is not finite, a full disk); what was saved before is whole.

    The message says what happened, at which step, and how to go on. The command line prints it without a traceback
    and exits with code 1.
    """


class PeerLost(RunStopped):
    """Another rank has ended, or (``hangs``) does not answer; that one, not this, is what must be looked at."""

    def __init__(self, message: str, *, hangs: bool = False):
        super().__init__(message)
        self.hangs = hangs
