"""Wrong uses of the public names: each is refused at once, by a sentence that says what came and what is wanted.

Below them the same for the scripts, as command lines.

To add a row: the wrong use as it would be typed, the error, and a part of its message. ``flow``, ``layer`` and the rest
are made anew for each row; ``here`` is an empty directory, in which nothing may be left.
"""

import importlib
import re
import shlex

import numpy as np
import pytest
import torch
from torch import nn

import adapters
from adapters.catalogue import check_options
from adapters.preprocess import Logit, Marginals, Standardize
from runs.common.command_line import cli
from tests.scripts import run

MASKS = [
    ("checkerboard_mask()", ValueError, "a mask needs sizes of at least 1, not ()"),
    ("checkerboard_mask(0)", ValueError, "a mask needs sizes of at least 1, not (0,)"),
    ("checkerboard_mask(3, -1)", ValueError, "a mask needs sizes of at least 1, not (3, -1)"),
    ("checkerboard_mask(2.5)", TypeError, "a mask needs sizes that are integers, one by one, such as 28, 28, not 2.5"),
    ("checkerboard_mask((28, 28))", TypeError, "integers, one by one, such as 28, 28, not (28, 28)"),
    ("checkerboard_mask('3')", TypeError, "sizes that are integers, one by one, such as 28, 28, not '3'"),
    ("checkerboard_mask(True)", TypeError, "sizes that are integers, one by one, such as 28, 28, not True"),
    ("checkerboard_mask(None)", TypeError, "sizes that are integers, one by one, such as 28, 28, not None"),
    ("half_mask(0)", ValueError, "a mask needs sizes of at least 1, not (0,)"),
    ("half_mask(2.5)", TypeError, "sizes that are integers, one by one, such as 28, 28, not 2.5"),
    ("half_mask([4])", TypeError, "sizes that are integers, one by one, such as 28, 28, not [4]"),
    ("random_mask(-7)", ValueError, "a mask needs sizes of at least 1, not (-7,)"),
    ("random_mask(7.0)", TypeError, "sizes that are integers, one by one, such as 28, 28, not 7.0"),
    (
        "random_mask(7, 3)",
        TypeError,
        "generator must be a torch.Generator, such as torch.Generator().manual_seed(0), not 3",
    ),
    ("random_mask(7, np.random.default_rng())", TypeError, "generator must be a torch.Generator"),
]

LAYER = [
    (
        "MaskedCouplingLayer(net, net, None)",
        TypeError,
        "a mask must be a tensor of 0 and 1, one entry per coordinate, not N",
    ),
    (
        "MaskedCouplingLayer(net, net, '101')",
        TypeError,
        "a mask must be a tensor of 0 and 1, one entry per coordinate, not '",
    ),
    ("MaskedCouplingLayer(net, net, torch.ones(3))", ValueError, "the mask is all ones: nothing would be transformed"),
    (
        "MaskedCouplingLayer(net, net, torch.empty(0))",
        ValueError,
        "the mask is empty (shape (0,)); it needs one entry per",
    ),
    (
        "MaskedCouplingLayer(net, net, torch.tensor([1, 2, 0]))",
        ValueError,
        "0 (transformed) and 1 (unchanged), but this",
    ),
    ("layer(torch.randn(5, 4))", ValueError, "this layer takes inputs of shape (batch, 3), not (5, 4)"),
    ("layer(torch.tensor(1.0))", ValueError, "this layer takes inputs of shape (batch, 3), not ()"),
    ("layer(x, torch.randn(5, 2))", TypeError, "a context of shape (5, 2) was given, but Linear takes no context"),
    (
        "MaskedCouplingLayer(nn.Linear(3, 2), net, mask)(x)",
        ValueError,
        "scale_net must return shape (5, 3), but returned",
    ),
    (
        "MaskedCouplingLayer(net, nn.Linear(3, 1), mask)(x)",
        ValueError,
        "translation_net must return shape (5, 3), but ret",
    ),
]

