"""Prompts to embeddings: stock's in plain syntax, AUTOMATIC1111's in its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTokenizer

from service.errors import ErrorCode, InpaintError
from service.worker import prompts
from service.worker.checkpoint_source import BUNDLED_FOLDER
from service.worker.graphs import BATCH_SIZES
from service.worker.prompt_syntax import MAX_CHUNKS
from service.worker.prompts import MAX_CHUNKS_AT_ONCE, Prompt, PromptEncoder
from tests.model.graphs import Graph
from tests.model.stock import Stock

PROMPTS = ["", "a red house", "a green tree, by the water; (not) [x]", "word " * 100, "é 日本 🏴 " * 20]
CLOSE = {"rtol": 0, "atol": 2e-5}


class Parts:
    """A tokenizer and a text encoder whose embeddings have a mean, as trained ones do; forward passes are counted."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        final = self.text_encoder.final_layer_norm
        final.bias.copy_(torch.randn(final.bias.shape, generator=generator) * 0.1 - 0.2)
        self.rows: list[int] = []
        self.text_encoder.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: Any, args: Any, _kwargs: Any) -> None:
        self.rows.append(len(args[0]))

    def encoder(self, max_cached: int = 256) -> PromptEncoder:
        """A fresh one; forward passes count from now."""
        self.rows.clear()
        return PromptEncoder(self.tokenizer, self.text_encoder, max_cached)

    def chunk(self, ids: list[int], weights: list[float] | None = None, clip_skip: int = 0) -> torch.Tensor:
        """The reference: one chunk of at most 75 tokens, encoded and weighed by the web UI's formula."""
        tokenizer = self.tokenizer
        padding = [tokenizer.pad_token_id] * (75 - len(ids))
        framed = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *padding]])
        output = self.text_encoder(framed, output_hidden_states=True)
        hidden = output.hidden_states[-(clip_skip + 1)]
        z = self.text_encoder.final_layer_norm(hidden)
        multipliers = torch.ones(1, 77, 1)
        multipliers[0, 1 : 1 + len(ids), 0] = torch.tensor(weights or [1.0] * len(ids))
        weighted = z * multipliers
        return (weighted * (z.mean() / weighted.mean()))[0]

    def ids(self, text: str) -> list[int]:
        """Tokens without their frame."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@pytest.fixture(scope="module")
def parts(inpainting_checkpoint: Path) -> Parts:
    return Parts(inpainting_checkpoint)


def one(encoder: PromptEncoder, text: str, **options: Any) -> torch.Tensor:
    prompt = Prompt(text, **options)
    return encoder.encode([prompt])[prompt]


def a1111(encoder: PromptEncoder, text: str, **options: Any) -> torch.Tensor:
    return one(encoder, text, syntax="a1111", **options)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
@pytest.mark.parametrize("uses_mask", [False, True])
@pytest.mark.parametrize("folder", ["tiny", "demo"])
def test_plain_prompts_equal_stock(folder: str, uses_mask: bool, clip_skip: int, inpainting_checkpoint: Path) -> None:
    """Every prompt, encoded beside the others, has the embeddings of stock's `encode_prompt` alone."""
    pipeline = Stock(inpainting_checkpoint if folder == "tiny" else BUNDLED_FOLDER).pipeline
    pipeline.text_encoder.requires_grad_(False).config.use_attention_mask = uses_mask
    encoder = PromptEncoder(pipeline.tokenizer, pipeline.text_encoder)
    prompts = [Prompt(text, clip_skip) for text in PROMPTS]
    encoded = encoder.encode(prompts)
    for prompt in prompts:
        expected, _ = pipeline.encode_prompt(prompt.text, "cpu", 1, False, clip_skip=clip_skip or None)
        torch.testing.assert_close(encoded[prompt], expected[0], **CLOSE)


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.parametrize("num_tokens", [2, 3, 20, 77])
def test_negative_prompt_of_given_length_equals_stock(text: str, num_tokens: int, parts: Parts) -> None:
    """Stock encodes the negative prompt to as many tokens as the prompt's embeddings have."""
    inputs = parts.tokenizer(
        text, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt"
    ).input_ids
    expected = parts.text_encoder(inputs)[0][0]
    torch.testing.assert_close(one(parts.encoder(), text, num_tokens=num_tokens), expected, **CLOSE)


@pytest.mark.parametrize("num_tokens", [0, 1, 78, 154])
def test_lengths_that_stock_cannot_encode_are_refused(num_tokens: int, parts: Parts) -> None:
    with pytest.raises(InpaintError) as caught:
        one(parts.encoder(), "blurry", num_tokens=num_tokens)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_FIELD, "negative_prompt_embeds")


def test_lengths_mix_in_one_call(parts: Parts) -> None:
    encoder = parts.encoder()
    prompts = [
        Prompt("a", num_tokens=9),
        Prompt("b"),
        Prompt("(c:1.2)" * 80, syntax="a1111"),
        Prompt("d", num_tokens=9),
    ]
    encoded = encoder.encode(prompts)
    assert [len(encoded[prompt]) for prompt in prompts] == [9, 77, 154, 9]
    for prompt in prompts:
        torch.testing.assert_close(encoded[prompt], encoder.encode_alone([prompt])[prompt], **CLOSE)


