"""The form field `loras`."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from service.api.loras import LoraChoice, parse_loras, resolve_loras
from service.engine.adapters import AdapterFolder
from service.errors import ErrorCode, InpaintError
from service.request import LoraUse


def code_of(text: str) -> str:
    """The code that a text is refused with."""
    with pytest.raises(PydanticCustomError) as error:
        parse_loras(text)
    return error.value.type


def one(scale: Any, name: str = "pencil") -> str:
    return json.dumps([{"name": name, "scale": scale}])


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("[]", ()),
        (" [ ] ", ()),
        ('[{"name": "pencil"}]', (LoraChoice("pencil"),)),
        ('[{"name": "pencil", "scale": 0.8}]', (LoraChoice("pencil", 0.8, 0.8),)),
        ('[{"scale": -10, "name": "pencil"}]', (LoraChoice("pencil", -10.0, -10.0),)),
        ('[{"name": "b", "scale": 0}, {"name": "a"}]', (LoraChoice("b", 0.0, 0.0), LoraChoice("a"))),
        (one({}), (LoraChoice("pencil"),)),
        (one({"unet": 0.5}), (LoraChoice("pencil", 0.5, 1.0),)),
        (one({"text_encoder": 0.5}), (LoraChoice("pencil", 1.0, 0.5),)),
        (one({"unet": 2, "text_encoder": 0}), (LoraChoice("pencil", 2.0, 0.0),)),
        (one({"unet": {}}), (LoraChoice("pencil"),)),
        (one({"unet": {"up": {}}}), (LoraChoice("pencil"),)),
        ('[{"name": "../x"}]', (LoraChoice("../x"),)),
        ('[{"name": ""}]', (LoraChoice(""),)),
    ],
)
def test_what_clients_may_write(text: str, choices: tuple[LoraChoice, ...]) -> None:
    """A scale is 1 where none is given; the order is the client's; whether names exist is found out later."""
    assert parse_loras(text) == choices


def test_scales_by_block_are_kept_as_canonical_json() -> None:
    """The nested form of `set_adapters` is kept whole, and spelled the same however it was written."""
    blocks = {"down": 0.9, "mid": [1], "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1]}}
    (choice,) = parse_loras(one({"unet": blocks, "text_encoder": 0.5}))
    assert (choice.unet_scale, choice.text_encoder_scale) == (1.0, 0.5)
    assert json.loads(choice.block_scales) == blocks
    turned = one({"unet": dict(reversed(blocks.items())), "text_encoder": 0.5}).replace("[1]", "[ 1.0e0 ]")
    assert parse_loras(turned) == (choice,)
    assert parse_loras(one({"unet": {"down": [1, 0.5], "mid": 0}}))[0].block_scales == '{"down":[1.0,0.5],"mid":0.0}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pencil",
        "{}",
        "null",
        "[",
        "[]]",
        "[1]",
        "[null]",
        '["pencil"]',
        "[{}]",
        '[{"scale": 1}]',
        '[{"name": 1}]',
        '[{"name": null}]',
        '[{"name": "a", "weight": 1}]',
        '[{"name": "a", "name": "b"}]',
        '[{"name": "a", "scale": 1, "scale": 1}]',
        '[{"name": "a"}, {"name": "a", "scale": 0.5}]',
        one("0.8"),
        one(True),
        one(None),
        one([0.8]),
        one({"unet": True}),
        one({"unet": None}),
        one({"unet": [1]}),
        one({"text_encoder": "1"}),
        one({"text_encoder": {"down": 1}}),
        one({"text_encoder_2": 1}),
        one({"down": 1}),
        one({"unet": {"middle": 1}}),
        one({"unet": {"down": "1"}}),
        one({"unet": {"down": []}}),
        one({"unet": {"mid": [1, 2]}}),
        one({"unet": {"mid": {"block_0": 1}}}),
        one({"unet": {"up": {"0": 1}}}),
        one({"unet": {"up": {"block_": 1}}}),
        one({"unet": {"up": {"block_00": 1}}}),
        one({"unet": {"up": {"block_100": 1}}}),
        one({"unet": {"up": {"block_1\n": 1}}}),
        one({"unet": {"up": {"block_1": [[1]]}}}),
        one({"unet": {"up": {"block_1": {"0": 1}}}}),
        one({"unet": {"up": {"block_1": [True]}}}),
        "[" * 16_000,
        '{"a":' * 3000,
        "[" * 900 + "]" * 900,
    ],
)
def test_other_shapes_are_invalid(text: str) -> None:
    """Unknown keys, wrong types, booleans as numbers, repeated names and keys, nesting: INVALID_FIELD."""
    assert code_of(text) == ErrorCode.INVALID_FIELD


