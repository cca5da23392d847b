"""What happens before the generation pass and after it: from a Request to what `generate` takes, and to scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import GenerationConfig, PreTrainedTokenizerBase

from chatlora.cache import cache_root
from chatlora.config import Config
from chatlora.config_paths import absolute
from chatlora.data.evaluation_set import EvalSample, prepare_evaluation_data
from chatlora.data.ledger import summary_lines
from chatlora.distributed.memory import not_loaded, out_of_memory_told
from chatlora.distributed.runtime import Runtime
from chatlora.distributed.zero3 import layer_by_layer, refuse_stacked_experts
from chatlora.evaluation.command_line import BASE, Request
from chatlora.evaluation.console import show_samples, show_scores
from chatlora.evaluation.generation import (
    Budget,
    Model,
    Results,
    batch_budget,
    collate,
    context_length,
    cost,
    greedy_settings_for,
    group,
    only_these_settings,
)
from chatlora.evaluation.scoring import inputs_of_request, score_into, told_in
from chatlora.evaluation.sharding import collect, mark_complete, open_parts, remove_parts, shard_batches
from chatlora.model.adapter_folder import SETTINGS, as_adapter_was_trained, with_template_settings
from chatlora.model.folder import find_adapter
from chatlora.model.loading import load_adapter, load_base_model, load_tokenizer, renderer_for
from chatlora.progress import Progress, print_line
from chatlora.reading.scan import inputs_of, scan
from chatlora.rendering.renderer import Renderer
from chatlora.training.card_scores import refresh_cards


@dataclass(frozen=True)
class Generation:
    """All that one process generates with, and what it generates."""

    runtime: Runtime
    model: Model
    tokenizer: PreTrainedTokenizerBase
    samples: Sequence[EvalSample]
    own_batches: Sequence[Sequence[EvalSample]]  # empty ones where this process only keeps the others company
    settings: GenerationConfig
    budget: Budget
    metadata: dict[str, Any]  # what scores.json says beside the scores

    def batches(self) -> Iterator[dict[str, Any]]:
        """input_ids, attention_mask: [B, P], left-padded; samples and output_ids, which no model may see."""
        for batch in self.own_batches:
            yield collate(batch, self.settings.pad_token_id)

    @contextmanager
    def answering(self, name: str, part: Path) -> Iterator[Results]:
        """Within, the model is what `name` says, and what it answers goes into `part`, this process's file."""
        with ExitStack() as within:
            within.enter_context(layer_by_layer(self.model))
            within.enter_context(only_these_settings(self.model))
            within.enter_context(out_of_memory_told(does_not_fit(self.budget)))
            if name == BASE:
                within.enter_context(self.model.disable_adapter())
            progress = within.enter_context(self._progress(name))
            yield Results(part, self.tokenizer, self.settings.eos_token_id, progress)
        mark_complete(part)

    @contextmanager
    def _progress(self, name: str) -> Iterator[Callable[[Sequence[EvalSample], int], None]]:
        """Process 0 shows how far it is with its own batches."""
        longest = self.settings.max_new_tokens
        whole = sum(cost(batch, longest) for batch in self.own_batches if batch)
        if not self.runtime.is_main or not whole:
            yield lambda samples, num_tokens: None
            return
        count = sum(len(batch) for batch in self.own_batches)
        progress = Progress(f"generating, {name}", count, unit="tokens", work=whole)
        try:
            yield lambda samples, num_tokens: progress.advance(
                len(samples), amount=num_tokens, work=cost(samples, longest)
            )
        finally:
            progress.close()


class Rendered(NamedTuple):
    """The rows of a request, as the adapter or model that it names reads them. adapter: its folder."""

    request: Request
    adapter: Path | None
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    samples: list[EvalSample]
    ledger: dict[str, Any]


def rendered(request: Request) -> Rendered:
    """Raises DataError with what is wrong in the rows, ModelError where there is no tokenizer or no adapter."""
    adapter = None if request.adapter is None else find_adapter(request.adapter)
    if not request.of_run:  # a run's config says it all
        request = replace(request, config=as_trained(request.config, adapter))
    tokenizer = load_tokenizer(request.config.model, adapter)
    renderer = _renderer(request, adapter, tokenizer)
    return Rendered(request, adapter, tokenizer, renderer, *_samples(request, renderer))


