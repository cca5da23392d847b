"""Whether an optimizer can be resumed, and whether DeepSpeed's flat pieces are enough for it. Anything else is refused.

A checkpoint holds the tensors of `optimizer.state[parameter]` and nothing else of an optimizer. Whoever exchanges the
optimizer learns in the first step, and under DeepSpeed before it, what a resumed run would not have.
"""

from collections import defaultdict
from collections.abc import Mapping
from copy import copy, deepcopy
from typing import Any

import torch

from chatlora.errors import CheckpointError, LaunchError

ELSEWHERE = "a checkpoint holds the tensors of optimizer.state[parameter] and nothing else: keep it there"


def refuse_forgetful(optimizer: torch.optim.Optimizer) -> None:
    """Have every step of an optimizer raise CheckpointError where it keeps something that no checkpoint would hold."""
    before: dict[str, Any] = {}

    def remember(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        before.clear()
        before.update(_elsewhere(optimizer))

    def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        changed = [name for name, value in _elsewhere(optimizer).items() if not _same(before.get(name), value)]
        if changed:
            raise CheckpointError(f"{_name(optimizer)} keeps something in its {changed[0]}: {ELSEWHERE}")
        for group in optimizer.param_groups:
            _check_states(optimizer, group)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(check)


def _elsewhere(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of the numbers and tensors that stand anywhere but in the state of a parameter, by where they stand."""
    found = {
        f"param_groups[{number}][{name!r}]": value
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name != "params"
    }
    found |= {f"attribute {name}": value for name, value in vars(optimizer).items() if not isinstance(value, bool)}
    found |= {f"state[{name!r}]": value for name, value in optimizer.state.items() if isinstance(name, str)}
    return {name: deepcopy(value) for name, value in found.items() if _is_data(value)}


def _is_data(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    return isinstance(value, (int, float, str, torch.Tensor))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _check_states(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
    used = [parameter for parameter in group["params"] if parameter.grad is not None]
    states = [optimizer.state.get(parameter) for parameter in used]
    without = sum(not state for state in states)
    # Plain SGD says itself that it has no memory; of any other, an empty state says that it is somewhere else.
    if without and group.get("momentum") != 0:
        raise CheckpointError(
            f"the optimizer keeps no state for {without} of {len(used)} parameters that had a gradient "
            f"({_name(optimizer)}), so that a resumed run would not be this one",
            f"{ELSEWHERE}; an optimizer that keeps nothing says so by momentum=0 in its param_groups",
        )
    for kind, value in ((kind, value) for state in states for kind, value in (state or {}).items()):
        if not isinstance(value, torch.Tensor) or "." in kind:
            raise CheckpointError(
                f"{_name(optimizer)} keeps {kind!r}, of type {type(value).__name__}, in optimizer.state: a checkpoint "
                "holds tensors, under names without a dot"
            )


def refuse_flat(optimizer: torch.optim.Optimizer) -> None:
    """Raise LaunchError where an optimizer would do something else with DeepSpeed's flat pieces than with matrices.

    It is tried: three steps with a small matrix, and with the same numbers in two flat pieces.
    """
    sentence = (
        f"{_name(optimizer)} does not compute each element of an update by itself, and DeepSpeed gives it flat pieces "
        "instead of matrices: use accelerate_configs/multi_gpu.yaml, or for a model larger than one GPU fsdp2.yaml, "
        "where it takes sharded parameters"
    )
    for group in optimizer.param_groups:
        try:
            same = torch.allclose(_three_steps(optimizer, group), _three_steps(optimizer, group, in_pieces=True))
        # A foreign optimizer raises what it likes; each of these says that it cannot take such steps.
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
            raise LaunchError(f"{sentence} ({error})") from error
        if not same:
            raise LaunchError(sentence)


def _three_steps(optimizer: Any, group: Mapping[str, Any], *, in_pieces: bool = False) -> torch.Tensor:
    """All elements of a small matrix after three steps of a copy of the optimizer."""
    draw, device = torch.Generator().manual_seed(0), group["params"][0].device
    start, *gradients = (_pieces(torch.randn(4, 6, generator=draw).to(device), in_pieces) for _ in range(4))
    parameters = [torch.nn.Parameter(piece) for piece in start]
    tried = copy(optimizer)  # its class and settings; hooks stay behind
    tried.state = defaultdict(dict)
    tried.param_groups = [{**group, "params": parameters, "lr": 0.1}]  # until the loop sets a rate it is 0
    for pieces in gradients:
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece
        tried.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def _pieces(matrix: torch.Tensor, in_pieces: bool) -> list[torch.Tensor]:
    flat = matrix.flatten()
    return [flat[:9].clone(), flat[9:].clone()] if in_pieces else [matrix]


def _name(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__