BUILD = [
    ("build_flow('masked-afine', 3)", ValueError, "unknown flow 'masked-afine'; known: masked-affine, "),
    ("build_flow(None, 3)", ValueError, "unknown flow None; known: masked-affine, "),
    ("build_flow(['masked-affine'], 3)", ValueError, "unknown flow ['masked-affine']; known: masked-affine, "),
    ("build_flow('masked-affine', 0)", ValueError, "features must be a positive integer, not 0"),
    ("build_flow('masked-affine', 3.0)", ValueError, "features must be a positive integer, not 3.0"),
    ("build_flow('masked-affine', '3')", ValueError, "features must be a positive integer, not '3'"),
    ("build_flow('masked-affine', True)", ValueError, "features must be a positive integer, not True"),
    ("build_flow('masked-affine', x)", ValueError, "features must be a positive integer, not tensor"),
    ("build_flow('masked-affine', 1)", ValueError, "a coupling flow needs at least 2 features, not 1"),
    ("build_flow('masked-affine', 3, 0)", ValueError, "context_features must be a positive integer, not 0"),
    ("build_flow('masked-affine', 3, 1.5)", ValueError, "context_features must be a positive integer, not 1.5"),
    ("build_flow('masked-affine', 3, layers=0)", ValueError, "layers must be a positive integer, not 0"),
    ("build_flow('masked-affine', 3, layers=2.5)", ValueError, "layers must be a positive integer, not 2.5"),
    ("build_flow('masked-affine', 3, layers=None)", ValueError, "layers must be a positive integer, not None"),
    (
        "build_flow('masked-affine', 3, hidden_features=0)",
        ValueError,
        "hidden_features[0] must be a positive integer, not 0",
    ),
    (
        "build_flow('masked-affine', 3, hidden_features=(8, -1))",
        ValueError,
        "hidden_features[1] must be a positive integer",
    ),
    (
        "build_flow('masked-affine', 3, hidden_features=(8, 2.5))",
        ValueError,
        "hidden_features[1] must be a positive intege",
    ),
    (
        "build_flow('masked-affine', 3, hidden_features='64')",
        TypeError,
        "must be a list of widths, such as (64, 64), not '6",
    ),
    (
        "build_flow('masked-affine', 3, hidden_features=None)",
        TypeError,
        "must be a list of widths, such as (64, 64), not No",
    ),
    (
        "build_flow('masked-affine', 3, hidden_features=6.4)",
        TypeError,
        "must be a list of widths, such as (64, 64), not 6.4",
    ),
    ("build_flow('nflows-maf', 3, hidden_features=(8, 9))", ValueError, "(8, 9) must all be equal"),
    ("build_flow('masked-affine', 3, activation='rellu')", ValueError, "unknown activation 'rellu'; known: relu, "),
    (
        "build_flow('masked-affine', 3, activation=nn.ReLU)",
        ValueError,
        "unknown activation <class 'torch.nn.modules.activ",
    ),
    ("build_flow('masked-affine', 3, activation=['relu'])", ValueError, "unknown activation ['relu']; known: relu, "),
    (
        "build_flow('masked-affine', 3, masks=[])",
        ValueError,
        "masks is empty: give at least one mask, or None for the alter",
    ),
    ("build_flow('masked-affine', 3, masks=3)", TypeError, "masks must be a list of masks, not 3"),
    (
        "build_flow('masked-affine', 3, masks='checkerboard')",
        TypeError,
        "masks must be a list of masks, not 'checkerboard'",
    ),
    ("build_flow('masked-affine', 3, masks=mask)", ValueError, "each mask must have shape (3,), but one has ()"),
    (
        "build_flow('masked-affine', 3, masks=[mask[:2]])",
        ValueError,
        "each mask must have shape (3,), but one has (2,)",
    ),
    (
        "build_flow('masked-affine', 3, masks=[None])",
        TypeError,
        "a mask must be a tensor of 0 and 1, one entry per coordinate",
    ),
    ("build_flow('masked-affine', 3, masks=[mask, 1 + mask])", ValueError, "a mask holds only 0 (transformed) and 1"),
    ("build_flow('nflows-affine', 3, masks=[mask * np.nan])", ValueError, "(unchanged), but this one holds nan"),
    ("build_flow('zuko-nsf', 3, masks=[mask > -1])", ValueError, "the mask is all ones: nothing would be transformed"),
    ("build_flow('zuko-nsf', 3, masks=[mask.to('meta')])", ValueError, "a mask on the meta device has no values"),
    (
        "build_flow('masked-affine', 3, preprocess=net)",
        TypeError,
        "preprocess must be an nflows Transform, such as adapters.p",
    ),
    (
        "build_flow('masked-affine', 3, preprocess=Logit)",
        TypeError,
        "preprocess must be an nflows Transform, such as .*Logit",
    ),
    (
        "build_flow('masked-affine', 3, preprocess='logit')",
        TypeError,
        "preprocess must be an nflows Transform, such as .*str",
    ),
    (
        "build_flow('masked-affine', 3, preprocess=Standardize.of(torch.randn(9, 4)))",
        ValueError,
        "preprocess is of data with 4 coordinates, but features is 3",
    ),
    (
        "build_flow('masked-affine', 3, preprocess=Marginals(torch.ones(2, 8)))",
        ValueError,
        "preprocess is of data with 2 coordinates, but features is 3",
    ),
    (
        "build_flow('masked-affine', 3, bins=8)",
        TypeError,
        "masked-affine has no option 'bins'; it has: scale_bound, net, dr",
    ),
    ("build_flow('zuko-maf', 3, bins=8)", TypeError, "zuko-maf has no option 'bins'; it has: none"),
    (
        "build_flow('masked-affine', 3, specification=8)",
        TypeError,
        "masked-affine has no option 'specification'; it has: ",
    ),
    (
        "check_options('masked-affine', {'layers': 5})",
        TypeError,
        "layers is no option, but an argument of its own; masked",
    ),
    ("check_options('zuko-maf', {'preprocess': 5})", TypeError, "preprocess is no option, but an argument of its own"),
    ("check_options('masked-afine', {})", ValueError, "unknown flow 'masked-afine'; known: masked-affine, "),
    ("build_flow('masked-spline', 3, bins=0)", ValueError, "bins must be at least 2, not 0"),
    ("build_flow('nflows-rqs', 3, bins=1)", ValueError, "bins must be at least 2, not 1"),
    ("build_flow('masked-histogram', 3, bins=2.5)", TypeError, "bins must be an integer, not 2.5"),
    ("build_flow('pyro-spline', 3, bins='8')", TypeError, "bins must be an integer, not '8'"),
    ("build_flow('zuko-nsf', 3, bins=None)", TypeError, "bins must be an integer, not None"),
    ("build_flow('masked-spline', 3, tail_bound=np.inf)", ValueError, "tail_bound must be finite, not inf"),
    ("build_flow('pyro-spline', 3, tail_bound=-1)", ValueError, "tail_bound must be positive, not -1.0"),
    ("build_flow('normflows-rqs', 3, tail_bound=-1)", ValueError, "tail_bound must be positive, not -1.0"),
    ("build_flow('nflows-rqs', 3, tail_bound=0)", ValueError, "tail_bound must be positive, not 0.0"),
    ("build_flow('zuko-bpf', 3, tail_bound='4')", TypeError, "tail_bound must be a number, not '4'"),
    (
        "build_flow('masked-spline', 3, tail_bound=torch.tensor(4.0))",
        TypeError,
        "tail_bound must be a number, not tensor(4.)",
    ),
    ("build_flow('masked-spline', 3, minimum=1)", ValueError, "minimum must be in (0, 1), not 1.0"),
    ("build_flow('nflows-rqs', 3, minimum=-0.1)", ValueError, "minimum must be in (0, 1), not -0.1"),
    ("build_flow('zuko-nsf', 3, minimum=np.nan)", ValueError, "minimum must be finite, not nan"),
    ("build_flow('masked-affine', 3, dropout=np.nan)", ValueError, "dropout must be finite, not nan"),
    ("build_flow('masked-affine', 3, dropout=1)", ValueError, "dropout must be in [0, 1), not 1.0"),
    ("build_flow('masked-autoregressive', 3, dropout=-0.1)", ValueError, "dropout must be in [0, 1), not -0.1"),
    ("build_flow('masked-affine', 3, dropout=True)", TypeError, "dropout must be a number, not True"),
    ("build_flow('masked-affine', 3, scale_bound=np.inf)", ValueError, "scale_bound must be finite, not inf"),
    ("build_flow('masked-autoregressive', 3, scale_bound=None)", TypeError, "scale_bound must be a number, not None"),
    ("build_flow('masked-affine', 3, scale_bound=[2])", TypeError, "scale_bound must be a number, not [2]"),
    ("build_flow('freia-affine', 3, clamp=-2)", ValueError, "clamp must be positive, not -2.0"),
    ("build_flow('zuko-bpf', 3, degree=0)", ValueError, "degree must be positive, not 0"),
    ("build_flow('zuko-naf', 3, signal=1.5)", TypeError, "signal must be an integer, not 1.5"),
    ("build_flow('zuko-naf', 3, bound=0)", ValueError, "bound must be positive, not 0.0"),
    ("build_flow('masked-affine', 3, net='resnet')", ValueError, "unknown net 'resnet'; known: mlp, conv"),
    ("build_flow('masked-affine', 3, net=nn.Linear)", TypeError, "net must be a string, not <class"),
    (
        "build_flow('masked-affine', 120, net='conv')",
        ValueError,
        "net conv needs square images with an even side, not 120",
    ),
    ("build_flow('pyro-spline', 3, order='cubic')", ValueError, "order must be 'linear' or 'quadratic', not 'cubic'"),
]

