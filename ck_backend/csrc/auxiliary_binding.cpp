// The operators of torch.ops.flash_rocm_auxiliary, or of another name that a build gives them, for ROCm and CUDA: with
// PyTorch's stable ABI alone, so that g++ compiles it without a header of either.  The stream is a number, for the ABI of
// torch 2.10 has no call for it.
#include "auxiliary.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

flash_ck::Element element(const Tensor& x)
{
    switch(x.scalar_type())
    {
    case ScalarType::Half: return flash_ck::Element::float16;
    case ScalarType::BFloat16: return flash_ck::Element::bfloat16;
    case ScalarType::Float: return flash_ck::Element::float32;
    default: break;
    }
    STD_TORCH_CHECK(false, "expected float16, bfloat16 or float32, got another dtype");
    return flash_ck::Element::float32;
}

// Sizes count from the end: (batch, seqlen, nheads, headdim) and (total, nheads, headdim) are one, with batch 1.
int size(const Tensor& x, int64_t from_end)
{
    return x.dim() < from_end ? 1 : static_cast<int>(x.size(x.dim() - from_end));
}

int64_t stride(const Tensor& x, int64_t from_end) { return x.dim() < from_end ? 0 : x.stride(x.dim() - from_end); }

flash_ck::Matrix matrix(const Tensor& x) { return {x.data_ptr(), stride(x, 4), stride(x, 3), stride(x, 2)}; }

flash_ck::Rows rows(const Tensor& x)
{
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && (stride(x, 1) == 1 || size(x, 1) == 1),
                    "expected float32 with contiguous rows");
    return {static_cast<float*>(x.data_ptr()), stride(x, 3), stride(x, 2)};
}

