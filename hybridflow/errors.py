"""Errors that users cause and can mend."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input from the user: an argument, a configuration value or a file.

    The message names the argument or file, what was given and what is wanted. Command lines print
    it as ``error: …`` and exit with status 2, without a traceback.
    """
