"""The measures: functions of tensors and of layers, which laws, mistakes, comparisons and tests use."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adapters.check.subject import Wrong

EXACT = 1e-6  # relative error up to which two values that float64 gives are the same
LARGEST, WORST = 1e3, 1e5  # |f(x)|, |J| and condition number of J up to which float64 tells right from wrong
AT_ONCE = 250_000  # numbers in one batch, of copies of a row, by which a Jacobian is found
ROUGH = 4e-3  # of ``roughness``: about 1e-6 in float64, up to 1.5e-3 for a search, 7e-3 to 0.1 where float32 is within
STEP = 1e-6  # h of ``roughness``
COARSE, COARSELY = 1e-3, 0.05  # h that shows half precision, and the roughness there; a smooth function has about h
LOW = (torch.float16, torch.bfloat16, torch.float32)  # dtypes of fewer digits than float64's
Function = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]  # rows and contexts to outputs and log-determinants


def is_tame(y: Tensor, jacobians: Tensor | None = None) -> bool:
    """Whether float64 can tell a right map from a wrong one by its outputs y and its Jacobians there."""
    if not (y.isfinite().all() and (y.abs() <= LARGEST).all()):
        return False
    if jacobians is None:
        return True
    stretched = torch.linalg.svdvals(jacobians)
    low, high = stretched[:, -1], stretched[:, 0]
    return bool((high <= LARGEST).all() and (high <= WORST * low)[low > 0].all())  # singular is not steep, but wrong


def jacobian(function: Function, x: Tensor, context: Tensor | None = None) -> Tensor:
    """J of each row by autograd, ``(rows, D, D)``, of a function that computes each row of y from its own row alone.

    Each row is copied D times, and the i-th copy is asked for the derivatives of y_i: one pass backward serves all.
    """
    size = x[0].numel()
    row, coordinate = torch.cartesian_prod(torch.arange(len(x)), torch.arange(size)).unbind(1)
    found = []
    for rows, coordinates in zip(
        row.split(max(1, AT_ONCE // size)), coordinate.split(max(1, AT_ONCE // size)), strict=True
    ):
        with torch.enable_grad():
            z = x[rows].detach().requires_grad_()
            y = function(z.clone(), None if context is None else context[rows])[0].flatten(1)
            wanted = y.gather(1, coordinates[:, None]).sum()
            slopes = torch.autograd.grad(wanted, z, allow_unused=True)[0] if wanted.requires_grad else None
        found.append(torch.zeros_like(z) if slopes is None else slopes)
    return torch.cat(found).detach().reshape(len(x), size, size)


def log_abs_det(jacobians: Tensor) -> Tensor:
    """log|det J| of each, ``(rows, D, D)`` → ``(rows,)``."""
    return torch.linalg.slogdet(jacobians).logabsdet


def one_by_one(function: Callable, x: Tensor, context: Tensor | None = None) -> Iterator:
    """What the function gives for each row by itself, with its own row of the context."""
    for row in range(len(x)):
        yield function(x[row : row + 1].clone(), None if context is None else context[row : row + 1])


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Within, random numbers of the CPU begin at that seed; afterwards they go on as before, as other devices' do."""
    before = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(before)


def points(rows: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal numbers, made short to read: hundredths, none of which is a likely edge of a bin."""
    normal = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((normal * 20).round() * 5 + 1) / 100


def move(module: nn.Module, scale: float, seed: int = 0) -> None:
    """Add N(0, scale²) to every parameter that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters()):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def own_tensors(thing) -> list[tuple[str, Tensor]]:
    """The tensors that an object itself holds, not its submodules: parameters, buffers and plain attributes."""
    kept = {**getattr(thing, "_parameters", {}), **getattr(thing, "_buffers", {}), **getattr(thing, "__dict__", {})}
    return [(name, value) for name, value in kept.items() if isinstance(value, Tensor)]


