"""What an optimizer keeps where no checkpoint looks is told in its first step; DeepSpeed's flat pieces before that."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from chatlora.distributed.optimizer_checks import refuse_flat, refuse_forgetful
from chatlora.errors import CheckpointError, LaunchError
from tests.optimizers import Elsewhere, Hidden, InGroups, InNumbers, Odd

Make = Callable[[Any], torch.optim.Optimizer]
BY_ELEMENT: dict[str, Make] = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.0, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.0),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.0),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.0),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.0),
    "unusual types": lambda p: Odd(p, by_row=False),
}
BY_MATRIX: dict[str, Make] = {
    "Muon": lambda p: torch.optim.Muon(p, lr=0.0),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-9),
    "a mean of each row": lambda p: Odd(p, by_row=True),
}
FORGETFUL: dict[str, tuple[Make, str]] = {
    "elsewhere": (Elsewhere, r"keeps no state for 3 of 3 parameters that had a gradient \(Elsewhere\).*momentum=0"),
    "a number": (lambda p: InNumbers(p, momentum=0.9), "InNumbers keeps 'count', of type int"),
    "a tensor among the settings": (lambda p: Hidden(p, "group"), r"in its param_groups\[0\]\['hidden'\]"),
    "a number of its own": (lambda p: Hidden(p, "attribute"), "in its attribute hidden"),
    "in nobody's state": (lambda p: Hidden(p, "state"), r"in its state\['hidden'\]"),
    "among the settings": (
        lambda p: InGroups(p, momentum=0.9),
        r"InGroups keeps something in its param_groups\[0\]",
    ),
}


def parameters(number: int = 3) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(4, 6, generator=draw)) for _ in range(number)]
    for each in made:
        each.grad = torch.randn(4, 6, generator=draw)
    return made


@pytest.mark.parametrize("make", BY_ELEMENT.values(), ids=BY_ELEMENT.keys())
def test_an_optimizer_that_works_by_element_is_let_through_and_untouched(make: Make) -> None:
    own, other = parameters(), parameters()
    optimizer, undisturbed = make(own), make(other)
    refuse_flat(optimizer)
    refuse_forgetful(optimizer)
    for group in (*optimizer.param_groups, *undisturbed.param_groups):
        group["lr"] = 0.1
    for _ in range(2):
        optimizer.step()
        undisturbed.step()
    assert all(torch.equal(one, two) for one, two in zip(own, other, strict=True))


@pytest.mark.parametrize("make", BY_MATRIX.values(), ids=BY_MATRIX.keys())
def test_an_optimizer_that_works_by_matrix_is_refused_flat_pieces(make: Make) -> None:
    with pytest.raises(LaunchError, match=r"flat pieces instead of matrices: use accelerate_configs/multi_gpu\.yaml"):
        refuse_flat(make(parameters()))


@pytest.mark.parametrize(("make", "told"), FORGETFUL.values(), ids=FORGETFUL.keys())
def test_what_no_checkpoint_would_hold_is_told_in_the_first_step(make: Make, told: str) -> None:
    optimizer = make(parameters())
    refuse_forgetful(optimizer)
    with pytest.raises(CheckpointError) as raised:
        optimizer.step()
    assert re.search(told, " ".join(raised.value.problems))


def test_a_parameter_without_a_gradient_needs_no_state() -> None:
    made = parameters()
    made[-1].grad = None
    optimizer = torch.optim.AdamW(made)
    refuse_forgetful(optimizer)
    optimizer.step()
    assert made[-1] not in optimizer.state


def test_the_settings_may_follow_the_step() -> None:
    optimizer = torch.optim.SGD(parameters(), momentum=0.9)
    refuse_forgetful(optimizer)
    for step in range(3):
        optimizer.param_groups[0] |= {"lr": 0.1 * step, "momentum": 0.9 - 0.1 * step}
        optimizer.step()
