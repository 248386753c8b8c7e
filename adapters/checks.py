"""What layers and flows check about the tensors they meet: once, and with the offending value in the message."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import EllipsisType

import torch
from torch import Tensor


def check_event(inputs: Tensor, event_shape: Sequence[int], what: str) -> None:
    """Raise a ValueError unless ``inputs`` is ``(batch, *event_shape)``."""
    if inputs.dim() == 0 or inputs.shape[1:] != tuple(event_shape):
        expected = ", ".join(["batch", *map(str, event_shape)])
        raise ValueError(f"{what} takes inputs of shape ({expected}), not {tuple(inputs.shape)}")


def check_output(output: Tensor, shape: Sequence[int], network: str) -> Tensor:
    """The output itself; a ValueError unless it has this very shape (a broadcast would falsify the log-determinant)."""
    if output.shape != tuple(shape):
        raise ValueError(f"{network} must return shape {tuple(shape)}, but returned {tuple(output.shape)}")
    return output


def check_positive(**values: float) -> None:
    """Raise a ValueError unless every value is above zero; the keyword is the name the user knows it by."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")


def check_context(context: Tensor | None, width: int | EllipsisType | None, inputs: Tensor, what: str) -> None:
    """Raise a ValueError unless ``context`` is one that ``what`` takes together with ``inputs``.

    Args:
        width: of a context row; ``None`` if it takes no context, ``...`` if it does not say.
    """
    if context is None:
        if width not in (None, ...):
            raise ValueError(f"{what} is conditional: give a context of shape (batch, {width})")
        return
    if width is None:
        raise ValueError(f"{what} is unconditional, but a context of shape {tuple(context.shape)} was given")
    if width is not ...:
        check_event(context, (width,), f"the context of {what}")
    if len(context) != len(inputs):
        raise ValueError(f"the context of {what} has {len(context)} rows for {len(inputs)} inputs")


def must_wait(tensor: Tensor) -> bool:
    """Whether reading a number of this tensor, as a check of its values does, would hold the program up.

    A device other than the CPU works behind the program, which would have to wait for it in each step; and a compiler
    that traces the program would have to cut it in two. Checks of values are left out there.
    """
    return tensor.device.type != "cpu" or torch.compiler.is_compiling()


@contextmanager
def naming_shape(inputs: Tensor, what: str) -> Iterator[None]:
    """Turn a library's error about sizes, raised from deep below, into a ValueError that names the inputs' shape."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if type(error) not in (RuntimeError, IndexError) or not any(
            word in str(error) for word in ("size", "shape", "dimension", "einsum")
        ):
            raise
        raise ValueError(f"{what} does not take inputs of shape {tuple(inputs.shape)} ({error})") from error
