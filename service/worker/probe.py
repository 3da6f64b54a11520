"""What a diffusers scheduler does in each step, found out by running it on basis vectors.

A scheduler whose steps are linear is a small state-space model: the UNet sees
κ x, and a step maps (x, h1..hK, ε, z) to (x', h1'..hK'), where ε is the UNet's
output, z the noise drawn in the step and h whatever tensors the scheduler
remembers. Nothing is derived by hand. The scheduler runs for real, in float64,
on one vector whose elements are independent because every step works element
by element:

    element      0    1    2    3 ... 2 + MAX_TRACKED    the rest
    x            1    0    0    0 ... 0                  random
    ε            0    1    0    0 ... 0                  random
    z            0    0    1    0 ... 0                  random
    j-th memory  0    0    0    1 at 3 + j               what the scheduler remembers there

The first part is put anew before each step, so what comes out is a row of the
step's matrix. The rest, with magnitudes at which clipping would act, must come
out as the matrices say; where it does not, the scheduler is not linear.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch.overrides import TorchFunctionMode

MAX_TRACKED = 8
"""Tensors that a scheduler may remember at once, before the ones it never uses again are left out."""

_X, _EPSILON, _Z, _MEMORY = 0, 1, 2, 3
_NUM_BASIS = _MEMORY + MAX_TRACKED
_MAGNITUDES = (0.0, 0.1, 1.0, 30.0, 1e3, 1e5)
"""Of the random elements. 0: whatever comes out there is a constant, which the matrices have no place for."""
_NUM_ELEMENTS = _NUM_BASIS + len(_MAGNITUDES)
_SHAPE = (1, 1, 1, _NUM_ELEMENTS)

_TOLERANCE = 1e-4
"""Relative; schedulers compute in float32 inside, and clipping is off by far more."""

_NEGLIGIBLE = 1e-10
"""Relative; a coefficient below is what rounding left of a zero."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Which steps to take: what the stock pipeline's call is told of them.

    Attributes:
        num_inference_steps: Steps before `strength`; not used beside a list.
        strength: Share of the schedule to run, in (0, 1].
        timesteps: Timesteps in the place of the scheduler's own.
        sigmas: Noise levels in the place of the scheduler's own.
    """

    num_inference_steps: int
    strength: float = 1.0
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class StockSchedule:
    """A scheduler made ready as steps 4 and 5 of the stock pipeline do.

    Attributes:
        scheduler: The scheduler, about to take its first step.
        timesteps: (calls,) its timesteps after `strength`, of its own type, on the CPU.
        num_inference_steps: Steps after `strength`.
    """

    scheduler: SchedulerMixin
    timesteps: torch.Tensor
    num_inference_steps: int


def start_schedule(scheduler: SchedulerMixin, steps: Steps) -> StockSchedule:
    """Set the timesteps and skip those before `strength`, as stock's `retrieve_timesteps` and `get_timesteps`.

    Raises:
        ValueError: The scheduler cannot take these steps, or none is left to take.
    """
    num_steps = _set_timesteps(scheduler, steps)
    num_left = min(int(num_steps * steps.strength), num_steps)
    begin_index = (num_steps - num_left) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin_index)
    timesteps = scheduler.timesteps[begin_index:]
    if num_left < 1 or len(timesteps) < 1:
        raise ValueError("no step is left")
    return StockSchedule(scheduler, timesteps, num_left)


def _set_timesteps(scheduler: SchedulerMixin, steps: Steps) -> int:
    """Returns the number of steps as stock counts them; of a list, the model calls."""
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    for name, values in (("timesteps", steps.timesteps), ("sigmas", steps.sigmas)):
        if values is None:
            continue
        if name not in accepted:
            raise ValueError(f"the scheduler takes no {name}")
        scheduler.set_timesteps(**{name: list(values)}, device="cpu")
        return len(scheduler.timesteps)
    scheduler.set_timesteps(steps.num_inference_steps, device="cpu")
    return steps.num_inference_steps


def step_kwargs(scheduler: SchedulerMixin, eta: float, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of `step` beyond the usual, as stock's `prepare_extra_step_kwargs`."""
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The matrices of a linear scheduler.

    Attributes:
        input_scale: (calls,) float64 κ.
        transition: (calls, 1 + K, K + 3) float64; columns x, h1..hK, ε, z.
        draws_noise: Whether noise is drawn, by call.
    """

    input_scale: torch.Tensor
    transition: torch.Tensor
    draws_noise: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found out about one schedule.

    Attributes:
        init_noise_sigma: Factor of the noise where the first latents are noise alone.
        initial: Factors of the image latents and the noise that the first latents are made of.
        renoise: (calls, 2) float32, the same factors for the known region after each call.
        recurrence: The matrices, None where the scheduler is not linear or remembers too much.
    """

    init_noise_sigma: float
    initial: tuple[float, float]
    renoise: torch.Tensor
    recurrence: Recurrence | None


