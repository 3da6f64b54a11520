"""Prompts to embeddings, as stock's `encode_prompt`, many at once and remembered."""

from collections import OrderedDict
from collections.abc import Iterable

import torch
from transformers import CLIPTextModel, CLIPTokenizer

MAX_CACHED_PROMPTS = 256

Prompt = tuple[str, int]
"""The text and its clip_skip: layers left out at the encoder's end, 0 for none."""


class PromptEncoder:
    """Encodes prompts in batches and keeps the most recent results.

    Args:
        tokenizer: The checkpoint's tokenizer.
        text_encoder: The checkpoint's text encoder, on its device.
        max_cached: Embeddings kept.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, max_cached: int = MAX_CACHED_PROMPTS
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._max_cached = max_cached
        self._cache: OrderedDict[Prompt, torch.Tensor] = OrderedDict()
        # transformers 5.6 flattened CLIPTextModel; before, these lived one level down.
        inner = getattr(text_encoder, "text_model", text_encoder)
        self._final_layer_norm: torch.nn.Module = inner.final_layer_norm
        self.max_clip_skip = int(text_encoder.config.num_hidden_layers)

    def encode(self, prompts: Iterable[Prompt]) -> dict[Prompt, torch.Tensor]:
        """Embeddings of every prompt, each (T, D) in the encoder's dtype and on its device."""
        wanted = dict.fromkeys(prompts)
        missing = [prompt for prompt in wanted if prompt not in self._cache]
        if missing:
            self._cache.update(zip(missing, self._forward(missing), strict=True))
        result = {}
        for prompt in wanted:
            self._cache.move_to_end(prompt)
            result[prompt] = self._cache[prompt]
        while len(self._cache) > self._max_cached:
            self._cache.popitem(last=False)
        return result

    def encode_alone(self, prompts: Iterable[Prompt]) -> dict[Prompt, torch.Tensor]:
        """The same, each prompt in a forward pass of its own and nothing remembered.

        Embeddings that were made beside others differ from these in their lowest bits.
        """
        return {prompt: self._forward([prompt])[0] for prompt in dict.fromkeys(prompts)}

    def _forward(self, prompts: list[Prompt]) -> list[torch.Tensor]:
        inputs = self._tokenizer(
            [text for text, _ in prompts],
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        device = self._text_encoder.device
        uses_mask = getattr(self._text_encoder.config, "use_attention_mask", False)
        output = self._text_encoder(
            inputs.input_ids.to(device),
            attention_mask=inputs.attention_mask.to(device) if uses_mask else None,
            output_hidden_states=any(clip_skip for _, clip_skip in prompts),
        )
        embeds = []
        for row, (_, clip_skip) in enumerate(prompts):
            if clip_skip:
                hidden = output.hidden_states[-(clip_skip + 1)][row]
                embeds.append(self._final_layer_norm(hidden))
            else:
                embeds.append(output.last_hidden_state[row])
        return embeds