FLOW = [
    ("flow.log_prob(torch.randn(5, 4))", ValueError, "this flow takes inputs of shape (batch, 3), not (5, 4)"),
    ("flow.log_prob(torch.randn(3))", ValueError, "this flow takes inputs of shape (batch, 3), not (3,)"),
    (
        "flow.log_prob(x, torch.randn(5, 2))",
        ValueError,
        "unconditional, but a context of shape (5, 2) was given; build it",
    ),
    ("conditional.log_prob(x)", ValueError, "this flow is conditional: give a context of shape (batch, 2)"),
    ("conditional.log_prob(x, torch.randn(4, 2))", ValueError, "the context of this flow has 4 rows for 5 inputs"),
    (
        "conditional.log_prob(x, torch.randn(5, 3))",
        ValueError,
        "the context of this flow takes inputs of shape (batch, 2)",
    ),
    ("conditional.sample(5)", ValueError, "this flow is conditional: give a context of shape (batch, 2)"),
    ("flow(x)", RuntimeError, "flow.log_prob(x) gives densities, flow.sample(n) draws, flow.encode(x) gives noise"),
    ("flow.sample(-1)", ValueError, "num_samples must be a positive integer, not -1"),
    ("flow.sample(2.5)", TypeError, "num_samples must be a positive integer, not 2.5"),
    ("flow.sample(True)", TypeError, "num_samples must be a positive integer, not True"),
    ("flow.sample_and_log_prob(True)", TypeError, "num_samples must be a positive integer, not True"),
    ("flow.sample(5, batch_size=2.5)", TypeError, "batch_size must be a positive integer, not 2.5"),
    ("flow.sample(5, batch_size=True)", TypeError, "batch_size must be a positive integer, not True"),
    ("flow.sample(5, batch_size=0)", ValueError, "batch_size must be a positive integer, not 0"),
]

