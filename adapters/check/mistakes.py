"""The usual mistakes: each is a small function of the measured quantities that says whether it explains the numbers.

A mistake names itself, the laws whose failure it explains, and says what to write instead. To add one: write the
function under ``@mistake``. Those above are tried first, and the first that explains the numbers is named.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.check.evidence import WIDE, Evidence, is_mask
from adapters.check.measure import EXACT, is_rounded, jacobian, own_tensors, same, seeded
from adapters.check.passes import EXP, Pass, equation_15, equation_16
from adapters.check.subject import FORWARD, INVERSE, OTHER, Wrong, place
from adapters.check.words import number, numbers

EQUATIONS = {
    15: "Equation 15 of the exercise: z' = b ⊙ z + (1 − b) ⊙ (z ⊙ exp(s(b ⊙ z)) + t(b ⊙ z))",
    16: "Equation 16 of the exercise: z = b ⊙ z' + (1 − b) ⊙ ((z' − t(b ⊙ z')) ⊙ exp(−s(b ⊙ z')))",
    17: "Equation 17 of the exercise: log|det J_T(z)| = Σ_d (1 − b_d) s_d(b ⊙ z)",
}
ALL = ("mask", "round_trip", "forward_log_det", "inverse_log_det", "equations", "samples", "mass")


class Diagnosis(NamedTuple):
    """A mistake that explains what was measured.

    Attributes:
        mistake: its name.
        words: where, and what to write instead.
        explains: the laws that fail because of it.
    """

    mistake: str
    words: str
    explains: tuple[str, ...]


class Mistake(NamedTuple):
    """A usual mistake.

    Attributes:
        name: as the report says it.
        laws: where one of these fails, it is tried.
        explains: the laws that it breaks as well.
        explain: of the evidence and the law's name, what to write instead; None where it does not explain the numbers.
    """

    name: str
    laws: tuple[str, ...]
    explains: tuple[str, ...]
    explain: Callable[[Evidence, str], str | None]


MISTAKES: list[Mistake] = []


def mistake(name: str, *laws: str, explains: tuple[str, ...] = ()) -> Callable:
    """Register a function as the mistake of that name, to be tried where one of the laws fails.

    The function takes the evidence and the law's name, and returns what to write instead, or None.
    """

    def register(explain: Callable[[Evidence, str], str | None]) -> Callable:
        MISTAKES.append(Mistake(name, laws, explains, explain))
        return explain

    return register


def diagnose(e: Evidence, law: str) -> Diagnosis | None:
    """The first mistake that explains why this law failed; None if none does."""
    for name, laws, explains, explain in MISTAKES:
        if law not in laws:
            continue
        try:
            words = explain(e, law)
        except (Wrong, RuntimeError):  # a call that this one needs fails
            continue
        if words:
            return Diagnosis(name, words, (law, *explains))
    return None


def _at(e: Evidence, direction: str) -> str:
    return place(e.subject.transform, direction)


def _coupling(e: Evidence, number: int) -> str:
    """The equation, on a line of its own, for a layer with a mask, of which it may be one."""
    return f"\n{EQUATIONS[number]}" if e.mask is not None else ""


# Which coordinates are transformed


@mistake("the mask is drawn anew at each call", "twice", explains=(*ALL, "device"))
def mask_drawn_anew(e: Evidence, law: str) -> str | None:
    for p in (e.forward, e.inverse):
        kept = {tuple(e.passed(p.direction, p.x).kept.tolist()) for _ in range(8)}
        if len(kept) > 1 and any(map(any, kept)):
            return (
                f"{_at(e, p.direction)} leaves other coordinates unchanged in each call: draw the mask once, in "
                "__init__, and keep it by self.register_buffer('mask', mask); exercise 2.5 says so, too"
            )
    return None


@mistake("the layer changes itself at each call", "twice", explains=ALL)
def changes_itself(e: Evidence, law: str) -> str | None:
    before = {name: value.clone() for name, value in e.subject.module.state_dict().items()}
    for direction in (FORWARD, INVERSE):
        e.passed(direction, 0.9 * e.x)
    changed = [name for name, value in e.subject.module.state_dict().items() if not torch.equal(value, before[name])]
    if changed:
        return f"a call in evaluation mode changes {', '.join(changed[:3])}: do that only if self.training"
    return None


@mistake("random numbers within", "twice", explains=ALL)
def random_within(e: Evidence, law: str) -> str | None:
    p = e.forward
    answers = []
    for _ in range(2):
        with torch.no_grad(), seeded():
            answers.append(p.function(p.x.clone(), p.context)[0])
    if same(answers[0], answers[1]):
        return (
            "with the same seed the answers agree, so that random numbers are drawn within: draw them once, in "
            "__init__, and say training=self.training to dropout"
        )
    return None


@mistake("the mask is a parameter, which training changes", "mask", "round_trip", "forward_log_det", explains=ALL)
def trained_mask(e: Evidence, law: str) -> str | None:
    for name, value in own_tensors(e.make().transform):
        if is_mask(name, value) and value.requires_grad:
            return (
                f"{name} is moved as every parameter is, and is no longer 0 and 1: write "
                f"self.register_buffer({name!r}, mask) in __init__"
            )
    return None


@mistake("b and 1 − b are swapped between forward and inverse", "mask", "round_trip", explains=ALL)
def swapped(e: Evidence, law: str) -> str | None:
    forward, inverse = e.forward.kept, e.inverse.kept
    if not (forward.any() and inverse.any() and torch.equal(forward, ~inverse)):
        return None
    which = FORWARD if e.mask is not None and torch.equal(inverse, e.mask[1]) else INVERSE
    return (
        f"forward leaves coordinates {_indices(forward)} unchanged, inverse {_indices(inverse)}: both must leave the "
        f"same ones, those where b = 1; mend {_at(e, which)}{_coupling(e, 15 if which == FORWARD else 16)}"
    )


@mistake("the mask is inverted", "mask", explains=ALL)
def inverted(e: Evidence, law: str) -> str | None:
    if e.mask is None or not torch.equal(e.forward.kept, ~e.mask[1]):
        return None
    return (
        f"exactly the coordinates where {e.mask[0]} is 0 ({_indices(e.forward.kept)}) come through unchanged. Here 1 "
        f"means unchanged and 0 transformed: use b where 1 − b stands, and 1 − b for b{_coupling(e, 15)}"
    )


@mistake("the factor (1 − b) is missing", "mask", explains=ALL)
def factor_missing_in_outputs(e: Evidence, law: str) -> str | None:
    assert e.mask is not None
    b = e.mask[1]
    for p, formula, equation in ((e.forward, equation_15, 15), (e.inverse, equation_16, 16)):
        if p.kept.any():
            continue
        x, y = p.flat
        for s_name, s in p.gave:
            for t_name, t in p.gave:
                whole = formula(x, s, t)
                if s is t or not same(y[:, ~b], whole[:, ~b]):
                    continue
                for what, wanted in (("b ⊙ z + ", x + whole), ("", whole)):
                    if same(y[:, b], wanted[:, b]):
                        return (
                            f"{_at(e, p.direction)} returns {what}the transformed z everywhere, with s from {s_name} "
                            f"and t from {t_name}: multiply that by (1 − b), and add b ⊙ z{_coupling(e, equation)}"
                        )
                zero = torch.zeros_like(x)
                for what, wanted in (
                    (f"s (from {s_name})", formula(x, s, zero)),
                    (f"t (from {t_name})", formula(x, zero, t)),
                ):
                    if same(y[:, b], wanted[:, b]):
                        return (
                            f"{_at(e, p.direction)} uses {what} at unchanged coordinates too: multiply it by (1 − b)"
                            f"{_coupling(e, equation)}"
                        )
    return None


@mistake("nothing is left unchanged", "mask")
def nothing_kept(e: Evidence, law: str) -> str | None:
    assert e.mask is not None
    if cut_off(e, law):  # there too
        return None
    for p, equation in ((e.forward, 15), (e.inverse, 16)):
        if not p.kept.any():
            return (
                f"{_at(e, p.direction)} changes every coordinate, whatever {e.mask[0]} says: z must come through where "
                f"b = 1{_coupling(e, equation)}"
            )
    return None


# What the networks see


UNMASKED = "the networks see unmasked z"


@mistake(UNMASKED, "round_trip", explains=ALL)
def unmasked(e: Evidence, law: str) -> str | None:
    changed = ~e.forward.kept
    if not changed.any() or changed.all():
        return None
    for p, equation in ((e.forward, 15), (e.back, 16))[: 1 if e.slow else 2]:
        if found := _sees_changed(e, p, changed):
            name, alone = found
            seen = "the coordinates that are transformed, and not those that stay" if alone else "all of z"
            return (
                f"{_at(e, p.direction)} gives {name.split('.')[0]} {seen}, so that the transformed coordinates depend "
                f"on one another: give it b ⊙ z{_coupling(e, equation)}"
            )
    if e.mask is None or not torch.equal(changed, ~e.inverse.kept) or not _entangled(e.forward, changed):
        return None
    return f"a transformed coordinate depends on the other transformed ones: give the networks b ⊙ z{_coupling(e, 15)}"


def _sees_changed(e: Evidence, p: Pass, changed: Tensor) -> tuple[str, bool] | None:
    """A network that is given coordinates that change, and gives other answers for others, and if it is given no more.

    None, too, where each changed coordinate depends on those before it only, as an autoregressive layer's do.
    """
    x, _ = p.flat
    stay, change = (set(map(tuple, x[:, which].T.tolist())) for which in (~changed, changed))
    others = e.passed(p.direction, torch.where(changed, x.roll(1, 0), x).view_as(p.x))
    for (name, given, gave), (other, _, otherwise) in zip(p.seen, others.seen, strict=False):
        columns = set(map(tuple, given.flatten(1).T.tolist()))
        if name == other and columns & change and not same(otherwise, gave) and _entangled(p, changed, mutually=True):
            return name, not columns & stay
    return None


def _entangled(p: Pass, changed: Tensor, mutually: bool = False) -> bool:
    """Whether a changed coordinate depends on another one, or two on each other; one alone can't tell."""
    slopes = p.jacobian if p.undoes is None or len(changed) > WIDE else replace(p, undoes=None).jacobian
    among = (slopes[:, changed][:, :, changed].abs() > EXACT).any(0).fill_diagonal_(False)
    return bool((among & among.T).any() or len(among) == 1) if mutually else bool(among.any())


