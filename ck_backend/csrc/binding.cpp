// The operators of torch.ops.flash_rocm_ck, with PyTorch's stable ABI alone: one build serves several versions of torch,
// and g++ compiles it without a HIP header.  The stream is a number, for the ABI of torch 2.10 has no call for it.
#include "flash_ck.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// (batch, seqlen, nheads, headdim) or (total, nheads, headdim), whichever it is.
flash_ck::Matrix matrix(const Tensor& x, bool varlen)
{
    return {x.data_ptr(), varlen ? 0 : x.stride(0), x.stride(x.dim() - 3), x.stride(x.dim() - 2)};
}

// (batch, nheads, seqlen_q) or (nheads, total_q).
flash_ck::Rows rows(const Tensor& x)
{
    return {static_cast<float*>(x.data_ptr()), x.dim() == 3 ? x.stride(0) : 0, x.stride(x.dim() - 2)};
}

template <typename T>
const T* pointer(const Optional& x)
{
    return x ? static_cast<const T*>(x->data_ptr()) : nullptr;
}

flash_ck::Shape shape_of(const Tensor& q,
                         const Tensor& k,
                         const Tensor& v,
                         const Optional& cu_seqlens_q,
                         const Optional& cu_seqlens_k,
                         const Optional& alibi_slopes,
                         int64_t seqlen_q,
                         int64_t seqlen_k,
                         double scale,
                         double softcap,
                         int64_t window_left,
                         int64_t window_right,
                         int64_t stream)
{
    flash_ck::Shape shape;
    const int64_t last = q.dim() - 1;
    shape.batch        = static_cast<int>(cu_seqlens_q ? cu_seqlens_q->size(0) - 1 : q.size(0));
    shape.seqlen_q     = static_cast<int>(seqlen_q);
    shape.seqlen_k     = static_cast<int>(seqlen_k);
    shape.nheads       = static_cast<int>(q.size(last - 1));
    shape.nheads_k     = static_cast<int>(k.size(k.dim() - 2));
    shape.headdim      = static_cast<int>(q.size(last));
    shape.headdim_v    = static_cast<int>(v.size(v.dim() - 1));
    shape.window_left  = static_cast<int>(window_left);
    shape.window_right = static_cast<int>(window_right);
    shape.scale        = static_cast<float>(scale);
    shape.softcap      = static_cast<float>(softcap);
    shape.cu_seqlens_q = pointer<int32_t>(cu_seqlens_q);
    shape.cu_seqlens_k = pointer<int32_t>(cu_seqlens_k);
    shape.alibi_slopes = pointer<float>(alibi_slopes);
    shape.alibi_batch  = alibi_slopes && alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0;
    shape.stream       = reinterpret_cast<void*>(stream);
    return shape;
}

void check(flash_ck::Status status, int64_t instance)
{
    if(status == flash_ck::Status::ok)
        return;
    const flash_ck::Instance* found = flash_ck::find(static_cast<int>(instance));
    STD_TORCH_CHECK(false,
                    "Composable Kernel, instance ",
                    found != nullptr ? found->name : "?",
                    ": ",
                    flash_ck::status_text(status));
}

void forward(int64_t instance,
             Tensor q,
             Tensor k,
             Tensor v,
             Tensor out,
             Tensor softmax_lse,
             Optional cu_seqlens_q,
             Optional cu_seqlens_k,
             Optional alibi_slopes,
             int64_t seqlen_q,
             int64_t seqlen_k,
             double scale,
             double softcap,
             int64_t window_left,
             int64_t window_right,
             int64_t stream)
{
    const bool varlen = cu_seqlens_q.has_value();
    flash_ck::ForwardParams params;
    params.shape = shape_of(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seqlen_q, seqlen_k, scale, softcap,
                            window_left, window_right, stream);
    params.q     = matrix(q, varlen);
    params.k     = matrix(k, varlen);
    params.v     = matrix(v, varlen);
    params.out   = matrix(out, varlen);
    params.lse   = rows(softmax_lse);
    check(flash_ck::forward(static_cast<int>(instance), params), instance);
}

