"""Small chat templates, each with one habit of one family: what the model must generate, to the letter, and no mask
that is wrong in a usual way is taken for right.

Run: pytest tests/rendering/test_template_quirks.py
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tokenizers import AddedToken

from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation, Message, ToolCall
from chatlora.rendering.renderer import Example, Rendered, Renderer
from tests.broken_masks import generation_prompt_supervised, header_supervised, off_by_one, stop_token_lost
from tests.exactness import assert_exact, spans
from tests.tiny_tokenizers import CHATML, CHATML_TOKENS, GLM, GLM_TOKENS, LLAMA3, LLAMA3_TOKENS, QWEN3, tiny_tokenizer

BROKEN = (off_by_one, header_supervised, generation_prompt_supervised, stop_token_lost)
LONG = 10_000
TALK = Conversation(
    (
        Message("user", "Where is Oslo?"),
        Message("assistant", "In Norway."),
        Message("user", "And Rome?"),
        Message("assistant", "In Italy."),
    )
)
THOUGHT = Conversation(
    tuple(
        Message(message.role, message.content, reasoning="A map helps." if message.role == "assistant" else None)
        for message in TALK.messages
    )
)
SPACED = Conversation(
    tuple(Message(m.role, f"\n{m.content}\n" if m.role == "assistant" else m.content) for m in TALK.messages)
)
CALLING = Conversation(
    (
        TALK.messages[0],
        Message("assistant", "", tool_calls=(ToolCall("look", {"at": "Oslo"}),)),
        Message("tool", "Norway", name="look"),
        TALK.messages[1],
    )
)


def chat(before: str, reply: str, prompt: str, *, user: str = "<|im_start|>user\n' + m.content + '<|im_end|>\n") -> str:
    """A template: `before` all, how a user's message and a `reply` are written (Jinja strings), and the `prompt`."""
    return (
        f"{before}{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ '{user}' }}}}"
        f"{{% else %}}{{{{ '{reply}' }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{prompt}' }}}}{{% endif %}}"
    )


@dataclass(frozen=True)
class Quirk:
    """replies: for each example the targets as text; altered: what the ledger counts."""

    template: str
    replies: list[list[str]]
    conversation: Conversation = TALK
    altered: dict[str, int] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)


