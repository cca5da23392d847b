"""`chatlora NAME ...`: each command in a file of its own, imported when it is called."""

from collections.abc import Sequence
from importlib import import_module

from chatlora.errors import ConfigError, did_you_mean, run_as_script

COMMANDS = {
    "train": "train a LoRA adapter: train.py, on every GPU here, from any folder",
    "evaluate": "let it answer held-out conversations, and score that: evaluate.py, likewise",
    "chat": "talk to a run, an adapter or a model; base and adapter side by side, or scripted by a pipe",
    "inspect": "what would be trained on: every row's account, lengths, and rows with their targets in colour",
    "suspects": "rows of a finished run that are most likely mislabelled, foreign or garbled, with their worst tokens",
    "merge": "base and adapter -> one model that any server takes, checked against them",
    "convert-chatglm3": "ChatGLM3 checkpoints and adapters -> native GLM, no remote code",
    "invariance": "prove that a config gives one gradient, however many processes and micro-batches compute it",
    "schema": "print the JSON schema of a config file, from which editors complete",
}
USAGE = "usage: chatlora COMMAND ...\n\n" + "\n".join(f"  {name:<16} {meaning}" for name, meaning in COMMANDS.items())


def main() -> None:
    run_as_script(dispatch)


def dispatch(argv: Sequence[str]) -> None:
    """Call the command that the first word names with the words after it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    name, *rest = argv
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; there is {', '.join(COMMANDS)}"
        raise ConfigError(f"there is no command '{name}'{hint}")
    import_module(f"chatlora.commands.{name.replace('-', '_')}").run(rest)
