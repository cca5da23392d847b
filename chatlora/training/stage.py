"""What happens before the first step and after the last: from a Config to the actors of the loop, and back."""

import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import chatlora
from chatlora.cache import cache_root
from chatlora.claim import INPUTS, claim, contents_of, refuse_other_inputs
from chatlora.config import Config
from chatlora.config_files import Loaded, config_text
from chatlora.data.batches import GlobalBatches
from chatlora.data.dataset import ExampleSet, PreparedData, Say, prepare_training_data
from chatlora.data.ledger import summary_lines
from chatlora.data.rendering import Renderer
from chatlora.data.survey import inputs_of, survey
from chatlora.errors import ConfigError, LaunchError, ModelError, OutOfMemoryError
from chatlora.model.attention import why_not_packed
from chatlora.model.continuing import start_from
from chatlora.model.identity import base_model_identity
from chatlora.model.loading import load_base_model, load_tokenizer, refuse_ids_without_row, renderer_for
from chatlora.model.lora import add_lora, describe_lora, trainable
from chatlora.model.loss import TargetLoss
from chatlora.model.serving import save_adapter, save_generation_config, served_class, why_not_served
from chatlora.model.spread import layer_by_layer, num_elements, refuse_stacked_experts
from chatlora.model.template_settings import save_template_settings
from chatlora.run_directory import RunDirectory, write_text
from chatlora.training.card import model_card
from chatlora.training.checkpoint import home_of, read_checkpoint, refuse_full_disk, why_broken
from chatlora.training.runtime import Runtime
from chatlora.training.state import gather_adapter
from chatlora.training.timetable import Timetable

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class Actors:
    """Who plays in the loop, and what is needed to put the adapter away after it."""

    config: Config
    runtime: Runtime
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    adapted: PeftModel
    model: nn.Module  # TargetLoss around `adapted`, prepared for the engine
    optimizer: torch.optim.Optimizer
    batches: GlobalBatches
    data: PreparedData

    @property
    def in_the_loop(self) -> tuple[nn.Module, torch.optim.Optimizer, GlobalBatches, ExampleSet, ExampleSet | None]:
        return self.model, self.optimizer, self.batches, self.data.train, self.data.validation


def open_run(loaded: Loaded, runtime: Runtime) -> tuple[Config, RunDirectory, bool]:
    """The config with its run directory and date settled, the directory, and whether the run is finished already.

    Rank 0 decides, from its own disk; the others are told.
    """
    lock, told = None, ""
    if runtime.is_main:
        (config, finished), lock = claim(loaded.config, loaded.name)
        if finished:  # what an evaluation is told may have changed
            assert config.run.output_dir is not None
            write_text(config.run.output_dir / "config.yaml", config_text(config))
        told = json.dumps({"config": config.as_dict(), "finished": finished})
    answer = json.loads(runtime.share(told))
    config = Config.model_validate(answer["config"])
    assert config.run.output_dir is not None
    run = RunDirectory(config.run.output_dir, lock=lock, peak_memory=runtime.peak_memory_bytes)
    return config, run, answer["finished"]


