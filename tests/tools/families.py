"""Tokenizers of every family, and texts that are hard for them."""

import json
import random

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

WORDS = [
    "the",
    "of",
    "river",
    "stone",
    "light",
    "garden",
    "don't",
    "we'll",
    "Straße",
    "café",
    "naïve",
    "模型",
    "语言",
    "12",
    "2048",
]
WORDS += [
    "bread,",
    "(table)",
    "x=y;",
    "state-space",
    "ΩΣ",
    "e\u0301tat",
    "한국어",
    "►►",
    "🙂👩\u200d🔬",
]
SPACES = [
    " ",
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n    ",
    "\t",
    "\r\n",
    " \n ",
    "\u3000",
    "\xa0",
]
ODD = [
    "\ufeff",
    "\u2581",
    "\0",
    "\u200b",
    "\x1c",
    "\ufdd0separator\ufdd0x",
    "<tag>",
    "<mask>",
]
LONG = ["a" * 700, "=" * 300, "模" * 500, "ab " * 200, "x\n" * 200]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def random_text(draw, separator, pieces=120):
    """A document with marks, separators spelled out and long lines."""
    parts = []
    for _ in range(draw.randrange(pieces)):
        kind = draw.random()
        if kind < 0.02:
            parts.append(draw.choice(LONG))
        elif kind < 0.10:
            parts.append(draw.choice([*ODD, separator, separator.upper()]))
        else:
            parts.append(draw.choice(WORDS))
        if draw.random() < 0.9:
            parts.append(draw.choice(SPACES))
    return "".join(parts)


def _texts():
    draw = random.Random(1)
    return [random_text(draw, "</s>") for _ in range(60)]


def _byte_level(splitter=None, prefix=False):
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not splitter)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([splitter, level]) if splitter else level
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _gpt2():
    return _byte_level()


def _gpt2_with_prefix():
    return _byte_level(prefix=True)


def _llama3():
    from tokenizers import Regex

    return _byte_level(pre_tokenizers.Split(Regex(LLAMA3), "isolated"))


def _llama(normalizer=None):
    # Trained with words apart, so that no merge reaches over a space, as sentencepiece does.
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    spec = json.loads(tokenizer.to_str())
    spec["model"]["byte_fallback"] = True
    spec["added_tokens"] = spec["added_tokens"][: len(SPECIAL)]
    spec["pre_tokenizer"] = None
    spec["normalizer"] = normalizer or {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    return tokenizer


def _metaspace(scheme="always", normalizer=None):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 3)]
    )
    return tokenizer


def _unigram():
    return _metaspace()


def _unigram_first():
    return _metaspace("first")


def _unigram_normalized():
    return _metaspace(
        normalizer=normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Strip(), normalizers.Lowercase()]
        )
    )


def _bert():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    return tokenizer


def _with_tags(tokenizer):
    """Added tokens that are no special ones, among them one that takes spaces along."""
    from tokenizers import AddedToken

    tokenizer.add_tokens(["<tag>", AddedToken("<mask>", lstrip=True)])
    return tokenizer


def _gpt2_with_tags():
    return _with_tags(_gpt2())


FAMILIES = {
    "gpt2": (_gpt2, True),
    "gpt2_with_prefix": (_gpt2_with_prefix, True),
    "gpt2_with_tags": (_gpt2_with_tags, False),
    "llama3": (_llama3, True),
    "llama": (_llama, True),
    "unigram": (_unigram, True),
    "unigram_first": (_unigram_first, True),
    "unigram_normalized": (_unigram_normalized, False),
    "bert": (_bert, True),
}
"""How to make one of each family, and whether its texts can be encoded in pieces."""
