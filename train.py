"""Train a LoRA adapter: `accelerate launch train.py [PRESET | FILE.yaml] [--section.field VALUE ...]`.

`train` is the whole loop; `validate` the loss on held-out rows; `main` sets the stage and puts the adapter away.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

from chatlora.config import Config
from chatlora.config_files import HELP, help_text, load_config
from chatlora.errors import NonFiniteError, Stopped, run_as_script
from chatlora.training.signals import StopSignals
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

SAVED = "stopped after step {}, which is saved: the same command goes on from there"


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
    from chatlora.training.state import restore_newest, save_checkpoint

    timetable = Timetable(config.optim, batches.steps_per_epoch, config.checkpoint.every_steps)
    first_step = restore_newest(config.checkpoint, run, runtime, model, optimizer)  # 0 on a fresh run
    run.go_on_from(first_step, timetable.num_steps, batches)
    unvalidated = timetable.saves_after(first_step) and runtime.rank_0_says(not run.validated(first_step))
    if unvalidated and validate(first_step, runtime, run, model, validation_set):  # a signal cut it short: once more
        raise Stopped(SAVED.format(first_step))
    model.train()

    for step in range(first_step, timetable.num_steps):
        if timetable.saves_after(step) and runtime.rank_0_says(run.has_stalled(config.checkpoint.stop_after_no_gain)):
            break

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

        # One reduction: the loss that all ranks log and the stop that all ranks obey.
        grad_norm = runtime.clip_gradients(model, config.optim.max_grad_norm)
        total_loss, stop = runtime.sum(loss, runtime.stop_requested())
        if not isfinite(total_loss + grad_norm):  # nothing has been updated, on any rank
            raise NonFiniteError.at(step + 1, total_loss, grad_norm, train_set.places(batch.indices))
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        run.log(done, loss=total_loss, grad_norm=grad_norm, learning_rate=learning_rate, batch=batch)
        if timetable.saves_after(done) and not stop:
            stop = validate(done, runtime, run, model, validation_set)  # before the save, which may be the best
        if timetable.saves_after(done) or stop:
            save_checkpoint(config.checkpoint, run, done, runtime, model, optimizer)
        if stop:
            runtime.meet()  # a rank that leaves earlier may have its launcher end rank 0 while that one writes
            raise Stopped(SAVED.format(done))


def validate(
    done: int, runtime: Runtime, run: RunDirectory, model: nn.Module, validation_set: ExampleSet | None
) -> bool:
    """Log the loss on held-out rows: total loss over total targets. Returns whether a signal cut it short."""
    if validation_set is None:
        return False
    loss = runtime.zero()
    with runtime.evaluating(model):
        for micro_batches in runtime.in_order(validation_set):
            for micro_batch in runtime.fetch(validation_set, micro_batches):
                loss += model(**micro_batch)
            if any(runtime.sum(runtime.stop_requested())):
                return True
    (total_loss,) = runtime.sum(loss)
    num_targets = int(validation_set.num_targets.sum())
    run.log_validation(done, total_loss / num_targets, num_targets)
    return False


def main(argv: Sequence[str]) -> None:
    if set(HELP) & set(argv):
        print(help_text(USAGE))
        return
    signals = StopSignals.installed()  # before the seconds that the imports take
    loaded = load_config(argv, default="demo")

    from chatlora.training import runtime as engine
    from chatlora.training import stage

    runtime = engine.start(loaded.config, signals)
    config, run, finished = stage.open_run(loaded, runtime)
    if finished:
        print(f"{run.path} is finished: {run.summary()}")
    else:
        train_and_put_away(config, runtime, run)
        runtime.free()
    if config.evaluation.after_training and config.data.test:
        import evaluate

        evaluate.main([str(run.path), "--compare", "base"], runtime, again=not finished)


def train_and_put_away(config: Config, runtime: Runtime, run: RunDirectory) -> None:
    from chatlora.training import stage

    with run.reporting():
        actors = stage.set_up(config, runtime, run)
        with stage.out_of_memory_told(actors.config, actors.runtime), runtime.signals.noted():
            train(actors.config, actors.runtime, run, *actors.in_the_loop)
        stage.put_away(actors, run)


if __name__ == "__main__":
    run_as_script(main)