template <typename T>
T* pointer(const Optional& x)
{
    return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

template <typename T>
T* pointer(const Tensor& x)
{
    return static_cast<T*>(x.data_ptr());
}

void* stream_of(int64_t stream) { return reinterpret_cast<void*>(stream); }

flash_ck::Rotary rotary_of(const Optional& cos, const Optional& sin, const Optional& seqlens, bool interleaved)
{
    flash_ck::Rotary rotary;
    if(!cos)
        return rotary;
    rotary.cos         = pointer<void>(cos);
    rotary.sin         = pointer<void>(sin);
    rotary.row         = cos->stride(0);
    rotary.rows        = size(*cos, 2);
    rotary.half        = size(*cos, 1);
    rotary.interleaved = interleaved;
    rotary.seqlens     = pointer<const int32_t>(seqlens);
    return rotary;
}

void check(const char* kernel, flash_ck::Status status)
{
    STD_TORCH_CHECK(status == flash_ck::Status::ok, "auxiliary kernel ", kernel, ": ", flash_ck::status_text(status));
}

void append(Tensor k_new,
            Tensor v_new,
            Tensor k,
            Tensor v,
            Optional rotary_cos,
            Optional rotary_sin,
            Optional cu_seqlens_k_new,
            Optional cache_seqlens,
            Optional rotary_seqlens,
            Optional cache_batch_idx,
            Optional block_table,
            Optional errors,
            int64_t batch,
            int64_t seqlen_new,
            bool interleaved,
            int64_t stream)
{
    flash_ck::AppendParams params;
    params.type            = element(k);
    params.batch           = static_cast<int>(batch);
    params.seqlen_new      = static_cast<int>(seqlen_new);
    params.nheads_k        = size(k, 2);
    params.headdim         = size(k, 1);
    params.headdim_v       = size(v, 1);
    params.entries         = size(k, 4);
    params.capacity        = size(k, 3);
    params.k_new           = matrix(k_new);
    params.v_new           = matrix(v_new);
    params.k               = matrix(k);
    params.v               = matrix(v);
    params.cu_seqlens_new  = pointer<const int32_t>(cu_seqlens_k_new);
    params.cache_seqlens   = pointer<const int32_t>(cache_seqlens);
    params.batch_idx       = pointer<const int32_t>(cache_batch_idx);
    if(block_table)
    {
        params.page_size       = params.capacity;
        params.capacity        = params.page_size * size(*block_table, 1);
        params.block_table     = pointer<const int32_t>(block_table);
        params.block_table_row = block_table->stride(0);
    }
    params.rotary = rotary_of(rotary_cos, rotary_sin, rotary_seqlens, interleaved);
    params.errors = pointer<int32_t>(errors);
    params.stream = stream_of(stream);
    check("append", flash_ck::append(params));
}

void rotate(Tensor q,
            Tensor out,
            Tensor rotary_cos,
            Tensor rotary_sin,
            Optional cu_seqlens_q,
            Optional seqused_q,
            Tensor cache_seqlens,
            Optional rotary_seqlens,
            Optional errors,
            int64_t batch,
            int64_t seqlen_q,
            int64_t capacity,
            bool interleaved,
            bool moves,
            int64_t stream)
{
    flash_ck::RotateParams params;
    params.type          = element(q);
    params.batch         = static_cast<int>(batch);
    params.seqlen_q      = static_cast<int>(seqlen_q);
    params.nheads        = size(q, 2);
    params.headdim       = size(q, 1);
    params.capacity      = static_cast<int>(capacity);
    params.moves         = moves;
    params.q             = matrix(q);
    params.out           = matrix(out);
    params.cu_seqlens_q  = pointer<const int32_t>(cu_seqlens_q);
    params.seqused_q     = pointer<const int32_t>(seqused_q);
    params.cache_seqlens = pointer<const int32_t>(cache_seqlens);
    params.rotary        = rotary_of(rotary_cos, rotary_sin, rotary_seqlens, interleaved);
    params.errors        = pointer<int32_t>(errors);
    params.stream        = stream_of(stream);
    check("rotate", flash_ck::rotate(params));
}

// Splits come first in the shapes of the parts, and lse is (batch, seqlen, nheads); with heads_first splits stand between
// heads and head dim, and lse is (batch, nheads, seqlen).
void combine(Tensor out_partial, Tensor lse_partial, Tensor out, Tensor lse, bool heads_first, int64_t stream)
{
    STD_TORCH_CHECK(out_partial.scalar_type() == ScalarType::Float && lse_partial.scalar_type() == ScalarType::Float &&
                        lse.scalar_type() == ScalarType::Float,
                    "auxiliary kernel combine: expected float32 parts and lse");
    const int64_t split = heads_first ? lse_partial.dim() - 1 : 0;
    // Places of head and row from the end of lse_partial.
    const int64_t head = heads_first ? 2 : 1;
    const bool dense   = out.dim() == 4;
    flash_ck::CombineParams params;
    params.type              = element(out);
    params.splits            = static_cast<int>(lse_partial.size(split));
    params.batch             = size(out, 4);
    params.seqlen_q          = size(out, 3);
    params.nheads            = size(out, 2);
    params.headdim_v         = size(out, 1);
    params.out_partial       = pointer<const float>(out_partial);
    params.out_partial_split = out_partial.stride(split);
    params.out_partial_batch = dense ? stride(out_partial, head + 3) : 0;
    params.out_partial_row   = stride(out_partial, head + 2);
    params.out_partial_head  = stride(out_partial, head + 1);
    params.lse_partial       = pointer<const float>(lse_partial);
    params.lse_partial_split = lse_partial.stride(split);
    params.lse_partial_batch = dense ? stride(lse_partial, head + 2) : 0;
    params.lse_partial_row   = stride(lse_partial, head + 1);
    params.lse_partial_head  = stride(lse_partial, head);
    params.out               = matrix(out);
    params.lse               = pointer<float>(lse);
    params.lse_batch         = dense ? stride(lse, 3) : 0;
    params.lse_row           = stride(lse, heads_first ? 1 : 2);
    params.lse_head          = stride(lse, heads_first ? 2 : 1);
    params.stream            = stream_of(stream);
    check("combine", flash_ck::combine(params));
}

void delta(Tensor out, Tensor dout, Tensor delta, Optional dlse, int64_t stream)
{
    flash_ck::DeltaParams params;
    params.type      = element(out);
    params.batch     = size(out, 4);
    params.seqlen_q  = size(out, 3);
    params.nheads    = size(out, 2);
    params.headdim_v = size(out, 1);
    params.out       = matrix(out);
    params.dout      = matrix(dout);
    params.delta     = rows(delta);
    if(dlse)
        params.dlse = rows(*dlse);
    params.stream = stream_of(stream);
    check("delta", flash_ck::delta(params));
}

// parts has a dim in front of those of out.
void reduce(Tensor parts, Tensor out, int64_t stream)
{
    flash_ck::ReduceParams params;
    params.from    = element(parts);
    params.to      = element(out);
    params.parts   = static_cast<int>(parts.size(0));
    params.batch   = size(out, 4);
    params.seqlen  = size(out, 3);
    params.nheads  = size(out, 2);
    params.headdim = size(out, 1);
    params.in      = matrix(parts);
    if(out.dim() == 3)
        params.in.batch = 0; // the parts stand where a batch would
    params.part   = parts.stride(0);
    params.out    = matrix(out);
    params.stream = stream_of(stream);
    check("reduce", flash_ck::reduce(params));
}

void dropout_mask(Tensor rng_state, Tensor mask, int64_t threshold, int64_t stream)
{
    STD_TORCH_CHECK(mask.is_contiguous() && mask.element_size() == 1 && rng_state.scalar_type() == ScalarType::Long,
                    "auxiliary kernel dropout_mask: expected a contiguous mask of bytes and an int64 rng_state");
    flash_ck::DropoutMaskParams params;
    params.batch     = size(mask, 4);
    params.nheads    = size(mask, 3);
    params.seqlen_q  = size(mask, 2);
    params.seqlen_k  = size(mask, 1);
    params.threshold = static_cast<int>(threshold);
    params.rng_state = pointer<const int64_t>(rng_state);
    params.mask      = pointer<uint8_t>(mask);
    params.stream    = stream_of(stream);
    check("dropout_mask", flash_ck::dropout_mask(params));
}

} // namespace

