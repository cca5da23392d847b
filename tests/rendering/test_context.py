"""A message that a template leaves out of the prompt sets the row aside, however short or empty it is.

Run: pytest tests/rendering/test_context.py. The long draws: add `-m slow`.
"""

import pickle
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from chatlora.config import Source
from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation, Message, Role, ToolCall
from chatlora.reading.sources import read_conversations
from chatlora.rendering.context import Contexts
from chatlora.rendering.message_parts import DROPS, check_prompt
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.turns import NOT_CONTINUED, RAISES_FIRST
from tests.costs import calls_of
from tests.exactness import rendered_text
from tests.random_conversations import draw
from tests.rendering.test_chat_templates import CALL, DOCUMENT, TEMPLATES, TOOL, original, renderer_of
from tests.rendering.test_random_conversations import EMBEDDED_TEMPLATES, SOME_COMPLETED, renderer_for
from tests.tiny_tokenizers import CHATML, QWEN3, tiny_tokenizer

LONG = 1_000_000
SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", "Is it true?"), Message("assistant", "Yes.")
LOOKS, CALLS = Message("assistant", "I look."), Message("assistant", "", tool_calls=(CALL,))
AGAIN = (SYSTEM, USER, ANSWER, Message("system", "Be"), USER, ANSWER)  # its text stands in the first one's


def told(text: str) -> Message:
    return Message("tool", text, tool_call_id="call00001", name="get_weather")


# Every text is found elsewhere in the prompt, or is empty.
CONVERSATIONS = {
    "second system message": Conversation(AGAIN),
    "system messages in a row": Conversation((SYSTEM, Message("system", "Be"), USER, ANSWER)),
    "result true": Conversation((USER, CALLS, told("true"), ANSWER), (TOOL,)),
    "empty result": Conversation((USER, CALLS, told(""), ANSWER), (TOOL,)),
    "result true without a call": Conversation((USER, LOOKS, told("true"), ANSWER)),
    "empty result without a call": Conversation((USER, LOOKS, told(""), ANSWER)),
    "text beside a call": Conversation(
        (USER, replace(CALLS, content="true", loss=False), told("true"), ANSWER), (TOOL,)
    ),
    "empty system message": Conversation((Message("system", ""), USER, ANSWER)),
    "empty question": Conversation((Message("user", ""), ANSWER)),
    "questions in a row": Conversation((USER, Message("user", "it"), ANSWER)),
    "greeting": Conversation((Message("assistant", "true"), USER, ANSWER)),
    "empty reply": Conversation((USER, Message("assistant", ""), USER, ANSWER)),
}
DROPPED = {
    "phi3": {"result true without a call": "tool", "empty result without a call": "tool"},
    "phi3_5": {"result true without a call": "tool", "empty result without a call": "tool"},
    "gptoss": {"second system message": "system", "system messages in a row": "system"},
    "qwen3_vl": {"second system message": "system", "system messages in a row": "system"},
    "llama3_1": {"text beside a call": "assistant"},
    "llama3_2": {"text beside a call": "assistant"},
    "muse_glimmer": {"text beside a call": "assistant"},
}


def refusal(renderer: Renderer, conversation: Conversation) -> str:
    try:
        renderer.render(conversation, max_length=LONG)
    except SetAside as refused:
        return str(refused)
    return ""


def shown(renderer: Renderer, conversation: Conversation) -> Iterator[bool]:
    """Whether transformers' prompt for each reply that is learned changes with the text of each message before it."""
    replies = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    for reply in replies[conversation.messages[0].role == "assistant" :]:
        if conversation.messages[reply].loss is not False:
            yield from shown_to(renderer, conversation, reply)


def shown_to(renderer: Renderer, conversation: Conversation, reply: int) -> Iterator[bool]:
    prompt = rendered_text(renderer, conversation, reply, prompt=True)
    for index, message in enumerate(conversation.messages[:reply]):
        if not message.content.strip() and (message.role == "system" or message.tool_calls):  # nothing is said
            continue
        others = [*conversation.messages]
        others[index] = replace(message, content="zebra")
        yield rendered_text(renderer, replace(conversation, messages=tuple(others)), reply, prompt=True) != prompt


# ---- trl's templates


