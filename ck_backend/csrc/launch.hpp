// What forward and backward share: from our parameters to those of Composable Kernel's kernels.
#pragma once

#include "flash_ck.h"

#include "ck_tile/core.hpp"
#include "ck_tile/host/kernel_launch.hpp"
#include "ck_tile/ops/fmha/block/block_masking.hpp"

namespace flash_ck {

template <bool Masked>
using Mask = ck_tile::SimplifiedGenericAttentionMask<Masked>;

// Launches one kernel.  CK's own launch_kernel throws, which must not leave a C ABI, and its BlockSize() asks HIP for
// the properties of the device at each call, to halve the block on chips with 32 lanes: the chips here have 64.
template <typename Kernel, typename Arguments, typename Grid>
Status launch(const Arguments& arguments, const Grid& grid, void* stream)
{
    ck_tile::make_kernel<Kernel::kBlockPerCu>(Kernel{}, grid, dim3(Kernel::kBlockSize), 0, arguments)(
        ck_tile::stream_config{static_cast<hipStream_t>(stream)});
    return launch_status(static_cast<int>(hipGetLastError()));
}

inline void put(const Matrix& x, ck_tile::index_t& row, ck_tile::index_t& head, ck_tile::index_t& batch)
{
    row   = static_cast<ck_tile::index_t>(x.row);
    head  = static_cast<ck_tile::index_t>(x.head);
    batch = static_cast<ck_tile::index_t>(x.batch);
}

// The fields that the arguments of both directions have under the same names.
template <typename Arguments>
void put(const Shape& shape, bool masked, Arguments& to)
{
    to.batch        = shape.batch;
    to.seqlen_q     = shape.seqlen_q;
    to.seqlen_k     = shape.seqlen_k;
    to.max_seqlen_q = shape.seqlen_q;
    to.hdim_q       = shape.headdim;
    to.hdim_v       = shape.headdim_v;
    to.nhead_q      = shape.nheads;
    to.nhead_k      = shape.nheads_k;

    to.seqstart_q_ptr = shape.cu_seqlens_q;
    to.seqstart_k_ptr = shape.cu_seqlens_k;

    to.bias_ptr    = shape.alibi_slopes;
    to.stride_bias = static_cast<ck_tile::index_t>(shape.alibi_batch);

    to.window_size_left  = shape.window_left;
    to.window_size_right = shape.window_right;
    // Without limits a mask from the bottom right hides nothing, and gives ALiBi its distances.
    to.mask_type = static_cast<ck_tile::index_t>(masked ? ck_tile::GenericAttentionMaskEnum::MASK_FROM_BOTTOM_RIGHT
                                                        : ck_tile::GenericAttentionMaskEnum::NO_MASK);
}

} // namespace flash_ck
