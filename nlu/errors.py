"""The one exception a user is meant to read."""


class UsageError(ValueError):
    """Bad arguments or bad input: one line that says what is wrong and what to do; commands exit with code 2."""
