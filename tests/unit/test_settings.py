"""Settings: one definition for the environment and the command line."""

from pathlib import Path

import pytest

from service.errors import StartupError
from service.settings import Settings, environment_variable, load_settings


def test_defaults_need_no_environment() -> None:
    """Without any setting the bundled model is served on loopback."""
    settings = load_settings(environ={})
    assert settings.is_bundled_model
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.devices == ("auto",)
    assert settings.api_keys == ()
    assert settings.max_body_bytes == 25 * 1024 * 1024


def test_environment_is_read_and_flags_win() -> None:
    """A variable sets a value; a flag of the same name overrides it; an absent flag does not."""
    environ = {"INPAINT_PORT": "9000", "INPAINT_HOST": "::1", "OTHER": "x"}
    settings = load_settings({"port": "9001", "host": None}, environ)
    assert (settings.port, settings.host) == (9001, "::1")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("devices", "cuda:0, cuda:1,", ("cuda:0", "cuda:1")),
        ("api_keys", "", ()),
        ("cors_origins", "https://a.example,https://b.example", ("https://a.example", "https://b.example")),
        ("metrics_port", "", None),
        ("max_images", "", None),
        ("default_steps", " ", None),
        ("cpu_threads", "3", 3),
        ("metrics_port", "9100", 9100),
        ("revision", " ", None),
        ("safety_checker", " ", None),
        ("prediction_type", "v_prediction", "v_prediction"),
        ("prediction_type", "", None),
        ("offline", "true", True),
        ("max_body_mib", "0.5", 0.5),
        ("compile", "auto", "auto"),
        ("compile", "on", "on"),
        ("compile", "off", "off"),
        ("compile", "", "auto"),
        ("port", "", 8000),
        ("timeout", " ", 300.0),
        ("offline", "", False),
        ("max_images", "auto", None),
        ("cpu_threads", "auto", None),
        ("compile_cache", "", None),
        ("compile_cache", " ", None),
        ("compile_cache", "~/.cache/inpaint", Path("~/.cache/inpaint")),
    ],
)
def test_values_are_read_from_text(name: str, text: str, value: object) -> None:
    """Lists are comma-separated, and what is blank is not set, as compose files pass it."""
    assert getattr(load_settings(environ={environment_variable(name): text}), name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "65536"),
        ("port", "http"),
        ("timeout", "0"),
        ("timeout", "-1"),
        ("queue_size", "0"),
        ("nsfw_policy", "off"),
        ("dtype", "int8"),
        ("max_pixels", "10"),
        ("log_level", "trace"),
        ("prediction_type", "v"),
        ("docs_access", "everybody"),
        ("allowed_hosts", "https://paint.example"),
        ("allowed_hosts", "paint.example:8000"),
        ("allowed_hosts", "paint.example,::1"),
        ("async_ttl", "0"),
        ("async_mib", "0"),
        ("async_max", "-1"),
        ("compile", "true"),
        ("compile", "1"),
        ("compile", "ON"),
        ("max_images", "many"),
    ],
)
def test_value_that_does_not_fit_is_named(name: str, text: str) -> None:
    """The one line of a wrong setting names its variable and its flag."""
    with pytest.raises(StartupError) as raised:
        load_settings(environ={environment_variable(name): text})
    assert environment_variable(name) in str(raised.value)
    assert f"--{name.replace('_', '-')}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_keys_are_not_shown() -> None:
    """Printing settings, as a log may, does not give keys away."""
    assert "sesame" not in repr(load_settings({"api_keys": "sesame"}, environ={}))


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("demo", "demo"),
        ("stable-diffusion-v1-5/stable-diffusion-inpainting", "stable-diffusion-v1-5/stable-diffusion-inpainting"),
        ("/srv/private/checkpoints/house", "house"),
        ("./models/house", "house"),
        ("models/house.safetensors", "house.safetensors"),
    ],
)
def test_clients_see_no_paths(model: str, shown: str) -> None:
    """A model's public name is its hub id, or the last part of its path."""
    assert load_settings({"model": model}, environ={}).model_name == shown


def test_every_setting_is_described() -> None:
    """Each setting has the sentence that `serve --help` shows."""
    assert all(field.description for field in Settings.model_fields.values())
