"""A library's transforms one after the other: each is adapted by itself, and nflows runs them."""

from abc import abstractmethod
from collections.abc import Iterable

from nflows.transforms import CompositeTransform, InverseNotAvailable, Transform
from torch import Tensor

from adapters.bridges.common.context import Width, one_width
from adapters.checks import check_context, naming_shape
from adapters.finite import finite_rows


class Leaf(Transform):
    """One transform of a library, adapted: a part of a ``Chain``. A subclass defines ``run``.

    Attributes:
        name: what errors call it.
        context_width: of the context that it reads.
        has_inverse: whether it also runs noise → data.
        takes_any_row: whether a row that is not finite leaves the results of all other rows as they are.
    """

    name: str
    context_width: Width
    has_inverse: bool = True
    takes_any_row: bool = True

    @abstractmethod
    def run(self, inputs: Tensor, context: Tensor | None, to_noise: bool) -> tuple[Tensor, Tensor]:
        """Outputs and log-determinants ``(batch,)``, data → noise (``to_noise``) or noise → data."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run_named(inputs, context, to_noise=True)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self._run_named(inputs, context, to_noise=False)

    def _run_named(self, inputs: Tensor, context: Tensor | None, to_noise: bool) -> tuple[Tensor, Tensor]:
        try:
            return self.run(inputs, context, to_noise)
        except (RuntimeError, IndexError):
            with naming_shape(inputs, self.name):  # entered only now, since each leaf would pay for it in each call
                raise


class Chain(CompositeTransform):
    """nflows' ``CompositeTransform`` of leaves. It checks the context once for all of them.

    Every leaf is given the context, whether it reads it or not.

    Args:
        leaves: the first one runs first in ``forward``, data → noise.
        widths_of_base: widths of the context that the parts of the flow's base read.

    Raises:
        InverseNotAvailable: in ``inverse``, if a leaf has none.
        ValueError: if parts of the flow read contexts of different widths; in a call, for a context that is missing,
            superfluous or of another shape.
    """

    def __init__(self, leaves: Iterable[Leaf], widths_of_base: Iterable[Width] = ()):
        leaves = list(leaves)
        super().__init__(leaves)
        self.name = ", ".join(dict.fromkeys(leaf.name for leaf in leaves)) or "an empty composition"
        widths = [*widths_of_base, *(leaf.context_width for leaf in reversed(leaves))]
        self.context_features = one_width(widths, f"the context of {self.name}")
        self.one_way = list(dict.fromkeys(leaf.name for leaf in leaves if not leaf.has_inverse))
        self.takes_any_row = all(leaf.takes_any_row for leaf in leaves)

    @finite_rows
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_context(context, self.context_features, inputs, self.name)
        return super().forward(inputs, context)

    @finite_rows
    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.one_way:
            have = "has" if len(self.one_way) == 1 else "have"
            raise InverseNotAvailable(f"{', '.join(self.one_way)} {have} no inverse, so this flow cannot sample")
        check_context(context, self.context_features, inputs, self.name)
        return super().inverse(inputs, context)
