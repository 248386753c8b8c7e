"""A flow on disk: its weights and the blueprint that rebuilds it, in one safetensors file. No code is ever unpickled.

A blueprint is plain data that says how to build a flow, but for its weights. It is either the arguments that
``build_flow`` was called with, or the name of a function that makes the flow, the maker, and its arguments. Where
``build_flow`` was given somebody's own layer or flow, its name is that of a maker, too.

The file's tensors are the blueprint's masks, the constants of its preprocessing, and the flow's ``state_dict``. Its
metadata hold the rest of the blueprint, and a checksum of everything.

Before ``save_flow`` writes anything, it rebuilds the flow as ``load_flow`` will: whatever is saved can be loaded.
"""

import glob
import hashlib
import inspect
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial, reduce
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import safetensors
import safetensors.torch
import torch
from nflows.flows import Flow
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adapters.bridges import as_flow
from adapters.catalogue import build_flow, check_options, is_own
from adapters.checks import shown
from adapters.own import in_short, load
from adapters.preprocess import PREPROCESSORS

FILE = "flow.safetensors"
FORMAT = 3  # of that file: 1 called the blueprint a recipe, and had other names of weights; in 2, s was β tanh(s̃)
ABANDONED = 600  # seconds since an unfinished file was last written to, after which its writer must be dead
# The functions that make a tensor of a size that a blueprint may decide.
FACTORIES = [torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.arange, torch.linspace]
FACTORIES += [torch.rand, torch.randn, torch.randint, torch.randperm]

# Rebuilding draws from torch's random state, which is then put back. So one thread at a time may do it.
_rebuilding = threading.RLock()


def save_flow(
    flow: Flow, directory: str | Path, maker: str | None = None, arguments: dict[str, Any] | None = None
) -> Path:
    """Write ``flow`` to ``directory/flow.safetensors``, atomically: a reader sees the old file or the new one.

    A flow that ``build_flow`` made carries its blueprint. For any other flow, name its maker, the function that made
    it: the file then holds that name and the arguments, never code.

    Args:
        flow: the flow to save, of any of the libraries. It may be under ``torch.compile``.
        directory: where to save it. A path that ends in ``.safetensors`` is the file itself.
        maker: ``"my_module:my_function"``, a function that returns a flow like this one, whatever its weights.
        arguments: the maker's keyword arguments: numbers, strings, lists and dictionaries.

    Returns:
        the file's path, which ``load_flow`` takes, too.

    Raises:
        TypeError: if ``flow`` is no flow; if it has no blueprint and no maker is named; if the blueprint is not plain
            data, because its ``preprocess`` is of another kind than those of ``adapters.preprocess``, or its arguments
            are such as JSON can't hold.
        ValueError: if the blueprint makes another flow than this one, because a part of the flow or a number in it was
            changed after it was built; or if a weight is not finite.
        OSError: if the file can't be written, as on a full disk. What was there before is untouched.

    >>> import tempfile
    >>> from adapters import build_flow
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_flow(build_flow("masked-affine", features=2), directory).name
    'flow.safetensors'
    """
    path = _file(directory)
    flow = as_flow(_unwrapped(flow))
    blueprint, tensors = _blueprint_of(flow, maker, arguments)
    try:
        tensors |= {f"state.{name}": tensor for name, tensor in _state(flow).items()}
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        _check_finite(flow)
        _rebuilt(blueprint, tensors, like=flow)
    except _Unusable as error:
        raise ValueError(f"this flow can't be saved: {error}") from error.__cause__
    document = json.dumps({"format": FORMAT, "blueprint": blueprint, "checksum": _checksum(blueprint, tensors)})
    return write_atomically(
        path, lambda unfinished: safetensors.torch.save_file(tensors, unfinished, {"flow": document})
    )


