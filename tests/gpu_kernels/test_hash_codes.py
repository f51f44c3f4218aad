from __future__ import annotations

import pytest
import torch
from kernel_cases import COMPILED, DEVICE, poisoned, random

from nearfar.gpu_kernels.hash_codes import hash_codes, hash_codes_reference
from nearfar.lsh.projections import random_projections


@pytest.mark.parametrize(("bits", "tables", "D"), [(10, 3, 64), (16, 2, 80), (1, 5, 128)])
def test_codes_are_those_of_the_reference_and_of_the_host(bits: int, tables: int, D: int) -> None:
    projections = random_projections(D, bits, tables, seed=1)
    keys, centre = random(2, 70, D), random(2, D, seed=5)
    planes = projections.planes.to(DEVICE)
    got = poisoned(2, tables, 70, dtype=torch.int16)
    want = got.clone()
    hash_codes(keys, centre, planes, bits, got)
    hash_codes_reference(keys, centre, planes, bits, want)
    # a projection within rounding of zero may fall to either side
    share = 0.02 if COMPILED else 0.002  # a code is wrong if one of its bits is
    assert (got != want).float().mean() < share
    host = projections.codes((keys[1] - centre[1]).cpu())
    assert (got[1].cpu().numpy().view("uint16") != host).mean() < share
