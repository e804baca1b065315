"""The one error that a user can mend."""


class LlamoryError(ValueError):
    """Input that the user can put right.

    The message is one sentence that says what was wrong and what would be right. The command line prints it without
    a traceback and leaves with exit code 2.
    """
