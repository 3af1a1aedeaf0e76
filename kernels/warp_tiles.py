"""A backward's tiles in thread-level code (see `warps`): how they lie, how they are copied, split and multiplied.

A warp works on 16 tokens × 32 channels of all n streams (2 or 4), as the tensor core's m16n8k16 lays them out:

    lane l has the tokens l // 4 and l // 4 + 8, and of each the 8 channels from 8·q on, q = l % 4: 16 bytes
    slot s of a lane is the stream (q % n) ^ s

A product leaves lane l the columns 2q and 2q + 1 of 8. Which channels and stream those are is settled where its operand
is written: phi's columns are permuted once, on the way into shared memory (`load_phi`). So products need no trip
through shared memory, a lane stores 16 bytes, and what is summed over channels, for each stream, ends in n − 1 shuffles
and as many additions a sum: what slot s of lane q has of its stream belongs to lane q ^ s.

Tiles in shared memory are rows of vectors of 16 bytes, that of 8 channels v at v ^ swizzle(token):

    a stream            row token · n + stream
    a layer's           row token
    phi's halves        row ((group · n + slot) · 2 + pair of tiles) · 32 + lane: what it multiplies with, in order
    g_dots' halves      row token: the high halves of 8 rows of phi a vector, then the low ones, then zeros

A lane copies the streams' elements that it reads itself; only what others read needs a barrier.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import tilelang.language as T

from .warps import VECTOR, WARP, WARP_CHANNELS, WARP_TOKENS, high_half, low_half, mma

ROW_PAIRS_AT_ONCE = 12  # of phi, in flight for a thread


@dataclass(frozen=True)
class WarpTile:
    """A block's tile of tokens and channels of all streams, with `rows` rows of phi: sizes that follow."""

    num_streams: int
    rows: int
    tokens: int
    channels: int
    stages: int

    @property
    def groups(self) -> int:
        """Warps side by side along the channels."""
        return self.channels // WARP_CHANNELS

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.groups * (self.tokens // WARP_TOKENS)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps

    @property
    def vectors(self) -> int:
        """Vectors of a row of channels."""
        return self.channels // VECTOR

    @property
    def layer_vectors(self) -> int:
        """Vectors of a layer's tile."""
        return self.tokens * self.vectors

    @property
    def stream_vectors(self) -> int:
        """Vectors of a tile of all streams."""
        return self.layer_vectors * self.num_streams

    @property
    def blocks(self) -> int:
        """Blocks of 8 rows of phi, the last one filled up with zeros."""
        return -(-self.rows // 8)

    @property
    def dots_vectors(self) -> int:
        """Vectors of a token's g_dots, an odd number: eight tokens meet in no bank."""
        return 2 * self.blocks + 1

    @property
    def phi_vectors(self) -> int:
        """Vectors that a lane reads of phi for two tiles of 8 columns, filled up to an odd number as well."""
        return self.blocks | 1

    @property
    def phi_rows(self) -> int:
        """Rows of phi's tile."""
        return self.groups * self.num_streams * 2 * WARP

    @property
    def row_pairs(self) -> int:
        """Pairs of rows of phi."""
        return 4 * self.blocks

    @property
    def pairs_per_thread(self) -> int:
        """Pairs of g_dots of a tile that a thread splits."""
        return self.tokens * self.row_pairs // self.threads

    @property
    def g_phi_tiles(self) -> int:
        """Tiles of 16 channels whose g_phi a warp sums up, of one stream."""
        return self.channels * self.num_streams // self.warps // 16

    @property
    def products(self) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """Products of two blocks of rows that make up (H + L) · (h + l) without L · l.

        Each has the two vectors of g_dots, and the places among the lane's registers of phi's halves that they are
        multiplied with.

        (H0 H1) with (h0 h1) and (l0 l1), (L0 L1) with (h0 h1); of an odd last block (L H) and (H 0), both with (h l).
        """
        blocks, found = self.blocks, []
        for b in range(0, blocks - 1, 2):
            found += [(b, b + 1, (2 * b, 2 * b + 2)), (blocks + b, blocks + b + 1, (2 * b,))]
        if blocks % 2:
            last = blocks - 1
            found += [(blocks + last, last, (2 * last,)), (last, 2 * blocks, (2 * last,))]
        return tuple(found)


class Place(NamedTuple):
    """A thread's place in the tile.

    Its number, its lane's quarter, the first of its tokens in the tile, its first channel, and its first vectors in the
    tiles of streams and layers.
    """

    thread: Any
    q: Any
    token: Any
    channel: Any
    of_streams: Any
    of_layers: Any


def load_matrices(transposed, row, to):
    """Four matrices of 8 × 8: lane l gives row l % 8 of matrix l // 8."""
    return T.ptx_ldmatrix(T.bool(transposed), 4, T.access_ptr(row, "r", VECTOR), T.access_ptr(to, "w", VECTOR))


def copy_inside(to, source, inside, elements=VECTOR):
    """Copy into shared memory what is `inside`, else zeros; there after a wait."""
    return T.ptx_cp_async(T.access_ptr(to, "w", elements), T.access_ptr(source, "r", elements), elements, inside)


def is_inside(x, token, channel, tile: WarpTile):
    """Whether a vector of a token is within the tensors; a block may end beyond the last channel."""
    num_tokens, _, hidden_size = x.shape
    if hidden_size % tile.channels == 0:
        return token < num_tokens
    return T.And(token < num_tokens, channel < hidden_size)


def swizzle(token):
    """Return the XOR mask of a token's vector numbers: neither 8 tokens nor 2 tokens of 4 vectors meet in a bank."""
    return token % 2 * 4 + token // 2 % 4


def accumulator(slot, half, e):
    """Return a lane's index of a slot's channel e, for its first or second token, among the sums of products."""
    return slot * 16 + e // 2 * 4 + half * 2 + e % 2


@T.macro
def split_pair(high, low, values, at):
    """high + low = values[at : at + 2], as two pairs of bfloat16.

    The rest has a place of its own: tilelang 0.1.15 would take `values` as it was before for what it is after a store.
    """
    rest = T.alloc_local((2,), T.float32)
    for e in T.vectorized(2):
        high[e] = T.cast(values[at + e], T.bfloat16)
    for e in T.unroll(2):
        rest[e] = values[at + e] - T.cast(high[e], T.float32)
    for e in T.vectorized(2):
        low[e] = T.cast(rest[e], T.bfloat16)


@T.macro
def unpack(values, at, vector, words):
    """values[at : at + 8] = vector in float32; `words` are its 32-bit words: one instruction an element."""
    if vector.dtype == "bfloat16":
        for e in T.unroll(VECTOR // 2):
            values[at + 2 * e] = low_half(words[e])
            values[at + 2 * e + 1] = high_half(words[e])
    else:
        for e in T.unroll(VECTOR):
            values[at + e] = T.cast(vector[e], T.float32)


@T.macro
def load_phi(phi_tile, phi, first_stream, first_channel, thread, tile: WarpTile):
    """The halves of phi's rows, read along the channels, written in the order that lanes read them in."""
    n, rows, channels, blocks = tile.num_streams, tile.rows, tile.channels, tile.blocks
    hidden_size = phi.shape[2]
    steps = channels * n * tile.row_pairs // tile.threads
    at_once = max(number for number in range(1, ROW_PAIRS_AT_ONCE + 1) if steps % number == 0)
    fetched = T.alloc_local((2 * at_once,), T.float32)
    high, low = T.alloc_local((2,), T.bfloat16), T.alloc_local((2,), T.bfloat16)
    for step in T.serial(steps // at_once):
        for r in T.unroll(at_once):
            for e in T.unroll(2):
                at = (step * at_once + r) * tile.threads + thread
                m = (at // (4 * channels * n) * 4 + at % 4) * 2 + e
                c = first_channel + at // 4 % channels
                fetched[r * 2 + e] = T.if_then_else(
                    T.And(m < rows, c < hidden_size),
                    phi[T.min(m, rows - 1), first_stream + at // (4 * channels) % n, T.min(c, hidden_size - 1)],
                    0.0,
                )
        for r in T.unroll(at_once):
            at = (step * at_once + r) * tile.threads + thread
            block, c = at // (4 * channels * n), at // 4 % channels
            q = c % WARP_CHANNELS // VECTOR
            slot = T.bitwise_xor(q % n, at // (4 * channels) % n)
            row = ((c // WARP_CHANNELS * n + slot) * 2 + c % VECTOR // 4) * WARP + (q * 2 + c % 2) * 4 + at % 4
            place = c // 2 % 2 * 2 * blocks + block + block // 2 * 2
            to_low = 2 - (T.if_then_else(block == blocks - 1, 1, 0) if blocks % 2 else 0)
            split_pair(high, low, fetched, r * 2)
            for e in T.vectorized(2):
                phi_tile[row, place * 2 + e] = high[e]
            for e in T.vectorized(2):
                phi_tile[row, (place + to_low) * 2 + e] = low[e]


@T.macro
def copy_dots(dots_words, g_projected, first_token, stage, thread, tile: WarpTile):
    """Start to copy the g_dots that this thread splits, two rows of a token each, to where the pair's high and low
    halves will be; zeros beyond the last token.
    """
    num_tokens = g_projected.shape[1]
    token = first_token + thread % tile.tokens
    for r in T.unroll(tile.pairs_per_thread):
        pair = (r * tile.threads + thread) // tile.tokens
        row = (stage * tile.tokens + thread % tile.tokens) * tile.dots_vectors + pair // 4
        for e in T.unroll(2):
            inside = T.And(pair * 2 + e < tile.rows, token < num_tokens)
            copy_inside(
                dots_words[row + e * tile.blocks, pair % 4],
                g_projected[T.min(pair * 2 + e, tile.rows), token],
                inside,
                1,
            )


@T.macro
def split_dots(dots, dots_words, stage, thread, tile: WarpTile):
    """The halves of the g_dots that this thread copied, in their place."""
    values = T.alloc_local((2,), T.float32)
    high, low = T.alloc_local((2,), T.bfloat16), T.alloc_local((2,), T.bfloat16)
    for r in T.unroll(tile.pairs_per_thread):
        pair = (r * tile.threads + thread) // tile.tokens
        row = (stage * tile.tokens + thread % tile.tokens) * tile.dots_vectors + pair // 4
        for e in T.unroll(2):
            values[e] = dots_words[row + e * tile.blocks, pair % 4]
        split_pair(high, low, values, 0)
        for e in T.vectorized(2):
            dots[row, pair % 4 * 2 + e] = high[e]
        for e in T.vectorized(2):
            dots[row + tile.blocks, pair % 4 * 2 + e] = low[e]


@T.macro
def clear_padding(dots, thread, tile: WarpTile):
    """Each token's vector of zeros."""
    for r in T.unroll(-(-tile.stages * tile.tokens // tile.threads)):
        if r * tile.threads + thread < tile.stages * tile.tokens:
            for e in T.vectorized(VECTOR):
                dots[(r * tile.threads + thread) * tile.dots_vectors + 2 * tile.blocks, e] = T.cast(0.0, T.bfloat16)


@T.macro
def load_dots(halves, dots, stage, warp, lane, tile: WarpTile):
    """The halves of the g_dots of the warp's tokens, pair by pair of vectors, as an operand."""
    row = T.alloc_var(T.int32)
    row = (stage * tile.tokens + warp // tile.groups * WARP_TOKENS + lane % 16) * tile.dots_vectors
    for k, (even, odd, _) in enumerate(tile.products):
        load_matrices(False, dots[row + T.if_then_else(lane < 16, even, odd), 0], halves[k * VECTOR])


@T.macro
def add_products(sums, at, slot, halves, phi_halves, phi_tile, warp, lane, tile: WarpTile):
    """sums[at : at + 16] += g_dots · phi, of the warp's tokens and channels of a slot."""
    row = T.alloc_var(T.int32)
    row = warp % tile.groups * tile.num_streams * 2 * WARP + lane
    for pair in T.unroll(2):
        for v in T.unroll(tile.blocks):
            for e in T.vectorized(VECTOR):
                phi_halves[v * VECTOR + e] = phi_tile[row + (slot * 2 + pair) * WARP, v * VECTOR + e]
        for column in T.unroll(2):
            for k, (_, _, places) in enumerate(tile.products):
                for place in places:
                    mma(
                        *(halves, k * VECTOR, phi_halves, column * 4 * tile.blocks + place * 2),
                        *(sums, at + pair * 8 + column * 4),
                    )


@T.macro
def add_g_phi(g_phi, dots, x_tile, stage, warp, lane, tile: WarpTile):
    """g_phi += x · g_dots, channels by rows of phi, over the block's tokens; a warp has some channels of one stream."""
    n, blocks, vectors = tile.num_streams, tile.blocks, tile.vectors
    of_tokens = T.alloc_local((blocks * VECTOR,), T.bfloat16)
    x_frag = T.alloc_local((VECTOR,), x_tile.dtype)
    high, low = T.alloc_local((VECTOR,), T.bfloat16), T.alloc_local((VECTOR,), T.bfloat16)
    high_pair, low_pair = T.alloc_local((2,), T.bfloat16), T.alloc_local((2,), T.bfloat16)
    values = T.alloc_local((VECTOR,), T.float32)
    at, row = T.alloc_var(T.int32), T.alloc_var(T.int32)
    first_vector = warp // n * 2 * tile.g_phi_tiles + lane // 8 % 2
    at = ((lane % 8 + lane // 16 * 8) * n + warp % n) * vectors + T.bitwise_xor(first_vector, swizzle(lane % 8))
    row = (stage * tile.tokens + lane % 16) * tile.dots_vectors + lane // 16
    for k in T.unroll(tile.tokens // 16):
        for c in T.unroll(blocks):
            load_matrices(True, dots[row + k * 16 * tile.dots_vectors + c * 2, 0], of_tokens[c * VECTOR])
        for m in T.unroll(tile.g_phi_tiles):
            place = T.bitwise_xor(at, m * 2) + (stage * tile.tokens + k * 16) * n * vectors
            load_matrices(True, x_tile[place, 0], x_frag[0])
            if x_tile.dtype == "bfloat16":
                for c in T.unroll(blocks):
                    mma(x_frag, 0, of_tokens, c * 4, g_phi, (m * blocks + c) * 4)
                    mma(x_frag, 0, of_tokens, (blocks + c) * 4, g_phi, (m * blocks + c) * 4)
            else:  # 11 bits: two bfloat16
                for e in T.unroll(VECTOR):
                    values[e] = T.cast(x_frag[e], T.float32)
                for e in T.unroll(VECTOR // 2):
                    split_pair(high_pair, low_pair, values, 2 * e)
                    for w in T.vectorized(2):
                        high[2 * e + w] = high_pair[w]
                    for w in T.vectorized(2):
                        low[2 * e + w] = low_pair[w]
                for c in T.unroll(blocks):
                    mma(high, 0, of_tokens, c * 4, g_phi, (m * blocks + c) * 4)
                    mma(high, 0, of_tokens, (blocks + c) * 4, g_phi, (m * blocks + c) * 4)
                    mma(low, 0, of_tokens, c * 4, g_phi, (m * blocks + c) * 4)


@T.macro
def store_g_phi(partial_phi, g_phi, token_range, first_stream, first_channel, warp, lane, tile: WarpTile):
    """The block's partial sum of g_phi."""
    for m in T.unroll(tile.g_phi_tiles):
        for c in T.unroll(tile.blocks):
            for e in T.unroll(4):
                to = first_channel + (warp // tile.num_streams * tile.g_phi_tiles + m) * 16 + lane // 4 + e // 2 * 8
                row = c * 8 + 2 * (lane % 4) + e % 2
                if T.And(row < tile.rows, to < partial_phi.shape[3]):
                    at = (m * tile.blocks + c) * 4 + e
                    partial_phi[token_range, row, first_stream + warp % tile.num_streams, to] = g_phi[at]
