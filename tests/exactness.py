"""What an exact example is, said a second time: slowly, with `apply_chat_template` and `decode` only."""

from collections.abc import Sequence
from typing import Any

from chatlora.reading.conversation import Conversation
from chatlora.rendering.renderer import IGNORE_INDEX, Example, Renderer


def spans(example: Example) -> list[tuple[int, int]]:
    """(start, end) of each span of targets."""
    marks = [False, *(label != IGNORE_INDEX for label in example.labels), False]
    edges = [index for index in range(len(marks) - 1) if marks[index] != marks[index + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def rendered_ids(renderer: Renderer, conversation: Conversation, num_messages: int, *, prompt: bool) -> list[int]:
    return list(_apply(renderer, conversation, num_messages, prompt, tokenize=True, return_dict=False))


def rendered_text(renderer: Renderer, conversation: Conversation, num_messages: int, *, prompt: bool) -> str:
    return str(_apply(renderer, conversation, num_messages, prompt, tokenize=False))


def assert_exact(renderer: Renderer, conversation: Conversation, examples: Sequence[Example]) -> None:
    """Each assistant message is the target of one span, which begins where its prompt ends. No control text."""
    assistants = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    prompts = {index: rendered_ids(renderer, conversation, index, prompt=True) for index in assistants}
    found = []
    for example in examples:
        assert all(label in (IGNORE_INDEX, id) for id, label in zip(example.input_ids, example.labels, strict=True))
        for start, end in spans(example):
            index = next(index for index in assistants if prompts[index] == example.input_ids[:start])
            found.append(index)
            _assert_reply(renderer, conversation, index, example.input_ids[:end], start)
    assert sorted(found) == assistants


def _assert_reply(renderer: Renderer, conversation: Conversation, index: int, ids: list[int], start: int) -> None:
    message = conversation.messages[index]
    reply = _visible(renderer, renderer.tokenizer.decode(ids[start:]))
    assert ids[-1] in renderer.stop_ids
    assert not set(ids[start:-1]).intersection(renderer.stop_ids)
    assert _visible(renderer, message.content).strip() in reply
    assert _visible(renderer, message.reasoning or "").strip() in reply
    for call in message.tool_calls:
        assert call.name in reply
    whole = _visible(renderer, rendered_text(renderer, conversation, index + 1, prompt=False))
    spelled = _visible(renderer, renderer.tokenizer.decode(ids[:-1]))
    assert whole.startswith(spelled), "what the template renders, but for the stop token"


def _visible(renderer: Renderer, text: str) -> str:
    """The text; without its space where control tokens swallow what stands beside them."""
    tokens = renderer.tokenizer.added_tokens_decoder.values()
    return "".join(text.split()) if any(token.lstrip or token.rstrip for token in tokens) else text


def control_ids(renderer: Renderer, ids: list[int]) -> list[int]:
    """Those of added tokens, but for tokens of space only, which stand in any text."""
    tokens = renderer.tokenizer.added_tokens_decoder
    return [id for id in ids if id in tokens and not tokens[id].content.isspace()]


def _told_in_text(fields: dict[str, Any]) -> dict[str, Any]:
    thought = fields.get("reasoning_content", "")
    others = {key: value for key, value in fields.items() if key != "reasoning_content"}
    return others | {"content": f"<think>\n{thought}\n</think>\n\n{fields['content']}"} if thought.strip() else fields


def _apply(renderer: Renderer, conversation: Conversation, num_messages: int, prompt: bool, **options: Any) -> Any:
    if renderer.taking.arguments_as_text:  # the template raises otherwise
        conversation = conversation.with_arguments_as_text()
    messages = conversation.as_template_input()
    if renderer.taking.thoughts == "text":
        messages = [_told_in_text(fields) for fields in messages]
    return renderer.tokenizer.apply_chat_template(
        messages[:num_messages],
        tools=list(conversation.tools) or None,
        chat_template=renderer.chat_template,
        add_generation_prompt=prompt,
        **options,
        **renderer.chat_template_kwargs,
    )
