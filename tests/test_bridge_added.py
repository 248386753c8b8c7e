"""Adding a library is a bridge file, a catalogue file and an examples file, and nothing else anywhere."""

import subprocess
import sys
from pathlib import Path

import pytest
from nflows.transforms import Transform

import adapters.bridges
import adapters.layers
from adapters.bridges import as_transform, bridges, libraries
from adapters.discovery import file_name, modules
from tests.examples import decoders, examples

ROOT = Path(__file__).parent.parent

LIBRARY = '''
import torch
from torch import nn
from torch.distributions import Normal

class Layer(nn.Module):
    """encode is data → noise, decode noise → data; both give the log-determinant, too."""

class Wrapped(Layer):
    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def encode(self, x, context=None):
        return self.transform(x, context)

    def decode(self, z, context=None):
        return self.transform.inverse(z, context)

class Affine(Layer):
    def __init__(self, features, context_features=None):
        super().__init__()
        self.features, self.context_features = features, context_features
        self.network = nn.Linear(context_features or 1, 2 * features)

    def _parts(self, x, context):
        loc, log_scale = self.network(x.new_ones(len(x), 1) if context is None else context).chunk(2, dim=1)
        return loc, log_scale, log_scale.sum(1)

    def encode(self, x, context=None):
        loc, log_scale, log_det = self._parts(x, context)
        return (x - loc) * (-log_scale).exp(), -log_det

    def decode(self, z, context=None):
        loc, log_scale, log_det = self._parts(z, context)
        return z * log_scale.exp() + loc, log_det

class Density(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def log_prob(self, x, context=None):
        z, log_det = self.layer.encode(x, context)
        return Normal(torch.zeros_like(z), torch.ones_like(z)).log_prob(z).flatten(1).sum(1) + log_det
'''

BRIDGE = """
from nflows.transforms import Transform

from adapters.checks import check_context, check_event
from adapters.flow import Flow, StandardNormal

PACKAGES = LIBRARIES = ("newlib",)
DISTRIBUTION = "newlib-for-torch"
EXTRA = "newlib"

class NewlibTransform(Transform):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.context_features = layer, layer.context_features

    def forward(self, inputs, context=None):
        return self._run(self.layer.encode, inputs, context)

    def inverse(self, inputs, context=None):
        return self._run(self.layer.decode, inputs, context)

    def _run(self, function, inputs, context):
        check_event(inputs, (self.layer.features,), "newlib's Affine")
        check_context(context, self.context_features, inputs, "newlib's Affine")
        return function(inputs, context)

def transform_in(foreign):
    import newlib

    if isinstance(foreign, newlib.Wrapped):
        return foreign.transform
    return NewlibTransform(foreign) if isinstance(foreign, newlib.Layer) else None

def flow_in(foreign):
    import newlib

    if not isinstance(foreign, newlib.Density):
        return None
    event_shape = (foreign.layer.features,)
    transform = NewlibTransform(foreign.layer)
    return Flow(transform, StandardNormal(event_shape), event_shape, transform.context_features)

def transform_out(transform, library, event_dim, conditional):
    import newlib

    return newlib.Wrapped(transform)

def native_log_prob(exported, inputs, context=None):
    import newlib

    return newlib.Density(exported).log_prob(inputs, context)
"""

CATALOGUE = '''
from adapters.catalogue.specification import NativeFlow

def affine(specification):
    """Each coordinate for itself."""
    import newlib

    return newlib.Affine(specification.features, specification.context_features)

def native_affine(features, masks, hidden_features):
    import newlib

    flow = newlib.Density(newlib.Affine(features))
    return NativeFlow(flow, flow.log_prob, lambda n: None, list(flow.parameters()))

FLOWS = {"newlib-affine": affine}
NATIVE_FLOWS = {"newlib Affine": native_affine}
'''

EXAMPLES = """
from adapters import as_transform
from tests.examples import Example, Model

def make(*arguments):
    import newlib

    return newlib.Affine(*arguments)

def make_model(*arguments):
    import newlib

    return newlib.Density(make(*arguments))

def decode(exported, noise, context):
    return exported.decode(noise, context)

EXAMPLES = {
    "affine": Example(lambda: as_transform(make(3)), (3,)),
    "affine-context": Example(lambda: as_transform(make(3, 2)), (3,), 2),
}
MODELS = {"Density": Model(lambda: make_model(3, 2), lambda model, x, context: model.log_prob(x, context), (3,), 2)}
"""

PROGRAM = """
import sys
from pathlib import Path

import pytest
import torch

import adapters.bridges, adapters.catalogue, tests.examples

for package in (adapters.bridges, adapters.catalogue, tests.examples):
    package.__path__.append(str(Path(sys.argv[1]) / package.__name__.rpartition(".")[2]))

from adapters import build_flow, flow_names
from adapters.bridges import libraries
from runs.common.results import versions
from runs.common.speed import make_timed, timed_names

assert "newlib" in libraries() and "newlib-affine" in flow_names()
timed = make_timed(timed_names(()), 4, 2, (8,), torch.device("cpu"))
assert timed["newlib Affine"].calls["step"]().isfinite()
assert versions()["newlib-for-torch"] == "1.2"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_laws.py", "tests/test_bridges.py", "-k", "newlib"]))
"""


def test_a_library_is_added_by_its_files(tmp_path):
    """Its names are known, its flows are built, timed and held to the laws, and its version is noted down."""
    files = {
        "newlib/__init__.py": LIBRARY,
        "newlib_for_torch-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: newlib-for-torch\nVersion: 1.2\n",
        "bridges/newlib.py": BRIDGE,
        "catalogue/newlib.py": CATALOGUE,
        "examples/newlib.py": EXAMPLES,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}"
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.parametrize(
    "name",
    ["PACKAGES", "LIBRARIES", "DISTRIBUTION", "EXTRA", "transform_in", "flow_in", "transform_out", "native_log_prob"],
)
def test_a_bridge_that_lacks_a_name_is_refused_by_that_name(name, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters.bridges, "__path__", [*adapters.bridges.__path__, str(tmp_path)])
    file = f"without_{name.lower()}"
    (tmp_path / f"{file}.py").write_text(f"{BRIDGE}\ndel {name}")
    for call in (bridges, libraries, lambda: as_transform(object())):
        with pytest.raises(TypeError, match=rf"{file}.py is no bridge without {name}: see adapters.bridges.Bridge"):
            call()
    del sys.modules[f"adapters.bridges.{file}"]


@pytest.mark.parametrize("name", [file_name(bridge) for bridge in bridges()])
def test_every_library_has_its_examples(name):
    assert name in decoders(), f"add tests/examples/{name}.py: tests/examples/__init__.py says what it holds"


LAYERS = {
    f"{file_name(module)}.{kind.__name__}": kind
    for module in modules("adapters.layers")
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Transform) and kind.__module__ == module.__name__
}


@pytest.fixture(scope="module")
def shown() -> set[type]:
    """The classes of all parts of all our own examples, and what these are derived from."""
    ours = [example.make() for name, example in examples().items() if name.startswith("hand_written:")]
    return {kind for transform in ours for part in transform.modules() for kind in type(part).__mro__}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_an_example(name, shown):
    assert LAYERS[name] in shown, f"add an example of {name} to tests/examples/hand_written.py"
