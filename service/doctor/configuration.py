"""What the settings ask for: ports, keys, folders."""

import contextlib
import ipaddress
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

from service.api.keys import load_keys
from service.api.server import listen, require_tracing
from service.doctor.machine import check_folder
from service.engine.adapters import REFUSED_SUFFIXES, adapter_folder
from service.engine.lora_file import check_safetensors
from service.errors import InpaintError, StartupError
from service.findings import Finding
from service.settings import Settings, given_variables, traces_url


def survey_environment() -> Iterator[Finding]:
    """The variables that are set, by name: values may be secrets."""
    known, unknown = given_variables()
    yield Finding("environment", "ok", ", ".join(known) or "no setting comes from it", "", {"count": len(known)})
    if unknown:
        yield Finding("environment", "warn", f"no settings: {', '.join(unknown)}", "serve --help lists all of them")


def survey_configuration(settings: Settings) -> Iterator[Finding]:
    """One finding after the other, most of which need no model."""
    yield _ports(settings)
    yield _keys(settings)
    if settings.lora_dir is not None or settings.is_bundled_model:
        yield _loras(settings)
    if settings.compile_cache is not None:
        # A worker that compiles does not start without; one on a CPU never looks for it.
        is_needed = settings.compile != "off" and settings.devices != ("cpu",)
        yield check_folder("compiled code", settings.compile_cache.expanduser(), is_needed=is_needed)
    yield from _traces(settings)


def survey_hub_cache() -> Finding:
    """Where a model of the hub will be kept."""
    return check_folder("model cache", Path(constants.HF_HUB_CACHE), is_needed=True)


def _ports(settings: Settings) -> Finding:
    """Both ports, as `serve` takes them."""
    ports = [settings.port] if settings.metrics_port is None else [settings.port, settings.metrics_port]
    text = f"{settings.host}:{settings.port}"
    if settings.metrics_port is not None:
        text += f", metrics on port {settings.metrics_port}"
    try:
        with contextlib.ExitStack() as sockets:
            for port in ports:
                sockets.enter_context(listen(settings.host, port))
    except StartupError as error:
        return Finding("address", "fail", str(error), "end what listens there, or take another with --port and --host")
    return Finding("address", "ok", f"{text}, free", "", {"host": settings.host, "port": settings.port})


def _keys(settings: Settings) -> Finding:
    try:
        keys = load_keys(settings)
    except StartupError as error:
        return Finding("API keys", "fail", str(error))
    facts = {"num_clients": len(keys.clients), "num_admins": len(keys.admins)}
    if not keys.clients and not _is_loopback(settings.host):
        text = f"none of clients, and {settings.host} can be reached from elsewhere"
        return Finding("API keys", "warn", text, "whoever reaches it may paint: set INPAINT_API_KEYS_FILE", facts)
    if not keys.clients and not keys.admins:
        return Finding("API keys", "ok", "none: whoever is on this machine may paint", "", facts)
    return Finding("API keys", "ok", f"{len(keys.clients)} of clients, {len(keys.admins)} of administrators", "", facts)


def _traces(settings: Settings) -> Iterator[Finding]:
    """Where they go, if anywhere, and whether the packages for that are there; the collector is not asked."""
    try:
        url = traces_url(settings)
        if url is None:
            return
        require_tracing()
    except StartupError as error:
        yield Finding("traces", "fail", str(error))
        return
    # Not the whole URL: it may hold a password.
    yield Finding("traces", "ok", f"sent to {urlsplit(url).hostname}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _loras(settings: Settings) -> Finding:
    """The folder, and whether each file in it is what its name says."""
    folder = settings.lora_dir
    if folder is not None:
        try:
            names = [path.name for path in folder.iterdir()]
        except FileNotFoundError:
            return check_folder("LoRAs", folder, is_needed=True)  # `serve` makes it.
        except OSError as error:
            text = f"cannot use the folder for LoRAs {folder}: {error.strerror}"
            return Finding("LoRAs", "fail", text, "make it readable for the user that serves")
    else:
        names = []
    adapters = adapter_folder(settings)
    entries, broken = adapters.entries(), []
    for entry in entries:
        try:
            check_safetensors(adapters.resolve(entry.name)[0])
        except (InpaintError, OSError):
            broken.append(entry.name)
    refused = [name for name in names if name.lower().endswith(REFUSED_SUFFIXES)]
    text = f"{len(entries) - len(broken)}" + ("" if folder is None else f" in {folder}")
    facts = {"count": len(entries) - len(broken), "num_refused": len(broken) + len(refused)}
    if broken or refused:
        shown = ", ".join(ascii(name) for name in [*broken, *refused][:5])
        hint = "convert them to safetensors, or remove them: requests that name them are refused"
        return Finding("LoRAs", "warn", f"{text}; no safetensors: {shown}", hint, facts)
    return Finding("LoRAs", "ok", text, "", facts)
