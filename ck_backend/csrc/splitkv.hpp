// A split-KV instance: attention over a K/V cache, whose keys are divided into parts that are combined afterwards.
#pragma once

#include "launch.hpp"

#include "ck_tile/ops/fmha/block/variants.hpp"
#include "fmha_fwd.hpp"

namespace flash_ck {

// Config, written by ck_backend/generate.py: Element, Tile, Warps, WarpTile, Pipeline, kOccupancy, kMasked, kAlibi,
// kSoftcap.
template <typename Config>
struct SplitKv {
    using Types = FmhaFwdTypeConfig<typename Config::Element>;
    using Shape = ck_tile::TileFmhaShape<typename Config::Tile,
                                         typename Config::Warps,
                                         typename Config::WarpTile,
                                         typename Config::Warps,
                                         typename Config::WarpTile,
                                         true>; // V as the caller has it: head dim contiguous
    static constexpr auto kBias =
        Config::kAlibi ? ck_tile::BlockAttentionBiasEnum::ALIBI : ck_tile::BlockAttentionBiasEnum::NO_BIAS;
    // Without a mask all query heads that share a key head are rows of one tile, and keys are read once for them.
    static constexpr bool kMerged = !Config::kMasked && !Config::kAlibi;
    // Lengths are padded, head dims not: then rows are read in vectors of 16 bytes.
    using Traits = ck_tile::TileFmhaFwdSplitKVTraits<true,
                                                     true,
                                                     false,
                                                     false,
                                                     Config::kSoftcap,
                                                     kBias,
                                                     false,
                                                     true,
                                                     false,
                                                     true,
                                                     true,
                                                     kMerged,
                                                     Config::kOccupancy>;
    using Variant =
        ck_tile::ComposedAttention<Config::kSoftcap * ck_tile::LOGITS_SOFT_CAP, CK_TILE_FMHA_FWD_FAST_EXP2>;
    using Problem  = ck_tile::BlockFmhaFwdSplitKVPipelineProblem<typename Types::QDataType,
                                                                typename Types::KDataType,
                                                                typename Types::VDataType,
                                                                typename Types::SaccDataType,
                                                                typename Types::SMPLComputeDataType,
                                                                typename Types::BiasDataType,
                                                                typename Types::LSEDataType,
                                                                typename Types::PDataType,
                                                                typename Types::OaccDataType,
                                                                typename Types::OaccDataType,
                                                                Shape,
                                                                true,
                                                                Variant,
                                                                Mask<Config::kMasked>,
                                                                Traits>;
    using Epilogue = ck_tile::Default2DEpilogue<
        ck_tile::Default2DEpilogueProblem<typename Types::OaccDataType, typename Types::OaccDataType, false, false>>;
    using Kernel = ck_tile::FmhaFwdSplitKVKernel<typename Config::template Pipeline<Problem>, Epilogue>;
};

template <typename Config>
Status launch_splitkv(const SplitKvParams& from)
{
    using Kernel = typename SplitKv<Config>::Kernel;
    fmha_fwd_splitkv_args to{};
    put(from.shape, Config::kMasked, to);
    to.q_ptr           = from.q.data;
    to.k_ptr           = from.k.data;
    to.v_ptr           = from.v.data;
    to.o_acc_ptr       = from.out.data;
    to.lse_acc_ptr     = from.lse.data;
    to.scale_s         = from.shape.scale;
    to.scale_p         = 1.f;
    to.logits_soft_cap = from.shape.softcap;
    to.num_splits      = from.num_splits;

    // The kernel reads the start of a sequence for a cache without pages too, where its lengths do as well.
    to.seqstart_k_ptr = from.seqlens_k;
    to.seqlen_k_ptr   = from.seqlens_k;

    // Its pointer is not to const, but it only reads.
    to.block_table_ptr          = const_cast<std::int32_t*>(from.block_table);
    to.batch_stride_block_table = static_cast<ck_tile::index_t>(from.block_table_batch);
    to.page_block_size          = from.page_size;
    to.is_gappy                 = false;

    put(from.q, to.stride_q, to.nhead_stride_q, to.batch_stride_q);
    put(from.k, to.stride_k, to.nhead_stride_k, to.batch_stride_k);
    put(from.v, to.stride_v, to.nhead_stride_v, to.batch_stride_v);
    put(from.out, to.stride_o_acc, to.nhead_stride_o_acc, to.batch_stride_o_acc);
    to.split_stride_o_acc   = static_cast<ck_tile::index_t>(from.out_split);
    to.nhead_stride_lse_acc = static_cast<ck_tile::index_t>(from.lse.head);
    to.split_stride_lse_acc = static_cast<ck_tile::index_t>(from.lse_split);

    const auto [arguments, grid] = fmha_fwd_splitkv_create_kargs_and_grids<Kernel>(to);
    return launch<Kernel>(arguments, grid, from.shape.stream);
}

} // namespace flash_ck
