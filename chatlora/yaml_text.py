"""YAML text -> plain values, or one sentence that says where it is wrong.

Time and memory are bounded by the length of the text, whatever its aliases and brackets would come to.
"""

from typing import Any

import yaml

from chatlora.errors import ConfigError

DEEPEST = 100  # lists and mappings within each other
MOST_REPEATED = 10_000  # values that aliases stand for: ten lines of them can stand for billions


def parse_yaml(text: str, name: str) -> Any:
    """`name` says in an error what the text is. Raises ConfigError, also where a key stands twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{name} is not valid YAML{_told(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


def _told(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
    context = "" if error.context is None or error.problem is None else f" {error.context}"
    begins = "" if not context or error.context_mark is None else f" that begins at line {error.context_mark.line + 1}"
    return f"{place}: {error.problem or error.context}{context}{begins}"


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.values = self.repeated = 0
        self.sizes: dict[yaml.Node | None, int] = {}  # of each finished node: the values in it, aliases written out

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        mark, is_alias = event.start_mark, isinstance(event, yaml.AliasEvent)
        if self.depth == DEEPEST:
            raise _error(f"lists and mappings are nested more than {DEEPEST} deep: take brackets or levels out", mark)
        before = self.values
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias:
            if node not in self.sizes:
                raise _error("an alias stands within what it names: write out what is meant", mark)
            self.values += self.sizes[node]
            self.repeated += self.sizes[node]
            if self.repeated > MOST_REPEATED:
                raise _error(f"aliases stand for more than {MOST_REPEATED:,} values: write out those that matter", mark)
        else:
            self.values += 1
            self.sizes[node] = self.values - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, not where values are made: merged keys stand by then among the mapping's own, which may go over them.
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key is a list or a mapping: write one word in front of the colon", key.start_mark)
            if (key.tag, key.value) in seen:
                raise _error(f"'{key.value}' stands twice: leave one of them out", key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # raises ValueError where Python refuses to spell it, in a setting as in the error about it
            return value
        except (ValueError, ArithmeticError, LookupError, AttributeError) as error:
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind, text = node.tag.rpartition(":")[2], shortened(node.value)
            raise _error(
                f"{text} looks like a value of type {kind} and is none: put text in quotes", node.start_mark
            ) from error


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    """place: a Mark, of the parser in Python or of that in C."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place)


def shortened(value: Any) -> str:
    """A value as an error quotes it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
