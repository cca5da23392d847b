"""Copies of a tokenizer, made from its state (tokenizer.json): one that adds nothing, one with other control tokens."""

import json
from typing import Any

from tokenizers import Tokenizer


def plain_copy(state: dict[str, Any]) -> Tokenizer:
    """A tokenizer of this state that adds nothing, cuts nothing and tells offsets with the whitespace they hold."""
    return Tokenizer.from_str(json.dumps({**state, "post_processor": None, "truncation": None, "padding": None}))


def renamed(state: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The tokenizer's state with its added tokens under other names, in the model's vocabulary too.

    There they may be reached by merges, or whole (Unigram, WordLevel, `ignore_merges`).
    """
    for token in state["added_tokens"]:
        if token["content"] in names:
            # Not normalized, or the private spelling might change before it is looked for.
            token.update(content=names[token["content"]], normalized=False, single_word=False)
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): id for word, id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if left not in names and right not in names and left + right not in names
        ]
    return state
