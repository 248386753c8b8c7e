"""save_flow and load_flow: whatever is saved comes back the same, and nothing else is ever taken for a flow."""

import json
import os
import resource
import sys
import threading
import time

import pytest
import safetensors
import safetensors.torch
import torch
from nflows.distributions import ConditionalDiagonalNormal
from nflows.flows import Flow as NflowsFlow
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from adapters import as_flow, build_flow, flow_names, load_flow, random_mask, save_flow
from adapters.checkpoint import FILE, FORMAT, _checksum, write_atomically
from adapters.parts import inner_of, parts_of
from adapters.preprocess import Logit, Marginals, Probit, Standardize
from tests.examples import models
from tests.laws import batch, context_for, randomise

MODELS = models()


def make_model(name: str):
    return MODELS[name].make()


def make_stack(features: int, tail_bound: float = 3.0, activation: str = "relu", norm: bool = False):
    """A flow with no blueprint of its own, as a user's module makes one."""
    flow = build_flow("masked-spline", features, layers=2, hidden_features=(8,), tail_bound=tail_bound)
    if norm:
        parametrizations.weight_norm(parts_of(inner_of(flow.transform))[0].conditioner[0])
    del flow.blueprint
    return flow


def make_nothing():
    return 3


# What is saved comes back


@pytest.mark.parametrize("name", flow_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_flow_comes_back_the_same(name, dtype, tmp_path):
    masks = [random_mask(4), random_mask(4), random_mask(4)]
    data = batch(50, 4).float()
    flow = build_flow(name, 4, 2, 3, (8, 8), masks, "tanh", preprocess=Standardize.of(data))
    randomise(flow).to(dtype)
    random_state = torch.get_rng_state()
    assert save_flow(flow, tmp_path / "run") == tmp_path / "run" / FILE
    loaded = load_flow(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), random_state), "neither may touch the random state"
    x, context = data.to(dtype), batch(50, 2, seed=3).to(dtype)
    assert_close(loaded.log_prob(x, context), flow.log_prob(x, context), atol=0, rtol=0)
    assert loaded.sample(3, context).dtype == dtype
    save_flow(loaded, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "run" / FILE).read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_a_flow_of_any_library_comes_back_by_its_maker(name, tmp_path):
    maker, model = f"{__name__}:make_model", MODELS[name]
    flow = randomise(as_flow(model.make()), scale=0.1)
    path = save_flow(flow, tmp_path, maker=maker, arguments={"name": name})
    loaded = load_flow(tmp_path, maker=maker)
    x, context = torch.rand(5, *model.event_shape).double(), context_for(model.context_features, 5)
    assert_close(loaded.log_prob(x, context), flow.eval().log_prob(x, context), atol=0, rtol=0)
    assert save_flow(loaded, tmp_path / "again").read_bytes() == path.read_bytes(), "it has its blueprint now"


@pytest.mark.parametrize("preprocess", [Logit(0.01, 2), Probit(), Marginals(torch.tensor([[0.5, 0.5], [0.1, 0.9]]))])
def test_every_preprocess_comes_back(preprocess, tmp_path):
    flow = build_flow("masked-affine", 2, layers=1, preprocess=preprocess)
    x = torch.rand(5, 2)
    assert_close(load_flow(save_flow(flow, tmp_path)).log_prob(x), flow.log_prob(x), atol=0, rtol=0)


def test_a_loaded_flow_has_no_dropout(tmp_path):
    flow = randomise(build_flow("masked-affine", 4, layers=2, dropout=0.5))
    loaded = load_flow(save_flow(flow, tmp_path))
    x = batch(5, 4)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded.log_prob(x), loaded.log_prob(x))
    assert not torch.equal(loaded.train().log_prob(x), loaded.log_prob(x))
    assert all(module.training for module in flow.modules()), "saving leaves the mode alone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_tensor_keeps_its_dtype(dtype, tmp_path):
    flow = build_flow("masked-affine", 2, layers=2, hidden_features=(8,), preprocess=Logit())
    _, layers = parts_of(flow.transform)
    layers.to(dtype)
    parts_of(inner_of(layers))[0].double()
    loaded = load_flow(save_flow(flow, tmp_path)).state_dict()
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: tensor.dtype for name, tensor in flow.state_dict().items()
    }
    assert all(torch.equal(loaded[name], tensor) for name, tensor in flow.state_dict().items())


