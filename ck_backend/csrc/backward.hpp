// A backward instance: Composable Kernel's kernel of the gradients for one tile, one dtype and one set of features.  What
// stands before and behind it, delta and the conversion of dq, are auxiliary kernels.
#pragma once

#include "launch.hpp"

#include "fmha_bwd.hpp"

namespace flash_ck {

// Config, written by ck_backend/generate.py: Element, Tile (M0, N0, K0, K1, K2, K3, K4, head dim of q, of v), the warps
// of S and dP, of dK and dV, of dQ (WarpsS, WarpsK, WarpsQ), WarpTileS, WarpTileK, WarpTileQ, kOccupancy, kVarlen,
// kMasked, kAlibi, kDeterministic.
template <typename Config>
struct Backward {
    using Types = FmhaBwdTypeConfig<typename Config::Element>;
    using Shape = ck_tile::TileFmhaBwdShape<typename Config::Tile,
                                            typename Config::WarpsS,
                                            typename Config::WarpTileS,
                                            typename Config::WarpsK,
                                            typename Config::WarpTileK,
                                            typename Config::WarpsS,
                                            typename Config::WarpTileS,
                                            typename Config::WarpsK,
                                            typename Config::WarpTileK,
                                            typename Config::WarpsQ,
                                            typename Config::WarpTileQ,
                                            0>;
    static constexpr auto kBias =
        Config::kAlibi ? ck_tile::BlockAttentionBiasEnum::ALIBI : ck_tile::BlockAttentionBiasEnum::NO_BIAS;
    // Head dims are padded in steps of 8.
    using Traits  = ck_tile::TileFmhaBwdTraits<8, 8, kBias, false, Config::kOccupancy>;
    using Problem = ck_tile::BlockFmhaBwdPipelineProblem<typename Types::QDataType,
                                                         typename Types::KDataType,
                                                         typename Types::VDataType,
                                                         typename Types::GemmDataType,
                                                         typename Types::LSEDataType,
                                                         typename Types::AccDataType,
                                                         typename Types::DDataType,
                                                         typename Types::BiasDataType,
                                                         typename Types::RandValOutputDataType,
                                                         typename Types::ODataType,
                                                         typename Types::OGradDataType,
                                                         typename Types::QGradDataType,
                                                         typename Types::KGradDataType,
                                                         typename Types::VGradDataType,
                                                         typename Types::BiasGradDataType,
                                                         Shape,
                                                         Config::kVarlen,
                                                         Config::kDeterministic,
                                                         Mask<Config::kMasked>,
                                                         ck_tile::BlockDropoutBwd<false, true, false>,
                                                         false,
                                                         Traits>;
    template <typename Gradient>
    using Epilogue =
        ck_tile::Default2DEpilogue<ck_tile::Default2DEpilogueProblem<typename Types::AccDataType, Gradient, false, true>>;
    using Gradients = ck_tile::FmhaBwdDQDKDVKernel<ck_tile::BlockFmhaBwdDQDKDVPipeline<Problem>,
                                                   Epilogue<typename Types::KGradDataType>,
                                                   Epilogue<typename Types::VGradDataType>,
                                                   Epilogue<typename Types::QGradDataType>>;
};

inline fmha_bwd_args arguments_of(const BackwardParams& from, bool masked)
{
    fmha_bwd_args to{};
    put(from.shape, masked, to);
    to.max_seqlen_k = from.shape.seqlen_k;
    to.scale        = from.shape.scale;
    to.q_ptr        = from.q.data;
    to.k_ptr        = from.k.data;
    to.v_ptr        = from.v.data;
    to.do_ptr       = from.dout.data;
    to.lse_ptr      = from.lse.data;
    to.d_ptr        = from.delta.data;
    to.dk_ptr       = from.dk.data;
    to.dv_ptr       = from.dv.data;
    to.dq_acc_ptr   = from.dq_acc.data;
    put(from.q, to.stride_q, to.nhead_stride_q, to.batch_stride_q);
    put(from.k, to.stride_k, to.nhead_stride_k, to.batch_stride_k);
    put(from.v, to.stride_v, to.nhead_stride_v, to.batch_stride_v);
    put(from.dout, to.stride_do, to.nhead_stride_do, to.batch_stride_do);
    put(from.dk, to.stride_dk, to.nhead_stride_dk, to.batch_stride_dk);
    put(from.dv, to.stride_dv, to.nhead_stride_dv, to.batch_stride_dv);
    put(from.dq_acc, to.stride_dq_acc, to.nhead_stride_dq_acc, to.batch_stride_dq_acc);
    to.split_stride_dq_acc = static_cast<ck_tile::index_t>(from.dq_acc_split);
    to.nhead_stride_lsed   = static_cast<ck_tile::index_t>(from.lse.head);
    to.batch_stride_lsed   = static_cast<ck_tile::index_t>(from.lse.batch);
    to.p_undrop            = 1.f;
    to.drop_seed_offset    = std::make_pair(std::uint64_t{0}, std::uint64_t{0});
    return to;
}

template <typename Config>
Status launch_backward(const BackwardParams& from)
{
    using Kernel                 = typename Backward<Config>::Gradients;
    const fmha_bwd_args to       = arguments_of(from, Config::kMasked);
    const auto [arguments, grid] = fmha_bwd_dq_dk_dv_create_kargs_and_grids<Kernel>(to);
    return launch<Kernel>(arguments, grid, from.shape.stream);
}

} // namespace flash_ck
