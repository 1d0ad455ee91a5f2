"""What a user can mend."""


class InputError(ValueError):
    """The input cannot be used as it is; the message is one line that says what to do. The command line exits with 2."""
