"""The gradient certificate: one global batch, computed in every way at hand, gives one gradient.

The reference is plain: every process computes the whole batch by itself, one conversation at a time, with the model's
own attention, all its logits and torch's backward pass, before the engine has the model. (Where the engine spreads the
model as it is loaded, through the engine.) Every other way is what training does: dealt to the processes, cut into
micro-batches by a budget, packed or padded, activations kept or computed again. Its gradient is read out of the state
of an optimizer, since that can be read under every engine.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product, starmap

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy

from chatlora.config import Config
from chatlora.data.batches import Batch, GlobalBatches, Indices
from chatlora.data.dataset import ExampleSet, Say
from chatlora.data.loader import Loader
from chatlora.distributed.runtime import Runtime
from chatlora.model.attention import PACKED
from chatlora.model.lora import trainable
from chatlora.rendering.examples import IGNORE_INDEX
from chatlora.training import setup
from chatlora.training.state import adapter_parameters

Computed = tuple[float, dict[str, torch.Tensor]]  # a loss and a gradient by parameter name

TOLERANCE = {"fp32": 5e-6, "bf16": 5e-2}  # relative, in norm; bf16 products of other shapes round otherwise
GRADIENT = "exp_avg"  # AdamW's name of its first moment, which is the gradient here
NOISE = 0.02  # of lora_B: at zero, as a fresh adapter has it, half of the gradient would be zero too


@dataclass(frozen=True)
class Way:
    """One way to compute the gradient of a batch. token_budget None: one conversation at a time, without a split."""

    num_processes: int  # that share the batch; 1: each computes all of it
    token_budget: int | None
    padded: bool
    checkpointing: bool

    def __str__(self) -> str:
        cut = "one at a time" if self.token_budget is None else f"{self.token_budget:,} tokens"
        layout = "padded" if self.padded else "packed"
        return (
            f"{self.num_processes} process(es), {cut}, {layout}, checkpointing {'on' if self.checkpointing else 'off'}"
        )


@dataclass(frozen=True)
class Outcome:
    """How far a way is from the reference, relative; micro_batches: of one process."""

    way: Way
    micro_batches: int
    loss: float
    gradient: float


@dataclass(frozen=True)
class Certificate:
    """tolerance: for every outcome. mean_of_means: what the usual average over micro-batches would have missed by."""

    engine: str
    precision: str
    tolerance: float
    num_examples: int
    outcomes: tuple[Outcome, ...]
    mean_of_means: float

    @property
    def holds(self) -> bool:
        return all(max(outcome.loss, outcome.gradient) <= self.tolerance for outcome in self.outcomes)


def with_exact_draws(config: Config) -> Config:
    """Without dropout, whose draws differ by micro-batch, and without clipping, which would hide a wrong scale."""
    return config.with_values("lora", dropout=0.0).with_values("optim", max_grad_norm=math.inf)


def certify(config: Config, runtime: Runtime, say: Say) -> Certificate:
    """Compute the first global batch of a configuration in every way. `config`: as `with_exact_draws` makes it."""
    config, tokenizer, _, data = setup.load_data(config, runtime, say)
    adapted, padded = setup.load_model(config, runtime, tokenizer, data, say)
    _add_noise(adapted, config.run.seed)
    loader, _ = setup.loaders(config, runtime, data, padded)
    batches = loader.batches(config.optim.global_batch_size, config.run.seed)
    plain = None if runtime.is_sharded else plainly(adapted, runtime, data.train, batches[0])
    bench = Bench(config, runtime, adapted, loader, batches)
    reference = Way(1, None, padded=True, checkpointing=config.model.gradient_checkpointing)
    wanted_loss, wanted = plain or bench.measure(reference)
    outcomes = []
    for way in ways(loader, bench.longest):
        say(f"computing: {way}")
        loss, gradient = bench.measure(way)
        count = bench.batch(way).num_micro_batches
        outcomes.append(Outcome(way, count, abs(loss / wanted_loss - 1), _distance(gradient, wanted)))
    _, averaged = bench.measure(replace(outcomes[0].way, num_processes=runtime.num_processes), mean_of_means=True)
    return Certificate(
        runtime.engine,
        runtime.precision,
        TOLERANCE[runtime.precision],
        len(bench.batch(reference).indices),
        tuple(outcomes),
        _distance(averaged, wanted),
    )


def ways(loader: Loader, longest: int) -> Iterator[Way]:
    """Every way at hand: a smaller and the configured budget, both layouts if both are right, one and all processes."""
    processes, budgets = sorted({1, loader.num_processes}), sorted({longest, loader.token_budget})
    layouts = (True,) if loader.padded else (False, True)
    return starmap(Way, product(processes, budgets, layouts, (False, True)))


def plainly(adapted: PeftModel, runtime: Runtime, examples: ExampleSet, batch: Batch) -> Computed:
    """The batch's loss and gradient in plain PyTorch, on this process alone."""
    total = 0.0
    for example in examples.fetch(batch.indices):
        ids = torch.tensor([example.input_ids], device=runtime.device)
        labels = torch.tensor(example.labels[1:], device=runtime.device)
        with torch.autocast(runtime.device.type, runtime.autocast_dtype, enabled=runtime.autocast_dtype is not None):
            logits = adapted(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum") / batch.num_targets
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    gradient = {name: each.grad.cpu() for name, each in trainable(adapted).items() if each.grad is not None}
    adapted.zero_grad()
    return total, gradient


class Bench:
    """The prepared model, and what a way makes of it."""

    def __init__(
        self, config: Config, runtime: Runtime, adapted: PeftModel, loader: Loader, batches: GlobalBatches
    ) -> None:
        self.runtime, self.adapted, self.loader, self.batches = runtime, adapted, loader, batches
        self.own_attention = adapted.get_base_model().config._attn_implementation
        # AdamW's first moment with beta_1 = 0 is the last gradient, to the bit; without a learning rate nothing moves.
        recorder = torch.optim.AdamW(trainable(adapted).values(), lr=0.0, betas=(0.0, 0.999), weight_decay=0.0)
        packed = not loader.padded
        self.model, self.optimizer = setup.prepare_for_engine(
            config, runtime, adapted, packed=packed, optimizer=recorder
        )
        self.longest = int(loader.examples.lengths[batches[0].indices].max())

    def batch(self, way: Way) -> Batch:
        """The same examples whatever the way, dealt to its processes and cut by its budget."""
        budget = self.batches.token_budget if way.token_budget is None else way.token_budget
        dealt = replace(self.batches, token_budget=budget, num_processes=way.num_processes, padded=way.padded)[0]
        if way.token_budget is not None:
            return dealt
        return replace(dealt, micro_batches=(tuple(index[None] for index in dealt.indices),))

    def measure(self, way: Way, *, mean_of_means: bool = False) -> Computed:
        """The loss of the batch and the gradient by parameter name. Collective, and moves no weight."""
        batch = self.batch(way)
        runtime, loader = self.runtime, replace(self.loader, padded=way.padded)
        self.adapted.get_base_model().set_attn_implementation(self.own_attention if way.padded else PACKED)
        _set_checkpointing(self.adapted, way.checkpointing)
        self.model.train()
        shares: Sequence[Sequence[Indices]] = batch.micro_batches
        if way.num_processes == 1:
            shares = [batch.micro_batches[0]] * runtime.num_processes
        repeated = runtime.num_processes // way.num_processes
        parts = sum(len(share) for share in shares) // repeated
        loss = runtime.zero()
        for index, micro_batch in enumerate(loader.fetch(shares)):
            with runtime.accumulating(self.model, last=index + 1 == len(shares[0])):
                own = (micro_batch["labels"] != IGNORE_INDEX).sum().clamp(min=1) * parts
                divisor = (own if mean_of_means else batch.num_targets) * repeated
                micro_loss = self.model(**micro_batch) / divisor
                runtime.backward(micro_loss)
            loss += micro_loss.detach()
        runtime.clip_gradients(self.model, math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        (total,) = runtime.all_reduce_sum(loss)
        parameters = adapter_parameters(runtime, self.model)
        states = {name: runtime.read_state(self.optimizer, each) for name, each in parameters.items()}
        return total, {name: state[GRADIENT] for name, state in states.items() if state}


def _set_checkpointing(adapted: PeftModel, on: bool) -> None:
    if on:
        adapted.activation_checkpointing_enable({"use_reentrant": False})
    else:
        adapted.get_base_model().activation_checkpointing_disable()


@torch.no_grad()
def _add_noise(adapted: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.device) * NOISE)


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The norm of the difference, relative to the other's norm, over all parameters."""
    gap = sum(float((one[name] - tensor).double().square().sum()) for name, tensor in other.items())
    return math.sqrt(gap / sum(float(tensor.double().square().sum()) for tensor in other.values()))
