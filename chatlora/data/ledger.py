"""The account of every row: read = trained on + held out + set aside, each of the last with its place and reason."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

from chatlora.data.alike import alike_lines
from chatlora.data.leaks import EXAMPLES
from chatlora.errors import DataError
from chatlora.reading.hermes import HERMES
from chatlora.reading.noted import UNREAD, Noted, Unread
from chatlora.reading.own_reader import LEFT_OUT
from chatlora.rendering.control_text import PRIVATE, READ_AS_CONTROL
from chatlora.rendering.examples import NO_REPLY_FITS, NO_TARGET_LEFT, PROMPT_TOO_LONG, TOO_LONG
from chatlora.rendering.limits import TOO_MUCH
from chatlora.rendering.message_parts import DROPS
from chatlora.rendering.proof import CANNOT_SPELL, FAILED
from chatlora.rendering.remarks import EMPTY, GARBLED, IS_CONTROL, NAMELESS, TEXT_SPELLS_CONTROL, Remark
from chatlora.rendering.row_kwargs import OTHER_STOP, SPELLS_CONTROL, UNKNOWN
from chatlora.rendering.template import RAISES
from chatlora.rendering.thoughts import A_THOUGHT
from chatlora.rendering.turns import COMES_FIRST, NO_STOP, NO_TARGET, NOT_CONTINUED, RAISES_FIRST, RUNS_ON, SPELLS_STOP

MOST_SET_ASIDE = 0.5  # of a source's rows; beyond, the model and the data do not fit each other
MOST_NOT_USED = 12  # names that are told; ledger.json has them all
LEAKS = "the row leaks into held-out rows"
MOST_TOO_LONG = 0.05  # of all replies; beyond, it is a warning
REPLIES_LOST = "replies beyond max_length are lost"
CUT = "cut at max_length"
LIFTED_BY = "lifted_by"
BY_SETTING = (A_THOUGHT, HERMES)  # how kinds of change begin that are not the chat template's
OTHER_TEMPLATE = "set model.chat_template to a Jinja file that renders such rows, or model.chat_template_kwargs"
REMEDIES = {  # by how a reason begins
    LEFT_OUT: "look at the function that `reader` names",
    **dict.fromkeys((UNKNOWN, SPELLS_CONTROL, OTHER_STOP), "ignore: [chat_template_kwargs] leaves them unread"),
    UNREAD: "mend the rows; data.on_bad_row: error tells all that is wrong with them",
    LEAKS: "look at what the files share; data.on_leak: warn trains on such rows all the same",
    TOO_LONG: "raise data.max_length, or set data.over_length to fit or cut",
    NO_REPLY_FITS: "raise data.max_length, or set data.over_length to cut",
    NO_TARGET_LEFT: "raise data.max_length",
    PROMPT_TOO_LONG: "raise evaluation.max_prompt_length",
    DROPS: OTHER_TEMPLATE,
    RAISES: OTHER_TEMPLATE,
    RAISES_FIRST: f"begin with a user message, or {OTHER_TEMPLATE}",
    NOT_CONTINUED: OTHER_TEMPLATE,
    NO_STOP: OTHER_TEMPLATE,
    TOO_MUCH: OTHER_TEMPLATE,
    PRIVATE: "write the rows without such characters (U+F0000 and above)",
    CANNOT_SPELL: "write the rows without such characters, or take a model that knows them",
    HERMES: "mend the rows, or take what stands there as servers do: data.control_text: token",
    READ_AS_CONTROL: "write the rows without such words",
    FAILED: "the mistake is chatlora's, not the data's: please report one of the rows, the model and the chat template",
    NO_TARGET: "look at the roles, at `loss` in the rows, and at data.supervise",
    GARBLED: "decode the file as what it was written in, or mend the rows",
    TEXT_SPELLS_CONTROL: "data.control_text: token takes such words as servers do",
    IS_CONTROL: "data.control_text: text takes such words as text",
    NAMELESS: "write it into the text where it matters, or take a chat template that shows it",
    EMPTY: "a model learns to say nothing; remove such rows where that is not meant",
    RUNS_ON: 'take "loss": true from such messages, or set model.chat_template to one that ends each of them',
    SPELLS_STOP: "mend the rows, or take control words as text: data.control_text: text",
    COMES_FIRST: 'begin with a user message, or take "loss": true from the first one',
}


@dataclass(slots=True)
class SourceAccount:
    """What became of the rows of one source. `turns`, `targets` and `tokens` are those of the rows that were used, or,
    where a whole source is held out, of the rows held out; a row's `repeat` is not counted.

    set_aside, cut: `{place, reason}`, `detail` where something more is known of the row, and `lifted_by` where a chat
    template of the package was found to render it. altered: how many turns were changed, by kind: by the template
    without losing anything, or as a setting says. remarks: by kind, how many turns are worth a word though they are
    trained as they stand, and the first rows that have such. replies: of all rows but those set aside for something
    else than their length; too_long: the `max_length` that each of them takes which is lost or cut, None where nobody
    measured it. not_used: column or key of a message -> in how many rows it holds something that nothing reads. part,
    left: which part of the source was read, where it has several, and those that were not, with how many files each
    (0: of the hub).
    """

    path: str
    rows_read: int = 0
    rows_used: int = 0
    rows_held_out: int = 0
    turns: int = 0
    targets: int = 0
    tokens: int = 0
    set_aside: list[dict[str, str]] = field(default_factory=list)
    cut: list[dict[str, str]] = field(default_factory=list)
    altered: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    replies: int = 0
    too_long: list[int | None] = field(default_factory=list)
    not_used: dict[str, int] = field(default_factory=dict)
    part: str | None = None
    left: dict[str, int] = field(default_factory=dict)

    def put_aside(self, place: str | None, reason: str, detail: str, lifted_by: str = "") -> None:
        self.set_aside.append(entry(place, reason, detail) | ({LIFTED_BY: lifted_by} if lifted_by else {}))

    def note_reading(self, unread: Sequence[Unread], noted: Noted) -> None:
        """What came of reading the rows beside conversations; those that gave none stand before the others."""
        without = [*unread, *noted.left_out]
        self.rows_read += len(without)
        self.set_aside[:0] = [entry(row.place, row.reason, row.problem) for row in without]
        self.not_used = dict(sorted(noted.not_used.items(), key=lambda item: (-item[1], item[0])))

    def note_altered(self, altered: Mapping[str, int]) -> None:
        for kind, turns in altered.items():
            self.altered[kind] = self.altered.get(kind, 0) + turns

    def note_remarks(self, place: str | None, remarks: Iterable[Remark]) -> None:
        for kind, detail in remarks:
            found = self.remarks.setdefault(kind, {"turns": 0, "examples": []})
            found["turns"] += 1
            if len(found["examples"]) < EXAMPLES and place not in (one["place"] for one in found["examples"]):
                found["examples"].append({"place": place or ""} | ({"detail": detail} if detail else {}))

    def note_cut(self, place: str | None, reason: str, detail: str) -> None:
        self.cut.append(entry(place, reason, detail))


def entry(place: str | None, reason: str, detail: str = "") -> dict[str, str]:
    return {"place": place or "", "reason": reason, **({"detail": detail} if detail else {})}


def ledger_of(accounts: Iterable[SourceAccount]) -> dict[str, Any]:
    """The content of ledger.json: each source, and the replies that do not fit. Asserts that no row is missing."""
    accounts = list(accounts)
    sources = [asdict(account) for account in accounts]
    for source in sources:
        accounted = source["rows_used"] + source["rows_held_out"] + len(source["set_aside"])
        assert source["rows_read"] == accounted, (
            f"{source['path']}: {source['rows_read']} rows, {accounted} accounted for"
        )
        source |= _fit(source.pop("replies"), source.pop("too_long"))
    replies = sum(account.replies for account in accounts)
    return {"sources": sources, **_fit(replies, [length for account in accounts for length in account.too_long])}


def _fit(replies: int, too_long: Sequence[int | None]) -> dict[str, int | None]:
    """How many of the replies do not fit, and the least `max_length` under which 99 % do.

    None where they do as it is, and where more than 1 % are too long to be measured.
    """
    longest_first = sorted((inf if length is None else length for length in too_long), reverse=True)
    may_be_lost = replies // 100
    enough = longest_first[may_be_lost] if len(longest_first) > may_be_lost else inf
    return {
        "replies": replies,
        "replies_too_long": len(too_long),
        "max_length_for_99_percent": None if enough == inf else int(enough),
    }


def refuse_lost_sources(sources: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError where nothing, or less than half, of a source can be used: reasons, counts, what to change."""
    problems = []
    for source in sources:
        lost, read = len(source["set_aside"]), source["rows_read"]
        meant = sum(one["reason"] == LEFT_OUT for one in source["set_aside"])
        if lost - meant <= MOST_SET_ASIDE * (read - meant) and lost < read:
            continue
        which = f"all {read:,}" if lost == read else f"{lost:,} of {read:,}"
        enough = _fit(source["replies"], source["too_long"])["max_length_for_99_percent"]
        told = counted(source["set_aside"])
        told += [f"max_length {enough:,} keeps 99 % of the replies"] if enough else []
        problems.append(f"{source['path']}: {which} rows were set aside: {'; '.join(told)}")
    if problems:
        raise DataError(*problems)


