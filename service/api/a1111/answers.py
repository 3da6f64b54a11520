"""What `img2img` answers: pictures in Base64, the request's fields, and the web UI's notes on the pictures.

Source of the notes: `Processed.js` and `create_infotext` in the web UI's modules/processing.py (version 1.10).
"""

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from service import __version__
from service.api.a1111.translate import Call
from service.api.answers import JSON_MEDIA_TYPE, Painted
from service.api.kept_answers import Answer
from service.imaging import png_with_text

_INFO_KEYWORD = "parameters"
"""Under which the web UI writes its notes into a PNG."""

_NEEDS_QUOTES = (",", "\n", ":")


def timestamp() -> str:
    """Now, as the web UI names its jobs."""
    return datetime.now(UTC).strftime("%Y%m%d%H%M%S")


def img2img_answer(call: Call, painted: Painted, job_timestamp: str) -> Answer:
    """The pictures of a request, with what they were painted with. Megabytes: not for the event loop.

    Args:
        call: The request.
        painted: What came of it.
        job_timestamp: When it came.
    """
    infotexts = [_infotext(call, painted, index) for index in range(len(painted.files))]
    files = [png_with_text(file.data, _INFO_KEYWORD, text) for file, text in zip(painted.files, infotexts, strict=True)]
    body = {
        "images": [base64.b64encode(file).decode("ascii") for file in files] if call.sends_images else [],
        "parameters": call.parameters,
        "info": json.dumps(_info(call, painted, infotexts, job_timestamp)),
        "nsfw_content_detected": [file.is_flagged for file in painted.files],
        "request_id": painted.request_id,
    }
    return Answer(painted.request_id, JSON_MEDIA_TYPE, {}, json.dumps(body).encode())


def interrupted_body(call: Call, job_timestamp: str) -> dict[str, Any]:
    """The answer to a request that its client has interrupted: no pictures, because none is finished.

    Args:
        call: The request.
        job_timestamp: When it came.
    """
    info = {"all_seeds": [], "infotexts": [], "index_of_first_image": 0, "job_timestamp": job_timestamp}
    return {"images": [], "parameters": call.parameters, "info": json.dumps({**info, "interrupted": True})}


def _info(call: Call, painted: Painted, infotexts: Sequence[str], job_timestamp: str) -> dict[str, Any]:
    params, sent = painted.params, call.parameters
    count = len(painted.files)
    prompt = sent["prompt"]
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * count,
        "negative_prompt": params.negative_prompt,
        "all_negative_prompts": [params.negative_prompt] * count,
        "seed": params.seed,
        "all_seeds": [params.seed + index for index in range(count)],
        "subseed": sent["subseed"],
        "all_subseeds": [sent["subseed"]] * count,
        "subseed_strength": 0,
        "width": painted.fields.width,
        "height": painted.fields.height,
        "sampler_name": call.choice.sampler.name,
        "cfg_scale": params.guidance_scale,
        "steps": params.num_inference_steps,
        "batch_size": sent["batch_size"],
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": painted.model_id,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": sent["seed_resize_from_w"],
        "seed_resize_from_h": sent["seed_resize_from_h"],
        "denoising_strength": params.strength,
        "extra_generation_params": _extras(call, painted),
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": job_timestamp,
        "clip_skip": params.clip_skip + 1,
        "is_using_inpainting_conditioning": call.is_inpainting_model,
        "version": _version(),
    }


def _infotext(call: Call, painted: Painted, index: int) -> str:
    """The notes on one picture, as the web UI and those who read its pictures write them."""
    params = painted.params
    notes: dict[str, Any] = {
        "Steps": params.num_inference_steps,
        "Sampler": call.choice.sampler.name,
        "Schedule type": call.choice.schedule_type.label,
        "CFG scale": params.guidance_scale,
        "Seed": params.seed + index,
        "Size": f"{painted.fields.width}x{painted.fields.height}",
        "Model": painted.model_id,
        "Denoising strength": params.strength,
        "Clip skip": params.clip_skip + 1 if params.clip_skip else None,
        "RNG": "CPU",
        **_extras(call, painted),
        "Version": _version(),
    }
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in notes.items() if value is not None)
    negative = f"\nNegative prompt: {params.negative_prompt}" if params.negative_prompt else ""
    return f"{call.parameters['prompt']}{negative}\n{line}".strip()


def _extras(call: Call, painted: Painted) -> Mapping[str, Any]:
    """Notes that only some pictures have."""
    if not call.has_mask:
        return {}
    fields = painted.fields
    notes = {
        "Mask mode": "Inpaint not masked" if fields.mask_invert else None,
        "Mask blur": fields.mask_blur or None,
        "Inpaint area": "Only masked" if call.is_only_masked else None,
        "Masked area padding": fields.padding_mask_crop,
        "Masked content": "fill" if call.is_filled else None,
    }
    return {name: value for name, value in notes.items() if value is not None}


def _quoted(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in _NEEDS_QUOTES) else text


def _version() -> str:
    return f"inpaint-service {__version__}"
