"""The README's tables of the stock pipeline: complete, and with a test behind every row."""

import inspect
import re
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline

from tests.model.rows import ROWS

ROOT = Path(__file__).parents[2]

EVERY_ROW = "tests/model/test_every_row.py::test_tiny_checkpoints_singly_and_in_one_mixed_batch"
CROP = "tests/model/test_crop_parity.py::test_padded_crop_in_a_mixed_batch"
EVENTS = "tests/http/test_answers.py::test_events_tell_position_progress_and_the_answer"
PREVIEWS = "tests/model/test_previews.py::test_previews_approach_the_result"
IP_ADAPTER = "tests/model/test_ip_adapter.py"
SWITCHES = "tests/model/test_switches.py"

PROOFS: dict[str, str] = {
    **dict.fromkeys(ROWS, EVERY_ROW),
    "width": EVERY_ROW,
    "mask_image": "tests/model/test_parity.py::test_mixed_staggered_batch_equals_stock_run_alone",
    "padding_mask_crop": CROP,
    "ip_adapter_image": IP_ADAPTER,
    "ip_adapter_image_embeds": IP_ADAPTER,
    "return_dict": "tests/http/test_answers.py::test_json_answer_has_images_effective_parameters_timings_and_batch",
    "cross_attention_kwargs": "tests/model/test_every_row.py::test_scale_of_cross_attention_kwargs",
    "callback_on_step_end": EVENTS,
    "callback_on_step_end_tensor_inputs": PREVIEWS,
    "callback": EVENTS,
    "callback_steps": EVENTS,
    "from_pretrained": "tests/model/test_checkpoint.py::test_what_clients_learn_of_a_model",
    "from_single_file": "tests/model/test_single_file.py",
    "safety_checker": "tests/model/test_parity.py::test_mixed_staggered_batch_equals_stock_run_alone",
    "feature_extractor": "tests/model/test_safety.py",
    "requires_safety_checker": "tests/model/test_checkpoint.py::test_checkpoint_without_safety_checker_needs_consent",
    "get_active_adapters": EVERY_ROW,
    "get_list_adapters": "tests/http/test_adapters.py",
    "enable_lora": "tests/model/test_lora.py::test_weights_come_back_bit_for_bit",
    "disable_lora": "tests/model/test_lora.py::test_weights_come_back_bit_for_bit",
    "unload_lora_weights": "tests/http/test_adapters.py",
    "delete_adapters": "tests/http/test_adapters.py",
    "unload_textual_inversion": "tests/model/test_textual_inversion.py",
    "load_ip_adapter": IP_ADAPTER,
    "set_ip_adapter_scale": IP_ADAPTER,
    "unload_ip_adapter": f"{IP_ADAPTER}::test_other_requests_run_as_if_none_was_loaded",
    "disable_freeu": "tests/model/test_every_row.py::test_weights_are_as_they_were",
    "enable_attention_slicing": SWITCHES,
    "disable_attention_slicing": SWITCHES,
    "enable_xformers_memory_efficient_attention": SWITCHES,
    "disable_xformers_memory_efficient_attention": SWITCHES,
    "vae.enable_slicing": SWITCHES,
    "vae.enable_tiling": SWITCHES,
    "to": "tests/model/test_checkpoint.py::test_weights_are_float32_on_a_cpu_and_frozen",
    "set_progress_bar_config": EVENTS,
    "interrupt": "tests/process/test_requests.py",
}
"""By the name in the table: the test that holds it against stock, or the file of such tests."""

_STEPS = """
check_inputs encode_image encode_prompt get_guidance_scale_embedding get_timesteps prepare_extra_step_kwargs
prepare_ip_adapter_image_embeds prepare_latents prepare_mask_latents progress_bar run_safety_checker
maybe_convert_prompt do_classifier_free_guidance num_timesteps numpy_to_pil maybe_free_model_hooks
"""
_LOADERS = """
download from_config from_pipe load_config load_lora_into_text_encoder load_lora_into_unet lora_state_dict lora_scale
pack_weights write_lora_layers extract_init_dict get_config_dict register_modules register_to_config
register_for_auto_class reset_device_map remove_all_hooks set_attention_slice
set_use_memory_efficient_attention_xformers fused_loras num_fused_loras
"""
_OBJECT = """
components config config_name device dtype has_compatibles hf_device_map ignore_for_config model_cpu_offload_seq
name_or_path parameters save_config text_encoder_name to_json_file to_json_string unet_name
"""
INTERNAL = frozenset((_STEPS + _LOADERS + _OBJECT).split())
"""What of the class nobody calls from a script to get a picture."""


def section() -> str:
    """The README's section."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^## Coming from a script\n(.*?)^## ", readme, flags=re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def table_names() -> list[str]:
    """Every name in the tables' left column."""
    rows = [line.split("|")[1] for line in section().splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    return [name for name in names if name != "pipe(…)"]


def left_out() -> set[str]:
    """Every name below the tables that is said not to be there."""
    return set(re.findall(r"`(\w+)`", section().rpartition("\n|")[2].partition("\n\n")[2]))


def test_every_row_has_a_test_that_exists() -> None:
    """No row without a proof, no proof without a row, and each proof is in its file."""
    names = table_names()
    assert len(names) == len(set(names))
    assert set(names) == set(PROOFS)
    for proof in set(PROOFS.values()):
        path, _, test = proof.partition("::")
        assert f"def {test or 'test_'}" in (ROOT / path).read_text(encoding="utf-8"), proof


def test_every_parameter_of_the_call_is_a_row() -> None:
    """Also the older names of the call."""
    parameters = set(inspect.signature(StableDiffusionInpaintPipeline.__call__).parameters) - {"self", "kwargs"}
    assert parameters | {"callback", "callback_steps"} <= set(table_names()) | left_out()


def test_every_method_is_a_row_or_said_to_be_left_out() -> None:
    """Nothing of the class is passed over in silence."""
    members = {name for name in dir(StableDiffusionInpaintPipeline) if not name.startswith("_")}
    known = set(table_names()) | left_out() | INTERNAL
    assert members - known == set()
    # What is listed as internal or left out is there, or the lists are out of date.
    assert members >= INTERNAL
    parameters = set(inspect.signature(StableDiffusionInpaintPipeline.__call__).parameters)
    assert left_out() <= members | parameters


@pytest.mark.parametrize("name", ["enable_slicing", "enable_tiling"])
def test_switches_of_the_vae_are_its_own(name: str) -> None:
    """The pipeline's older switches went to the VAE, where the table has them."""
    assert hasattr(AutoencoderKL, name)