THINK = ("<think>", "</think>")
PLAIN = [["In Norway.<|im_end|>", "In Italy.<|im_end|>"]]
INST = {"control_tokens": ["<s>", "</s>", "[INST]", "[/INST]"], "eos": "</s>", "bos": "<s>"}
HARMONY = ["<|start|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>"]
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
QUIRKS = {
    "ChatML: a line break behind the stop token": Quirk(CHATML, PLAIN),
    "no line break behind it": Quirk(chat("", "<|im_start|>a\n' + m.content + '<|im_end|>", "<|im_start|>a\n"), PLAIN),
    "a system prompt of the template's own": Quirk("<|im_start|>system\nHelp.<|im_end|>\n" + CHATML, PLAIN),
    "the date in the system prompt": Quirk("<|im_start|>system\n{{ strftime_now('%Y') }}<|im_end|>\n" + CHATML, PLAIN),
    "a beginning-of-sequence token": Quirk("{{ bos_token }}" + CHATML, PLAIN, tokenizer={"bos": "<|endoftext|>"}),
    "numbered messages": Quirk(
        chat(
            "",
            "<|im_start|>' ~ loop.index ~ '\n' + m.content + '<|im_end|>",
            "<|im_start|>' ~ (messages|length + 1) ~ '\n",
        ),
        PLAIN,
    ),
    "Llama 3: text trimmed, a header of several tokens": Quirk(
        LLAMA3,
        [["In Norway.<|eot_id|>", "In Italy.<|eot_id|>"]],
        SPACED,
        {"space around the reply's text is trimmed": 2},
        {"control_tokens": LLAMA3_TOKENS, "eos": "<|eot_id|>", "bos": "<|begin_of_text|>", "splitting": "llama3"},
    ),
    "GLM: the next role is the stop token, eos after the last": Quirk(
        GLM,
        [["In Norway.<|user|>", "In Italy.<|endoftext|>"]],
        tokenizer={"control_tokens": GLM_TOKENS, "eos": "<|endoftext|>"},
    ),
    "GLM: a call is stopped by the role of its result": Quirk(
        GLM,
        [['<tool_call>look\n{"at": "Oslo"}</tool_call><|observation|>', "In Norway.<|endoftext|>"]],
        CALLING,
        tokenizer={
            "control_tokens": GLM_TOKENS,
            "eos": "<|endoftext|>",
            "plain_tokens": ["<tool_call>", "</tool_call>"],
        },
    ),
    "DeepSeek: a call's arguments as text": Quirk(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls %}"
        "{{ '<tool_call>' + call.function.name + '\n' + call.function.arguments + '<|done|>' }}{% endfor %}"
        "{{ '' if m.tool_calls else '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        [['<tool_call>look\n{"at": "Oslo"}<|done|>', "In Norway.<|im_end|>"]],
        CALLING,
        tokenizer={"control_tokens": [*CHATML_TOKENS, "<|done|>"], "plain_tokens": ["<tool_call>"]},
    ),
    "Gemma: the assistant is called model": Quirk(
        chat(
            "{{ bos_token }}",
            "<start_of_turn>model\n' + m.content | trim + '<end_of_turn>\n",
            "<start_of_turn>model\n",
            user="<start_of_turn>user\n' + m.content | trim + '<end_of_turn>\n",
        ),
        [["In Norway.<end_of_turn>", "In Italy.<end_of_turn>"]],
        tokenizer={"control_tokens": GEMMA, "eos": "<eos>", "bos": "<bos>"},  # its stop is not its eos
    ),
    "Mistral: no generation prompt at all": Quirk(
        chat("{{ bos_token }}", " ' + m.content + '</s>", "", user="[INST] ' + m.content + ' [/INST]"),
        [[" In Norway.</s>", " In Italy.</s>"]],
        altered={"' ' is put before the reply's text": 2},
        tokenizer=INST,
    ),
    "Llama 2: spaces around, and a beginning at every turn": Quirk(
        chat("", " ' + m.content + ' </s>", "", user="' + bos_token + '[INST] ' + m.content + ' [/INST]"),
        [[" In Norway. </s>", " In Italy. </s>"]],
        altered={"' ' is put before the reply's text": 2, "' ' is put after the reply's text": 2},
        tokenizer=INST,
    ),
    "Vicuna: roles in words": Quirk(
        chat("", "ASSISTANT: ' + m.content + '</s>", "ASSISTANT: ", user="USER: ' + m.content + ' "),
        [["In Norway.</s>", "In Italy.</s>"]],
        tokenizer=INST,
    ),
    "Alpaca: no stop token at all": Quirk(
        chat(
            "",
            "### Response:\n' + m.content + '\n\n",
            "### Response:\n",
            user="### Instruction:\n' + m.content + '\n\n",
        ),
        [["In Norway.\n\n</s>"], ["In Italy.\n\n</s>"]],
        altered={"'\\n\\n' is put after the reply's text": 2},
        tokenizer=INST,
    ),
    "eos after the last reply only": Quirk(
        chat("", "A: ' + m.content + ('</s>' if loop.last else '\n') + '", "A: ", user="Q: ' + m.content + '\n"),
        [["In Norway.</s>"], ["In Italy.</s>"]],
        tokenizer=INST,
    ),
    "two control tokens end a reply": Quirk(
        chat("", "<|im_start|>a\n' + m.content + '<|done|><|im_end|>\n", "<|im_start|>a\n"),
        [["In Norway.<|done|><|im_end|>", "In Italy.<|done|><|im_end|>"]],
        altered={"'<|done|>' is put after the reply's text": 2},
        tokenizer={"control_tokens": [*CHATML_TOKENS, "<|done|>"]},
    ),
    "a control token opens the reply": Quirk(
        chat("", "<|im_start|>a\n<|say|>' + m.content + '<|im_end|>\n", "<|im_start|>a\n"),
        [["<|say|>In Norway.<|im_end|>", "<|say|>In Italy.<|im_end|>"]],
        altered={"'<|say|>' is put before the reply's text": 2},
        tokenizer={"control_tokens": [*CHATML_TOKENS, "<|say|>"]},
    ),
    "gpt-oss: channels, and another end for the last reply": Quirk(
        chat(
            "",
            "<|start|>assistant<|channel|>final<|message|>' + m.content"
            " + ('<|return|>' if loop.last else '<|end|>') + '",
            "<|start|>assistant",
            user="<|start|>user<|message|>' + m.content + '<|end|>",
        ),
        [["<|channel|>final<|message|>In Norway.<|return|>"], ["<|channel|>final<|message|>In Italy.<|return|>"]],
        altered={"'<|channel|>final<|message|>' is put before the reply's text": 2},
        tokenizer={"control_tokens": HARMONY, "eos": "<|return|>"},
    ),
    "Qwen3: earlier thoughts are dropped": Quirk(
        QWEN3,
        [
            ["<think>\nA map helps.\n</think>\n\nIn Norway.<|im_end|>"],
            ["<think>\nA map helps.\n</think>\n\nIn Italy.<|im_end|>"],
        ],
        THOUGHT,
        tokenizer={"plain_tokens": THINK},
    ),
    "Qwen3: an empty thought put in": Quirk(
        QWEN3,
        [["<think>\n\n</think>\n\nIn Norway.<|im_end|>"], ["<think>\n\n</think>\n\nIn Italy.<|im_end|>"]],
        altered={"'<think>\\n\\n</think>\\n\\n' is put before the reply's text": 2},
        tokenizer={"plain_tokens": THINK},
    ),
    "Qwen3: the empty thought is the prompt's": Quirk(
        QWEN3,
        [["In Norway.<|im_end|>"], ["In Italy.<|im_end|>"]],
        tokenizer={"plain_tokens": THINK},
        kwargs={"enable_thinking": False},
    ),
    "Qwen3.5: the prompt opens the thought": Quirk(
        chat(
            "",
            "<|im_start|>a\n<think>\n' + m.reasoning_content + '\n</think>\n' + m.content + '<|im_end|>\n",
            "<|im_start|>a\n<think>\n",
        ),
        [["A map helps.\n</think>\nIn Norway.<|im_end|>", "A map helps.\n</think>\nIn Italy.<|im_end|>"]],
        THOUGHT,
        tokenizer={"plain_tokens": THINK},
    ),
    "a token straddles the end of the prompt": Quirk(
        LLAMA3.replace(" | trim", ""),
        [["\nIn Norway.\n<|eot_id|>"], ["\nIn Italy.\n<|eot_id|>"]],
        SPACED,
        tokenizer={
            "control_tokens": [*LLAMA3_TOKENS[1:], "<|begin_of_text|>"],
            "eos": "<|eot_id|>",
            "bos": "<|begin_of_text|>",
            "plain_tokens": ["\n\n\n"],
        },
    ),
    "Phi-3: control tokens that swallow the space behind them": Quirk(
        chat(
            "",
            "<|assistant|>\n' + m.content + '<|end|>\n",
            "<|assistant|>\n",
            user="<|user|>\n' + m.content + '<|end|>\n",
        ),
        [["In Norway.<|end|>", "In Italy.<|end|>"]],
        tokenizer={
            "control_tokens": [
                "<|endoftext|>",
                *(
                    AddedToken(word, rstrip=True, special=True, normalized=False)
                    for word in ("<|user|>", "<|assistant|>", "<|end|>")
                ),
            ],
            "eos": "<|endoftext|>",
        },
    ),
}