def test_what_each_template_drops_is_found_and_nothing_else_is_refused() -> None:
    """A row is set aside for a dropped message exactly where a change of that message's text changes no prompt."""
    found: dict[str, dict[str, str]] = {}
    raise_at_greeting = set()
    for name in (name for name in TEMPLATES if name == original(name)):
        renderer = renderer_of(TEMPLATES[name], any_reasoning=False)
        for kind, conversation in CONVERSATIONS.items():
            refused = refusal(renderer, conversation)
            if refused.startswith(RAISES_FIRST):
                raise_at_greeting.add(name)
            if refused.startswith(DROPS) and " message (message " in refused:
                found.setdefault(name, {})[kind] = refused.removeprefix(DROPS).split()[1]
                assert not all(shown(renderer, conversation)), (name, kind, refused)
            elif not refused:
                assert all(shown(renderer, conversation)), (name, kind)
    assert found == DROPPED
    assert raise_at_greeting == {"cohere", "cohere2", "gemma", "gemma3", "llava_next"}  # the last at anything
    page = DOCUMENT.read_text(encoding="utf-8").split("| template |")[0]
    assert all(name in page for name in found.keys() | raise_at_greeting - {"llava_next"})


def test_a_search_for_the_texts_alone_finds_none_of_it() -> None:
    for name, kinds in DROPPED.items():
        renderer = renderer_of(TEMPLATES[name], any_reasoning=False)
        for conversation in map(CONVERSATIONS.__getitem__, kinds):
            asked = replace(conversation, messages=conversation.messages[:-1])
            prompt = rendered_text(renderer, asked, len(asked.messages), prompt=True)
            check_prompt(prompt, asked.as_template_input(), ())


def test_an_evaluation_sets_the_same_rows_aside() -> None:
    renderer = renderer_of(TEMPLATES["qwen3_vl"], any_reasoning=False)
    with pytest.raises(SetAside, match=r"drops a system message \(message 4\)"):
        renderer.render_for_evaluation(Conversation(AGAIN), max_prompt_length=None, max_new_tokens=9)


def real_rows(shared: Path, number: int) -> list[Conversation]:
    files = sorted((shared / "data").glob("*.json*"))
    return [row for file in files for row in islice(read_conversations(Source(path=str(file))), number)]


def false_alarms(names: Sequence[str], rows: Sequence[Conversation]) -> list[tuple[str, str]]:
    """Rows set aside for a message that transformers' prompt does show."""
    alarms = []
    for name in names:
        renderer = renderer_of(TEMPLATES[name], any_reasoning=False)
        for row in rows:
            refused = refusal(renderer, row)
            if refused.startswith(DROPS) and " message (message " in refused and all(shown(renderer, row)):
                alarms.append((name, refused))
    return alarms


def test_no_real_row_is_set_aside_for_what_its_prompt_shows(shared: Path) -> None:
    assert false_alarms(["qwen2_5", "gptoss", "phi3"], real_rows(shared, 6)) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_real_row_is_set_aside_under_any_template(shared: Path) -> None:
    assert false_alarms([name for name in TEMPLATES if name == original(name)], real_rows(shared, 100)) == []


# ---- templates made for it

LOOP = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
WRITTEN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
TRUE_RESULT = Conversation((USER, LOOKS, told("true"), ANSWER))
EMPTY_RESULT = Conversation((USER, LOOKS, told(""), ANSWER))
TWO_SYSTEMS = Conversation(AGAIN)


def template(body: str) -> str:
    return LOOP.replace("BODY", body)


@pytest.mark.parametrize(
    ("text", "conversation", "reason"),
    [
        (CHATML, TRUE_RESULT, ""),
        (CHATML, EMPTY_RESULT, ""),
        (
            template(f"{{% if m.role != 'tool' %}}{WRITTEN}{{% endif %}}"),
            TRUE_RESULT,
            "drops a tool message (message 3)",
        ),
        (template(f"{{% if m.content %}}{WRITTEN}{{% endif %}}"), TRUE_RESULT, ""),
        # It has a place for a text, but an empty one's goes with it.
        (template(f"{{% if m.content %}}{WRITTEN}{{% endif %}}"), EMPTY_RESULT, "drops a tool message (message 3)"),
        (template(WRITTEN.replace("m['content']", "(m['content'] or 'nothing')")), EMPTY_RESULT, ""),
        (template(WRITTEN.replace("m['content']", "m['content'] | tojson")), EMPTY_RESULT, ""),
        (template(WRITTEN.replace("m['content']", "m['content'] | trim")), TWO_SYSTEMS, ""),
        (template(f"{{% if m.role != 'system' or loop.first %}}{WRITTEN}{{% endif %}}"), TWO_SYSTEMS, "message 4"),
        # Told at the head of the user's message that follows.
        (
            "{% set ns = namespace(system='') %}"
            + template(
                "{% if m.role == 'system' %}{% set ns.system = ns.system + m.content + '\n' %}{% else %}"
                + WRITTEN.replace("m['content']", "(ns.system if m.role == 'user' else '') + m['content']")
                + "{% if m.role == 'user' %}{% set ns.system = '' %}{% endif %}{% endif %}"
            ),
            TWO_SYSTEMS,
            "",
        ),
        # Calls in earlier turns: only their names are shown.
        (
            template(
                WRITTEN.replace(
                    "m['content']", "m['content'] + (m.tool_calls[0].function.name if m.tool_calls else '')"
                )
            ),
            Conversation(
                (USER, Message("assistant", "", tool_calls=(ToolCall("it", {"is": "true"}),), loss=False), ANSWER)
            ),
            "drops tool calls (message 2)",
        ),
        (
            template(f"{{% if not (loop.first and m.role == 'assistant') %}}{WRITTEN}{{% endif %}}"),
            Conversation((Message("assistant", "true"), USER, ANSWER)),
            "drops an assistant message (message 1)",
        ),
    ],
)
def test_a_message_s_place_is_looked_for_not_its_text(text: str, conversation: Conversation, reason: str) -> None:
    refused = refusal(Renderer(tiny_tokenizer(chat_template=text)), conversation)
    assert reason in refused
    assert bool(reason) == bool(refused)


