"""What happens before the first step: from what a person asked for to what the loop takes."""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatlora.cache import cache_root
from chatlora.config import Config, LoraConfig
from chatlora.config_files import Loaded, config_text
from chatlora.data.dataset import PreparedData, Say, prepare_training_data
from chatlora.data.held_out import HELD_OUT, kept_by
from chatlora.data.ledger import summary_lines
from chatlora.data.loader import Loader
from chatlora.disk import sha256_of, write_json, write_text
from chatlora.distributed.memory import not_loaded, out_of_memory_told
from chatlora.distributed.runtime import Runtime
from chatlora.distributed.zero3 import layer_by_layer, num_elements, refuse_stacked_experts
from chatlora.errors import ConfigError, LaunchError, ModelError
from chatlora.inspection.console import show_one_row
from chatlora.model.attention import why_not_packed
from chatlora.model.fingerprint import base_model_fingerprint
from chatlora.model.loading import (
    load_base_model,
    load_tokenizer,
    refuse_ids_without_row,
    renderer_for,
)
from chatlora.model.lora import add_lora, describe_lora, trainable
from chatlora.model.lora_init import init_fingerprint, start_from
from chatlora.model.loss import TargetLoss
from chatlora.model.scales import is_b
from chatlora.reading.scan import inputs_of, scan
from chatlora.rendering.embedded import embedded_name, source_of
from chatlora.rendering.renderer import Renderer
from chatlora.run_directory import RunDirectory
from chatlora.run_lock import INPUTS, lock_run, refuse_other_inputs, refuse_shorter
from chatlora.training.checkpoint import refuse_full_disk
from chatlora.training.environment import environment_of
from chatlora.training.schedule import Schedule
from chatlora.training.template_fit import template_fit


def open_run(loaded: Loaded, runtime: Runtime) -> tuple[Config, RunDirectory, bool]:
    """The config with its run directory and date settled, the directory, and whether the run is finished already.

    Rank 0 decides, from its own disk; the others are told.
    """
    locks: list[FileLock] = []

    def open_it() -> str:
        (config, finished), lock = lock_run(loaded.config, loaded.name, contents_of)
        locks.append(lock)
        if finished:  # what an evaluation is told may have changed
            assert config.run.output_dir is not None
            write_text(config.run.output_dir / "config.yaml", config_text(config))
        return json.dumps({"config": config.as_dict(), "finished": finished})

    answer = json.loads(runtime.decided_by_main(open_it))
    config = Config.model_validate(answer["config"])
    assert config.run.output_dir is not None
    lock = locks[0] if runtime.is_main else None
    run = RunDirectory(config.run.output_dir, lock=lock, peak_memory=runtime.peak_memory_bytes)
    return config, run, answer["finished"]


def say_what_runs(loaded: Loaded, runtime: Runtime, run: RunDirectory) -> None:
    for line in loaded.lines():
        run.say(line)
    run.say(f"{runtime.num_processes} process(es), {runtime.engine} on {runtime.hardware()}, {runtime.precision}")
    for note in runtime.notes:
        run.say(note)
    run.say(f"run directory {run.path}")


def load_data(
    config: Config, runtime: Runtime, say: Say
) -> tuple[Config, PreTrainedTokenizerBase, Renderer, PreparedData]:
    """The rows rendered and proved, on every machine before any goes on, and what rendered them.

    The config says then what the chat template is told.
    """
    if not config.data.train:
        raise ConfigError("data.train names no rows to train on: give a file, a folder or a data set of the hub")
    tokenizer = load_tokenizer(config.model)
    test = () if isinstance(config.data.test, float) else config.data.test
    if config.evaluation.after_training and test:  # its mistakes are told before hours of training
        scan(inputs_of(test, "test"), cache_root() / "data", config.data.on_bad_row)
    renderers: list[Renderer] = []

    def make_renderer(any_reasoning: bool) -> Renderer:
        renderers.append(renderer_for(tokenizer, config.model, config.data, any_reasoning=any_reasoning))
        return renderers[0]

    data = prepare_training_data(config.data, config.run.seed, make_renderer, cache=cache_root(), say=say)
    runtime.barrier()
    (renderer,) = renderers
    for line in [*summary_lines(data.ledger), *data.lines_on_sets(config.checkpoint.best_by)]:
        say(line)
    if config.evaluation.after_training and not (test or data.held_out.get("test")):
        reason = "holds out no rows" if config.data.test else "names no rows"
        say(f"evaluation.after_training: there will be none, since data.test {reason}")
    if runtime.is_main:
        show_one_row(Console(stderr=True), data.train, tokenizer)
    share = data.proof_seconds / max(data.seconds, 1e-9)
    say(f"rendering took {data.seconds:,.1f} s of work when it was done, {share:.0%} of it to prove the targets exact")
    return (
        config.with_values("model", chat_template_kwargs=renderer.chat_template_kwargs),
        tokenizer,
        renderer,
        data,
    )


