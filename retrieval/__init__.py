"""Retrieval over a collection: chunk, embed, index, rank, and the retrieval metrics.

Stands on its own: nothing here knows about cartridges. Importing the package costs numpy and regex
only; faiss, bm25s, torch and sentence-transformers are loaded by the calls that need them.
"""

from retrieval.bm25 import WordIndex
from retrieval.chunk import Chunk, chunk_document, split_sentences, with_title
from retrieval.embed import Embedder, HashEmbedder, SentenceEmbedder
from retrieval.embedder_files import EmbedderUnavailable
from retrieval.index import ChunkIndex
from retrieval.index_files import IndexBroken, OtherEmbedder
from retrieval.metrics import hit_at_k, ndcg_at_k, recall_at_k, reciprocal_rank, summarize
from retrieval.rank import Ranked, rank_chunks, rank_documents

__all__ = [
    "Chunk",
    "ChunkIndex",
    "Embedder",
    "EmbedderUnavailable",
    "HashEmbedder",
    "IndexBroken",
    "OtherEmbedder",
    "Ranked",
    "SentenceEmbedder",
    "WordIndex",
    "chunk_document",
    "hit_at_k",
    "ndcg_at_k",
    "rank_chunks",
    "rank_documents",
    "recall_at_k",
    "reciprocal_rank",
    "split_sentences",
    "summarize",
    "with_title",
]
