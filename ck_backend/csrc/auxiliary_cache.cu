// Auxiliary kernels over a K/V cache: the append of new tokens, queries turned, the combination of parts.
#include "device.cuh"

namespace flash_ck {

namespace {

// Elements [first, first + N) of a row, turned to the angles of a position.  N > 1 takes even vectors, and halves that
// they divide where elements i and i + half turn together.
template <int N, typename T>
__device__ Vector<T, N> turned(const T* row, int first, const Rotary& rotary, int position)
{
    const Vector<T, N> x = load<N>(row + first);
    if(rotary.cos == nullptr || first >= 2 * rotary.half || position < 0 || position >= rotary.rows)
        return x;
    const T* cos        = static_cast<const T*>(rotary.cos) + position * rotary.row;
    const T* sin        = static_cast<const T*>(rotary.sin) + position * rotary.row;
    const bool is_first = first < rotary.half;
    Vector<T, N> partner; // of NeoX's pairs, and of single elements
    if(!rotary.interleaved)
        partner = load<N>(row + (is_first ? first + rotary.half : first - rotary.half));
    else if(N == 1)
        partner = load<N>(row + (first ^ 1));
    Vector<T, N> result = x;
#pragma unroll
    for(int i = 0; i < N; i++)
    {
        const int element = first + i;
        if(element >= 2 * rotary.half)
            break;
        const int angle   = rotary.interleaved ? element / 2 : (is_first ? element : element - rotary.half);
        const bool leads  = rotary.interleaved ? element % 2 == 0 : is_first;
        const float other = to_float(rotary.interleaved && N > 1 ? x.x[i ^ (N > 1)] : partner.x[i]);
        const float c = to_float(cos[angle]), s = to_float(sin[angle]);
        // In so many words, for compilers choose differently what they contract.
        result.x[i] = from_float<T>(fmaf(to_float(x.x[i]), c, (leads ? -other : other) * s));
    }
    return result;
}

// Whether vectors of N can be turned.
bool can_turn(const Rotary& rotary, int n)
{
    return rotary.cos == nullptr || n == 1 || rotary.interleaved || rotary.half % n == 0;
}

bool is_complete(const Rotary& rotary, int headdim)
{
    return rotary.cos == nullptr || (rotary.sin != nullptr && rotary.half > 0 && 2 * rotary.half <= headdim && rotary.rows >= 0);
}

// A length that says what is wrong with it, within its range.
__device__ int checked_length(int length, int capacity, int batch, std::int32_t* errors)
{
    report(errors, kBadLength, length < 0 || length > capacity, batch);
    return min(max(length, 0), capacity);
}

constexpr int kAppendThreads = 256;

// One vector of N elements for each thread: of a token the keys of all heads, then the values.
template <int N, typename T>
__global__ void append_kernel(AppendParams p, unsigned blocks, unsigned blocks_per_token)
{
    const unsigned block = block_number();
    if(block >= blocks)
        return;
    const int vectors_k = p.headdim / N, vectors_v = p.headdim_v / N;
    const unsigned token_number = block / blocks_per_token;
    const int batch = static_cast<int>(token_number / p.seqlen_new);
    const int token = static_cast<int>(token_number % p.seqlen_new);
    const Span span = span_of(p.cu_seqlens_new, batch, p.seqlen_new);
    if(token >= span.length)
        return;
    const int given = p.cache_seqlens[batch];
    int cached      = checked_length(given, p.capacity, batch, p.errors);
    // A negative length is no place: nothing is written, where clamped it would be over the first tokens.
    if(given < 0)
        cached = p.capacity;
    const int first_position = p.rotary.seqlens != nullptr ? p.rotary.seqlens[batch] : cached;
    if(p.errors != nullptr)
    {
        report(p.errors, kBadLength, cached + span.length > p.capacity, batch);
        const bool is_bad = first_position < 0 || first_position > p.rotary.rows - span.length;
        report(p.errors, kBadPosition, p.rotary.cos != nullptr && is_bad, batch);
    }
    const int position = cached + token;
    if(position >= p.capacity)
        return;
    int entry = batch, slot = position;
    if(p.page_size > 0)
    {
        entry = p.block_table[batch * p.block_table_row + position / p.page_size];
        slot  = position % p.page_size;
    }
    else if(p.batch_idx != nullptr)
        entry = p.batch_idx[batch];
    if(p.errors != nullptr && (entry < 0 || entry >= p.entries))
    {
        report(p.errors, p.page_size > 0 ? kBadPage : kBadEntry, true, batch);
        return;
    }
    const int from_entry = entry_of(p.cu_seqlens_new, batch);
    const int from_row   = span.start + token;
    int number           = static_cast<int>(block % blocks_per_token) * kAppendThreads + static_cast<int>(threadIdx.x);
    if(number < p.nheads_k * vectors_k)
    {
        const int head = number / vectors_k, first = number % vectors_k * N;
        const T* row = row_of<const T>(p.k_new, from_entry, from_row, head);
        store(row_of<T>(p.k, entry, slot, head) + first, turned<N>(row, first, p.rotary, first_position + token));
        return;
    }
    number -= p.nheads_k * vectors_k;
    if(number < p.nheads_k * vectors_v)
    {
        const int head = number / vectors_v, first = number % vectors_v * N;
        const T* row = row_of<const T>(p.v_new, from_entry, from_row, head);
        store(row_of<T>(p.v, entry, slot, head) + first, load<N>(row + first));
    }
}

template <int N, typename T>
Status launch_append(const AppendParams& p)
{
    const std::int64_t vectors   = static_cast<std::int64_t>(p.nheads_k) * (p.headdim / N + p.headdim_v / N);
    const std::int64_t per_token = ceil_div(vectors, kAppendThreads);
    const std::int64_t blocks    = static_cast<std::int64_t>(p.batch) * p.seqlen_new * per_token;
    if(vectors > kMaxBlocks || blocks > kMaxBlocks)
        return Status::wrong_size;
    append_kernel<N, T><<<grid_of(blocks), kAppendThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
        p, static_cast<unsigned>(blocks), static_cast<unsigned>(per_token));
    return launched();
}

template <typename T>
struct Append {
    static Status run(const AppendParams& p)
    {
        constexpr int kWide = 16 / sizeof(T);
        bool wide           = p.headdim % kWide == 0 && p.headdim_v % kWide == 0 && can_turn(p.rotary, kWide);
        for(const Matrix* x : {&p.k_new, &p.v_new, &p.k, &p.v})
            wide = wide && is_aligned(*x, kWide, sizeof(T));
        return wide ? launch_append<kWide, T>(p) : launch_append<1, T>(p);
    }
};

constexpr int kRotateThreads = 256;

// One vector of N elements for each thread: of a row all heads.
template <int N, typename T>
__global__ void rotate_kernel(RotateParams p, unsigned blocks, unsigned blocks_per_row)
{
    const unsigned block = block_number();
    if(block >= blocks)
        return;
    const int vectors = p.headdim / N;
    const unsigned row_number = block / blocks_per_row;
    const int batch = static_cast<int>(row_number / p.seqlen_q);
    const int row   = static_cast<int>(row_number % p.seqlen_q);
    Span span = span_of(p.cu_seqlens_q, batch, p.seqlen_q);
    if(p.seqused_q != nullptr)
        span.length = min(span.length, p.seqused_q[batch]);
    if(row >= span.length)
        return;
    int first_position = checked_length(p.cache_seqlens[batch], p.capacity, batch, p.errors);
    if(p.rotary.seqlens != nullptr)
        first_position = p.rotary.seqlens[batch];
    const int last = p.rotary.rows - (p.moves ? span.length : 1);
    report(p.errors, kBadPosition, first_position < 0 || first_position > last, batch);
    const int number = static_cast<int>(block % blocks_per_row) * kRotateThreads + static_cast<int>(threadIdx.x);
    if(number >= p.nheads * vectors)
        return;
    const int head = number / vectors, first = number % vectors * N;
    const int entry = entry_of(p.cu_seqlens_q, batch);
    const T* from   = row_of<const T>(p.q, entry, span.start + row, head);
    T* to           = row_of<T>(p.out, entry, span.start + row, head);
    store(to + first, turned<N>(from, first, p.rotary, first_position + (p.moves ? row : 0)));
}

template <int N, typename T>
Status launch_rotate(const RotateParams& p)
{
    const std::int64_t vectors = static_cast<std::int64_t>(p.nheads) * (p.headdim / N);
    const std::int64_t per_row = ceil_div(vectors, kRotateThreads);
    const std::int64_t blocks  = static_cast<std::int64_t>(p.batch) * p.seqlen_q * per_row;
    if(vectors > kMaxBlocks || blocks > kMaxBlocks)
        return Status::wrong_size;
    rotate_kernel<N, T><<<grid_of(blocks), kRotateThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
        p, static_cast<unsigned>(blocks), static_cast<unsigned>(per_row));
    return launched();
}

