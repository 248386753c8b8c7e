"""Whether a module has changed since a pass through it."""

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count_step(*_) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """Steps of all optimisers so far: fused ones change parameters without counting a version of these."""
    return _steps


class Watched:
    """A module's parameters, buffers, submodules and modes, to tell whether they have changed."""

    def __init__(self, module: nn.Module):
        self.module, self.modules = module, list(module.modules())
        self.children = [part._modules for part in self.modules]
        self.identities = [*map(id, _values(self.children))]
        with_tensors = [part for part in self.modules if part._parameters or part._buffers]
        self.tensors = [held for part in with_tensors for held in (part._parameters, part._buffers)]

    def state(self, *tensors: Tensor | None) -> tuple | None:
        """Equal to an earlier one if a pass at these tensors would give the same; ``None`` if nothing can tell.

        Changes in place are seen as autograd counts them: writing through ``.data`` is not.
        """
        if torch.compiler.is_compiling():
            return None
        if [
            *map(id, _values(self.children))
        ] != self.identities:  # a module has been replaced: look for all of them anew
            self.__init__(self.module)
        inside = [tensor for tensor in (*tensors, *_values(self.tensors)) if tensor is not None]
        try:
            versions = [*map(_version, inside)]  # an inference tensor has none
            addresses = [*map(Tensor.data_ptr, inside)]  # within torch.func a tensor has none
        except RuntimeError:
            return None
        grad = torch.is_grad_enabled()
        leaves = [(id(tensor), tensor.requires_grad) for tensor in inside] if grad else []
        return (
            grad,
            optimizer_steps(),
            versions,
            addresses,
            leaves,
            [part.training for part in self.modules],
            self.identities,
        )


_version = attrgetter("_version")


def _values(dictionaries: Iterable[dict]) -> Iterator:
    return chain.from_iterable(map(dict.values, dictionaries))
