from __future__ import annotations

import itertools
import random
from functools import partial

import pytest
import torch

from nearfar.records import Geometry
from nearfar.runtime.memory.near_store import GROWTH_TOKENS, NearLayer, new_near_layer

GEOMETRY = Geometry(layers=1, query_heads=6, kv_heads=3, head_dim=5)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)
PLACE = (torch.float32, torch.device("cpu"))
# a token of one head: its position, its key, its value and its score
Rows = list[list[tuple[int, float, float, float]]]


def new_layer(capacity: int = 7, dtype: torch.dtype = torch.float32) -> NearLayer:
    place = (dtype, torch.device("cpu"))
    return new_near_layer(GEOMETRY, capacity, place, with_positions=True, with_scores=True)


def extend(layer: NearLayer, count: int, first: int) -> None:
    """Add tokens whose keys and values can be told apart by head and position."""
    marks = torch.arange(first, first + count).float() + torch.tensor([[0.0], [0.25], [0.5]])
    keys = marks[..., None].expand(3, count, 5)
    layer.extend(keys, -keys, first)


def rows(layer: NearLayer) -> Rows:
    """What the layer holds, head by head, in the order of its slots."""
    assert layer.positions is not None
    assert layer.scores is not None
    assert layer.keys.shape == layer.values.shape == (3, layer.length, 5)
    equal(layer.keys, layer.keys[..., :1].expand(3, -1, 5))
    equal(layer.values, layer.values[..., :1].expand(3, -1, 5))
    return [
        [
            (
                int(layer.positions[head, slot]),
                float(layer.keys[head, slot, 0]),
                float(layer.values[head, slot, 0]),
                float(layer.scores[head, slot]),
            )
            for slot in range(layer.length)
        ]
        for head in range(3)
    ]


def expected(positions: list[list[int]]) -> Rows:
    """The rows of ``positions`` [Hkv][N] that have no score yet."""
    return [
        [(p, p + head / 4, -p - head / 4, 0.0) for p in head_positions]
        for head, head_positions in enumerate(positions)
    ]


def test_tokens_come_in_order_with_positions_and_no_score() -> None:
    layer = new_layer()
    assert rows(layer) == [[], [], []]
    for count, first in ((1, 0), (3, 1), (2, 4)):
        extend(layer, count, first)
    assert rows(layer) == expected([list(range(6))] * 3)


