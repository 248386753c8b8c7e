"""Checks of what users give to layers and flows. Each is made once, and its message holds the offending value."""

import math
import operator
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from types import EllipsisType

import torch
from torch import Tensor, nn


def check_tensor(value: Tensor, what: str) -> None:
    """Raise a TypeError unless ``value``, which the message calls ``what``, is a tensor."""
    if not isinstance(value, Tensor):
        kind = type(value)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        article = "an" if name[0] in "aeiou" else "a"
        raise TypeError(
            f"{what} must be a torch.Tensor, not {article} {name}: give torch.as_tensor(…, dtype=torch.float32)"
        )


def check_network(network: nn.Module, name: str) -> None:
    """Raise a TypeError unless ``network`` can be called on a tensor. ``name`` is the argument's, for the message."""
    if isinstance(network, type):
        raise TypeError(f"{name} must be a network, not the class {network.__name__}: make one, {network.__name__}(…)")
    if isinstance(network, Tensor) or not callable(network):
        raise TypeError(f"{name} must be a network, such as an nn.Module, not {shown(network)}")


def sizes(shape: Iterable[int], name: str) -> torch.Size:
    """The shape as a ``torch.Size``; a TypeError that names the argument if it is not a shape."""
    try:
        return torch.Size(shape)
    except TypeError:
        remedy = f"; give ({shape},)" if isinstance(shape, Integral) else ""
        raise TypeError(f"{name} must be a tuple of integers, such as (3,), not {shown(shape)}{remedy}") from None


def shown(value) -> str:
    """The value as it would be typed, on one line and shortened where it is long, for a message."""
    return textwrap.shorten(repr(value), 100, placeholder=" …")


def explain_mismatch(error: BaseException, module: nn.Module, name: str, **tensors: Tensor | None) -> None:
    """After a call of ``module`` has failed: raise a clearer error if the cause is a wrong dtype or device.

    Since it runs only after an error, it costs nothing as long as all is well, and every mixture of dtypes that torch
    can work with is allowed.

    Args:
        error: the error of the call.
        module: a flow, a layer or a network.
        name: what the user calls it.
        tensors: the tensors that it was called with, by the names that the user knows.

    Raises:
        TypeError: for tensors of another dtype, or a module that holds more than one.
        ValueError: for tensors on another device.
    """
    own = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    if not own:
        return
    dtype, device = own[0].dtype, own[0].device
    for role, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(
                f"this {name} is on {device}, its {role} on {tensor.device}: give {role}.to({str(device)!r}), "
                f"or move the {name} by {name}.to({str(tensor.device)!r})"
            )
        mixed = tensor.is_floating_point() and torch.is_autocast_enabled(tensor.device.type)
        if tensor.dtype != dtype and not mixed:
            remedy = f"give {role}.to({dtype})"
            if tensor.is_floating_point():
                remedy += f", or convert the {name} by {name}.to({tensor.dtype})"
            raise TypeError(f"this {name} is of {dtype}, its {role} of {tensor.dtype}: {remedy}")
    others = {tensor.dtype for tensor in own} - {dtype}
    if others and "dtype" in str(error):
        raise TypeError(
            f"this {name} holds tensors of {dtype} and of {', '.join(map(str, others))}, as a preprocessing made of "
            f"float64 data does: {name}.to({dtype}) makes them one"
        )


def check_event(inputs: Tensor, event_shape: Sequence[int], what: str) -> None:
    """Raise a ValueError unless ``inputs`` has the shape ``(batch, *event_shape)``, a TypeError if it is no tensor.

    ``what`` takes the inputs: "this layer", say.
    """
    if not isinstance(inputs, Tensor):
        check_tensor(inputs, f"the inputs of {what}")
    if inputs.dim() == 0 or inputs.shape[1:] != tuple(event_shape):
        expected = ", ".join(["batch", *map(str, event_shape)])
        raise ValueError(f"{what} takes inputs of shape ({expected}), not {tuple(inputs.shape)}")


def check_output(output: Tensor, shape: Sequence[int], network: str) -> Tensor:
    """The output itself; a ValueError unless it has this very shape.

    A shape that broadcasts to it is refused, too, because the log-determinant would be wrong.
    """
    if not isinstance(output, Tensor) or output.shape != tuple(shape):
        returned = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"{network} must return shape {tuple(shape)}, but returned {returned}")
    return output


