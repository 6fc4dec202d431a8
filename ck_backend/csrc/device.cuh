// What the auxiliary kernels share: numbers and vectors of every type, launches, the choice of a type.
#pragma once

#include "auxiliary.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace flash_ck {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x)
{
    return x;
}
template <>
__device__ inline __half from_float<__half>(float x)
{
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x)
{
    return __float2bfloat16(x);
}

// Neighbours that one instruction moves.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
    T x[N];
};

template <int N, typename T>
__device__ inline Vector<T, N> load(const T* from)
{
    return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <int N, typename T>
__device__ inline void store(T* to, const Vector<T, N>& value)
{
    *reinterpret_cast<Vector<T, N>*>(to) = value;
}

// Row of a matrix, of type T or const T.
template <typename T>
__device__ inline T* row_of(const Matrix& x, std::int64_t batch, std::int64_t row, std::int64_t head)
{
    return static_cast<T*>(x.data) + batch * x.batch + row * x.row + head * x.head;
}

// First row of a sequence (0 where rows are counted from its batch entry), and how many there are.
struct Span {
    int start, length;
};

__device__ inline Span span_of(const std::int32_t* cu_seqlens, int batch, int length)
{
    if(cu_seqlens == nullptr)
        return {0, length};
    return {cu_seqlens[batch], cu_seqlens[batch + 1] - cu_seqlens[batch]};
}

// Batch entry whose memory a sequence is in: packed sequences are in one.
__device__ inline int entry_of(const std::int32_t* cu_seqlens, int batch) { return cu_seqlens == nullptr ? batch : 0; }

__device__ inline void report(std::int32_t* errors, ErrorSlot slot, bool is_bad, int batch)
{
    if(errors != nullptr && is_bad)
        atomicMax(errors + slot, batch + 1);
}

// AMD counts the threads of a grid dimension with 32 bits, NVIDIA the blocks of all but the first with 16.
constexpr std::int64_t kMaxBlocksX = 1 << 22;
constexpr std::int64_t kMaxBlocks  = 0x7fffffff;

__device__ inline unsigned block_number() { return blockIdx.y * gridDim.x + blockIdx.x; }

inline dim3 grid_of(std::int64_t blocks)
{
    const std::int64_t x = blocks < kMaxBlocksX ? blocks : kMaxBlocksX;
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>((blocks + x - 1) / x));
}

inline std::int64_t ceil_div(std::int64_t x, std::int64_t y) { return (x + y - 1) / y; }

inline Status launched() { return launch_status(static_cast<int>(cudaGetLastError())); }

// Whether rows can be read N elements of `bytes` bytes at a time.
inline bool is_aligned(const void* data, std::initializer_list<std::int64_t> strides, int n, int bytes)
{
    bool aligned = reinterpret_cast<std::uintptr_t>(data) % (n * bytes) == 0;
    for(const std::int64_t stride : strides)
        aligned = aligned && stride % n == 0;
    return aligned;
}

inline bool is_aligned(const Matrix& x, int n, int bytes) { return is_aligned(x.data, {x.batch, x.row, x.head}, n, bytes); }

inline bool all_natural(std::initializer_list<std::int64_t> sizes)
{
    for(const std::int64_t size : sizes)
        if(size < 0 || size > kMaxBlocks)
            return false;
    return true;
}

// Launcher<T>::run(params) for the type that an element names.
template <template <typename> typename Launcher, typename Params>
Status with_type(Element type, const Params& params)
{
    switch(type)
    {
    case Element::float16: return Launcher<__half>::run(params);
    case Element::bfloat16: return Launcher<__nv_bfloat16>::run(params);
    case Element::float32: return Launcher<float>::run(params);
    }
    return Status::wrong_size;
}

} // namespace flash_ck
