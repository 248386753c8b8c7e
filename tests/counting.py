"""How tests count the calls of networks."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def counted() -> Iterator[Counter[nn.Module]]:
    """Within, every call of a module is counted: ``calls[network]`` says how often that network has run.

    Only calls of the module itself count, which run its ``forward``, and none of its other methods.
    """
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, *_) -> None:
        calls[module] += 1

    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()
