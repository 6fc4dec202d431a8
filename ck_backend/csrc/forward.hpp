// A forward instance: Composable Kernel's pipeline for one tile, one dtype and one set of features.
#pragma once

#include "launch.hpp"

#include "ck_tile/ops/fmha/block/variants.hpp"
#include "fmha_fwd.hpp"

namespace flash_ck {

// Config, written by ck_backend/generate.py: Element, Tile, Warps, WarpTile, Pipeline, kOccupancy, kVarlen, kMasked,
// kAlibi, kSoftcap.
template <typename Config>
struct Forward {
    using Types = FmhaFwdTypeConfig<typename Config::Element>;
    using Shape = ck_tile::TileFmhaShape<typename Config::Tile,
                                         typename Config::Warps,
                                         typename Config::WarpTile,
                                         typename Config::Warps,
                                         typename Config::WarpTile,
                                         true>; // V as the caller has it: head dim contiguous
    static constexpr auto kBias =
        Config::kAlibi ? ck_tile::BlockAttentionBiasEnum::ALIBI : ck_tile::BlockAttentionBiasEnum::NO_BIAS;
    // Lengths and head dims are padded, so that one instance takes every length; LSE is always stored.
    using Traits = ck_tile::TileFmhaTraits<true,
                                           true,
                                           true,
                                           true,
                                           Config::kSoftcap,
                                           kBias,
                                           false,
                                           true,
                                           false,
                                           false,
                                           Config::kOccupancy,
                                           false>;
    using Variant =
        ck_tile::ComposedAttention<Config::kSoftcap * ck_tile::LOGITS_SOFT_CAP, CK_TILE_FMHA_FWD_FAST_EXP2>;
    using Problem = ck_tile::BlockFmhaPipelineProblem<typename Types::QDataType,
                                                      typename Types::KDataType,
                                                      typename Types::VDataType,
                                                      typename Types::SaccDataType,
                                                      typename Types::SMPLComputeDataType,
                                                      typename Types::BiasDataType,
                                                      typename Types::RandValOutputDataType,
                                                      typename Types::LSEDataType,
                                                      typename Types::PDataType,
                                                      typename Types::OaccDataType,
                                                      typename Types::ODataType,
                                                      Shape,
                                                      Config::kVarlen,
                                                      Variant,
                                                      Mask<Config::kMasked>,
                                                      false,
                                                      Traits>;
    using Epilogue = ck_tile::Default2DEpilogue<
        ck_tile::Default2DEpilogueProblem<typename Types::OaccDataType, typename Types::ODataType, true, true>>;
    using Kernel = ck_tile::FmhaFwdKernel<typename Config::template Pipeline<Problem>, Epilogue>;
};

template <typename Config>
Status launch_forward(const ForwardParams& from)
{
    using Kernel = typename Forward<Config>::Kernel;
    fmha_fwd_args to{};
    put(from.shape, Config::kMasked, to);
    to.q_ptr           = from.q.data;
    to.k_ptr           = from.k.data;
    to.v_ptr           = from.v.data;
    to.o_ptr           = from.out.data;
    to.lse_ptr         = from.lse.data;
    to.scale_s         = from.shape.scale;
    to.scale_p         = 1.f;
    to.scale_o         = 1.f;
    to.logits_soft_cap = from.shape.softcap;
    put(from.q, to.stride_q, to.nhead_stride_q, to.batch_stride_q);
    put(from.k, to.stride_k, to.nhead_stride_k, to.batch_stride_k);
    put(from.v, to.stride_v, to.nhead_stride_v, to.batch_stride_v);
    put(from.out, to.stride_o, to.nhead_stride_o, to.batch_stride_o);
    to.nhead_stride_lse = static_cast<ck_tile::index_t>(from.lse.head);
    to.batch_stride_lse = static_cast<ck_tile::index_t>(from.lse.batch);
    to.drop_seed_offset = std::make_pair(std::uint64_t{0}, std::uint64_t{0});

    const auto [arguments, grid] = fmha_fwd_create_kargs_and_grids<Kernel>(to);
    return launch<Kernel>(arguments, grid, from.shape.stream);
}

} // namespace flash_ck
