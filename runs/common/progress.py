"""The progress bar of what may take longer than a few seconds beside the training: scoring, mostly."""

import sys

from tqdm import tqdm

DELAY = 2  # seconds; what is done by then shows no bar


def progress(total: int, doing: str, unit: str, quiet: bool = False) -> tqdm:
    """A bar that appears only if the work goes on for more than ``DELAY`` seconds, and goes when the work is done.

    Args:
        total: how many units of work there are; the caller says ``update(n)`` when n of them are done.
        doing: what is being done, e.g. "scoring".
        unit: of the work, e.g. "image".
        quiet: show nothing.
    """
    return tqdm(
        total=total,
        desc=doing,
        unit=f" {unit}s",
        disable=quiet,
        delay=DELAY,
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file wants few lines
        dynamic_ncols=True,
    )