@pytest.mark.parametrize(
    "text",
    [
        one(10.001),
        one(-11),
        '[{"name": "a", "scale": NaN}]',
        '[{"name": "a", "scale": Infinity}]',
        '[{"name": "a", "scale": -Infinity}]',
        '[{"name": "a", "scale": 1e400}]',
        '[{"name": "a", "scale": ' + "9" * 10_000 + "}]",
        one({"text_encoder": 11}),
        one({"unet": 11}),
        one({"unet": {"mid": 11}}),
        one({"unet": {"up": {"block_1": [1, 11]}}}),
        one({"unet": {"down": [1] * 65}}),
        one({"unet": {part: {f"block_{block}": [1] * 11 for block in range(3)} for part in ("up", "down")}}),
        json.dumps([{"name": str(number)} for number in range(9)]),
        "[" + " " * 16_384 + "]",
    ],
)
def test_too_much_is_out_of_range(text: str) -> None:
    """Scales beyond 10 or that are no numbers, more than 8 LoRAs, more than 64 scales, long texts."""
    assert code_of(text) == ErrorCode.OUT_OF_RANGE


def test_limits_can_be_reached() -> None:
    """Eight LoRAs, sixty-four scales."""
    assert len(parse_loras(json.dumps([{"name": str(number)} for number in range(8)]))) == 8
    blocks = {part: {f"block_{block}": [1] * 8 for block in range(4)} for part in ("up", "down")}
    assert json.loads(parse_loras(one({"unet": blocks}))[0].block_scales) == blocks


def test_messages_do_not_echo() -> None:
    """What a client sent is not repeated to it."""
    for text in ('[{"name": "a", "xyzzy": 1}]', one("xyzzy"), one({"unet": {"xyzzy": 1}}), "xyzzy"):
        with pytest.raises(PydanticCustomError) as error:
            parse_loras(text)
        assert "xyzzy" not in error.value.message()


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "scale", "unet", "text_encoder", "up", "mid", "block_0", "x"]), inner
        )
    ),
    max_leaves=20,
)


@given(json_values | st.lists(st.fixed_dictionaries({"name": st.text(max_size=4), "scale": json_values}), max_size=9))
def test_any_json_is_read_or_refused(value: Any) -> None:
    """Whatever JSON comes, it is refused with a code, or every scale of the result is within its bounds."""
    try:
        choices = parse_loras(json.dumps(value))
    except PydanticCustomError as error:
        assert error.type in {ErrorCode.INVALID_FIELD, ErrorCode.OUT_OF_RANGE}  # noqa: PT017 - it may also pass
        return
    assert [choice.name for choice in choices] == [entry["name"] for entry in value]
    for choice in choices:
        assert abs(choice.unet_scale) <= 10
        assert abs(choice.text_encoder_scale) <= 10
        assert choice.block_scales == "" or set(json.loads(choice.block_scales)) <= {"down", "mid", "up"}


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Whatever text comes, nothing but a refusal is raised."""
    try:
        parse_loras(text)
    except PydanticCustomError as error:
        assert error.type in {ErrorCode.INVALID_FIELD, ErrorCode.OUT_OF_RANGE}  # noqa: PT017 - it may also pass


scales = st.floats(-10, 10)
block_scales = st.fixed_dictionaries(
    {},
    optional={
        "mid": scales | st.lists(scales, min_size=1, max_size=1),
        "down": scales | st.dictionaries(st.sampled_from(["block_0", "block_11"]), scales, min_size=1),
        "up": st.dictionaries(st.sampled_from(["block_1", "block_2"]), st.lists(scales, min_size=1, max_size=4)),
    },
)


@given(st.dictionaries(st.text(max_size=8), scales | st.fixed_dictionaries({"unet": block_scales}), max_size=8))
def test_what_is_valid_survives(wanted: dict[str, Any]) -> None:
    """Every scale within the bounds comes out as it went in."""
    choices = parse_loras(json.dumps([{"name": name, "scale": scale} for name, scale in wanted.items()]))
    for choice, (name, scale) in zip(choices, wanted.items(), strict=True):
        assert choice.name == name
        if not isinstance(scale, dict):
            assert (choice.unet_scale, choice.text_encoder_scale) == (scale, scale)
        elif choice.block_scales:
            assert json.loads(choice.block_scales) == scale["unet"]


# --- files ----------------------------------------------------------------------------


def test_choices_become_files_of_now(tmp_path: Path) -> None:
    """Each choice gets its file and that file's version, in the order asked for."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    folder = AdapterFolder((tmp_path,), None)
    blocks = one({"unet": {"mid": 2}, "text_encoder": 0.5}, "b")
    uses = resolve_loras((*parse_loras(blocks), *parse_loras(one(0.3, "a"))), folder)

    def version(name: str) -> str:
        return folder.resolve(name)[1]

    assert uses == (
        LoraUse("b", str(tmp_path / "b.safetensors"), version("b"), 1.0, 0.5, '{"mid":2.0}'),
        LoraUse("a", str(tmp_path / "a.safetensors"), version("a"), 0.3, 0.3),
    )


@pytest.mark.parametrize("name", ["", "x", "../a", "/etc/passwd", "a\0", "a/../a", "\ud800"])
def test_unknown_names(tmp_path: Path, name: str) -> None:
    """What is no LoRA of the folder is unknown, whatever it looks like."""
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(InpaintError) as error:
        resolve_loras((*parse_loras(one(1, "a")), LoraChoice(name)), AdapterFolder((tmp_path,), None))
    assert (error.value.code, error.value.field) == (ErrorCode.UNKNOWN_LORA, "loras")
