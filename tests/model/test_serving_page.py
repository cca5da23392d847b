"""docs/serving.md: which server takes which family's adapter, asked of the servers' rules in tests/servers.py.

`python -m tests.model.test_serving_page --write` writes the table anew. That the strength is right wherever a server
takes it is what tests/model/test_servers.py computes.
"""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from chatlora.config import LoraConfig
from chatlora.model.adapter_folder import save_adapter
from chatlora.model.lora import add_lora, trainable
from chatlora.model.servers import not_taken_in
from tests.model_families import FAMILIES, build_base
from tests.servers import SERVERS, RefusedError, adapter_in, scales

DOCS = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
BEGIN, END = "<!-- table: python -m tests.model.test_serving_page --write -->", "<!-- end of the table -->"
DORA = "any, with `lora.variant: dora`"


def table() -> str:
    """Of the form that a training writes by default, and of DoRA, which no family changes anything about."""
    head = ["family", *SERVERS, "experts", "instead"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [row(family, family, LoraConfig()) for family in FAMILIES]
    return "\n".join([*lines, row(DORA, "Llama", LoraConfig(variant="dora"))])


def row(name: str, family: str, settings: LoraConfig) -> str:
    base = build_base(family)
    model = add_lora(base, settings, seed=0)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_adapter(model, dict(trainable(model)), folder)
        adapter, instead = adapter_in(folder), not_taken_in(model.get_base_model(), folder)
    plain, cells = build_base(family), []
    for server in SERVERS:
        try:
            same = scales(server, adapter, plain) == scales("PEFT", adapter, plain)
            cells.append("yes" if same else "at another strength")
        except RefusedError:
            cells.append("no")
    experts = "stacked" if adapter.stacked else "single" if adapter.single else "-"
    return f"| {' | '.join([name, *cells, experts, ways_on(instead)])} |"


def ways_on(instead: dict[str, str]) -> str:
    """Servers of which the same is said, together."""
    by_word: dict[str, list[str]] = {}
    for server, told in instead.items():
        by_word.setdefault(told, []).append(server)
    ways = [f"{', '.join(servers)}: {told}" for told, servers in by_word.items()]
    return re.sub(r"(--[\w-]+|lora\.\w+)", r"`\1`", "; ".join(ways)) or "-"


def test_the_table_in_docs_is_what_the_servers_rules_say() -> None:
    text = DOCS.read_text(encoding="utf-8")
    written = text.split(BEGIN)[1].split(END)[0].strip()
    assert written == table(), "write it anew: python -m tests.model.test_serving_page --write"
    assert "another strength" not in written


if __name__ == "__main__" and "--write" in sys.argv:
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
