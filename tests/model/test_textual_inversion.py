"""Textual inversions: stock's embeddings and pictures, and no file that can do harm."""

import dataclasses
import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from service.errors import StartupError
from service.messages import EmbeddingInfo
from service.request import InpaintParams
from service.settings import Settings
from service.worker.checkpoint import load
from service.worker.checkpoint_source import BUNDLED_FOLDER
from service.worker.pipeline import InpaintPipeline
from service.worker.prompts import Prompt, PromptEncoder
from service.worker.textual_inversion import load_embeddings
from tests.model.checkpoints import NATIVE_SIZE
from tests.model.embedding_files import diffusers_file, vectors, web_ui_file
from tests.model.mixed_requests import paint_target
from tests.model.staggered import run_staggered
from tests.model.stock import Stock

CLOSE = {"rtol": 0, "atol": 2e-5}
WIDTH = {"tiny": 32, "demo": 192}

PROMPTS = [
    "a <cat-toy> on the grass",
    "a bad-hands, <cat-toy>",
    "bad-hands",
    "a house in my style, bad-hands, bad-hands",
    "my style" * 30,
    "a red house",
    "xbad-handsy <CAT-TOY>",
]


def write_all(folder: Path, width: int) -> dict[str, str]:
    """One vector and several, in every layout; the token of each file."""
    diffusers_file(folder, "learned_embeds", "<cat-toy>", vectors(1, width, seed=1)[0])
    web_ui_file(folder, "bad-hands", vectors(3, width, seed=2))
    web_ui_file(folder, "my style", vectors(2, width, seed=3), key="string_to_param.*")
    diffusers_file(folder, "other", "<dog>", vectors(2, width, seed=4).half())
    return {"bad-hands": "bad-hands", "learned_embeds": "<cat-toy>", "my style": "my style", "other": "<dog>"}


@pytest.fixture(params=["tiny", "demo"])
def checkpoint(request: pytest.FixtureRequest, inpainting_checkpoint: Path) -> tuple[Path, int]:
    """A checkpoint and the width of its text encoder."""
    return (inpainting_checkpoint if request.param == "tiny" else BUNDLED_FOLDER), WIDTH[request.param]


def parts(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    return tokenizer, CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False)


def stock_with(folder: Path, embeddings: Path, tokens: dict[str, str]) -> Stock:
    """Stock, taught one file after the other as its documentation says."""
    stock = Stock(folder)
    for stem, token in tokens.items():
        path = embeddings / f"{stem}.safetensors"
        stock.pipeline.load_textual_inversion(str(embeddings), weight_name=path.name, token=token)
    return stock


def test_embeddings_of_prompts_equal_stock(checkpoint: tuple[Path, int], tmp_path: Path) -> None:
    """Each layout, one vector and several, repeated, within words and cut off: as stock's `encode_prompt`."""
    folder, width = checkpoint
    tokens = write_all(tmp_path, width)
    tokenizer, text_encoder = parts(folder)
    infos = load_embeddings(tmp_path, tokenizer, text_encoder)
    assert infos == (
        EmbeddingInfo("bad-hands", 3),
        EmbeddingInfo("<cat-toy>", 1),
        EmbeddingInfo("my style", 2),
        EmbeddingInfo("<dog>", 2),
    )
    stock = stock_with(folder, tmp_path, tokens)
    encoder = PromptEncoder(tokenizer, text_encoder)
    for text in PROMPTS:
        expected, negative = stock.pipeline.encode_prompt(text, "cpu", 1, True, negative_prompt=text)
        found = encoder.encode_alone([Prompt(text)])[Prompt(text)]
        torch.testing.assert_close(found, expected[0], **CLOSE)
        torch.testing.assert_close(found, negative[0], **CLOSE)
    without = PromptEncoder(*parts(folder)).encode_alone([Prompt(PROMPTS[0]), Prompt("a red house")])
    assert not torch.allclose(without[Prompt(PROMPTS[0])], encoder.encode([Prompt(PROMPTS[0])])[Prompt(PROMPTS[0])])
    torch.testing.assert_close(
        without[Prompt("a red house")], encoder.encode([Prompt("a red house")])[Prompt("a red house")], **CLOSE
    )


