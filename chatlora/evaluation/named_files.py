"""The files that an evaluation names, looked at before anything heavy is imported."""

from chatlora.config import with_absolute_paths
from chatlora.evaluation.command_line import Request
from chatlora.training.named_files import named_adapter, named_by_model, named_rows, refuse_missing


def refuse_missing_files(request: Request) -> None:
    """Raise ConfigError with every file and folder that is named and is not there. The hub is not asked."""
    refuse_missing(
        *named_rows(f"data.{request.split}" if request.of_run else "--data", request.sources, request.split),
        *named_by_model(with_absolute_paths(request.config).model),
        *named_adapter("adapter", request.adapter),
    )
