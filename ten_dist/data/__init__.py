"""Token shards: their manifest, the order of their rows, and batches of them."""

from ten_dist.data.cache import ShardCache
from ten_dist.data.documents import token_counts, unigram_loss
from ten_dist.data.manifest import Manifest, ShardRecord
from ten_dist.data.mixture import Mixture, parse_mixture
from ten_dist.data.order import (
    BatchShape,
    RowOrder,
    accumulation_steps,
    batch_of_step,
)
from ten_dist.data.remote import RemoteAccess
from ten_dist.data.shards import TokenReader
from ten_dist.data.storage import held_out_set, is_url
from ten_dist.data.stream import TokenBatch, evaluation_batches, training_batches
from ten_dist.data.tokenizer import TextTokenizer, file_sha256, read_tokenizer
from ten_dist.data.verify import verify_shards

__all__ = [
    "BatchShape",
    "Manifest",
    "Mixture",
    "RemoteAccess",
    "RowOrder",
    "ShardCache",
    "ShardRecord",
    "TextTokenizer",
    "TokenBatch",
    "TokenReader",
    "accumulation_steps",
    "batch_of_step",
    "evaluation_batches",
    "file_sha256",
    "held_out_set",
    "is_url",
    "parse_mixture",
    "read_tokenizer",
    "token_counts",
    "training_batches",
    "unigram_loss",
    "verify_shards",
]