def probe(schedule: StockSchedule, *, is_pure_noise: bool, eta: float, max_history: int) -> Probe:
    """Run a scheduler through its schedule, and say what it does.

    Args:
        schedule: The schedule; its scheduler is used up.
        is_pure_noise: Whether the first latents are noise alone, which stock does at strength 1.
        eta: η, for schedulers that take it.
        max_history: Largest K; the matrices are padded to it.
    """
    scheduler, timesteps = schedule.scheduler, schedule.timesteps
    generator = torch.Generator()
    kwargs = step_kwargs(scheduler, eta, generator)
    init_noise_sigma = float(scheduler.init_noise_sigma)
    initial = (0.0, init_noise_sigma) if is_pure_noise else _noise_factors(scheduler, timesteps[:1])
    renoise = [(1.0, 0.0)] * len(timesteps)
    has_own_noise = hasattr(scheduler, "noise_sampler")
    if has_own_noise:  # then no table can be made, and nothing else depends on the costly noise
        scheduler.noise_sampler = lambda _sigma, _next_sigma: 0.0
    seen = _Seen.allocate(len(timesteps))
    memory: list[torch.Tensor] = []
    for call, timestep in enumerate(timesteps):
        x, epsilon, z = (seen.inputs[call, row].view(_SHAPE).clone() for row in (_X, _EPSILON, _Z))
        with _Draws(generator, z) if "generator" in kwargs else nullcontext() as draws:
            scaled = scheduler.scale_model_input(x, timestep)
            latents = scheduler.step(epsilon, timestep, x, **kwargs, return_dict=False)[0]
        if call + 1 < len(timesteps):
            renoise[call] = _noise_factors(scheduler, torch.tensor([timesteps[call + 1]]))
        remembered, next_memory = _put_basis(scheduler)
        seen.record(call, memory, scaled, [latents, *remembered], draws.num_draws if draws else 0)
        memory = next_memory
    is_table = seen.is_linear() and not has_own_noise
    recurrence = _recurrence(seen, max_history) if is_table else None
    return Probe(init_noise_sigma, initial, torch.tensor(renoise), recurrence)


def _noise_factors(scheduler: SchedulerMixin, timestep: torch.Tensor) -> tuple[float, float]:
    """The a and b of `add_noise(image, noise, timestep)`, which is a * image + b * noise; float32 as stock's."""
    image, noise = torch.eye(2).view(2, 1, 1, 1, 2)
    image_factor, noise_factor = scheduler.add_noise(image, noise, timestep).flatten().tolist()
    return image_factor, noise_factor


# --- running on basis vectors ------------------------------------------------


def _put_basis(scheduler: SchedulerMixin) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Put a basis vector in the place of every different tensor that a scheduler remembers.

    Those are told by the sample's shape, which nothing else in a scheduler has.

    Returns:
        The tensors as they were, and as they are now.
    """
    attributes = vars(scheduler)
    containers: list[Any] = [attributes, *(value for value in attributes.values() if isinstance(value, list))]
    found: list[torch.Tensor] = []
    placed: list[torch.Tensor] = []
    for container in containers:
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            if not isinstance(value, torch.Tensor) or value.shape != _SHAPE:
                continue
            same = (index for index, other in enumerate(found) if torch.equal(other, value.double()))
            index = next(same, len(found))
            if index == len(found):
                found.append(value.double())
                placed.append(_with_basis(value, _MEMORY + index))
            container[key] = placed[index]
    return found, placed


def _with_basis(tensor: torch.Tensor, element: int) -> torch.Tensor:
    """A copy whose first part is a basis vector."""
    result = tensor.clone()
    result[..., :_NUM_BASIS] = 0.0
    if element < _NUM_BASIS:
        result[..., element] = 1.0
    return result


class _Draws(TorchFunctionMode):
    """Answers a scheduler's draws from `generator` with `noise`, and counts them. Seen by this thread alone."""

    def __init__(self, generator: torch.Generator, noise: torch.Tensor) -> None:
        super().__init__()
        self.num_draws = 0
        self._generator = generator
        self._noise = noise

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("generator") is self._generator:
            self.num_draws += 1
            return self._noise.to(kwargs.get("dtype"))
        return func(*args, **kwargs)


# --- from what was seen to matrices ------------------------------------------


