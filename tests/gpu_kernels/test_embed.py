from __future__ import annotations

from kernel_cases import COMPILED, close, integers, poisoned, random

from nearfar.gpu_kernels.embed import embed, embed_reference


def test_rows_of_a_table_here_and_on_the_host() -> None:
    table = random(7, 1300)
    for home in (table, table.cpu().pin_memory()) if COMPILED else (table,):
        got, want = poisoned(3, 1300), poisoned(3, 1300)
        embed(home, integers(6, 0, 6), got)
        embed_reference(home, integers(6, 0, 6), want)
        close(got, want, rtol=0, atol=0)
