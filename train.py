"""Train a LoRA adapter: `accelerate launch train.py [PRESET | FILE.yaml] [--section.field VALUE ...]`.

`train` is the whole loop; `validate` the loss on held-out rows; `main` sets the stage and puts the adapter away.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

from chatlora.config import Config
from chatlora.config_files import HELP, help_text, load_config
from chatlora.errors import NonFiniteError, run_as_script
from chatlora.training.timetable import Timetable

if TYPE_CHECKING:  # torch and transformers take seconds to import: not for `--help`, not for a typo in a setting
    from torch import nn
    from torch.optim import Optimizer

    from chatlora.data.batches import GlobalBatches
    from chatlora.data.dataset import ExampleSet
    from chatlora.run_directory import RunDirectory
    from chatlora.training.runtime import Runtime

USAGE = """usage: accelerate launch [--config_file FILE] train.py [PRESET | FILE.yaml] [--section.field VALUE ...]

Trains a LoRA adapter on the assistant's turns of conversations. Without an argument: the preset `demo`, a small real
model on a small real data set, minutes on a laptop's CPU. A run's own config.yaml continues or repeats it."""


def train(
    config: Config,
    runtime: Runtime,
    run: RunDirectory,
    model: nn.Module,
    optimizer: Optimizer,
    batches: GlobalBatches,
    train_set: ExampleSet,
    validation_set: ExampleSet | None,
) -> None:
    timetable = Timetable(config.optim, batches.steps_per_epoch)
    model.train()

    for step in range(timetable.num_steps):
        batch = batches[step]  # the same on every rank; found without walking there
        learning_rate = timetable.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        # Every rank runs the same number of micro-batches. Losses are sums, divided once by the targets of all ranks.
        loss = runtime.zero()
        for index, micro_batch in enumerate(runtime.fetch(train_set, batch.micro_batches)):
            runtime.seed_draws(config.run.seed, step, index)
            with runtime.accumulating(model, last=index + 1 == batch.num_micro_batches):
                micro_loss = model(**micro_batch) / batch.num_targets
                runtime.backward(micro_loss)
            loss += micro_loss.detach()

        # One reduction: the loss that all ranks log. On a bad number nothing has been updated, on any rank.
        grad_norm = runtime.clip_gradients(model, config.optim.max_grad_norm)
        (total_loss,) = runtime.sum(loss)
        if not isfinite(total_loss + grad_norm):
            raise NonFiniteError.at(step + 1, total_loss, grad_norm, train_set.places(batch.indices))
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        run.log(done, loss=total_loss, grad_norm=grad_norm, learning_rate=learning_rate, batch=batch)
        if validation_set is not None and timetable.validates_after(done):
            run.log_validation(done, *validate(runtime, model, validation_set))


def validate(runtime: Runtime, model: nn.Module, validation_set: ExampleSet) -> tuple[float, int]:
    """Total loss over total targets, in nats a target, and the number of targets."""
    loss, num_targets = runtime.zero(), int(validation_set.num_targets.sum())
    with runtime.evaluating(model):
        for micro_batches in runtime.in_order(validation_set):
            for micro_batch in runtime.fetch(validation_set, micro_batches):
                loss += model(**micro_batch)
    (total_loss,) = runtime.sum(loss)
    return total_loss / num_targets, num_targets


def main(argv: Sequence[str]) -> None:
    if set(HELP) & set(argv):
        print(help_text(USAGE))
        return
    loaded = load_config(argv, default="demo")

    from chatlora.training import runtime as engine
    from chatlora.training import stage

    runtime = engine.start(loaded.config)
    config, run, finished = stage.open_run(loaded, runtime)
    if finished:
        print(f"{run.path} is finished: {run.summary()}")
    else:
        with run.reporting():
            actors = stage.set_up(config, runtime, run)
            with stage.out_of_memory_told(actors.config, actors.runtime):
                train(actors.config, actors.runtime, run, *actors.in_the_loop)
            stage.put_away(actors, run)
    if config.evaluation.after_training and config.data.test:
        import evaluate

        evaluate.main([str(run.path), "--compare", "base"])


if __name__ == "__main__":
    run_as_script(main)
