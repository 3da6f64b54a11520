"""The web UI's settings: what each of them is here, and what a request may override."""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from service.api.forms import shown
from service.api.problems import Fault
from service.errors import ErrorCode
from service.messages import ModelInfo

CHECKPOINT = "sd_model_checkpoint"
CLIP_SKIP = "CLIP_stop_at_last_layers"
LIVE_PREVIEWS = "live_previews_enable"

OVERRIDABLE = frozenset({CLIP_SKIP, LIVE_PREVIEWS})
"""What holds for one request where its `override_settings` say so."""

_UNSET = (None, "")


def options(model: ModelInfo) -> dict[str, Any]:
    """Every setting that has a meaning here, under the web UI's name, as it is.

    Args:
        model: The served model.
    """
    return {
        CHECKPOINT: model.id,
        "sd_vae": "Automatic",
        CLIP_SKIP: 1,
        LIVE_PREVIEWS: False,
        "samples_format": "png",
        "samples_save": False,
        "grid_save": False,
        "return_grid": False,
        "save_init_img": False,
        "enable_pnginfo": True,
        "filter_nsfw": model.has_safety_checker,
        "face_restoration": False,
        "tiling": False,
        "emphasis": "Original",
        "comma_padding_backtrack": 20,
        "eta_noise_seed_delta": 0,
        "randn_source": "CPU",
        "img2img_color_correction": False,
        "img2img_fix_steps": False,
        "initial_noise_multiplier": 1.0,
        "inpainting_mask_weight": 1.0,
        "upscaler_for_img2img": None,
    }


def setting_faults(
    settings: Mapping[str, Any], model: ModelInfo, prefix: str = "", overridable: frozenset[str] = frozenset()
) -> Iterator[Fault]:
    """What of these settings is not so here and cannot be made so.

    Args:
        settings: As they were sent.
        model: The served model.
        prefix: What stands before a setting's name in the field of a fault.
        overridable: Those that may have any value.
    """
    known = options(model)
    for name, value in settings.items():
        field = f"{prefix}{shown(name)}"
        if name == CHECKPOINT:
            if value not in (*_UNSET, *_checkpoint_names(model)):
                yield Fault(field, ErrorCode.INVALID_FIELD, f"{field}: Only the served model is here, see sd-models.")
        elif name not in known:
            yield Fault(field, ErrorCode.INVALID_FIELD, f"{field}: There is no such setting here.")
        elif name not in overridable and value not in (None, known[name]):
            yield Fault(field, ErrorCode.INVALID_FIELD, f"{field}: This setting cannot be changed here.")


def _checkpoint_names(model: ModelInfo) -> tuple[str, ...]:
    """What clients call the served model: as `sd-models` does, or by its file."""
    path = PurePath(model.id)
    return model.id, path.name, path.stem