def set_up(config: Config, runtime: Runtime, run: RunDirectory) -> Actors:
    """Data rendered and proved, the model loaded and probed, the adapter put on, everything handed to the engine."""
    run.say(f"{runtime.num_processes} process(es), {runtime.engine} on {runtime.hardware()}, {runtime.precision}")
    for note in runtime.notes:
        run.say(note)
    run.say(f"run directory {run.path}")
    tokenizer, renderer, data = load_data(config, runtime, run.say)
    config = config.with_values("model", chat_template_kwargs=renderer.chat_template_kwargs)
    runtime, adapted = load_model(config, runtime, tokenizer, data, run.say)
    identity = base_model_identity(adapted.get_base_model(), config.model.revision)
    init_from = None if config.lora.init_from is None else start_from(adapted, config.lora)
    facts = environment(runtime, renderer, data, identity) | {"init_from": init_from}
    refuse_other_ranks(runtime, facts)
    model, optimizer = hand_over(adapted, runtime, weight_decay=config.optim.weight_decay)

    batches = batches_of(config, runtime, data.train)
    steps = Timetable(config.optim, batches.steps_per_epoch, config.checkpoint.every_steps).num_steps
    first = batches[0]
    run.say(
        f"{steps:,} steps of {config.optim.global_batch_size} examples; the first: {first.num_tokens:,} tokens in "
        f"{first.num_micro_batches} micro-batch(es) a process, of at most {runtime.token_budget:,} tokens each"
    )
    if runtime.is_main:
        facts |= {"contents": contents_of(config)}
        refuse_other_inputs(config, facts)
        size = sum(num_elements(parameter) for parameter in trainable(adapted).values())
        refuse_full_disk(run.checkpoints, size, config.checkpoint.keep_last)
    run.describe(config, facts, data.ledger)
    return Actors(config, runtime, tokenizer, renderer, adapted, model, optimizer, batches, data)


def refuse_other_ranks(runtime: Runtime, facts: dict[str, Any]) -> None:
    """Raise LaunchError, by name, where a machine without a shared disk has other rows or another model than rank 0."""
    here = {name: facts[name] for name in INPUTS}
    there = json.loads(runtime.share(json.dumps(here)))
    different = [what for name, what in INPUTS.items() if here[name] != there[name]]
    if different:
        raise LaunchError(*(f"on {platform.node()}, {what} is not what rank 0 has" for what in different))


def load_data(config: Config, runtime: Runtime, say: Say) -> tuple[PreTrainedTokenizerBase, Renderer, PreparedData]:
    """The tokenizer, the renderer, and the rows rendered and proved, on every machine before any goes on."""
    if not config.data.train:
        raise ConfigError("data.train names no rows to train on: give a file, a folder or a data set of the hub")
    tokenizer = load_tokenizer(config.model)
    if config.evaluation.after_training and config.data.test:  # its mistakes are told before hours of training
        survey(inputs_of(config.data.test, "test"), cache_root() / "data", config.data.on_bad_row)
    elif config.evaluation.after_training:
        say("evaluation.after_training: there will be none, since data.test names no rows")
    renderers: list[Renderer] = []

    def make_renderer(any_reasoning: bool) -> Renderer:
        renderers.append(renderer_for(tokenizer, config.model, any_reasoning=any_reasoning))
        return renderers[0]

    data = prepare_training_data(config.data, config.run.seed, make_renderer, cache=cache_root(), say=say)
    runtime.meet()
    (renderer,) = renderers
    for line in summary_lines(data.ledger):
        say(line)
    share = data.proof_seconds / max(data.seconds, 1e-9)
    say(f"rendering took {data.seconds:,.1f} s of work when it was done, {share:.0%} of it to prove the targets exact")
    return tokenizer, renderer, data


def load_model(
    config: Config, runtime: Runtime, tokenizer: PreTrainedTokenizerBase, data: PreparedData, say: Say
) -> tuple[Runtime, PeftModel]:
    """The base model with a fresh adapter, and the runtime that knows whether its batches are packed."""
    base = runtime.place(load_base_model(config.model, dtype=runtime.dtype))
    runtime = choose_layout(base, runtime, say)
    refuse_ids_without_row(base, tokenizer, data.largest_id)
    adapted = add_lora(base, config.lora, config.run.seed, config.model.revision)
    refuse_stacked_experts(adapted)
    for line in describe_lora(adapted):
        say(line)
    if config.model.gradient_checkpointing:
        adapted.activation_checkpointing_enable({"use_reentrant": False})
    return runtime, adapted