# Rows


def _by_statistics(e: Evidence) -> str | None:
    """The direction in which a row's outputs depend on the other rows, but not on their order, as a mean does."""
    for p in e.passes:
        fewer = p.function(p.x[1:], None if e.context is None else e.context[1:])[0]
        backwards = p.function(p.x.flip(0), None if e.context is None else e.context.flip(0))[0]
        if not same(fewer, p.y[1:]) and same(backwards.flip(0), p.y):
            return p.direction
    return None


@mistake("a row is given another row's context", "rows", explains=ALL)
def contexts_mixed(e: Evidence, law: str) -> str | None:
    if e.context is None:
        return None
    for p in e.passes:
        one = e.context[:1].expand_as(e.context)
        if same(p.function(p.x[1:], one[1:])[0], p.function(p.x, one)[0][1:]):
            return (
                f"where all rows have one context, {_at(e, p.direction)} keeps them apart, and otherwise not: give "
                "each row of z its own row of the context, and no mean, first row or other order of them"
            )
    return None


@mistake("BatchNorm couples the rows", "rows", explains=ALL)
def batch_norm(e: Evidence, law: str) -> str | None:
    named = [name for name, part in e.subject.module.named_modules() if "batchnorm" in type(part).__name__.lower()]
    if not (named and _by_statistics(e)):
        return None
    return (
        f"{named[0]} takes mean and variance from the rows of the batch, in evaluation mode too, so that p(x) depends "
        "on the other rows: let it keep running statistics, and call eval() before log_prob and sample"
    )


