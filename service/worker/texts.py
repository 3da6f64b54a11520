"""What the UNet reads of each request's prompts: step 3 of `StableDiffusionInpaintPipeline.__call__`, batched."""

from collections.abc import Sequence

import torch

from service.request import Floats, InpaintRequest
from service.worker.checkpoint import Components
from service.worker.prompts import Prompt, PromptEncoder


class TextConditions:
    """Embeddings of prompts, encoded or given.

    Args:
        components: The loaded checkpoint.
    """

    def __init__(self, components: Components) -> None:
        self._encoder = PromptEncoder(components.tokenizer, components.text_encoder)
        self._device, self._dtype = components.device, components.dtype

    @property
    def max_clip_skip(self) -> int:
        """Layers that the text encoder can leave out."""
        return self._encoder.max_clip_skip

    def capture(self) -> None:
        """Have prompts encoded by a captured graph from now on; see `PromptEncoder.capture`."""
        self._encoder.capture()

    def embeds(self, requests: Sequence[InpaintRequest]) -> list[tuple[torch.Tensor, ...]]:
        """(T, D) of the prompt, behind that of the negative prompt when guided, for each request.

        Args:
            requests: Requests of one batch key, for whose LoRAs the text encoder has its weights.
        """
        prompts = [prompt for request in requests for prompt in _prompts(request) if prompt is not None]
        if any(request.params.batching == "solo" for request in requests):
            encoded = self._encoder.encode_alone(prompts)
        else:
            encoded = self._encoder.encode(prompts, weights=requests[0].params.loras)
        return [
            tuple(
                self._given(given) if prompt is None else encoded[prompt]
                for prompt, given in zip(_prompts(request), _given_embeds(request), strict=True)
            )
            for request in requests
        ]

    def _given(self, embeds: Floats | None) -> torch.Tensor:
        assert embeds is not None  # noqa: S101 - for the type checker: where there is no prompt, there are embeddings
        return torch.from_numpy(embeds.copy()).to(self._device, self._dtype)


def _given_embeds(request: InpaintRequest) -> list[Floats | None]:
    """What the client sent in the place of each row's prompt; clip_skip does not reach it, as in stock."""
    tensors = request.tensors
    return (
        [tensors.negative_prompt_embeds, tensors.prompt_embeds] if request.params.is_guided else [tensors.prompt_embeds]
    )


def _prompts(request: InpaintRequest) -> list[Prompt | None]:
    """The prompt of each row, None where its embeddings are given; clip_skip is for the positive prompt only."""
    params = request.params
    num_tokens = None if request.tensors.prompt_embeds is None else len(request.tensors.prompt_embeds)
    prompts = [Prompt(params.prompt, params.clip_skip, params.prompt_syntax)]
    if params.is_guided:
        # Stock encodes it to the length of the embeddings that were given.
        is_sized = num_tokens is not None and params.prompt_syntax == "plain"
        negative = Prompt(params.negative_prompt, 0, params.prompt_syntax, num_tokens=num_tokens if is_sized else None)
        prompts.insert(0, negative)
    return [prompt if given is None else None for prompt, given in zip(prompts, _given_embeds(request), strict=True)]
