"""What `chatlora merge` was asked for: the adapter, its base, and the rows on which the result is checked."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from chatlora.config import ModelConfig
from chatlora.config_files import config_from_file
from chatlora.errors import ModelError
from chatlora.evaluation.command_line import Request, parse
from chatlora.evaluation.setup import rendered
from chatlora.hub import why_unreachable
from chatlora.merging.probes import Probe, built_in_probes, probes_of_samples
from chatlora.model.adapter_folder import as_adapter_was_trained
from chatlora.model.folder import fault_in_folder, find_adapter, locate, refuse_no_model
from chatlora.model.loading import load_tokenizer

FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class Asked:
    """folder: the base's files. request: the rows to check on, as evaluate.py reads them; None: built-in texts."""

    base: ModelConfig
    folder: Path
    adapter: Path
    tokenizer: PreTrainedTokenizerBase
    request: Request | None
    precision: torch.dtype

    def probes(self, say: Callable[[str], None]) -> list[Probe]:
        """Raises DataError where the rows cannot be read."""
        samples = [] if self.request is None else rendered(self.request).samples
        chosen = probes_of_samples(samples)
        if self.request is None or not chosen:
            say("no rows of the run are known: the check is on built-in texts; --data FILE names better ones")
            return built_in_probes(self.tokenizer)
        paths = ", ".join(source.path for source in self.request.sources)
        say(f"checked on {len(chosen)} of {len(samples):,} turns of {paths}")
        return chosen


def asked_for(given: Path, base: str | None, data: str | None, precision: torch.dtype) -> Asked:
    """given: a run directory or an adapter's folder. base: where the base is now, if not where it was in training."""
    adapter = find_adapter(given)
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    name = base or settings["base_model_name_or_path"]
    revision = settings.get("revision") if base is None else None
    model = as_adapter_was_trained(ModelConfig(name_or_path=name, revision=revision), adapter)
    refuse_no_model(model)
    request = _rows(given, adapter, name, data)
    return Asked(model, folder_of(model), adapter, load_tokenizer(model, adapter), request, precision)


def _rows(given: Path, adapter: Path, base: str, data: str | None) -> Request | None:
    """The rows named, else the run's validation rows, else its test rows, else none."""
    nowhere = ["--output_dir", str(adapter / "no-results")]  # of what is evaluated; nothing is
    is_run = (given / "config.yaml").is_file()
    if data is not None:
        return parse(["--model", base, "--adapter", str(adapter), "--data", data, *nowhere])
    if not is_run:
        return None
    held_out = config_from_file(given / "config.yaml").data
    splits: Sequence[tuple[str, bool]] = (
        ("validation", bool(held_out.validation_sets or "validation" in held_out.shares)),
        ("test", bool(held_out.test)),
    )
    for split, has_rows in splits:
        if has_rows:
            return parse([str(given), "--split", split, "--model.name_or_path", base, *nowhere])
    return None


def folder_of(model: ModelConfig) -> Path:
    """The folder with the model's files; one of the hub is fetched, or taken from its cache where it cannot be."""
    where = locate(model.name_or_path)
    if not Path(where).is_dir():
        offline = why_unreachable()
        try:
            where = snapshot_download(
                where, revision=model.revision, allow_patterns=list(FETCHED), local_files_only=offline is not None
            )
        except (OSError, ValueError) as error:
            reason = offline or " ".join(str(error).split())
            raise ModelError(
                f"{model.name_or_path}: its files cannot be had ({reason}); --base FOLDER names them on this machine"
            ) from None
    fault = fault_in_folder(Path(where), "model")
    if fault:
        raise ModelError(fault)
    return Path(where)