@mistake("statistics of the batch couple the rows", "rows", explains=ALL)
def batch_statistics(e: Evidence, law: str) -> str | None:
    direction = _by_statistics(e)
    if direction is None:
        return None
    return (
        f"{_at(e, direction)} makes a row's outputs from its neighbours as well, in whatever order they come: a mean "
        "or a variance is taken along the rows, dim 0. Take it if self.training only, and keep it as a buffer"
    )


@mistake("log-determinant summed over the batch", "rows", explains=ALL)
def batch_sum_seen_by_rows(e: Evidence, law: str) -> str | None:
    for p in (e.forward, e.back):
        if same(p.log_det, p.exact.sum().expand_as(p.log_det)):
            return _summed(e, p)
    return None


@mistake("log-determinant is a mean", "rows", explains=ALL)
def batch_mean_seen_by_rows(e: Evidence, law: str) -> str | None:
    for p in (e.forward, e.back):
        for divisor in (1, e.size, int((~p.kept).sum())):
            if same(p.log_det, (p.exact.mean() / max(divisor, 1)).expand_as(p.log_det)):
                return f"{_at(e, p.direction)} returns the mean of all rows for each of them: {_sum_it(e)}"
    return None


def _summed(e: Evidence, p: Pass) -> str:
    return f"{_at(e, p.direction)} returns the sum of all rows' log-determinants for each of them: {_sum_it(e)}"


