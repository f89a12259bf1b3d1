"""What may stand where a number, a name or a mapping is expected."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

NUMBERS: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([0, -1, 1, 0.0, -0.5, 2.0**-150, 1e39, 2**31, 2**63, 2**64, 10**400, -(10**400)]),
    st.just(5000).map(lambda digits: 10**digits),  # has no repr since Python 3.11
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(),
    st.floats(),
    st.booleans(),
)
PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | NUMBERS | st.text(max_size=6) | st.sampled_from(["nan", "1e-3", "FP16", "Dynamic", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
ANYTHING: st.SearchStrategy[Any] = PLAIN | st.sampled_from(
    [b"x", 1j, (1,), {1}, object(), np.ones(2), np.float32(2), torch.ones(2), torch.tensor(math.nan)]
)
"""Also what no file can hold."""
