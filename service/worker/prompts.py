"""Prompts to embeddings, as stock's `encode_prompt`, many at once and remembered.

A prompt becomes chunks of tokens, each framed by start and end tokens and padded to one length: one chunk
in plain syntax, as many as it takes in AUTOMATIC1111's. Chunks of all prompts share forward passes.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from service.errors import ErrorCode, InpaintError
from service.request import PromptSyntax
from service.worker.graphs import BATCH_SIZES, GraphedFunction
from service.worker.prompt_syntax import Chunk, parse, split_into_chunks
from service.worker.textual_inversion import further_vectors

MAX_CACHED_CHUNKS = 256
MAX_CHUNKS_AT_ONCE = 16

NUM_FRAME_TOKENS = 2
"""The start and the end token of a chunk."""

MIN_MEAN = 0.01
"""A mean of embeddings that is smaller than this, relative to their size, is a chance remainder of their signs.

Stable Diffusion 1.5's is over a tenth (its final layer norm's bias averages -0.11), the demo model's a thousandth.
"""

MAX_RESTORATION = 10.0
"""Restoring the mean never scales embeddings up by more than this."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, and what decides how it is encoded.

    Attributes:
        text: What the client wrote.
        clip_skip: Layers left out at the encoder's end.
        syntax: "a1111" reads weights and `BREAK`, and does not cut off what is longer than one chunk.
        num_tokens: Tokens to pad or cut to instead of the tokenizer's maximum: stock gives a negative prompt
            as many as the prompt's embeddings have. In plain syntax only.
    """

    text: str
    clip_skip: int = 0
    syntax: PromptSyntax = "plain"
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """One chunk, ready for the encoder.

    Attributes:
        prompt: Which of the prompts it belongs to.
        ids: (T,) tokens.
        num_used: How many of them are not padding.
        weights: (T,) one for each token.
        clip_skip: Layers left out.
    """

    prompt: int
    ids: tuple[int, ...]
    num_used: int
    weights: tuple[float, ...]
    clip_skip: int


class PromptEncoder:
    """Encodes prompts in batches and keeps the most recent results.

    Args:
        tokenizer: The checkpoint's tokenizer, textual inversions included.
        text_encoder: The checkpoint's text encoder, on its device.
        max_cached: Embeddings kept, a long prompt's counted by its chunks.

    Attributes:
        max_clip_skip: Layers that the encoder has, all of which can be left out.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, max_cached: int = MAX_CACHED_CHUNKS
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._max_tokens = int(tokenizer.model_max_length)
        self._further_vectors = further_vectors(tokenizer)
        self._comma: int | None = tokenizer.get_vocab().get(",</w>")
        self._max_cached_tokens = max_cached * self._max_tokens
        self._cache: OrderedDict[tuple[Hashable, Prompt], torch.Tensor] = OrderedDict()
        self._num_cached_tokens = 0
        # transformers 5.6 flattened CLIPTextModel; before, these lived one level down.
        inner = getattr(text_encoder, "text_model", text_encoder)
        self._final_layer_norm: torch.nn.Module = inner.final_layer_norm
        self.max_clip_skip = int(text_encoder.config.num_hidden_layers)
        self._takes_mask = bool(getattr(text_encoder.config, "use_attention_mask", False))
        self._captured: GraphedFunction | None = None

    def capture(self) -> None:
        """Have chunks of the full length, all layers of them, encoded by a captured graph from now on, on CUDA.

        Raises:
            torch.OutOfMemoryError: It does not fit.
        """
        if self._takes_mask:
            return
        example = torch.full((1, self._max_tokens), self._tokenizer.eos_token_id, device=self._text_encoder.device)
        self._captured = GraphedFunction(self._last_hidden_state, example, BATCH_SIZES)

    def encode(self, prompts: Iterable[Prompt], weights: Hashable = ()) -> dict[Prompt, torch.Tensor]:
        """Embeddings of every prompt, (T, D) each, in the encoder's dtype and on its device.

        Args:
            prompts: What to encode; repeated ones are encoded once.
            weights: Names the state of the encoder's weights, where it changes: what was encoded in one state
                is not used in another.

        Raises:
            InpaintError: `num_tokens` is more than the encoder takes, or no chunk.
        """
        wanted = dict.fromkeys(prompts)
        missing = [prompt for prompt in wanted if (weights, prompt) not in self._cache]
        for prompt, embeds in zip(missing, self._forward(missing), strict=True):
            self._cache[weights, prompt] = embeds
            self._num_cached_tokens += len(embeds)
        result = {}
        for prompt in wanted:
            self._cache.move_to_end((weights, prompt))
            result[prompt] = self._cache[weights, prompt]
        while self._num_cached_tokens > self._max_cached_tokens:
            _, oldest = self._cache.popitem(last=False)
            self._num_cached_tokens -= len(oldest)
        return result

    def encode_alone(self, prompts: Iterable[Prompt]) -> dict[Prompt, torch.Tensor]:
        """The same, each prompt in forward passes of its own and nothing remembered.

        Embeddings that were made beside others differ from these in their lowest bits.
        """
        return {prompt: self._forward([prompt])[0] for prompt in dict.fromkeys(prompts)}

    def _forward(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        rows_by_length: dict[int, list[_Row]] = {}
        for number, prompt in enumerate(prompts):
            for row in self._rows(number, prompt):
                rows_by_length.setdefault(len(row.ids), []).append(row)
        encoded: list[list[torch.Tensor]] = [[] for _ in prompts]
        for rows in rows_by_length.values():
            for first in range(0, len(rows), MAX_CHUNKS_AT_ONCE):
                batch = rows[first : first + MAX_CHUNKS_AT_ONCE]
                for row, embeds in zip(batch, self._encode_rows(batch), strict=True):
                    encoded[row.prompt].append(_emphasize(embeds, row.weights))
        # A copy, also of a single chunk: a view would keep all of its pass in memory.
        return [torch.cat(chunks) for chunks in encoded]

    def _encode_rows(self, rows: Sequence[_Row]) -> list[torch.Tensor]:
        """(T, D) for each row; all rows have the same T."""
        device = self._text_encoder.device
        ids = torch.tensor([row.ids for row in rows], device=device)
        if self._captured is not None and self._captured.fits(ids) and not any(row.clip_skip for row in rows):
            return list(self._captured(ids))
        mask = None
        if self._takes_mask:
            positions = torch.arange(ids.shape[1], device=device)
            mask = (positions < torch.tensor([[row.num_used] for row in rows], device=device)).long()
        output = self._text_encoder(ids, attention_mask=mask, output_hidden_states=any(row.clip_skip for row in rows))
        return [
            self._final_layer_norm(output.hidden_states[-(row.clip_skip + 1)][index])
            if row.clip_skip
            else output.last_hidden_state[index]
            for index, row in enumerate(rows)
        ]

    def _last_hidden_state(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self._text_encoder(ids).last_hidden_state
        return states

    def _rows(self, number: int, prompt: Prompt) -> list[_Row]:
        num_tokens = self._num_tokens(prompt)
        start, end, pad = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        rows = []
        for chunk in self._chunks(prompt, num_tokens - NUM_FRAME_TOKENS):
            num_used = len(chunk.ids) + NUM_FRAME_TOKENS
            num_padding = num_tokens - num_used
            rows.append(
                _Row(
                    prompt=number,
                    ids=(start, *chunk.ids, end, *(pad,) * num_padding),
                    num_used=num_used,
                    weights=(1.0, *chunk.weights, 1.0, *(1.0,) * num_padding),
                    clip_skip=prompt.clip_skip,
                )
            )
        return rows

    def _num_tokens(self, prompt: Prompt) -> int:
        """Tokens to a chunk, its frame included."""
        if prompt.num_tokens is None or prompt.syntax == "a1111":
            return self._max_tokens
        if not NUM_FRAME_TOKENS <= prompt.num_tokens <= self._max_tokens:
            raise InpaintError(
                ErrorCode.INVALID_FIELD,
                f"prompt_embeds of {prompt.num_tokens} tokens need negative_prompt_embeds:"
                f" a negative prompt in words has {NUM_FRAME_TOKENS} to {self._max_tokens}.",
                field="negative_prompt_embeds",
            )
        return prompt.num_tokens

    def _chunks(self, prompt: Prompt, chunk_size: int) -> list[Chunk]:
        if prompt.syntax == "a1111":
            sections = [
                [(word, span.weight) for span in section for word in self._words(span.text)]
                for section in parse(prompt.text)
            ]
            return split_into_chunks(sections, chunk_size, self._comma)
        ids = tuple(token for word in self._words(prompt.text) for token in word)[:chunk_size]
        return [Chunk(ids, (1.0,) * len(ids))]

    def _words(self, text: str) -> list[tuple[int, ...]]:
        """Tokens of a text, each with the further vectors of its textual inversion.

        Stock's `maybe_convert_prompt` writes the names of these vectors into the text. That loses them where a
        name has capitals (the tokenizer lowers the prompt, stock then does not know the name), and garbles names
        that are part of other names; tokens say the same without either.
        """
        # Silent on long texts: what does not fit is cut off later.
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return [(token, *self._further_vectors.get(token, ())) for token in ids]


def _emphasize(embeds: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Weigh each token, then scale the whole so that its mean stays: AUTOMATIC1111's "Original" emphasis.

    Source: `EmphasisOriginal` in `modules/sd_emphasis.py` of stable-diffusion-webui. Where the mean is about
    zero, the ratio of the two means is arbitrary, and scaling by it would blow the embeddings up or turn them
    over, as its issue 14867 reports: there, the mean is left as it comes.

    Args:
        embeds: (T, D) of one chunk.
        weights: (T,).
    """
    if all(weight == 1.0 for weight in weights):
        return embeds
    wide = embeds.float()  # In half precision, means of this many numbers are coarse.
    weighted = wide * torch.tensor(weights, device=embeds.device)[:, None]
    mean = wide.mean()
    ratio = mean / weighted.mean()
    is_sound = (mean.abs() > MIN_MEAN * wide.abs().mean()) & (ratio > 0) & (ratio <= MAX_RESTORATION)
    limit = torch.finfo(embeds.dtype).max
    return (weighted * torch.where(is_sound, ratio, 1.0)).clamp(-limit, limit).to(embeds.dtype)
