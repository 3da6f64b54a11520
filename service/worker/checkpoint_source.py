"""Where a checkpoint is: with the package, on disk, or on the model hub."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from diffusers import DiffusionPipeline
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from service.errors import StartupError, first_line
from service.settings import Settings

logger = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).parent / "models" / "demo"


def locate(settings: Settings, on_stage: Callable[[str], None]) -> Path:
    """The folder of the checkpoint, bundled, local or fetched from the hub into its cache; or its one file.

    Args:
        settings: The operator's settings.
        on_stage: Told what is being done.

    Raises:
        StartupError: There is none.
    """
    if settings.is_bundled_model:
        return BUNDLED_FOLDER
    path = Path(settings.model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if not is_hub_id(settings):
        state = "is neither a folder in diffusers format nor a .safetensors file" if path.exists() else "does not exist"
        raise StartupError(f"model {settings.model!r} {state}")
    on_stage(f"looking {settings.model} up in the local cache" if settings.offline else f"fetching {settings.model}")
    try:
        return Path(
            DiffusionPipeline.download(
                settings.model,
                revision=settings.revision,
                variant=settings.variant,
                use_safetensors=True,
                local_files_only=settings.offline,
            )
        )
    except Exception as error:
        logger.debug("download failed", exc_info=error)
        at_revision = f" at revision {settings.revision!r}" if settings.revision else ""
        where = "the local cache (offline)" if settings.offline else "the model hub"
        reason = _reason(error, is_offline=settings.offline)
        raise StartupError(f"cannot get model {settings.model!r}{at_revision} from {where}: {reason}") from error


def is_hub_id(settings: Settings) -> bool:
    """Whether the model is one of the hub's, and neither the bundled one nor a path."""
    is_path = Path(settings.model).expanduser().exists() or settings.model_name != settings.model
    return not settings.is_bundled_model and not is_path


def _reason(error: Exception, *, is_offline: bool) -> str:
    """Why the hub did not give a model, in the operator's words."""
    for cause in _causes(error):
        match cause:
            case GatedRepoError():
                return "its licence has to be accepted there, and HF_TOKEN set"
            case RepositoryNotFoundError():
                return "there is no such model, or it is private and HF_TOKEN is not set"
            case RevisionNotFoundError():
                return "there is no such revision"
            case httpx.TransportError() | ConnectionError():
                return "it does not answer, and the local cache does not have the model"
            case FileNotFoundError() if is_offline:
                return "it is not there, or not whole"
    return first_line(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
