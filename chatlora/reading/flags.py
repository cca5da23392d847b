"""Whether a message says of itself that it is to be learned.

`mask` is written in both senses: 1 for what counts in the loss, true for what is hidden from it. Where turns of the
user carry it too, they tell which is meant, since nobody learns those; where only replies do, the user has to say.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from chatlora.reading.roles import ROLE_NAMES, folded
from chatlora.reading.values import described

FLAGS: dict[str, bool] = {  # key of a message -> the value that means "to be learned"
    "loss": True,  # ms-swift, chatlora
    "weight": True,  # OpenAI, SlimOrca
    "train": True,  # axolotl
    "training": True,  # axolotl
    "trainable": True,
    "train_on_turn": True,
    "loss_mask": True,
    "masked": False,  # torchtune
}
EITHER_SENSE = "mask"
OF_SPANS = "train_detail"  # axolotl: which characters of the message are learned
# What the sentences on flags have in common.
NOTHING_READS = "which nothing reads"
TRUE_OR_FALSE = "it is true or false"
SENSES = "which data sets write in both senses"
CONTRADICT = "contradict each other; keep one"
LEARNS_REPLIES = "and chatlora learns what the assistant says"
IN_PART = "nothing is learned in part"
NO_FLAGS = {  # keys of messages whose numbers and booleans have nothing to do with what is learned
    *("id", "message_id", "parent_id", "index", "idx", "turn", "turn_id", "turn_index", "turn_identifier"),
    *("timestamp", "created", "created_at", "create_time", "update_time"),
    *("num_tokens", "token_count", "is_error", "toxic", "redacted"),  # the last two: WildChat
}


def flags_of(turns: Sequence[Any], role_key: str, path: str, problems: list[str]) -> dict[str, bool]:
    """FLAGS, and what `mask` means in this conversation where a turn carries it."""
    carried = [(turn, turn[EITHER_SENSE]) for turn in turns if isinstance(turn, Mapping) and EITHER_SENSE in turn]
    masks = [value for _, value in carried if _as_bool(value) is not None]
    if not masks:
        return FLAGS
    of_context = {
        bool(value)
        for turn, value in carried
        if ROLE_NAMES.get(folded(turn.get(role_key)) or "") in ("system", "user") and _as_bool(value) is not None
    }
    if len(of_context) == 1:
        return {**FLAGS, EITHER_SENSE: not of_context.pop()}
    problems.append(
        f"{path}: the turns carry {EITHER_SENSE}, {SENSES}; say which with columns: "
        f"{{loss: {EITHER_SENSE}}} if true means learned, or columns: {{masked: {EITHER_SENSE}}} if it means left out"
    )
    return {**FLAGS, EITHER_SENSE: True}


def read_loss(
    fields: Mapping[str, Any], path: str, problems: list[str], flags: Mapping[str, bool] = FLAGS
) -> bool | None:
    """What the message's flags say: true, false, 0 or 1; None where it has none."""
    said: dict[str, bool] = {}
    for key in fields.keys() & flags.keys():
        value = _as_bool(fields[key])
        if value is not None:
            said[key] = value is flags[key]
        elif fields[key] is not None:
            is_text = isinstance(fields[key], str)
            way = ", without quotes" if is_text else ", 1 or 0; " + IN_PART
            problems.append(f"{path}.{key} is {described(fields[key])}; {TRUE_OR_FALSE}{way}")
    if len(set(said.values())) > 1:
        problems.append(f"{path}: {' and '.join(sorted(said))} {CONTRADICT}")
        return None
    return next(iter(said.values()), None)


def told_learned_context(fields: Mapping[str, Any], role: str, path: str) -> str:
    """What is said of a turn of the system or of the user that asks to be learned, as its author will have meant."""
    key = next((key for key in FLAGS if key in fields and _as_bool(fields[key]) is FLAGS[key]), EITHER_SENSE)
    return (
        f"{path}.{key} says that a turn of the {role} is learned, {LEARNS_REPLIES}; take it "
        f"from such turns, or read it nowhere with ignore: [{key}]"
    )


def _as_bool(value: Any) -> bool | None:
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def report_unknown_flags(
    fields: Mapping[str, Any], read: Mapping[str, Any] | set[str], path: str, problems: list[str]
) -> None:
    """A true, false or number that nothing reads may be the mask of a data set that nobody here has heard of."""
    if fields.get(OF_SPANS) and OF_SPANS not in read:
        problems.append(
            f"{path}.{OF_SPANS} says which part of the message is learned, and {IN_PART}; leave such "
            f"rows out with on_bad_row: set_aside, or learn all of it with ignore: [{OF_SPANS}]"
        )
    for key in fields.keys() - read - NO_FLAGS:
        if isinstance(fields[key], (bool, int, float)):
            problems.append(
                f"{path}.{key} is {described(fields[key])}, {NOTHING_READS}: if it says what is learned, name it "
                f"with columns: {{loss: {key}}} (true is learned) or {{masked: {key}}} (true is not); if not, with "
                f"ignore: [{key}]"
            )
