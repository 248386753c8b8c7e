"""Flows as sbi's density estimators.

Their tensors are of shape ``(sample, batch, *event)``, where nflows has ``(batch, sample, *event)``.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from adapters.bridges.common.on_demand import class_on_demand
from adapters.bridges.common.simulations import TRAINERS, Pairs, check_not_swapped
from adapters.checks import check_tensor, explain_mismatch, sizes
from adapters.flow import Flow
from adapters.imports import import_sbi


@class_on_demand
def conditional_estimator() -> type:
    """The class of a posterior's or a likelihood's estimator."""

    class ConditionalFlowEstimator(import_sbi().ConditionalDensityEstimator):
        """A flow as sbi's conditional density estimator.

        Args:
            flow: its context is the embedded condition.
            embedding_net: maps conditions ``(rows, *condition_shape)`` to ``(rows, C)``.
            input_shape, condition_shape: of one datum, and of what it is conditioned on.

        Attributes:
            made_of: the simulations that it was made of, until its first loss tells that it is given them the right way
                round; ``None`` from then on, in a copy and in a pickle.
        """

        made_of: Pairs | None = None

        def __init__(self, flow: Flow, embedding_net: nn.Module, input_shape: torch.Size, condition_shape: torch.Size):
            super().__init__(flow, input_shape, condition_shape)
            self._embedding_net = embedding_net

        @property
        def embedding_net(self) -> nn.Module:
            return self._embedding_net

        def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
            """``([sample,] batch, *event)`` of either, which broadcast with each other → ``(sample, batch)``."""
            found = self._of_pairs(self.net.log_prob, input, condition)
            return found if found.dim() > 1 else found.unsqueeze(0)

        def loss(self, input: Tensor, condition: Tensor) -> Tensor:
            """−log p of each pair: ``(batch, *event)`` of either → ``(batch,)``."""
            loss = -self._of_pairs(self.net.log_prob, input, condition)
            if self.made_of is not None and loss.numel():
                check_not_swapped(self.made_of, input, condition)
                self.made_of = None
            return loss

        def forward(self, *args: Any) -> NoReturn:
            """Refused: NRE calls its classifier so."""
            raise TypeError(f"NRE trains a classifier, and takes no flow: {TRAINERS}")

        def inverse_transform(self, input: Tensor, condition: Tensor) -> Tensor:
            """The noise of the inputs, ``(*batch, *event)``, of which sbi's tests of calibration ask the density."""
            return self._of_pairs(self.net.encode, input, condition)

        def sample(self, sample_shape: torch.Size, condition: Tensor) -> Tensor:
            """Conditions ``(batch, *event)`` → ``(*sample_shape, batch, *event)``."""
            return self._drawn(self.net.sample, sample_shape, condition)[0]

        def sample_and_log_prob(self, sample_shape: torch.Size, condition: Tensor) -> tuple[Tensor, ...]:
            """Samples, as ``sample`` gives them, and log p of each, ``(*sample_shape, batch)``, of the same pass."""
            return self._drawn(self.net.sample_and_log_prob, sample_shape, condition)

        def __getstate__(self) -> dict[str, Any]:
            return self.__dict__ | {"made_of": None}

        def _of_pairs(self, function: Callable, input: Tensor, condition: Tensor) -> Tensor:
            """``function(inputs, contexts)`` for each pair; every condition is embedded once, however many inputs."""
            check_tensor(input, "the input of this estimator")
            self._check_input_shape(input)
            context, batch = self._embedded(condition), input.shape[: input.dim() - len(self.input_shape)]
            try:
                rows = torch.broadcast_shapes(batch, context.shape[:-1])
            except RuntimeError as error:
                raise ValueError(
                    f"a batch of inputs of shape {tuple(batch)} has no match in one of conditions of shape "
                    f"{tuple(context.shape[:-1])}: give as many of either, or one"
                ) from error
            inputs = input.expand(*rows, *self.input_shape).reshape(-1, *self.input_shape)
            found = function(inputs, context.expand(*rows, context.shape[-1]).reshape(-1, context.shape[-1]))
            return found.reshape((*rows, *found.shape[1:]))

        def _drawn(self, function: Callable, sample_shape: torch.Size, condition: Tensor) -> tuple[Tensor, ...]:
            """What ``function(n, contexts)`` returns, each ``(batch, n, …)``, as ``(*sample_shape, batch, …)``."""
            shape, context = sizes(sample_shape, "sample_shape"), self._embedded(condition)
            if context.dim() != 2:
                wanted = ", ".join(["batch", *map(str, self.condition_shape)])
                raise ValueError(f"samples need conditions of shape ({wanted}), not {tuple(condition.shape)}")
            drawn = function(shape.numel(), context)
            parts = drawn if isinstance(drawn, tuple) else (drawn,)
            return tuple(t.transpose(0, 1).reshape(*shape, len(context), *t.shape[2:]) for t in parts)

        def _embedded(self, condition: Tensor) -> Tensor:
            """``(*batch, *condition_shape)`` → ``(*batch, C)``."""
            check_tensor(condition, "the condition of this estimator")
            self._check_condition_shape(condition)
            batch = condition.shape[: condition.dim() - len(self.condition_shape)]
            try:
                context = self._embedding_net(condition.reshape(-1, *self.condition_shape))
            except (RuntimeError, TypeError) as error:
                explain_mismatch(error, self._embedding_net, "estimator", condition=condition)
                raise
            return context.reshape(*batch, context.shape[1])

    return ConditionalFlowEstimator


@class_on_demand
def unconditional_estimator() -> type:
    """The class of a marginal's estimator."""

    class FlowEstimator(import_sbi().UnconditionalDensityEstimator):
        """A flow as sbi's density estimator without a condition: its shapes and gradients are those of sbi's own."""

        def log_prob(self, input: Tensor) -> Tensor:
            """``([sample,] batch, *event)`` → ``([sample,] batch)``."""
            check_tensor(input, "the input of this estimator")
            self._check_input_shape(input)
            batch = input.shape[: input.dim() - len(self.input_shape)]
            return self.net.log_prob(input.reshape(-1, *self.input_shape)).reshape(batch)

        def loss(self, input: Tensor) -> Tensor:
            """−log p: ``(batch, *event)`` → ``(batch,)``."""
            return -self.log_prob(input)

        @torch.no_grad()
        def sample(self, sample_shape: torch.Size) -> Tensor:
            """``(*sample_shape, *event)``, without a graph."""
            shape = sizes(sample_shape, "sample_shape")
            return self.net.sample(shape.numel()).reshape(*shape, *self.input_shape)

        def sample_and_log_prob(self, sample_shape: torch.Size) -> tuple[Tensor, Tensor]:
            """Samples, and log p of each, ``(*sample_shape,)``, of the same pass."""
            shape = sizes(sample_shape, "sample_shape")
            samples, log_prob = self.net.sample_and_log_prob(shape.numel())
            return samples.reshape(*shape, *self.input_shape), log_prob.reshape(shape)

    return FlowEstimator
