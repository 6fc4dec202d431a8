// Auxiliary kernels beside a backward: delta, sums over parts, the mask of dropout.
#include "device.cuh"

namespace flash_ck {

namespace {

constexpr int kDeltaThreads = 128;

// `lanes` threads, a power of 2, share the head dim of a row, N elements at a time.
template <int N, typename T>
__global__ void delta_kernel(DeltaParams p, unsigned rows, int lanes)
{
    __shared__ float sums[kDeltaThreads];
    const unsigned number = block_number() * (kDeltaThreads / lanes) + threadIdx.x / lanes;
    const bool exists     = number < rows;
    const int lane        = static_cast<int>(threadIdx.x) % lanes;
    const std::int64_t head = number % p.nheads, row = number / p.nheads % p.seqlen_q;
    const std::int64_t batch = number / p.nheads / p.seqlen_q;
    float sum = 0.f;
    if(exists)
    {
        const T* out  = row_of<const T>(p.out, batch, row, head);
        const T* dout = row_of<const T>(p.dout, batch, row, head);
        for(int first = lane * N; first < p.headdim_v; first += lanes * N)
        {
            const Vector<T, N> x = load<N>(out + first), y = load<N>(dout + first);
#pragma unroll
            for(int i = 0; i < N; i++)
                sum += to_float(x.x[i]) * to_float(y.x[i]);
        }
    }
    float* const mine = sums + threadIdx.x;
    *mine             = sum;
    for(int half = lanes / 2; half > 0; half /= 2)
    {
        __syncthreads();
        if(lane < half)
            *mine += mine[half];
    }
    if(!exists || lane > 0)
        return;
    float result = *mine;
    if(p.dlse.data != nullptr)
        result -= p.dlse.data[batch * p.dlse.batch + head * p.dlse.head + row];
    p.delta.data[batch * p.delta.batch + head * p.delta.head + row] = result;
}

template <int N, typename T>
Status launch_delta(const DeltaParams& p)
{
    int lanes = 1;
    while(lanes < 32 && lanes * N < p.headdim_v)
        lanes *= 2;
    const std::int64_t rows = static_cast<std::int64_t>(p.batch) * p.seqlen_q * p.nheads;
    if(rows > kMaxBlocks)
        return Status::wrong_size;
    const dim3 grid = grid_of(ceil_div(rows, kDeltaThreads / lanes));
    delta_kernel<N, T><<<grid, kDeltaThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
        p, static_cast<unsigned>(rows), lanes);
    return launched();
}

template <typename T>
struct Delta {
    static Status run(const DeltaParams& p)
    {
        constexpr int kWide = 16 / sizeof(T);
        const bool wide =
            p.headdim_v % kWide == 0 && is_aligned(p.out, kWide, sizeof(T)) && is_aligned(p.dout, kWide, sizeof(T));
        return wide ? launch_delta<kWide, T>(p) : launch_delta<1, T>(p);
    }
};

constexpr int kReduceThreads = 256;

// N elements for each thread: of a row all heads.
template <int N, typename From, typename To>
__global__ void reduce_kernel(ReduceParams p, unsigned blocks, unsigned blocks_per_row)
{
    const unsigned block = block_number();
    if(block >= blocks)
        return;
    const int vectors  = p.headdim / N;
    const int number   = static_cast<int>(block % blocks_per_row) * kReduceThreads + static_cast<int>(threadIdx.x);
    const unsigned row = block / blocks_per_row;
    const int head = number / vectors, first = number % vectors * N;
    if(head >= p.nheads)
        return;
    const From* in = row_of<const From>(p.in, row / p.seqlen, row % p.seqlen, head) + first;
    float sum[N]   = {};
    for(int part = 0; part < p.parts; part++)
    {
        const Vector<From, N> x = load<N>(in + part * p.part);
#pragma unroll
        for(int i = 0; i < N; i++)
            sum[i] += to_float(x.x[i]);
    }
    Vector<To, N> result;
#pragma unroll
    for(int i = 0; i < N; i++)
        result.x[i] = from_float<To>(sum[i]);
    store(row_of<To>(p.out, row / p.seqlen, row % p.seqlen, head) + first, result);
}

template <int N, typename From, typename To>
Status launch_reduce(const ReduceParams& p)
{
    const std::int64_t vectors = static_cast<std::int64_t>(p.nheads) * (p.headdim / N);
    const std::int64_t per_row = ceil_div(vectors, kReduceThreads);
    const std::int64_t blocks  = static_cast<std::int64_t>(p.batch) * p.seqlen * per_row;
    if(vectors > kMaxBlocks || blocks > kMaxBlocks)
        return Status::wrong_size;
    reduce_kernel<N, From, To><<<grid_of(blocks), kReduceThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
        p, static_cast<unsigned>(blocks), static_cast<unsigned>(per_row));
    return launched();
}