def _remedy(reason: str) -> str:
    """Of the beginnings that fit it, the longest knows best; empty where none does."""
    start = max((start for start in REMEDIES if reason.startswith(start)), key=len, default=None)
    return "" if start is None else f"; {REMEDIES[start]}"


def summary_lines(ledger: Mapping[str, Any]) -> list[str]:
    """A few lines a source, for people: rows, turns, targets, tokens; what was set aside and lost, by reason. And one
    on the replies of all sources that do not fit."""
    lines = []
    for source in ledger["sources"]:
        rows = [f"{source['rows_read']:,} rows"]
        rows += [f"{source['rows_held_out']:,} held out"] if source["rows_held_out"] else []
        rows += [f"{len(source['set_aside']):,} set aside"] if source["set_aside"] else []
        counts = f"{source['turns']:,} turns, {source['targets']:,} targets in {source['tokens']:,} tokens"
        lines.append(f"{source['path']}: {', '.join(rows)}; {counts}")
        lines += (
            [f"  of its parts {source['part']} is read; left: {_told_left(source['left'])}"] if source["left"] else []
        )
        lines += [_told_not_used(source)] if source["not_used"] else []
        lines += [f"  set aside {reason}" for reason in counted(source["set_aside"])]
        lines += [f"  not whole: {reason}" for reason in counted(source["cut"])]
        lines += [f"  in {turns:,} turns {_told_altered(kind)}" for kind, turns in source["altered"].items()]
        lines += [f"  {told}" for told in told_remarks(source["remarks"])]
    lines += [_told_too_long(ledger)] if ledger["replies_too_long"] else []
    return lines + alike_lines(ledger.get("alike", {}))


