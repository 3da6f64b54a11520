"""Builds the tokenizer: every byte is a token, and so is every word of the world."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from training.world import vocabulary

MAX_LENGTH = 77
"""Tokens of a prompt, start and end included, as the pipeline pads them."""

_END = "</w>"
_START = "<|startoftext|>"
_STOP = "<|endoftext|>"


def _byte_alphabet() -> list[str]:
    """One printable character for each of the 256 bytes, in the usual byte-level order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(b) for b in printable]
    extra = sum(1 for b in range(256) if b not in printable)
    return characters + [chr(256 + i) for i in range(extra)]


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that turn each of the words into a single token.

    Merges are learned on the words themselves, most frequent pair first, until all are whole.
    """
    pieces = [[*word[:-1], word[-1] + _END] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for piece in pieces for pair in pairwise(piece))
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for i, piece in enumerate(pieces):
            joined: list[str] = []
            j = 0
            while j < len(piece):
                if j + 1 < len(piece) and (piece[j], piece[j + 1]) == best:
                    joined.append(piece[j] + piece[j + 1])
                    j += 2
                else:
                    joined.append(piece[j])
                    j += 1
            pieces[i] = joined


def write_tokenizer(folder: Path) -> None:
    """Writes the tokenizer's files in the layout that CLIPTokenizer reads.

    Args:
        folder: where to, created if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = _byte_alphabet()
    merges = _learn_merges([w for w in vocabulary() if w.isascii() and w.isalpha()])
    tokens = [*alphabet, *(c + _END for c in alphabet)]
    seen = set(tokens)
    for a, b in merges:
        if a + b not in seen:
            tokens.append(a + b)
            seen.add(a + b)
    tokens += [_START, _STOP]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": _START,
        "eos_token": _STOP,
        "unk_token": _STOP,
        "pad_token": _STOP,
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": True,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Opens a tokenizer written by write_tokenizer."""
    return CLIPTokenizer.from_pretrained(folder)
