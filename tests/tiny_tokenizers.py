"""Tiny byte-level tokenizers and chat templates of the main families, built in the test: every text round-trips."""

import functools
import re
from collections.abc import Sequence
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Splitting = Literal["gpt2", "llama3"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# What stops a reply is the token that opens the next message.
GLM = (
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + ('observation' if message['role'] == 'tool' else "
    "message['role']) + '|>\n' + message['content'] }}{% for call in message.tool_calls %}"
    "{{ '<tool_call>' + call.function.name + '\n' + call.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Not prefix-stable: only the last reply shows its thought, an empty one too.
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GLM_TOKENS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
TOOL_TOKENS = ("<tool_call>", "</tool_call>")
THINK_TOKENS = ("<think>", "</think>")

_TEXTS = [
    "The assistant answers the user, and the system says how: in short sentences, if it can.",
    'name[Alimentum], area[city centre], {"name": "search_recipes", "arguments": {"ingredients": ["rice"]}}',
    "有些了解，它位于北京798艺术区，创办于2003年。我想去故宫玩，门票多少钱？",
    "system user assistant tool think function parameters 0123456789 \n\n",
    *["assistant\n\n"] * 20,  # a prompt's last line breaks are one token, as in real vocabularies
]
_LLAMA3_SPLITTING = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tiny_tokenizer(
    *,
    chat_template: str | None = CHATML,
    control_tokens: Sequence[str | AddedToken] = CHATML_TOKENS,
    plain_tokens: Sequence[str | AddedToken] = (),
    eos: str | None = "<|im_end|>",
    bos: str | None = None,
    pad: str | None = None,
    splitting: Splitting = "gpt2",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 500 entries with these added tokens.

    `control_tokens` are special; `plain_tokens` are added but not special, as Qwen has `<think>` and `<tool_call>`. An
    AddedToken says what else it does, such as to strip the space beside it.
    `pad` is eos unless given. "gpt2" and "llama3" are the two patterns that cut text before merges: they differ in what
    line breaks in front of a word become.
    """
    tokenizer = Tokenizer.from_str(_trained(splitting))
    tokenizer.add_special_tokens([_added(token, special=True) for token in control_tokens])
    tokenizer.add_tokens([_added(token, special=False) for token in plain_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token=pad or eos, chat_template=chat_template
    )


def _added(token: str | AddedToken, *, special: bool) -> AddedToken:
    return token if isinstance(token, AddedToken) else AddedToken(token, special=special, normalized=False)


@functools.cache
def _trained(splitting: Splitting) -> str:
    tokenizer = Tokenizer(models.BPE())
    if splitting == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_SPLITTING), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer.to_str()


def control_tokens_in(chat_template: str) -> list[str]:
    """All in a template's text that looks like a control token, e.g. `<|im_end|>`, `[INST]`, `<think>`."""
    literal = re.sub(r"\{#.*?#\}", "", chat_template, flags=re.DOTALL)
    found = re.findall(r"<[^<>\s{}'\"+]{2,40}>|<\|\"\|>|\[/?[A-Z_]{4,}\]", literal)
    return list(dict.fromkeys(found))


def llama3_tokenizer(splitting: Splitting) -> PreTrainedTokenizerFast:
    """With Llama 3's template, which opens every conversation with BOS."""
    return tiny_tokenizer(
        chat_template=LLAMA3,
        control_tokens=LLAMA3_TOKENS,
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        splitting=splitting,
    )
