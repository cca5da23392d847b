"""Real chat templates, all that trl carries: what comes out is exact, or the row is refused with a reason.

Run: pytest tests/test_chat_templates.py
"""

from pathlib import Path

import pytest
import trl
from exactness import assert_exact, control_ids, rendered_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import (
    CHATML,
    CHATML_TOKENS,
    GLM,
    GLM_TOKENS,
    LLAMA3,
    LLAMA3_TOKENS,
    QWEN3,
    THINK_TOKENS,
    TOOL_TOKENS,
    control_tokens_in,
    tiny_tokenizer,
)
from tokenizers import AddedToken

from chatlora.data.conversation import Conversation, Message, ToolCall
from chatlora.data.rendering import EvalExample, Rendered, Renderer
from chatlora.data.template import resolve_template_kwargs
from chatlora.errors import SetAside

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
LONG = 1_000_000

EOS = (
    *("<|im_end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>", "<|return|>", "<｜end▁of▁sentence｜>"),
    *("<end_of_turn>", "<turn|>", "<end_of_utterance>", "</s>", "<|endoftext|>"),
)
USER, ANSWER = Message("user", "Hi there, how are you?"), Message("assistant", "I am fine, thanks.")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name"},
                "days": {"type": "integer", "description": "how many"},
            },
            "required": ["city"],
        },
    },
}
CALL = ToolCall("get_weather", {"city": "São Paulo", "days": 3}, id="call00001")
CONVERSATIONS = {
    "text": Conversation((USER, ANSWER)),
    "system": Conversation((Message("system", "Be brief."), USER, ANSWER)),
    "multi-turn": Conversation(
        (
            USER,
            ANSWER,
            Message("user", "2 + 2?"),
            Message("assistant", "4"),
            Message("user", "再见"),
            Message("assistant", "再见！"),
        )
    ),
    "tools": Conversation(
        (
            Message("user", "Weather?"),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "sunny", tool_call_id="call00001", name="get_weather"),
            Message("assistant", "It is sunny."),
        ),
        (TOOL,),
    ),
    "reasoning": Conversation(
        (
            USER,
            Message("assistant", "Fine.", reasoning="They ask how I am."),
            Message("user", "2 + 2?"),
            Message("assistant", "4", reasoning="Two and two."),
        )
    ),
}
# Families whose plain answers cannot be rendered exactly: the prompt opens a thought that the answer's rendering lacks,
# or content is a list of parts (vision models).
REFUSE_TEXT = ("deepseek", "nemotron", "llava_next", "idefics3", "smolvlm")
SHOW_CALLS = ("qwen2_5.", "qwen3", "glm4moe", "gptoss", "gemma4", "llama3_1", "llama3_2", "lfm2_2_5", "muse_glimmer")
SHOW_REASONING = ("qwen3.", "qwen3_5_think", "qwen3_6", "qwen3_8", "glm4moe", "gptoss", "gemma4_v5", "nemotron")
REASONS = (
    "the chat template drops ",
    "the chat template raises an error",
    "the chat template's reply does not continue its generation prompt",
)


def renderer_of(template: Path, conversation: Conversation) -> Renderer:
    text = template.read_text(encoding="utf-8")
    tokens = list(dict.fromkeys([*control_tokens_in(text), "<s>", "<|endoftext|>"]))
    bos = next(token for token in ("<|begin_of_text|>", "<bos>", "<s>") if token in tokens)
    plain = [token for token in tokens if token.startswith(("<tool", "</tool", "<think", "</think"))]
    tokenizer = tiny_tokenizer(
        chat_template=text,
        control_tokens=[token for token in tokens if token not in plain],
        plain_tokens=plain,
        eos=next(token for token in EOS if token in tokens),
        bos=bos if "bos_token" in text else None,
        splitting="llama3",
    )
    reasons = any(message.reasoning for message in conversation.messages)
    return Renderer(tokenizer, chat_template_kwargs=resolve_template_kwargs(text, {}, any_reasoning=reasons))


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_what_comes_out_is_exact_or_refused_with_a_reason(template, kind):
    conversation = CONVERSATIONS[kind]
    renderer = renderer_of(template, conversation)
    outcome = attempt(renderer, conversation)
    if isinstance(outcome, SetAside):
        assert outcome.reason.startswith(REASONS)
        assert not (kind in ("text", "multi-turn") and not template.name.startswith(REFUSE_TEXT)), str(outcome)
        assert not (kind == "tools" and template.name.startswith(SHOW_CALLS)), str(outcome)
        assert not (kind == "reasoning" and template.name.startswith(SHOW_REASONING)), str(outcome)
        return
    rendered, samples = outcome
    assert_exact(renderer, conversation, rendered.examples)
    assistants = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    assert [sample.turn for sample in samples] == list(range(len(assistants)))
    for sample in samples:
        assert sample.output_ids[-1] in renderer.stop_ids
        assert sample.input_ids == rendered_ids(renderer, conversation, assistants[sample.turn], prompt=True)


