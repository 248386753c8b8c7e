"""``python -m adapters.check my_layer:MyLayer``"""

import ast
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from adapters.catalogue import build_flow, is_own
from adapters.check import SECONDS, check
from adapters.check.laws.finding import WRONG
from adapters.check.subject import Wrong, said
from adapters.own import Offer, layers_of, load, make
from adapters.pipe import until_nobody_reads

LAYER = (
    "module:object or file.py:object. The object is a layer, a flow, a list of layers, of which each is checked, a "
    "class of one of these, or a function that gives one: of nflows, normflows, zuko, FrEIA, Pyro or your own. Your "
    "own forward(z) and inverse(z) must return the outputs and the log-determinant. A class or a function is called "
    "with those of features, event_shape, context_features, mask, scale_net and translation_net that it asks for. A "
    "flow's name, such as zuko-nsf, is that flow of the catalogue."
)


def main(
    layer: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=LAYER)],
    features: int = 2,
    shape: tuple[int, ...] = (),
    context_features: int | None = None,
    arguments: Annotated[dict[str, str] | None, tyro.conf.arg(metavar="[NAME VALUE ...]")] = None,
    seconds: float = SECONDS,
) -> int:
    """Is my layer right? Hold it against every flow's laws, and name the mistake.

    python -m adapters.check my_layer:MyLayer

    python -m adapters.check my_layer.py:MyLayer --shape 1 4 4

    python -m adapters.check adapters:MaskedCouplingLayer --context-features 3

    python -m adapters.check my_layer:make_flow --arguments hidden 64 bins 8

    python -m adapters.check zuko-nsf

    The exit status is 0 if all laws hold, and 1 if one does not.

    Args:
        features: how many coordinates a vector has.
        shape: the shape of one event instead, such as 1 4 4 for an image.
        context_features: how many numbers the context has that the layer is given; by default it is given none.
        arguments: names and values of other things that it asks for.
        seconds: how many seconds one call may take.
    """
    event_shape = tuple(shape) or (features,)
    torch.manual_seed(0)  # the same report each time
    try:
        values = {name: _value(text) for name, text in (arguments or {}).items()}
        thing = _made(layer, event_shape, context_features, values)
    except Exception as error:
        print(f"{WRONG} {error if isinstance(error, Wrong) else said(error)}")
        return 1
    reports = [check(one, event_shape, context_features, seconds) for one in layers_of(thing)]
    print(*reports, sep="\n\n")
    return 0 if reports and all(reports) else 1


def _made(name: str, event_shape: tuple[int, ...], context_features: int | None, arguments: dict[str, Any]) -> Any:
    """What the name says: something of anybody's own, or a flow of the catalogue, which is of vectors."""
    if is_own(name) or Path(name).suffix == ".py":
        return make(load(name), Offer(event_shape, context_features), arguments, "--arguments")
    flow = build_flow(name, math.prod(event_shape), context_features, **arguments)
    if len(event_shape) > 1:
        raise ValueError(f"{name} is a flow of vectors: give --features {math.prod(event_shape)} instead of --shape")
    return flow


def _value(text: str) -> Any:
    """``3``, ``[1, 2]``, ``None`` as Python reads them; any other text is itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    with until_nobody_reads():
        sys.exit(tyro.cli(main, prog="python -m adapters.check"))
