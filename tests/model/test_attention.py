"""What computes attention: chosen for as long as anybody needs it, and by what the model's own calls take."""

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from service.settings import Settings
from service.worker import attention
from service.worker.attention import AttentionCall, AttentionContext, fastest_backend, seen_calls
from service.worker.checkpoint import load
from service.worker.compiled import fuse_projections
from tests.model.checkpoints import NATIVE_SIZE

CPU = torch.device("cpu")


def chosen() -> int:
    """The backend that a call gets here and now, as torch numbers them."""
    rows = torch.zeros(1, 1, 2, 8)
    return int(torch._fused_sdp_choice(rows, rows, rows))


def state() -> list[int]:
    """The backends that may compute it, as torch numbers them; the preferred one first."""
    cuda = torch.backends.cuda
    is_enabled = {
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    numbers = [int(backend) for backend, enabled in is_enabled.items() if enabled]
    return [number for number in torch._C._get_sdp_priority_order() if number in numbers]


# --- the context -------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
@pytest.mark.parametrize(
    "before",
    [
        [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
        [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION],
    ],
)
def test_what_was_before_comes_back(backend: SDPBackend | None, before: list[SDPBackend]) -> None:
    """Also after an exception, and whatever the surroundings had chosen."""
    context, pristine = AttentionContext(backend), state()
    with sdpa_kernel(before, set_priority=True):
        for _ in range(2):
            with context.active(), context.active():
                assert state()[0] == int(backend or before[0])
            assert state() == [int(one) for one in before]
        with pytest.raises(RuntimeError, match="no attention"), context.active():
            raise RuntimeError("no attention")
        assert state() == [int(one) for one in before]
    assert state() == pristine


def test_fused_backend_is_preferred_and_not_alone() -> None:
    """It comes first, and what it cannot compute is computed by another."""
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with AttentionContext(backend).active():
            first, *others, last = state()
            assert first == int(backend)
            assert len(others) == 2
            assert last == int(SDPBackend.MATH)


def test_threads_come_and_go_and_it_holds_inside_each() -> None:
    """As the worker's three do, in any order, some by exceptions."""
    context, before = AttentionContext(SDPBackend.MATH), state()
    barrier = threading.Barrier(4)
    seen: Counter[int] = Counter()
    lock = threading.Lock()

    def work(number: int) -> None:
        barrier.wait(60)
        for turn in range(200):
            with suppress(ZeroDivisionError), context.active():
                inside = chosen()
                with context.active():
                    pass
                with lock:
                    seen[inside] += 1
                1 / ((turn + number) % 7)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == {SDPBackend.MATH.value: 800}
    assert state() == before


# --- the model's calls -------------------------------------------------------


@pytest.fixture
def unet(inpainting_checkpoint: Path) -> UNet2DConditionModel:
    return load(Settings(model=str(inpainting_checkpoint)), CPU).unet


def run(unet: UNet2DConditionModel, num_rows: int = 2) -> None:
    side = NATIVE_SIZE // 8
    with torch.inference_mode():
        unet(torch.zeros(num_rows, 9, side, side), 20, encoder_hidden_states=torch.zeros(num_rows, 77, 32))


def num_hooks(unet: UNet2DConditionModel) -> int:
    return sum(len(module._forward_pre_hooks) for module in unet.modules())


@pytest.mark.parametrize("is_fused", [False, True])
def test_calls_of_every_layer_are_counted(unet: UNet2DConditionModel, is_fused: bool) -> None:
    """Their shapes are of one row, whatever the batch; latents ask latents, or a prompt of 77 tokens."""
    if is_fused:
        fuse_projections(unet)
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    once = seen_calls(unet, lambda: run(unet))
    assert once.total() == len(layers)
    assert {call.num_heads for call in once} == {layer.heads for layer in layers}
    # The tiny UNet attends where latents are 4 x 4.
    assert once == {
        AttentionCall(8, 4, num_queries=16, num_keys=16): len(layers) // 2,
        AttentionCall(8, 4, num_queries=16, num_keys=77): len(layers) // 2,
    }
    thrice = seen_calls(unet, lambda: [run(unet, num_rows) for num_rows in (1, 2, 3)])
    assert thrice == Counter({call: 3 * count for call, count in once.items()})


def test_hooks_are_gone_afterwards(unet: UNet2DConditionModel) -> None:
    """Also when the call raises, in the UNet or elsewhere."""
    assert num_hooks(unet) == 0
    seen_calls(unet, lambda: run(unet))
    assert num_hooks(unet) == 0

    def fail() -> None:
        assert num_hooks(unet) > 0
        raise RuntimeError("no call")

    with pytest.raises(RuntimeError, match="no call"):
        seen_calls(unet, fail)
    assert num_hooks(unet) == 0
    with pytest.raises(RuntimeError):
        seen_calls(unet, lambda: unet(torch.zeros(1, 5, 8, 8), 20, encoder_hidden_states=torch.zeros(1, 77, 32)))
    assert num_hooks(unet) == 0


# --- the fastest -------------------------------------------------------------


CALLS = Counter({AttentionCall(8, 4, 16, 16): 3, AttentionCall(8, 4, 16, 77): 2})

ATTEND = attention.attention_on(SDPBackend.MATH)


class Device:
    """What a device's backends compute, and how long they take for it: those with no time do not run."""

    def __init__(self, seconds: dict[SDPBackend, float]) -> None:
        self._seconds = seconds
        self.wrong: dict[SDPBackend, Callable[[torch.Tensor], bool]] = {}
        self._latest = SDPBackend.MATH
        self.num_calls: Counter[SDPBackend] = Counter()

    def attention_on(self, backend: SDPBackend) -> attention.Attend:
        """In the place of the module's."""

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if backend is SDPBackend.MATH:
                return ATTEND(query, key, value)
            if backend not in self._seconds:
                raise RuntimeError("no such kernel")
            self._latest = backend
            self.num_calls[backend] += 1
            is_wrong = backend in self.wrong and self.wrong[backend](query)
            return ATTEND(query, key, value) * (1.1 if is_wrong else 1.0)

        return attend

    def event(self, **_: object) -> "Event":
        """In the place of torch's."""
        return Event(lambda: 1000 * self._seconds[self._latest])


class Event:
    """A time that goes by only where it is asked for."""

    def __init__(self, milliseconds: Callable[[], float]) -> None:
        self._milliseconds = milliseconds

    def record(self) -> None:
        """Now."""

    def synchronize(self) -> None:
        """It is."""

    def elapsed_time(self, _: "Event") -> float:
        """Milliseconds."""
        return self._milliseconds()


FLASH, EFFICIENT, CUDNN = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """One with three backends."""
    stub = Device({FLASH: 0.02, EFFICIENT: 0.03, CUDNN: 0.01})
    monkeypatch.setattr(attention, "attention_on", stub.attention_on)
    monkeypatch.setattr(torch.cuda, "Event", stub.event)
    return stub


def test_fastest_that_computes_is_chosen(unet: UNet2DConditionModel, device: Device) -> None:
    """Of those that run on the device at all."""
    assert fastest_backend(unet, CALLS, 4) is CUDNN
    del device._seconds[CUDNN]
    assert fastest_backend(unet, CALLS, 4) is FLASH
    device._seconds[EFFICIENT] = 0.001
    assert fastest_backend(unet, CALLS, 4) is EFFICIENT
    device._seconds.clear()
    assert fastest_backend(unet, CALLS, 4) is None


def test_fastest_must_compute_rightly(unet: UNet2DConditionModel, device: Device) -> None:
    """Small numbers are checked, and the very shapes that it is chosen for."""
    device.wrong[CUDNN] = lambda _: True
    assert fastest_backend(unet, CALLS, 4) is FLASH
    device.wrong[CUDNN] = lambda query: len(query) == 4  # The trial calls have two rows.
    assert fastest_backend(unet, CALLS, 4) is FLASH
    assert fastest_backend(unet, CALLS, 6) is CUDNN


def test_every_shape_must_run(unet: UNet2DConditionModel, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that cannot compute one of them is not chosen, however fast it is for the others."""
    attention_on = device.attention_on

    def picky(backend: SDPBackend) -> attention.Attend:
        attend = attention_on(backend)

        def refuse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if backend is CUDNN and len(query) == 4 and key.shape[2] == 77:
                raise RuntimeError("no such shape")
            return attend(query, key, value)

        return refuse

    monkeypatch.setattr(attention, "attention_on", picky)
    assert fastest_backend(unet, CALLS, 4) is FLASH


def test_calls_count_as_often_as_they_come(unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is slow for what is rare may be the fastest."""
    often, seldom = AttentionCall(8, 4, 16, 16), AttentionCall(8, 4, 16, 77)
    times = {(FLASH, often): 1.0, (FLASH, seldom): 9.0, (CUDNN, often): 2.0, (CUDNN, seldom): 1.0}

    def seconds(_: object, backend: SDPBackend, call: AttentionCall, num_rows: int) -> float:
        assert num_rows == 4
        if (backend, call) not in times:
            raise RuntimeError("no such kernel")
        return times[backend, call]

    monkeypatch.setattr(attention, "probe", lambda *_: None)
    monkeypatch.setattr(attention, "_seconds", seconds)
    assert fastest_backend(unet, Counter({often: 10, seldom: 1}), 4) is FLASH
    assert fastest_backend(unet, Counter({often: 7, seldom: 1}), 4) is CUDNN


def test_without_a_device_that_can_be_timed_torch_chooses(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is chosen, and nothing is left of the search."""

    def fail(**_: object) -> None:
        raise RuntimeError("no CUDA")

    monkeypatch.setattr(torch.cuda, "Event", fail)
    before = state()
    assert fastest_backend(unet, CALLS, 2) is None
    assert state() == before
