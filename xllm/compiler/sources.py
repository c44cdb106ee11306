"""Which checkpoint tensors make each parameter: ``transformers``' own conversion, as recipes.

``transformers`` renames, stacks, splits and permutes checkpoint tensors while it loads. The same
code runs here, on stand-ins without data that remember how they were made, so nothing is listed
again by hand: a converted stand-in *is* the recipe of its parameter.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

from xllm.checkpoint import DTYPES, Checkpoint, CheckpointError, TensorInfo
from xllm.compiler.standin import StandIn, UnknownConversion
from xllm.weights import Leaf, Recipe, evaluate

#: Those that may be rounded into each other; what else is stored needs a step of its own.
ROUNDABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Group:
    """Checkpoint tensors that one conversion takes, by the pattern that matched their names."""

    converter: WeightConverter | None
    names: dict[str, list[str]] = field(default_factory=dict)

    def all(self) -> list[str]:
        """Every name, in the order of conversion."""
        return [name for names in self.names.values() for name in names]


def sources(model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
    """Recipe over checkpoint tensors for each parameter and persistent buffer of ``model``.

    ``model`` is on the meta device; of ``tensors`` names, shapes and dtypes are used. A parameter
    of which the checkpoint holds nothing is left out; of two tied ones, the stored one makes both.
    Raises :class:`CheckpointError` that names the tensor where one is missing from a stack, or has
    a wrong shape or dtype.
    """
    state = model.state_dict()
    found: dict[str, Recipe] = {}
    for target, group in _grouped(model, tensors, state).items():
        for name, made in _convert(model, target, group, tensors).items():
            if name in state:
                _check(name, made, state[name], group, tensors)
                found[name] = made.recipe
    tied = model.all_tied_weights_keys
    for target, source in (*tied.items(), *((s, t) for t, s in tied.items())):
        if source in found:
            found.setdefault(target, found[source])
    return found


def check_tied(model: PreTrainedModel, found: Mapping[str, Recipe], checkpoint: Checkpoint) -> None:
    """Tied parameters that are stored twice must be equal; one of them will not be read."""
    for target, source in model.all_tied_weights_keys.items():
        pair = [found[name] for name in (source, target) if name in found]
        if len(set(pair)) == 2 and not torch.equal(*(evaluate(r, checkpoint.load) for r in pair)):
            raise CheckpointError(f"{checkpoint.path}: config.json ties {target} to {source}, but "
                                  "their tensors differ; set tie_word_embeddings to false there")


def keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make float32 what ``from_pretrained(dtype=dtype)`` keeps in float32 (router biases ...)."""
    kept = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if kept and re.search("|".join(kept), name):
            tensor.data = tensor.data.to(torch.float32)


def _grouped(model: PreTrainedModel, names: Collection[str], state: dict[str, Tensor],
             ) -> dict[str, Group]:
    """Checkpoint names by the (first) parameter that they make, experts in numeric order.

    The order of decisions is that of ``convert_and_load_state_dict_in_model`` in
    transformers/core_model_loading.py.
    """
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            group = groups.setdefault(target, Group(by_pattern.get(pattern)))
            group.names.setdefault(pattern or name, []).append(name)
    return groups


def _convert(model: PreTrainedModel, target: str, group: Group,
             tensors: Mapping[str, TensorInfo]) -> dict[str, StandIn]:
    """The parameters that a group makes, by name; ``target`` is the first one."""
    if group.converter is None:
        return {target: _stand_in(group.all()[0], tensors)}
    converter = copy.deepcopy(group.converter)
    for pattern, names in group.names.items():
        for name in names:
            converter.add_tensor(target, name, pattern, _stand_in(name, tensors))
    try:
        made = converter.convert(target, model=model, config=model.config)
    except UnknownConversion as error:
        steps = ", ".join(type(op).__name__ for op in converter.operations)
        raise UnknownConversion(f"{target}: transformers converts it by {steps}: {error}") from None
    except (RuntimeError, ValueError) as error:
        raise _wrong(target, str(error).splitlines()[0], (0,), (0,), group, tensors) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _stand_in(name: str, tensors: Mapping[str, TensorInfo]) -> StandIn:
    info = tensors[name]
    return StandIn(torch.empty(info.shape, dtype=info.dtype(name), device="meta"), Leaf(name))


def _check(name: str, made: StandIn, wanted: Tensor, group: Group,
           tensors: Mapping[str, TensorInfo]) -> None:
    """Raise :class:`CheckpointError` where a converted parameter does not fit the model's."""
    if made.shape != wanted.shape:
        found = f"has shape {list(made.shape)}, config.json implies {list(wanted.shape)}"
        raise _wrong(name, found, tuple(made.shape), tuple(wanted.shape), group, tensors)
    if made.dtype != wanted.dtype and not {made.dtype, wanted.dtype} <= set(ROUNDABLE):
        first = group.all()[0]
        accepted = ", ".join(s for s, dtype in DTYPES.items() if dtype in ROUNDABLE)
        raise CheckpointError(f"{tensors[first].file}: tensor {first} has dtype "
                              f"{tensors[first].stored}; accepted: {accepted}")


def _wrong(target: str, found: str, made: tuple[int, ...], wanted: tuple[int, ...], group: Group,
           tensors: Mapping[str, TensorInfo]) -> CheckpointError:
    """Why a group does not make its parameter: a missing tensor, an odd one, or all of them."""
    names = group.all()
    place = tensors[names[0]].file
    if group.converter is None:
        return CheckpointError(f"{place}: tensor {names[0]} has shape {list(made)}, config.json "
                               f"implies {list(wanted)}")
    missing = _missing(group, wanted[0] if made[1:] == wanted[1:] else 0)
    if missing:
        return CheckpointError(f"{place.parent} lacks the tensor {missing}, which {target} needs")
    for alike in group.names.values():
        usual, _ = Counter(tensors[name].shape for name in alike).most_common(1)[0]
        for name in alike:
            if tensors[name].shape != usual:
                return CheckpointError(
                    f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}, "
                    f"the others of its kind {list(usual)}")
    first = f"{names[0]} {list(tensors[names[0]].shape)} and {len(names) - 1} more"
    return CheckpointError(f"{place.parent}: {target}, made of {first}: {found}")


def _missing(group: Group, count: int) -> str | None:
    """Name of the first tensor that a stack of at least ``count`` lacks; None where none does."""
    absent = set(group.converter.source_patterns) - group.names.keys()
    if absent:
        return min(absent)
    stacks = []
    for names in group.names.values():
        columns = list(zip(*(name.split(".") for name in names), strict=False))
        varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
        if len(varying) == 1 and all(part.isdigit() for part in columns[varying[0]]):
            stacks.append((names[0].split("."), varying[0], {int(p) for p in columns[varying[0]]}))
    every = set(range(count)).union(*(indices for _, _, indices in stacks))
    for parts, at, indices in stacks:
        for index in sorted(every - indices):
            return ".".join([*parts[:at], str(index), *parts[at + 1:]])
    return None
