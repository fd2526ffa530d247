"""The one exception that this package raises for what a user can cause."""


class DataError(ValueError):
    """Something is wrong with the user's files or settings.

    The message is one line: it names the file (and line), the offending value, and what would do.
    The command line prints it without a traceback.
    """
