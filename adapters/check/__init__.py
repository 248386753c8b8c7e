"""Is my layer right? The laws of every flow, held against anybody's layer, and the mistakes that explain a failure.

``check`` is the whole of it in Python, ``python -m adapters.check my_layer:MyLayer`` on a command line.

- ``subject``: whatever people write, called in one way;
- ``measure``: the few quantities that everything is judged by;
- ``laws``: each measures one thing that a right layer has, and finds the smallest counterexample;
- ``mistakes``: each is a function of those quantities that says whether it explains them;
- ``words``: numbers and rows as the report writes them.

``adapters.own`` gets from ``my_layer:MyLayer`` to a layer.
"""

import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from nflows.flows import Flow
from torch import Tensor

from adapters import bridges
from adapters.check.evidence import Evidence, is_mask
from adapters.check.laws import LAWS
from adapters.check.laws.finding import REMARK, RIGHT, UNASKED, WRONG, Finding, Law
from adapters.check.laws.modules import in_a_list
from adapters.check.measure import own_tensors, points, seeded
from adapters.check.mistakes import Diagnosis, diagnose
from adapters.check.subject import FORWARD, INVERSE, Subject, Wrong, known, said, twin
from adapters.checks import sizes

WANTS_DIMENSIONS = r"to unpack|[Dd]imension out of range|[34]D|too many indices|tuple index out of range"
BLOCKED = "what it needs does not hold"
SECONDS = 8.0  # that one call may take
WIDTH = 110  # of the report's lines


class WrongLayer(AssertionError):
    """A layer that breaks a law; its message is the report."""


@dataclass(frozen=True, repr=False)
class Report:
    """What ``check`` found: true if no law is broken, printed as lines for people.

    Attributes:
        name: of what was checked.
        findings: of every law, by its name, what was found.
        diagnoses: the mistakes that explain the broken laws.
    """

    name: str
    findings: dict[str, Finding]
    diagnoses: list[Diagnosis]

    def __bool__(self) -> bool:
        return not self.broken

    @property
    def broken(self) -> list[str]:
        """The names of the laws that do not hold."""
        return [law for law, finding in self.findings.items() if finding.verdict == WRONG]

    @property
    def mistakes(self) -> list[str]:
        """The names of the mistakes that explain what was found, remarks among them."""
        remarks = [
            finding.mistake for finding in self.findings.values() if finding.verdict == REMARK and finding.mistake
        ]
        return [diagnosis.mistake for diagnosis in self.diagnoses] + remarks

    @property
    def reasons(self) -> list[str]:
        """What is wrong, a phrase each: the mistakes, or else what was measured of the first law that none explains."""
        explained = {law for diagnosis in self.diagnoses for law in diagnosis.explains}
        named = [f"{one.mistake}{_equation(one)}" for one in self.diagnoses if one.explains]
        unexplained = [law for law in self.broken if law not in explained]
        if not unexplained:
            return named
        more = len(unexplained) - 1
        words = f" (and {more} more law{'s' * (more > 1)} {'are' if more > 1 else 'is'} broken)" if more else ""
        return [*named, self.findings[unexplained[0]].words + words]

    def raise_if_wrong(self) -> None:
        """Raise a ``WrongLayer``, which is an ``AssertionError``, with the report, unless all laws hold."""
        if not self:
            raise WrongLayer(f"\n{self}")

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    __repr__ = __str__


