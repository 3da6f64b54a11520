"""The model and what goes with it: there or not, complete or not, by their headers. No weights are read."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from service.errors import StartupError
from service.findings import Finding, shown_bytes
from service.settings import Settings
from service.worker import ip_adapter_file
from service.worker.checkpoint_folder import examine_folder, examine_safety_checker
from service.worker.checkpoint_source import is_hub_id, locate
from service.worker.ip_adapter import DEFAULT_ENCODER
from service.worker.single_file import examine_file
from service.worker.textual_inversion import examine_embeddings
from service.worker.weight_files import check_whole

_TOPIC = "model"


def survey_model(settings: Settings) -> Iterator[Finding]:
    """The model, its safety checker, textual inversions and IP-Adapter."""
    path = None
    try:
        path = locate(settings.model_copy(update={"offline": True}), lambda _stage: None)
    except StartupError as error:
        yield _missing(settings, error)
    if path is not None:
        yield from _checked(_TOPIC, lambda: _model(settings, path))
    if settings.embeddings_dir is not None:
        folder = settings.embeddings_dir
        yield from _checked("textual inversions", lambda: _embeddings(folder))
    if settings.ip_adapter is not None or settings.ip_adapter_image_encoder is not None:
        yield from _checked("IP-Adapter", lambda: [_ip_adapter(settings)])


def _checked(topic: str, examine: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What was found, or why `serve` would end."""
    try:
        return list(examine())
    except StartupError as error:
        return [Finding(topic, "fail", str(error))]
    except Exception as error:  # noqa: BLE001 - whatever is in the files, the report goes on
        return [Finding(topic, "fail", f"looking at it failed: {type(error).__name__}")]


def _missing(settings: Settings, error: StartupError) -> Finding:
    """A hub's model may still be fetched."""
    if not is_hub_id(settings):
        return Finding(_TOPIC, "fail", str(error), "name a folder, a .safetensors file or a hub id that there is")
    if settings.offline:
        return Finding(_TOPIC, "fail", str(error), "fetch it once without INPAINT_OFFLINE")
    return Finding(
        _TOPIC,
        "warn",
        f"{settings.model} is not in the local cache: serve fetches it first",
        "whether it exists and the hub can be reached was not tried; where a licence has to be accepted, set HF_TOKEN",
        {"needs_download": True},
    )


def _model(settings: Settings, path: Path) -> Iterator[Finding]:
    name = settings.model_name
    if path.is_file():
        examine_file(path, name=name)
        kind, files, has_checker = "a single file", [path], False
    else:
        parts = examine_folder(path, name=name, variant=settings.variant)
        files = [file for part in parts.values() for file in part]
        has_checker = "safety_checker" in parts
        kind = "the bundled demo" if settings.is_bundled_model else "a folder in diffusers format"
        if any(file.suffix != ".safetensors" for file in files):
            kind = "a folder that Flax saved"
    num_bytes = sum(file.stat().st_size for file in files)
    yield Finding(
        _TOPIC,
        "ok",
        f"{name}, {kind}: {shown_bytes(num_bytes)} of weights, complete",
        "paints simple drawn scenes; for photographs name a checkpoint with --model"
        if settings.is_bundled_model
        else "",
        {"bytes": num_bytes, "num_files": len(files), "needs_download": False},
    )
    yield _safety_checker(settings, has_own=has_checker)


def _safety_checker(settings: Settings, *, has_own: bool) -> Finding:
    topic = "safety checker"
    if settings.safety_checker is not None:
        folder = settings.safety_checker.expanduser()
        try:
            examine_safety_checker(folder, name=folder.name)
        except StartupError as error:
            return Finding(topic, "fail", str(error))
        return Finding(topic, "ok", f"that in {folder}")
    if has_own:
        return Finding(topic, "ok", "the model's own")
    hint = "name one's folder in INPAINT_SAFETY_CHECKER"
    if settings.allow_unchecked:
        return Finding(topic, "warn", "none: pictures are never flagged, as INPAINT_ALLOW_UNCHECKED allows", hint)
    return Finding(topic, "fail", "none", f"{hint}, or set INPAINT_ALLOW_UNCHECKED=true to serve without")


def _embeddings(folder: Path) -> Iterator[Finding]:
    found, pickles = examine_embeddings(folder)
    topic, facts = "textual inversions", {"count": len(found)}
    if pickles:
        text = f"{len(found)} in {folder}; {len(pickles)} files are pickles, which are not loaded"
        yield Finding(topic, "warn", text, "convert them to safetensors", facts)
    else:
        yield Finding(topic, "ok", f"{len(found)} in {folder}", "", facts)


def _ip_adapter(settings: Settings) -> Finding:
    topic = "IP-Adapter"
    if settings.ip_adapter is None:
        raise StartupError("INPAINT_IP_ADAPTER_IMAGE_ENCODER is set without INPAINT_IP_ADAPTER")
    path = ip_adapter_file.locate(settings.ip_adapter)
    check_whole(path, "IP-Adapter")
    encoder = settings.ip_adapter_image_encoder
    folder = (encoder or path.parent / DEFAULT_ENCODER).expanduser()
    if not folder.is_dir():
        if encoder is not None:
            raise StartupError(f"image encoder {str(encoder)!r} does not exist")
        hint = "name one in INPAINT_IP_ADAPTER_IMAGE_ENCODER"
        return Finding(topic, "warn", f"{path.name}, without image encoder: clients send embeddings", hint)
    return Finding(topic, "ok", f"{path.name}, image encoder {folder.name}")
