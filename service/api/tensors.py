"""Tensors that clients send: `.npy` or `.safetensors` files to arrays, checked against the served model.

Both formats are plain numbers behind a header that says their shape; nothing in
them is ever executed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import safetensors

from service.api.ip_adapter import EMBEDS as IP_ADAPTER_EMBEDS
from service.api.problems import Fault
from service.errors import ErrorCode
from service.fitting import Size
from service.messages import ModelInfo
from service.request import Floats

EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
LATENTS = ("latents", "masked_image_latents", "image_latents")
TENSORS = (*EMBEDS, *LATENTS, IP_ADAPTER_EMBEDS)

MAX_CHUNKS = 20
"""Longest prompt embeddings, in prompts of the text encoder's own length."""

MAX_PICTURES = 8
"""Most pictures whose embeddings a request paints by."""

MAX_PICTURE_TOKENS = 1024
"""Most embeddings of one picture: an encoder of 336 pixels in patches of 14 gives 577."""

_NPY_MAGIC = b"\x93NUMPY"
_BFLOAT16_BITS = 16

# By the name that each format gives them.
_NPY_DTYPES = frozenset({"<f2", "<f4", "<f8", ">f2", ">f4", ">f8"})
_SAFETENSORS_DTYPES: Mapping[str, str] = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


class TensorFault(Exception):  # noqa: N818 - becomes a Fault once the field is known
    """A file is no tensor that can be used; the message is for the client."""


def read_tensor(data: bytes, name: str) -> Floats:
    """The numbers of a file as float32, native and contiguous.

    Args:
        data: An `.npy` file, or a `.safetensors` file that holds one tensor or one of this name.
        name: The form field.

    Raises:
        TensorFault: It is neither, or holds other than finite floating-point numbers.
    """
    array = _read_npy(data) if data.startswith(_NPY_MAGIC) else _read_safetensors(data, name)
    if array.size == 0:
        raise TensorFault("The tensor is empty.")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is told below
        floats = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(floats).all():
        raise TensorFault("The tensor has values that are not finite.")
    return floats


def _read_npy(data: bytes) -> np.ndarray:
    file = BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        _require_size(shape, dtype.itemsize, len(data) - file.tell())
    except Exception:  # noqa: BLE001 - hostile headers raise all sorts of things, with texts that nobody needs
        raise TensorFault("The .npy file is not readable.") from None
    if dtype.str not in _NPY_DTYPES:
        raise TensorFault("The tensor should be of type float16, float32 or float64.")
    file.seek(0)
    array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _read_safetensors(data: bytes, name: str) -> np.ndarray:
    try:
        tensors = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError):
        raise TensorFault("Send the tensor as an .npy or .safetensors file.") from None
    if name not in tensors and len(tensors) != 1:
        raise TensorFault(f"The .safetensors file should hold one tensor, or one named {name}.")
    tensor = tensors[name] if name in tensors else next(iter(tensors.values()))
    if tensor["dtype"] not in _SAFETENSORS_DTYPES:
        raise TensorFault("The tensor should be of type float16, bfloat16, float32 or float64.")
    array = np.frombuffer(tensor["data"], dtype=_SAFETENSORS_DTYPES[tensor["dtype"]])
    if tensor["dtype"] == "BF16":  # the upper half of a float32
        array = (array.astype(np.uint32) << _BFLOAT16_BITS).view(np.float32)
    try:
        return array.reshape(tensor["shape"])
    except ValueError:  # more dimensions than numpy has
        raise TensorFault("The tensor has too many dimensions.") from None


def _require_size(shape: Sequence[int], itemsize: int, num_bytes: int) -> None:
    """Refuse a header that promises other than what follows it."""
    num_items = 1
    for side in shape:
        num_items *= side
    if num_items * itemsize != num_bytes:
        raise ValueError("the data does not fit its header")


