"""Run by every kernel as it starts: what goes wrong in it is also written to the file KERNEL_LOG.

The traceback of a widget's callback is no output of a cell. JupyterLab keeps it in a log that is closed at first,
voila drops it; what a library prints to stderr from a callback fares no better.
"""


def _write_errors_down():
    import os
    import re
    import sys

    from IPython import get_ipython

    shell, log = get_ipython(), open(os.environ["KERNEL_LOG"], "a", buffering=1)
    shown = shell._showtraceback

    def showtraceback(kind, error, lines):
        log.write(re.sub(r"\x1b\[[\d;]*m", "", "\n".join(lines)) + "\n")
        shown(kind, error, lines)

    shell._showtraceback = showtraceback
    sys.stderr.echo = log


_write_errors_down()
del _write_errors_down