LABELS = "one-hot: torch.nn.functional.one_hot(labels, 2).to(x.dtype)"
TENSORS = [
    ("conditional.log_prob(x, torch.tensor([0, 1, 1, 0, 1]))", ValueError, LABELS),
    ("conditional.log_prob(x, torch.tensor([[0], [1], [1], [0], [1]]))", ValueError, "one_hot(labels.squeeze(-1), 2)"),
    ("conditional.sample(5, torch.tensor([0, 1]))", ValueError, LABELS),
    ("conditional.sample_and_log_prob(5, torch.tensor([0, 1, 1]))", ValueError, LABELS),
    ("conditional.transform_to_noise(x, torch.tensor([0, 1, 1, 0, 1]))", ValueError, LABELS),
    ("FlowDistribution(conditional, torch.tensor([0, 1, 1]))", ValueError, LABELS),
    ("FlowDistribution(conditional, torch.tensor([[0], [1]]))", ValueError, "one_hot(labels.squeeze(-1), 2)"),
    (
        "FlowDistribution(conditional, 3)",
        TypeError,
        "the context of this distribution must be a torch.Tensor, not an int",
    ),
    ("FlowDistribution(conditional, 'c')", TypeError, "context of this distribution must be a torch.Tensor, not a str"),
    ("FlowDistribution(conditional, np.zeros((5, 2)))", TypeError, "must be a torch.Tensor, not a numpy.ndarray: give"),
    (
        "FlowDistribution(conditional, [[1.0, 2.0]])",
        TypeError,
        "must be a torch.Tensor, not a list: give torch.as_tensor",
    ),
    ("FlowDistribution(flow, support=3)", TypeError, "must be a constraint of torch.distributions.constraints, not 3"),
    ("FlowDistribution(flow, support='real')", TypeError, "support must be a constraint of torch.distributions"),
    (
        "FlowDistribution(flow, event_shape=3)",
        TypeError,
        "event_shape must be a tuple of integers, such as (3,), not 3",
    ),
    ("FlowDistribution(flow, event_shape='3')", TypeError, "event_shape must be a tuple of integers, such as (3,)"),
    ("FlowDistribution(flow, event_shape=(3.0,))", TypeError, "must be a tuple of integers, such as (3,), not (3.0,)"),
    ("FlowDistribution(flow).sample(5)", TypeError, "sample_shape must be a tuple of integers, .*, not 5; give (5,)"),
    ("FlowDistribution(flow).rsample(5)", TypeError, "sample_shape must be a tuple of integers, .*, not 5; give (5,)"),
    ("FlowDistribution(flow).sample((2.5,))", TypeError, "sample_shape must be a tuple of integers, .*, not (2.5,)"),
    ("FlowDistribution(flow).expand(5)", TypeError, "batch_shape must be a tuple of integers, .*, not 5; give (5,)"),
    (
        "FlowDistribution(flow).log_prob(np.zeros((5, 3)))",
        TypeError,
        "the values of this distribution must be a torch.T",
    ),
    (
        "FlowDistribution(flow).log_prob([[1.0, 2.0, 3.0]])",
        TypeError,
        "must be a torch.Tensor, not a list: give torch.as",
    ),
    (
        "FlowDistribution(flow).log_prob(None)",
        TypeError,
        "values of this distribution must be a torch.Tensor, not a None",
    ),
    (
        "flow.log_prob(np.zeros((5, 3)))",
        TypeError,
        "the inputs of this flow must be a torch.Tensor, not a numpy.ndarray",
    ),
    ("flow.log_prob(x, 3)", TypeError, "the context of this flow must be a torch.Tensor, not an int"),
    ("flow.sample(5, batch_size='a')", TypeError, "batch_size must be a positive integer, not 'a'"),
    ("layer([[1.0, 2.0, 3.0]])", TypeError, "the inputs of this layer must be a torch.Tensor, not a list"),
    ("layer(None)", TypeError, "the inputs of this layer must be a torch.Tensor, not a NoneType"),
    (
        "layer.inverse(np.zeros((5, 3)))",
        TypeError,
        "the inputs of this layer must be a torch.Tensor, not a numpy.ndarray",
    ),
    ("layer(x, 3)", TypeError, "the context of this layer must be a torch.Tensor, not an int"),
    ("MaskedCouplingLayer(3, net, mask)", TypeError, "scale_net must be a network, such as an nn.Module, not 3"),
    (
        "MaskedCouplingLayer(net, 'x', mask)",
        TypeError,
        "translation_net must be a network, such as an nn.Module, not 'x'",
    ),
    (
        "MaskedCouplingLayer(net, None, mask)",
        TypeError,
        "translation_net must be a network, such as an nn.Module, not N",
    ),
    ("MaskedCouplingLayer(mask, net, net)", TypeError, "scale_net must be a network, such as an nn.Module, not tensor"),
    (
        "MaskedCouplingLayer(nn.Linear, net, mask)",
        TypeError,
        "scale_net must be a network, not the class Linear: make one, Linear(…)",
    ),
    ("MaskedCouplingLayer(net, net, torch.tensor(0))", ValueError, "but this one is a single number, tensor(0)"),
    (
        "MaskedCouplingLayer(net, net, 0.5 * mask)",
        ValueError,
        "only 0 (transformed) and 1 (unchanged), but this one holds",
    ),
    ("MaskedCouplingLayer(net, net, mask[None])(x)", ValueError, "takes inputs of shape (batch, 1, 3), not (5, 3)"),
    (
        "MaskedCouplingLayer(nn.Linear(4, 3), net, mask)(x)",
        ValueError,
        "the network Linear does not take inputs of shape (5, 3) (mat1 and mat2",
    ),
    ("MaskedCouplingLayer(nn.LSTM(3, 3), net, mask)(x)", ValueError, "return shape (5, 3), but returned a tuple"),
    (
        "to_library('zuko', layer)()(np.zeros((5, 3)))",
        TypeError,
        "inputs of this transform must be a torch.Tensor, not a",
    ),
    (
        "to_library('torch', layer).inv(None)",
        TypeError,
        "the inputs of this transform must be a torch.Tensor, not a None",
    ),
    ("to_library('torch', layer).condition(3)(x)", TypeError, "the context of this transform must be a torch.Tensor"),
    ("to_library('normflows', layer)(3)", TypeError, "the inputs of this layer must be a torch.Tensor, not an int"),
    (
        "to_library('freia', layer)([np.zeros((5, 3))])",
        TypeError,
        "the inputs of this layer must be a torch.Tensor, not",
    ),
    ("to_library(layer, 'zuko')", ValueError, "unknown library MaskedCouplingLayer("),
    ("build_flow(flow, 3)", ValueError, "unknown flow Flow("),
    (
        "build_flow('masked-affine', 3, torch.randn(500, 2))",
        ValueError,
        "context_features must be a positive integer, not",
    ),
    (
        "build_flow('masked-affine', 3, masks=torch.eye(99))",
        ValueError,
        "each mask must have shape (3,), but one has (99,)",
    ),
]