// dq_acc is (splits, batch, seqlen_q, nheads, headdim) or (splits, total_q, nheads, headdim), float32.
void backward(int64_t instance,
              Tensor q,
              Tensor k,
              Tensor v,
              Tensor dout,
              Tensor softmax_lse,
              Tensor delta,
              Tensor dq_acc,
              Tensor dk,
              Tensor dv,
              Optional cu_seqlens_q,
              Optional cu_seqlens_k,
              Optional alibi_slopes,
              int64_t seqlen_q,
              int64_t seqlen_k,
              double scale,
              int64_t window_left,
              int64_t window_right,
              int64_t stream)
{
    const bool varlen = cu_seqlens_q.has_value();
    flash_ck::BackwardParams params;
    params.shape  = shape_of(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seqlen_q, seqlen_k, scale, 0.0,
                             window_left, window_right, stream);
    params.q      = matrix(q, varlen);
    params.k      = matrix(k, varlen);
    params.v      = matrix(v, varlen);
    params.dout   = matrix(dout, varlen);
    params.dk     = matrix(dk, varlen);
    params.dv     = matrix(dv, varlen);
    params.dq_acc = matrix(dq_acc, varlen);
    if(!varlen)
        params.dq_acc.batch = dq_acc.stride(1);
    params.dq_acc_split = dq_acc.stride(0);
    params.lse          = rows(softmax_lse);
    params.delta        = rows(delta);
    check(flash_ck::backward(static_cast<int>(instance), params), instance);
}

// out is (nheads, splits, total_q, headdim_v) and lse (nheads, splits, total_q), float32; block_table (batch, pages).  A k
// of three dims has rows for pages.
void splitkv(int64_t instance,
             Tensor q,
             Tensor k,
             Tensor v,
             Tensor out,
             Tensor lse,
             Tensor cu_seqlens_q,
             Tensor seqlens_k,
             Tensor block_table,
             Optional alibi_slopes,
             int64_t page_size,
             int64_t seqlen_q,
             int64_t seqlen_k,
             double scale,
             double softcap,
             int64_t window_left,
             int64_t window_right,
             int64_t stream)
{
    flash_ck::SplitKvParams params;
    params.shape = shape_of(q, k, v, cu_seqlens_q, std::nullopt, alibi_slopes, seqlen_q, seqlen_k, scale, softcap,
                            window_left, window_right, stream);
    params.q     = matrix(q, true);
    params.k     = {k.data_ptr(), k.stride(0), k.stride(k.dim() - 3), k.stride(k.dim() - 2)};
    params.v     = {v.data_ptr(), v.stride(0), v.stride(v.dim() - 3), v.stride(v.dim() - 2)};
    params.out   = {out.data_ptr(), 0, out.stride(2), out.stride(0)};
    params.lse   = {static_cast<float*>(lse.data_ptr()), 0, lse.stride(0)};
    params.out_split         = out.stride(1);
    params.lse_split         = lse.stride(1);
    params.seqlens_k         = static_cast<const int32_t*>(seqlens_k.data_ptr());
    params.block_table       = static_cast<const int32_t*>(block_table.data_ptr());
    params.block_table_batch = block_table.stride(0);
    params.page_size         = static_cast<int>(page_size);
    params.num_splits        = static_cast<int>(out.size(1));
    check(flash_ck::splitkv(static_cast<int>(instance), params), instance);
}

// table: the address of what the entry function of module.cpp returns.  The number of its first instance.
int64_t add(int64_t table)
{
    int first = 0;
    const auto status = flash_ck::add(*reinterpret_cast<const flash_ck::Table*>(table), &first);
    STD_TORCH_CHECK(status == flash_ck::Status::ok, flash_ck::status_text(status));
    return first;
}

int64_t dq_splits(int64_t instance, int64_t seqlen_k)
{
    int splits = 0;
    check(flash_ck::dq_splits(static_cast<int>(instance), static_cast<int>(seqlen_k), &splits), instance);
    return splits;
}

} // namespace

STABLE_TORCH_LIBRARY(flash_rocm_ck, library)
{
    library.def("forward(int instance, Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) softmax_lse, "
                "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, int seqlen_q, int seqlen_k, "
                "float scale, float softcap, int window_left, int window_right, int stream) -> ()");
    library.def("backward(int instance, Tensor q, Tensor k, Tensor v, Tensor dout, Tensor softmax_lse, Tensor delta, "
                "Tensor(a!) dq_acc, Tensor(b!) dk, Tensor(c!) dv, "
                "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, int seqlen_q, int seqlen_k, "
                "float scale, int window_left, int window_right, int stream) -> ()");
    library.def("splitkv(int instance, Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, Tensor cu_seqlens_q, "
                "Tensor seqlens_k, Tensor block_table, Tensor? alibi_slopes, int page_size, int seqlen_q, int seqlen_k, "
                "float scale, float softcap, int window_left, int window_right, int stream) -> ()");
    library.def("dq_splits(int instance, int seqlen_k) -> int");
    library.def("add(int table) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(flash_rocm_ck, CompositeExplicitAutograd, library)
{
    library.impl("forward", TORCH_BOX(&forward));
    library.impl("backward", TORCH_BOX(&backward));
    library.impl("splitkv", TORCH_BOX(&splitkv));
    library.impl("dq_splits", TORCH_BOX(&dq_splits));
    library.impl("add", TORCH_BOX(&add));
}