def test_a_compiled_flow_is_saved_as_if_it_were_not(tmp_path):
    flow = randomise(build_flow("masked-affine", 2, layers=2, hidden_features=(8,)))
    plain = save_flow(flow, tmp_path / "plain").read_bytes()
    assert save_flow(torch.compile(flow), tmp_path / "whole").read_bytes() == plain
    assert save_flow(nn.DataParallel(torch.compile(flow)), tmp_path / "parallel").read_bytes() == plain
    layers = parts_of(inner_of(flow.transform))
    layers[1].conditioner = torch.compile(layers[1].conditioner)
    flow.transform = torch.compile(flow.transform)
    assert save_flow(flow, tmp_path / "parts").read_bytes() == plain


def test_loading_does_not_follow_the_default_device_or_dtype(tmp_path):
    flow = build_flow("masked-histogram", 4, layers=2, hidden_features=(8,))
    save_flow(flow, tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            loaded = load_flow(tmp_path)
            save_flow(loaded, tmp_path / "again")
    finally:
        torch.set_default_dtype(torch.float32)
    x = torch.randn(5, 4)
    assert_close(loaded.log_prob(x), flow.log_prob(x), atol=0, rtol=0)
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


def test_a_path_to_the_file_serves_as_well_as_its_directory(tmp_path):
    flow = build_flow("masked-affine", 2, layers=1)
    path = save_flow(flow, tmp_path / "deep" / "best.safetensors")
    assert path == tmp_path / "deep" / "best.safetensors" and path.is_file()
    assert_close(load_flow(path).state_dict(), flow.state_dict())
    assert_close(load_flow(str(save_flow(flow, str(tmp_path)))).state_dict(), flow.state_dict())
    (tmp_path / "run.safetensors").mkdir()  # a directory by that name, of an earlier version
    assert save_flow(flow, tmp_path / "run.safetensors") == tmp_path / "run.safetensors" / FILE


# What would not come back is not saved


def _norm(flow):
    parametrizations.weight_norm(parts_of(inner_of(flow.transform))[0].conditioner[0])


def _old_norm(flow):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(parts_of(inner_of(flow.transform))[0].conditioner[0])


def _prune(flow):
    prune.random_unstructured(parts_of(inner_of(flow.transform))[0].conditioner[0], "weight", 0.5)


def _base(flow):
    flow.base = ConditionalDiagonalNormal([4], nn.Linear(2, 8))


def _same_tensors_base(flow):
    flow.base = type("MyNormal", (type(flow.base),), {})([4])


def _activation(flow):
    parts_of(inner_of(flow.transform))[0].conditioner[1] = nn.Tanh()


def _number(flow):
    parts_of(inner_of(flow.transform))[0].tail_bound = 5.0


def _width(flow):
    layer = parts_of(inner_of(flow.transform))[0].conditioner[0]
    layer.weight = nn.Parameter(layer.weight[:, :1])


def _nan(flow):
    parts_of(inner_of(flow.transform))[1].conditioner[0].bias.data[2] = torch.nan


def _inf(flow):
    parts_of(inner_of(flow.transform))[1].conditioner[0].bias.data[1:3] = torch.inf


def _complex(flow):
    flow.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))


def _no_tensor(flow):
    flow.base = type("Extra", (type(flow.base),), {"get_extra_state": lambda self: {"epoch": 3}})([4])


