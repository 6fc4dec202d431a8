"""The table of instructions: base mnemonic to the function that compiles one, and names that changed."""

from __future__ import annotations

import re
from collections.abc import Callable

from .builder import Builder, Handler

Factory = Callable[[Builder], Handler]

FACTORIES: dict[str, Factory] = {}

_SUFFIX = re.compile(r"_(e32|e64_dpp|e64|dpp8?|sdwa)$")

#: Names of gfx10 to gfx12 (and of gfx90a) for what other chips call differently; the operands are the same.
ALIASES = {
    "v_add_nc_u32": "v_add_u32",
    "v_sub_nc_u32": "v_sub_u32",
    "v_subrev_nc_u32": "v_subrev_u32",
    "v_add_nc_i32": "v_add_i32",
    "v_sub_nc_i32": "v_sub_i32",
    "v_add_nc_u16": "v_add_u16",
    "v_sub_nc_u16": "v_sub_u16",
    "v_add_co_ci_u32": "v_addc_co_u32",
    "v_sub_co_ci_u32": "v_subb_co_u32",
    "v_max_num_f32": "v_max_f32",
    "v_min_num_f32": "v_min_f32",
    "v_max_num_f16": "v_max_f16",
    "v_min_num_f16": "v_min_f16",
    "v_max3_num_f32": "v_max3_f32",
    "v_min3_num_f32": "v_min3_f32",
    "v_max_num_f64": "v_max_f64",
    "v_min_num_f64": "v_min_f64",
    "v_mad_co_u64_u32": "v_mad_u64_u32",
    "v_mad_co_i64_i32": "v_mad_i64_i32",
    "v_cvt_pk_rtz_f16_f32": "v_cvt_pkrtz_f16_f32",
    "s_add_co_i32": "s_add_i32",
    "s_sub_co_i32": "s_sub_i32",
    "s_add_co_u32": "s_add_u32",
    "s_sub_co_u32": "s_sub_u32",
    "s_add_co_ci_u32": "s_addc_u32",
    "s_sub_co_ci_u32": "s_subb_u32",
    "s_and_not1_b32": "s_andn2_b32",
    "s_and_not1_b64": "s_andn2_b64",
    "s_or_not1_b32": "s_orn2_b32",
    "s_or_not1_b64": "s_orn2_b64",
    "s_ctz_i32_b32": "s_ff1_i32_b32",
    "s_ctz_i32_b64": "s_ff1_i32_b64",
    "s_clz_i32_u32": "s_flbit_i32_b32",
    "s_clz_i32_u64": "s_flbit_i32_b64",
    "s_addk_co_i32": "s_addk_i32",
}


def register(*names: str) -> Callable[[Factory], Factory]:
    """Decorator: the function compiles these mnemonics."""

    def add(factory: Factory) -> Factory:
        for name in names:
            if name in FACTORIES:
                raise ValueError(f"{name} is registered twice")
            FACTORIES[name] = factory
        return factory

    return add


def base_name(mnemonic: str) -> str:
    """Mnemonic without encoding suffix, under the name the table has."""
    name = _SUFFIX.sub("", mnemonic)
    return ALIASES.get(name, name)