BRIDGES = [
    ("as_transform(3)", TypeError, "builtins.int is of no known library; known: FrEIA, nflows, normflows, pyro, "),
    ("as_transform(None)", TypeError, "builtins.NoneType is of no known library; known: "),
    ("as_transform(net)", TypeError, "torch.nn.modules.linear.Linear is of no known library; known: "),
    ("as_transform(flow)", TypeError, "adapters.flow.Flow is no transform"),
    ("as_flow('zuko-nsf')", TypeError, "builtins.str is of no known library; known: "),
    ("as_flow(net)", TypeError, "torch.nn.modules.linear.Linear is of no known library; known: "),
    ("as_flow(layer)", TypeError, "adapters.layers.coupling.MaskedCouplingLayer is no flow"),
    ("to_library('tensorflow', layer)", ValueError, "unknown library 'tensorflow'; known: freia, nflows, "),
    ("to_library(3, layer)", ValueError, "unknown library 3; known: freia, nflows, "),
    (
        "to_library('zuko', net)",
        TypeError,
        "to_library exports an nflows Transform, not torch.nn.modules.linear.Linear",
    ),
    ("to_library('zuko', None)", TypeError, "to_library exports an nflows Transform, not builtins.NoneType"),
    ("to_library('pyro', layer, event_dim=-1)", ValueError, "event_dim must be at least 0, not -1"),
]

DISTRIBUTION = [
    ("FlowDistribution(3)", TypeError, "builtins.int is of no known library; known: "),
    ("FlowDistribution(layer)", TypeError, "adapters.layers.coupling.MaskedCouplingLayer is no flow"),
    ("FlowDistribution(flow, torch.randn(5, 2))", ValueError, "unconditional, but a context of shape (5, 2) was given"),
    ("FlowDistribution(conditional)", ValueError, "this flow is conditional: give a context of shape (*batch, 2)"),
    (
        "FlowDistribution(conditional, torch.randn(5, 3))",
        ValueError,
        "the context must have the shape (*batch, 2), not (5, 3)",
    ),
    (
        "FlowDistribution(conditional, torch.tensor(1.0))",
        ValueError,
        "the context must have the shape (*batch, 2), not ()",
    ),
    ("FlowDistribution(flow).log_prob(torch.randn(5, 4))", ValueError, "must end in the event shape (3,), not (5, 4)"),
]