template <typename From, typename To>
Status reduce_from(const ReduceParams& p)
{
    constexpr int kWide = 16 / (sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));
    const bool wide     = p.headdim % kWide == 0 && p.part % kWide == 0 && is_aligned(p.in, kWide, sizeof(From)) &&
                      is_aligned(p.out, kWide, sizeof(To));
    return wide ? launch_reduce<kWide, From, To>(p) : launch_reduce<1, From, To>(p);
}

// float32 to any type, or 16 bits to the same.
template <typename To>
struct Reduce {
    static Status run(const ReduceParams& p)
    {
        if(p.from == Element::float32)
            return reduce_from<float, To>(p);
        return p.from == p.to ? reduce_from<To, To>(p) : Status::wrong_size;
    }
};

constexpr int kMaskThreads = 256;

// First word of Philox-4x32-10.
__device__ unsigned philox(uint4 counter, uint2 key)
{
#pragma unroll
    for(int round = 0; round < 10; round++)
    {
        const unsigned low0 = 0xd2511f53u * counter.x, high0 = __umulhi(0xd2511f53u, counter.x);
        const unsigned low1 = 0xcd9e8d57u * counter.z, high1 = __umulhi(0xcd9e8d57u, counter.z);
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key     = make_uint2(key.x + 0x9e3779b9u, key.y + 0xbb67ae85u);
    }
    return counter.x;
}

// One element for each thread.
__global__ void dropout_mask_kernel(DropoutMaskParams p, unsigned blocks, unsigned blocks_per_row)
{
    const unsigned block = block_number();
    if(block >= blocks)
        return;
    const unsigned row_number = block / blocks_per_row;
    const unsigned column     = block % blocks_per_row * kMaskThreads + threadIdx.x;
    if(column >= static_cast<unsigned>(p.seqlen_k))
        return;
    const unsigned row = row_number % p.seqlen_q, batch_head = row_number / p.seqlen_q;
    const std::uint64_t seed = p.rng_state[0];
    const uint4 counter      = make_uint4(column, row, batch_head, static_cast<unsigned>(p.rng_state[1]));
    const uint2 key          = make_uint2(static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32));
    const bool keep          = static_cast<int>(philox(counter, key) >> 1) >= p.threshold;
    p.mask[static_cast<std::int64_t>(row_number) * p.seqlen_k + column] = keep;
}

} // namespace

Status delta(const DeltaParams& p)
{
    if(!all_natural({p.batch, p.seqlen_q, p.nheads, p.headdim_v}))
        return Status::wrong_size;
    if(p.batch == 0 || p.seqlen_q == 0 || p.nheads == 0)
        return Status::ok;
    return with_type<Delta>(p.type, p);
}

Status reduce(const ReduceParams& p)
{
    if(!all_natural({p.parts, p.batch, p.seqlen, p.nheads, p.headdim}))
        return Status::wrong_size;
    if(p.batch == 0 || p.seqlen == 0 || p.nheads == 0 || p.headdim == 0)
        return Status::ok;
    return with_type<Reduce>(p.to, p);
}

Status dropout_mask(const DropoutMaskParams& p)
{
    if(!all_natural({p.batch, p.nheads, p.seqlen_q, p.seqlen_k, p.threshold}))
        return Status::wrong_size;
    const std::int64_t per_row = ceil_div(p.seqlen_k, kMaskThreads);
    const std::int64_t blocks  = static_cast<std::int64_t>(p.batch) * p.nheads * p.seqlen_q * per_row;
    if(blocks > kMaxBlocks)
        return Status::wrong_size;
    if(blocks == 0)
        return Status::ok;
    if(p.rng_state == nullptr)
        return Status::missing_tensor;
    dropout_mask_kernel<<<grid_of(blocks), kMaskThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
        p, static_cast<unsigned>(blocks), static_cast<unsigned>(per_row));
    return launched();
}

} // namespace flash_ck
