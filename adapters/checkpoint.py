"""A flow on disk: its weights and the recipe that rebuilds it, in one safetensors file. No code is ever unpickled."""

import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from adapters.catalogue import build_flow
from adapters.flow import Flow
from adapters.preprocess import PREPROCESSORS

FILE = "flow.safetensors"


def save_flow(flow: Flow, directory: str | Path) -> Path:
    """Write ``flow`` to ``directory/flow.safetensors``, atomically: a reader sees the old file or the new one.

    Raises:
        TypeError: if the flow was not made by ``build_flow``, or has a preprocessing transform of another kind than
            ``adapters.preprocess``: its recipe is then code, not data.
    """
    if not hasattr(flow, "recipe"):
        raise TypeError(f"only a flow made by build_flow can be saved with its recipe, not this {type(flow).__name__}")
    recipe = dict(flow.recipe)
    tensors = {f"masks.{i}": mask for i, mask in enumerate(recipe.pop("masks"))}
    if recipe["preprocess"] is not None:
        recipe["preprocess"], arguments = _preprocess_recipe(recipe["preprocess"])
        tensors |= arguments
    tensors |= {f"state.{name}": tensor for name, tensor in flow.state_dict().items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory / f".{FILE}.unfinished"
    safetensors.torch.save_file(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
        unfinished,
        metadata={"recipe": json.dumps(recipe)},
    )
    os.replace(unfinished, directory / FILE)
    return directory / FILE


def load_flow(directory: str | Path) -> Flow:
    """The flow that ``save_flow`` wrote there, with its dtype, on the CPU.

    Raises:
        FileNotFoundError: if the directory holds no checkpoint.
        ValueError: if the file is truncated, is not a flow's, or its weights do not fit its recipe.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {FILE} in {directory}: give the directory that a run wrote (its --out)")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); restore it or train again") from error
    if "recipe" not in metadata:
        raise ValueError(f"{path} holds no flow's recipe: it was not written by save_flow")
    recipe = json.loads(metadata["recipe"])
    preprocess = recipe.pop("preprocess")
    if preprocess is not None:
        arguments = preprocess["arguments"] | _with_prefix(tensors, "preprocess.")
        preprocess = PREPROCESSORS[preprocess["name"]](**arguments)
    masks = [tensors[f"masks.{i}"] for i in range(recipe["layers"])]
    with torch.random.fork_rng(devices=[]):  # the initial weights are about to be overwritten: leave the seed alone
        flow = build_flow(**recipe, masks=masks, preprocess=preprocess)
    state = _with_prefix(tensors, "state.")
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    try:
        flow.to(torch.float64 if torch.float64 in dtypes else next(iter(dtypes))).load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} are those of another flow than {recipe['name']}: {error}") from error
    return flow


def _preprocess_recipe(transform) -> tuple[dict, dict[str, Tensor]]:
    """The transform's name and numbers, and its tensors."""
    names = {kind: name for name, kind in PREPROCESSORS.items()}
    if type(transform) not in names:
        known = ", ".join(kind.__name__ for kind in names)
        raise TypeError(f"a flow is saved with a preprocess of {known}, not {type(transform).__name__}")
    numbers = {key: value for key, value in transform.arguments.items() if not isinstance(value, Tensor)}
    tensors = {f"preprocess.{key}": value for key, value in transform.arguments.items() if isinstance(value, Tensor)}
    return {"name": names[type(transform)], "arguments": numbers}, tensors


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
