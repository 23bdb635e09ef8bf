"""The first and the last moments of the `qedfs` process, in which Ctrl-C finds no command that it could interrupt.

Owns the handler of SIGINT in these moments: it ends the process at once, without a traceback. Loads almost nothing
before the handler is there, because loading the rest takes most of the time of a short command. (What the interpreter
loads before our first line is not in our hands.) Must not know any command.
"""

import gc
import os
import signal
import sys

INTERRUPTED = 130  # 128 + SIGINT, as the shell reports a command that Ctrl-C ended


def main() -> None:
    """Run the command line. This is what the `qedfs` script and `python -m qedfs` call."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if our parent has it ignored, as nohup
        signal.signal(signal.SIGINT, _leave)
    # Modules are no garbage. Without this, collections are an eighth of the instructions that loading click takes.
    gc.disable()
    from qedfs.cli.plain.forms import plain_call

    plain = plain_call(sys.argv[1:])
    if plain is None:
        from qedfs.cli.main import main as command

        command()
    else:
        from qedfs.cli.frame import run_framed

        gc.freeze()  # all that is loaded until now stays; see `cli/main.py`
        gc.enable()
        try:
            run_framed(plain)
        except SystemExit as end:
            # All is written and closed. To take the interpreter down would cost a tenth of such a command.
            os._exit(end.code if isinstance(end.code, int) else 0)


class Interruptible:
    """A context manager. In its block Ctrl-C raises KeyboardInterrupt, as click and trio expect it."""

    def __enter__(self) -> None:
        self._was_ours = signal.getsignal(signal.SIGINT) is _leave
        if self._was_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if self._was_ours:
            signal.signal(signal.SIGINT, _leave)


def _leave(_number: int, _frame: object) -> None:
    # Nothing is open yet, or everything is closed already. An exception could be raised in any module that is just
    # being loaded, or while the interpreter shuts down, and each of these would print it in its own way.
    os._exit(INTERRUPTED)