def check(
    thing: Any, event_shape: Sequence[int], context_features: int | None = None, seconds: float = SECONDS
) -> Report:
    """Hold a layer or a flow against the laws, in float64 at random parameters, and name the mistake behind a failure.

    The thing itself is left as it is: a copy is judged. So are torch's random numbers.

    Args:
        thing: an nflows ``Transform`` or ``Flow``, one of any library that has a bridge, or any object that can be
            called and has an ``inverse``, both of which return ``(outputs, log_det)``: the exercise's layer, or the
            course's ``Flow``, which also has ``log_prob`` and ``sample``.
        event_shape: of one datum: ``(2,)``, or ``(1, 4, 4)`` for a small image.
        context_features: width of a context row; ``None`` for no context.
        seconds: how long one call may take.

    Returns:
        a ``Report``: true if all laws hold; ``print`` shows it; ``raise_if_wrong()`` suits a test.

    Raises:
        TypeError: for a class, where one of its objects is wanted, or a shape that is none.

    >>> import torch
    >>> from adapters import MaskedCouplingLayer, check
    >>> from adapters.networks import MLP
    >>> bool(check(MaskedCouplingLayer(MLP(2, 2), MLP(2, 2), torch.tensor([1, 0])), (2,)))
    True
    """
    if isinstance(thing, type):
        raise TypeError(f"check judges an object, not the class {thing.__name__}: make one, {thing.__name__}(…)")
    shape = tuple(sizes(event_shape, "event_shape"))
    with quietly():
        return _report(thing, shape, context_features, seconds)


@contextmanager
def quietly() -> Iterator[None]:
    """Within, random numbers begin at a seed of their own, and what torch warns of is not shown: the report says it."""
    with seeded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _report(thing: Any, event_shape: tuple[int, ...], context_features: int | None, seconds: float) -> Report:
    name = _described(thing, event_shape, context_features)
    try:
        judged = known(thing)
        Subject(judged, seconds).explain_signatures(context_features)
    except Wrong as error:
        return Report(name, {LAWS[0].name: Finding(WRONG, str(error))}, [])
    only_scores = judged is not thing or isinstance(thing, Flow)  # some of the libraries' have no inverse
    report = judge(name, Evidence(lambda: fresh(judged, seconds), event_shape, context_features, only_scores))
    if not isinstance(thing, torch.distributions.Transform):
        return report
    diagnoses = [one._replace(words=f"{one.words}\n{OF_TORCH}") for one in report.diagnoses]
    return replace(report, diagnoses=diagnoses)


def judge(name: str, evidence: Evidence, laws: Sequence[Law] = LAWS) -> Report:
    """Gather the evidence, hold it against laws, and name the mistakes behind those that are broken.

    Args:
        name: of what is judged.
        evidence: of it.
        laws: some of ``LAWS``, in their order.
    """
    findings: dict[str, Finding] = {}
    diagnoses: list[Diagnosis] = []
    try:
        evidence.gather()
    except Wrong as error:
        report = Report(name, {laws[0].name: Finding(WRONG, f"{error}{_other_shape(evidence, str(error))}")}, [])
        return replace(report, diagnoses=_hidden(evidence) or _of_a_part(report, evidence))
    for law in laws:
        finding = _measured(law, evidence, findings)
        findings[law.name] = finding
        if finding.verdict != WRONG or any(law.name in diagnosis.explains for diagnosis in diagnoses):
            continue
        diagnosis = diagnose(evidence, law.name)
        if finding.mistake:
            diagnosis = Diagnosis(finding.mistake, finding.remedy, (law.name, *finding.explains))
        if diagnosis:
            diagnoses = _joined(diagnoses, diagnosis)
    report = Report(name, findings, diagnoses)
    if report:
        return _with_masks_of_parts(report, evidence) if laws is LAWS else report
    return replace(report, diagnoses=(laws is LAWS and _of_a_part(report, evidence)) or diagnoses)


OF_TORCH = "forward is data → noise here, which is the transform's own _inverse, and inverse is its own _call"
MASK_LAWS = tuple(law for law in LAWS if law.name in ("outputs", "log_det_shape", "twice", "mask"))


def _with_masks_of_parts(report: Report, evidence: Evidence) -> Report:
    """Of a flow that is right: its own layers' masks, too, whose convention nothing else shows."""
    for part in _parts(evidence):
        if not part.is_theirs:
            continue
        alone = judge("", Evidence(partial(fresh, part.layer, part.seconds), part.event_shape, part.width), MASK_LAWS)
        if alone.broken == ["mask"]:
            finding = alone.findings["mask"]
            findings = report.findings | {"mask": finding._replace(words=f"{part.where}, {finding.words}")}
            return replace(report, findings=findings, diagnoses=alone.diagnoses)
    return report


