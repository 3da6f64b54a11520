"""The fields of `img2img`: which are read, which are taken at their neutral values, which are of no effect.

Names and defaults are those of `StableDiffusionProcessingImg2Img` in the web UI's modules/processing.py and of its
modules/api/models.py (version 1.10). The web UI passes over names that it does not know; here they are refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from service.api.forms import shown
from service.api.problems import Fault
from service.errors import ErrorCode

READ: Mapping[str, Any] = {
    "init_images": None,
    "mask": None,
    "prompt": "",
    "negative_prompt": "",
    "seed": -1,
    "steps": 50,
    "cfg_scale": 7.0,
    "denoising_strength": 0.75,
    "sampler_name": None,
    "sampler_index": "Euler",
    "scheduler": None,
    "eta": None,
    "s_noise": None,
    "width": 512,
    "height": 512,
    "resize_mode": 0,
    "batch_size": 1,
    "n_iter": 1,
    "mask_blur": None,
    "mask_blur_x": 4,
    "mask_blur_y": 4,
    "inpainting_fill": 0,
    "inpaint_full_res": True,
    "inpaint_full_res_padding": 0,
    "inpainting_mask_invert": 0,
    "override_settings": None,
    "disable_extra_networks": False,
    "send_images": True,
    "include_init_images": False,
}
"""What is read, with its default."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "styles": (None, []),
    "subseed_strength": (0,),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "restore_faces": (None, False),
    "tiling": (None, False),
    "s_min_uncond": (None, 0),
    "s_churn": (None, 0),
    "refiner_checkpoint": (None, "", "None", "none"),
    "firstpass_image": (None, ""),
    "latent_mask": (None, ""),
    "mask_round": (True,),
    "initial_noise_multiplier": (None, 1),
    "token_merging_ratio": (0,),
    "token_merging_ratio_hr": (0,),
    "enable_hr": (False,),
    "script_name": (None, ""),
    "alwayson_scripts": ({},),
    "save_images": (False,),
    "infotext": (None, ""),
}
"""What would change the picture, and is not served: the values that leave it as it is, the default first."""

INERT: Mapping[str, tuple[Any, str]] = {
    "do_not_save_samples": (False, "nothing is saved"),
    "do_not_save_grid": (False, "nothing is saved"),
    "do_not_reload_embeddings": (False, "they are loaded at start"),
    "override_settings_restore_afterwards": (True, "settings never outlast their request"),
    "force_task_id": (None, "progress is told of a client's requests"),
    "comments": ({}, "the web UI's own notes"),
    "seed_enable_extras": (True, "the extras have fields of their own"),
    "script_args": ([], "a script would have to be named"),
    "image_cfg_scale": (None, "for models that edit by instruction"),
    "distilled_cfg_scale": (None, "for models with distilled guidance"),
    "subseed": (-1, "while subseed_strength is 0"),
    "s_tmin": (None, "while s_churn is 0"),
    "s_tmax": (None, "while s_churn is 0"),
    "refiner_switch_at": (None, "without a refiner"),
    "firstphase_width": (0, "while enable_hr is false"),
    "firstphase_height": (0, "while enable_hr is false"),
    "hr_scale": (2.0, "while enable_hr is false"),
    "hr_upscaler": (None, "while enable_hr is false"),
    "hr_second_pass_steps": (0, "while enable_hr is false"),
    "hr_resize_x": (0, "while enable_hr is false"),
    "hr_resize_y": (0, "while enable_hr is false"),
    "hr_checkpoint_name": (None, "while enable_hr is false"),
    "hr_sampler_name": (None, "while enable_hr is false"),
    "hr_scheduler": (None, "while enable_hr is false"),
    "hr_prompt": ("", "while enable_hr is false"),
    "hr_negative_prompt": ("", "while enable_hr is false"),
}
"""What does not change the picture, with its default and the reason: any value is taken."""

DEFAULTS: Mapping[str, Any] = {
    **READ,
    **{name: values[0] for name, values in NEUTRAL.items()},
    **{name: default for name, (default, _) in INERT.items()},
}
"""Every field that is taken."""


def field_faults(sent: Mapping[str, Any]) -> Iterator[Fault]:
    """Fields that are not known, or not served at the value that they have.

    Args:
        sent: The request's body, without fields that are null.
    """
    for name, value in sent.items():
        if name not in DEFAULTS:
            field = shown(name)
            yield Fault(field, ErrorCode.INVALID_FIELD, f"{field}: There is no such field.")
        elif name in NEUTRAL and value not in NEUTRAL[name]:
            yield Fault(name, ErrorCode.INVALID_FIELD, f"{name}: {_not_served(name)}.")


def _not_served(name: str) -> str:
    values = [_spelled(value) for value in NEUTRAL[name] if value is not None]
    return f"This is not served here. Input should be {' or '.join(values)}, or left out"


def _spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
