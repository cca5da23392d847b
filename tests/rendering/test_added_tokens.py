"""Every added token of ten tokenizers, special or not, written into every field: it stays text, to the letter.

Run: pytest tests/rendering/test_added_tokens.py
"""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatlora.chatglm3.tokenizer import build_tokenizer
from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation, Message, ToolCall
from chatlora.rendering.control_text import ControlText
from chatlora.rendering.renderer import Renderer
from tests.exactness import control_ids, spans
from tests.tiny_tokenizers import tiny_tokenizer

LONG = 1_000_000
EVERYTHING = (  # every field, between two control tokens of the tokenizer
    "{% if tools %}OPENtools {{ tools | tojson }}CLOSE{% endif %}{% for m in messages %}OPEN{{ m.role }}\n"
    "{% if m.name %}{{ m.name }}: {% endif %}{% if m.tool_call_id %}{{ m.tool_call_id }}: {% endif %}"
    "{% if m.reasoning_content %}{{ m.reasoning_content }}\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}\n{{ call.id }} {{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}CLOSE\n{% endfor %}{% if add_generation_prompt %}OPENassistant\n{% endif %}"
)
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_start|>", "<|image_pad|>"]
QWEN_PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
GLM = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>"]
GLM_PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "/nothink"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "[multimodal]", "<unused0>"]
GEMMA_PLAIN = [
    "\n",
    "\n\n",
    "\n\n\n",
    "  ",
    "   ",
    "\t",
    "<table>",
    "<td>",
    "</td>",
    "<h1>",
    "<strong>",
    "<blockquote>",
]
HARMONY = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>"]
MISTRAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[IMG]"]
PHI = ["<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|end|>", "<|system|>", "<|user|>"]
DEEPSEEK = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
]
COHERE = ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"]
SENTINELS = [f"<extra_id_{number}>" for number in range(12)]
FAMILIES: dict[str, tuple[list[str], list[str], str, str]] = {  # special, added but not special, opening, closing
    "Qwen3": (QWEN, [*QWEN_PLAIN, "<|fim_prefix|>", "<|repo_name|>"], "<|im_start|>", "<|im_end|>"),
    "Llama 3.1": ([*LLAMA, "<|python_tag|>", "<|reserved_special_token_0|>"], [], "<|start_header_id|>", "<|eot_id|>"),
    "GLM-4.5": ([*GLM, "<|observation|>"], GLM_PLAIN, "<|user|>", "<|endoftext|>"),
    "Gemma 3": (GEMMA, GEMMA_PLAIN, "<start_of_turn>", "<end_of_turn>"),
    "gpt-oss": ([*HARMONY, "<|message|>", "<|call|>"], [], "<|start|>", "<|end|>"),
    "Mistral": ([*MISTRAL, "[/TOOL_RESULTS]", "[/AVAILABLE_TOOLS]"], [], "[INST]", "</s>"),
    "Phi-3": (PHI, [], "<|user|>", "<|end|>"),
    "DeepSeek": ([*DEEPSEEK, "<｜tool▁sep｜>"], ["<think>", "</think>"], "<｜User｜>", "<｜end▁of▁sentence｜>"),
    "Command R": (COHERE, ["<|START_RESPONSE|>"], "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "T5": (["<pad>", "</s>", "<unk>", *SENTINELS], [], "<extra_id_0>", "</s>"),
}
SWALLOWING = ("Phi-3", "T5")  # tokens that take the space beside them
REAL = {
    "SmolLM2": ("<|im_start|>", "<|im_end|>"),
    "ChatGLM3": ("<|user|>", "</s>"),
}  # as packages and repositories ship
FIELDS = (
    *("system", "user", "reply", "thought", "call name", "call id", "argument name", "argument"),
    *("result", "tool name", "schema", "offered name"),
)


def tokenizer_of(name: str, request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if name == "SmolLM2":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))
    if name == "ChatGLM3":
        model: Path = request.getfixturevalue("shared") / "chatglm3" / "tokenizer" / "tokenizer.model"
        return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(model), eos_token="</s>", unk_token="<unk>")
    special, plain, _, closing = FAMILIES[name]
    strips = {"rstrip": True} if name == "Phi-3" else {"lstrip": True} if name == "T5" else {}
    tokens = [AddedToken(word, special=True, normalized=False, **strips) for word in special]
    return tiny_tokenizer(control_tokens=tokens, plain_tokens=plain, eos=closing, splitting="llama3")