def _sum_it(e: Evidence) -> str:
    return f"sum over all dimensions but the first, s.flatten(1).sum(1), with (1 − b) ⊙ s for s{_coupling(e, 17)}"


# Cut off


@mistake("outputs are cut off", "round_trip", "forward_log_det", "inverse_log_det", explains=(*ALL, "precision"))
def cut_off(e: Evidence, law: str) -> str | None:
    for p in e.repeatable:
        aside = 1e-5 * torch.randn(p.x.shape, generator=torch.Generator().manual_seed(8), dtype=p.x.dtype)
        with torch.no_grad():
            still = (p.jacobian == 0).all(2) & (p.function(p.x + aside, p.context)[0].flatten(1) == p.flat[1])
        if p.undoes is None and still.any():
            row, i = map(int, still.nonzero()[0])
            return (
                f"{_at(e, p.direction)} gives {number(p.flat[1][row, i])} at coordinate {i} of z = "
                f"{numbers(p.x[row])}, whatever z is near there, so that no inverse can tell where it came from: "
                "clamp, relu, round or the like makes it so. Bound s instead, by a tanh at the end of its network"
            )
    return None


# Inverse


@mistake("inverse returns its input", "round_trip", explains=("inverse_log_det", "samples", "mass"))
def inverse_is_identity(e: Evidence, law: str) -> str | None:
    return f"inverse(z') is z' itself: let it undo forward{_coupling(e, 16)}" if e.inverse.kept.all() else None


class Slip(NamedTuple):
    """What a direction computes where its equation asks for something else.

    Attributes:
        name: what it does.
        of: the right formula, a key of ``UNDONE_BY``.
        formula: of what it is given, of exp(s) and of t.
        remedy: what to write instead.
    """

    name: str
    of: str
    formula: Callable[[Tensor, Tensor, Tensor], Tensor]
    remedy: str


