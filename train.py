"""Train a LoRA adapter: `accelerate launch train.py [PRESET | FILE.yaml] [--section.field VALUE ...]`.

`train` is the whole loop, `validate` the loss on held-out rows, `restore` how a run goes on; `make_adapter` shows data,
model, loader, training and export in the order in which they happen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from chatlora.config import Config
from chatlora.config_files import HELP, help_text, load_config
from chatlora.distributed.signals import StopSignals
from chatlora.errors import NonFiniteError, Stopped, run_as_script
from chatlora.scripts import load_script
from chatlora.training.named_files import refuse_missing_files
from chatlora.training.schedule import Schedule

if TYPE_CHECKING:  # torch and transformers take seconds to import: not for `--help`, not for a typo in a setting
    from torch import nn
    from torch.optim import Optimizer

    from chatlora.data.loader import Loader
    from chatlora.distributed.runtime import Runtime
    from chatlora.run_directory import RunDirectory

USAGE = """usage: accelerate launch [--config_file FILE] train.py [PRESET | FILE.yaml] [--section.field VALUE ...]

Trains a LoRA adapter on the assistant's turns of conversations. Without an argument: the preset `demo`, a small real
model on a small real data set, minutes on a laptop's CPU. Settings alone go over the defaults below, and the run is
named after its rows. A run's own config.yaml continues or repeats it."""

SAVED = "stopped after step {}, which is saved: the same command goes on from there"
LAST_SAVED = "stopped after the last step, which is saved: the same command exports the adapter"


def train(
    config: Config,
    runtime: Runtime,
    run: RunDirectory,
    model: nn.Module,
    optimizer: Optimizer,
    loader: Loader,
    validation: Mapping[str, Loader],
) -> None:
    from chatlora.training.state import save_checkpoint

    batches = loader.batches(config.optim.global_batch_size, config.run.seed)
    schedule = Schedule(config.optim, batches.steps_per_epoch, config.checkpoint.every_steps)
    first_step = restore(config, runtime, run, model, optimizer, loader, validation, schedule)  # 0 on a fresh run
    patience = config.checkpoint.stop_after_no_gain
    model.train()

    for step in range(first_step, schedule.num_steps):
        if schedule.is_checkpoint_step(step) and runtime.broadcast_bool(run.has_stalled(patience)):
            break

        batch = batches[step]  # the same on every rank; found without walking there
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step) * group.get("lr_ratio", 1.0)

        # Every rank runs the same number of micro-batches. Losses are sums, divided once by the targets of all ranks.
        loss = runtime.zero()
        for index, micro_batch in enumerate(run.watch_step(loader.fetch(batch.micro_batches))):
            runtime.seed_draws(config.run.seed, step, index)
            with runtime.accumulating(model, last=index + 1 == batch.num_micro_batches):
                micro_loss = model(**micro_batch) / batch.num_targets
                runtime.backward(micro_loss)  # DeepSpeed clips and updates in here, in the step's last one
            loss += micro_loss.detach()

        grad_norm = runtime.clip_gradients(model, config.optim.max_grad_norm)
        # One reduction: the loss that all ranks log and the stop that all ranks obey.
        total_loss, stops = runtime.all_reduce_sum(loss, runtime.stop_requested())
        if not isfinite(total_loss + grad_norm):  # nothing has been updated, on any rank and under any engine
            raise NonFiniteError.at(step + 1, total_loss, grad_norm, loader.examples.places(batch.indices))
        optimizer.step()
        optimizer.zero_grad()

        done, stop = step + 1, stops > 0
        run.log(done, loss=total_loss, grad_norm=grad_norm, learning_rate=schedule.learning_rate(step), batch=batch)
        if schedule.is_checkpoint_step(done) and not stop:
            stop = validate(done, config, runtime, run, model, validation)  # before the save, which may be the best
        if schedule.is_checkpoint_step(done) or stop:
            save_checkpoint(config.checkpoint, run, done, runtime, model, optimizer)
        if stop:
            runtime.barrier()  # a rank that leaves earlier may have its launcher end rank 0 while that one writes
            raise Stopped(SAVED.format(done))

    if any(runtime.all_reduce_sum(runtime.stop_requested())):  # it came while the last step was saved
        raise Stopped(LAST_SAVED)


