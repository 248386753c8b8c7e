"""What a flow has to pass before its figures count: the laws of ``adapters.check``, before training and after it.

The laws and their limits are the check's own. What is special to a comparison is here: which flow is held against
which of them, at which points, and how closely.
"""

import math

import torch
from torch import Tensor

from adapters.check import Report, fresh, judge, quietly
from adapters.check.evidence import MOVED, TRIP, WIDE, Evidence, Quadrature
from adapters.check.laws import LAWS
from adapters.check.laws.density import MASS
from adapters.check.subject import FORWARD, Subject
from adapters.flow import Flow

TRAINED = ("outputs", "log_det_shape", "rows", "round_trip", "forward_log_det", "inverse_log_det", "samples", "mass")
LOST = 0.1  # share of the base's draws that need not come back from data: Φ of the preprocessing saturates far out
FEW, MANY = 8, 100  # points at which a trained flow is looked at: few where it has more than so many coordinates
SECONDS = 120.0  # that one call may take
CLOSELY = Quadrature(seconds=math.inf)
IN_WORDS = (
    "Gates, in float64. Before training, two layers of each flow, with parameters moved by "
    f"N(0, {MOVED:g}²) (less where that is too steep), must hold all laws of `python -m adapters.check`. After it the "
    "flow itself must: rows apart, the round trip, both directions' log-determinants beside autograd's, log_prob of "
    f"samples beside the one that comes with them (each to {TRIP:g}, relative), and in the plane ∫p beside the share "
    f"of them (to {MASS:g}). Who breaks a law before is not trained, who breaks one after is not ranked."
)


def check_before_training(flow: Flow, features: int, quadrature: Quadrature = CLOSELY) -> Report:
    """All laws, as ``python -m adapters.check`` holds a flow against them: at parameters moved by N(0, 0.3²).

    Many a flow begins as the identity, where much that is wrong does not show.

    Args:
        flow: over vectors, without preprocessing. A copy is judged.
        features: D.
        quadrature: how closely ∫p is looked at, for D = 2.
    """
    with quietly():
        evidence = Evidence(lambda: fresh(flow, SECONDS), (features,), quadrature=quadrature)
        return judge(type(flow).__name__, evidence)


def check_after_training(
    flow: Flow, x: Tensor, box: tuple[float, float] | None = None, quadrature: Quadrature = CLOSELY
) -> Report:
    """The laws that hold at some parameters and not at others, at those that the flow has, preprocessing and all.

    Args:
        flow: over vectors. A copy is judged, in float64 on the CPU.
        x: data, ``(n, D)``; only the first rows are tried.
        box: for D = 2, the interval that along either axis holds nearly all of the data: ∫p over its parts is compared
            with the share of the flow's own samples there, so that mass outside does no harm and lost mass is seen.
        quadrature: how closely.
    """
    left_out = set() if box is not None else {"mass"}
    if x.shape[1] > WIDE:  # one of 784 pixels may come back in the next bin of its histogram, which has another slope
        left_out.add("inverse_log_det")
    laws = [law for law in LAWS if law.name in TRAINED and law.name not in left_out]
    with quietly():
        return judge(type(flow).__name__, Trained(flow, x, box, quadrature), laws)


def errors(report: Report) -> dict[str, float]:
    """How far each law is from holding exactly, by its name, where that is a number."""
    found = {law: finding.error for law, finding in report.findings.items()}
    return {law: error for law, error in found.items() if error is not None and math.isfinite(error)}


class Trained(Evidence):
    """A trained flow as it is: what it makes of data, and of draws from its base."""

    lost, narrow = LOST, 0  # where Φ saturates, autograd can't go through its inverse

    def __init__(self, flow: Flow, x: Tensor, box: tuple[float, float] | None, quadrature: Quadrature):
        features = x.shape[1]
        self.x = x[: 2 if features > WIDE else FEW if features > FEW else MANY].cpu().double()
        if box is not None:
            low, high = (torch.full((2,), end, dtype=torch.float64) for end in box)
            self.box = low, high
        super().__init__(lambda: fresh(flow, SECONDS), (features,), quadrature=quadrature)

    def look(self) -> None:
        self.subject, self.rows = self.moved(), len(self.x)
        with torch.no_grad():
            self.z = self.subject.thing.base.sample(self.rows)
        self.forward = self.passed(FORWARD, self.x)

    def moved(self, largest: float = 0.0) -> Subject:
        """A new copy, not moved at all."""
        subject = self.make()
        subject.module.eval()
        return subject
