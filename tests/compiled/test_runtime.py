"""The C runtime by itself."""

import ctypes
from itertools import product

import pytest
import torch

from segnn_ase.compiled.runtime import SLOTS, CStep, Op, Slot, load_runtime

INNER = 7


def slot(x: torch.Tensor | None) -> Slot:
    return Slot(None, 0, 0, 0, 0) if x is None else Slot(x.data_ptr(), 0, 0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_any_number_of_rows_and_columns(dtype):
    """Blocks of rows of every size, panels of every width, whole and in part."""
    runtime, generator = load_runtime(dtype), torch.Generator().manual_seed(0)
    w, tolerance = runtime.width, 1e-5 if dtype is torch.float32 else 1e-13
    columns = (1, w, 2 * w, 2 * w + 1, 3 * w, 4 * w, 5 * w - 1)
    for rows, n, given, add in product(range(1, 20), columns, (False, True), (False, True)):
        a, b, bias, d, c = (
            torch.randn(*shape, dtype=dtype, generator=generator)
            for shape in ((rows, INNER), (INNER, n), (1, n), (rows, n), (rows, n))
        )
        right = a @ b + given * (bias + d) + add * c
        panels, packed_bias = (torch.zeros(k * -(-n // w) * w, dtype=dtype) for k in (INNER, 1))
        for x, out in ((b, panels), (bias, packed_bias)):
            runtime.pack(len(x), n, x.data_ptr(), n, 1, 1.0, out.data_ptr())
        slots = [slot(x) for x in (a, panels, packed_bias if given else None, d if given else None, c)]
        strides = {"a_stride": INNER, "d_stride": n, "c_stride": n}
        sizes = {"n_in": 4, "n_out": 1, "rows": rows, "inner": INNER, "outer": n, "add": add}
        step = CStep(op=Op.PRODUCT, **sizes, **strides, slots=(Slot * SLOTS)(*slots))
        runtime.run_nodes(ctypes.byref(step), 1, 1, 1, None)
        torch.testing.assert_close(c, right, rtol=0, atol=tolerance)
