"""Which addresses may be called, and what says that it was the service that called."""

import base64
import time
from pathlib import Path

import httpx
import openai
import pytest
from starlette.requests import Request

from service.api.webhook import HEADER, MAX_CHARACTERS, Webhook, signed_headers, webhook_policy, webhook_secret
from service.errors import ErrorCode, InpaintError, StartupError
from service.settings import load_settings

HOSTS = "hooks.example, hooks.example:8443,http://127.0.0.1:9000, bücher.example, http://plain.example,[::1]:8443"
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


def webhook(*urls: bytes | str, hosts: str = HOSTS, is_async: bool = True) -> Webhook | None:
    raw = [(HEADER.lower().encode(), url if isinstance(url, bytes) else url.encode()) for url in urls]
    policy = webhook_policy(load_settings({"webhook_hosts": hosts}, environ={}))
    return policy.webhook_of(Request({"type": "http", "headers": raw}), is_async=is_async)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://hooks.example/done?id=1", "hooks.example"),
        ("https://hooks.example", "hooks.example"),
        ("HTTPS://HOOKS.example:443/", "hooks.example"),
        ("https://hooks.example:8443/done", "hooks.example"),
        ("http://127.0.0.1:9000/", "127.0.0.1"),
        ("http://plain.example/", "plain.example"),
        ("http://plain.example:80/", "plain.example"),
        ("https://BÜCHER.example/", "xn--bcher-kva.example"),
        ("https://xn--bcher-kva.example/", "xn--bcher-kva.example"),
        ("https://[::1]:8443/", "::1"),
    ],
)
def test_allowed_hosts_can_be_called(url: str, host: str) -> None:
    """A host is the same in any spelling, and is called as it was compared."""
    found = webhook(url)
    assert found is not None
    assert found.url.raw_host.decode() == found.receiver.host == host


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/",
        "https://hooks.example.other.example/",
        "https://sub.hooks.example/",
        "https://hooks.example./",
        "https://hooks.example:8444/",
        "https://hooks.example:0/",
        "https://hooks.example:-1/",
        "http://hooks.example/",
        "http://hooks.example:443/",
        "https://plain.example/",
        "http://127.0.0.1/",
        "http://127.0.0.1:9001/",
        "http://127.1:9000/",
        "http://2130706433:9000/",
        "http://0x7f000001:9000/",
        "http://localhost:9000/",
        "http://[::ffff:127.0.0.1]:9000/",
        "http://169.254.169.254/latest/meta-data/",
        "https://hooks%2eexample/",
        "https://hooks.example%00.other.example/",
        "https://hooks.example\\.other.example/",
    ],
)
def test_other_hosts_cannot(url: str) -> None:
    """Anything but the host, port and scheme that the operator wrote is forbidden, whatever it would resolve to."""
    with pytest.raises(InpaintError) as raised:
        webhook(url)
    assert (raised.value.code, raised.value.field) == (ErrorCode.FORBIDDEN, HEADER)
    assert url not in raised.value.message


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example",
        "/done",
        "//hooks.example/",
        "https:hooks.example",
        "https:///done",
        "https://user@hooks.example/",
        "https://user:password@hooks.example/",
        "https://other.example\\@hooks.example/",
        "https://hooks.example#@other.example/",
        "ftp://hooks.example/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "https://hooks.example:port/",
        "https://256.1.1.1/",
        "https://[::1/",
        "https://\uff48ooks.example/",
        b"https://\xff.example/",
        f"https://hooks.example/{'a' * MAX_CHARACTERS}",
    ],
)
def test_what_is_no_address_is_refused(url: bytes | str) -> None:
    """Whatever is not a plain https URL is 422 and names the header, with none of it in the message."""
    with pytest.raises(InpaintError) as raised:
        webhook(url)
    assert (raised.value.code, raised.value.field) == (ErrorCode.INVALID_FIELD, HEADER)
    assert "example" not in raised.value.message