def load_flow(directory: str | Path, maker: str | None = None) -> Flow:
    """The flow that ``save_flow`` wrote there, with the dtypes it had.

    It is on the CPU and in evaluation mode, so that dropout is off. To train it further, call its ``train()``.

    Args:
        directory: where it was saved, or the file itself.
        maker: for a flow that was saved with a maker, its name again, ``"my_module:my_function"``; for one that
            ``build_flow`` made of your own layer, that layer's, ``"my_layer.py:MyLayer"``, wherever the file lies now.
            Loading imports that module and calls that function with the arguments in the file, which runs the module's
            code. A file alone can't make Python import or run anything: it takes the name given here.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the file is damaged, was not written by this version's ``save_flow``, or holds a blueprint that
            makes no flow; if it was saved with another maker than this one.
        ImportError: if the flow is of a library that is not installed.

    >>> import tempfile
    >>> from adapters import build_flow
    >>> flow, x = build_flow("masked-affine", features=2), torch.zeros(1, 2)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = save_flow(flow, directory)
    ...     again = load_flow(directory)
    >>> torch.equal(again.log_prob(x), flow.log_prob(x))
    True
    """
    path = _file(directory)
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: give the directory that a run wrote (its --out)")
    try:
        blueprint, tensors = _read(path)
        own = blueprint["name"] if is_own(blueprint.get("name")) else None
        _check_maker(path, own or blueprint.get("maker"), maker)
        if own is not None:
            blueprint["name"] = maker
        flow = _rebuilt(blueprint, tensors)
        _check_finite(flow)
    except _Unusable as error:
        raise ValueError(f"{path}: {error}; restore this file or make it again") from error.__cause__
    return flow.eval()


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` write a file beside ``path``, then move it there: whatever happens, readers see the old or the new.

    Any number of processes and threads may do so at once; the last one to finish wins. The unfinished file of a process
    that was killed is removed by a later write.

    Raises:
        OSError: if it can't be written, naming ``path``. What was there before is untouched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = write_atomically(Path(directory, "answer.txt"), lambda unfinished: unfinished.write_text("42"))
    ...     path.read_text(), len(os.listdir(directory))
    ('42', 1)
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.unfinished"):
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > ABANDONED:
                other.unlink()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        with suppress(OSError):
            reason = "the disk is full" if shutil.disk_usage(path.parent).free < 2**16 else reason
        raise OSError(f"{path} can't be written ({reason}); what was there before is untouched") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return path


class _Unusable(ValueError):
    """The content of a file, read or about to be written, makes no flow."""


def _file(directory: str | Path) -> Path:
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"directory must be a path, not {shown(directory)}")
    path = Path(directory)
    return path if path.suffix == ".safetensors" and not path.is_dir() else path / FILE


def _unwrapped(flow: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and the wrappers of several devices."""
    while True:
        if isinstance(compiled := getattr(flow, "_orig_mod", None), nn.Module):
            flow = compiled
        elif isinstance(flow, nn.DataParallel | nn.parallel.DistributedDataParallel):
            flow = flow.module
        else:
            return flow


# From a flow to the content of a file


def _blueprint_of(flow: Flow, maker: str | None, arguments: dict | None) -> tuple[dict, dict[str, Tensor]]:
    """The flow's blueprint as JSON can hold it, and apart from it the tensors that belong to it."""
    tensors = {}
    if not isinstance(arguments, dict | None):
        raise TypeError(f"arguments must be a dictionary, not {shown(arguments)}")
    if maker is not None:
        blueprint = {"maker": maker, "arguments": {} if arguments is None else arguments}
        _function(maker)
    elif arguments is not None:
        raise TypeError("arguments are those of a maker: name it, too, as maker='my_module:my_function'")
    elif not isinstance(arguments_of_build_flow := getattr(flow, "blueprint", None), dict):
        raise TypeError(
            f"this {type(flow).__name__} was not made by build_flow, so name the function that made it: "
            "save_flow(flow, directory, maker='my_module:my_function', arguments={…})"
        )
    else:
        blueprint = dict(arguments_of_build_flow)
        tensors |= {f"masks.{i}": mask for i, mask in enumerate(blueprint.pop("masks", ()))}
        if blueprint.get("preprocess") is not None:
            blueprint["preprocess"], own = _preprocess_blueprint(blueprint["preprocess"])
            tensors |= own
    try:
        return json.loads(json.dumps(blueprint)), tensors
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"a blueprint is of numbers, strings, lists and dictionaries ({error}), not {blueprint}"
        ) from error


def _preprocess_blueprint(transform: Transform) -> tuple[dict, dict[str, Tensor]]:
    """The preprocessing's name and numbers, and its tensors."""
    names = {kind: name for name, kind in PREPROCESSORS.items()}
    if type(transform) not in names:
        known = ", ".join(kind.__name__ for kind in names)
        raise TypeError(f"a flow is saved with a preprocess of {known}, not {type(transform).__name__}")
    arguments = vars(transform)["arguments"]
    numbers = {key: value for key, value in arguments.items() if not isinstance(value, Tensor)}
    tensors = {f"preprocess.{key}": value for key, value in arguments.items() if isinstance(value, Tensor)}
    return {"name": names[type(transform)], "arguments": numbers}, tensors


def _state(flow: Flow) -> dict[str, Tensor]:
    state = {_clean(name): value for name, value in flow.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype == torch.complex128:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise _Unusable(f"its state holds {name}, of {kind}, which a safetensors file can't hold")
    return state


def _clean(name: str) -> str:
    """The name that a parameter or module would have if nothing around it were compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _checksum(blueprint: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the blueprint and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(blueprint, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The blueprint and the tensors in the file; ``_Unusable`` unless both are as they were written."""
    content = path.read_bytes()  # safe_open would open the file twice, and might find another one the second time
    try:
        with torch.device("cpu"):
            tensors = dict(sorted(safetensors.torch.load(content).items()))  # load gives them in no fixed order
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__", {})
    except Exception as error:
        raise _Unusable(f"it is damaged or truncated ({_in_one_line(error)})") from error
    if "flow" not in metadata:
        if "recipe" in metadata:
            raise _Unusable("it was written by an earlier version, without a checksum")
        raise _Unusable("it holds no flow's blueprint: it was not written by save_flow")
    try:
        document = json.loads(metadata["flow"])
        version = document.get("format", 1)  # format 1 had no number yet
        if version != FORMAT:
            raise _Unusable(f"it was written by another version, in format {version}; this one reads format {FORMAT}")
        blueprint, checksum = document["blueprint"], document["checksum"]
        whole = checksum == _checksum(blueprint, tensors)
    except _Unusable:
        raise
    except Exception as error:
        raise _Unusable(f"its blueprint is damaged ({_in_one_line(error)})") from error
    if not whole:
        raise _Unusable("it is damaged: its content does not match its checksum")
    if not isinstance(blueprint, dict):
        raise _Unusable(f"its blueprint is no dictionary, but {blueprint!r:.80}")
    return blueprint, tensors


# From the content of a file to a flow


def _rebuilt(blueprint: dict, tensors: dict[str, Tensor], like: Flow | None = None) -> Flow:
    """The flow that a blueprint makes, with the weights among the tensors.

    Args:
        like: the flow that this must be, modules and numbers alike; it raises ``_Unusable`` if it is not.
    """
    groups: dict[str, dict[str, Tensor]] = {"masks": {}, "preprocess": {}, "state": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        if group not in groups:
            raise _Unusable(f"it holds a tensor {name!r}, which is no part of a flow")
        groups[group][rest] = tensor
    state = groups.pop("state")
    with _rebuilding, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            flow = _made(blueprint, **groups) if "maker" in blueprint else _built(blueprint, _Budget(tensors), **groups)
        except (_Unusable, ImportError):
            raise
        except Exception as error:
            raise _Unusable(f"its blueprint makes no flow ({_in_one_line(error)})") from error
        if like is not None:
            _check_same(like, flow)
        _fill(flow, state, blueprint.get("name") or blueprint["maker"])
    return flow


def _built(blueprint: dict, budget: "_Budget", masks: dict[str, Tensor], preprocess: dict[str, Tensor]) -> Flow:
    """The flow that ``build_flow`` makes.

    ``build_flow`` checks the kinds and ranges of its arguments. Here it is checked that none is missing, and that they
    do not make a flow far larger than the file.
    """
    known = inspect.signature(build_flow).parameters.keys() - {"masks", "options"}
    if missing := known - blueprint.keys():
        raise _Unusable(f"its blueprint has no {', '.join(sorted(missing))}")
    options = {name: value for name, value in blueprint.items() if name not in known}
    check_options(blueprint["name"], options)
    budget.spend(*(value for value in options.values() if isinstance(value, int)))  # of bins and the like
    if masks.keys() != {str(i) for i in range(len(masks))} or blueprint["layers"] != len(masks):
        raise _Unusable(f"its blueprint has {blueprint['layers']!r:.80} layers, but it holds masks for {len(masks)}")
    in_order = [masks[str(i)] for i in range(len(masks))]
    transform = blueprint["preprocess"]
    if transform is not None:
        transform = PREPROCESSORS[transform["name"]](**transform["arguments"], **preprocess)
    elif preprocess:
        raise _Unusable("it holds tensors for a preprocess that its blueprint does not have")
    with nullcontext() if is_own(blueprint["name"]) else budget:
        return build_flow(**blueprint | {"masks": in_order, "preprocess": transform})


class _Budget(TorchFunctionMode):
    """A context in which no more tensors may be made than a flow of this file's size needs.

    Otherwise a small file could make ``load_flow`` allocate terabytes.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        self.tensors = 16 * len(tensors) + 1_000
        self.elements = 16 * sum(tensor.numel() for tensor in tensors.values()) + 10_000

    def spend(self, *elements: int) -> None:
        self.elements -= sum(elements)
        self.tensors -= 1
        if self.elements < 0 or self.tensors < 0:
            raise _Unusable("its blueprint asks for a far larger flow than it holds the weights of")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in FACTORIES:
            size = {key: value for key, value in kwargs.items() if key not in ("generator", "out")}
            self.spend(function(*args, **size | {"device": "meta"}).numel())
        return function(*args, **kwargs)


def _made(blueprint: dict, masks: dict[str, Tensor], preprocess: dict[str, Tensor]) -> Flow:
    """The flow that the maker makes, after ``_check_maker`` has found that the caller named it, too."""
    known = blueprint.keys() == {"maker", "arguments"} and isinstance(blueprint["arguments"], dict)
    if masks or preprocess or not known:
        raise _Unusable("its blueprint names a maker, but has not just its arguments beside it")
    flow = as_flow(_function(blueprint["maker"])(**blueprint["arguments"]))
    flow.blueprint = blueprint  # type: ignore[assignment]  # nflows' own Flow, too, may carry one
    return flow


def _check_maker(path: Path, maker: str | None, given: str | None) -> None:
    """Raise unless the maker that the file names is the one that the caller gave: a file may not choose what runs."""
    if maker is not None and given is None:
        raise ValueError(
            f"the flow in {path} was saved with a maker: if you trust that function, give its name, "
            f"load_flow(…, maker={maker!r:.200}), and loading will import and call it; "
            "to a script say it by --flow, beside --load"
        )
    if maker != given and not (is_own(maker) and is_own(given) and in_short(maker) == in_short(given)):
        raise ValueError(
            f"the flow in {path} was made by {'build_flow' if maker is None else repr(maker)[:200]}, not by {given!r}"
        )


def _function(maker: str) -> Callable[..., Any]:
    """The function of that name, imported."""
    if not isinstance(maker, str) or maker.count(":") != 1:
        raise ValueError(f"a maker is named as 'my_module:my_function', not {shown(maker)}")
    found = load(maker)
    if not callable(found):
        raise ValueError(f"maker {maker!r} is no function, but {shown(found)}")
    return found


def _fill(flow: Flow, state: dict[str, Tensor], name: str) -> None:
    """Give the flow these weights and their dtypes."""
    own = _state(flow)
    for key in sorted(own.keys() | state.keys()):
        here, there = (_shape(tensors.get(key)) for tensors in (state, own))
        if here != there:
            raise _Unusable(
                f"its weights are those of another flow than {name}, or another version of this package wrote them: "
                f"{key} is {here}, and should be {there}"
            )
    floating = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    flow.to(reduce(torch.promote_types, floating) if floating else None)
    for key, tensor in [*flow.named_parameters(), *flow.named_buffers()]:
        if key in state and state[key].is_floating_point() and tensor.is_floating_point():
            tensor.data = tensor.data.to(state[key].dtype)
    flow.load_state_dict(state)


def _shape(tensor: Tensor | None) -> str:
    """A tensor's shape in words, and its dtype unless it is a floating one, which a flow may have changed."""
    if tensor is None:
        return "missing"
    return f"of shape {tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" and {tensor.dtype}")


def _in_one_line(error: Exception) -> str:
    """An error's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.300}"


# Whether the flow is the one that was saved


def _check_finite(flow: Flow) -> None:
    """Raise ``_Unusable`` for a weight that is not finite. A buffer may be infinite, as a bound is, but not NaN."""
    for tensors, wrong in (
        (flow.named_parameters(), lambda tensor: ~tensor.isfinite()),
        (flow.named_buffers(), Tensor.isnan),
    ):
        for name, tensor in tensors:
            if count := int(wrong(tensor.detach()).sum()):
                raise _Unusable(f"{_clean(name)} holds {count} of {tensor.numel()} values that are not finite")


def _check_same(flow: Flow, rebuilt: Flow) -> None:
    """Raise ``_Unusable`` unless both flows are of the same modules with the same numbers, apart from their weights."""
    here, there = _described(flow), _described(rebuilt)
    for name in dict.fromkeys((*here, *there)):
        if here.get(name) != there.get(name):
            wanted = there.get(name, "nothing of that name")
            raise _Unusable(
                f"{name} is {here.get(name, 'missing')}, but the blueprint makes {wanted}. "
                "Undo what was done to it after it was built, or name a maker and arguments that make it as it is"
            )


def _described(flow: Flow) -> dict[str, str]:
    """Each module's kind and plain attributes, in words."""
    described = {}
    for name, module in flow.named_modules(remove_duplicate=False):
        if hasattr(module, "_orig_mod"):
            continue
        name = _clean(name) or "the flow"
        described[name] = f"{type(module).__module__}.{type(module).__qualname__}"
        plain = {key: _in_words(value) for key, value in vars(module).items() if key[0] != "_" and key != "training"}
        described |= {f"{name}.{key}": words for key, words in plain.items() if words}
    return described


def _in_words(value) -> str:
    """A number, string or function in words; anything else is the empty string, and is not compared."""
    if isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return value.__qualname__
    if isinstance(value, partial):
        arguments = [*value.args, *value.keywords.values()]
        return f"{_in_words(value.func)}({', '.join(map(_in_words, arguments))})"
    return ""
