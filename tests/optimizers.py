"""Optimizers that keep their state in unusual ways, as forks would have them."""

from typing import Any

import torch


class Odd(torch.optim.Optimizer):
    """Sign descent that keeps a bf16 buffer and an int64 count for each element, a mean for each row, and a factor."""

    def __init__(self, parameters: Any, *, by_row: bool) -> None:
        super().__init__(parameters, {"lr": 0.0, "by_row": by_row})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                self._move(parameter, parameter.grad, self.state[parameter], group)

    def _move(self, parameter: Any, grad: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
        if not state:
            state["buffer"] = torch.zeros_like(grad, dtype=torch.bfloat16)
            state["count"] = torch.zeros_like(grad, dtype=torch.int64)
            state["factor"] = torch.tensor(1.0, dtype=torch.float64)
            if group["by_row"]:
                state["row"] = torch.zeros_like(grad.mean(1, keepdim=True))
        state["buffer"].mul_(0.9).add_(grad.bfloat16())
        state["count"].add_((grad > 0).long())
        state["factor"].mul_(0.9)
        update = state["buffer"].float().sign() * (1 + state["count"]) * (2 - float(state["factor"]))
        if group["by_row"]:
            state["row"].mul_(0.9).add_(grad.mean(1, keepdim=True))
            update = update * (1 + state["row"].abs())
        parameter.add_(update, alpha=-0.1 * group["lr"])


class Elsewhere(torch.optim.Optimizer):
    """Two optimizers behind one: what they keep is in neither's nor anybody's `optimizer.state` that is looked at."""

    def __init__(self, parameters: list[Any]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.parts = [torch.optim.AdamW(parameters[::2]), torch.optim.SGD(parameters[1::2], momentum=0.9)]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()


class InNumbers(torch.optim.SGD):
    """Counts its steps in a plain number."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1


class InGroups(torch.optim.SGD):
    """Estimates something that grows, beside its settings."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.param_groups[0]["distance"] = self.param_groups[0].get("distance", 0.5) * 2


class Hidden(torch.optim.SGD):
    """Counts where no parameter's state is: in a tensor of its group or of its state, or in a number of its own."""

    def __init__(self, parameters: Any, place: str) -> None:
        super().__init__(parameters, lr=0.0, momentum=0.9)
        self.place, self.hidden = place, 0.0
        self.param_groups[0]["hidden"] = [torch.zeros(2)]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        match self.place:
            case "group":
                self.param_groups[0]["hidden"][0].add_(1)
            case "attribute":
                self.hidden += 1
            case _:
                self.state["hidden"] = torch.ones(1)  # type: ignore[index]