def rendered(name: str) -> tuple[Renderer, Conversation, Rendered]:
    quirk = QUIRKS[name]
    renderer = Renderer(
        tiny_tokenizer(chat_template=quirk.template, **quirk.tokenizer), chat_template_kwargs=quirk.kwargs
    )
    return renderer, quirk.conversation, renderer.render(quirk.conversation, max_length=LONG)


@pytest.mark.parametrize("name", QUIRKS)
def test_each_habit_gives_the_targets_that_the_model_must_generate(name: str) -> None:
    renderer, conversation, found = rendered(name)
    decode = renderer.tokenizer.decode
    assert [
        [decode(example.input_ids[start:end]) for start, end in spans(example)] for example in found.examples
    ] == QUIRKS[name].replies
    assert dict(found.altered) == QUIRKS[name].altered
    assert_exact(renderer, conversation, found.examples)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
@pytest.mark.parametrize("name", QUIRKS)
def test_each_habit_s_broken_masks_are_refused(name: str, broken: Callable[[Example], list[int]]) -> None:
    renderer, conversation, found = rendered(name)
    for example, turns in zip(found.examples, turns_of(renderer, conversation, found), strict=True):
        renderer.prove(example, conversation, turns)
        with pytest.raises(SetAside, match="the proof failed"):
            renderer.prove(Example(example.input_ids, broken(example)), conversation, turns)


def turns_of(renderer: Renderer, conversation: Conversation, found: Rendered) -> list[list[Any]]:
    """The turns of each example."""
    turns = iter(renderer.turns(conversation))
    return [[next(turns) for _ in spans(example)] for example in found.examples]


@pytest.mark.parametrize("name", QUIRKS)
def test_evaluation_ends_where_training_does(name: str) -> None:
    """A sample's reference is its turn's as the last reply; its prompt is what stands in front of it in training."""
    renderer, conversation, found = rendered(name)
    samples = list(renderer.render_for_evaluation(conversation, max_prompt_length=None, max_new_tokens=99))
    trained = [
        (example.input_ids[:start], example.input_ids[start:end])
        for example in found.examples
        for start, end in spans(example)
    ]
    assert [sample.input_ids for sample in samples] == [prompt for prompt, _ in trained]
    assert samples[-1].output_ids == trained[-1][1]
    for sample, (_, reply) in zip(samples, trained, strict=True):
        assert sample.output_ids[:-1] == reply[:-1]
        assert {sample.output_ids[-1], reply[-1]} <= set(renderer.stop_ids)
