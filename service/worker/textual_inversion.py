"""Textual inversions: words that the text encoder learned from a file.

`load_embeddings` reads every file of a folder before anything is changed, so that a fault leaves the model as
it was, then hands them to stock's `load_textual_inversion`: one token of the tokenizer and one row of the text
encoder's embeddings for each vector, named `token`, `token_1`, `token_2` and so on.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from service.errors import StartupError
from service.messages import EmbeddingInfo
from service.worker.weight_files import check_whole

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}

WEB_UI_KEYS = {"emb_params", "string_to_param", "string_to_param.*", "*"}
"""What AUTOMATIC1111 calls the tensor; the token is the file's name there. Diffusers calls it by its token."""


@dataclass(frozen=True, slots=True, eq=False)
class _Embedding:
    """One file.

    Attributes:
        file: Its name.
        token: What prompts call it.
        vectors: (n, D) in the text encoder's type.
    """

    file: str
    token: str
    vectors: torch.Tensor

    def vector_tokens(self) -> Iterator[str]:
        """The token of each vector, as stock names them."""
        yield self.token
        for index in range(1, len(self.vectors)):
            yield f"{self.token}_{index}"


def load_embeddings(folder: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> tuple[EmbeddingInfo, ...]:
    """Teach the tokenizer and the text encoder every `.safetensors` that lies directly in `folder`.

    Call it once, before a `PromptEncoder` is made of the two. Pickles are not opened; a warning names them.

    Args:
        folder: What to load, in the order of the files' names.
        tokenizer: Changed in place.
        text_encoder: Changed in place, on whatever device it is.

    Raises:
        StartupError: A file is not a textual inversion of this text encoder, or two tokens clash.
    """
    files = _list(folder)
    pickles = [path.name for path in files if path.suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        logger.warning("embeddings that are pickles are not loaded: %s", ", ".join(pickles))
    embeddings = [_read(path, text_encoder) for path in files if path.suffix.lower() == ".safetensors"]
    _check_tokens(embeddings, tokenizer)
    if embeddings:
        num_tokens = len(tokenizer) + sum(len(embedding.vectors) for embedding in embeddings)
        # Stock would fit a normal distribution to all old rows to fill the new ones, which it then overwrites.
        text_encoder.resize_token_embeddings(num_tokens, mean_resizing=False)
        _stock(tokenizer, text_encoder).load_textual_inversion(
            [{embedding.token: embedding.vectors} for embedding in embeddings],
            token=[embedding.token for embedding in embeddings],
        )
    return tuple(EmbeddingInfo(embedding.token, len(embedding.vectors)) for embedding in embeddings)


def examine_embeddings(folder: Path) -> tuple[list[Path], list[Path]]:
    """What `load_embeddings` would load from a folder, and the pickles that it would pass over.

    Raises:
        StartupError: The folder cannot be read, or a file is cut off.
    """
    files = _list(folder)
    found = [path for path in files if path.suffix.lower() == ".safetensors"]
    for path in found:
        check_whole(path, "embedding")
    return found, [path for path in files if path.suffix.lower() in PICKLE_SUFFIXES]


def further_vectors(tokenizer: CLIPTokenizer) -> dict[int, tuple[int, ...]]:
    """For the token of each textual inversion of several vectors: the tokens of all but the first."""
    added: dict[str, int] = tokenizer.added_tokens_encoder
    found = {}
    for token, first in added.items():
        further: list[int] = []
        while (name := f"{token}_{len(further) + 1}") in added:
            further.append(added[name])
        if further:
            found[first] = tuple(further)
    return found


def _list(folder: Path) -> list[Path]:
    try:
        return sorted((path for path in folder.expanduser().iterdir() if path.is_file()), key=lambda path: path.name)
    except OSError as error:
        raise StartupError(f"cannot read the folder of embeddings {str(folder)!r}: {error.strerror}") from error


def _read(path: Path, text_encoder: CLIPTextModel) -> _Embedding:
    """One file, checked."""
    try:
        tensors = load_file(path)
    except Exception as error:
        logger.debug("reading an embedding failed", exc_info=error)
        raise StartupError(f"embedding {path.name!r} is not a readable safetensors file") from error
    web_ui_keys = WEB_UI_KEYS & tensors.keys()
    if len(web_ui_keys) == 1:
        token, vectors = path.stem, tensors[web_ui_keys.pop()]
    elif len(tensors) == 1:
        token, vectors = next(iter(tensors.items()))
    else:
        names = ", ".join(sorted(tensors)[:3]) or "none"
        raise StartupError(f"embedding {path.name!r} holds {len(tensors)} tensors ({names}), one is needed")
    if not vectors.is_floating_point() or vectors.ndim not in (1, 2) or not len(vectors):
        shape = "x".join(str(side) for side in vectors.shape)
        raise StartupError(
            f"embedding {path.name!r} is a tensor of {shape or 'no'} {vectors.dtype}, not of one or more vectors"
        )
    width = text_encoder.get_input_embeddings().weight.shape[1]
    if vectors.shape[-1] != width:
        raise StartupError(
            f"embedding {path.name!r} is {vectors.shape[-1]} wide, the model's text encoder {width}:"
            " it was made for another kind of model"
        )
    vectors = vectors.to(text_encoder.dtype).reshape(-1, width)
    if not vectors.isfinite().all():
        raise StartupError(f"embedding {path.name!r} has values that are not finite in {text_encoder.dtype}")
    return _Embedding(path.name, token, vectors)


def _check_tokens(embeddings: list[_Embedding], tokenizer: CLIPTokenizer) -> None:
    """Every token means one thing, in any case: the tokenizer lowers what it reads."""
    vocabulary = frozenset(tokenizer.get_vocab())
    owners: dict[str, _Embedding] = {}
    for embedding in embeddings:
        for token in embedding.vector_tokens():
            key = _normalized(token, tokenizer)
            if not key.strip():
                raise StartupError(f"embedding {embedding.file!r} has a blank token")
            # As a part of words, as a word, or as a special token.
            is_known = not vocabulary.isdisjoint({token, key})
            if is_known or len(tokenizer(token, add_special_tokens=False).input_ids) == 1:
                raise StartupError(
                    f"embedding {embedding.file!r}: its token {token!r} is in the tokenizer's vocabulary already"
                )
            if key in owners:
                raise _clash(embedding, token, owners[key])
            owners[key] = embedding
    for embedding in embeddings:
        # Stock numbers on as long as there are tokens: `cat` of one vector and another file's `cat_1` would be two.
        following = f"{embedding.token}_{len(embedding.vectors)}"
        if other := owners.get(_normalized(following, tokenizer)):
            raise _clash(embedding, following, other)


def _clash(embedding: _Embedding, token: str, other: _Embedding) -> StartupError:
    return StartupError(f"embeddings {other.file!r} and {embedding.file!r} clash: both mean the token {token!r}")


def _normalized(token: str, tokenizer: CLIPTokenizer) -> str:
    """The token as the tokenizer reads it in a prompt: in lower case, and so on."""
    normalized: str = tokenizer.backend_tokenizer.normalizer.normalize_str(token)
    return normalized


def _stock(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> Any:  # noqa: ANN401 - diffusers has no types
    """The stock pipeline, of no more than these two."""
    return StableDiffusionInpaintPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