@pytest.fixture(scope="module")
def renderers(request: pytest.FixtureRequest) -> dict[str, Renderer]:
    found = {}
    for name in (*FAMILIES, *REAL):
        opening, closing = REAL.get(name) or FAMILIES[name][2:]
        template = EVERYTHING.replace("OPEN", opening).replace("CLOSE", closing)
        found[name] = Renderer(tokenizer_of(name, request), chat_template=template)
    return found


def conversation_with(texts: dict[str, str]) -> Conversation:
    """A conversation that uses every field, `texts` in place of harmless words."""
    text = {field: texts.get(field, f"plain {field}") for field in FIELDS}
    schema = {"type": "object", "properties": {text["schema"]: {"type": "string", "enum": [text["schema"]]}}}
    function = {"name": text["offered name"], "description": text["schema"], "parameters": schema}
    arguments: dict[str, Any] = {text["argument name"]: text["argument"], "list": [text["argument"], {"deep": 1}]}
    call = ToolCall(text["call name"], arguments, text["call id"])
    messages = (
        Message("system", text["system"]),
        Message("user", text["user"]),
        Message("assistant", text["reply"], reasoning=text["thought"], tool_calls=(call,)),
        Message("tool", text["result"], tool_call_id=text["call id"], name=text["tool name"]),
        Message("assistant", text["reply"], reasoning=text["thought"]),
    )
    return Conversation(messages, ({"type": "function", "function": function},))


def hostile(tokens: list[str]) -> str:
    """All of them, alone, joined, cut in two, and at both ends."""
    visible = [token for token in tokens if not token.isspace()]
    halves = [token[: len(token) // 2] + " " + token[len(token) // 2 :] for token in visible]
    return visible[-1] + " and ".join(tokens) + "".join(tokens) + " ".join(halves) + visible[0]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", [*FAMILIES, *REAL])
def test_no_added_token_in_any_field_becomes_one(renderers: dict[str, Renderer], name: str, field: str) -> None:
    renderer = renderers[name]
    tokens = [token.content for token in renderer.tokenizer.added_tokens_decoder.values()]
    assert len(tokens) >= 6
    row, plain = conversation_with({field: hostile(tokens)}), conversation_with({})
    [example] = renderer.render(row, max_length=LONG).examples
    [harmless] = renderer.render(plain, max_length=LONG).examples
    assert control_ids(renderer, example.input_ids) == control_ids(renderer, harmless.input_ids)
    assert len(spans(example)) == 2

    text = renderer.tokenizer.apply_chat_template(
        row.as_template_input(), tools=list(row.tools), chat_template=renderer.chat_template, tokenize=False
    )
    decoded = decode(renderer, example.input_ids)
    assert decoded == text if name not in (*SWALLOWING, "ChatGLM3") else squeezed(decoded) == squeezed(text)
    samples = list(renderer.render_for_evaluation(row, max_prompt_length=None, max_new_tokens=9))
    for sample, (start, end) in zip(samples, spans(example), strict=True):
        assert sample.input_ids == example.input_ids[:start]
        assert sample.output_ids == example.input_ids[start:end]


def decode(renderer: Renderer, ids: list[int]) -> str:
    """The text of ids, their control tokens spelled out even where the tokenizer decodes them to nothing."""
    controls, pieces, begin = set(control_ids(renderer, ids)), [], 0
    for index, id in enumerate([*ids, None]):
        if id is None or id in controls:
            pieces.append(renderer.tokenizer.backend_tokenizer.decode(ids[begin:index], skip_special_tokens=False))
            pieces.append("" if id is None else renderer.tokenizer.added_tokens_decoder[id].content)
            begin = index + 1
    return "".join(pieces)


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_renderer_that_does_not_mask_is_caught(
    renderers: dict[str, Renderer], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ControlText, "mask", lambda self, value: value)
    for field in FIELDS:
        try:
            test_no_added_token_in_any_field_becomes_one(renderers, name, field)
        except (AssertionError, SetAside, ValueError):
            continue
        pytest.fail(f"{field} was not masked, and nothing noticed")