def has_test_rows(config: Config, runtime: Runtime, run: RunDirectory) -> bool:
    """Whether there is anything to evaluate on after training: a share of few rows may have held out none."""
    test = config.data.test
    return runtime.broadcast_bool(kept_by(run.path, "test") != []) if isinstance(test, float) and test else bool(test)


def load_model(
    config: Config, runtime: Runtime, tokenizer: PreTrainedTokenizerBase, data: PreparedData, say: Say
) -> tuple[PeftModel, bool]:
    """The base model with a fresh adapter or that of `lora.init_from`, and whether its batches must be padded."""
    with out_of_memory_told(not_loaded(config.model.name_or_path, runtime)):
        base = runtime.move_to_device(load_base_model(config.model, dtype=runtime.dtype))
        padded = is_padded(base, runtime, say)
        refuse_ids_without_row(base, tokenizer, data.largest_id)
        refuse_spread_dora(config.lora, runtime)
        adapted = add_lora(base, config.lora, config.run.seed, config.model.revision)
        refuse_stacked_experts(adapted)
        if config.lora.init_from is not None:
            start_from(adapted, config.lora)
        for line in describe_lora(adapted):
            say(line)
        if config.model.gradient_checkpointing:
            adapted.activation_checkpointing_enable({"use_reentrant": False})
    return adapted, padded


def refuse_spread_dora(lora: LoraConfig, runtime: Runtime) -> None:
    """Raise LaunchError where DoRA would read weights of the base that no process has whole."""
    if lora.variant == "dora" and runtime.engine in ("zero3", "fsdp2"):
        raise LaunchError(
            f"lora.variant is dora, which reads the base's weights past {runtime.engine}, and that spreads them: use "
            f"rslora or null, or accelerate_configs/zero2.yaml"
        )


def is_padded(base: PreTrainedModel, runtime: Runtime, say: Say) -> bool:
    """Packed where the loaded model computes the same packed, else right-padded; said once, with the reason."""
    with layer_by_layer(base):
        reason = why_not_packed(base, exact=runtime.dtype == torch.float32)
    reason = runtime.broadcast_text(reason or "")
    if reason:
        say(f"batches are padded: this model cannot be packed here, {reason}")
    else:
        say("batches are packed: on this model, probed, conversations do not see each other and nothing is padded")
    return bool(reason)


def loaders(config: Config, runtime: Runtime, data: PreparedData, padded: bool) -> tuple[Loader, dict[str, Loader]]:
    """This process's part of the training rows, and of each set of validation rows, by name."""
    place = (runtime.rank, runtime.num_processes, token_budget(config, runtime.device), padded, runtime.device)
    return Loader(data.train, *place), {name: Loader(rows, *place) for name, rows in data.validation.items()}


def token_budget(config: Config, device: torch.device) -> int:
    """Tokens of one micro-batch on one process; `auto` is enough to keep the device busy, and one example at least."""
    if config.optim.max_tokens_per_micro_batch != "auto":
        return config.optim.max_tokens_per_micro_batch
    return max(config.data.max_length, 1024 if device.type == "cpu" else 4096)


