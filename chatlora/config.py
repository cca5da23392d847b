"""Every setting, with its meaning and its unit. YAML and flags become one frozen `Config`.

Precedence: the defaults here < a preset or YAML file < `--section.field VALUE` flags.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from chatlora.config_paths import PATHS, absolute
from chatlora.config_rows import UNNAMED, Section, ShareOrSources, ShareSourcesOrSets
from chatlora.config_rows import RowFormat as RowFormat
from chatlora.config_rows import Source as Source
from chatlora.config_rows import Sources as Sources

ScheduleName = Literal["constant", "linear", "cosine"]
OverLength = Literal["fit", "cut", "drop", "error"]
OnBadRow = Literal["error", "set_aside"]
OnLeak = Literal["warn", "drop", "error"]
Supervise = Literal["all", "last"]
Reasoning = Literal["auto", "field", "text", "drop"]
ControlWords = Literal["text", "token"]
BestBy = Literal["first", "mean"]
Style = Literal["chatlora", "chatglm3"]
ExpertFormat = Literal["auto", "stacked", "per_expert"]
Precision = Literal["auto", "bf16", "fp32"]


class ModelConfig(Section):
    name_or_path: str = Field(
        "Qwen/Qwen3-0.6B", min_length=1, description="a folder, a model of the hub, or embedded:smollm2-135m-instruct"
    )
    revision: str | None = Field(None, description="commit, tag or branch of a hub model")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: about a third slower, far less memory"
    )
    chat_template: Path | None = Field(
        None, description="a Jinja file, or embedded:NAME, to use instead of the tokenizer's own template"
    )
    chat_template_kwargs: dict[str, Any] = Field({}, description="given to the template, e.g. {enable_thinking: false}")
    chat_template_date: date | None = Field(
        None, description="the date that a template sees; null: the run's first day"
    )


class LoraConfig(Section):
    rank: int = Field(16, ge=1, description="r of LoRA")
    alpha: float = Field(32, gt=0, description="the update is scaled by alpha / rank")
    variant: Literal["rslora", "dora"] | None = Field(
        None,
        description="rslora: scaled by alpha / sqrt(rank); dora: rows' lengths are learned too; null: plain LoRA",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping an input of the adapter")
    target_modules: str | tuple[str, ...] = Field("all-linear", description="all-linear, module names, or a regex")
    expert_format: ExpertFormat = Field(
        "auto",
        description="adapters on experts: stacked, or a tensor for each expert; auto: what the family's servers take",
    )
    init_from: Path | None = Field(
        None, description="an adapter or run directory to go on from, with new moments; null: a fresh adapter"
    )


class DataConfig(Section):
    train: Sources = Field((), description="training rows: a path, a list of paths, or a list of sources")
    validation: ShareSourcesOrSets = Field(
        0.02, description="a share of the training rows, sources, or several sets by name: {chat: a.jsonl, tools: ...}"
    )
    test: ShareOrSources = Field((), description="rows for evaluate.py: sources, or a share of the training rows")
    system: str | None = Field(None, description="system prompt of conversations that have none")
    max_length: int = Field(2048, ge=2, description="longest training example, in tokens")
    over_length: OverLength = Field(
        "fit", description="longer rows: fit keeps whole turns, cut cuts hard, drop sets aside, error stops"
    )
    on_bad_row: OnBadRow = Field(
        "error", description="rows that cannot be read: error stops, set_aside names them in the ledger and goes on"
    )
    on_leak: OnLeak = Field(
        "warn",
        description="training rows that share a prompt, or nearly all words, with held-out rows: drop leaves them out",
    )
    supervise: Supervise = Field("all", description="targets: all assistant turns, or the last one")
    reasoning: Reasoning = Field(
        "auto",
        description="thoughts: field gives them to the template, text leaves <think>...</think> in the reply, drop "
        "leaves them out; auto: field where the template has a place for them, else text",
    )
    control_text: ControlWords = Field(
        "text", description="a message that spells a control token means text, or the token, as servers read it"
    )

    @model_validator(mode="after")
    def _shares_leave_rows(self) -> Self:
        if sum(self.shares.values()) >= 1:
            raise ValueError(
                f"validation ({self.validation}) and test ({self.test}) are shares of the training rows that leave "
                "none to train on: lower them"
            )
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Split -> which share of the training rows is held out for it; nothing where it has rows of its own."""
        splits = {"validation": self.validation, "test": self.test}
        return {split: share for split, share in splits.items() if isinstance(share, float) and share}

    @property
    def validation_sets(self) -> dict[str, tuple[Source, ...]]:
        """Name -> sources of the validation rows that are no training rows."""
        if isinstance(self.validation, dict):
            return self.validation
        return {UNNAMED: self.validation} if isinstance(self.validation, tuple) and self.validation else {}


class OptimConfig(Section):
    epochs: float = Field(3, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many optimizer steps, whatever `epochs` says"
    )
    global_batch_size: int = Field(16, ge=1, description="examples per optimizer step, over all processes")
    max_tokens_per_micro_batch: Literal["auto"] | int = Field(
        "auto", description="tokens of one forward pass on one process; auto: max(max_length, 1024 on CPU, 4096 on GPU)"
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate of AdamW")
    lr_ratio_b: float | None = Field(
        None, gt=0, description="LoRA+: the B matrices learn at this multiple of the learning rate; null: at 1"
    )
    schedule: ScheduleName = Field("cosine", description="learning rate after the warm-up")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="the gradient is scaled down to this norm; inf: never"
    )


