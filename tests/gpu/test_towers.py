"""On a GPU: what the text encoder and the safety checker give from a graph is as good as what they give without."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from service.settings import Settings
from service.worker.checkpoint import Components, load
from service.worker.prompts import Prompt, PromptEncoder
from service.worker.safety import SafetyCheck
from service.worker.streams import ThreadStreams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COUNTS = (1, 2, 3, 5, 8, 12)
"""Some have a graph of their own, some fill one up, one is more than any holds."""

NOISE_SENSITIVE = 1.1
"""Of two results in half precision either may be the closer one by chance, within this factor."""


@pytest.fixture(scope="module")
def components() -> Components:
    """The bundled model in half precision."""
    return load(Settings(devices=("cuda:0",)), torch.device("cuda:0"))


@torch.inference_mode()
def test_captured_prompts_are_no_further_from_float32(components: Components) -> None:
    """With layers left out, too."""
    full = load(Settings(devices=("cuda:0",), dtype="float32"), torch.device("cuda:0"))
    streams = ThreadStreams(torch.device("cuda:0"))

    def error(encoder: PromptEncoder, prompts: Sequence[Prompt]) -> float:
        found, expected = (each.encode(prompts) for each in (encoder, reference))
        return sum(float((found[prompt].float() - expected[prompt]).norm()) for prompt in prompts)

    with streams.active():
        reference = PromptEncoder(full.tokenizer, full.text_encoder)
        as_loaded, captured = (PromptEncoder(components.tokenizer, components.text_encoder) for _ in range(2))
        captured.capture()
        for count in COUNTS:
            prompts = [Prompt(f"a red house of {count} floors and {number} doors") for number in range(count)]
            prompts += [Prompt("a green house", clip_skip=1)] if count % 2 else []
            assert 0 < error(captured, prompts) <= NOISE_SENSITIVE * error(as_loaded, prompts)
        streams.synchronize()


@torch.inference_mode()
def test_captured_checker_sees_the_same(components: Components) -> None:
    """Its embeddings of pictures are the same to rounding; the verdicts follow from them."""
    assert components.safety_checker is not None
    streams = ThreadStreams(torch.device("cuda:0"))
    seen: list[torch.Tensor] = []
    components.safety_checker.visual_projection.register_forward_hook(lambda *call: seen.append(call[-1].clone()))
    check = SafetyCheck(components.safety_checker, components.feature_extractor)
    pictures = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (max(COUNTS), 256, 256, 3), np.uint8))
    with streams.active():
        verdicts = [check.verdicts(pictures[:count].cuda()) for count in COUNTS]
        check.capture()
        assert [check.verdicts(pictures[:count].cuda()) for count in COUNTS] == verdicts
        streams.synchronize()
    expected, found = seen[: len(COUNTS)], seen[len(COUNTS) :]
    assert [len(one) for one in found] == list(COUNTS)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
