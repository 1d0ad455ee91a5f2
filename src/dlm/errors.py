"""What a user can mend."""


class InputError(ValueError):
    """The input cannot be used as it is; the message is one line that says what to do. The command line exits with 2."""


def at_least(value: float, low: float, what: str) -> None:
    """InputError unless value is finite and not below `low`."""
    if not low <= value < float("inf"):
        raise InputError(f"{what} must be at least {low:g}, got {value}")