def validate(
    done: int,
    config: Config,
    runtime: Runtime,
    run: RunDirectory,
    model: nn.Module,
    validation: Mapping[str, Loader],
) -> bool:
    """Log the loss on each set of held-out rows. Returns whether a signal cut it short."""
    if not validation:
        return False
    losses = [runtime.zero() for _ in validation]
    sets = zip(losses, validation.values(), strict=True)
    lots = [(loss, lot) for loss, loader in sets for lot in loader.in_order()]
    with runtime.evaluating(model):
        for (loss, _), lot in zip(lots, run.watch_validation([lot for _, lot in lots]), strict=True):
            for micro_batch in lot:
                loss += model(**micro_batch)
            if any(runtime.all_reduce_sum(runtime.stop_requested())):
                return True
    num_targets = [int(loader.examples.num_targets.sum()) for loader in validation.values()]
    sums = zip(runtime.all_reduce_sum(*losses), num_targets, strict=True)
    run.log_validation(done, dict(zip(validation, sums, strict=True)), config.checkpoint.best_by)
    return False


def restore(
    config: Config,
    runtime: Runtime,
    run: RunDirectory,
    model: nn.Module,
    optimizer: Optimizer,
    loader: Loader,
    validation: Mapping[str, Loader],
    schedule: Schedule,
) -> int:
    """The newest checkpoint into model and optimizer, and the logs cut back to it. Returns its step, 0 where none is.

    A validation that a signal cut short is made up for, so that the run has the same validations as an undisturbed one.
    """
    from chatlora.training.state import restore_newest

    step = restore_newest(config.checkpoint, run, runtime, model, optimizer, loader.filler())
    run.resume_logs(step, schedule.num_steps, loader.batches(config.optim.global_batch_size, config.run.seed))
    unvalidated = schedule.is_checkpoint_step(step) and runtime.broadcast_bool(not run.validated(step))
    if unvalidated and validate(step, config, runtime, run, model, validation):
        raise Stopped(SAVED.format(step))
    return step


def main(argv: Sequence[str]) -> None:
    if set(HELP) & set(argv):
        print(help_text(USAGE))
        return
    with StopSignals() as signals:  # before the seconds that the imports take
        loaded = load_config(argv, default="demo")
        refuse_missing_files(loaded.config)

        from chatlora.distributed.runtime import start
        from chatlora.training import setup

        runtime = start(loaded.config, signals)
        config, run, finished = setup.open_run(loaded, runtime)
        if finished:
            print(f"{run.path} is finished: {run.summary()}")
        else:
            setup.say_what_runs(loaded, runtime, run)
            make_adapter(config, runtime, run)
        if config.evaluation.after_training and setup.has_test_rows(config, runtime, run):
            evaluate = load_script("evaluate")
            evaluate.main([str(run.path), "--compare", "base"], runtime, again=not finished)


def make_adapter(config: Config, runtime: Runtime, run: RunDirectory) -> None:
    """From rows to an adapter: data, model, loader, training, export, in this order."""
    from chatlora.distributed.memory import out_of_memory_told
    from chatlora.training import setup
    from chatlora.training.export import export_adapter

    with run.reporting():
        config, tokenizer, renderer, data = setup.load_data(config, runtime, run.say)
        adapted, padded = setup.load_model(config, runtime, tokenizer, data, run.say)
        loader, validation = setup.loaders(config, runtime, data, padded)
        setup.describe_run(config, runtime, run, adapted, renderer, data, loader)
        model, optimizer = setup.prepare_for_engine(config, runtime, adapted, packed=not padded)
        with out_of_memory_told(setup.does_not_fit(config, loader)), runtime.signals.noted(run.finishing, run.say):
            train(config, runtime, run, model, optimizer, loader, validation)
        export_adapter(config, runtime, run, model, optimizer, adapted, tokenizer, renderer)
    runtime.free()


if __name__ == "__main__":
    run_as_script(main)