class CheckpointConfig(Section):
    every_steps: int = Field(100, ge=1, description="steps between two checkpoints, each with a validation before it")
    keep_last: int = Field(2, ge=1, description="how many checkpoints stay, the newest ones")
    keep_best: bool = Field(True, description="keep the checkpoint with the best validation loss as well")
    best_by: BestBy = Field(
        "mean", description="what decides of several validation sets: the mean over all their targets, or the first set"
    )
    resume: str = Field("auto", description="auto: from the newest good one, if any; never; or a checkpoint's path")
    stop_after_no_gain: int | None = Field(
        None, ge=1, description="end after this many validations without a better loss; null: never"
    )


class EvaluationConfig(Section):
    max_new_tokens: int = Field(512, ge=1, description="longest answer, in tokens")
    max_prompt_length: int | None = Field(None, ge=1, description="longest prompt, in tokens; null: data.max_length")
    max_tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="prompts and answers of one batch, padding included; null: half of the free memory, 2 GiB on CPU",
    )
    style: Style = Field("chatlora", description="how ROUGE and BLEU are computed")
    after_training: bool = Field(False, description="evaluate base and adapter on data.test at the end of train.py")


class RunConfig(Section):
    output_dir: Path | None = Field(None, description="the run's folder; null: runs/NAME-HASH")
    seed: int = Field(0, ge=0, lt=2**63, description="data order, held-out rows, initial adapter, dropout")
    precision: Precision = Field("auto", description="auto: bf16 where the device multiplies it natively, else fp32")
    cpu_threads: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="threads of one process on CPU; auto: the cores divided by the processes"
    )


class Config(Section):
    """One run. Frozen: what the command line said is what the run's config.yaml says."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _budget_holds_one_example(self) -> Self:
        budget = self.optim.max_tokens_per_micro_batch
        if budget != "auto" and budget < self.data.max_length:
            raise ValueError(
                f"optim.max_tokens_per_micro_batch is {budget}, but one example may have data.max_length = "
                f"{self.data.max_length} tokens: raise the one or lower the other"
            )
        return self

    def with_values(self, section: str, **values: Any) -> Self:
        """A copy with some fields of one section replaced."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, as they are written to config.yaml and read back equal."""
        return self.model_dump(mode="json")


# Settings that leave the trajectory of a run as it is. All others alter it: they are hashed into runs/NAME-HASH, and
# a run directory refuses to go on when they differ from what it was begun with.
FREE_SETTINGS = frozenset(
    {
        "checkpoint.every_steps",
        "checkpoint.keep_best",
        "checkpoint.keep_last",
        "checkpoint.resume",
        "checkpoint.stop_after_no_gain",
        "data.on_bad_row",  # where there are bad rows it is error or a run, where there are none it is nothing
        "evaluation.after_training",
        "evaluation.max_new_tokens",
        "evaluation.max_prompt_length",
        "evaluation.max_tokens_per_batch",
        "evaluation.style",
        "lora.expert_format",  # how what was learned is written
        "model.chat_template_date",  # fixed by the run's first day
        "model.gradient_checkpointing",
        "optim.max_tokens_per_micro_batch",
        "run.cpu_threads",
        "run.output_dir",
    }
)


def trajectory(config: Config) -> dict[str, Any]:
    """`section.field` -> value of every setting that alters what is learned.

    How long a run is does not, where no learning rate depends on it: a constant one without warm-up.
    """
    optim = config.optim
    lengths = {"optim.epochs", "optim.max_steps"} if optim.schedule == "constant" and not optim.warmup_ratio else set()
    values = _flat(config.as_dict())
    if config.data.on_leak != "drop":
        values["data.on_leak"] = "warn"  # error is that or no run
    if config.data.on_leak != "drop" or not config.data.test:  # then test rows that are no training rows alter nothing
        values["data.test"] = config.data.shares.get("test", 0.0)
    if config.checkpoint.best_by == "first" and len(config.data.validation_sets) > 1:
        values["checkpoint.best_by"] = f"first ({next(iter(config.data.validation_sets))})"
    return {name: value for name, value in values.items() if name not in FREE_SETTINGS | lengths}


def trajectory_hash(config: Config) -> str:
    """Eight hex digits that name a run's trajectory."""
    return hashlib.sha256(json.dumps(trajectory(config), sort_keys=True).encode()).hexdigest()[:8]


def changed_settings(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """`section.field` -> (before, after) of the trajectory's settings that differ; a path may be relative in one."""
    old, new = trajectory(before), trajectory(after)
    changed = [name for name in old if name in new and absolute(name, new[name]) != absolute(name, old[name])]
    told = {"data.test": (before.as_dict()["data"]["test"], after.as_dict()["data"]["test"])}
    pairs = {name: told.get(name, (old[name], new[name])) for name in changed}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def with_absolute_paths(config: Config) -> Config:
    """What exists on this machine by its absolute path: elsewhere a relative one would be taken for a hub name."""
    values = config.as_dict()
    for setting in PATHS:
        section, _, name = setting.partition(".")
        values[section][name] = absolute(setting, values[section][name], only_existing=True)
    return Config.model_validate(values)


def _flat(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in values.items() for name, value in fields.items()}
