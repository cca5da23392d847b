"""What `chatlora merge` was asked for: the adapter, its base, and the rows on which the result is checked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from chatlora.config import ModelConfig
from chatlora.config_files import config_from_file
from chatlora.data.held_out import kept_by
from chatlora.errors import ModelError
from chatlora.evaluation.command_line import Request, parse, run_of_adapter
from chatlora.evaluation.setup import rendered
from chatlora.hub import why_unreachable
from chatlora.merging.probes import Probe, built_in_probes, probes_of_samples
from chatlora.model.adapter_folder import as_adapter_was_trained
from chatlora.model.folder import base_of, fault_in_folder, find_adapter, locate, refuse_no_model
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
    name = base or base_of(adapter)
    if name is None:
        raise ModelError(f"{adapter}/adapter_config.json does not name a base model; name it with --base")
    model = as_adapter_was_trained(ModelConfig(name_or_path=name), adapter)
    try:
        refuse_no_model(model)
    except ModelError as error:
        raise ModelError(*error.problems, "--base M names the base model where it is now") from None
    request = _rows(adapter, name, data)
    return Asked(model, folder_of(model), adapter, load_tokenizer(model, adapter), request, precision)


def _rows(adapter: Path, base: str, data: str | None) -> Request | None:
    """The rows named, else the validation rows of the run that the adapter lies in, else its test rows, else none."""
    nowhere = ["--output_dir", str(adapter / "no-results")]  # of what is evaluated; nothing is
    run = run_of_adapter(adapter)
    of_run = [str(adapter), "--model.name_or_path", base, *nowhere]
    if data is not None:
        alone = ["--model", base, "--adapter", str(adapter), *nowhere]
        return parse([*(alone if run is None else of_run), "--data", data])
    if run is None:
        return None
    config = config_from_file(run / "config.yaml").data
    for split, named in (("validation", config.validation_sets), ("test", config.test)):
        # A share of few rows may be none.
        if kept_by(run, split) != [] if split in config.shares else named:
            return parse([*of_run, "--split", split])
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
