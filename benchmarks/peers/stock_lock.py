"""The stock diffusers pipeline behind a lock: what most people run.

One `StableDiffusionInpaintPipeline` in fp32 with its safety checker on, one request
at a time in a thread, PNG in and PNG out, under the path and field names of
`POST /v1/inpaint`. Pictures are decoded and encoded outside the lock.

Usage: python -m benchmarks.peers.stock_lock --model FOLDER --port PORT --threads N
"""

import argparse
import asyncio
import io
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import uvicorn
from diffusers import StableDiffusionInpaintPipeline
from fastapi import FastAPI, File, Form, Response
from PIL import Image

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
"""The noise schedulers of `benchmarks.traffic`, by their short names."""


def create_app(pipeline: StableDiffusionInpaintPipeline) -> FastAPI:
    """The server around a loaded pipeline."""
    app = FastAPI()
    lock = asyncio.Lock()
    own_scheduler = pipeline.scheduler.config

    def paint(scheduler: str, seed: int, arguments: dict[str, Any]) -> Image.Image:
        pipeline.scheduler = SCHEDULERS[scheduler].from_config(own_scheduler)
        picture: Image.Image = pipeline(**arguments, generator=torch.Generator().manual_seed(seed)).images[0]
        return picture

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/inpaint")
    async def inpaint(
        *,
        image: Annotated[bytes, File()],
        mask: Annotated[bytes, File()],
        prompt: Annotated[str, Form()],
        num_inference_steps: Annotated[int, Form()],
        guidance_scale: Annotated[float, Form()],
        scheduler: Annotated[str, Form()],
        seed: Annotated[int, Form()],
        height: Annotated[int, Form()],
        width: Annotated[int, Form()],
    ) -> Response:
        arguments = {
            "prompt": prompt,
            "image": await asyncio.to_thread(_decode, image, "RGB"),
            "mask_image": await asyncio.to_thread(_decode, mask, "L"),
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
        }
        async with lock:
            picture = await asyncio.to_thread(paint, scheduler, seed, arguments)
        return Response(await asyncio.to_thread(_encode, picture), media_type="image/png")

    return app


def _decode(data: bytes, mode: str) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert(mode)


def _encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def main() -> None:
    """Load the pipeline, warm it up with one request, serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="The stock diffusers pipeline behind a lock.")
    parser.add_argument("--model", type=Path, required=True, help="folder in diffusers format")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(
        arguments.model, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    # Loaded and warm before the port opens, so that an answer means readiness.
    blank = Image.new("RGB", (64, 64))
    pipeline(prompt="", image=blank, mask_image=blank.convert("L"), num_inference_steps=1, height=64, width=64)
    uvicorn.run(create_app(pipeline), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