#ifndef FLASH_ROCM_AUXILIARY
#define FLASH_ROCM_AUXILIARY flash_rocm_auxiliary
#endif
// The macros of torch make a text of the name, which has to be replaced before.
#define DEFINE_OPERATORS(name, library) STABLE_TORCH_LIBRARY(name, library)
#define IMPLEMENT_OPERATORS(name, key, library) STABLE_TORCH_LIBRARY_IMPL(name, key, library)

DEFINE_OPERATORS(FLASH_ROCM_AUXILIARY, library)
{
    library.def("append(Tensor k_new, Tensor v_new, Tensor(a!) k, Tensor(b!) v, Tensor? rotary_cos, Tensor? rotary_sin, "
                "Tensor? cu_seqlens_k_new, Tensor? cache_seqlens, Tensor? rotary_seqlens, Tensor? cache_batch_idx, "
                "Tensor? block_table, Tensor(c!)? errors, int batch, int seqlen_new, bool interleaved, int stream) -> ()");
    library.def("rotate(Tensor q, Tensor(a!) out, Tensor rotary_cos, Tensor rotary_sin, Tensor? cu_seqlens_q, "
                "Tensor? seqused_q, Tensor cache_seqlens, Tensor? rotary_seqlens, Tensor(b!)? errors, int batch, "
                "int seqlen_q, int capacity, bool interleaved, bool moves, int stream) -> ()");
    library.def("combine(Tensor out_partial, Tensor lse_partial, Tensor(a!) out, Tensor(b!) lse, bool heads_first, "
                "int stream) -> ()");
    library.def("delta(Tensor out, Tensor dout, Tensor(a!) delta, Tensor? dlse, int stream) -> ()");
    library.def("reduce(Tensor parts, Tensor(a!) out, int stream) -> ()");
    library.def("dropout_mask(Tensor rng_state, Tensor(a!) mask, int threshold, int stream) -> ()");
}

IMPLEMENT_OPERATORS(FLASH_ROCM_AUXILIARY, CompositeExplicitAutograd, library)
{
    library.impl("append", TORCH_BOX(&append));
    library.impl("rotate", TORCH_BOX(&rotate));
    library.impl("combine", TORCH_BOX(&combine));
    library.impl("delta", TORCH_BOX(&delta));
    library.impl("reduce", TORCH_BOX(&reduce));
    library.impl("dropout_mask", TORCH_BOX(&dropout_mask));
}
