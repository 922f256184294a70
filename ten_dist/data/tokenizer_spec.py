"""What a tokenizer.json says of its special tokens, and which of them ends documents."""

from __future__ import annotations

from typing import Any

from ten_dist.errors import ConfigurationError

SEPARATOR = "<|endoftext|>"
WELL_KNOWN_SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
# No text means anything else by these, special tokens or not.
UNMISTAKABLE = (SEPARATOR, "<|end_of_text|>")

# Unicode sets its first and last character aside for use within a program.
_UNSPELLABLE = "\ufdd0separator\ufdd0"


def special_tokens(spec: dict[str, Any]) -> list[str]:
    return [token["content"] for token in spec["added_tokens"] if token["special"]]


def clear_separator(spec: dict[str, Any]) -> str:
    """The separator that a tokenizer has without a doubt.

    A token that is not special is what a text may well contain, such as `</s>` where that
    is a tag of HTML.
    """
    special = special_tokens(spec)
    added = [token["content"] for token in spec["added_tokens"]]
    found = [token for token in WELL_KNOWN_SEPARATORS if token in special]
    found = found or [token for token in UNMISTAKABLE if token in added]
    if len(found) == 1:
        return found[0]
    if found:
        reason = f"more than one token that may, {' '.join(found)}"
    else:
        reason = f"none of {' '.join(WELL_KNOWN_SEPARATORS)} as a special token"
        reason += f" (it has {' '.join(special)})" if special else ""
    raise ConfigurationError(
        f"the tokenizer has {reason}, to separate documents: name the token to use with "
        "--separator"
    )


def check_separator(spec: dict[str, Any], separator: str) -> None:
    """Refuse a separator that text gives.

    Raises:
        ConfigurationError: the tokenizer has no such token, or it is a piece of text.
    """
    added = [token["content"] for token in spec["added_tokens"]]
    if separator not in added:
        raise ConfigurationError(
            f"--separator {separator!r} is none of the tokenizer's added tokens, which "
            f"are kept apart from text: {' '.join(added) or 'it has none'}"
        )
    if separator == unknown_token(spec):
        raise ConfigurationError(
            f"--separator {separator!r} stands for what the tokenizer does not know: "
            "name another token"
        )


def unknown_token(spec: dict[str, Any]) -> str | None:
    """The token that stands for what a tokenizer does not know."""
    model = spec["model"]
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def without_piece(spec: dict[str, Any], piece: str) -> dict[str, Any]:
    """Vocabulary and merges of a model in which nothing becomes a piece; ids stay."""
    model = spec["model"]

    def renamed(name: str) -> str:
        return _UNSPELLABLE if name == piece else name

    changed: dict[str, Any] = {}
    if isinstance(model["vocab"], dict):
        changed["vocab"] = {renamed(name): i for name, i in model["vocab"].items()}
    else:
        changed["vocab"] = [[renamed(name), score] for name, score in model["vocab"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        # Releases of the library differ in how they write a pair.
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        changed["merges"] = [
            [left, right]
            for left, right in pairs
            if piece not in (left, right, left + right.removeprefix(prefix))
        ]
    return changed