FILES = [
    ("save_flow(flow, None)", TypeError, "directory must be a path, not None"),
    ("save_flow(flow, 3)", TypeError, "directory must be a path, not 3"),
    ("save_flow(3, here)", TypeError, "builtins.int is of no known library; known: "),
    ("save_flow(here, flow)", TypeError, "directory must be a path, not Flow("),
    ("save_flow(layer, here)", TypeError, "adapters.layers.coupling.MaskedCouplingLayer is no flow"),
    ("save_flow(flow.state_dict(), here)", TypeError, "collections.OrderedDict is of no known library"),
    (
        "save_flow(unnamed, here)",
        TypeError,
        "was not made by build_flow, so name the function that made it: save_flow(flow, ",
    ),
    ("save_flow(flow, here, 'build')", ValueError, "a maker is named as 'my_module:my_function', not 'build'"),
    (
        "save_flow(flow, here, build_flow)",
        ValueError,
        "a maker is named as 'my_module:my_function', not <function build_f",
    ),
    (
        "save_flow(flow, here, 'no_such:build')",
        ImportError,
        "no_such:build: no_such can't be imported (Module",
    ),
    ("save_flow(flow, here, 'adapters:build')", ValueError, "adapters:build: adapters has no build"),
    (
        "save_flow(flow, here, 'adapters:build_flow', {'name': 'masked-affine'})",
        ValueError,
        "missing 1 required positional",
    ),
    ("save_flow(flow, here, 'adapters:build_flow', [3])", TypeError, "arguments must be a dictionary, not [3]"),
    ("save_flow(flow, here, arguments={'features': 3})", TypeError, "arguments are those of a maker: name it, too"),
    ("load_flow(here)", FileNotFoundError, "no flow.safetensors in .*: give the directory that a run wrote"),
    (
        "load_flow(here / 'nowhere')",
        FileNotFoundError,
        "no flow.safetensors in .*nowhere: give the directory that a run wr",
    ),
    ("load_flow('best.safetensors')", FileNotFoundError, "no best.safetensors in "),
    ("load_flow(None)", TypeError, "directory must be a path, not None"),
    ("load_flow(flow)", TypeError, "directory must be a path, not Flow("),
]


@pytest.mark.parametrize(
    ("use", "error", "message"),
    MASKS + LAYER + BUILD + FLOW + TENSORS + BRIDGES + DISTRIBUTION + FILES,
    ids=lambda value: str(value),
)
def test_a_wrong_use_says_what_came_and_what_is_wanted(use, error, message, tmp_path):
    net, mask = nn.Linear(3, 3), torch.tensor([1.0, 0.0, 1.0])
    names = {name: getattr(adapters, name) for name in adapters.__all__} | {
        "torch": torch,
        "np": np,
        "nn": nn,
        "Logit": Logit,
        "Marginals": Marginals,
        "Standardize": Standardize,
        "check_options": check_options,
        "x": torch.randn(5, 3),
        "mask": mask,
        "net": net,
        "layer": adapters.MaskedCouplingLayer(net, net, mask),
        "flow": adapters.build_flow("masked-affine", 3, layers=1, hidden_features=(4,)),
        "conditional": adapters.build_flow("masked-affine", 3, 2, layers=1, hidden_features=(4,)),
        "unnamed": adapters.build_flow("masked-affine", 3, layers=1),
        "here": tmp_path,
    }
    del names["unnamed"].blueprint
    with pytest.raises(error) as caught:
        eval(use, names)
    found = str(caught.value)
    assert re.search(".*".join(map(re.escape, message.split(".*"))), found), found
    assert type(caught.value) is error and len(found) < 500
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [[1, 0, 1], np.array([1, 0, 1]), torch.tensor([True, False, True]), (1.0, 0.0, 1.0)])
def test_a_mask_may_be_a_list_an_array_or_of_any_dtype_and_a_network_any_function(mask):
    x = torch.randn(5, 3)
    z, log_det = adapters.MaskedCouplingLayer(torch.tanh, lambda z: z + 1, mask)(x)
    assert torch.equal(z[:, ::2], x[:, ::2]) and torch.equal(z[:, 1], x[:, 1] + 1) and log_det.eq(0).all()


def test_labels_given_one_hot_are_a_context():
    flow = adapters.build_flow("masked-affine", 3, 2, layers=1, hidden_features=(4,))
    x, labels = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    assert flow.log_prob(x, torch.nn.functional.one_hot(labels, 2).to(x.dtype)).shape == (5,)


# The scripts: a wrong command line gives one line, before any long work, and leaves nothing behind.

