"""What computes attention: torch's backends, whether they can, whether they do it right, and which is the fastest."""

import itertools
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from service.errors import StartupError
from service.settings import AttentionBackend

logger = logging.getLogger(__name__)

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SDP_BACKENDS: dict[AttentionBackend, SDPBackend] = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

_PROBE_TOKENS = (64, 77)
"""Keys of the trial calls: an even number as of latents, and a prompt's."""

_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative error of a backend, about ten roundings of the type; TF32 counts as float32."""

_TIMED_CALLS = 5


class AttentionContext:
    """What computes attention inside `with context.active()`.

    It can be entered any number of times, by several threads at once: what torch keeps of it is one for the process.

    Args:
        backend: Torch's backend for every call that it can compute; None leaves the choice to torch.
    """

    def __init__(self, backend: SDPBackend | None = None) -> None:
        self.backend = backend
        self._lock = threading.Lock()
        self._num_inside = 0
        self._chosen: AbstractContextManager[Any] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context manager for one use.

        The model has calls that a fused backend cannot compute, e.g. the VAE's, whose one head is 512 wide,
        and rows with masked tokens: there, and only there, torch chooses among the others.
        """
        if self.backend is None:
            yield
            return
        self._enter()
        try:
            yield
        finally:
            self._exit()

    def _enter(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._chosen = _preferring(self.backend)
                self._chosen.__enter__()
            self._num_inside += 1

    def _exit(self) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0 and self._chosen is not None:
                self._chosen.__exit__(None, None, None)


def _preferring(backend: SDPBackend | None) -> AbstractContextManager[Any]:
    if backend is SDPBackend.MATH:
        return sdpa_kernel(backend)  # It computes everything.
    others = [other for other in reversed(SDP_BACKENDS.values()) if other is not backend]
    return sdpa_kernel([*([] if backend is None else [backend]), *others], set_priority=True)


def head_sizes(model: torch.nn.Module) -> set[int]:
    """Of a model's attention layers."""
    return {module.inner_dim // module.heads for module in model.modules() if isinstance(module, Attention)}


def attention_on(backend: SDPBackend) -> Attend:
    """Attention that raises where this backend cannot compute it."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value)

    return attend


def probe(name: str, attend: Attend, unet: UNet2DConditionModel, sizes: set[int]) -> None:
    """Try attention on small random numbers of the model's type and head sizes, beside float32 on the CPU.

    Args:
        name: The backend's.
        attend: Computes it.
        unet: Gives the device and the type.
        sizes: Of heads.

    Raises:
        StartupError: It cannot compute it, or computes something else.
    """
    draw = torch.Generator().manual_seed(0)
    where = f"on {unet.device.type} in {str(unet.dtype).removeprefix('torch.')} with heads of"
    for head_size, num_keys in itertools.product(sorted(sizes), _PROBE_TOKENS):
        shapes = [(2, 2, tokens, head_size) for tokens in (_PROBE_TOKENS[0], num_keys, num_keys)]
        inputs = [torch.randn(shape, generator=draw).to(unet.device, unet.dtype) for shape in shapes]
        query, key, value = inputs
        expected = attention_on(SDPBackend.MATH)(query.float().cpu(), key.float().cpu(), value.float().cpu())
        try:
            # Torch warns of every reason against a backend before it raises.
            with torch.inference_mode(), warnings.catch_warnings(action="ignore"):
                attended = attend(query, key, value).float().cpu()
        except (RuntimeError, ValueError) as error:
            logger.debug("the attention backend %s failed", name, exc_info=error)
            raise StartupError(f"the attention backend {name!r} does not run {where} {head_size}") from None
        difference = float((attended - expected).norm() / expected.norm())
        if not difference <= _TOLERANCES[unet.dtype]:  # A result that is not a number fails, too.
            raise StartupError(
                f"the attention backend {name!r} computes wrongly {where} {head_size}: off by {difference:.2g}"
            )


# --- the fastest ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The shape of an attention layer's call, for each row of the UNet's batch.

    Attributes:
        num_heads: Heads.
        head_size: Width of each.
        num_queries: Tokens that ask.
        num_keys: Tokens that are asked.
    """

    num_heads: int
    head_size: int
    num_queries: int
    num_keys: int


def seen_calls(unet: UNet2DConditionModel, call: Callable[[], object]) -> Counter[AttentionCall]:
    """How often each shape of attention is computed while `call` calls the UNet."""
    calls: Counter[AttentionCall] = Counter()

    def note(module: Attention, inputs: tuple[torch.Tensor, ...], keywords: Mapping[str, Any]) -> None:
        hidden = inputs[0]
        context = keywords.get("encoder_hidden_states")
        num_keys = (hidden if context is None else context).shape[1]
        calls[AttentionCall(module.heads, module.inner_dim // module.heads, hidden.shape[1], num_keys)] += 1

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in unet.modules()
        if isinstance(module, Attention)
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def fastest_backend(unet: UNet2DConditionModel, calls: Counter[AttentionCall], num_rows: int) -> SDPBackend | None:
    """The fused backend that takes the least time for these calls; None where none can compute them all.

    Each is first checked beside float32 on the CPU, then on the calls' own shapes beside the math backend.

    Args:
        unet: On a CUDA device.
        calls: As `seen_calls` counts them.
        num_rows: UNet rows to time them with.
    """
    seconds: dict[AttentionBackend, float] = {}
    for name, backend in SDP_BACKENDS.items():
        if backend is SDPBackend.MATH:
            continue
        try:
            probe(name, attention_on(backend), unet, head_sizes(unet))
            seconds[name] = sum(count * _seconds(unet, backend, call, num_rows) for call, count in calls.items())
        except (StartupError, RuntimeError) as error:
            logger.debug("the attention backend %s is not used: %s", name, error)
    if not seconds:
        return None
    times = ", ".join(f"{name} {1000 * taken:.1f} ms" for name, taken in sorted(seconds.items(), key=lambda at: at[1]))
    logger.info("attention of a step of %d rows: %s", num_rows, times)
    return SDP_BACKENDS[min(seconds, key=lambda name: seconds[name])]


def _seconds(unet: UNet2DConditionModel, backend: SDPBackend, call: AttentionCall, num_rows: int) -> float:
    """Of one call.

    Raises:
        StartupError: It computes something else than the math backend.
        RuntimeError: It cannot compute it.
    """
    draw = torch.Generator(unet.device).manual_seed(0)
    # As the layers have them: rows, tokens, heads, then the middle two exchanged.
    query, key, value = (
        torch.randn(
            (num_rows, tokens, call.num_heads, call.head_size), generator=draw, device=unet.device, dtype=unet.dtype
        ).transpose(1, 2)
        for tokens in (call.num_queries, call.num_keys, call.num_keys)
    )
    attend = attention_on(backend)
    with warnings.catch_warnings(action="ignore"):
        attended = attend(query, key, value)[:1].float()
    expected = attention_on(SDPBackend.MATH)(query[:1], key[:1], value[:1]).float()
    if not float((attended - expected).norm() / expected.norm()) <= _TOLERANCES[unet.dtype]:
        raise StartupError(f"it computes {call} wrongly")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(_TIMED_CALLS):
        attend(query, key, value)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / _TIMED_CALLS
