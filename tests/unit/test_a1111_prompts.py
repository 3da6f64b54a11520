"""LoRAs in prompts, as the web UI reads them."""

import json

import pytest

from service.api.a1111.prompts import NO_PROMPT, split_prompt
from service.api.problems import InvalidRequest
from service.worker.prompt_syntax import parse


@pytest.mark.parametrize(
    ("prompt", "text", "loras"),
    [
        ("a red house", "a red house", []),
        ("a <lora:pencil> house", "a  house", [{"name": "pencil", "scale": 1.0}]),
        ("<lora:pencil:0.5>a", "a", [{"name": "pencil", "scale": 0.5}]),
        ("<lyco:pencil:-1>a", "a", [{"name": "pencil", "scale": -1.0}]),
        ("a<lora:p:0.5:0.8>", "a", [{"name": "p", "scale": {"unet": 0.8, "text_encoder": 0.5}}]),
        ("a<lora:p:unet=0.8>", "a", [{"name": "p", "scale": {"unet": 0.8, "text_encoder": 1.0}}]),
        ("a<lora:p:te=0:unet=0.8>", "a", [{"name": "p", "scale": {"unet": 0.8, "text_encoder": 0.0}}]),
        ("a<lora:p:te=0.3>", "a", [{"name": "p", "scale": 0.3}]),
        ("<lora:p:1>", NO_PROMPT, [{"name": "p", "scale": 1.0}]),
        ("", NO_PROMPT, []),
        (" \n", NO_PROMPT, []),
        ("a < b, c > d", "a < b, c > d", []),
        ("(a:1.2) [b] BREAK c", "(a:1.2) [b] BREAK c", []),
    ],
)
def test_loras_are_taken_out(prompt: str, text: str, loras: list[dict[str, object]]) -> None:
    """Name and weights go where the web UI takes them to, and the rest stays as it is."""
    found = split_prompt(prompt, with_loras=True)
    assert found.text == text
    assert json.loads(found.loras or "[]") == loras
    assert split_prompt(prompt, with_loras=False).loras == ""


@pytest.mark.parametrize(
    "network", ["<hypernet:x:1>", "<lora:p:x>", "<lora:p:nan>", "<lora:p:inf>", "<lora:p:1:1:8>", "<lora:p:dyn=8>"]
)
def test_other_networks_are_refused(network: str) -> None:
    """What would not be used as it was meant is refused, in the field `prompt`."""
    with pytest.raises(InvalidRequest) as caught:
        split_prompt(f"a {network}", with_loras=True)
    assert caught.value.field == "prompt"
    assert split_prompt(f"a {network}", with_loras=False).text == "a "


def test_no_prompt_is_read_as_no_text() -> None:
    """What stands for a blank prompt has not one word in the web UI's syntax."""
    assert parse(NO_PROMPT) == parse("")


def test_endless_prompts_are_left_for_the_form_to_refuse() -> None:
    """A prompt of megabytes is not searched."""
    prompt = "<a:" * 100_000
    assert split_prompt(prompt, with_loras=True).text == prompt