def attempt(renderer: Renderer, conversation: Conversation) -> tuple[Rendered, list[EvalExample]] | SetAside:
    try:
        rendered = renderer.render(conversation, max_length=LONG)
        samples = renderer.render_for_evaluation(conversation, max_prompt_length=None, max_new_tokens=9)
    except SetAside as refused:
        return refused
    return rendered, list(samples)


# ---- random conversations


def families() -> dict[str, Renderer]:
    llama3 = {"chat_template": LLAMA3, "control_tokens": LLAMA3_TOKENS, "eos": "<|eot_id|>", "bos": "<|begin_of_text|>"}
    stripping = [AddedToken(word, rstrip=True, special=True, normalized=False) for word in CHATML_TOKENS]
    glm = {"chat_template": GLM, "control_tokens": GLM_TOKENS, "eos": "<|endoftext|>"}
    return {
        "chatml": Renderer(tiny_tokenizer(chat_template=CHATML)),
        "tokens that swallow the space after them, and tokens of space": Renderer(
            tiny_tokenizer(control_tokens=stripping, plain_tokens=["\n\n", "  "])
        ),
        "llama3": Renderer(tiny_tokenizer(**llama3, splitting="llama3")),
        "llama3 under GPT-2's splitting": Renderer(tiny_tokenizer(**llama3)),
        "glm": Renderer(tiny_tokenizer(**glm, plain_tokens=TOOL_TOKENS)),
        "qwen3": Renderer(
            tiny_tokenizer(chat_template=QWEN3, plain_tokens=THINK_TOKENS),
            chat_template_kwargs={"enable_thinking": False},
        ),
    }


FAMILIES = families()
PIECES = st.sampled_from(
    ["Hello", " ", "\n", "\n\n", "  ", "\t", "、你好", "é", "🙂", "123", "'s", "<", ">", "|", "\u200b", "."]
)
SPELLINGS = st.sampled_from(
    ["<|im_end|>", "<|eot_id|>", "<|user|>", "<think>", "</think>", "<tool_call>", "<|im_start", "|>"]
)
HARMLESS = st.lists(PIECES, min_size=1, max_size=8).map("".join)
HOSTILE = st.lists(PIECES | SPELLINGS, min_size=1, max_size=8).map("".join)


def chats(text: st.SearchStrategy[str]) -> st.SearchStrategy[Conversation]:
    turns = st.lists(st.tuples(text, text), min_size=1, max_size=3)
    system = st.none() | text

    def build(told: str | None, pairs: list[tuple[str, str]]) -> Conversation:
        messages = [] if told is None else [Message("system", told)]
        for question, answer in pairs:
            messages += [Message("user", question), Message("assistant", answer)]
        return Conversation(tuple(messages))

    return st.builds(build, system, turns)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(conversation=chats(HARMLESS))
def test_random_conversations_are_exact(family, conversation):
    renderer = FAMILIES[family]
    assert_exact(renderer, conversation, renderer.render(conversation, max_length=LONG).examples)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(conversation=chats(HOSTILE))
def test_random_control_text_stays_text(family, conversation):
    renderer = FAMILIES[family]
    harmless = Conversation(tuple(Message(message.role, "x") for message in conversation.messages))
    count = [len(control_ids(renderer, example.input_ids)) for example in prompts(renderer, harmless)]
    samples = prompts(renderer, conversation)
    assert [len(control_ids(renderer, sample.input_ids)) for sample in samples] == count
    renderer.render(conversation, max_length=LONG)  # proved
    for sample in samples:
        said = [message for message in conversation.messages if message.role == "assistant"][sample.turn]
        assert renderer.tokenizer.decode(sample.output_ids[:-1]).strip() == said.content.strip()


def prompts(renderer, conversation):
    return list(renderer.render_for_evaluation(conversation, max_prompt_length=None, max_new_tokens=9))