template <typename T>
struct Rotate {
    static Status run(const RotateParams& p)
    {
        constexpr int kWide = 16 / sizeof(T);
        const bool wide     = p.headdim % kWide == 0 && can_turn(p.rotary, kWide) && is_aligned(p.q, kWide, sizeof(T)) &&
                          is_aligned(p.out, kWide, sizeof(T));
        return wide ? launch_rotate<kWide, T>(p) : launch_rotate<1, T>(p);
    }
};

constexpr int kCombineThreads = 128;

// One row for each block.  A group of `lanes` threads shares its head dim, N elements each; the groups share the parts,
// each with a largest LSE of its own, and the first group adds the others' sums up in their order.
template <int N, typename T>
__global__ void combine_kernel(CombineParams p, unsigned blocks, int lanes)
{
    __shared__ float sums[kCombineThreads * N];
    __shared__ float largest[kCombineThreads], totals[kCombineThreads];
    const unsigned block = block_number();
    if(block >= blocks)
        return;
    const std::int64_t head  = block % p.nheads;
    const std::int64_t row   = block / p.nheads % p.seqlen_q;
    const std::int64_t batch = block / p.nheads / p.seqlen_q;
    const float* lses = p.lse_partial + batch * p.lse_partial_batch + row * p.lse_partial_row + head * p.lse_partial_head;
    const float* outs = p.out_partial + batch * p.out_partial_batch + row * p.out_partial_row + head * p.out_partial_head;
    const int thread = static_cast<int>(threadIdx.x);
    const int groups = kCombineThreads / lanes, group = thread / lanes, lane = thread % lanes;

    float highest = -INFINITY;
    for(int split = group; split < p.splits; split += groups)
        highest = fmaxf(highest, lses[split * p.lse_partial_split]);
    const float base = highest == -INFINITY ? 0.f : highest;

    for(int start = 0; start < p.headdim_v; start += lanes * N)
    {
        const int first = start + lane * N;
        float total = 0.f, sum[N] = {};
#pragma unroll 4
        for(int split = group; split < p.splits; split += groups)
        {
            const float weight = expf(lses[split * p.lse_partial_split] - base);
            total += weight;
            if(weight > 0.f && first < p.headdim_v)
            {
                const Vector<float, N> part = load<N>(outs + split * p.out_partial_split + first);
#pragma unroll
                for(int i = 0; i < N; i++)
                    sum[i] += part.x[i] * weight;
            }
        }
        if(start > 0)
            __syncthreads(); // the sums of the elements before have been read
#pragma unroll
        for(int i = 0; i < N; i++)
            sums[thread * N + i] = sum[i];
        if(lane == 0)
        {
            largest[group] = highest;
            totals[group]  = total;
        }
        __syncthreads();
        if(group > 0)
            continue;
        float all_highest = -INFINITY;
        for(int other = 0; other < groups; other++)
            all_highest = fmaxf(all_highest, largest[other]);
        const float all_base = all_highest == -INFINITY ? 0.f : all_highest;
        total                = 0.f;
#pragma unroll
        for(int i = 0; i < N; i++)
            sum[i] = 0.f;
        for(int other = 0; other < groups; other++)
        {
            const float weight = expf(largest[other] - all_base);
            total += totals[other] * weight;
#pragma unroll
            for(int i = 0; i < N; i++)
                sum[i] += sums[(other * lanes + lane) * N + i] * weight;
        }
        if(first < p.headdim_v)
        {
            Vector<T, N> result;
#pragma unroll
            for(int i = 0; i < N; i++)
                result.x[i] = from_float<T>(sum[i] / (total == 0.f ? 1.f : total));
            store(row_of<T>(p.out, batch, row, head) + first, result);
        }
        if(first == 0)
            p.lse[batch * p.lse_batch + row * p.lse_row + head * p.lse_head] = all_base + logf(total);
    }
}