@dataclass(slots=True, eq=False)
class _Seen:
    """What each call made of what.

    Attributes:
        inputs: (calls, basis, elements): x, ε, z and what was remembered before; unused rows are 0.
        scaled: (calls, 1, elements): what the UNet is given.
        outputs: (calls, 1 + MAX_TRACKED, elements): x' and what is remembered after.
        num_draws: Draws from the generator, by call.
        num_remembered: Largest number of tensors remembered.
    """

    inputs: torch.Tensor
    scaled: torch.Tensor
    outputs: torch.Tensor
    num_draws: list[int]
    num_remembered: int = 0

    @classmethod
    def allocate(cls, num_calls: int) -> "_Seen":
        """With x, ε and z filled in."""
        inputs = torch.zeros(num_calls, _NUM_BASIS, _NUM_ELEMENTS, dtype=torch.float64)
        inputs[:, :_MEMORY, :_MEMORY] = torch.eye(_MEMORY)
        random = torch.Generator().manual_seed(0)
        noise = torch.randn(num_calls, _MEMORY, len(_MAGNITUDES), dtype=torch.float64, generator=random)
        inputs[:, :_MEMORY, _NUM_BASIS:] = noise * torch.tensor(_MAGNITUDES, dtype=torch.float64)
        return cls(
            inputs=inputs,
            scaled=inputs.new_zeros(num_calls, 1, _NUM_ELEMENTS),
            outputs=inputs.new_zeros(num_calls, 1 + MAX_TRACKED, _NUM_ELEMENTS),
            num_draws=[],
        )

    def record(
        self,
        call: int,
        memory: Sequence[torch.Tensor],
        scaled: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        num_draws: int,
    ) -> None:
        """Keep one call's tensors, as many as there is room for."""
        for row, tensor in enumerate(memory[:MAX_TRACKED]):
            self.inputs[call, _MEMORY + row] = tensor.view(-1)
        self.scaled[call, 0] = scaled.view(-1)
        for row, tensor in enumerate(outputs[: 1 + MAX_TRACKED]):
            self.outputs[call, row] = tensor.view(-1)
        self.num_draws.append(num_draws)
        self.num_remembered = max(self.num_remembered, len(outputs) - 1)

    @property
    def matrices(self) -> torch.Tensor:
        """(calls, 1 + MAX_TRACKED, basis): what maps inputs to outputs."""
        return self.outputs[..., :_NUM_BASIS]

    def is_linear(self) -> bool:
        """Whether every element is what the matrices say; False for infinities and NaN."""
        if self.num_remembered > MAX_TRACKED or max(self.num_draws) > 1:
            return False
        scales = torch.zeros_like(self.inputs[:, :1, :_NUM_BASIS])
        scales[..., _X] = self.scaled[..., _X]
        return _agrees(self.outputs, self.matrices, self.inputs) and _agrees(self.scaled, scales, self.inputs)


def _agrees(outputs: torch.Tensor, matrices: torch.Tensor, inputs: torch.Tensor) -> bool:
    error = (outputs - matrices @ inputs).abs()
    return bool((error <= _TOLERANCE * (matrices.abs() @ inputs.abs())).all())


def _recurrence(seen: _Seen, max_history: int) -> Recurrence | None:
    """Matrices over what is still used later, None where that is too much."""
    live = _live_memory(seen.matrices)
    if max(map(len, live)) > max_history:
        return None
    transition = seen.outputs.new_zeros(len(seen.matrices), 1 + max_history, max_history + 3)
    for call, matrix in enumerate(seen.matrices):
        before, after = live[call], live[call + 1]
        rows = matrix[[0, *(1 + memory for memory in after)]]
        target = transition[call, : len(rows)]
        target[:, : 1 + len(before)] = rows[:, [_X, *(_MEMORY + memory for memory in before)]]
        target[:, -2:] = rows[:, [_EPSILON, _Z]]
    return Recurrence(seen.scaled[:, 0, _X], transition, tuple(num == 1 for num in seen.num_draws))


def _live_memory(matrices: torch.Tensor) -> list[list[int]]:
    """For each call, and after the last: which memories some later result depends on."""
    largest = matrices.abs().amax(dim=2, keepdim=True)
    uses = (matrices.abs() > _NEGLIGIBLE * largest)[..., _MEMORY:].tolist()  # [call][output][memory]
    live: list[list[int]] = [[]]
    for rows in reversed(uses):
        needed = [rows[0], *(rows[1 + memory] for memory in live[0])]
        live.insert(0, [memory for memory in range(MAX_TRACKED) if any(row[memory] for row in needed)])
    return live
