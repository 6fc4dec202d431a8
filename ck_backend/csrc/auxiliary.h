// The auxiliary kernels, torch-free: what attention needs beside its own kernels, written once in CUDA's dialect
// (auxiliary_*.cu), compiled by nvcc as it is, and for ROCm as what torch's hipify makes of it.
//
// Each function checks what it gets, launches one kernel on the stream, and does not wait.  Every pointer is to device
// memory, every stride in elements; the last dim of a matrix has stride 1.  Tensors may not overlap unless it is said.
// A call with nothing to do launches nothing and is Status::ok.
#pragma once

#include "flash_ck.h"

namespace flash_ck {

enum class Element : int { float16 = 0, bfloat16, float32 };

constexpr int kMaxSplits = 256;

// Results over disjoint sets of keys, each normalised over its own ("Flash-Decoding", Dao, Haziza, Massa and Sizov 2023).
// Attention sinks count in one of the parts.  Packed sequences are one batch.
struct CombineParams {
    Element type     = Element::float32; // of out
    int splits       = 0;                // 1 to kMaxSplits
    int batch        = 0;
    int seqlen_q     = 0;
    int nheads       = 0;
    int headdim_v    = 0;
    const float* out_partial       = nullptr; // not read where lse_partial is -inf
    std::int64_t out_partial_split = 0, out_partial_batch = 0, out_partial_row = 0, out_partial_head = 0;
    const float* lse_partial       = nullptr; // natural logarithm; -inf: the part saw no key
    std::int64_t lse_partial_split = 0, lse_partial_batch = 0, lse_partial_row = 0, lse_partial_head = 0;
    Matrix out; // 0 where no part saw a key
    float* lse             = nullptr; // -inf there
    std::int64_t lse_batch = 0, lse_row = 0, lse_head = 0;
    void* stream           = nullptr;
};

// out and lse of all parts.
Status combine(const CombineParams& params);

// Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the first 2 * half elements of each head.
struct Rotary {
    const void* cos  = nullptr; // (rows, half) of the tokens' type; nullptr: no rotary embedding
    const void* sin  = nullptr; // of the same strides
    std::int64_t row = 0;       // stride
    int rows         = 0;       // a token at a position outside of them is not turned
    int half         = 0;
    bool interleaved = false; // elements (2i, 2i + 1) turn together, else (i, i + half)
    const std::int32_t* seqlens = nullptr; // (batch), position of the first token; nullptr: cache_seqlens
};

// Slots of an error buffer (kErrorSlots int32, zeroed by the caller): the highest number of a bad sequence + 1.  Without a
// buffer nothing is checked.
enum ErrorSlot : int { kBadPage = 0, kBadLength, kBadEntry, kBadPosition, kErrorSlots };

// New tokens behind what a cache holds, keys turned.  Token t of sequence b goes to position cache_seqlens[b] + t, which
// counts left padding in: row `position` of an entry, or slot position % page_size of page block_table[b][position /
// page_size].  What does not fit is not written, nor is anything of a sequence with a negative length.
struct AppendParams {
    Element type   = Element::float16; // of all matrices, cos and sin
    int batch      = 0;
    int seqlen_new = 0; // varlen: the longest
    int nheads_k   = 0;
    int headdim    = 0;
    int headdim_v  = 0;
    int entries    = 0; // of the cache, or pages
    int capacity   = 0; // tokens that a sequence can have
    int page_size  = 0; // any; 0: the cache has no pages
    Matrix k_new, v_new;
    Matrix k, v; // the caches; batch: stride between entries or pages
    const std::int32_t* cu_seqlens_new = nullptr; // (batch + 1) or nullptr: dense
    const std::int32_t* cache_seqlens  = nullptr; // (batch), before the append; needed
    const std::int32_t* batch_idx      = nullptr; // (batch), entry of each sequence; nullptr: 0, 1, 2, ...
    const std::int32_t* block_table    = nullptr; // (batch, max_pages), with pages only
    std::int64_t block_table_row       = 0;
    Rotary rotary;
    std::int32_t* errors = nullptr;
    void* stream         = nullptr;
};

Status append(const AppendParams& params);

// Queries turned, into a buffer.  Query i of sequence b is at position first + i under a mask, at first without one.
struct RotateParams {
    Element type = Element::float16;
    int batch    = 0;
    int seqlen_q = 0; // varlen: the longest
    int nheads   = 0;
    int headdim  = 0;
    int capacity = 0; // cache_seqlens are taken as in [0, capacity]
    bool moves   = false; // whether positions grow with i: with a causal mask, a window or attention_chunk
    Matrix q, out;
    const std::int32_t* cu_seqlens_q  = nullptr; // (batch + 1) or nullptr: dense
    const std::int32_t* seqused_q     = nullptr; // (batch) or nullptr; rows behind them are not written
    const std::int32_t* cache_seqlens = nullptr; // (batch), before the append
    Rotary rotary;
    std::int32_t* errors = nullptr;
    void* stream         = nullptr;
};

Status rotate(const RotateParams& params);

// delta = rowsum(dout * out) - dlse of a backward.  Packed sequences are one batch.
struct DeltaParams {
    Element type  = Element::float16; // of out and dout
    int batch     = 0;
    int seqlen_q  = 0;
    int nheads    = 0;
    int headdim_v = 0;
    Matrix out, dout;
    Rows delta;
    Rows dlse; // data may be nullptr
    void* stream = nullptr;
};

Status delta(const DeltaParams& params);

// The sum over parts, in float32 and in their order: dK and dV of the query heads that share a key head, or the parts of
// a deterministic dQ.  Packed sequences are one batch.
struct ReduceParams {
    Element from = Element::float32;
    Element to   = Element::float16;
    int parts    = 1;
    int batch    = 0;
    int seqlen   = 0;
    int nheads   = 0; // of out
    int headdim  = 0;
    Matrix in;                  // of the first part
    std::int64_t part      = 0; // stride between parts
    Matrix out;
    void* stream = nullptr;
};

Status reduce(const ReduceParams& params);

// Which elements dropout keeps: Philox-4x32-10 (Salmon, Moraes, Dror and Shaw 2011) as flash_rocm/reference/philox.py has
// it, counter (column, row, batch * nheads + head, offset), key seed.
struct DropoutMaskParams {
    int batch     = 0;
    int nheads    = 0;
    int seqlen_q  = 0;
    int seqlen_k  = 0;
    int threshold = 0; // kept: 31 random bits >= threshold
    const std::int64_t* rng_state = nullptr; // (2): seed and offset
    std::uint8_t* mask            = nullptr; // (batch, nheads, seqlen_q, seqlen_k), contiguous: 1 kept, 0 dropped
    void* stream                  = nullptr;
};

Status dropout_mask(const DropoutMaskParams& params);

} // namespace flash_ck
