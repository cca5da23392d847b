"""All rows rendered once -> memory-mapped examples, training and validation sets, and the ledger.

Rendering takes minutes for a large file, so its outcome is kept in the cache under a name that says what it was made
from: the contents of the sources, the renderer, the settings, and this package's own code. The split into training
and validation rows and the repeats are made when it is opened, and cost nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chatlora.config import DataConfig, OverLength, Source
from chatlora.data.evaluation_set import EvalSample, prepare_evaluation_data
from chatlora.data.ledger import CUT, REPLIES_LOST, SourceAccount, ledger_of, refuse_lost_sources, summary_lines
from chatlora.data.store import ExampleStore, Stored, built_once, write_examples
from chatlora.data.workers import Effort, Outcome, Work, num_workers, outcomes
from chatlora.errors import DataError
from chatlora.progress import track
from chatlora.reading.conversation import Conversation
from chatlora.reading.scan import Input, code_digest, digest, inputs_of, scan
from chatlora.reading.sources import Unread
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

MIN_ROWS_TO_SPLIT = 50  # below, no share of the rows is held out

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

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        return self.store.fetch(self.indices[np.asarray(indices, np.int64)])

    def places(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Where the rows of these examples stand (`file:line`)."""
        return self.store.places(self.indices[np.asarray(indices, np.int64)])


@dataclass(frozen=True)
class PreparedData:
    """What is trained on. `seconds` of work, over all processes, went into the rendering when it was made, and
    `proof_seconds` of them into its proofs."""

    train: ExampleSet
    validation: ExampleSet | None
    ledger: dict[str, Any]
    fingerprint: str
    seconds: float
    proof_seconds: float
    any_reasoning: bool

    @property
    def largest_id(self) -> int:
        """The largest token id in any example."""
        sets = (self.train, *([] if self.validation is None else [self.validation]))
        return max(examples.store.largest_id for examples in sets)


def prepare_training_data(
    data: DataConfig, seed: int, make_renderer: Callable[[bool], Renderer], *, cache: Path, say: Say
) -> PreparedData:
    """Render the rows of `data.train` and `data.validation`, or find them rendered under `cache`.

    `make_renderer(any_reasoning)` is called once every row has been parsed. Several processes may call this at once:
    one of them works, the others wait for its files. Raises DataError with all mistakes in the rows, or where too few
    of them can be rendered.
    """
    share = data.validation if isinstance(data.validation, float) else 0.0
    inputs = inputs_of(data.train, "train")
    separate = inputs_of(data.validation, "validation") if not isinstance(data.validation, float) else []
    found = scan([*inputs, *separate], cache / "data", data.on_bad_row)
    renderer = make_renderer(found.any_reasoning)

    stores = [_rendered(inputs, data, renderer, cache, sum(found.rows[: len(inputs)]), say)]
    if separate:
        stores.append(_rendered(separate, data, renderer, cache, sum(found.rows[len(inputs) :]), say))
    refuse_lost_sources([source for store in stores for source in store.record["sources"]])

    held_out = _held_out_rows(stores[0], share, seed, say)
    train = ExampleSet(stores[0], _repeated(stores[0], ~held_out, data.train))
    validation = ExampleSet(stores[-1], np.flatnonzero(held_out)) if held_out.any() else None
    accounts = _accounts(stores[0], held_out)
    if separate:
        everything = np.ones(len(stores[1]), bool)
        validation = ExampleSet(stores[1], np.flatnonzero(everything))
        accounts += _accounts(stores[1], everything)
    return PreparedData(
        train=train,
        validation=validation,
        ledger=ledger_of(accounts),
        fingerprint=digest([store.record["sha256"] for store in stores]),
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
        work, effort = Work(renderer, data.max_length, data.over_length, data.supervise), Effort()
        unread: list[list[Unread] | None] = [None if data.on_bad_row == "error" else [] for _ in inputs]
        numbered = (
            (number, row)
            for number, each in enumerate(inputs)
            for row in each.conversations(data.system, unread[number])
        )
        found = track(outcomes(numbered, work, num_workers(total), effort, say), "rendering", total)
        write_examples(folder, _entered(found, accounts, data.over_length))
        for account, rows in zip(accounts, unread, strict=True):
            account.put_unread_aside(rows or [])
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
        for number, example in enumerate(rendered.examples):
            yield Stored(example, place, source, rendered.turns if number == 0 else 0)
    if problems:
        raise DataError(*problems)


# ---- what is held out, what is trained on, what is told


def _held_out_rows(store: ExampleStore, share: float, seed: int, say: Say) -> np.ndarray:
    """bool [N]: the examples of the rows that the seed draws for validation; all of a row go the same way."""
    first_of_row = store.turns > 0
    num_rows = int(first_of_row.sum())
    drawn = np.zeros(num_rows, bool)
    if share > 0 and num_rows < MIN_ROWS_TO_SPLIT:
        say(f"data.validation: no rows are held out, there are only {num_rows} (fewer than {MIN_ROWS_TO_SPLIT})")
    elif share > 0:
        number = min(max(1, round(share * num_rows)), num_rows - 1)
        drawn[np.random.default_rng(seed).permutation(num_rows)[:number]] = True
    return np.asarray(drawn[np.cumsum(first_of_row) - 1])


def _repeated(store: ExampleStore, used: np.ndarray, sources: Sequence[Source]) -> np.ndarray:
    """int64: the positions of the used examples, those of each source as often as its `repeat` says."""
    parts = [
        np.tile(np.flatnonzero(used & (store.sources == number)), source.repeat)
        for number, source in enumerate(sources)
    ]
    return np.concatenate(parts)


def _accounts(store: ExampleStore, held_out: np.ndarray) -> list[SourceAccount]:
    accounts = [SourceAccount(**source) for source in store.record["sources"]]
    first_of_row = store.turns > 0
    for number, account in enumerate(accounts):
        mine = store.sources == number
        account.rows_held_out = int((mine & held_out & first_of_row).sum())
        account.rows_used = int((mine & ~held_out & first_of_row).sum())
        counted = mine & ~held_out if account.rows_used else mine
        account.turns = int(store.turns[counted].sum())
        account.targets = int(store.num_targets[counted].sum(dtype=np.int64))
        account.tokens = int(store.lengths[counted].sum(dtype=np.int64))
    return accounts
