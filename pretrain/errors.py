"""The error that a user sees as one line, without a traceback."""


class UserError(Exception):
    """Something that the user can mend; its message names the setting, file or value, and what would do."""