def test_rows_are_those_a_kernel_reads() -> None:
    layer = new_layer()
    extend(layer, 4, 0)
    view = layer.view()
    assert view.rows is layer.rows
    equal(view.keys(), layer.keys)
    equal(view.values(), layer.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_growing_keeps_what_is_there(dtype: torch.dtype) -> None:
    layer = new_layer(capacity=2, dtype=dtype)
    for first in range(0, 300, 3):
        extend(layer, 3, first)
    wanted = torch.arange(300).float() + torch.tensor([[0.0], [0.25], [0.5]])
    equal(layer.keys[..., 0], wanted.to(dtype))
    assert layer.rows.dtype == dtype
    assert layer.positions is not None
    equal(layer.positions[:, :300], torch.arange(300).expand(3, -1))


def test_growing_is_by_steps_and_for_a_long_text_at_once() -> None:
    layer = new_layer(capacity=8)
    extend(layer, 8, 0)
    assert layer.rows.shape[1] == 8
    extend(layer, 1, 8)
    assert layer.rows.shape[1] == 8 + GROWTH_TOKENS
    extend(layer, 5000, 9)
    assert layer.rows.shape[1] == 5016  # whole eights
    extend(layer, 7, 5009)
    assert layer.rows.shape[1] == 5016
    extend(layer, 1, 5016)
    assert layer.rows.shape[1] == 5016 + 5016 // 8 + 5


def test_dropping_one_puts_the_newest_in_its_place() -> None:
    layer = new_layer()
    extend(layer, 5, 0)
    layer.drop(torch.tensor([[0], [2], [4]]))
    assert rows(layer) == expected([[4, 1, 2, 3], [0, 1, 4, 3], [0, 1, 2, 3]])


def test_dropping_many_keeps_the_order_and_gives_memory_back() -> None:
    layer = new_layer()
    extend(layer, 1000, 0)
    keep = [[0, 1, 999], [5, 6, 7], [0, 500, 998]]
    victims = [[p for p in range(1000) if p not in kept] for kept in keep]
    layer.drop(torch.tensor(victims).flip(1))
    assert rows(layer) == expected(keep)
    assert layer.rows.shape[1] == 3
    extend(layer, 1, 1000)
    assert rows(layer) == expected([[*kept, 1000] for kept in keep])


def test_dropping_a_question_leaves_rows_where_they_are() -> None:
    layer = new_layer()
    extend(layer, 1000, 0)
    layer.drop(torch.arange(700).expand(3, -1))
    extend(layer, 1, 1000)  # makes room to grow
    before, place = layer.moves, layer.rows.data_ptr()
    extend(layer, 50, 1001)
    victims = [list(range(first, 51 + first)) for first in (0, 7, 250)]
    layer.drop(torch.tensor(victims), in_place=True)
    all_of = [*range(700, 1051)]
    assert rows(layer) == expected([all_of[:a] + all_of[a + 51 :] for a in (0, 7, 250)])
    assert (layer.moves, layer.rows.data_ptr()) == (before, place)
    layer.drop(torch.arange(2).expand(3, -1))
    assert layer.rows.shape[1] == 298


def test_dropping_none_changes_nothing() -> None:
    layer = new_layer()
    extend(layer, 3, 0)
    layer.drop(torch.empty(3, 0).long())
    assert rows(layer) == expected([[0, 1, 2]] * 3)


@pytest.mark.parametrize(("start", "stop"), list(itertools.combinations(range(7), 2)))
def test_dropping_a_range_closes_the_gap(start: int, stop: int) -> None:
    layer = new_layer()
    extend(layer, 6, 0)
    layer.drop_range(start, stop)
    assert rows(layer) == expected([[p for p in range(6) if not start <= p < stop]] * 3)


def test_layer_without_positions_and_scores_has_neither() -> None:
    layer = new_near_layer(GEOMETRY, 2, PLACE, with_positions=False, with_scores=False)
    extend(layer, 9, 0)
    saved = layer.snapshot()
    layer.drop_range(1, 8)
    equal(layer.keys[0, :, 0], torch.tensor([0.0, 8.0]))
    layer.restore(saved)
    equal(layer.values[2, :, 0], -torch.arange(9.0) - 0.5)
    assert layer.positions is layer.scores is None


@pytest.mark.parametrize("seed", range(5))
def test_any_history_equals_lists(seed: int) -> None:
    """Random steps, each also done to plain lists; snapshots are taken and returned to."""
    generator = random.Random(seed)
    layer, wanted = new_layer(capacity=1), expected([[], [], []])
    saved: tuple[NearLayer, Rows] = layer.snapshot(), wanted
    position = 0
    for _ in range(60):
        length = layer.length
        step = generator.choice(["extend", "extend", "one", "many", "range", "score", "save", "go"])
        if step == "extend":
            count = generator.randint(1, 9)
            extend(layer, count, position)
            new = expected([list(range(position, position + count))] * 3)
            wanted = [[*old, *more] for old, more in zip(wanted, new, strict=True)]
            position += count
        elif step == "one" and length:
            slots = [generator.randrange(length) for _ in range(3)]
            layer.drop(torch.tensor(slots)[:, None])
            wanted = [
                [*old[:slot], old[-1], *old[slot + 1 : -1]] if slot < length - 1 else old[:-1]
                for old, slot in zip(wanted, slots, strict=True)
            ]
        elif step == "many" and length > 1:
            many = [generator.sample(range(length), length // 2 + 1) for _ in range(3)]
            layer.drop(torch.tensor(many))
            if length // 2 + 1 > 1:
                wanted = [
                    [row for slot, row in enumerate(old) if slot not in gone]
                    for old, gone in zip(wanted, many, strict=True)
                ]
        elif step == "range" and length:
            start, stop = sorted(generator.choices(range(length + 1), k=2))
            layer.drop_range(start, stop)
            wanted = [old[:start] + old[stop:] for old in wanted]
        elif step == "score" and layer.scores is not None:
            layer.scores[:, :length] += 0.5
            wanted = [[(p, k, v, s + 0.5) for p, k, v, s in old] for old in wanted]
        elif step == "save":
            saved = layer.snapshot(), wanted
        elif step == "go":
            layer.restore(saved[0])
            wanted = saved[1]
        assert rows(layer) == wanted, step


def test_a_first_prompt_is_held_where_it_lies_and_a_later_one_copied() -> None:
    rows = torch.randn(2, 104, 16)  # whole eights, as prefill makes them
    prompt = rows[:, :99]
    layer = new_near_layer(Geometry(1, 2, 2, 8), 40, PLACE, with_positions=True, with_scores=True)
    layer.take_prompt(prompt[..., :8], prompt[..., 8:], 7)
    assert layer.rows.data_ptr() == rows.data_ptr()
    assert layer.rows.is_contiguous()
    assert layer.positions is not None
    assert layer.scores is not None
    assert layer.positions[:, :99].tolist() == [list(range(7, 106))] * 2
    assert not layer.scores[:, :99].any()
    more = torch.randn(2, 104, 16)
    more[:, :99] = rows[:, :99]
    layer.take_prompt(more[..., :8], more[..., 8:], 106)
    assert layer.length == 104
    torch.testing.assert_close(layer.keys, more[..., :8], rtol=0, atol=0)
    assert layer.positions[0, 98:104].tolist() == [105, 106, 107, 108, 109, 110]


def test_rows_that_are_part_of_another_array_are_copied() -> None:
    larger = torch.randn(2, 200, 16)
    layer = new_near_layer(Geometry(1, 2, 2, 8), 40, PLACE, with_positions=False, with_scores=False)
    layer.take_prompt(larger[:, :96, :8], larger[:, :96, 8:], 0)
    assert layer.rows.data_ptr() != larger.data_ptr()
    torch.testing.assert_close(layer.values, larger[:, :96, 8:], rtol=0, atol=0)