def set_up(request: Request, runtime: Runtime) -> Generation:
    """The rows rendered and proved, the model and its adapter loaded, the samples dealt in batches to the processes."""
    say = print_line if runtime.is_main else _say_nothing
    request, adapter, tokenizer, renderer, samples, ledger = rendered(request)
    config = request.config
    for line in summary_lines(ledger):
        say(line)
    with out_of_memory_told(not_loaded(config.model.name_or_path, runtime)):
        model = loaded(config, adapter, runtime)
        fitting = batch_budget(model, runtime.device)
        model = runtime.for_generation(model)

    longest = config.evaluation.max_new_tokens
    fair = max(1, -(-len(samples) // runtime.num_processes))  # no process is idle for want of a batch
    tokens = int(runtime.broadcast_text(str(fitting.tokens)))  # free memory differs, and all must cut the same batches
    budget = Budget(config.evaluation.max_tokens_per_batch or tokens, min(fitting.rows, fair))
    batches = group(samples, budget, longest)
    dealt = [
        shard_batches(batches, lambda batch: cost(batch, longest), rank, runtime.num_processes)
        for rank in range(runtime.num_processes)
    ]
    own_batches = dealt[runtime.rank]
    if runtime.is_sharded:  # a forward pass takes all processes: they generate equally often
        own_batches = [*own_batches, *[[]] * (max(map(len, dealt)) - len(own_batches))]
    references = sum(len(sample.references) for sample in samples)
    _note_limit(model, max(len(sample.input_ids) for sample in samples) + longest, say)
    say(f"{len(samples):,} prompts with {references:,} references in {len(batches):,} batches; {runtime.precision}")
    settings = greedy_settings_for(model, tokenizer, renderer.stop_ids, longest)
    stop_ids = settings.eos_token_id
    metadata = {
        # Absolute, as a run's ledger: seen from elsewhere a relative path might be a hub name.
        "data": [absolute("data.test", source.path, only_existing=True) for source in request.sources],
        "set_aside": sum(len(source["set_aside"]) for source in ledger["sources"]),
        "decoding": {"greedy": True, "max_new_tokens": longest, "stop_ids": stop_ids, "precision": runtime.precision},
        "rendering": renderer.fingerprint,
        "inputs": inputs_of_request(replace(request, adapter=adapter)),
    }
    return Generation(runtime, model, tokenizer, samples, own_batches, settings, budget, metadata)


def as_trained(config: Config, adapter: Path | None) -> Config:
    """What was not given is as training left it beside the adapter, or in a merged model's folder.

    That is what the template was told, and the base's revision. Of any other model nothing changes.
    """
    model = config.model
    given = {name: getattr(model, name) for name in model.model_fields_set}
    merged = Path(model.name_or_path)
    trained = with_template_settings(model, merged) if adapter is None else as_adapter_was_trained(model, adapter)
    return config.model_copy(update={"model": trained.model_copy(update=given)})


def loaded(config: Config, adapter: Path | None, runtime: Runtime) -> Model:
    """The base model on the device, with the adapter on it where there is one, in evaluation mode."""
    model: Model = runtime.move_to_device(load_base_model(config.model, dtype=runtime.dtype)).eval()
    if adapter is not None:
        model = load_adapter(model, adapter)
        refuse_stacked_experts(model)
    return model


def _note_limit(model: Model, needed: int, say: Callable[[str], None]) -> None:
    limit = context_length(model)
    if limit is not None and needed > limit:
        say(
            f"the longest prompt and its answer may take {needed:,} tokens, but the model was made for {limit:,}: "
            "lower evaluation.max_new_tokens or evaluation.max_prompt_length"
        )


def _renderer(request: Request, adapter: Path | None, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    # A run's config, or the file that training left, says what the template was told, whatever the test rows carry.
    is_told = request.of_run or (Path(adapter or request.config.model.name_or_path) / SETTINGS).is_file()
    inputs, cache = inputs_of(request.sources, request.split), cache_root() / "data"
    any_reasoning = is_told or scan(inputs, cache, request.config.data.on_bad_row).any_reasoning
    return renderer_for(tokenizer, request.config.model, request.config.data, any_reasoning=any_reasoning)


def _samples(request: Request, renderer: Renderer) -> tuple[list[EvalSample], dict[str, Any]]:
    config = request.config
    samples, ledger = prepare_evaluation_data(
        request.sources,
        renderer,
        split=request.split,
        max_prompt_length=config.evaluation.max_prompt_length or config.data.max_length,
        max_new_tokens=config.evaluation.max_new_tokens,
        over_length=config.data.over_length,
        supervise=config.data.supervise,
        system=config.data.system,
        on_bad_row=config.data.on_bad_row,
    )
    return samples, ledger


@contextmanager
def open_folders(folders: Mapping[str, Path], runtime: Runtime) -> Iterator[dict[str, Path]]:
    """The files that this process writes to, by what is evaluated. status.json in each folder tells how it stands."""
    with ExitStack() as within:
        for folder in folders.values() if runtime.is_main else ():
            within.enter_context(told_in(folder))
        yield open_parts(folders, runtime.rank, runtime.num_processes, runtime.accelerator.wait_for_everyone)


def score_and_show(generation: Generation, request: Request) -> None:
    """All processes' parts merged, scored, written, and shown side by side. For process 0."""
    wanted = [(sample.id, sample.turn) for sample in generation.samples]
    predictions, scores = {}, {}
    for name, folder in request.folders.items():
        merged = collect(folder, generation.runtime.num_processes, wanted)
        metadata = request.evaluated(name) | generation.metadata
        predictions[name], scores[name] = score_into(folder, merged, request.config.evaluation.style, metadata)
        remove_parts(folder)
    console = Console()
    show_samples(console, predictions)
    show_scores(console, scores)
    for name, folder in request.folders.items():
        console.print(f"{name}: written to {folder}", highlight=False, markup=False)
    for line in () if request.run_dir is None else _told_to_cards(request.run_dir):
        console.print(line, highlight=False, markup=False)


def _told_to_cards(run_dir: Path) -> list[str]:
    """The scores into the cards of the run's adapters. What came of it: no scores are lost for want of a card."""
    try:
        return [f"the scores are in the card {card}" for card in refresh_cards(run_dir)]
    except (OSError, UnicodeDecodeError) as error:
        return [f"the scores are not in the run's cards, which cannot be written: {error}"]


def does_not_fit(budget: Budget) -> str:
    """What to do where memory runs out while it generates."""
    return (
        f"a batch of up to {budget.rows} prompts and {budget.tokens:,} tokens does not fit; lower "
        f"evaluation.max_tokens_per_batch (now {budget.tokens}) or evaluation.max_new_tokens"
    )


def _say_nothing(line: str) -> None:
    pass
