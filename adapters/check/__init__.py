"""Is my layer right? The laws of every flow, held against anybody's layer, and the mistakes that explain a failure.

``check`` is the whole of it in Python, ``python -m adapters.check my_layer:MyLayer`` on a command line.

- ``subject``: whatever people write, called in one way;
- ``measure``: the few quantities that everything is judged by;
- ``laws``: each measures one thing that a right layer has, and finds the smallest counterexample;
- ``mistakes``: each is a function of those quantities that says whether it explains them;
- ``words``: numbers and rows as the report writes them;
- ``loading``: from ``my_layer:MyLayer`` to a layer.
"""

import copy
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from nflows.flows import Flow

from adapters.check.laws import LAWS, REMARK, RIGHT, UNASKED, WRONG, Finding, Law
from adapters.check.measure import Evidence, seeded
from adapters.check.mistakes import Diagnosis, diagnose
from adapters.check.subject import INVERSE, Subject, Wrong, known, said
from adapters.checks import sizes

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
        """What is wrong, a phrase each: the mistakes that explain it, then what was measured and none explains."""
        explained = {law for diagnosis in self.diagnoses for law in diagnosis.explains}
        return [
            *(f"{one.mistake}{_equation(one)}" for one in self.diagnoses),
            *(self.findings[law].words for law in self.broken if law not in explained),
        ]

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
    def evidence() -> Evidence:
        judged = known(thing)
        Subject(judged, seconds).explain_signatures(context_features)
        only_scores = judged is not thing or isinstance(thing, Flow)  # some of the libraries' have no inverse
        return Evidence(lambda: fresh(judged, seconds), event_shape, context_features, only_scores)

    return judge(_described(thing, event_shape, context_features), evidence)


def judge(name: str, gather: Callable[[], Evidence], laws: Sequence[Law] = LAWS) -> Report:
    """Hold evidence against laws, and name the mistakes behind those that are broken.

    Args:
        name: of what is judged.
        gather: gives the evidence. If it raises ``Wrong``, that is all that is found.
        laws: some of ``LAWS``, in their order.
    """
    findings: dict[str, Finding] = {}
    diagnoses: list[Diagnosis] = []
    try:
        evidence = gather()
    except Wrong as error:
        return Report(name, {laws[0].name: Finding(WRONG, str(error))}, [])
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
    return report if report else replace(report, diagnoses=_of_a_part(report, evidence) or diagnoses)


def _of_a_part(report: Report, evidence: Evidence) -> list[Diagnosis]:
    """Of a flow of layers: what is wrong with the first of them that is wrong alone, which may explain all."""
    modules, seconds = evidence.make().module.named_modules(), evidence.subject.seconds
    layers = [(name, part) for name, part in modules if name and hasattr(part, INVERSE)]
    width = None if evidence.context is None else evidence.context.shape[1]
    for name, part in layers:
        if any(other.startswith(f"{name}.") for other, _ in layers):  # its own parts come next
            continue
        alone = _report(part, evidence.event_shape, width, seconds)
        if len(alone.findings) == 1 and width is not None:  # perhaps one that takes no context
            alone = _report(part, evidence.event_shape, None, seconds)
        if len(alone.findings) == 1:  # it takes other events
            continue
        if not alone:
            where = f"in its part {name}, a {type(part).__name__}"
            explains = tuple(report.broken)
            unexplained = Diagnosis(f"the fault is {where}", "check this layer alone", explains)
            found = [one._replace(words=f"{where}\n{one.words}", explains=explains) for one in alone.diagnoses]
            return found or [unexplained]
    return []


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


def fresh(judged: Any, seconds: float) -> Subject:
    """A copy in float64, on the CPU, since not every device has float64.

    Raises:
        Wrong: if it can't be copied.
    """
    try:
        twin = copy.deepcopy(judged)
    except Exception as error:
        raise Wrong(
            f"it can't be copied: what depends on parameters is to be computed in forward, not kept ({said(error)})"
        ) from error
    if isinstance(twin, torch.nn.Module):
        twin.cpu().double()
    return Subject(twin, seconds)


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
        lines += ["", f"None of the usual mistakes explains these numbers: {'; '.join(unexplained)}."]
    return lines


def _equation(diagnosis: Diagnosis) -> str:
    """The equation of the exercise that the mistake is in, in brackets, if it is in one."""
    found = re.search(r"Equation (\d+)", diagnosis.words)
    return f" (equation {found[1]})" if found else ""


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."