def test_pictures_equal_stock(checkpoint: tuple[Path, int], tmp_path: Path) -> None:
    """In the prompt, in the negative prompt, in both, of several vectors: each picture within 1 of 255 of stock."""
    folder, width = checkpoint
    tokens = write_all(tmp_path, width)
    size = NATIVE_SIZE if width == WIDTH["tiny"] else 256
    params = InpaintParams(
        prompt="a red house",
        negative_prompt="",
        num_inference_steps=3,
        guidance_scale=5.0,
        strength=1.0,
        num_images_per_prompt=1,
        seed=5,
        scheduler="ddim",
        eta=0.0,
        clip_skip=0,
        height=size,
        width=size,
    )
    pairs = [
        ("a red house", ""),
        ("a <cat-toy>", ""),
        ("a red house", "bad-hands"),
        ("my style, <dog>", "bad-hands, x"),
    ]
    requests = [
        paint_target(dataclasses.replace(params, prompt=prompt, negative_prompt=negative), seed=1)
        for prompt, negative in pairs
    ]
    components = load(Settings(model=str(folder)), torch.device("cpu"))
    load_embeddings(tmp_path, components.tokenizer, components.text_encoder)
    results, _ = run_staggered(InpaintPipeline(components, "black"), requests)
    stock = stock_with(folder, tmp_path, tokens)
    pictures = []
    for index, request in enumerate(requests):
        expected, _ = stock(request)
        pictures.append(results[str(index)].images.astype(int))
        assert np.abs(pictures[-1] - expected.astype(int)).max() <= 1
    # The comparison means something: what was learned shows.
    assert min(np.abs(picture - pictures[0]).max() for picture in pictures[1:]) > 1