def test_thoughts_of_earlier_replies_may_go() -> None:
    thoughtful = replace(ANSWER, reasoning="true")
    renderer = Renderer(tiny_tokenizer(chat_template=QWEN3, plain_tokens=("<think>", "</think>")))
    assert refusal(renderer, Conversation((USER, thoughtful, USER, thoughtful))) == ""


# ---- what it costs


def test_a_shape_is_judged_once_and_its_verdict_is_the_same_whichever_row_comes_first() -> None:
    renderer = renderer_of(TEMPLATES["qwen3_vl"], any_reasoning=False)
    template = renderer._template
    rows = [
        [Message("system", f"{n}"), USER, replace(ANSWER, content=f"Say {n}."), Message("system", f"{n}"), USER]
        for n in range(3)
    ]
    inputs = [Conversation(tuple(messages)).as_template_input() for messages in rows]

    def judged(contexts: Contexts, messages: Sequence[dict[str, object]]) -> str:
        with pytest.raises(SetAside) as refused:
            contexts.check(template, messages, ())
        return str(refused.value)

    contexts = Contexts()
    first = calls_of(lambda: judged(contexts, inputs[0]))
    assert calls_of(lambda: judged(contexts, inputs[1])) < first / 2
    assert {judged(Contexts(), messages) for messages in inputs} == {
        judged(pickle.loads(pickle.dumps(contexts)), inputs[2])
    }


def test_a_reply_that_does_not_continue_its_prompt_is_told_as_before() -> None:
    renderer = renderer_of(TEMPLATES["deepseekv3"], any_reasoning=False)
    assert refusal(renderer, CONVERSATIONS["greeting"]).startswith(NOT_CONTINUED)


# ---- drawn at random


def with_accidents(conversation: Conversation, rng: random.Random) -> Conversation:
    """Some of the texts that lead to the last reply are empty, or say what another message says; or a system or tool
    message more."""
    messages = list(conversation.messages)
    for index, message in enumerate(messages[:-1]):
        if message.role != "assistant" and rng.random() < 0.3:
            said = rng.choice(["", *(other.content for other in messages)])
            messages[index] = replace(message, content=said)
    for _ in range(rng.choice([0, 0, 1, 2])):
        role: Role = rng.choice(["system", "tool", "user"])
        said = rng.choice(["", *(other.content for other in messages)])
        messages.insert(rng.randrange(len(messages)), Message(role, said, name="look" if role == "tool" else None))
    return replace(conversation, messages=tuple(messages))


def check_drawn(name: str, number: int) -> str:
    """What the verdict on one conversation is: shown, dropped, or refused for something else."""
    conversation = with_accidents(draw(0, number, hostile=False), random.Random(number))
    if conversation.messages[-1].role != "assistant" or conversation.messages[-1].loss is False:
        return "other"
    any_reasoning = any(message.reasoning for message in conversation.messages)
    renderer = renderer_for(name, any_reasoning)
    refused = refusal(renderer, conversation)
    if not refused:
        assert all(shown(renderer, conversation)), (name, number)
        return "shown"
    if DROPS in refused and " message (message " in refused:
        assert not all(shown(renderer, conversation)), (name, number, refused)
        return "dropped"
    return "other"


def check_draws(names: Sequence[str], numbers: range) -> None:
    verdicts = Counter(check_drawn(name, number) for name in names for number in numbers)
    assert verdicts["shown"] > 0.1 * verdicts.total()
    assert verdicts["dropped"] > 0.01 * verdicts.total()


def test_drawn_conversations_are_refused_exactly_where_a_message_is_not_shown() -> None:
    check_draws([*DROPPED, *EMBEDDED_TEMPLATES], range(20))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_drawn_conversations_under_every_template_are_too() -> None:
    names = [name for name in TEMPLATES if name == original(name)]
    check_draws([*names, *EMBEDDED_TEMPLATES, *SOME_COMPLETED], range(300))
