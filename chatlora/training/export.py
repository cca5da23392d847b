"""What happens after the last step: the adapter, as others load it."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from chatlora.checkpoint_names import home_of
from chatlora.config import Config
from chatlora.disk import written_beside
from chatlora.distributed.memory import NOT_EXPORTED, out_of_memory_told
from chatlora.distributed.runtime import Runtime
from chatlora.errors import ModelError
from chatlora.model.adapter_check import why_not_served
from chatlora.model.adapter_folder import (
    save_adapter,
    save_generation_config,
    save_template_settings,
    served_class,
)
from chatlora.model.servers import not_taken_in
from chatlora.rendering.renderer import Renderer
from chatlora.run_directory import RunDirectory
from chatlora.training.card import Use, write_card
from chatlora.training.checkpoint import read_checkpoint, why_broken
from chatlora.training.state import gather_adapter, let_go


@out_of_memory_told(NOT_EXPORTED)
def export_adapter(
    config: Config,
    runtime: Runtime,
    run: RunDirectory,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
) -> None:
    """The last step's adapter, and the best one's, each with tokenizer, chat template, stop tokens and card."""
    weights = gather_adapter(runtime, model, optimizer)
    if not runtime.is_main:
        return
    let_go(config.checkpoint, run)  # a kill may have come between the last save and this

    def export(weights: dict[str, torch.Tensor], folder: Path, step: int) -> None:
        """The PEFT adapter of a step, whole when it appears."""
        base = adapted.get_base_model()
        with written_beside(folder) as beside:
            save_adapter(adapted, weights, beside, config.lora.expert_format)
            if config.model.chat_template is not None:
                tokenizer.chat_template = renderer.chat_template
            tokenizer.save_pretrained(beside)
            save_template_settings(beside, renderer.chat_template_kwargs, config.model.chat_template_date)
            save_generation_config(base, renderer.stop_ids, beside)
            use = Use(served_class(base).__name__, renderer.chat_template_kwargs, not_taken_in(base, beside))
            write_card(beside, config, run, step, use)
        fault = why_not_served(adapted, weights, folder, runtime.autocast_dtype)
        if fault:
            raise ModelError(
                f"the adapter in {folder} is not what was trained: {fault}; what is in {run.checkpoints} is"
            )

    export(weights, run.adapter, run.step)
    run.say(f"the adapter is in {run.adapter}")
    for server, what in not_taken_in(adapted.get_base_model(), run.adapter).items():
        run.say(f"warning: {server} {what}")
    best = run.best_step()
    if best is not None and config.checkpoint.keep_best:
        home = home_of(run.checkpoints, best)
        fault = why_broken(home)
        if fault:
            run.say(f"there is no adapter-best: {home} is broken: {fault}")
            return
        export(read_checkpoint(home).adapter, run.path / "adapter-best", best)
        run.say(f"the adapter with the best validation loss, of step {best}, is in {run.path / 'adapter-best'}")