EQUATION_15, EQUATION_16, GLOW = "z ⊙ exp(s) + t", "(z' − t) ⊙ exp(−s)", "z' ⊙ exp(−s) − t"
UNDONE_BY = {  # exp(s) and t of each formula, of a and t in the line a ⊙ z + t that undoes it
    EQUATION_15: lambda a, t: (1 / a, -t / a),
    EQUATION_16: lambda a, t: (a, t),
    GLOW: lambda a, t: (a, t / a),
}
SLIPS = (  # those of equation 15 first, which forward is tried as
    Slip("uses −s", EQUATION_15, lambda z, a, t: z / a + t, "it multiplies by exp(−s): write exp(+s)"),
    Slip("subtracts t", EQUATION_15, lambda z, a, t: z * a - t, "it subtracts t, as {other} does: add it"),
    Slip("multiplies by s", EQUATION_15, lambda z, a, t: z * a.log() + t, "it computes z ⊙ s + t: write exp(s)"),
    Slip("does not scale", EQUATION_15, lambda z, a, t: z + t, "it computes z + t: multiply z by exp(s)"),
    Slip("does not shift", EQUATION_15, lambda z, a, t: z * a, "it leaves out t: add what {other} subtracts"),
    Slip("uses +s", EQUATION_16, lambda y, a, t: (y - t) * a, "it multiplies by exp(+s): write exp(−s)"),
    Slip(
        "subtracts t after scaling",
        EQUATION_16,
        lambda y, a, t: y / a - t,
        "it computes z' ⊙ exp(−s) − t: subtract t first, (z' − t) ⊙ exp(−s)",
    ),
    Slip("adds t", EQUATION_16, lambda y, a, t: (y + t) / a, "it adds t, as {other} does: subtract it"),
    Slip("does not scale", EQUATION_16, lambda y, a, t: y - t, "it computes z' − t: multiply that by exp(−s)"),
    Slip("does not shift", EQUATION_16, lambda y, a, t: y / a, "it leaves out t: subtract what {other} adds"),
    Slip(
        "shifts and scales as {other} does",
        EQUATION_16,
        lambda y, a, t: y * a + t,
        "it computes z' ⊙ exp(s) + t again: write (z' − t) ⊙ exp(−s)",
    ),
    Slip(
        "uses +s and subtracts t after scaling",
        EQUATION_16,
        lambda y, a, t: y * a - t,
        "it computes z' ⊙ exp(+s) − t: write (z' − t) ⊙ exp(−s)",
    ),
    Slip("uses +s", GLOW, lambda y, a, t: y * a - t, "it multiplies by exp(+s), as {other} does: write exp(−s)"),
    Slip("does not scale", GLOW, lambda y, a, t: y - t, "it computes z' − t: multiply z' by exp(−s)"),
)


def _may_be(e: Evidence, direction: str) -> tuple[str, ...]:
    """The formulas of which that direction may be meant as one: the equation, where the other is seen to be one."""
    if direction == INVERSE:
        return (EQUATION_15,) if e.forward.networks(equation_16) else (EQUATION_16, GLOW)
    return (EQUATION_16,) if e.back.networks(equation_15) else (EQUATION_15, EQUATION_16)


def _slip(slip: Slip, direction: str) -> Callable:
    def explain(e: Evidence, law: str) -> str | None:
        wide = e.slow or e.size > WIDE  # to be differentiated backwards
        if e.suspect != direction or slip.of not in _may_be(e, direction) or (direction == FORWARD and wide):
            return None
        if direction == INVERSE:
            pairs = (e.back, e.forward), (e.inverse, e.forth)
        else:
            pairs = (e.forward, replace(e.back, undoes=None)), (e.forth, replace(e.inverse, undoes=None))
        for wrong, right in pairs:
            changed = ~right.kept
            scale, t = UNDONE_BY[slip.of](*(part[:, changed] for part in right.line))
            given, found = (flat[:, changed] for flat in wrong.flat)
            if changed.any() and same(found, slip.formula(given, scale, t)):
                words = f"in {_at(e, direction)} {_of_other(slip.remedy, direction)}"
                if same(scale, torch.ones_like(scale)):  # there is no s to speak of
                    return words
                return f"{words}{_coupling(e, 15 if slip.of == EQUATION_15 else 16)}"
        return None

    return explain


def _of_other(words: str, direction: str) -> str:
    return words.format(other=OTHER[direction])


for _direction, _explains in ((INVERSE, ()), (FORWARD, ("forward_log_det",))):
    for _one in SLIPS:
        mistake(
            f"{_direction} {_of_other(_one.name, _direction)}",
            "round_trip",
            explains=(*_explains, "inverse_log_det", "samples", "mass"),
        )(_slip(_one, _direction))


@mistake("inverse does what forward does", "round_trip", explains=("inverse_log_det", "samples", "mass"))
def inverse_is_forward(e: Evidence, law: str) -> str | None:
    again = e.passed(FORWARD, e.inverse.x)
    return f"inverse(z) is forward(z): let it undo forward{_coupling(e, 16)}" if same(e.inverse.y, again.y) else None


# The log-determinant