COMMANDS = [
    ("toy --data moons", "unknown data 'moons'; known: two-gaussians, chequerboard"),
    ("toy --flow masked-afine", "unknown flow 'masked-afine'; known: masked-affine,"),
    ("toy --layers 0", "layers must be positive, not 0"),
    ("toy --hidden", "hidden needs at least one width, e.g. --hidden 64 64"),
    ("toy --hidden 8 0", "hidden[1] must be positive, not 0"),
    ("toy --steps 0", "steps must be positive, not 0"),
    ("toy --batch-size 0", "batch_size must be positive, not 0"),
    ("toy --lr 0", "lr must be positive, not 0.0"),
    ("toy --lr inf", "lr must be positive and finite, not inf"),
    ("toy --lr nan", "lr must be positive, not nan"),
    ("toy --seconds 0", "seconds must be positive, not 0.0"),
    ("toy --seconds inf", "seconds must be positive and finite, not inf"),
    ("toy --seed -1", "seed must lie between 0 and 2**63 - 1, not -1"),
    ("toy --seed 100000000000000000000000000", "seed must lie between 0 and 2**63 - 1, not 1000"),
    ("toy --options layers 5", "layers is no option, but an argument of its own"),
    ("toy --options bins 3", "masked-affine has no option 'bins'; it has: scale_bound, net, dropout"),
    ("toy --options scale_bound inf", "scale_bound must be finite, not inf"),
    ("toy --options dropout nan", "dropout must be finite, not nan"),
    ("toy --options dropout 1", "dropout must be in [0, 1), not 1"),
    ("mnist --options net conv", "net is no option, but an argument of its own, where there is one: --net conv"),
    ("toy --flow masked-spline --options bins 0", "bins must be at least 2, not 0"),
    ("toy --flow masked-spline --options bins 2.5", "bins must be an integer, not 2.5"),
    ("toy --flow masked-spline --options tail_bound inf", "tail_bound must be finite, not inf"),
    ("toy --flow masked-spline --options minimum 1", "minimum must be in (0, 1), not 1"),
    ("toy --flow pyro-spline --options tail_bound -1", "tail_bound must be positive, not -1"),
    ("toy --flow nflows-rqs --options tail_bound -1", "tail_bound must be positive, not -1"),
    ("toy --flow normflows-rqs --options tail_bound -1", "tail_bound must be positive, not -1"),
    ("toy --load nowhere", "no pictures.pt in nowhere: give the directory of a run that has ended"),
    ("toy --load nowhere --steps 3 --data chequerboard", "--load trains nothing, so --data, --steps would be ignored"),
    ("toy --resume", "nothing to resume: no training.pt in"),
    ("toy --device gpu", "no device 'gpu' here; there are: auto, cpu"),
    ("mnist --mask chess", "unknown mask 'chess'; known: chequerboard, random, pyramid"),
    ("mnist --net cnn", "unknown net 'cnn'; known: mlp, conv"),
    ("mnist --flow resflow", "unknown flow 'resflow'"),
    ("mnist --dataset CIFAR", "unknown dataset 'CIFAR'; known: MNIST, FashionMNIST, KMNIST, QMNIST"),
    ("mnist --preprocess whiten", "unknown preprocess 'whiten'; known: none, affine, logit, marginals"),
    ("mnist --hidden", "hidden needs at least one width"),
    ("mnist --hidden 0", "hidden[0] must be positive, not 0"),
    ("mnist --layers 0", "layers must be positive, not 0"),
    ("mnist --epochs 0", "epochs must be positive, not 0"),
    ("mnist --limit 0", "limit must be positive, not 0"),
    ("mnist --limit 5", "batch_size 128 is more than the 5 training images"),
    ("mnist --limit 200 --accumulate 1000", "accumulate 1000 is more than the 7 batches of the training"),
    ("mnist --lr inf", "lr must be positive and finite, not inf"),
    ("mnist --weight-decay -1", "weight_decay must not be negative, and finite, but is -1.0"),
    ("mnist --weight-decay inf", "weight_decay must not be negative, and finite, but is inf"),
    ("mnist --clip 0", "clip must be positive, not 0.0"),
    ("mnist --clip nan", "clip must be positive, not nan"),
    ("mnist --average 1", "average must lie between 0 and 1, not 1.0"),
    ("mnist --accumulate 0", "accumulate must be positive, not 0"),
    ("mnist --seconds 0", "seconds must be positive, not 0.0"),
    ("mnist --patience 0", "patience must be positive, not 0"),
    ("mnist --precision fp8", "unknown precision 'fp8'; known: no, bf16, fp16"),
    ("mnist --seed -1", "seed must lie between 0 and 2**63 - 1, not -1"),
    ("mnist --samples 0", "samples must be positive, not 0"),
    ("mnist --samples 1000000000", "samples must be at most 10,000, not 1,000,000,000"),
    ("mnist --temperature 0", "temperature must be positive, not 0.0"),
    ("mnist --temperature inf", "temperature must be positive and finite, not inf"),
    ("mnist --importance -1", "importance must not be negative, but is -1"),
    ("mnist --importance 100000000", "importance must be at most 10,000, not 100,000,000"),
    ("mnist --track nothing", "unknown track 'nothing'; known: "),
    ("mnist --save-every 0", "save_every must be positive, not 0.0"),
    ("mnist --resume", "nothing to resume: no training.pt in"),
    ("mnist --load nowhere", "no flow.safetensors in nowhere: give the directory that a run wrote"),
    ("mnist --load nowhere --epochs 3 --mask random", "--load trains nothing, so --mask, --epochs would be ignored"),
    ("mnist --net conv --flow zuko-nsf", "net conv is for hand-written flows; zuko-nsf has its own networks"),
    ("mnist --options dropout 1.5", "dropout must be in [0, 1), not 1.5"),
    ("mnist --options activation swish9", "unknown activation 'swish9'; known: relu, silu, gelu, tanh, elu"),
    ("mnist --device cuda:99", "no device 'cuda:99' here"),
    ("pyro_vae --prior cauchy", "unknown prior 'cauchy'; known: gaussian, mog, vamp, flow, all"),
    ("pyro_vae --flow maf", "unknown flow 'maf'"),
    ("pyro_vae --latent 0", "latent must be positive, not 0"),
    ("pyro_vae --latent 1", "a coupling flow needs at least 2 features, not 1"),
    ("pyro_vae --layers 0", "layers must be positive, not 0"),
    ("pyro_vae --hidden", "hidden needs at least one width"),
    ("pyro_vae --width", "width needs at least one width"),
    ("pyro_vae --width 0", "width[0] must be positive, not 0"),
    ("pyro_vae --components 0", "components must be positive, not 0"),
    ("pyro_vae --posterior mean", "unknown posterior 'mean'; known: gaussian, flow"),
    ("pyro_vae --binarize none", "unknown binarize 'none'; known: threshold, dynamic"),
    ("pyro_vae --dropout 1", "dropout must lie between 0 and 1, not 1.0"),
    ("pyro_vae --dropout nan", "dropout must lie between 0 and 1, not nan"),
    ("pyro_vae --augment -1", "augment must be 0 (none) or positive, not -1.0"),
    ("pyro_vae --augment inf", "augment must be 0 (none) or positive, not inf"),
    ("pyro_vae --augment 1 --seconds 5", "augment follows the rate, which seconds leave open"),
    ("pyro_vae --kl-warmup nan", "kl_warmup must be 0 (none) or positive, not nan"),
    ("pyro_vae --importance-samples 0", "importance_samples must be positive, not 0"),
    ("pyro_vae --importance-samples 100000000", "importance_samples must be at most 100,000, not 100,000,000"),
    ("pyro_vae --importance-images 0", "importance_images must be positive, not 0"),
    ("pyro_vae --seeds 0", "seeds must be positive, not 0"),
    ("pyro_vae --seeds 1000000000000", "seeds must be at most 1,000, not 1,000,000,000,000"),
    ("pyro_vae --seed -2", "seed must lie between 0 and 2**63 - 1, not -2"),
    ("pyro_vae --warmup 2", "warmup must lie between 0 and 1, not 2.0"),
    ("pyro_vae --decay -1", "decay must lie between 0 and 1, not -1.0"),
    ("pyro_vae --lr 1e400", "lr must be positive and finite, not inf"),
    ("pyro_vae --options layers 3", "layers is no option, but an argument of its own"),
    ("pyro_vae --benchmark --batch-size 0", "batch_size must be positive, not 0"),
    ("pyro_vae --load nowhere", "no pictures.pt in nowhere: give the directory of a run that has ended"),
    ("pyro_vae --load nowhere --prior all", "--load trains nothing, so --prior would be ignored: leave it out"),
    ("pyro_vae --resume", "nothing to resume: no training.pt in"),
    (
        "compare --task cifar",
        "unknown task 'cifar'; known: two-gaussians, chequerboard, mnist, vae-prior, npe, npe-gaussian, speed",
    ),
    ("compare --flows maf", "unknown flow 'maf'; known: masked-affine,"),
    ("compare --flows math:pi", "math:pi is a float; it must be a layer, a flow, or a class or function"),
    ("compare --budget soon", "budget must be seconds or steps, at most 10⁹, such as 30s or 2000steps, not 'soon'"),
    ("compare --match depth", "unknown match 'depth'; known: width, parameters"),
    ("compare --hidden", "hidden needs at least one width"),
    ("compare --hidden 1000000", "hidden[0] must be at most 131,072, not 1,000,000"),
    ("compare --layers 0", "layers must be positive, not 0"),
    ("compare --seeds 0", "seeds must be positive, not 0"),
    ("compare --limit 200", "limit is of the images of mnist and vae-prior; chequerboard has none: leave it out"),
    ("compare --task mnist --limit 0", "limit must be positive, not 0"),
    ("compare --task mnist --limit 5", "limit must be at least 128, the images of a batch, not 5"),
    ("compare --data-dir images", "data_dir is of the images of mnist and vae-prior; chequerboard has none"),
    ("compare --resume", "nothing to resume: no compare.json in"),
    ("compare --task speed --resume", "--resume: speed has no rows to keep; run it again without"),
    ("compare --load nowhere", "no compare.json in nowhere: give the directory of a comparison"),
    ("compare --load nowhere --task mnist", "--load trains nothing, so --task would be ignored: leave it out"),
    ("compare --device tpu", "no device 'tpu' here"),
    ("overhead --hidden", "hidden needs at least one width"),
    ("overhead --hidden 0", "hidden[0] must be positive, not 0"),
    ("overhead --features 0", "features must be positive, not 0"),
    ("overhead --features 1", "features must be at least 2, not 1"),
    ("overhead --layers 0", "layers must be positive, not 0"),
    ("overhead --rounds 0", "rounds must be positive, not 0"),
    ("overhead --batch-size 0", "batch_size must be positive, not 0"),
    ("overhead --device tpu", "no device 'tpu' here"),
]


@pytest.mark.parametrize(("command", "message"), COMMANDS)
def test_a_wrong_command_gives_one_line(command, message, tmp_path):
    script, *arguments = shlex.split(command)
    module = importlib.import_module(f"runs.{script}")
    with pytest.raises(SystemExit) as stopped:
        cli(module.main, module.Options, [*arguments, "--out", str(tmp_path / "out")])
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)
    assert message in str(stopped.value)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("script", ["toy", "mnist", "pyro_vae", "compare", "overhead"])
def test_out_that_is_a_file_is_refused(script, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--out .* can't be written to"):
        run(script, out=tmp_path / "file")
