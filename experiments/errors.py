"""The error that the experiments' command lines report without a traceback."""


class UsageError(Exception):
    """Bad input, with a one-line message that names the fix.

    The command line prints the message and exits with status 2.
    """
