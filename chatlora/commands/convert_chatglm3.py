"""`chatlora convert-chatglm3 SRC DST`: an original ChatGLM3 checkpoint or adapter -> native GLM, no remote code."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from chatlora.progress import print_line


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="chatlora convert-chatglm3",
        description="Convert a ChatGLM3 folder (6B, 32k, 128k) into one that transformers loads without remote code. "
        "The same command again goes on after an interruption, and checks a finished conversion.",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="the original folder; with --adapter, the adapter's")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write")
    parser.add_argument("--adapter", action="store_true", help="SRC is a LoRA adapter of the original model")
    parser.add_argument("--base", metavar="NATIVE", type=Path, help="with --adapter: the converted base model's folder")
    given = parser.parse_args(list(argv))
    if given.base is not None and not given.adapter:
        parser.error("--base goes with --adapter")
    if given.adapter:
        from chatlora.chatglm3.adapter import convert_adapter

        convert_adapter(given.source, given.target, given.base, print_line)
    else:
        from chatlora.chatglm3.checkpoint import convert_checkpoint

        convert_checkpoint(given.source, given.target, print_line)