def test_prompts_are_remembered_by_the_weights_they_were_encoded_with(parts: Parts) -> None:
    """Another state of the text encoder's weights is another embedding, and going back finds the first again."""
    encoder, prompt = parts.encoder(), Prompt("a red house")
    before = encoder.encode([prompt, prompt], weights="before")[prompt]
    weight = parts.text_encoder.final_layer_norm.weight
    original = weight.clone()
    weight.mul_(2)
    after = encoder.encode([prompt], weights="after")[prompt]
    weight.copy_(original)
    assert parts.rows == [1, 1]
    assert not torch.allclose(before, after)
    assert encoder.encode([prompt], weights="before")[prompt] is before
    assert encoder.encode([prompt], weights="after")[prompt] is after
    assert parts.rows == [1, 1]


def test_the_least_recent_prompts_are_forgotten(parts: Parts) -> None:
    """A long prompt counts as many as it has chunks."""
    encoder = parts.encoder(max_cached=3)
    encoder.encode([Prompt("a"), Prompt("b"), Prompt("c")])
    encoder.encode([Prompt("a")])
    encoder.encode([Prompt("d BREAK e", syntax="a1111")])
    parts.rows.clear()
    encoder.encode([Prompt("a")])
    encoder.encode([Prompt("d BREAK e", syntax="a1111")])
    assert parts.rows == []
    encoder.encode([Prompt("b"), Prompt("c")])
    assert parts.rows == [2]


def test_more_than_is_remembered_is_encoded_all_the_same(parts: Parts) -> None:
    prompts = [Prompt(f"prompt {index}") for index in range(5)]
    assert list(parts.encoder(max_cached=2).encode(prompts)) == prompts


def test_forward_passes_are_bounded(parts: Parts) -> None:
    parts.encoder().encode([Prompt(f"prompt {index}") for index in range(40)])
    assert parts.rows == [MAX_CHUNKS_AT_ONCE, MAX_CHUNKS_AT_ONCE, 8]


def test_embeddings_do_not_keep_their_pass_in_memory(parts: Parts) -> None:
    """What is remembered is the prompt's own rows, no view of all that were encoded with it."""
    for embeds in parts.encoder().encode([Prompt("a"), Prompt("b")]).values():
        assert embeds.untyped_storage().nbytes() == embeds.nbytes


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_encoding_alone_is_bitwise_repeatable(syntax: Any, parts: Parts) -> None:
    """And nothing of it is remembered."""
    encoder = parts.encoder()
    prompts = [Prompt(f"a (red:1.{index}) house" * 30, syntax=syntax) for index in range(3)]
    encoder.encode(prompts)
    first = encoder.encode_alone(prompts)
    again = encoder.encode_alone(prompts[1:2])
    assert torch.equal(again[prompts[1]], first[prompts[1]])
    fresh = parts.encoder()
    fresh.encode_alone(prompts)
    parts.rows.clear()
    fresh.encode(prompts)
    assert parts.rows