def check_positive(**values: float) -> None:
    """Raise a ValueError unless every value is above zero and finite, a TypeError unless it is a number.

    Each keyword is the name that the user knows the value by.
    """
    for name, value in values.items():
        if not isinstance(value, Real | Tensor):
            raise TypeError(f"{name} must be a number, not {shown(value)}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive{' and finite' if value == math.inf else ''}, not {value}")


def check_bins(bins: int) -> int:
    """The number of bins as an ``int``; a ValueError unless it is an integer of at least 2."""
    try:
        whole = operator.index(bins)
    except TypeError:
        raise ValueError(f"bins must be an integer, not {bins!r}") from None
    if whole < 2:
        raise ValueError(f"bins must be at least 2, not {bins}")
    return whole


def check_context(context: Tensor | None, width: int | EllipsisType | None, inputs: Tensor, what: str) -> None:
    """Raise a ValueError unless ``what``, a layer or a flow, can take this context together with these inputs.

    Args:
        width: the width of a context row that it takes; ``None`` if it takes no context, ``...`` if that is not known.
    """
    if context is None:
        if width not in (None, ...):
            raise ValueError(f"{what} is conditional: give a context of shape (batch, {width})")
        return
    if not isinstance(context, Tensor):
        check_tensor(context, f"the context of {what}")
    if width is None:
        raise ValueError(f"{what} is unconditional, but a context of shape {tuple(context.shape)} was given")
    if width is not ...:
        check_no_labels(context, width, f"the context of {what}")
        check_event(context, (width,), f"the context of {what}")
    check_rows(context, inputs, what)


def check_no_labels(context: Tensor, width: int, what: str) -> None:
    """Raise a ValueError for class labels, one integer a row, where a context has ``width`` numbers in each row."""
    if width == 1 or context.is_floating_point() or context.is_complex():
        return
    if context.dim() == 1 or context.shape[-1:] == (1,):
        labels = "labels" if context.dim() == 1 else "labels.squeeze(-1)"
        raise ValueError(
            f"{what} has {width} numbers in each row, but these are integers of shape {tuple(context.shape)}; if they "
            f"are class labels, give them one-hot: torch.nn.functional.one_hot({labels}, {width}).to(x.dtype)"
        )


def check_rows(context: Tensor, inputs: Tensor, what: str) -> None:
    """Raise a ValueError unless ``context`` has a row for each of the ``inputs``."""
    if context.shape[:1] != inputs.shape[:1]:
        raise ValueError(f"the context of {what} has {context.shape[0]} rows for {inputs.shape[0]} inputs")


def check_enough_rows(inputs: Tensor, what: str) -> None:
    """Raise a ValueError for fewer than two rows of vectors, whose standard deviation is NaN.

    For layers that take a mean and a deviation from a batch in training, and keep them: NaN would stay for good.
    """
    if len(inputs) < 2 and inputs.dim() == 2:
        raise ValueError(
            f"{what} takes a mean and a standard deviation from the batch in training, which needs two rows; "
            "give more, or call eval()"
        )


def must_wait(tensor: Tensor) -> bool:
    """Whether a check of this tensor's values would slow the program down. Where it would, checks are left out.

    A device other than the CPU works asynchronously, and the program would have to wait for it in each step. A compiler
    that traces the program would have to break the graph.
    """
    return tensor.device.type != "cpu" or torch.compiler.is_compiling()


@contextmanager
def naming_shape(inputs: Tensor, what: str) -> Iterator[None]:
    """Turn a library's internal error about sizes into a ValueError that names the shape of the inputs.

    An error that has another cause stays as it is. Such causes are an empty batch, a value that is not finite, and a
    call within ``torch.func`` or a trace.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if type(error) not in (RuntimeError, IndexError) or not (_about_sizes(str(error)) and _plain(inputs)):
            raise
        raise ValueError(f"{what} does not take inputs of shape {tuple(inputs.shape)} ({error})") from error


def _about_sizes(message: str) -> bool:
    return any(word in message for word in ("size", "shape", "dimension", "einsum")) and not any(
        word in message for word in ("vmap", "functorch", "inplace operation", "allocate")
    )


def _plain(inputs: Tensor) -> bool:
    """Whether the inputs are at least one row of finite values that can be read here."""
    if inputs.numel() == 0 or torch.compiler.is_compiling():
        return False
    try:
        return bool(inputs.isfinite().all())
    except RuntimeError:  # within torch.func.vmap no value can be read
        return False
