"""Rows prepared as a training would, from the tokenizer alone, and those that were shortened once more in full."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerBase

from chatlora.cache import cache_root
from chatlora.config import Config
from chatlora.data.dataset import PreparedData, Say, prepare_training_data
from chatlora.data.workers import Effort, Work, outcomes
from chatlora.inspection.account import places_named
from chatlora.inspection.lengths import Lengths, lengths_of
from chatlora.inspection.rows import Rows
from chatlora.model.loading import load_tokenizer, renderer_for
from chatlora.reading.conversation import Conversation
from chatlora.rendering.examples import NOTHING_LEFT, Example
from chatlora.rendering.renderer import Renderer

WHOLE = 10_000_000  # a max_length that shortens nothing


@dataclass(frozen=True)
class Inspected:
    """What is known of the rows that a config names. rows: of `data.train`, held out ones among them."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    data: PreparedData
    rows: Rows
    say: Say

    def conversations(self, places: set[str]) -> Iterator[tuple[int, Conversation]]:
        """The rows of `data.train` that stand there, with their sources."""
        for number, source in enumerate(self.data.inputs):
            for conversation in source.conversations(self.config.data.system, []):
                if conversation.place in places:
                    yield number, conversation

    def lengths(self) -> Lengths:
        """Of all rows as they are before `max_length`."""
        shortened = self._shortened()
        whole = ((number, place) for number, place in enumerate(self.rows.places) if place not in shortened)
        as_kept = ((place, self.rows.examples(number)) for number, place in whole)
        return lengths_of(chain(as_kept, self._in_full(shortened)))

    def _shortened(self) -> set[str]:
        sources = self.data.ledger["sources"][: len(self.data.inputs)]
        cut = {one["place"] for source in sources for one in source["cut"]}
        lost = {
            one["place"] for source in sources for one in source["set_aside"] if one["reason"] in NOTHING_LEFT.values()
        }
        return cut | lost

    def _in_full(self, places: set[str]) -> Iterator[tuple[str, Sequence[Example]]]:
        if not places:
            return
        work = Work(self.renderer, WHOLE, "fit", self.config.data.supervise)
        found = outcomes(self.conversations(places), work, len(places), Effort(), self.say)
        for _, conversation, outcome in found:
            if outcome.rendered is not None:
                yield conversation.place or "", outcome.rendered.examples


def inspected(config: Config, say: Say) -> Inspected:
    """The rows rendered and proved, or found so in the cache, however few a training would be left with.

    Raises DataError where rows cannot be read.
    """
    tokenizer = load_tokenizer(config.model)
    renderers: list[Renderer] = []

    def make_renderer(any_reasoning: bool) -> Renderer:
        renderers.append(renderer_for(tokenizer, config.model, config.data, any_reasoning=any_reasoning))
        return renderers[0]

    data = prepare_training_data(
        config.data, config.run.seed, make_renderer, cache=cache_root(), say=say, refuse_lost=False
    )
    return Inspected(config, tokenizer, renderers[0], data, Rows(data.train.store), say)


def named_rows(found: Inspected) -> Mapping[str, str]:
    return places_named(found.data.ledger)


def as_read(found: Inspected, place: str) -> Conversation | None:
    return next((conversation for _, conversation in found.conversations({place})), None)
