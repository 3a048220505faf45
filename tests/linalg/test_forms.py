"""Which form takes fewer operations. Oracle: torch's counter of the products of what really runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_symopt.linalg.forms import ACCURATE, SMALL, Form, choose_form, form_operations, plain
from lit_symopt.linalg.low_precision import QUINTICS, STEPS
from lit_symopt.linalg.newton_schulz import iterate
from tests.matrices import generator

FORMS: list[Form] = [plain(5), (2, 1, 2), (2, 2, 1), (2, 3), (3, 2), (4, 1), (5,), (1,), (2,)]


def counted(form: Form, count: int, m: int, n: int) -> int:
    x = torch.randn(count, m, n, generator=generator(0)).bfloat16()
    with FlopCounterMode(display=False) as counter:
        iterate(x, (*QUINTICS, *QUINTICS)[: sum(form)], form=form)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 11, 5), (2, 4, 9), (1, 6, 1), (1, 1, 1)])
def test_a_form_takes_the_operations_that_torch_counts(form: Form, shape: tuple[int, int, int]) -> None:
    count, m, n = shape
    assert counted(form, *shape) == count * form_operations(form, m=m, n=n)


@pytest.mark.parametrize("dtype", ACCURATE)
@pytest.mark.parametrize(("m", "n"), [(64, 64), (64, 95), (64, 97), (130, 64), (64, 192), (320, 64)])
def test_no_accurate_form_would_have_taken_fewer_counted_operations(m: int, n: int, dtype: torch.dtype) -> None:
    chosen = choose_form(m, n, steps=5, dtype=dtype)
    counts = {form: counted(form, 1, m, n) for form in ACCURATE[dtype][5]}
    assert chosen in counts
    assert counts[chosen] == min(counts.values())
    assert (chosen == plain(5)) == (2 * max(m, n) <= 3 * min(m, n))


def test_the_gram_form_saves_what_the_table_says() -> None:
    side = SMALL
    for ratio, row in {2: (50, 46, 44, 42), 3: (70, 58, 52, 46), 4: (90, 70, 60, 50)}.items():
        forms: tuple[Form, ...] = (plain(5), (2, 1, 2), (3, 2), (5,))
        assert tuple(form_operations(form, m=ratio * side, n=side) / side**3 for form in forms) == row


def test_every_form_of_the_choice_has_as_many_steps_as_asked_for() -> None:
    for dtype in (*ACCURATE, torch.float64):
        for steps in range(1, 9):
            for m, n in ((64, 64), (1000, 64), (64, 1000), (4, 400)):
                assert sum(choose_form(m, n, steps=steps, dtype=dtype)) == steps
    assert all(sum(form) == STEPS for forms in ACCURATE.values() for form in forms[STEPS])


def test_small_matrices_and_numbers_of_steps_that_nobody_measured_take_the_plain_form() -> None:
    assert choose_form(SMALL - 1, 10 * SMALL, steps=5) == plain(5)
    assert choose_form(SMALL, 10 * SMALL, steps=7) == plain(7)
