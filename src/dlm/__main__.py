"""The command `dlm`."""

import signal


def main() -> None:
    """Ctrl-C before the command line is there ends in silence, not in the traceback of an import."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dlm import cli

    signal.signal(signal.SIGINT, before)
    cli.main()


if __name__ == "__main__":
    main()
