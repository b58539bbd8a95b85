"""Text to packed token batches: corpora, tokenizers, token files, the sampler."""

from foldscan.data.corpora import CORPORA, Document, is_held_out, load_corpus
from foldscan.data.fetch import FetchError, Package, cache_folder, fetch, packages
from foldscan.data.sampler import IGNORE, PackedBatch, PackedSampler, sequential_batches
from foldscan.data.tokenizer import END_OF_TEXT, Tokenizer
from foldscan.data.tokens import TokenFile, write_token_file

__all__ = [
    "CORPORA",
    "END_OF_TEXT",
    "IGNORE",
    "Document",
    "FetchError",
    "Package",
    "PackedBatch",
    "PackedSampler",
    "TokenFile",
    "Tokenizer",
    "cache_folder",
    "fetch",
    "is_held_out",
    "load_corpus",
    "packages",
    "sequential_batches",
    "write_token_file",
]