def _other_shape(evidence: Evidence, error: str) -> str:
    """Of what can't be called, a hint where it seems to be made for events of another shape."""
    with suppress(Wrong):
        tensors = own_tensors(evidence.make().transform)
        shapes = [value.shape for name, value in tensors if is_mask(name, value) and value.numel() != evidence.size]
        shape = next((tuple(shape[shape[:1] == (1,) and len(shape) in (2, 4) :]) for shape in shapes), ())
        if shape:
            option = "shape" if len(shape) > 1 else "features"
            return f"; its mask is for events of shape {shape}: say --{option} {' '.join(map(str, shape))}"
    if len(evidence.event_shape) == 1 and re.search(WANTS_DIMENSIONS, error):
        return "; if it is for images, say their shape, as --shape 1 8 8"
    return ""


def _hidden(evidence: Evidence) -> list[Diagnosis]:
    """Of what can't be called: that a list hides its parameters, so that they did not become float64 with the rest."""
    with suppress(Wrong):
        if found := in_a_list(evidence.make()):
            return [Diagnosis(found.mistake, f"{found.words}\n{found.remedy}", found.explains)]
    return []


def _of_a_part(report: Report, evidence: Evidence) -> list[Diagnosis]:
    """Of a flow of layers: what is wrong with the first of them that is wrong alone, which may explain all."""
    for part in _parts(evidence):
        alone = _report(part.layer, part.event_shape, part.width, part.seconds)
        if alone or len(alone.findings) == 1:  # it is right, or it takes other events
            continue
        explains = tuple(report.broken)
        found = [one._replace(words=f"{part.where}\n{one.words}", explains=explains) for one in alone.diagnoses]
        return found or [Diagnosis(f"the fault is {part.where}", alone.findings[alone.broken[0]].words, ())]
    return []


class _Part(NamedTuple):
    """A layer in a flow, with the events and the width of the context that it is given there."""

    where: str
    layer: torch.nn.Module
    event_shape: tuple[int, ...]
    width: int | None
    seconds: float
    is_theirs: bool


def _parts(evidence: Evidence) -> list[_Part]:
    """The layers that a flow is made of; of those that hold others, the others."""
    try:
        whole, called = evidence.make(), evidence.make()
    except Wrong:  # it can't even be copied
        return []
    given: dict[str, tuple] = {}
    for name, layer in called.module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):  # which takes no hooks
            continue
        layer.register_forward_pre_hook(lambda _, inputs, name=name: given.setdefault(name, inputs) and None)
    called.module.eval()
    for direction in (FORWARD, INVERSE):
        with suppress(Wrong), torch.no_grad():
            called.run(direction, points(evidence.rows, evidence.event_shape, 1), evidence.context)
    layers = {name: layer for name, layer in whole.module.named_modules() if hasattr(layer, INVERSE)}
    wrappers = [name for name, layer in layers.items() if type(layer).__module__.startswith(bridges.__name__)]
    wrapped = {  # a library's layer is called by its wrapper, which is the part then
        name: wrapper for wrapper in wrappers if not any(_is_below(other, wrapper) for other in wrappers)
        for name in layers if _is_below(name, wrapper)
    }  # fmt: skip
    own, parts = {name for name, _ in whole.theirs()}, []
    for name, layer in layers.items():
        if not name or name in wrapped or any(_is_below(other, name) for other in layers if other not in wrapped):
            continue
        z, context = (*given[name], None)[:2] if name in given else (None, evidence.context)
        shape = tuple(z.shape[1:]) if isinstance(z, Tensor) else evidence.event_shape
        width = context.shape[-1] if isinstance(context, Tensor) else None
        inside = next((other for other, wrapper in wrapped.items() if wrapper == name), name)
        what = layer.name if name in wrappers and hasattr(layer, "name") else f"a {type(layer).__name__}"
        where = f"in its part {name}, {what}"
        parts.append(_Part(where, layer, shape, width, whole.seconds, inside in own))
    return parts


