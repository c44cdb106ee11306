"""The base of every error that a user can cause or cure."""


class UserError(Exception):
    """Its message is one line that names the thing, its value and what to do about it."""