def _log_det(name: str, explains: tuple[str, ...] = ()) -> Callable:
    """A mistake in one direction's log-determinant, but where that is right for the map that it should be.

    The function is given that direction's pass, too.
    """

    def register(explain: Callable[[Evidence, Pass], str | None]) -> Callable:
        def of_law(e: Evidence, law: str) -> str | None:
            p = e.at(law.removesuffix("_log_det"))
            words = None if e.contradiction else explain(e, p)
            return f"in {_at(e, p.direction)}: {words}" if words else None

        mistake(name, "forward_log_det", "inverse_log_det", explains=("samples", "mass", *explains))(of_law)
        return explain

    return register


@_log_det("wrong sign of the log-determinant")
def wrong_sign(e: Evidence, p: Pass) -> str | None:
    if not same(p.log_det, -p.exact):
        return None
    words = f"each row's log_det is minus autograd's: change its sign, to that of {p.direction}'s own Jacobian"
    if e.mask is None:
        return words
    sign = "−" if p.direction == INVERSE else "+"
    return f"{words}, {sign} Σ (1 − b) ⊙ s where forward multiplies by exp(s){_coupling(e, 17)}"


@_log_det("log-determinant is left out")
def left_out(e: Evidence, p: Pass) -> str | None:
    return f"it is 0 in every row: add it{_coupling(e, 17)}" if same(p.log_det, torch.zeros_like(p.log_det)) else None


@_log_det("log-determinant summed over the batch")
def batch_sum(e: Evidence, p: Pass) -> str | None:
    return _summed(e, p) if same(p.log_det, p.exact.sum().expand_as(p.log_det)) else None


@_log_det("the factor (1 − b) is missing")
def factor_missing(e: Evidence, p: Pass) -> str | None:
    if not p.kept.any():
        return None
    for name, s in p.gave:
        for sign in (1, -1):
            if same(sign * s.sum(1), p.log_det) and same(sign * s[:, ~p.kept].sum(1), p.exact):
                return (
                    f"log_det is the sum of all of s (from {name}), those at unchanged coordinates too: multiply s by "
                    f"(1 − b) before the sum{_coupling(e, 17)}"
                )
    return None


@_log_det("b stands where 1 − b should, in the log-determinant")
def factor_inverted(e: Evidence, p: Pass) -> str | None:
    if not p.kept.any():
        return None
    for name, s in p.gave:
        for sign in (1, -1):
            if same(sign * s[:, p.kept].sum(1), p.log_det) and same(sign * s[:, ~p.kept].sum(1), p.exact):
                return (
                    f"log_det sums s (from {name}) where the coordinates are unchanged: multiply it by (1 − b), not b"
                    f"{_coupling(e, 17)}"
                )
    return None


@_log_det("log-determinant of another s than the one used")
def other_s(e: Evidence, p: Pass) -> str | None:
    used = [(name, sign) for name, s in p.gave for sign in (1, -1) if same(sign * s[:, ~p.kept].sum(1), p.exact)]
    for name, s in p.gave:
        for sign in (1, -1):
            if used and any(same(sign * part.sum(1), p.log_det) for part in (s, s[:, ~p.kept])):
                return (
                    f"z is scaled by exp of {used[0][0]}, but log_det sums {name}: use one s in both{_coupling(e, 17)}"
                )
            if (
                not used
                and p.exact.isfinite().all()
                and any(same(sign * part.sum(1), p.log_det) for part in (s, s[:, ~p.kept]))
                and not any(same(value, s) for what, value in p.gave if EXP in what)
            ):
                return (
                    f"log_det sums {name}, but z is not scaled by its exp: sum the logarithm of the scale that is used"
                    f"{_coupling(e, 17)}"
                )
    return None


@_log_det("log-determinant is a mean")
def mean(e: Evidence, p: Pass) -> str | None:
    for count, what in ((e.size, "all coordinates"), (int((~p.kept).sum()), "the transformed coordinates")):
        if count > 1 and same(p.log_det * count, p.exact):
            return f"log_det is {count} times too small, a mean over {what}: {_sum_it(e)}"
    rows = p.exact.mean()
    if any(same(p.log_det, (rows / divisor).expand_as(p.log_det)) for divisor in (1, e.size)):
        return f"log_det is the mean of all rows: {_sum_it(e)}"
    return None


