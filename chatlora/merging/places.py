"""Where a model's parameters are in its checkpoint, by transformers' own table of conversions.

A checkpoint may hold an expert in a tensor of its own where the model stacks them, or parts under other names. The
table that loads it, read backwards as `save_pretrained` reads it, says what a change of a parameter is in the files.
Every conversion in it is linear: a change is converted as a weight is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)

from chatlora.errors import ModelError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Parameters and the tensors of the checkpoint that they are made of; one and one where nothing is converted."""

    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    is_converted: bool


def places_of(model: PreTrainedModel, stored: Iterable[str]) -> list[Place]:
    """The places of all tensors in `stored` that `model` has a use for.

    Leaves on `model` what of the table was used, where transformers looks for it when it saves.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    shapes = dict.fromkeys(model.state_dict(), True)
    found: dict[tuple[str, ...], list[str]] = {}
    converted: set[tuple[str, ...]] = set()
    for tensor in stored:
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, shapes)
        if name not in shapes and tensor in shapes:  # as the loader does: it has the model's own name already
            name, pattern = tensor, None
        if name not in shapes:
            continue
        parameters = (name,) if pattern is None else _targets(name, of_pattern[pattern], shapes)
        found.setdefault(parameters, []).append(tensor)
        if pattern is not None:
            converted.add(parameters)
    model._weight_conversions = [each for each in transforms if each.was_used()]
    return [Place(names, tuple(tensors), names in converted) for names, tensors in found.items()]


def _targets(name: str, converter: WeightTransform, known: Mapping[str, bool]) -> tuple[str, ...]:
    """All parameters that the converter makes at once, given the first one's name."""
    first = converter.target_patterns[0]
    every = dict.fromkeys([name, *(name.replace(first, each, 1) for each in converter.target_patterns)])
    return tuple(each for each in every if each in known)


def in_the_files(
    model: PreTrainedModel, place: Place, deltas: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]
) -> dict[str, torch.Tensor]:
    """The changes of a place's parameters as changes of its tensors.

    model: as `places_of` left it. shapes: of its parameters; those without a delta do not change. Raises ModelError
    where the way back leads elsewhere.
    """
    if not place.is_converted:
        return {place.tensors[0]: deltas[place.parameters[0]]}
    whole = {name: deltas[name] if name in deltas else torch.zeros(shapes[name]) for name in place.parameters}
    back: dict[str, torch.Tensor] = revert_weight_conversion(model, whole)
    if set(back) != set(place.tensors):
        strangers = sorted(set(back) ^ set(place.tensors))
        raise ModelError(
            f"{place.parameters[0]} is made of {len(place.tensors)} tensors of the checkpoint, and transformers would "
            f"save it as {len(back)}, which differ in {', '.join(strangers[:2])}: this checkpoint cannot be merged "
            "into; load it with transformers and save it anew"
        )
    return back