def hand_over(adapted: PeftModel, runtime: Runtime, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The loss around the model, and AdamW over its adapter, prepared for the engine."""
    with layer_by_layer(adapted):
        loss = TargetLoss(adapted, packed=not runtime.padded, autocast_dtype=runtime.autocast_dtype)
    fused = runtime.device.type in ("cpu", "cuda")
    return runtime.prepare(loss, torch.optim.AdamW(list(trainable(loss).values()), fused=fused, **settings))


def batches_of(config: Config, runtime: Runtime, train_set: ExampleSet) -> GlobalBatches:
    return GlobalBatches(
        train_set.lengths,
        train_set.num_targets,
        config.optim.global_batch_size,
        runtime.token_budget,
        config.run.seed,
        runtime.num_processes,
        runtime.padded,
    )


def choose_layout(base: PreTrainedModel, runtime: Runtime, say: Say) -> Runtime:
    """Packed where the loaded model computes the same packed, else right-padded; said once, with the reason."""
    with layer_by_layer(base):
        reason = why_not_packed(base, exact=runtime.dtype == torch.float32)
    reason = runtime.share(reason or "")
    if not reason:
        say("batches are packed: on this model, probed, conversations do not see each other and nothing is padded")
        return runtime
    say(f"batches are padded: this model cannot be packed here, {reason}")
    return replace(runtime, padded=True)


@contextmanager
def out_of_memory_told(config: Config, runtime: Runtime) -> Iterator[None]:
    """Out of memory becomes a sentence that names the setting to lower and its value."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        checkpointing = "" if config.model.gradient_checkpointing else ", set model.gradient_checkpointing true"
        raise OutOfMemoryError(
            f"a micro-batch of up to {runtime.token_budget:,} tokens does not fit. Lower "
            f"optim.max_tokens_per_micro_batch (now {config.optim.max_tokens_per_micro_batch}; no lower than "
            f"data.max_length, now {config.data.max_length}){checkpointing}, or lower data.max_length",
            " ".join(str(error).split())[:300],
        ) from error


def put_away(actors: Actors, run: RunDirectory) -> None:
    """The last step's adapter, with tokenizer, chat template, stop tokens and card, beside the run's other files."""
    weights = gather_adapter(actors.runtime, actors.model, actors.optimizer)
    if not actors.runtime.is_main:
        return
    export(actors, run, weights, run.adapter)
    run.say(f"the adapter is in {run.adapter}")
    best = run.best_step()
    if best is not None and actors.config.checkpoint.keep_best:
        home = home_of(run.checkpoints, best)
        fault = why_broken(home)
        if fault:
            run.say(f"there is no adapter-best: {home} is broken: {fault}")
            return
        export(actors, run, read_checkpoint(home).adapter, run.path / "adapter-best")
        run.say(f"the adapter with the best validation loss, of step {best}, is in {run.path / 'adapter-best'}")


def export(actors: Actors, run: RunDirectory, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """A PEFT adapter that is whole when it appears."""
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    save_adapter(actors.adapted, weights, beside)
    actors.tokenizer.save_pretrained(beside)
    model = actors.config.model
    save_template_settings(beside, actors.renderer.chat_template_kwargs, model.chat_template_date)
    base = actors.adapted.get_base_model()
    save_generation_config(base, actors.renderer.stop_ids, beside)
    card = model_card(actors.config, run.path, served_class(base).__name__, base.name_or_path)
    (beside / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)
    fault = why_not_served(actors.adapted, weights, folder, actors.runtime.autocast_dtype)
    if fault:
        raise ModelError(f"the adapter in {folder} is not what was trained: {fault}; what is in {run.checkpoints} is")


def environment(runtime: Runtime, renderer: Renderer, data: PreparedData, base_model: str) -> dict[str, Any]:
    """What this run ran on and with: enough to tell two runs apart."""
    return {
        "versions": {
            "chatlora": chatlora.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "commit": _commit(),
        "hardware": runtime.hardware(),
        "engine": runtime.engine,
        "num_processes": runtime.num_processes,
        "precision": runtime.precision,
        "padded": runtime.padded,
        "threads": torch.get_num_threads(),
        "base_model": base_model,
        "rendering": renderer.fingerprint,
        "data": data.fingerprint,
    }


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, if it is one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return told.stdout.strip() or None
