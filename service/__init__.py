"""Inpainting over HTTP: one warm Stable Diffusion inpainting pipeline per device, batched at step boundaries."""

__version__ = "0.1.0"