def prepare_for_engine(
    config: Config,
    runtime: Runtime,
    adapted: PeftModel,
    *,
    packed: bool,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The loss around the model, and the optimizer of its adapter, as the engine wants them."""
    with out_of_memory_told(not_loaded(config.model.name_or_path, runtime)):
        with layer_by_layer(adapted):
            loss = TargetLoss(adapted, packed=packed, autocast_dtype=runtime.autocast_dtype)
        parameters = parameters_of(adapted, config.optim.lr_ratio_b)
        return runtime.prepare(loss, optimizer or make_optimizer(config, runtime, parameters))


def parameters_of(adapted: PeftModel, lr_ratio_b: float | None) -> list[Any]:
    """The adapter's parameters; with a ratio as two groups, of which the loop gives the second that much of its rate.

    LoRA+, https://arxiv.org/abs/2402.12354: B, which starts at zero, may learn faster than A.
    """
    parameters = trainable(adapted)
    if lr_ratio_b in (None, 1):
        return list(parameters.values())
    faster = [parameter for name, parameter in parameters.items() if is_b(name)]
    others = [parameter for name, parameter in parameters.items() if not is_b(name)]
    return [{"params": others}, {"params": faster, "lr_ratio": lr_ratio_b}]


def make_optimizer(config: Config, runtime: Runtime, parameters: list[Any]) -> torch.optim.Optimizer:
    """AdamW. The loop sets the learning rates; what is kept in `optimizer.state` is in every checkpoint."""
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        weight_decay=config.optim.weight_decay,
        fused=runtime.device.type in ("cpu", "cuda"),
    )


def describe_run(
    config: Config,
    runtime: Runtime,
    run: RunDirectory,
    adapted: PeftModel,
    renderer: Renderer,
    data: PreparedData,
    loader: Loader,
) -> None:
    """Say what is ahead and write what the run is, after a last look at its inputs on every machine and at the disk."""
    environment = environment_of(runtime, renderer, data, loader.padded) | {
        "base_model": base_model_fingerprint(adapted.get_base_model(), config.model.revision),
        "init_from": init_fingerprint(config.lora),
    }
    refuse_other_ranks(runtime, environment)
    environment["template_fit"] = template_fit(adapted, renderer.tokenizer, data, config, runtime, run.say).record()
    batches = loader.batches(config.optim.global_batch_size, config.run.seed)
    first, steps = batches[0], Schedule(config.optim, batches.steps_per_epoch, config.checkpoint.every_steps).num_steps
    run.say(
        f"{steps:,} steps of {config.optim.global_batch_size} examples; the first: {first.num_tokens:,} tokens in "
        f"{first.num_micro_batches} micro-batch(es) a process, of at most {loader.token_budget:,} tokens each"
    )

    def accept() -> str:
        environment["contents"] = contents_of(config)
        refuse_other_inputs(config, environment)
        refuse_shorter(config, steps, run.stalled_at(config.checkpoint.stop_after_no_gain))
        size = sum(num_elements(parameter) for parameter in trainable(adapted).values())
        refuse_full_disk(run.checkpoints, size, config.checkpoint.keep_last)
        if data.held_out:
            write_json(run.path / HELD_OUT, data.held_out_rows())
        return ""

    runtime.decided_by_main(accept)
    run.describe(config, environment, data.ledger)


def contents_of(config: Config) -> dict[str, Any]:
    """Setting -> sha256 of what stands in the files that it names: found without rendering anything."""
    data, template = config.data, config.model.chat_template
    validation = [source for _, sources in sorted(data.validation_sets.items()) for source in sources]
    try:
        text = None if template is None else _sha256_of_template(template)
    except OSError as error:
        raise ModelError(f"model.chat_template: {template} cannot be read: {error}") from None
    return {
        "data.train": [each.sha256 for each in inputs_of(data.train, "train")],
        "data.validation": [each.sha256 for each in inputs_of(validation, "validation")],
        "model.chat_template": text,
    }


def _sha256_of_template(template: Path) -> str:
    name = embedded_name(template)
    return sha256_of(template) if name is None else hashlib.sha256(source_of(name).encode()).hexdigest()


def refuse_other_ranks(runtime: Runtime, environment: Mapping[str, Any]) -> None:
    """Raise LaunchError, by name, where a machine without a shared disk has other rows or another model than rank 0."""
    here = {name: environment[name] for name in INPUTS}
    there = json.loads(runtime.broadcast_text(json.dumps(here)))
    different = [what for name, what in INPUTS.items() if here[name] != there[name]]
    if different:
        raise LaunchError(*(f"on {platform.node()}, {what} is not what rank 0 has" for what in different))


def does_not_fit(config: Config, loader: Loader) -> str:
    """What to do where memory runs out in the loop."""
    checkpointing = "" if config.model.gradient_checkpointing else ", set model.gradient_checkpointing true"
    return (
        f"a micro-batch of up to {loader.token_budget:,} tokens does not fit. Lower optim.max_tokens_per_micro_batch "
        f"(now {config.optim.max_tokens_per_micro_batch}; no lower than data.max_length, now {config.data.max_length})"
        f"{checkpointing}, or lower data.max_length"
    )