def _blueprint(flow):
    flow.blueprint["hidden_features"] = (8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _norm,
            "conditioner.0 is torch.nn.utils.parametrize.ParametrizedLinear, but the blueprint makes torch.*Linear",
        ),
        (
            _old_norm,
            "conditioner.0.weight is missing, and should be|weight_g is .*, and should be missing",
        ),
        (_prune, r"conditioner.0.weight is missing, and should be of shape \(8, 2\)"),
        (_base, "_distribution is nflows.*ConditionalDiagonalNormal, but the blueprint makes adapters.flow.Standard"),
        (
            _same_tensors_base,
            "_distribution is tests.test_checkpoint.MyNormal, but the blueprint makes adapters.flow",
        ),
        (_activation, "conditioner.1 is torch.*Tanh, but the blueprint makes torch.*ReLU"),
        (_number, "tail_bound is 5.0, but the blueprint makes 4.0"),
        (_width, r"conditioner.0.weight is of shape \(8, 1\), and should be of shape \(8, 2\)"),
        (_nan, "_transforms.1.conditioner.0.bias holds 1 of 8 values that are not finite"),
        (_inf, "_transforms.1.conditioner.0.bias holds 2 of 8 values that are not finite"),
        (_complex, "holds phase, of torch.complex128, which a safetensors file can't hold"),
        (_no_tensor, "holds _distribution._extra_state, of dict, which a safetensors file can't hold"),
        (_blueprint, "conditioner.2.out_features is 46, but the blueprint makes 8"),
    ],
)
def test_a_flow_that_would_not_come_back_is_not_saved(change, message, tmp_path):
    flow = build_flow("masked-spline", 4, layers=2, hidden_features=(8,))
    before = save_flow(flow, tmp_path).read_bytes()
    change(flow)
    with pytest.raises(ValueError, match=f"this flow can't be saved: .*{message}"):
        save_flow(flow, tmp_path)
    assert (tmp_path / FILE).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_what_is_no_data_is_not_saved(tmp_path):
    maker = f"{__name__}:make_stack"
    with pytest.raises(TypeError, match="this Flow was not made by build_flow, so name the function that made it"):
        save_flow(NflowsFlow(None, None), tmp_path)

    class MyTransform(Standardize):
        pass

    flow = build_flow("masked-affine", 2, preprocess=MyTransform(torch.zeros(2), torch.ones(2)))
    with pytest.raises(TypeError, match="preprocess of Standardize, Logit, Probit, Marginals, not MyTransform"):
        save_flow(flow, tmp_path)
    with pytest.raises(TypeError, match="a blueprint is of numbers, strings, lists and dictionaries"):
        save_flow(make_stack(2), tmp_path, maker=maker, arguments={"features": torch.tensor(2)})
    with pytest.raises(TypeError, match="arguments are those of a maker: name it, too"):
        save_flow(flow, tmp_path, arguments={"features": 2})
    with pytest.raises(TypeError, match="directory must be a path, not 3"):
        save_flow(flow, 3)
    assert not list(tmp_path.iterdir())


# Makers


