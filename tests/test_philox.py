from __future__ import annotations

import pytest
import torch

from perturbcore.kernels.common import reference

numba_cpu = pytest.importorskip("perturbcore.kernels.common.numba_cpu")

# the known answers of Random123: counter and key all zeros, all ones, digits of pi
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 7, 2**40 + 3, -1]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_known_answers(key, counter, words):
    tensors = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(w) for w in reference.philox(key, tensors)) == words
    assert tuple(numba_cpu.philox(*key, *counter)) == words


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numba_draws_the_numbers_of_the_reference(seed, dtype):
    row, first = 5, 8
    expected = reference.logistic(seed, torch.tensor(row), torch.arange(first, first + 4000), torch.float64)
    out = torch.empty(4000, dtype=dtype)
    numba_cpu.logistic_row(seed, row, first, out.numpy())
    torch.testing.assert_close(out.double(), expected, rtol=2e-7 if dtype == torch.float32 else 1e-13, atol=5e-7)
    single = [numba_cpu.logistic_at(seed, row, first + j, out.numpy().dtype.type) for j in range(9)]
    assert single == out[:9].tolist()


def test_layout_is_word_j_mod_4_of_block_j_div_4():
    block = reference.philox((9, 0), tuple(torch.tensor([c]) for c in (2, 3, 0, 0)))
    assert reference.words(9, torch.tensor(3), torch.arange(8, 12)).tolist() == [int(w) for w in block]


def test_noise_is_standard_logistic_and_finite_at_both_ends():
    noise = reference.logistic(1, torch.arange(20)[:, None], torch.arange(20_000)[None], torch.float32).double()
    uniform = torch.sigmoid(noise).flatten().sort().values
    steps = (torch.arange(uniform.numel()) + 0.5) / uniform.numel()
    assert (uniform - steps).abs().max() < 1.95 / uniform.numel() ** 0.5  # Kolmogorov, p = .001
    assert abs(float((noise[0] * noise[1]).mean())) < 0.1  # rows are independent; the standard error is .023
    ends = torch.tensor([0, 2**32 - 1])
    odd = (ends >> 8) * 2 + 1
    assert torch.log(odd.float() / (2**25 - odd).float()).tolist() == pytest.approx([-25 * 0.6931472, 25 * 0.6931472])


def test_rows_columns_and_seeds_give_other_numbers():
    column = torch.arange(64)
    draws = [reference.words(seed, torch.tensor(row), column) for seed in (0, 1, 2**32) for row in (0, 1)]
    assert torch.cat(draws).unique().numel() == 6 * 64


def test_elementary_functions_in_float32():
    x = torch.linspace(-80, 80, 20_001)
    ratio = torch.tensor([numba_cpu_exp(v) for v in x.tolist()]).double() / x.double().exp()
    assert (ratio - 1).abs().max() < 2e-7
    for value, expected in ((float("nan"), "nan"), (200.0, "inf"), (-200.0, "0.0"), (float("-inf"), "0.0")):
        assert str(float(numba_cpu_exp(value))) == expected
    y = torch.linspace(-17, 17, 20_001).exp()
    logs = torch.tensor([numba_cpu_log(v) for v in y.tolist()]).double()
    assert ((logs - y.double().log()).abs() / y.double().log().abs().clamp(min=1)).max() < 2e-7


@numba_cpu.inner
def _exp(x):
    return numba_cpu.exp(x)


@numba_cpu.inner
def _log(x):
    return numba_cpu.log(x)


def numba_cpu_exp(x):
    return _exp(torch.tensor(x).numpy()[()])


def numba_cpu_log(x):
    return _log(torch.tensor(x).numpy()[()])