template <int N, typename T>
Status launch_combine(const CombineParams& p)
{
    const std::int64_t blocks = static_cast<std::int64_t>(p.batch) * p.seqlen_q * p.nheads;
    if(blocks > kMaxBlocks)
        return Status::wrong_size;
    int lanes = 1;
    while(lanes < kCombineThreads && lanes * N < p.headdim_v)
        lanes *= 2;
    combine_kernel<N, T><<<grid_of(blocks), kCombineThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
        p, static_cast<unsigned>(blocks), lanes);
    return launched();
}

template <typename T>
struct Combine {
    static Status run(const CombineParams& p)
    {
        constexpr int kWide = 4; // float32 parts, 16 bytes
        const bool wide =
            p.headdim_v % kWide == 0 && is_aligned(p.out, kWide, sizeof(T)) &&
            is_aligned(p.out_partial, {p.out_partial_split, p.out_partial_batch, p.out_partial_row, p.out_partial_head},
                       kWide, sizeof(float));
        return wide ? launch_combine<kWide, T>(p) : launch_combine<1, T>(p);
    }
};

} // namespace

Status append(const AppendParams& p)
{
    if(!all_natural({p.batch, p.seqlen_new, p.nheads_k, p.headdim, p.headdim_v, p.entries, p.capacity, p.page_size}) ||
       !is_complete(p.rotary, p.headdim))
        return Status::wrong_size;
    if(p.batch == 0 || p.seqlen_new == 0 || p.nheads_k == 0 || p.headdim + p.headdim_v == 0)
        return Status::ok;
    if(p.cache_seqlens == nullptr || (p.page_size > 0 && p.block_table == nullptr))
        return Status::missing_tensor;
    return with_type<Append>(p.type, p);
}

Status rotate(const RotateParams& p)
{
    if(!all_natural({p.batch, p.seqlen_q, p.nheads, p.headdim, p.capacity}) || !is_complete(p.rotary, p.headdim))
        return Status::wrong_size;
    if(p.batch == 0 || p.seqlen_q == 0 || p.nheads == 0 || p.headdim == 0)
        return Status::ok;
    if(p.cache_seqlens == nullptr || p.rotary.cos == nullptr)
        return Status::missing_tensor;
    return with_type<Rotate>(p.type, p);
}

Status combine(const CombineParams& p)
{
    if(!all_natural({p.batch, p.seqlen_q, p.nheads, p.headdim_v}) || p.splits < 1 || p.splits > kMaxSplits)
        return Status::wrong_size;
    if(p.batch == 0 || p.seqlen_q == 0 || p.nheads == 0 || p.headdim_v == 0)
        return Status::ok;
    return with_type<Combine>(p.type, p);
}

} // namespace flash_ck