PLAIN_TEXT = st.text(st.characters(exclude_characters="\\()[]", exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: "BREAK" not in text
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=50)
@given(PLAIN_TEXT)
def test_plain_text_is_the_same_in_both_syntaxes(parts: Parts, text: str) -> None:
    """Text of at most 75 tokens without special characters: bit for bit."""
    assume(len(parts.ids(text)) <= 75)
    plain, weighted = parts.encoder().encode_alone([Prompt(text), Prompt(text, syntax="a1111")]).values()
    assert torch.equal(plain, weighted)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_weights_follow_the_web_ui(clip_skip: int, parts: Parts) -> None:
    """Tokens are weighed after encoding and the chunk's mean is restored."""
    found = a1111(parts.encoder(), "a (red:1.5) [old] ((house))", clip_skip=clip_skip)
    texts, weights = ["a ", "red", " ", "old", " ", "house"], [1.0, 1.5, 1.0, 1 / 1.1, 1.0, 1.21]
    ids = [parts.ids(text) for text in texts]
    per_token = [weight for part, weight in zip(ids, weights, strict=True) for _ in part]
    expected = parts.chunk([token for part in ids for token in part], per_token, clip_skip)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_long_prompts_are_encoded_in_chunks(parts: Parts) -> None:
    """Each of 75 tokens in a frame of its own, with the mean restored in each, one after the other."""
    ids = parts.ids("w" * 100)
    found = a1111(parts.encoder(), "(" + "w" * 100 + ":1.4)")
    expected = torch.cat([parts.chunk(ids[:75], [1.4] * 75), parts.chunk(ids[75:], [1.4] * 25)])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_full_chunk_ends_at_its_last_comma(parts: Parts) -> None:
    ids = parts.ids("w" * 60 + ", " + "w" * 30)
    comma = ids.index(parts.ids(",")[0])
    found = a1111(parts.encoder(), "w" * 60 + ", " + "w" * 30)
    torch.testing.assert_close(
        found, torch.cat([parts.chunk(ids[: comma + 1]), parts.chunk(ids[comma + 1 :])]), **CLOSE
    )


def test_break_fills_the_chunk(parts: Parts) -> None:
    found = a1111(parts.encoder(), "a red house BREAK (blue:1.3)")
    blue = parts.ids("blue")
    expected = torch.cat([parts.chunk(parts.ids("a red house")), parts.chunk(blue, [1.3] * len(blue))])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_escaped_brackets_are_text(parts: Parts) -> None:
    plain = one(parts.encoder(), "a (red) [house]")
    torch.testing.assert_close(a1111(parts.encoder(), r"a \(red\) \[house\]"), plain, **CLOSE)


@pytest.mark.parametrize(
    "prompt", ["(" * 1999 + "a", "(a:" + "9" * 400 + ")", "(a:-99)(b:99)", "(a:0)", "[" * 1999 + "a"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_weights_stay_finite(prompt: str, dtype: torch.dtype, parts: Parts) -> None:
    text_encoder = CLIPTextModel(parts.text_encoder.config).to(dtype).requires_grad_(False)
    found = a1111(PromptEncoder(parts.tokenizer, text_encoder), prompt)
    assert found.dtype == dtype
    assert found.isfinite().all()


@pytest.mark.parametrize("folder", ["tiny", "demo"])
def test_mean_of_about_zero_is_not_restored(folder: str, inpainting_checkpoint: Path) -> None:
    """An encoder whose embeddings have next to no mean gives the weighted ones, never scaled up or negated."""
    path = inpainting_checkpoint if folder == "tiny" else BUNDLED_FOLDER
    tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder").requires_grad_(False)
    encoder = PromptEncoder(tokenizer, text_encoder)
    plain, weighted = one(encoder, "a b"), a1111(encoder, "(a:1.5) b")
    torch.testing.assert_close(weighted[1], 1.5 * plain[1], **CLOSE)
    torch.testing.assert_close(weighted[2:], plain[2:], **CLOSE)


@pytest.mark.parametrize(
    "prompt",
    ["BREAK " * 333, "日本" * 1000, "a," * 1000, "(a:1.1)" * 285],
    ids=["breaks", "bytes", "commas", "weights"],
)
def test_longest_prompts_are_bounded(prompt: str, parts: Parts) -> None:
    """2,000 characters never make more than the limit of chunks."""
    num_tokens, width = a1111(parts.encoder(), prompt).shape
    assert num_tokens % 77 == 0
    assert 77 < num_tokens <= 77 * MAX_CHUNKS
    assert width == parts.text_encoder.config.hidden_size


# --- from a graph ------------------------------------------------------------------------------------


def captured(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> tuple[PromptEncoder, Graph]:
    """An encoder as after the warm-up on CUDA."""
    monkeypatch.setattr(prompts, "GraphedFunction", Graph)
    encoder = parts.encoder()
    encoder.capture()
    return encoder, Graph.made[-1]


def test_prompts_from_a_graph_have_their_embeddings(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit, in each syntax; longer ones are several chunks."""
    encoder, graph = captured(parts, monkeypatch)
    for texts, seen in ((PROMPTS[:1], [1]), (PROMPTS[1:], [4]), (["word " * 40], [3])):
        syntax = "a1111" if texts[0].startswith("word") else "plain"
        asked = [Prompt(text, syntax=syntax) for text in texts]  # type: ignore[arg-type]
        graph.seen.clear()
        found = encoder.encode(asked)
        assert graph.seen == seen
        expected = parts.encoder().encode(asked)
        assert all(torch.equal(found[prompt], expected[prompt]) for prompt in asked)


def test_a_graph_is_for_whole_chunks_and_all_layers(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers left out, other lengths and more chunks than it holds go the other way, beside others too."""
    encoder, graph = captured(parts, monkeypatch)
    many = [Prompt(f"{number} houses") for number in range(max(BATCH_SIZES) + 1)]
    for asked in (
        [Prompt(PROMPTS[1], clip_skip=1)],
        [Prompt(PROMPTS[2], clip_skip=2), Prompt(PROMPTS[2])],
        [Prompt(PROMPTS[1], num_tokens=20)],
        many,
    ):
        found, expected = encoder.encode(asked), parts.encoder().encode(asked)
        assert all(torch.equal(found[prompt], expected[prompt]) for prompt in asked)
    assert graph.seen == []


def test_an_encoder_that_is_given_a_mask_is_not_captured(
    inpainting_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be left out."""
    masked = Parts(inpainting_checkpoint)
    masked.text_encoder.config.use_attention_mask = True
    monkeypatch.setattr(prompts, "GraphedFunction", lambda *_: pytest.fail("it was captured"))
    encoder = masked.encoder()
    encoder.capture()
    asked = [Prompt(PROMPTS[1])]
    assert torch.equal(encoder.encode(asked)[asked[0]], masked.encoder().encode(asked)[asked[0]])
