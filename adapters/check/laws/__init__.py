"""The laws: each measures one thing that a right layer has, and says the smallest counterexample that it found.

A law is a function of ``Evidence`` that returns a ``Finding``. To add one: write it in the file that it belongs to, and
a line in ``LAWS``.
"""

from adapters.check.laws.calls import context_used, inputs_kept, log_det_shape, outputs, rows_apart, twice
from adapters.check.laws.density import mass, samples
from adapters.check.laws.finding import Law
from adapters.check.laws.mathematics import equations, extremes, far, log_det, mask_kept, round_trip
from adapters.check.laws.modules import copies, device, gradients, precision, training
from adapters.check.subject import FORWARD, INVERSE

LOG_DETS = ("outputs", "log_det_shape", "inputs", "twice", "rows")
LAWS = (
    Law("outputs", "forward and inverse give outputs like their inputs", outputs),
    Law("log_det_shape", "and one log-determinant for each row", log_det_shape, ("outputs",)),
    Law("inputs", "no call changes its input", inputs_kept, ("outputs",)),
    Law("twice", "the same answer twice", twice, ("outputs", "log_det_shape")),
    Law("rows", "rows, and their contexts, don't mix", rows_apart, ("outputs", "log_det_shape", "twice")),
    Law("context", "the answer depends on the context", context_used, ("outputs", "log_det_shape", "twice")),
    Law("mask", "positions where the mask is 1 come through unchanged", mask_kept, ("outputs", "twice")),
    Law("round_trip", "inverse undoes forward, and forward inverse", round_trip, ("outputs", "twice", "rows")),
    Law("forward_log_det", "forward's log-determinant is autograd's", log_det(FORWARD), LOG_DETS),
    Law("inverse_log_det", "inverse's log-determinant is autograd's", log_det(INVERSE), LOG_DETS),
    Law("equations", "forward and inverse are equations 15 and 16", equations, (*LOG_DETS, "mask", "round_trip")),
    Law("gradients", "gradients reach every parameter", gradients, ("outputs", "log_det_shape", "twice")),
    Law(
        "training",
        "training mode computes what evaluation mode does",
        training,
        ("outputs", "log_det_shape", "twice", "rows"),
    ),
    Law("copies", "state_dict and deepcopy carry all of it", copies, ("outputs", "log_det_shape", "twice")),
    Law("precision", "float64 throughout, and float32 agrees", precision, LOG_DETS),
    Law("device", "all tensors move with the layer", device, ("outputs", "log_det_shape")),
    Law(
        "far",
        "all of this holds far from 0, too",
        far,
        (*LOG_DETS, "round_trip", "forward_log_det", "inverse_log_det"),
    ),
    Law("extremes", "extreme inputs", extremes, ("outputs", "log_det_shape", "twice")),
    Law("samples", "samples carry their log_prob", samples, (*LOG_DETS, "round_trip")),
    Law("mass", "∫p = 1, and p is the samples' density", mass, (*LOG_DETS, "round_trip")),
)
