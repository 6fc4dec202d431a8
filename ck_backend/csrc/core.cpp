// Checks that stand between a caller and a launch.
#include "flash_ck.h"

#include <atomic>
#include <initializer_list>

namespace flash_ck {

namespace {

constexpr std::int64_t kMaxStride = 0x7fffffff;

bool fits(const Matrix& x) { return x.batch <= kMaxStride && x.row <= kMaxStride && x.head <= kMaxStride; }
bool fits(const Rows& x) { return x.batch <= kMaxStride && x.head <= kMaxStride; }

// Under a causal mask alone, Composable Kernel adds slope * column for ALiBi: the same output, but an LSE that is off by
// slope * row.  A window that hides nothing more makes it add the distances that the LSE is to have.
void widen_alibi(Shape& shape)
{
    if(shape.alibi_slopes != nullptr && shape.window_left < 0)
        shape.window_left = shape.seqlen_q + shape.seqlen_k;
}

// found: the instance of the number, where there is one.
Status check(int number, const Shape& shape, const Instance*& found)
{
    found = find(number);
    if(found == nullptr)
        return Status::no_instance;
    const Instance& instance = *found;
    if(instance.varlen != (shape.cu_seqlens_q != nullptr))
        return Status::wrong_layout;
    if(shape.headdim % 8 || shape.headdim_v % 8 || shape.headdim > instance.headdim ||
       shape.headdim_v > instance.headdim_v)
        return Status::wrong_headdim;
    return Status::ok;
}

// Instances that were added, in order.  Readers do not lock: what is below the count is there and stays.
constexpr int kMaxAdded = 1024;
const Instance* added[kMaxAdded];
std::atomic<int> added_count{0};

} // namespace

const Instance* find(int number)
{
    if(number < 0)
        return nullptr;
    if(number < instance_count)
        return &instances[number];
    number -= instance_count;
    return number < added_count.load(std::memory_order_acquire) ? added[number] : nullptr;
}

// One caller at a time.
Status add(const Table& table, int* first)
{
    if(table.layout != kLayout)
        return Status::wrong_table;
    const int count = added_count.load(std::memory_order_relaxed);
    if(table.count < 0 || table.count > kMaxAdded - count)
        return Status::too_many_tables;
    for(int i = 0; i < table.count; i++)
        added[count + i] = &table.instances[i];
    added_count.store(count + table.count, std::memory_order_release);
    *first = instance_count + count;
    return Status::ok;
}

Status forward(int number, const ForwardParams& given)
{
    ForwardParams params = given;
    widen_alibi(params.shape);
    const Instance* found;
    if(const Status status = check(number, params.shape, found); status != Status::ok)
        return status;
    if(found->forward == nullptr)
        return Status::wrong_kernel;
    if(!fits(params.q) || !fits(params.k) || !fits(params.v) || !fits(params.out) || !fits(params.lse))
        return Status::stride_too_large;
    return found->forward(params);
}

Status backward(int number, const BackwardParams& given)
{
    BackwardParams params = given;
    widen_alibi(params.shape);
    const Instance* found;
    if(const Status status = check(number, params.shape, found); status != Status::ok)
        return status;
    if(found->backward == nullptr)
        return Status::wrong_kernel;
    for(const Matrix* x : {&params.q, &params.k, &params.v, &params.dout, &params.dk, &params.dv, &params.dq_acc})
        if(!fits(*x))
            return Status::stride_too_large;
    if(!fits(params.lse) || !fits(params.delta) || params.dq_acc_split > kMaxStride)
        return Status::stride_too_large;
    return found->backward(params);
}

Status splitkv(int number, const SplitKvParams& given)
{
    SplitKvParams params = given;
    widen_alibi(params.shape);
    const Instance* found = find(number);
    if(found == nullptr)
        return Status::no_instance;
    const Instance& instance = *found;
    if(instance.splitkv == nullptr)
        return Status::wrong_kernel;
    if(params.shape.headdim != instance.headdim || params.shape.headdim_v != instance.headdim_v)
        return Status::wrong_headdim;
    if(params.page_size <= 0 || params.page_size % instance.key_block || params.num_splits < 1)
        return Status::wrong_size;
    if(!fits(params.q) || !fits(params.k) || !fits(params.v) || !fits(params.out) || !fits(params.lse))
        return Status::stride_too_large;
    // The kernel multiplies the number of a part by its stride in 32 bits.
    const std::int64_t last = params.num_splits - 1;
    if(params.out_split * last > kMaxStride || params.lse_split * last > kMaxStride ||
       params.block_table_batch > kMaxStride)
        return Status::stride_too_large;
    return instance.splitkv(params);
}

Status dq_splits(int number, int seqlen_k, int* splits)
{
    const Instance* found = find(number);
    if(found == nullptr)
        return Status::no_instance;
    if(found->backward == nullptr)
        return Status::wrong_kernel;
    const int block = found->key_block;
    *splits         = block ? (seqlen_k + block - 1) / block : 1;
    return Status::ok;
}

} // namespace flash_ck
