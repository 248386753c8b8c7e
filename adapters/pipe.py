"""What a program does when nobody reads its output any longer: ``until_nobody_reads``."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NOBODY_READS = 141  # the exit status that a shell gives a program which ends so: 128 and the number of SIGPIPE


@contextmanager
def until_nobody_reads() -> Iterator[None]:
    """A context that a program prints in, and which ends it when its output goes to a pipe that was closed.

    ``python -m adapters | head -1`` reads one line, and wants no traceback about the others.

    Raises:
        SystemExit: with the status ``NOBODY_READS``, as soon as nobody reads.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, since at the end of the process it would be too late to be quiet
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python writes what they still hold when it ends
            os.dup2(nowhere, stream.fileno())
        sys.exit(NOBODY_READS)