def same(found: Tensor, wanted: Tensor, tolerance: float = EXACT) -> bool:
    """Whether all values agree, relative to their sizes; nothing agrees with NaN, infinity or another shape."""
    if found.shape != wanted.shape or not wanted.isfinite().all():
        return False
    return bool((relative(found, wanted) <= tolerance).all())


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    """|found − wanted| / (1 + |wanted|) of each value."""
    return (found - wanted).abs() / (1 + wanted.abs())


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each row, the largest such error; NaN where anything is NaN."""
    return relative(found, wanted).flatten(1).amax(1)


def worst_of(errors: Tensor, lost: float = 0.0) -> float:
    """The largest but for that share of them; infinite where it is NaN."""
    ordered = errors.nan_to_num(math.inf, math.inf).sort().values
    return ordered[math.ceil((1 - lost) * len(ordered)) - 1].item()


@torch.no_grad()
def roughness(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, step: float = STEP) -> float:
    """How rough outputs and log-determinant are over steps of h: the median over the rows, for kinks' sake.

    Of a smooth function, |f(x + h) − 2 f(x) + f(x − h)| is about h² and |f(x + h) − f(x − h)| about h. Where float32 is
    within, either has its rounding, 1e-7.
    """
    move = step * torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    (below, low), (here, middle), (above, high) = (function(x + k * move) for k in (-1, 0, 1))
    below, here, above = below.flatten(1), here.flatten(1), above.flatten(1)
    rough = (above - 2 * here + below).norm(dim=1) / ((above - below).norm(dim=1) + step)
    rough_log_det = (high - 2 * middle + low).abs() / ((high - low).abs() + step)
    return max(rough.median().item(), rough_log_det.median().item())


def is_rounded(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> str:
    """The dtype of fewer digits that x goes through on its way, if its rounding shows in the answers; else nothing.

    What float32 makes rough is smoother over steps ten times as long, where what is rough because it is steep, as some
    splines are, is rougher. Half precision is a staircase that small steps don't see. A search that ends within its
    tolerance is as rough as float32, and yet float64 throughout.
    """
    rough = roughness(function, x)
    if rough > ROUGH and roughness(function, x, 10 * STEP) < rough / 2:
        return _dtype_within(function, x)
    with suppress(Wrong):  # longer steps may leave what it takes
        if roughness(function, x, COARSE) > COARSELY:
            return _dtype_within(function, x, (torch.float16, torch.bfloat16))
    return ""


class _Lower(TorchFunctionMode):
    """Within, notes the sums of all tensors of some dtypes that functions of torch are given or give."""

    def __init__(self, dtypes: tuple[torch.dtype, ...]):
        super().__init__()
        self.dtypes, self.found = dtypes, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        for value in (*args, *(answer if isinstance(answer, tuple) else (answer,))):
            if isinstance(value, Tensor) and value.dtype in self.dtypes:
                self.found.append((value.dtype, value.double().sum().item()))
        return answer


@torch.no_grad()
def _dtype_within(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, dtypes: tuple[torch.dtype, ...] = LOW
) -> str:
    """The first of these dtypes in which a function computes something that depends on x; empty if there is none.

    A table of float32 that is the same for all x has no part in how rough its answers are.
    """
    found = []
    for rows in (x, x + 0.1):
        try:
            with _Lower(dtypes) as lower:
                function(rows)
        except (Wrong, RuntimeError):  # what can't be watched
            return ""
        found.append(lower.found)
    return next((str(here[0]).removeprefix("torch.") for here, there in zip(*found, strict=False) if here != there), "")


@torch.no_grad()
def mass_error(
    log_prob: Callable[[Tensor], Tensor], drawn: Tensor, low: Tensor, high: Tensor, cells: int
) -> tuple[float, float]:
    """∫p over a box in two dimensions, and the largest |∫p − share of draws| over the rectangles from its corner.

    Mass outside the box does no harm, and lost mass is seen. ∫p is by the midpoint rule, on cells that are small where
    there are many draws.

    Args:
        log_prob: of ``(n, 2)``.
        drawn: samples, ``(n, 2)``.
        low, high: corners of the box, ``(2,)``.
        cells: how many along an axis.
    """
    inside = drawn[((drawn >= low) & (drawn <= high)).all(1)]
    even = torch.linspace(0, 1, cells // 2 + 1, dtype=drawn.dtype)
    edges = [
        torch.cat((start + (end - start) * even, torch.quantile(column, even[1:-1]))).sort().values
        for start, end, column in zip(low, high, inside.unbind(1), strict=True)
    ]
    middles, widths = zip(*[((edge[1:] + edge[:-1]) / 2, edge.diff()) for edge in edges], strict=True)
    values = torch.cat([log_prob(chunk).exp() for chunk in torch.cartesian_prod(*middles).split(50_000)])
    mass = values.view(len(widths[0]), -1) * widths[0][:, None] * widths[1]
    place = [
        (torch.bucketize(c.contiguous(), e) - 1).clamp(min=0) for c, e in zip(inside.unbind(1), edges, strict=True)
    ]
    share = torch.bincount(place[0] * mass.shape[1] + place[1], minlength=mass.numel()).view_as(mass) / len(drawn)
    errors = (mass - share).cumsum(0).cumsum(1).abs()
    return mass.sum().item(), errors.max().item() if not errors.isnan().any() else math.nan