@pytest.fixture
def tiny(inpainting_checkpoint: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    return parts(inpainting_checkpoint)


def test_all_vectors_count_in_any_case(tiny: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path) -> None:
    """A name with capitals means all of its vectors, however it is written; stock keeps but the first of them."""
    tokenizer, text_encoder = tiny
    web_ui_file(tmp_path, "EasyNegative", vectors(3, 32))
    web_ui_file(tmp_path, "EasyNegativeV2", vectors(2, 32, seed=1))
    load_embeddings(tmp_path, tokenizer, text_encoder)
    first, second = (tokenizer.convert_tokens_to_ids(name) for name in ("EasyNegative", "EasyNegativeV2"))
    encoder = PromptEncoder(tokenizer, text_encoder)
    for text in ("EasyNegative EASYNEGATIVEV2", "easynegative,easynegativev2"):
        ids = [token for word in encoder._words(text) for token in word if token >= first]
        assert ids == [first, first + 1, first + 2, second, second + 1]


def test_embeddings_work_in_web_ui_syntax(tiny: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path) -> None:
    """A weight is for every vector of a token, and a token that does not fit whole starts the next chunk."""
    tokenizer, text_encoder = tiny
    web_ui_file(tmp_path, "bad-hands", vectors(3, 32))
    load_embeddings(tmp_path, tokenizer, text_encoder)
    encoder = PromptEncoder(tokenizer, text_encoder)
    first = tokenizer.convert_tokens_to_ids("bad-hands")

    plain, weighted = Prompt("a bad-hands"), Prompt("a (bad-hands:1.5)", syntax="a1111")
    encoded = encoder.encode([plain, weighted])
    # This encoder's embeddings have no mean, so none is restored.
    torch.testing.assert_close(encoded[weighted][2:5], 1.5 * encoded[plain][2:5], **CLOSE)
    torch.testing.assert_close(encoded[weighted][5:], encoded[plain][5:], **CLOSE)

    rows = encoder._rows(0, Prompt("w" * 73 + " bad-hands", syntax="a1111"))
    assert [row.num_used for row in rows] == [75, 5]
    assert rows[1].ids[1:4] == (first, first + 1, first + 2)


def test_weights_state_and_embeddings_together(tiny: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path) -> None:
    """What was encoded under one state of the weights is kept apart from another's, embeddings or not."""
    tokenizer, text_encoder = tiny
    web_ui_file(tmp_path, "bad-hands", vectors(3, 32))
    load_embeddings(tmp_path, tokenizer, text_encoder)
    encoder, prompt = PromptEncoder(tokenizer, text_encoder), Prompt("bad-hands")
    before = encoder.encode([prompt], weights=("lora", 1.0))[prompt]
    text_encoder.final_layer_norm.weight.mul_(2)
    assert encoder.encode([prompt], weights=("lora", 1.0))[prompt] is before
    torch.testing.assert_close(encoder.encode([prompt])[prompt], 2 * before, **CLOSE)


def test_loading_is_deterministic(inpainting_checkpoint: Path, tmp_path: Path) -> None:
    """Files load in the order of their names, whatever order they were written in."""
    for order in (["b", "a", "C"], ["C", "b", "a"]):
        folder = tmp_path / "".join(order)
        for name in order:
            web_ui_file(folder, f"tok-{name}", vectors(2, 32, seed=ord(name)))
    loaded = []
    for folder in sorted(tmp_path.iterdir()):
        tokenizer, text_encoder = parts(inpainting_checkpoint)
        infos = load_embeddings(folder, tokenizer, text_encoder)
        loaded.append((infos, tokenizer.get_added_vocab(), text_encoder.get_input_embeddings().weight))
    assert [info.token for info in loaded[0][0]] == ["tok-C", "tok-a", "tok-b"]
    assert loaded[0][:2] == loaded[1][:2]
    assert torch.equal(loaded[0][2], loaded[1][2])


def test_empty_folder_changes_nothing(tiny: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path) -> None:
    """Neither do other files, folders of such a name, or files in folders."""
    tokenizer, text_encoder = tiny
    (tmp_path / "notes.txt").write_text("cat")
    web_ui_file(tmp_path / "sub.safetensors", "tok-x", vectors(1, 32))
    weight = text_encoder.get_input_embeddings().weight
    assert load_embeddings(tmp_path, tokenizer, text_encoder) == ()
    assert text_encoder.get_input_embeddings().weight is weight


def test_weights_keep_their_type_and_need_no_gradient(inpainting_checkpoint: Path, tmp_path: Path) -> None:
    web_ui_file(tmp_path, "tok-x", vectors(2, 32))
    tokenizer, text_encoder = parts(inpainting_checkpoint)
    text_encoder.half()
    load_embeddings(tmp_path, tokenizer, text_encoder)
    weight = text_encoder.get_input_embeddings().weight
    assert (weight.dtype, weight.requires_grad) == (torch.float16, False)
    assert torch.equal(weight[-2:], vectors(2, 32).half())


class _Boom:
    """Says on unpickling that it was unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (self.proof,)

    def __init__(self, proof: str) -> None:
        self.proof = proof


def test_pickles_are_named_and_never_opened(
    tiny: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "embeddings"
    web_ui_file(folder, "tok-x", vectors(1, 32))
    for name in ("one.pt", "two.BIN", "three.ckpt"):
        (folder / name).write_bytes(pickle.dumps(_Boom(str(tmp_path / "boom"))))
    with caplog.at_level(logging.WARNING, logger="service"):
        assert load_embeddings(folder, *tiny) == (EmbeddingInfo("tok-x", 1),)
    assert [record.getMessage() for record in caplog.records] == [
        "embeddings that are pickles are not loaded: one.pt, three.ckpt, two.BIN"
    ]
    assert not (tmp_path / "boom").exists()


def _truncated(path: Path) -> None:
    save_file({"emb_params": vectors(2, 32)}, path)
    path.write_bytes(path.read_bytes()[:-9])


def _lying_header(path: Path) -> None:
    header = json.dumps({"emb_params": {"dtype": "F32", "shape": [2, 32], "data_offsets": [0, 9]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(9))


FAULTY: dict[str, Callable[[Path], None]] = {
    "wrong width": lambda path: save_file({"emb_params": vectors(2, 1024)}, path),
    "nan": lambda path: save_file({"emb_params": vectors(2, 32).fill_(float("nan"))}, path),
    "infinite": lambda path: save_file({"<x>": vectors(2, 32).fill_(float("inf"))}, path),
    "integers": lambda path: save_file({"<x>": torch.ones(2, 32, dtype=torch.int64)}, path),
    "three dimensions": lambda path: save_file({"<x>": torch.ones(1, 2, 32)}, path),
    "no dimension": lambda path: save_file({"<x>": torch.tensor(1.0)}, path),
    "no vector": lambda path: save_file({"<x>": torch.ones(0, 32)}, path),
    "no tensor": lambda path: save_file({}, path),
    "two encoders": lambda path: save_file({"clip_l": vectors(2, 32), "clip_g": vectors(2, 48)}, path),
    "blank token": lambda path: save_file({"  ": vectors(1, 32)}, path),
    "empty token": lambda path: save_file({"": vectors(1, 32)}, path),
    "truncated": _truncated,
    "lying header": _lying_header,
    "empty": lambda path: path.write_bytes(b"") and None,
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n") and None,
    "pickle": lambda path: path.write_bytes(pickle.dumps(_Boom("boom"))) and None,
    "torch file": lambda path: torch.save({"<x>": vectors(1, 32)}, path),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_faulty_files_stop_the_start(fault: str, tiny: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path) -> None:
    """One line names the file, and the model is as it was."""
    tokenizer, text_encoder = tiny
    web_ui_file(tmp_path, "a-sound-one", vectors(2, 32))
    FAULTY[fault](tmp_path / "faulty.safetensors")
    weight = text_encoder.get_input_embeddings().weight
    with pytest.raises(StartupError) as caught:
        load_embeddings(tmp_path, tokenizer, text_encoder)
    message = str(caught.value)
    assert "'faulty.safetensors'" in message
    assert "\n" not in message
    assert text_encoder.get_input_embeddings().weight is weight
    assert "a-sound-one" not in tokenizer.get_vocab()


def test_value_too_large_for_half_precision_is_refused(inpainting_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer, text_encoder = parts(inpainting_checkpoint)
    web_ui_file(tmp_path, "tok-x", vectors(2, 32) * 1e6)
    with pytest.raises(StartupError, match=r"'tok-x.safetensors'.*float16"):
        load_embeddings(tmp_path, tokenizer, text_encoder.half())


@pytest.mark.parametrize(
    ("files", "token"),
    [
        ({"a": ("<x>", 1), "b": ("<x>", 1)}, "<x>"),
        ({"a": ("Token", 1), "b": ("tOKEN", 1)}, "tOKEN"),
        ({"a": ("tok", 2), "b": ("tok_1", 1)}, "tok_1"),
        ({"a": ("tok_1", 1), "b": ("tok", 2)}, "tok_1"),
        ({"a": ("tok", 1), "b": ("tok_1", 1)}, "tok_1"),
        ({"a": ("tok_3", 2), "b": ("Tok", 3)}, "Tok_3"),
        ({"a": ("tok", 5), "b": ("TOK_2", 1)}, "TOK_2"),
    ],
)
def test_tokens_of_two_files_that_clash_are_refused(
    files: dict[str, tuple[str, int]], token: str, tiny: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path
) -> None:
    """The same token, in any case, or one that stock would take for a further vector of the other."""
    for name, (key, num_vectors) in files.items():
        diffusers_file(tmp_path, name, key, vectors(num_vectors, 32))
    with pytest.raises(StartupError) as caught:
        load_embeddings(tmp_path, *tiny)
    assert all(repr(word) in str(caught.value) for word in ("a.safetensors", "b.safetensors", token))


def test_tokens_that_only_look_alike_load(tiny: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path) -> None:
    for name, num_vectors in (("tok", 2), ("tok_3", 1), ("tok_x", 2), ("token", 2)):
        web_ui_file(tmp_path, name, vectors(num_vectors, 32))
    assert len(load_embeddings(tmp_path, *tiny)) == 4
    encoder = PromptEncoder(*tiny)
    lengths = [[len(word) for word in encoder._words(name)] for name in ("tok", "tok_3", "tok_x", "token")]
    assert lengths == [[2], [1], [2], [2]]


@pytest.mark.parametrize("token", ["house", "House", "RED", "<|endoftext|>", "a", ","])
def test_words_that_the_model_knows_are_refused(token: str, tmp_path: Path) -> None:
    """An embedding of that name would change what ordinary prompts mean."""
    tokenizer, text_encoder = parts(BUNDLED_FOLDER)
    diffusers_file(tmp_path, "file", token, vectors(1, 192))
    with pytest.raises(StartupError) as caught:
        load_embeddings(tmp_path, tokenizer, text_encoder)
    assert "'file.safetensors'" in str(caught.value)
    assert repr(token) in str(caught.value)


def test_missing_folder_is_named(tiny: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="nowhere"):
        load_embeddings(tmp_path / "nowhere", *tiny)
