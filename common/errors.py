"""The error that a user can mend."""


class UserError(ValueError):
    """Bad input: one line that names the value, what is allowed and what to do.

    Commands print the line and end with exit code 2; library callers see an ordinary `ValueError`.
    """
