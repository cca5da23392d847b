"""What a row tells the chat template for itself alone (`chat_template_kwargs`), over `model.chat_template_kwargs`.

A template under other arguments is another one: it has its own stop tokens, and its own proof.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from chatlora.errors import SetAside
from chatlora.rendering.control_text import ControlText
from chatlora.rendering.limits import PROBE, bounded
from chatlora.rendering.proof import Proof
from chatlora.rendering.template import ChatTemplate
from chatlora.rendering.turns import StopTokens

MOST_KEPT = 64  # arguments that differ; sets have two or three, or else a text of its own in each row
OF_ROW = "the row's chat_template_kwargs"
UNKNOWN = f"{OF_ROW} say what the chat template does not read"
SPELLS_CONTROL = f"{OF_ROW} spell a control token"
OTHER_STOP = f"under {OF_ROW} replies end with another token"


class Under(NamedTuple):
    """A template and what hangs on it."""

    template: ChatTemplate
    stops: StopTokens
    proof: Proof


class RowKwargs:
    """The templates under the arguments of rows, each made once. Picklable."""

    def __init__(self, tokenizer: Any, text: ControlText, generation_stop_ids: Sequence[int]) -> None:
        self._tokenizer, self._text, self._more = tokenizer, text, tuple(generation_stop_ids)
        self._kept: dict[str, Under] = {}

    def under(self, template: ChatTemplate, kwargs: Mapping[str, Any], stop_ids: Sequence[int]) -> Under:
        """`template` under `kwargs` as well. Raises SetAside where that loses what they say, or cannot be exact."""
        key = json.dumps(kwargs, sort_keys=True, default=str)
        if key not in self._kept:
            self._refuse(template, kwargs)
            if len(self._kept) == MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._made(replace(template, kwargs={**template.kwargs, **kwargs}))
        found = self._kept[key]
        if not set(found.stops.ids) <= set(stop_ids):
            raise SetAside(OTHER_STOP)
        return found

    def _refuse(self, template: ChatTemplate, kwargs: Mapping[str, Any]) -> None:
        if self._text.mask(dict(kwargs)) != dict(kwargs):
            raise SetAside(SPELLS_CONTROL)
        lost = [name for name, value in kwargs.items() if value and value is not True and not template.knows(name)]
        if lost:
            raise SetAside(UNKNOWN, ", ".join(sorted(lost)))

    def _made(self, template: ChatTemplate) -> Under:
        with bounded(PROBE):
            stops = StopTokens(template, self._text.spellings, self._tokenizer.eos_token_id, self._more)
        return Under(template, stops, Proof(self._tokenizer, template, self._text, stops.ids))
