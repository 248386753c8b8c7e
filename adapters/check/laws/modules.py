"""Laws of a PyTorch module: gradients, modes, copies, dtypes and devices."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapters.check.evidence import TRIP, Evidence
from adapters.check.laws.calls import TO_DTYPE
from adapters.check.laws.finding import REMARK, RIGHT, UNASKED, WRONG, Finding
from adapters.check.measure import distance, is_rounded, own_tensors, points
from adapters.check.passes import Pass
from adapters.check.subject import FORWARD, Hangs, Subject, Wrong, line_of
from adapters.check.words import numbers, short, some, z_is

FLOAT32, STEEP = 1e-2, 1e-2  # relative difference of a float32 copy, and how it may grow with the norm of J
NORMS = ("batchnorm", "dropout", "actnorm")  # parts that are meant to differ between training and evaluation


def gradients(e: Evidence) -> Finding:
    """Whatever moves an answer has a gradient from it."""
    named = [(name, p) for name, p in e.subject.module.named_parameters() if p.requires_grad]
    if not named:
        return Finding(UNASKED, "it has no parameters")
    used = set()
    for p in e.repeatable:
        for what in _answers(e, p):
            value = _answers(e, p)[what]
            total = (value * points(1, tuple(value.shape), 5)[0]).sum()
            found: Sequence[Tensor | None] = [None] * len(named)
            if total.requires_grad:
                found = torch.autograd.grad(total, [one for _, one in named], allow_unused=True)
            reached = [gradient is not None and bool(gradient.abs().sum() > 0) for gradient in found]
            used.update(name for (name, _), reaches in zip(named, reached, strict=True) if reaches)
            silent = [one for one, reaches in zip(named, reached, strict=True) if not reaches]
            if not (silent and _matters(e, p, what, [parameter for _, parameter in silent])):
                continue
            hidden = [name for name, parameter in silent if _matters(e, p, what, [parameter])]
            words = f"the {what} of {p.direction} changes with {some(hidden)}, but no gradient comes from there"
            remedy = (
                f"in {p.direction} something cuts the graph, detach(), no_grad(), .data, .item() or numpy: leave it out"
            )
            return Finding(WRONG, words, "detached, or under no_grad", remedy)
    unused = [name for name, _ in named if name not in used]
    if unused:
        return Finding(REMARK, f"nothing depends on {some(unused)}")
    return Finding(RIGHT)


def _answers(e: Evidence, p: Pass) -> dict[str, Tensor]:
    """What gradients are to come from."""
    y, log_det = p.function(p.x.clone(), e.context)
    answers = {"output": y, "log_det": log_det}
    if e.subject.is_flow and p.direction == FORWARD:
        answers["log_prob"] = e.subject.log_prob(p.x, e.context)
    return answers


@torch.no_grad()
def _matters(e: Evidence, p: Pass, what: str, parameters: list[nn.Parameter]) -> bool:
    """Whether moving these parameters a little changes that answer smoothly: a jump at a kink has no gradient."""
    generator, step = torch.Generator().manual_seed(6), 1e-4
    start = [parameter.clone() for parameter in parameters]
    moves = [step * torch.randn(q.shape, generator=generator, dtype=q.dtype) for q in parameters]
    answers = []
    for times in (-1, 1, 0):
        for parameter, old, move in zip(parameters, start, moves, strict=True):
            parameter.copy_(old + times * move)
        answers.append(_answers(e, p)[what])
    below, above, here = answers
    first, second = (above - below).abs(), (above + below - 2 * here).abs()
    return bool(((first > 1e-7) & (second < 0.1 * first)).any())


def training(e: Evidence) -> Finding:
    """Training mode and evaluation mode agree, but for parts that are meant to differ."""
    subject, random = e.moved(), torch.random.get_rng_state()
    subject.module.train()
    buffers = {name: buffer.clone() for name, buffer in subject.module.named_buffers()}
    meant = [
        f"{type(part).__name__}{f' ({name})' * bool(name)}"
        for name, part in subject.module.named_modules()
        if any(norm in type(part).__name__.lower() for norm in NORMS)
    ]
    try:
        for p in e.repeatable:
            try:
                with torch.no_grad():
                    y, log_det = subject.run(p.direction, p.x.clone(), e.context)
            except Wrong as error:
                if meant:
                    return Finding(REMARK, f"in training mode {error}, because of {meant[0]}: use eval() for it")
                return Finding(WRONG, f"in training mode {error}")
            if not (
                torch.allclose(y, p.y, rtol=TRIP, atol=TRIP)
                and torch.allclose(log_det, p.log_det, rtol=TRIP, atol=TRIP)
            ):
                if meant and "batchnorm" in meant[0].lower():
                    words = (
                        f"in training mode BatchNorm couples the rows: {meant[0]}. Use eval() to score and to sample"
                    )
                    return Finding(REMARK, words, "BatchNorm couples the rows")
                if meant:
                    return Finding(REMARK, f"training mode differs from evaluation, by {meant[0]}: use eval() to score")
                now = dict(subject.module.named_buffers())
                if updated := [name for name, buffer in buffers.items() if not torch.equal(buffer, now[name])]:
                    words = f"training mode differs from evaluation, and updates {some(updated)}: use eval() to score"
                    return Finding(REMARK, words)
                with torch.no_grad():
                    again, log_det_again = subject.run(p.direction, p.x.clone(), e.context)
                if not (torch.equal(again, y) and torch.equal(log_det_again, log_det)):  # dropout by a function
                    words = "training mode draws random numbers, so that two passes differ: use eval() to score"
                    return Finding(REMARK, words)
                row = int(distance(y, p.y).argmax())
                words = f"at {z_is(p, row)} {p.direction} gives {numbers(y[row])} in training, "
                words += f"{numbers(p.y[row])} in evaluation"
                return Finding(WRONG, words)
    finally:
        torch.random.set_rng_state(random)
    return Finding(RIGHT)


def copies(e: Evidence) -> Finding:
    """A copy, and a new layer that loads the parameters, compute the same; every tensor belongs to them."""
    if hidden := in_a_list(e.subject):
        return hidden
    for name, part in e.make().theirs():  # a new one, in which no call has left what it computed
        for attribute, value in own_tensors(part):
            if attribute in vars(part) and not isinstance(value, nn.Parameter):
                called = f"{name}.{attribute}" if name else attribute
                words = f"{called} is a plain tensor, which .to(device) leaves behind and state_dict leaves out"
                remedy = f"write self.register_buffer({attribute!r}, {attribute}) in __init__"
                return Finding(WRONG, words, "a plain tensor instead of a buffer", remedy, ("device",))
    state = e.subject.module.state_dict()
    other = e.make()
    try:
        other.module.load_state_dict(copy.deepcopy(state))
    except (RuntimeError, KeyError) as error:
        return Finding(WRONG, f"load_state_dict raises {' '.join(str(error).split())}")
    for what, twin in (("load_state_dict", other), ("deepcopy", e.subject.copy())):
        twin.module.eval()
        with torch.no_grad():
            twin.run(FORWARD, 0.9 * e.x, e.context)  # other data than before, by which it might initialise itself
            y, log_det = twin.run(FORWARD, e.x.clone(), e.context)
        if not (torch.allclose(y, e.forward.y) and torch.allclose(log_det, e.forward.log_det)):
            row = int(distance(y, e.forward.y).argmax())
            words = f"at {z_is(e.forward, row)} it gives {numbers(e.forward.y[row])}, after {what} {numbers(y[row])}"
            changed = [key for key, value in other.module.state_dict().items() if not torch.equal(value, state[key])]
            if what == "load_state_dict" and changed:
                words += f"; the call has changed {some(changed)}"
                remedy = "what was loaded is initialised again from data: keep its flag as a buffer, "
                remedy += "self.register_buffer('initialised', torch.tensor(False))"
                return Finding(WRONG, words, "ActNorm was not initialised", remedy)
            return Finding(WRONG, words)
    return Finding(RIGHT)


def in_a_list(subject: Subject) -> Finding | None:
    """The finding that a list, a tuple or a dictionary of Python holds what parameters() does not see, if one does."""
    module = subject.module
    seen = {id(one) for one in (*module.modules(), *module.parameters(), *module.buffers())}
    for name, part in subject.theirs():
        for attribute, value in vars(part).items():
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            hidden = [one for one in inside if isinstance(one, nn.Module | nn.Parameter) and id(one) not in seen]
            if attribute.startswith("_") or not hidden:
                continue
            called = f"{name}.{attribute}" if name else attribute
            words = f"{called} is a {type(value).__name__}: parameters(), .to(device) and state_dict don't look into it"
            remedy = "write nn.ModuleList for modules, nn.ParameterList for parameters"
            explains = "outputs", "precision", "device"
            return Finding(WRONG, words, "parameters in a Python list", remedy, explains)
    return None


def precision(e: Evidence) -> Finding:
    """float64 has no rounding of float32 in it, and a float32 copy says nearly the same."""
    for p in e.repeatable:
        if dtype := is_rounded(lambda x, p=p: p.function(x, e.context), p.x):
            digits, mistake = ("seven", "float32 inside") if dtype == "float32" else ("three", "half precision inside")
            words = f"given float64, {p.direction} has only the {digits} digits of {dtype}"
            return Finding(WRONG, words, mistake, TO_DTYPE)
    single = e.subject.in_float32()
    context = None if e.context is None else e.context.float()
    for p in e.repeatable:
        with torch.no_grad():
            try:
                y, log_det = single.run(p.direction, p.x.float(), context)
            except Hangs as error:  # a search that is to be finer than float32 is
                return Finding(REMARK, f"in float32 {error}")
            except Wrong as error:
                return Finding(WRONG, f"in float32 {error}")
        if not y.dtype == log_det.dtype == torch.float32:
            found = y.dtype if y.dtype != torch.float32 else log_det.dtype
            return Finding(WRONG, f"{p.direction} returns {short(found)} for float32", "float64 inside", TO_DTYPE)
        errors = torch.maximum(distance(y, p.y), distance(log_det[:, None], p.log_det[:, None]))
        rounded = torch.finfo(torch.float32).eps * p.x.flatten(1).abs().amax(1)  # of what it is given, before it begins
        allowed = (FLOAT32 * STEEP + rounded) * torch.linalg.matrix_norm(p.jacobian, 2)
        if not (errors <= allowed.clamp(min=FLOAT32)).all():
            row = int(errors.argmax())
            words = (
                f"at {z_is(p, row)} {p.direction} gives {numbers(p.y[row])} in float64, {numbers(y[row])} in float32"
            )
            return Finding(WRONG, words)
    return Finding(RIGHT)


def device(e: Evidence) -> Finding:
    """On torch's meta device, which has shapes and no values: what meets a tensor of the CPU there raises."""
    abroad = e.subject.copy()
    context = None if e.context is None else e.context.to("meta")
    try:
        abroad.module.to("meta")
    except Exception:
        return Finding(UNASKED, "it can't be moved to the meta device")
    for p in e.repeatable:
        try:
            abroad.run(p.direction, p.x.to("meta"), context)
        except Wrong as error:
            if all(word in str(error) for word in ("device", "cpu")) and "meta tensor" not in str(error):
                words = (
                    f"on another device {p.direction} meets a tensor that stayed on the CPU{line_of(error.__cause__)}"
                )
                remedy = "make tensors like z, torch.zeros_like(z) or z.new_zeros(len(z)), and constants in __init__, "
                remedy += "by self.register_buffer"
                return Finding(WRONG, words, "a tensor stays on the CPU", remedy)
            return Finding(UNASKED, "it looks at values, which the meta device has not")
    return Finding(RIGHT)