def _told_not_used(source: Mapping[str, Any]) -> str:
    """Those that not all rows have are told with how many do: one of them may be a slip."""
    without = sum(one["reason"].startswith((UNREAD, LEFT_OUT)) for one in source["set_aside"])
    found = source["not_used"].items()
    names = [name if rows == source["rows_read"] - without else f"{name} (in {rows:,})" for name, rows in found]
    more = f" and {len(names) - MOST_NOT_USED} more" if len(names) > MOST_NOT_USED else ""
    return f"  not used: {', '.join(names[:MOST_NOT_USED])}{more}"


def _told_left(left: Mapping[str, int]) -> str:
    return ", ".join(f"{part} ({files:,} file{'s' * (files > 1)})" if files else part for part, files in left.items())


def _told_altered(kind: str) -> str:
    return kind if kind.startswith(BY_SETTING) else f"{kind} by the chat template"


def told_remarks(remarks: Mapping[str, Any]) -> list[str]:
    return [
        f"in {one['turns']:,} turn{'s' * (one['turns'] != 1)} {kind} (e.g. {_told(one['examples'][0])}){_remedy(kind)}"
        for kind, one in remarks.items()
    ]


def _told_too_long(ledger: Mapping[str, Any]) -> str:
    lost, replies, enough = ledger["replies_too_long"], ledger["replies"], ledger["max_length_for_99_percent"]
    warning = "WARNING: " if lost > MOST_TOO_LONG * replies else ""
    remedy = f"; max_length {enough:,} keeps 99 %" if enough else ""
    return f"{warning}{lost:,} of {replies:,} replies ({100 * lost / replies:.1f} %) do not fit{remedy}"


def counted(entries: Sequence[Mapping[str, str]]) -> list[str]:
    """`12 x the template drops ... (e.g. train.jsonl:7); take ..., which renders 11 of them`, most frequent first;
    where nothing renders some of them, what else there is to do."""
    first: dict[str, Mapping[str, str]] = {}
    lifted: dict[str, Counter[str]] = {}
    for one in entries:
        first.setdefault(one["reason"], one)
        lifted.setdefault(one["reason"], Counter()).update([one[LIFTED_BY]] if LIFTED_BY in one else [])
    counts = Counter(one["reason"] for one in entries)
    return [
        f"{count:,} x {reason} (e.g. {_told(first[reason])}){_told_lifted(lifted[reason], count)}"
        + ("" if lifted[reason].total() == count else _remedy(reason))
        for reason, count in counts.most_common()
    ]


def _told_lifted(lifted: Mapping[str, int], of: int) -> str:
    return "".join(
        f"; take model.chat_template {name}, which renders {'all' if rows == of else f'{rows:,}'} of them"
        for name, rows in lifted.items()
    )


def _told(one: Mapping[str, Any]) -> str:
    return f"{one['place']}: {one['detail']}" if "detail" in one else one["place"]
