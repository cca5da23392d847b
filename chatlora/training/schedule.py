"""What happens after step s: pure functions of the settings and the step."""

import math
from dataclasses import dataclass

from chatlora.config import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rates and checkpoints of a run. Steps count from 0; `done` is the number of finished steps."""

    optim: OptimConfig
    steps_per_epoch: int
    every_steps: int

    @property
    def num_steps(self) -> int:
        if self.optim.max_steps is not None:
            return self.optim.max_steps
        return max(1, math.ceil(self.optim.epochs * self.steps_per_epoch))

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.optim.warmup_ratio * self.num_steps)

    def learning_rate(self, step: int) -> float:
        """Peak (s + 1) / W in the warm-up; then constant, linear or cosine in x = (s - W) / max(1, N - W)."""
        peak, warmup = self.optim.learning_rate, self.warmup_steps
        if step < warmup:
            return peak * (step + 1) / warmup
        x = (step - warmup) / max(1, self.num_steps - warmup)
        match self.optim.schedule:
            case "constant":
                return peak
            case "linear":
                return peak * (1 - x)
            case "cosine":
                return peak * (1 + math.cos(math.pi * x)) / 2

    def is_checkpoint_step(self, done: int) -> bool:
        """Every `checkpoint.every_steps` steps and after the last one: a validation, then a checkpoint."""
        return done > 0 and (done == self.num_steps or done % self.every_steps == 0)
