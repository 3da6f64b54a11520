"""Telling safetensors from everything else by the header."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from service.engine import lora_file
from service.engine.lora_file import check_safetensors
from service.errors import ErrorCode, InpaintError

TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def file_of(header: Any, data: bytes = bytes(16), *, length: int | None = None) -> bytes:
    """A file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def pickled() -> bytes:
    return pickle.dumps({"lora": [1.0] * 100})


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled())
    return buffer.getvalue()


def refusal(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(data)
    with pytest.raises(InpaintError) as error:
        check_safetensors(path)
    assert (error.value.code, error.value.field) == (ErrorCode.INVALID_LORA, "adapter")
    assert str(tmp_path) not in error.value.message
    return error.value.message


def test_what_the_library_writes_is_taken(tmp_path: Path) -> None:
    """Files of the safetensors library pass, with and without metadata, of any type and with empty tensors."""
    path = tmp_path / "lora.safetensors"
    types = (np.float32, np.float16, np.float64, np.int64, np.uint8, np.bool_)
    tensors = {f"t{index}": np.zeros((index, 3), kind) for index, kind in enumerate(types)}
    tensors["scalar"] = np.zeros((), np.float32)
    for metadata in (None, {"format": "pt", "ss_tag": "{}"}):
        path.write_bytes(save(tensors, metadata))
        check_safetensors(path)


@pytest.mark.parametrize("data", [b"", b"\0" * 8, pickled(), zipped(), b"<html>" * 10, b"\xff" * 100, bytes(1000)])
def test_other_files_are_named_as_what_they_are_not(tmp_path: Path, data: bytes) -> None:
    """A pickle or a zip, whatever its name, is refused and never opened as such."""
    assert "never loaded" in refusal(tmp_path, data)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{", b""),
        (b"{}\xff", b""),
        (b'{"a": 1, "a": 1}', b""),
        (b'{"a":' * 100_000, b""),
        (b'{"a":' + b"1" * 10_000 + b"}", b""),
        ({}, b""),
        ({"__metadata__": {"a": "b"}}, b""),
        ({"__metadata__": {"a": 1}, "t": TENSOR}, bytes(16)),
        ({"__metadata__": [], "t": TENSOR}, bytes(16)),
        ({"t": []}, b""),
        ({"t": {}}, b""),
        ({"t": {**TENSOR, "more": 1}}, bytes(16)),
        ({"t": {**TENSOR, "dtype": "X1"}}, bytes(16)),
        ({"t": {**TENSOR, "dtype": []}}, bytes(16)),
        ({"t": {**TENSOR, "shape": 4}}, bytes(16)),
        ({"t": {**TENSOR, "shape": [True, 4]}}, bytes(16)),
        ({"t": {**TENSOR, "shape": [-2, -2]}}, bytes(16)),
        ({"t": {**TENSOR, "shape": [2.0, 2]}}, bytes(16)),
        ({"t": {**TENSOR, "shape": [2, 3]}}, bytes(16)),
        ({"t": {**TENSOR, "shape": [1] * 9}}, bytes(16)),
        ({"t": {**TENSOR, "shape": [2**60] * 8}}, bytes(16)),
        ({"t": {**TENSOR, "data_offsets": [0]}}, bytes(16)),
        ({"t": {**TENSOR, "data_offsets": [16, 0]}}, bytes(16)),
        ({"t": {**TENSOR, "data_offsets": [-16, 0]}}, bytes(16)),
        ({"t": {**TENSOR, "data_offsets": [4, 20]}}, bytes(20)),
        ({"t": TENSOR, "u": TENSOR}, bytes(16)),
        ({"t": TENSOR}, bytes(15)),
        ({"t": TENSOR}, bytes(17)),
    ],
)
def test_header_that_does_not_fit_the_file(tmp_path: Path, header: Any, data: bytes) -> None:
    """A header that is broken, hostile, or describes other bytes than there are, is refused."""
    assert refusal(tmp_path, file_of(header, data))


def test_header_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header beyond the limit is not read."""
    monkeypatch.setattr(lora_file, "MAX_HEADER_BYTES", 10)
    assert "more than 10 bytes" in refusal(tmp_path, file_of({"t": TENSOR}))
    assert refusal(tmp_path, file_of({"t": TENSOR}, length=2**63))


@given(st.binary(max_size=200), st.integers(0, 120), st.integers(0, 255))
def test_damaged_files_are_refused_or_whole(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, at: int, byte: int
) -> None:
    """Whatever bytes come: the check passes or refuses, and never fails otherwise."""
    path = tmp_path_factory.mktemp("damaged") / "lora.safetensors"
    data = bytearray(save({"a": np.zeros((2, 2), np.float32), "b": np.zeros(3, np.float16)}))
    data[min(at, len(data) - 1)] = byte
    for content in (tail, bytes(data), bytes(data) + tail, bytes(data)[: len(data) - len(tail)]):
        path.write_bytes(content)
        try:
            check_safetensors(path)
        except InpaintError as error:
            assert error.code == ErrorCode.INVALID_LORA  # noqa: PT017 - it may also pass