@_log_det("log-determinant of the wrong event dimensions")
def wrong_dimensions(e: Evidence, p: Pass) -> str | None:
    if len(e.event_shape) < 2:
        return None
    sizes = {f"dimension {i + 1}, of {size}": size for i, size in enumerate(e.event_shape)}
    sizes["height × width"] = math.prod(e.event_shape[1:])
    for what, size in sizes.items():
        if size > 1 and same(p.log_det * size, p.exact):
            return f"log_det is {size} times too small, as if {what}, counted once: {_all_dimensions()}"
        if size > 1 and same(p.log_det, p.exact * size):
            return f"log_det is {size} times too large, as if {what}, counted twice: {_all_dimensions()}"
    diagonal = p.jacobian.diagonal(dim1=1, dim2=2).abs().log().view(p.x.shape)
    for dim in range(1, diagonal.dim()):
        for i in range(diagonal.shape[dim]):
            if diagonal.shape[dim] > 1 and same(p.log_det, diagonal.select(dim, i).flatten(1).sum(1)):
                return f"log_det has only index {i} of dimension {dim}: {_all_dimensions()}"
    return None


def _all_dimensions() -> str:
    return "sum over all dimensions of an event, s.flatten(1).sum(1)"


@_log_det("the determinant instead of its logarithm")
def not_log(e: Evidence, p: Pass) -> str | None:
    return "log_det is |det J| itself: take its logarithm" if same(p.log_det, p.exact.exp()) else None


@_log_det("the scale is summed instead of its logarithm")
def sum_of_scales(e: Evidence, p: Pass) -> str | None:
    scales = p.jacobian.diagonal(dim1=1, dim2=2)
    for values in (scales, scales[:, ~p.kept]):
        if same(p.log_det, values.sum(1)):
            return f"log_det is the sum of what z is multiplied by: sum its logarithms{_coupling(e, 17)}"
    return None


@_log_det("log-determinant is off by a constant factor")
def multiple(e: Evidence, p: Pass) -> str | None:
    for base in (2, 10):
        if same(p.log_det * math.log(base), p.exact):
            return f"log_det is a logarithm to base {base}: use the natural one, torch.log"
    factor = (p.log_det @ p.exact / (p.exact @ p.exact)).item()
    words = {2.0: "twice", 0.5: "half"}.get(round(factor, 6))
    same_in_all = same(p.exact, p.exact[:1].expand_as(p.exact))  # then any number is a multiple of it
    if not same(p.log_det, factor * p.exact) or (same_in_all and words is None):
        return None
    times = words or f"{number(factor)} times"
    return f"log_det is {times} autograd's in every row{_coupling(e, 17)}"


@_log_det("detached, or under no_grad", ("inverse_log_det", "gradients"))
def detached(e: Evidence, p: Pass) -> str | None:
    if p.x[0].numel() > 64 or (p.undoes is not None and e.slow):
        return None
    if same(jacobian(p.function, p.x, p.context), p.slopes, 1e-3):  # autograd's own, also of a wide inverse
        return None
    true = torch.linalg.slogdet(p.slopes).logabsdet
    right = "its log_det is right" if same(p.log_det, true, 1e-3) else "its log_det is wrong as well"
    return (
        "autograd's Jacobian is not the one that small steps of z show: something cuts the graph, detach(), no_grad(), "
        f".data or numpy, and gradients will be wrong; {right}"
    )


@_log_det("float32 inside")
def float32(e: Evidence, p: Pass) -> str | None:
    if same(p.log_det, p.exact, 1e-2) and is_rounded(lambda x: p.function(x, p.context), p.x):
        return "it is right to float32's seven digits only: leave out .float() and make new tensors like z"
    return None


mistake(UNMASKED, "forward_log_det", "inverse_log_det", explains=ALL)(unmasked)  # of an inverse that searches


# The exercise's form


@mistake("the direction is data → noise where noise → data is expected", "equations")
def direction(e: Evidence, law: str) -> str | None:
    return (
        "swap forward and inverse: the exercise samples by forward, and scores data by inverse"
        f"{_coupling(e, 15)}{_coupling(e, 16)}"
    )


def _indices(kept: Tensor) -> str:
    found = kept.nonzero().flatten().tolist()
    return f"{', '.join(map(str, found[:6]))}{', …' if len(found) > 6 else ''}"
