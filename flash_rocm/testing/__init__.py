"""Inputs, oracles and error budgets for testing attention.  Shipped, so that users can test their kernels too.

The oracles are naive on purpose and share no code with the back ends: whole score matrices, one
sequence after the other, gradients from autograd, a Philox of their own.

The rule: an output may be off the float64 oracle by at most 2x, a gradient by at most 3x, what the
same naive computation is off when every operation runs in the input dtype, plus one rounding.  Nothing
here is tuned by hand; :class:`Oracle` and :func:`assert_close_to_oracle` say what "one rounding" is.
"""

from __future__ import annotations

from flash_rocm.testing.budgets import BUDGETS, Comparison, assert_attention_close, assert_close_to_oracle
from flash_rocm.testing.cached import (
    CacheCall,
    CacheCase,
    assert_cached_close,
    assert_caches_close,
    make_cache_inputs,
    oracle_cached,
)
from flash_rocm.testing.inputs import EXTRA_ROWS, LAYOUTS, Case, make_inputs, make_problem
from flash_rocm.testing.kvcache import oracle_append, oracle_combine, oracle_gather, oracle_rotary
from flash_rocm.testing.oracle import Oracle, oracle_attention
from flash_rocm.testing.philox import oracle_keep, philox_words

__all__ = [
    "BUDGETS",
    "CacheCall",
    "CacheCase",
    "EXTRA_ROWS",
    "LAYOUTS",
    "Case",
    "Comparison",
    "Oracle",
    "assert_attention_close",
    "assert_cached_close",
    "assert_caches_close",
    "assert_close_to_oracle",
    "make_cache_inputs",
    "make_inputs",
    "make_problem",
    "oracle_append",
    "oracle_attention",
    "oracle_cached",
    "oracle_combine",
    "oracle_gather",
    "oracle_keep",
    "oracle_rotary",
    "philox_words",
]
