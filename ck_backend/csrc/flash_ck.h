// The torch-free core of the ck back end: plain parameters, the table of compiled instances, status codes.
//
// Every pointer is to device memory, every stride in elements; the head dim of a matrix has stride 1.
#pragma once

#include <cstdint>
#include <string>

namespace flash_ck {

enum class Status : int {
    ok = 0,
    no_instance,
    wrong_kernel,
    wrong_layout,
    wrong_headdim,
    stride_too_large,
    wrong_size, // of an auxiliary kernel
    missing_tensor,
    wrong_table,
    too_many_tables,
    driver_error = 0x10000 // and above: a launch failed, with the driver's number added
};

// What a launch came to, from the number that HIP or CUDA gives; 0 is success.
inline Status launch_status(int error)
{
    return error == 0 ? Status::ok : static_cast<Status>(static_cast<int>(Status::driver_error) + error);
}

// One sentence for each status, without a full stop.
std::string status_text(Status status);

// (batch, seqlen, nheads, headdim); (total, nheads, headdim) has no batch stride.
struct Matrix {
    void* data         = nullptr;
    std::int64_t batch = 0;
    std::int64_t row   = 0;
    std::int64_t head  = 0;
};

// (batch, nheads, seqlen_q) or (nheads, total_q) float32, contiguous rows.
struct Rows {
    float* data        = nullptr;
    std::int64_t batch = 0;
    std::int64_t head  = 0;
};

struct Shape {
    int batch        = 0;
    int seqlen_q     = 0; // varlen: the longest
    int seqlen_k     = 0;
    int nheads       = 0;
    int nheads_k     = 0;
    int headdim      = 0;
    int headdim_v    = 0;
    int window_left  = -1; // -1: unlimited; masks are aligned to the bottom right
    int window_right = -1;
    float scale      = 1.f;
    float softcap    = 0.f; // 0: none
    const std::int32_t* cu_seqlens_q = nullptr; // (batch + 1), varlen only
    const std::int32_t* cu_seqlens_k = nullptr;
    const float* alibi_slopes        = nullptr; // (nheads) or (batch, nheads)
    std::int64_t alibi_batch         = 0;       // its stride, 0 where all of a batch share slopes
    void* stream                     = nullptr;
};

struct ForwardParams {
    Shape shape;
    Matrix q, k, v, out;
    Rows lse; // natural logarithm; -inf for a row that sees no key
};

struct BackwardParams {
    Shape shape;
    Matrix q, k, v, dout;
    Matrix dk, dv; // input dtype, one for each query head: the caller adds those of a group
    Matrix dq_acc; // float32, zeroed by the caller, who adds up its splits and converts it
    std::int64_t dq_acc_split = 0; // stride between the splits of a deterministic sum
    Rows lse, delta;               // delta: of auxiliary.h
};

// Attention over a K/V cache.  Keys lie in pages: position p of sequence b is row p % page_size of page
// block_table[b][p / page_size], whose first row is at k + page * k.batch.  A cache without pages has one page for each
// sequence, and k.batch is the stride of its rows: any row may be the first.
struct SplitKvParams {
    Shape shape; // cu_seqlens_q only; seqlen_k: the longest
    Matrix q, k, v;
    Matrix out; // float32 (nheads, num_splits, total_q, headdim_v), each part normalised over its own keys
    Rows lse;   // float32 (nheads, num_splits, total_q); -inf for a part without keys, whose out is 0
    std::int64_t out_split = 0; // strides between parts
    std::int64_t lse_split = 0;
    const std::int32_t* seqlens_k   = nullptr; // (batch)
    const std::int32_t* block_table = nullptr; // (batch, pages)
    std::int64_t block_table_batch  = 0;
    int page_size  = 0; // a multiple of the keys of a tile
    int num_splits = 1;
};

struct Instance {
    const char* name;
    bool varlen;
    int headdim; // the largest that it takes
    int headdim_v;
    int key_block; // keys of a tile: backward, deterministic, what one split of dq_acc is for; splitkv; else 0
    Status (*forward)(const ForwardParams&);
    Status (*backward)(const BackwardParams&);
    Status (*splitkv)(const SplitKvParams&);
};

// Generated beside the instances, in the order of the manifest.
extern const Instance instances[];
extern const int instance_count;

// Another library with instances of its own (module.cpp), as its entry function gives it.
struct Table {
    std::uint64_t layout;
    int count;
    const Instance* instances;
};

// What both sides of a Table have to agree on.  The first factor changes where a struct does without changing its size.
constexpr std::uint64_t kLayout =
    (((1ull * 4096 + sizeof(Instance)) * 4096 + sizeof(ForwardParams)) * 4096 + sizeof(BackwardParams)) * 4096 +
    sizeof(SplitKvParams);

// Take over the instances of another library, which stays loaded; the first of them gets the number *first.
Status add(const Table& table, int* first);
// The instance of a number; null where there is none.
const Instance* find(int number);

Status forward(int instance, const ForwardParams& params);
Status backward(int instance, const BackwardParams& params);
Status splitkv(int instance, const SplitKvParams& params);
// How many partial dq_acc a backward adds up: 1, or one for each block of keys where the instance is deterministic.
Status dq_splits(int instance, int seqlen_k, int* splits);

} // namespace flash_ck