def _is_below(name: str, other: str) -> bool:
    """Whether one module is inside another, by their names; that of all is empty."""
    return name != other and name.startswith(f"{other}." if other else "")


def _joined(diagnoses: list[Diagnosis], new: Diagnosis) -> list[Diagnosis]:
    """With one more; the same mistake in the other direction needs no second explanation."""
    before = next((one for one in diagnoses if one.mistake == new.mistake), None)
    if before is None:
        return [*diagnoses, new]
    both = before._replace(explains=before.explains + new.explains, words=f"{before.words}\nThe same in {INVERSE}")
    return [both if one is before else one for one in diagnoses]


def _measured(law: Law, evidence: Evidence, findings: dict[str, Finding]) -> Finding:
    if any(needed in findings and findings[needed].verdict == WRONG for needed in law.needs):
        return Finding(UNASKED, BLOCKED)
    try:
        return law.measure(evidence)
    except Wrong as error:
        return Finding(WRONG, str(error))
    except RuntimeError as error:  # what autograd says of the user's own functions
        return Finding(WRONG, said(error))
    except Exception as error:  # a fault of this measure, which accuses nobody
        return Finding(UNASKED, f"it could not be measured ({said(error)})")


def fresh(judged: Any, seconds: float) -> Subject:
    """A copy in float64, on the CPU, since not every device has float64.

    Raises:
        Wrong: if it can't be copied.
    """
    try:
        copied = twin(judged)
    except Exception as error:
        raise Wrong(
            f"it can't be copied: what depends on parameters is to be computed in forward, not kept ({said(error)})"
        ) from error
    if isinstance(copied, torch.nn.Module):
        copied.cpu().double()
    return Subject(copied, seconds)


def _described(thing: Any, event_shape: tuple[int, ...], context_features: int | None) -> str:
    shape = f"{event_shape[0]} coordinates" if len(event_shape) == 1 else f"events of shape {event_shape}"
    context = "" if context_features is None else f", a context of {context_features}"
    return f"{type(thing).__name__}: {shape}{context}, float64, random parameters"


def _lines(report: Report) -> list[str]:
    titles = {law.name: law.title for law in LAWS}
    lines = [report.name, ""]
    for law, (verdict, words, *_) in report.findings.items():
        if verdict == RIGHT:
            lines.append(f"{verdict} {titles[law]}" + f" ({words})" * bool(words))
        elif verdict in (WRONG, REMARK):
            lines.append(f"{verdict} {titles[law]}: {words}")
    if blocked := sum(finding.words == BLOCKED for finding in report.findings.values()):
        lines.append(f"{UNASKED} {blocked} more can't be asked before these hold")
    held = sum(finding.verdict in (RIGHT, REMARK) for finding in report.findings.values())
    if report:
        return [*lines, "", f"Right: {held} laws hold."]
    broken = len(report.broken)
    lines += ["", f"Wrong: {broken} of {held + broken} laws {'is' if broken == 1 else 'are'} broken."]
    explained = {law for diagnosis in report.diagnoses for law in diagnosis.explains}
    for number, diagnosis in enumerate(report.diagnoses, 1):
        lines += ["", f"{number}. {_sentence(diagnosis.mistake)}"]
        for part in filter(None, diagnosis.words.split("\n")):
            lines += textwrap.wrap(_sentence(part), WIDTH, initial_indent="   ", subsequent_indent="   ")
    unexplained = [titles[law] for law in report.broken if law not in explained]
    if unexplained and len(report.findings) > 1:  # what could not be called at all has said so in its one line
        others = "Mend that first, and ask again. It may explain these numbers too"
        words = others if report.diagnoses else "None of the usual mistakes explains these numbers"
        lines += ["", f"{words}: {'; '.join(unexplained)}."]
    return lines


def _equation(diagnosis: Diagnosis) -> str:
    """The equation of the exercise that the mistake is in, in brackets, if it is in one."""
    found = re.search(r"Equation (\d+)", diagnosis.words)
    return f" (equation {found[1]})" if found else ""


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."
