"""Test rows -> samples: one prompt each, with every reference answer that the rows give for it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from chatlora.config import OnBadRow, OverLength, Source, Supervise
from chatlora.data.held_out import conversations_to_evaluate
from chatlora.data.ledger import SourceAccount, ledger_of, refuse_lost_sources
from chatlora.errors import DataError, SetAside
from chatlora.progress import track
from chatlora.reading.conversation import Conversation
from chatlora.reading.noted import Noted, Unread
from chatlora.reading.parts import Chosen
from chatlora.reading.sources import files_of
from chatlora.rendering.examples import PROMPT_TOO_LONG, EvalExample
from chatlora.rendering.remedies import lifted_by
from chatlora.rendering.renderer import Renderer

CUT_REFERENCE = "a reference longer than max_new_tokens"


@dataclass(frozen=True, slots=True)
class EvalSample:
    """One prompt that the model answers, and the ids of its reference answers, each with its stop token.

    id: `place#turn` of the row that brought it first, the same in every run; ` (2)` behind it where that row was read
    before, as from a file that is named twice. turn: which assistant turn, from 0.
    """

    id: str
    place: str
    turn: int
    input_ids: list[int]
    references: list[list[int]]


def prepare_evaluation_data(
    sources: Sequence[Source],
    renderer: Renderer,
    *,
    split: str = "test",
    max_prompt_length: int | None,
    max_new_tokens: int,
    over_length: OverLength = "fit",
    supervise: Supervise = "all",
    system: str | None = None,
    on_bad_row: OnBadRow = "error",
) -> tuple[list[EvalSample], dict[str, Any]]:
    """All samples of the sources in file order, and the ledger of their rows.

    Rows of a single turn with equal prompts become one sample with all their distinct references (one prompt has
    several in e2e). In the ledger `turns` are those of the rows, `targets` the tokens of their references, `tokens`
    both together. Raises DataError with all mistakes in the rows, or where too few of them can be rendered.
    """
    problems: list[str] = []
    accounts = [_begun(source, split) for source in sources]
    unread: list[list[Unread] | None] = [None if on_bad_row == "error" else [] for _ in sources]
    noted = [Noted() for _ in sources]
    samples: list[EvalSample] = []
    single_turns: dict[tuple[int, ...], int] = {}  # the ids of a prompt -> its sample's position
    taken: set[str] = set()
    for account, conversation in _conversations(sources, split, accounts, system, unread, noted, problems):
        try:
            rendered = renderer.render_for_evaluation(
                conversation,
                max_prompt_length=max_prompt_length,
                max_new_tokens=max_new_tokens,
                over_length=over_length,
                supervise=supervise,
            )
        except SetAside as reason:
            lifted = lifted_by(renderer, conversation, reason, supervise)
            account.put_aside(conversation.place, reason.reason, reason.detail, lifted)
            continue
        except DataError as error:  # over_length: error
            problems += error.problems
            continue
        if not rendered.examples:
            account.put_aside(conversation.place, PROMPT_TOO_LONG, rendered.set_aside[0][1])
            continue
        _account(account, conversation, rendered.examples)
        account.note_altered(rendered.altered)
        account.note_remarks(conversation.place, rendered.remarks)
        for turn, told in rendered.set_aside:
            account.note_cut(conversation.place, PROMPT_TOO_LONG, f"turn {turn}: {told}")
        if rendered.cut_references:
            account.note_cut(conversation.place, CUT_REFERENCE, f"{rendered.cut_references} cut at {max_new_tokens}")
        _add(samples, single_turns, taken, conversation, rendered.examples)
    if problems:
        raise DataError(*problems)
    for account, rows, of_source in zip(accounts, unread, noted, strict=True):
        account.note_reading(rows or [], of_source)
    ledger = ledger_of(accounts)
    refuse_lost_sources([asdict(account) for account in accounts])
    assert len(taken) == len(samples)  # processes' parts are put together by id
    return samples, ledger


def _conversations(
    sources: Sequence[Source],
    split: str,
    accounts: Sequence[SourceAccount],
    system: str | None,
    unread: Sequence[list[Unread] | None],
    noted: Sequence[Noted],
    problems: list[str],
) -> Iterator[tuple[SourceAccount, Conversation]]:
    for source, account, bad, told in zip(sources, accounts, unread, noted, strict=True):
        rows = conversations_to_evaluate(source, split, system, bad, told)
        try:
            for conversation in track(rows, f"rendering {source.path}", None):
                account.rows_read += 1
                yield account, conversation
        except DataError as error:
            problems += error.problems


def _begun(source: Source, split: str) -> SourceAccount:
    chosen = files_of(source, split) or Chosen([])
    return SourceAccount(source.path, part=chosen.part, left=dict(chosen.left))


def _account(account: SourceAccount, conversation: Conversation, examples: Sequence[EvalExample]) -> None:
    references = sum(len(example.output_ids) for example in examples)
    account.rows_used += 1
    account.turns += len(examples)
    account.targets += references
    account.tokens += references + sum(len(example.input_ids) for example in examples)


def _add(
    samples: list[EvalSample],
    single_turns: dict[tuple[int, ...], int],
    taken: set[str],
    conversation: Conversation,
    examples: Sequence[EvalExample],
) -> None:
    place = conversation.place or ""
    is_single = sum(message.role == "assistant" for message in conversation.messages) == 1
    for example in examples:
        prompt = tuple(example.input_ids)
        known = single_turns.get(prompt) if is_single else None
        if known is None:
            if is_single:
                single_turns[prompt] = len(samples)
            sample_id = _free_id(f"{place}#{example.turn}", taken)
            samples.append(EvalSample(sample_id, place, example.turn, example.input_ids, [example.output_ids]))
        elif example.output_ids not in samples[known].references:
            references = [*samples[known].references, example.output_ids]
            samples[known] = replace(samples[known], references=references)


def _free_id(wanted: str, taken: set[str]) -> str:
    """`wanted`, numbered where it is taken; the answer is taken from then on."""
    free, number = wanted, 2
    while free in taken:
        free, number = f"{wanted} ({number})", number + 1
    taken.add(free)
    return free
