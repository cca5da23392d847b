"""All rows rendered once -> memory-mapped examples, training and validation sets, and the ledger.

Rendering takes minutes for a large file, so its outcome is kept in the cache under a name that says what it was made
from: the contents of the sources, the renderer, the settings, and this package's own code. The split into training
and validation rows and the repeats are made when it is opened, and cost nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from chatlora.cache import cache_limit, keep_within
from chatlora.config import BestBy, DataConfig, OverLength, Source
from chatlora.config_rows import UNNAMED
from chatlora.data.alike import AlikeRows, alike_in, digest_of
from chatlora.data.drawing import drawn_rows
from chatlora.data.evaluation_set import EvalSample, prepare_evaluation_data
from chatlora.data.held_out import held_out_rows
from chatlora.data.ledger import CUT, LEAKS, REPLIES_LOST, SourceAccount, ledger_of, refuse_lost_sources, summary_lines
from chatlora.data.store import RECORD, ExampleStore, Stored, built_once, write_examples
from chatlora.data.workers import Effort, Outcome, Work, outcomes
from chatlora.errors import DataError
from chatlora.progress import track
from chatlora.reading.conversation import Conversation
from chatlora.reading.noted import Noted, Unread
from chatlora.reading.scan import Input, code_digest, digest, inputs_of, scan
from chatlora.rendering.examples import Example
from chatlora.rendering.renderer import Renderer

__all__ = [
    "EvalSample",
    "ExampleSet",
    "PreparedData",
    "prepare_evaluation_data",
    "prepare_training_data",
    "summary_lines",
]

Say = Callable[[str], None]


@dataclass(frozen=True)
class ExampleSet:
    """Examples `indices` of a store; with `repeat`, some of them several times. N: how many.

    indices: int64 [N], positions in the store.
    """

    store: ExampleStore
    indices: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [N]."""
        return np.asarray(self.store.lengths[self.indices])

    @cached_property
    def num_targets(self) -> np.ndarray:
        """Targets of each example, int32 [N]."""
        return np.asarray(self.store.num_targets[self.indices])

    @property
    def num_rows(self) -> int:
        return int((self.store.turns[self.indices] > 0).sum())

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        return self.store.fetch(self.indices[np.asarray(indices, np.int64)])

    def places(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Where the rows of these examples stand (`file:line`)."""
        return self.store.places(self.indices[np.asarray(indices, np.int64)])

    def places_of_rows(self, source: int) -> list[str]:
        """Where the rows of one source stand, each once."""
        first_of_row = self.store.turns[self.indices] > 0
        return self.store.places(self.indices[first_of_row & (self.store.sources[self.indices] == source)])


@dataclass(frozen=True)
class PreparedData:
    """What is trained on. validation: the sets by name. held_out: by split, the training rows drawn for it.

    `seconds` of work, over all processes, went into the rendering when it was made, and `proof_seconds` of them into
    its proofs.
    """

    train: ExampleSet
    validation: Mapping[str, ExampleSet]
    held_out: Mapping[str, ExampleSet]
    inputs: Sequence[Input] = field(repr=False)  # of data.train
    ledger: dict[str, Any]
    fingerprint: str
    seconds: float
    proof_seconds: float
    any_reasoning: bool

    @property
    def largest_id(self) -> int:
        """The largest token id in any example."""
        return max(examples.store.largest_id for examples in (self.train, *self.validation.values()))

    def lines_on_sets(self, best_by: BestBy) -> list[str]:
        """The rows that are not trained on, for people: those held out, and the sets that have names."""
        drawn = {split: rows.num_rows for split, rows in self.held_out.items() if rows}
        lines = [f"{split}: {number:,} of the rows of data.train are held out" for split, number in drawn.items()]
        named = {name: rows.num_rows for name, rows in self.validation.items() if name != UNNAMED}
        lines += [f"validation set {name}: {number:,} rows" for name, number in named.items()]
        if len(named) > 1:
            decides = {"mean": "the mean over all their targets", "first": f"the loss of {next(iter(named))}"}
            lines.append(f"what is best goes by {decides[best_by]} (checkpoint.best_by)")
        return lines

    def held_out_rows(self) -> dict[str, list[dict[str, Any]]]:
        """The content of held_out.json: by split, the rows of each source."""
        return {
            split: [
                held_out_rows(source, places).model_dump(mode="json")
                for number, source in enumerate(self.inputs)
                if (places := examples.places_of_rows(number))
            ]
            for split, examples in self.held_out.items()
        }


def prepare_training_data(
    data: DataConfig,
    seed: int,
    make_renderer: Callable[[bool], Renderer],
    *,
    cache: Path,
    say: Say,
    refuse_lost: bool = True,
) -> PreparedData:
    """Render the rows of `data.train` and `data.validation`, or find them rendered under `cache`.

    `make_renderer(any_reasoning)` is called once every row has been parsed. Several processes may call this at once:
    one of them works, the others wait for its files. Raises DataError with all mistakes in the rows, or, unless
    `refuse_lost` is false, where too few of them can be rendered.
    """
    inputs = inputs_of(data.train, "train")
    separate = {name: inputs_of(sources, "validation") for name, sources in data.validation_sets.items()}
    groups = [inputs, *separate.values()]
    found = scan([each for group in groups for each in group], cache / "data", data.on_bad_row)
    renderer = make_renderer(found.any_reasoning)

    numbers = iter(found.rows)
    stores = [_rendered(group, data, renderer, cache, sum(islice(numbers, len(group))), say) for group in groups]
    keep_within(cache_limit(), cache / "data", RECORD, say)
    if refuse_lost:
        refuse_lost_sources([source for store in stores for source in store.record["sources"]])

    by_name = dict(zip(["", *separate], stores, strict=True))
    rows = stores[0].likenesses()
    drawn = drawn_rows(rows, data.shares, seed, say)
    own = {name: store for name, store in by_name.items() if name}
    alike = alike_in(stores[0], rows, drawn, own, data, cache / "data", say)
    held_out = {split: ExampleSet(stores[0], stores[0].examples_of(mine)) for split, mine in drawn.items()}
    validation = {name: ExampleSet(store, np.arange(len(store))) for name, store in own.items()}
    if held_out.get("validation"):
        validation[UNNAMED] = held_out["validation"]

    held = np.any([np.zeros(len(rows), bool), *drawn.values()], axis=0)
    trained = stores[0].examples_of(~held & ~alike.left_out)
    accounts = _accounts(stores[0], inputs, held, alike)
    if refuse_lost:
        refuse_lost_sources([asdict(account) for account in accounts])
    for store, group in zip(stores[1:], groups[1:], strict=True):
        accounts += _accounts(store, group, np.ones(int((store.turns > 0).sum()), bool))
    return PreparedData(
        train=ExampleSet(stores[0], _repeated(stores[0], trained, data.train)),
        validation=validation,
        held_out=held_out,
        inputs=inputs,
        ledger=ledger_of(accounts) | {"alike": alike.told},
        fingerprint=digest([[by_name[name].record["sha256"] for name in sorted(by_name)], digest_of(trained)]),
        seconds=sum(store.record["seconds"] for store in stores),
        proof_seconds=sum(store.record["proof_seconds"] for store in stores),
        any_reasoning=found.any_reasoning,
    )


# ---- rendering


def _rendered(
    inputs: Sequence[Input], data: DataConfig, renderer: Renderer, cache: Path, total: int, say: Say
) -> ExampleStore:
    settings = [data.max_length, data.over_length, data.supervise, data.system, data.on_bad_row]
    key = digest([code_digest(), renderer.fingerprint, settings, [each.identity for each in inputs]])

    def build(folder: Path) -> dict[str, Any]:
        accounts = [SourceAccount(each.source.path) for each in inputs]
        work, effort = Work(renderer, data.max_length, data.over_length, data.supervise, data.system), Effort()
        unread: list[list[Unread] | None] = [None if data.on_bad_row == "error" else [] for _ in inputs]
        noted = [Noted() for _ in inputs]
        numbered = (
            (number, row)
            for number, each in enumerate(inputs)
            for row in each.conversations(data.system, unread[number], noted[number])
        )
        found = track(outcomes(numbered, work, total, effort, say), "rendering", total)
        write_examples(folder, _entered(found, accounts, data.over_length))
        for account, rows, told in zip(accounts, unread, noted, strict=True):
            account.note_reading(rows or [], told)
        return {"sources": [asdict(account) for account in accounts], **asdict(effort)}

    return built_once(cache / "data" / key, build)


def _entered(
    found: Iterable[tuple[int, Conversation, Outcome]], accounts: Sequence[SourceAccount], over_length: OverLength
) -> Iterator[Stored]:
    """The examples to store; what became of each row is entered in its source's account."""
    problems: list[str] = []
    for source, conversation, outcome in found:
        account, place, rendered = accounts[source], conversation.place or "", outcome.rendered
        account.rows_read += 1
        problems += outcome.problems
        if outcome.set_aside is not None:
            account.put_aside(place, *outcome.set_aside)
        account.too_long += outcome.too_long
        if rendered is None:
            account.replies += len(outcome.too_long)
            continue
        replies = rendered.lost_turns + rendered.turns
        account.replies += replies
        if rendered.lost_targets:
            lost = f"{rendered.lost_turns} of {replies} turns, {rendered.lost_targets} targets"
            account.note_cut(place, CUT if over_length == "cut" else REPLIES_LOST, lost)
        account.note_altered(rendered.altered)
        account.note_remarks(place, rendered.remarks)
        for number, example in enumerate(rendered.examples):
            first = number == 0
            yield Stored(example, place, source, rendered.turns if first else 0, outcome.likeness if first else None)
    if problems:
        raise DataError(*problems)


# ---- what is trained on, what is told


def _repeated(store: ExampleStore, used: np.ndarray, sources: Sequence[Source]) -> np.ndarray:
    """int64: the positions of the used examples, those of each source as often as its `repeat` says."""
    parts = [np.tile(used[store.sources[used] == number], source.repeat) for number, source in enumerate(sources)]
    return np.concatenate(parts)


def _accounts(
    store: ExampleStore, inputs: Sequence[Input], held_out: np.ndarray, alike: AlikeRows | None = None
) -> list[SourceAccount]:
    """held_out: bool, of each row. Those that leak are set aside behind the others."""
    told = zip(store.record["sources"], inputs, strict=True)
    accounts = [SourceAccount(**source | {"part": each.part, "left": dict(each.left)}) for source, each in told]
    left_out = np.zeros_like(held_out) if alike is None else alike.left_out
    source_of = store.sources[store.turns > 0]
    for row in map(int, np.flatnonzero(left_out)):
        assert alike is not None
        accounts[source_of[row]].put_aside(*store.row_places([row]), LEAKS, alike.into[row])
    for number, account in enumerate(accounts):
        mine = source_of == number
        account.rows_held_out = int((mine & held_out).sum())
        account.rows_used = int((mine & ~held_out & ~left_out).sum())
        counted = store.examples_of(mine & ~held_out & ~left_out if account.rows_used else mine & ~left_out)
        account.turns = int(store.turns[counted].sum())
        account.targets = int(store.num_targets[counted].sum(dtype=np.int64))
        account.tokens = int(store.lengths[counted].sum(dtype=np.int64))
    return accounts
