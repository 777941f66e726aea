"""The one exception for what the user can mend."""


class InputError(Exception):
    """What the user gave cannot be used: a setting, a file, a prompt.

    The message says what was found, what was expected and what to do. The scripts print it without a traceback
    and exit with code 2.
    """
