"""The tokenizer kept beside the shards: one behaviour wherever text becomes tokens or back.

What `tokenizer.json` says of truncation, padding and tokens to put around a text is meant
for other uses, and is not obeyed. All special tokens are text where a document or a prompt
spells them out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ten_dist.data.manifest import PREPARE_COMMAND, Manifest
from ten_dist.data.remote import RemotePath
from ten_dist.data.storage import Location
from ten_dist.data.tokenizer_spec import (
    SEPARATOR,
    UNMISTAKABLE,
    check_separator,
    clear_separator,
    special_tokens,
    unknown_token,
    without_piece,
)
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.files import read_user_text

TOKENIZER_NAME = "tokenizer.json"
_PANIC = "PanicException"


class TextTokenizer:
    """A tokenizer with the token that ends each document, the separator.

    Args:
        content: of a `tokenizer.json` of the ``tokenizers`` library.
        separator: the token; by default the only one among the well-known ones that is
            special, or else that means nothing else in a text.

    Attributes:
        content: as given.
        separator: the token in words.
        separator_id: its id.
        vocabulary: ids of all tokens as the tokenizer spells them, added ones too.
        vocab_size: the largest token id plus one: what an embedding needs, gaps in the
            ids too.

    Raises:
        DataError: it is not a tokenizer.
        ConfigurationError: there is no such separator, it could come out of a text, or it
            has to be named.
    """

    def __init__(self, content: str, separator: str | None = None) -> None:
        self.content = content
        self._tokenizer = _from_json(content)
        self.spec: dict[str, Any] = json.loads(self._tokenizer.to_str())
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary: dict[str, int] = vocabulary
        if not vocabulary:
            raise DataError("it is not a tokenizer.json: it has no tokens")
        self.vocab_size = max(vocabulary.values()) + 1
        if separator is None:
            separator = clear_separator(self.spec)
        check_separator(self.spec, separator)
        self._spelled_out_ids: dict[int, np.ndarray] = {}
        self.separator = separator
        self.separator_id: int = vocabulary[separator]
        same = [token for token, i in vocabulary.items() if i == self.separator_id]
        if len(same) > 1:
            # The library numbers added tokens on from the number of pieces.
            raise ConfigurationError(
                f"the tokenizer gives {' and '.join(map(repr, sorted(same)))} one id, "
                f"{self.separator_id}: give the added token another, or name another one "
                "with --separator"
            )

    @classmethod
    def with_separator_id(cls, content: str, separator_id: int) -> TextTokenizer:
        """A tokenizer whose separator is known by its id.

        Raises:
            DataError, ConfigurationError: as the class.
        """
        separator = _from_json(content).id_to_token(separator_id)
        if separator is None:
            raise DataError(f"the tokenizer has no token {separator_id}, the separator")
        try:
            return cls(content, separator)
        except ConfigurationError as error:
            raise DataError(
                f"the data that this was trained on were prepared with a separator that "
                f"text can give ({error}): prepare them again, and train again"
            ) from None

    @property
    def has_clear_separator(self) -> bool:
        """Whether the separator means nothing else in a text."""
        special = self.separator in special_tokens(self.spec)
        return special or self.separator in UNMISTAKABLE

    @cached_property
    def sha256(self) -> str:
        """Hash of the content in UTF-8, in hex."""
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()

    @cached_property
    def in_bytes(self) -> bool:
        """Whether this is :func:`byte_tokenizer`."""
        return self._tokenizer.to_str() == byte_tokenizer().to_str()

    @cached_property
    def _encoding(self) -> Tokenizer:
        """The tokenizer that encodes; all special tokens are text, the separator too."""
        unused = dict.fromkeys(("truncation", "padding", "post_processor"))
        spec = {**self.spec, **unused}
        spec["added_tokens"] = [
            {**token, "special": token["special"] or token["content"] == self.separator}
            for token in spec["added_tokens"]
        ]
        if "dropout" in spec["model"]:
            # A text is to give the same tokens at any time.
            spec["model"] = {**spec["model"], "dropout": None}
        tokenizer = Tokenizer.from_str(json.dumps(spec))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def to_json(self) -> str:
        """A tokenizer.json that encodes texts to the same tokens in any program, where no
        text spells a special token: there such a text is that token."""
        return self._encoding.to_str()

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Id of every special token, the separator among them, by its spelling."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        tokens = {*special_tokens(self.spec), self.separator}
        return {token: vocabulary[token] for token in sorted(tokens)}

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of the token that stands for what the tokenizer does not know."""
        unknown = unknown_token(self.spec)
        return None if unknown is None else self._tokenizer.token_to_id(unknown)

    def spelled_out(self, token_id: int) -> np.ndarray:
        """What a model that has a special token as a piece makes of it otherwise.

        Returns:
            uint32 [n].

        Raises:
            DataError: it has no other tokens for it.
        """
        if token_id not in self._spelled_out_ids:
            token = self._tokenizer.id_to_token(token_id) or ""
            model = {**self.spec["model"], **without_piece(self.spec, token)}
            tokenizer = Tokenizer.from_str(
                json.dumps({**self.spec, "model": model, "added_tokens": []})
            )
            ids = [part.id for part in tokenizer.model.tokenize(token)]
            if not ids or token_id in ids:
                raise DataError(
                    f"a document spells {token!r}, which ends documents, and the "
                    "tokenizer has no other tokens for it: name another with --separator"
                    if token_id == self.separator_id
                    else f"a conversation spells {token!r}, for which the tokenizer has "
                    "no other tokens"
                )
            self._spelled_out_ids[token_id] = np.array(ids, dtype=np.uint32)
        return self._spelled_out_ids[token_id]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text: 1-D uint32. Several threads may call it at once.

        Raises:
            DataError: the tokenizer cannot encode a text.
        """
        if self.in_bytes:
            # The library gives the same, but splits the text into words and makes a token
            # of each byte: a hundred times as slow, and hundreds of bytes of memory a byte.
            return [
                np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)
                for text in texts
            ]
        with naming("the tokenizer cannot encode a document"):
            encodings = self._encoding.encode_batch_fast(
                texts, add_special_tokens=False
            )
        # By way of an array: numpy takes three times as long over a list.
        encoded = [np.asarray(array("I", encoding.ids)) for encoding in encodings]
        return [self._without_separator(ids) for ids in encoded]

    def _without_separator(self, ids: np.ndarray) -> np.ndarray:
        """Tokens of a text, the separator in other tokens where the text spells it."""
        at = np.flatnonzero(ids == self.separator_id)
        if not at.size:
            return ids
        parts = self.spelled_out(self.separator_id)
        pieces = np.split(ids, at)
        return np.concatenate(
            [pieces[0], *(part for piece in pieces[1:] for part in (parts, piece[1:]))]
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence of tokens, special ones spelled out.

        The text of two sequences is not always that of the one after the other: a
        character may be made of several tokens, and a space belong to neither.
        """
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def drops_unknown_characters(self) -> bool:
        """Whether characters that the vocabulary lacks leave no token at all."""
        model = self.spec["model"]
        if model["type"] != "BPE" or model.get("byte_fallback"):
            return False
        # The characters that byte-level tokenizers write bytes as.
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        return model.get("unk_token") is None and not alphabet <= model["vocab"].keys()


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are the 256 bytes, id = byte, and the separator, 256."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # The byte-level alphabet shows a printable byte as itself and the others, in order,
    # as the characters from 256 up.
    shown = {ord(character): character for character in alphabet}
    others = iter(sorted(character for code, character in shown.items() if code > 255))
    vocabulary = {shown.get(byte) or next(others): byte for byte in range(256)}
    tokenizer = byte_level(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([SEPARATOR])
    return tokenizer


def byte_level(model: models.Model) -> Tokenizer:
    """A tokenizer that splits as GPT-2's, and writes bytes as characters."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_json(content: str) -> Tokenizer:
    with naming("it is not a tokenizer.json"):
        return Tokenizer.from_str(content)


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn whatever the library of tokenizers raises into a :class:`DataError` of one line."""
    try:
        yield
    except BaseException as error:
        # A panic in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{what}: {reason}") from None


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, in hex. Raises ``OSError`` where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_tokenizer(manifest: Manifest) -> bytes:
    """The content of a set's ``tokenizer.json``, checked against the manifest.

    Raises:
        DataError: it cannot be read, or is another one.
    """
    return read_set_file(
        manifest.tokenizer_path, "tokenizer", manifest.tokenizer_sha256
    )


def read_set_file(path: Location, what: str, sha256: str) -> bytes:
    """The content of a file beside the shards of a set, which must have a hash.

    Raises:
        DataError: it cannot be read, or is another one.
    """
    try:
        if isinstance(path, RemotePath):
            return path.read_bytes(sha256=sha256)
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {what} {path} ({error.strerror}): copy it again, or "
            f"prepare the data again with `{PREPARE_COMMAND}`"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(
            f"{path} is not the {what} that these shards were made with (its sha256 "
            "is not the manifest's): put the original back, or prepare the data again "
            f"with `{PREPARE_COMMAND}`"
        )
    return content


def set_tokenizer(manifest: Manifest) -> TextTokenizer:
    """The tokenizer of a set, checked against the manifest.

    Raises:
        DataError: it cannot be read, or is another one.
        ConfigurationError: its separator can come out of text.
    """
    content = read_tokenizer(manifest).decode("utf-8-sig")
    return TextTokenizer(content, manifest.separator_token)


def read_tokenizer_file(
    path: str | os.PathLike[str], what: str, advice: str = ""
) -> str:
    """The content of a ``tokenizer.json`` of the user's, or of the one in a folder.

    Args:
        path: the file or folder.
        what: how messages begin.
        advice: how they end.

    Raises:
        ConfigurationError: there is none, or it is not text.
        DataError: it is not a tokenizer of the ``tokenizers`` library.
    """
    path = Path(path)
    if path.is_dir():
        path = path / TOKENIZER_NAME
    content = read_user_text(path, what, advice)
    try:
        _from_json(content)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return content
