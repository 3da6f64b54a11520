"""How long a device takes for what a worker asks of it: measured times, and what lies between them."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class StageCost:
    """Preparing or finishing some images together.

    Attributes:
        fixed_seconds: However many they are.
        image_seconds: For each.
        device_seconds: Of the device's time for each, by which the steps beside it get longer; only where jobs
            run in the background.
    """

    fixed_seconds: float
    image_seconds: float
    device_seconds: float = 0.0

    def seconds(self, num_images: int) -> float:
        """Of so many images together."""
        return self.fixed_seconds + num_images * self.image_seconds


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one device and model.

    Attributes:
        step_seconds: Seconds of one step by UNet rows, at least one.
        max_images: Images that may share a step.
        prepare: Text encoder, VAE encoder, noise.
        finish: VAE decoder, safety checker.
        switch_seconds: Changing the weights from one set of LoRAs to another.
        has_background: Whether preparing and finishing run beside the steps, as on CUDA, or between them.
        is_padded: Whether a batch is filled up to the next number of rows that was measured, as captured ones are.
        load_seconds: From the loss of a worker until its successor is ready.
        edge_seconds: What the API process takes for a request before it is admitted, and again after it was painted.
        pipe_seconds: From the API process to a worker, or back.
        slowness: From which moment on, in seconds from the start, the device takes so many times as long as these
            costs say; ascending, and before the first as the first. Empty for a device that always takes what they say.
    """

    step_seconds: Mapping[int, float]
    max_images: int
    prepare: StageCost
    finish: StageCost
    switch_seconds: float = 0.0
    has_background: bool = True
    is_padded: bool = True
    load_seconds: float = 60.0
    edge_seconds: float = 0.010
    pipe_seconds: float = 0.0005
    slowness: tuple[tuple[float, float], ...] = ()

    def slowness_at(self, moment: float) -> float:
        """How many times as long the device takes."""
        if not self.slowness:
            return 1.0
        place = bisect_right(self.slowness, moment, key=lambda change: change[0])
        return self.slowness[max(0, place - 1)][1]

    def step(self, num_rows: int) -> float:
        """Seconds of one step of so many rows; beyond what was measured, in proportion."""
        known = sorted(self.step_seconds.items())
        rows, seconds = known[0]
        for more_rows, more_seconds in known:
            if num_rows <= more_rows:
                if self.is_padded or num_rows <= rows:
                    return more_seconds
                return seconds + (more_seconds - seconds) * (num_rows - rows) / (more_rows - rows)
            rows, seconds = more_rows, more_seconds
        return seconds * num_rows / rows

    def alone_seconds(self, num_steps: int, num_rows: int = 2) -> float:
        """From sending to answer of a request of one image that has a device for itself."""
        stages = self.prepare.seconds(1) + self.finish.seconds(1)
        return 2 * (self.edge_seconds + self.pipe_seconds) + stages + num_steps * self.step(num_rows)

    def images_per_second(self, mean_steps: float, rows_per_image: int = 2) -> float:
        """What one device paints that always has a full batch of one key: its capacity."""
        batch_seconds = mean_steps * self.step(rows_per_image * self.max_images)
        if self.has_background:
            stage_seconds = self.prepare.device_seconds + self.finish.device_seconds
        else:  # One at a time: they end at different steps.
            stage_seconds = self.prepare.seconds(1) + self.finish.seconds(1)
        return self.max_images / (batch_seconds + self.max_images * stage_seconds)


H200 = Costs(
    step_seconds=MappingProxyType(
        {
            rows: milliseconds / 1000
            for rows, milliseconds in {
                2: 6.0,
                4: 9.2,
                6: 12.6,
                8: 16.1,
                12: 23.0,
                16: 30.4,
                20: 38.8,
                24: 45.5,
                28: 54.2,
                32: 61.3,
            }.items()
        }
    ),
    max_images=6,
    prepare=StageCost(fixed_seconds=0.018, image_seconds=0.004, device_seconds=0.00725),
    finish=StageCost(fixed_seconds=0.003, image_seconds=0.008, device_seconds=0.0145),
    switch_seconds=0.0011,
    edge_seconds=0.0055,
)
"""Stable Diffusion 1.5 inpainting at 512x512 in float16, compiled and captured, as `benchmarks/results` has it.

Steps are those that three starts found (means); of images that may share one, two starts found 6 and one 8. Stages
and edges are those of requests alone. The device's time for what is beside the steps is what `--validate-against`
finds in saturated loads, of which the VAE takes 12 ms. What each further image adds to a stage is the VAE's. The
switch is one of LoRAs with convolutions, measured alone.
"""