def test_an_address_is_for_asynchronous_requests_and_there_is_one() -> None:
    """Who waits for the answer needs no webhook, and which of two would count is nobody's guess."""
    assert webhook() is None
    assert webhook(is_async=False) is None
    for urls, is_async in ((["https://hooks.example/"], False), (["https://hooks.example/"] * 2, True)):
        with pytest.raises(InpaintError) as raised:
            webhook(*urls, is_async=is_async)
        assert raised.value.code == ErrorCode.INVALID_FIELD


def test_by_default_none_is_allowed() -> None:
    """Without an operator's list the service calls nobody."""
    with pytest.raises(InpaintError) as raised:
        webhook("https://hooks.example/", hosts="")
    assert raised.value.code == ErrorCode.FORBIDDEN


@pytest.mark.parametrize(
    "hosts",
    ["https://a.example/path", "user@a.example", "ftp://a.example", "a b:x", "https://", "a.example#b", "a.example?b"],
)
def test_a_host_that_is_none_ends_the_start(hosts: str) -> None:
    """An operator who writes something else is told so in a line that names the setting."""
    with pytest.raises(StartupError, match="INPAINT_WEBHOOK_HOSTS"):
        webhook_policy(load_settings({"webhook_hosts": hosts}, environ={}))


# --- secrets and signatures -----------------------------------------------------------------


def secret_of(**settings: object) -> bytes | None:
    return webhook_secret(load_settings({"webhook_hosts": "a.example", **settings}, environ={}))


def test_a_secret_is_read_from_the_setting_or_a_file(tmp_path: Path) -> None:
    """With and without its prefix, and with the line's end that editors leave; without hosts none is needed."""
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    assert secret_of(webhook_secret=SECRET) == bytes(range(32))
    assert secret_of(webhook_secret=SECRET.removeprefix("whsec_")) == bytes(range(32))
    assert secret_of(webhook_secret_file=str(path)) == bytes(range(32))
    assert secret_of(webhook_hosts="") is None
    assert SECRET not in repr(load_settings({"webhook_secret": SECRET}, environ={}))


@pytest.mark.parametrize(
    "text", [None, "whsec_", "correct horse", "whsec_" + "A" * 28, "whsec_" + "A" * 92, "é" * 32, SECRET + "="]
)
def test_what_is_no_secret_ends_the_start(text: str | None) -> None:
    """No webhook goes out unsigned or with a weak secret; the line names the setting and not the secret."""
    with pytest.raises(StartupError, match="INPAINT_WEBHOOK_SECRET") as raised:
        secret_of(webhook_secret=text)
    assert text is None or text.removeprefix("whsec_") == "" or text not in str(raised.value)


def test_a_file_that_cannot_be_read_ends_the_start(tmp_path: Path) -> None:
    """The line names file and setting."""
    for content in (None, b"", b"\xff\xfe"):
        path = tmp_path / "secret"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(StartupError, match="INPAINT_WEBHOOK_SECRET_FILE"):
            secret_of(webhook_secret_file=str(path))


def test_others_verify_the_signature() -> None:
    """OpenAI's client, which is a receiver of Standard Webhooks, takes it; not after a byte of it was changed."""
    body, timestamp = b'{"status": "completed"}', int(time.time())
    headers = signed_headers(bytes(range(32)), "msg_1", timestamp, body)
    verify = openai.OpenAI(api_key="none").webhooks.verify_signature

    verify(body.decode(), headers, secret=SECRET)

    for changed in ({"webhook-id": "msg_2"}, {"webhook-timestamp": str(timestamp + 1)}):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            verify(body.decode(), headers | changed, secret=SECRET)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        verify(body.decode() + " ", headers, secret=SECRET)


def test_the_signature_of_the_specification() -> None:
    """The example that the libraries of Standard Webhooks are tested with."""
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_addresses_are_taken_apart_by_what_calls_them() -> None:
    """What is compared is what is called: httpx's own reading of the URL."""
    found = webhook("https://hooks.example/a?b=c")
    assert found is not None
    assert isinstance(found.url, httpx.URL)
    assert str(found.url) == "https://hooks.example/a?b=c"