def test_a_maker_may_do_what_build_flow_does_not(tmp_path):
    maker = f"{__name__}:make_stack"
    flow = randomise(make_stack(4, norm=True))
    path = save_flow(flow, tmp_path, maker, {"features": 4, "norm": True})
    x = batch(5, 4)
    assert_close(load_flow(path, maker).log_prob(x), flow.log_prob(x), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("maker", "arguments", "error", "message"),
    [
        ("make_stack", {"features": 4}, ValueError, "named as 'my_module:my_function', not 'make_stack'"),
        ("a:b:c", {}, ValueError, "named as 'my_module:my_function', not 'a:b:c'"),
        (".relative:make", {}, ValueError, "'.relative:make' names no layer or flow; write"),
        (make_stack, {}, ValueError, "named as 'my_module:my_function', not <function make_stack"),
        ("no_such_module:make", {}, ImportError, "no_such_module can't be imported .*No module named"),
        (f"{__name__}:make_stuck", {}, ValueError, f"{__name__} has no make_stuck; it has make_model,"),
        (f"{__name__}:make_stack", {}, ValueError, "missing 1 required positional argument: 'features'"),
        (f"{__name__}:make_stack", {"features": 3}, ValueError, r"out_features is 46, but the blueprint makes 23"),
        (
            f"{__name__}:make_stack",
            {"features": 4, "tail_bound": 2.0},
            ValueError,
            "tail_bound is 3.0, but .* makes 2.0",
        ),
        (
            f"{__name__}:make_stack",
            {"features": 4, "norm": True},
            ValueError,
            "torch.*Linear, but the blueprint makes torch.*ParametrizedLinear",
        ),
        (f"{__name__}:make_nothing", {}, ValueError, "makes no flow .*int is of no known library"),
    ],
)
def test_a_maker_that_does_not_make_this_flow_is_refused(maker, arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_flow(make_stack(4), tmp_path, maker=maker, arguments=arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_does_not_choose_what_is_imported(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('code of the file ran')")
    monkeypatch.syspath_prepend(tmp_path)
    mine = f"{__name__}:make_stack"
    path = save_flow(make_stack(4), tmp_path, mine, {"features": 4})
    craft(path, blueprint={"maker": "hostile:make", "arguments": {}})
    with pytest.raises(ValueError, match=r"saved with a maker: if you trust .* load_flow\(…, maker='hostile:make'\)"):
        load_flow(path)
    with pytest.raises(ValueError, match="was made by 'hostile:make', not by 'tests.test_checkpoint:make_stack'"):
        load_flow(path, mine)
    save_flow(build_flow("masked-affine", 2, layers=1), path)
    with pytest.raises(ValueError, match="was made by build_flow, not by 'hostile:make'"):
        load_flow(path, "hostile:make")
    assert "hostile" not in sys.modules


# Damaged and hostile files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    flow = build_flow(
        "masked-spline", 4, 2, 2, (8, 8), preprocess=Standardize(torch.zeros(4), torch.ones(4)), tail_bound=3
    )
    return save_flow(flow, tmp_path_factory.mktemp("whole")).read_bytes()


def craft(path, *, document=..., metadata=..., blueprint=..., tensors=None, **changes) -> None:
    """Write the file anew with these changes, and a checksum that is right."""
    with safetensors.safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["flow"])["blueprint"]
    held = safetensors.torch.load_file(path) if tensors is None else tensors
    blueprint = (
        {key: value for key, value in (found | changes).items() if value is not ...} if blueprint is ... else blueprint
    )
    if document is ...:
        document = json.dumps({"format": FORMAT, "blueprint": blueprint, "checksum": _checksum(blueprint, held)})
    safetensors.torch.save_file(held, path, {"flow": document} if metadata is ... else metadata)


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


STRUCTURE = [
    ({"metadata": None}, "holds no flow's blueprint: it was not written by save_flow"),
    ({"metadata": {"format": "pt"}}, "holds no flow's blueprint"),
    (
        {"metadata": {"recipe": "{}"}},
        "was written by an earlier version, without a checksum; restore this file or",
    ),
    ({"document": ""}, "its blueprint is damaged"),
    ({"document": "{"}, "its blueprint is damaged"),
    ({"document": "3"}, "its blueprint is damaged"),
    ({"document": "null"}, "its blueprint is damaged"),
    ({"document": "[]"}, "its blueprint is damaged"),
    ({"document": '{"recipe": {}, "checksum": "0"}'}, "another version, in format 1; this one reads format 3; restore"),
    ({"document": '{"format": 4, "blueprint": {}}'}, "another version, in format 4; this one reads format 3"),
    ({"document": '{"format": 3}'}, "its blueprint is damaged .*'blueprint'"),
    ({"document": '{"format": 3, "blueprint": {}}'}, "its blueprint is damaged .*'checksum'"),
    ({"document": '{"format": 3, "blueprint": {}, "checksum": "0"}'}, "its content does not match its checksum"),
    ({"document": '{"format": 3, "blueprint": {}, "checksum": null}'}, "its content does not match its checksum"),
    ({"document": "[" * 100_000 + "]" * 100_000}, "its blueprint is damaged .*Recursion"),
    ({"document": "9" * 10_000}, "its blueprint is damaged"),
    ({"blueprint": 3}, "its blueprint is no dictionary, but 3"),
    ({"blueprint": None}, "its blueprint is no dictionary, but None"),
    ({"blueprint": ["x"]}, "its blueprint is no dictionary, but"),
    (
        {"blueprint": {}},
        "its blueprint has no activation, context_features, features, hidden_features, layers, name, preproc",
    ),
    ({"layers": ...}, "its blueprint has no layers"),
    ({"preprocess": ...}, "its blueprint has no preprocess"),
    ({"name": ...}, "its blueprint has no name"),
    ({"colour": 3}, "masked-spline has no option 'colour'"),
    ({"masks": []}, "masks is no option, but an argument of its own"),
    ({"specification": 3}, "masked-spline has no option 'specification'"),
    ({"maker": "os:system"}, "saved with a maker"),
]
VALUES = [
    ({"name": "os:system"}, r"saved with a maker: if you trust .*maker=.os:system"),
    ({"name": "masked-afine"}, "unknown flow 'masked-afine'"),
    ({"name": None}, "unknown flow None"),
    ({"name": ["masked-spline"]}, r"unknown flow \['masked-spline'\]"),
    ({"name": "masked-affine"}, "masked-affine has no option 'tail_bound'"),
    ({"name": "masked-affine", "tail_bound": ...}, "its weights are those of another flow than masked-affine"),
    ({"name": "nflows-rqs"}, "its weights are those of another flow than nflows-rqs"),
    ({"features": "4"}, "features must be a positive integer, not '4'"),
    ({"features": -4}, "features must be a positive integer, not -4"),
    ({"features": 10**9}, "preprocess is of data with 4 coordinates, but features is 1000000000"),
    ({"context_features": 0}, "context_features must be a positive integer, not 0"),
    ({"context_features": None}, "those of another flow than masked-spline, or .* is of shape .*, and should be"),
    ({"context_features": 10**10}, "asks for a far larger flow than it holds the weights of"),
    ({"context_features": 10**30}, "its blueprint makes no flow"),
    ({"layers": True}, "its blueprint has True layers, but it holds masks for 2"),
    ({"layers": 2.0}, "layers must be a positive integer, not 2.0"),
    ({"layers": 3}, "its blueprint has 3 layers, but it holds masks for 2"),
    ({"layers": 10**9}, "its blueprint has 1000000000 layers, but it holds masks for 2"),
    ({"hidden_features": [10**9]}, "asks for a far larger flow than it holds the weights of"),
    ({"hidden_features": [8] * 10**5}, "asks for a far larger flow than it holds the weights of"),
    ({"hidden_features": [1e400]}, r"hidden_features\[0\] must be a positive integer, not inf"),
    ({"hidden_features": "8"}, "hidden_features must be a list of widths"),
    ({"hidden_features": None}, "hidden_features must be a list of widths"),
    ({"hidden_features": {"8": 8}}, r"hidden_features\[0\] must be a positive integer, not '8'"),
    ({"hidden_features": [8]}, "its weights are those of another flow"),
    ({"activation": "rellu"}, "unknown activation 'rellu'"),
    ({"activation": ["relu"]}, r"unknown activation \['relu'\]"),
    ({"bins": 10**9}, "asks for a far larger flow than it holds the weights of"),
    ({"bins": 2.5}, "bins must be an integer, not 2.5"),
    ({"tail_bound": float("nan")}, "tail_bound must be finite, not nan"),
    ({"tail_bound": "4"}, "tail_bound must be a number, not '4'"),
    ({"minimum": -1}, "minimum must be in"),
    ({"dropout": 2}, "dropout must be in"),
    ({"net": "perceptron"}, "unknown net 'perceptron'"),
    ({"preprocess": 3}, "its blueprint makes no flow"),
    ({"preprocess": {"name": "standardise", "arguments": {}}}, "its blueprint makes no flow .*'standardise'"),
    (
        {"preprocess": {"name": "logit", "arguments": {}}},
        "its blueprint makes no flow .*unexpected keyword argument 'mean'",
    ),
    (
        {"preprocess": {"name": "standardize", "arguments": {"mean": 3}}},
        "its blueprint makes no flow .*multiple values",
    ),
    ({"preprocess": {"name": "standardize"}}, "its blueprint makes no flow .*'arguments'"),
    ({"preprocess": None}, "holds tensors for a preprocess that its blueprint does not have"),
]
TENSORS = [
    (lambda tensors: {}, "its blueprint has 2 layers, but it holds masks for 0"),
    (without("masks.0"), "its blueprint has 2 layers, but it holds masks for 1"),
    (without("masks"), "its blueprint has 2 layers, but it holds masks for 0"),
    (without("preprocess"), "its blueprint makes no flow"),
    (without("preprocess.std"), "its blueprint makes no flow .*'std'"),
    (
        without("state"),
        "its weights are those of another flow than masked-spline, or another version of this package wrote them: "
        ".* is missing, and should be of shape",
    ),
    (lambda tensors: tensors | {"weight": torch.ones(2)}, "holds a tensor 'weight', which is no part of a flow"),
    (lambda tensors: tensors | {"state.more": torch.ones(2)}, r"more is of shape \(2,\), and should be missing"),
    (lambda tensors: tensors | {"masks.x": torch.ones(4)}, "holds masks for 3"),
    (lambda tensors: tensors | {"masks.0": torch.ones(4)}, "the mask is all ones"),
    (lambda tensors: tensors | {"masks.0": torch.full((4,), torch.nan)}, "holds only 0 .* but this one holds nan"),
    (lambda tensors: tensors | {"masks.0": torch.ones(2, 2)}, r"each mask must have shape \(4,\)"),
    (lambda tensors: tensors | {"preprocess.std": torch.zeros(4)}, "std must be positive"),
    (lambda tensors: tensors | {"preprocess.mean": torch.zeros(3)}, "its blueprint makes no flow"),
    (lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()}, "its blueprint makes no flow"),
    (
        lambda tensors: {key: one * torch.inf if key.endswith("0.bias") else one for key, one in tensors.items()},
        "bias holds 8 of 8 values that are not finite",
    ),
    (
        lambda tensors: {key: one[None] if key.endswith("0.bias") else one for key, one in tensors.items()},
        r"bias is of shape \(1, 8\), and should be of shape \(8,\)",
    ),
]
BYTES = [
    (lambda whole: b"", "damaged or truncated"),
    (lambda whole: whole[:5], "damaged or truncated"),
    (lambda whole: whole[:200], "damaged or truncated"),
    (lambda whole: whole[:-3], "damaged or truncated"),
    (lambda whole: whole + b"0", "damaged or truncated"),
    (lambda whole: b"\xff" * 8 + whole[8:], "damaged or truncated"),
    (lambda whole: b"\x00" * len(whole), "damaged or truncated"),
    (lambda whole: whole.replace(b'"F32"', b'"F16"'), "damaged or truncated"),
    (lambda whole: whole.replace(b'"F32"', b'"I32"'), "does not match its checksum"),
    (lambda whole: whole.replace(b"tail_bound", b"tail_bounc"), "does not match its checksum"),
    (lambda whole: b"PK\x03\x04" + whole[4:], "damaged or truncated"),
    (lambda whole: b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.", "damaged or truncated"),
]


def refused(path, message: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        load_flow(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(("change", "message"), BYTES)
def test_damaged_bytes_are_refused(change, message, whole, tmp_path):
    path = tmp_path / FILE
    path.write_bytes(change(whole))
    refused(path, message)


@pytest.mark.parametrize(("change", "message"), STRUCTURE + VALUES)
def test_a_blueprint_that_makes_no_flow_is_refused(change, message, whole, tmp_path):
    path = tmp_path / FILE
    path.write_bytes(whole)
    craft(path, **change)
    refused(path, message)


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_tensors_that_make_no_flow_are_refused(change, message, whole, tmp_path):
    path = tmp_path / FILE
    path.write_bytes(whole)
    craft(path, tensors={name: one.clone() for name, one in change(safetensors.torch.load_file(path)).items()})
    refused(path, message)


def test_no_flipped_bit_goes_unseen(whole, tmp_path):
    path = tmp_path / FILE
    length = 8 + int.from_bytes(whole[:8], "little")
    for i in [*range(0, length, 7), *range(length, len(whole), 101)]:
        damaged = bytearray(whole)
        damaged[i] ^= 1 << i % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged|not written by save_flow|another version"):
            load_flow(path)


def test_the_flow_of_a_missing_library_names_its_extra(tmp_path, uninstall):
    path = save_flow(build_flow("zuko-nsf", 2, layers=1), tmp_path)
    uninstall("zuko")
    with pytest.raises(ImportError, match=r"zuko is not installed: pip install 'flow-adapters\[zuko\]'"):
        load_flow(path)


def test_where_there_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no {FILE} in .*: give the directory that a run wrote"):
        load_flow(tmp_path)
    with pytest.raises(FileNotFoundError, match="no best.safetensors in"):
        load_flow(tmp_path / "best.safetensors")
    with pytest.raises(TypeError, match="directory must be a path, not None"):
        load_flow(None)


# Writing


def test_threads_may_save_into_one_directory(tmp_path):
    flows = [build_flow("masked-affine", 2, layers=2, hidden_features=(8,)) for _ in range(4)]
    save_flow(flows[0], tmp_path)
    errors, done = [], threading.Event()

    def repeat(action):
        try:
            action()
        except Exception as error:
            errors.append(error)

    def read():
        while not done.is_set():
            load_flow(tmp_path)

    random_state = torch.get_rng_state()
    reader = threading.Thread(target=repeat, args=(read,))
    writers = [
        threading.Thread(target=repeat, args=(lambda flow=flow: [save_flow(flow, tmp_path) for _ in range(8)],))
        for flow in flows
    ]
    for thread in [reader, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not errors
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "nothing unfinished stays"
    assert torch.equal(torch.get_rng_state(), random_state)
    weights = load_flow(tmp_path).state_dict()
    assert any(all(torch.equal(weights[key], weight) for key, weight in flow.state_dict().items()) for flow in flows)


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    before = save_flow(build_flow("masked-affine", 2, layers=1, hidden_features=(8,)), tmp_path).read_bytes()
    larger = build_flow("masked-affine", 2, layers=2, hidden_features=(99, 99))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # what goes beyond fails, as on a full disk
    try:
        with pytest.raises(OSError, match=f"{FILE} can't be written .*too large.*what was there before is untouched"):
            save_flow(larger, tmp_path)
        with pytest.raises(OSError, match="weights.pt can't be written"):
            write_atomically(tmp_path / "weights.pt", lambda unfinished: torch.save(larger.state_dict(), unfinished))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / FILE).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("at pos"), KeyError("x")])
def test_write_atomically_is_all_or_nothing(error, tmp_path):
    path = tmp_path / "new" / "notes.txt"
    assert write_atomically(path, lambda unfinished: unfinished.write_text("old")) == path

    def fail(unfinished):
        unfinished.write_text("half of the n")
        raise error

    expected = OSError if isinstance(error, OSError | RuntimeError) else type(error)
    with pytest.raises(expected, match="x" if expected is KeyError else "notes.txt can't be written"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["notes.txt"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name, age in (("notes.txt.a", 3600), ("notes.txt.b", 0), ("other.txt.c", 3600)):
        left = tmp_path / f".{name}.unfinished"
        left.write_text("half")
        os.utime(left, (time.time() - age,) * 2)
    write_atomically(tmp_path / "notes.txt", lambda unfinished: unfinished.write_text("whole"))
    assert sorted(os.listdir(tmp_path)) == [".notes.txt.b.unfinished", ".other.txt.c.unfinished", "notes.txt"]


def test_a_directory_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("notes")
    with pytest.raises(OSError, match=f"run/{FILE} can't be written"):
        save_flow(build_flow("masked-affine", 2, layers=1), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "notes"
