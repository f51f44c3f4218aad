"""The temporary near (GPU) memory of prefill and questions: its peak, beside stored rows.

Tokens pass one layer after another. Meanwhile memory holds their hidden states, the rows of one
layer, and one of these at a time: the attention of a chunk, a product with weights, or a layer that
is stored (rows encoded, an index built, an eviction). Sizes are predicted from shapes alone;
tests/runtime/engine/test_peaks.py compares them with measured peaks: every policy in bfloat16, and
two policies in every far format.
"""

from __future__ import annotations

from nearfar.policies.base import LAST_QUERIES
from nearfar.runtime.engine.planning.memory_setup import MemorySetup
from nearfar.runtime.memory.far_store import ENCODE_TOKENS
from nearfar.runtime.models.linear import product_tokens
from nearfar.runtime.steps.prefill import chunk_tokens_of
from nearfar.runtime.steps.prompt_attention import summed_tile
from nearfar.storage import encoding_bytes, token_bytes

ROWS_ON_THEIR_WAY = 2  # layers of keys and values: one is copied away while the next is made
ASKED_TOKENS = 512  # of a question, in the plan
TOKEN_BYTES = 8  # of a token id
WIDE = 4  # bytes of a float32
# temporary memory of torch's attention on a CPU, for each thread
ATTENTION_BYTES = 2**20


def reading_bytes(setup: MemorySetup, past_tokens: int, tokens: int) -> int:
    """Peak while ``tokens`` are read after ``past_tokens`` that each layer holds."""
    hidden = tokens * (setup.model.hidden_size * setup.dtype.itemsize + TOKEN_BYTES)
    rows = _layer_bytes(setup, past_tokens, tokens) + _watched_bytes(setup, past_tokens + tokens)
    work = (
        _attending_bytes(setup, past_tokens, tokens),
        _product_bytes(setup, tokens),
        _taking_in_bytes(setup, past_tokens, tokens),
    )
    return hidden + rows + max(work)


def asking_bytes(setup: MemorySetup, context_tokens: int) -> int:
    """Peak during a question about ``context_tokens`` and its answer, with marks and growth."""
    asked = min(ASKED_TOKENS, setup.model.max_context_tokens)
    held = setup.near_tokens(context_tokens) + setup.far_tokens(context_tokens)
    near = setup.mark_bytes(context_tokens) + setup.growth_bytes(context_tokens)
    if not setup.on_gpu:
        near += setup.index_growth_bytes(context_tokens)
    return near + reading_bytes(setup, held, asked)


def index_work_bytes(setup: MemorySetup, keys: int) -> int:
    """Peak on the host while an index of ``keys`` far keys is built or selects."""
    if setup.evicts or setup.near_index:
        return 0
    return setup.policy.predict_working_bytes(setup.model.geometry, keys, setup.far_dtype)


def _layer_bytes(setup: MemorySetup, past_tokens: int, tokens: int) -> int:
    """Bytes of the rows of the layer that is read."""
    seen = past_tokens + tokens
    rows = (seen + 7) * setup.row_bytes
    exact_near = not setup.evicts and not setup.policy.traits.keeps_far
    if exact_near and not past_tokens:
        rows = 7 * setup.row_bytes  # stored rows, counted elsewhere
    if setup.policy.traits.positions == "cache-index":
        rows += seen * setup.row_bytes // 2  # keys as stored, and rotated for attention
    if not setup.on_gpu:
        return rows
    rows *= ROWS_ON_THEIR_WAY
    if setup.policy.traits.keeps_far and setup.far_dtype != setup.dtype:
        geometry = setup.model.geometry
        rows += seen * geometry.kv_heads * token_bytes(setup.far_dtype, geometry.head_dim)
    return rows


def _watched_bytes(setup: MemorySetup, seen_tokens: int) -> int:
    """Bytes of the statistics of a prompt's queries."""
    geometry, watches = setup.model.geometry, setup.policy.traits.watches
    if watches == "sums":
        return geometry.query_heads * seen_tokens * WIDE
    if watches == "last":
        return geometry.query_heads * LAST_QUERIES * geometry.head_dim * WIDE
    return geometry.query_heads * geometry.head_dim**2 * 3 * 8 if watches == "moments" else 0


def _attending_bytes(setup: MemorySetup, past_tokens: int, tokens: int) -> int:
    """Bytes of a chunk's attention: its product, its queries, two parts and their merge."""
    geometry, item = setup.model.geometry, setup.dtype.itemsize
    chunk = min(chunk_tokens_of(setup.config.chunk_tokens, setup.device), tokens)
    query, key = geometry.query_heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    qkv = chunk * (query + 2 * key) * item
    placed = min(chunk, product_tokens(setup.device))
    # a piece is rotated in float32, beside the queries of earlier pieces
    placing = chunk * query * item + placed * (query + key) * (3 * WIDE + item)
    parts = 1 if chunk == tokens and not past_tokens else 2
    attending = chunk * query * (2 * item + parts * item + (parts - 1) * 3 * WIDE)
    attending += chunk * geometry.query_heads * parts * 4 * WIDE
    if not setup.on_gpu:
        attending += ATTENTION_BYTES
    summing = 0
    if setup.policy.traits.watches == "sums":
        queries, keys = summed_tile(setup.device)
        tile = geometry.query_heads * min(queries, tokens) * (min(keys, tokens) + geometry.head_dim)
        tile += 2 * min(keys, tokens) * key
        summing = (tile + geometry.query_heads * (past_tokens + tokens)) * WIDE
        summing += chunk * query * 3 * item
    return qkv + max(placing, attending, summing)


def _product_bytes(setup: MemorySetup, tokens: int) -> int:
    """Bytes of a product with the widest weight."""
    widest = 3 * setup.model.widest_inner_size + 4 * setup.model.hidden_size
    item = max(setup.dtype.itemsize, 2 if setup.on_gpu else WIDE)
    return min(product_tokens(setup.device), tokens) * widest * item


def _taking_in_bytes(setup: MemorySetup, past_tokens: int, tokens: int) -> int:
    """Bytes while a layer is stored: rows are encoded and indexed, or scored and evicted."""
    geometry, policy = setup.model.geometry, setup.policy
    seen = past_tokens + tokens
    if policy.traits.keeps_far:
        heads = geometry.kv_heads * min(ENCODE_TOKENS, seen)
        encoding = heads * encoding_bytes(setup.far_dtype, geometry.head_dim)
        return max(encoding, 0 if setup.on_gpu else index_work_bytes(setup, seen))
    if not setup.evicts:
        return 0
    copied = setup.row_bytes if policy.traits.positions == "cache-index" else 0
    work = policy.predict_working_bytes(geometry, seen, setup.dtype)
    return seen * (copied + setup.note_bytes) + work