# --- against the model -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorChecks:
    """What the shapes of a request's tensors have to be.

    Args:
        model: The served model.
        num_images: `num_images_per_prompt`.
        is_guided: Whether a negative prompt is needed.
    """

    model: ModelInfo
    num_images: int
    is_guided: bool

    def embeds(self, tensors: Mapping[str, Floats]) -> tuple[dict[str, Floats], list[Fault]]:
        """Embeddings as (T, D), and what is wrong with them; `tensors` by field."""
        max_tokens = self.model.max_tokens * MAX_CHUNKS
        fitting: dict[str, Floats] = {}
        faults = []
        for name in EMBEDS:
            if name not in tensors:
                continue
            array = tensors[name][0] if tensors[name].ndim == 3 and len(tensors[name]) == 1 else tensors[name]  # noqa: PLR2004 - (1, T, D)
            if array.ndim == 2 and array.shape[1] == self.model.embeds_width and array.shape[0] <= max_tokens:  # noqa: PLR2004 - (T, D)
                fitting[name] = array
            else:
                wanted = (
                    f"(T, {self.model.embeds_width}) or (1, T, {self.model.embeds_width}) with T up to {max_tokens}"
                )
                faults.append(_shape_fault(name, wanted, tensors[name]))
        faults += self._negative_faults(tensors, fitting)
        return fitting, faults

    def _negative_faults(self, tensors: Mapping[str, Floats], fitting: Mapping[str, Floats]) -> list[Fault]:
        """The negative prompt's embeddings have the prompt's length; stock encodes missing ones up to its own."""
        positive, negative = fitting.get("prompt_embeds"), fitting.get("negative_prompt_embeds")
        if negative is not None:
            num_tokens = self.model.max_tokens if positive is None else len(positive)
            if "prompt_embeds" in tensors and positive is None:
                return []
            if len(negative) != num_tokens:
                wanted = f"({num_tokens}, {self.model.embeds_width}), as long as the prompt's"
                return [_shape_fault("negative_prompt_embeds", wanted, negative)]
        elif (
            self.is_guided
            and "negative_prompt_embeds" not in tensors
            and positive is not None
            and len(positive) > self.model.max_tokens
        ):
            message = (
                f"Send negative_prompt_embeds of shape ({len(positive)}, {self.model.embeds_width}): "
                f"the text encoder reads at most {self.model.max_tokens} tokens."
            )
            return [Fault("negative_prompt_embeds", ErrorCode.INVALID_FIELD, message)]
        return []

    def image_embeds(self, tensors: Mapping[str, Floats]) -> tuple[dict[str, Floats], list[Fault]]:
        """Embeddings of pictures as (2 or 1, n, [T,] D), and what is wrong with them; `tensors` by field."""
        array, info = tensors.get(IP_ADAPTER_EMBEDS), self.model.ip_adapter
        if array is None or info is None:
            return {}, []
        num_rows = 2 if self.is_guided else 1
        most = (MAX_PICTURES,) if info.kind == "plain" else (MAX_PICTURES, MAX_PICTURE_TOKENS)
        *counts, width = array.shape[1:] or (0,)
        is_within = len(counts) == len(most) and all(count <= limit for count, limit in zip(counts, most, strict=True))
        if array.shape[:1] == (num_rows,) and width == info.embeds_width and is_within:
            return {IP_ADAPTER_EMBEDS: array}, []
        if info.kind == "plain":
            wanted = f"({num_rows}, n, {info.embeds_width}) with n up to {MAX_PICTURES}"
        else:
            limits = f"n up to {MAX_PICTURES} and T up to {MAX_PICTURE_TOKENS}"
            wanted = f"({num_rows}, n, T, {info.embeds_width}) with {limits}"
        return {}, [_shape_fault(IP_ADAPTER_EMBEDS, wanted, array)]

    def working_size(self, tensors: Mapping[str, Floats]) -> Size | None:
        """The working size that latents were made for; None where there are none of a sane shape."""
        for name in LATENTS:
            if name in tensors and tensors[name].ndim in (3, 4):
                height, width = tensors[name].shape[-2:]
                return Size(height * self.model.latent_multiple, width * self.model.latent_multiple)
        return None

    def latents(self, tensors: Mapping[str, Floats], working: Size) -> tuple[dict[str, Floats], list[Fault]]:
        """Latents as (n, C, h, w) for a working size, and what is wrong with them; `tensors` by field."""
        multiple = self.model.latent_multiple
        sides = (self.model.latent_channels, working.height // multiple, working.width // multiple)
        fitting: dict[str, Floats] = {}
        faults = []
        for name in LATENTS:
            if name not in tensors:
                continue
            array = tensors[name][None] if tensors[name].ndim == 3 else tensors[name]  # noqa: PLR2004 - (C, h, w)
            counts = {self.num_images} if name == "latents" else {1, self.num_images}
            if array.ndim == 4 and array.shape[1:] == sides and len(array) in counts:  # noqa: PLR2004 - (n, C, h, w)
                fitting[name] = array
            else:
                wanted = " or ".join(_shape_text((count, *sides)) for count in sorted(counts))
                faults.append(_shape_fault(name, wanted, tensors[name]))
        return fitting, faults


def _shape_fault(name: str, wanted: str, array: Floats) -> Fault:
    message = f"{name}: The tensor should be of shape {wanted}, not {_shape_text(array.shape)}."
    return Fault(name, ErrorCode.INVALID_FIELD, message)


def _shape_text(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"
