"""The convolution over a stretch, and over one token, against float64 beside TORCH."""

import pytest
import torch
from checks import DTYPES, assert_no_worse, normal, strided
from falcon_h1r_kernels import conv1d, conv1d_step
from falcon_h1r_kernels.conv1d import _causal_conv1d_op, causal_conv1d
from falcon_h1r_kernels.conv1d_step import _causal_conv1d_step_op, causal_conv1d_step
from layouts import far_apart, inside_projection

from falcon_h1r.ops import REFERENCE, TORCH


def inputs(b, l, c, w, dtype=torch.float32):
    x, weight = normal(b, l, c, dtype=dtype), normal(c, w, seed=1, dtype=dtype)
    bias, window = normal(c, seed=2, dtype=dtype), normal(b, w - 1, c, seed=3, dtype=dtype)
    return x, weight, bias, window


def double(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def check(x, weight, bias=None, config="", **options):
    """Beside REFERENCE in x's dtype: TORCH's convolution is no other maths, and fuses its roundings
    in some builds only."""
    found, window = causal_conv1d(x, weight, bias, config=config, **options)
    independent, _ = REFERENCE.causal_conv1d(x, weight, bias, **options)
    exact, exact_window = REFERENCE.causal_conv1d(
        double(x), double(weight), double(bias), **{k: double(v) for k, v in options.items()}
    )
    assert_no_worse(found, independent, exact)
    assert torch.equal(window, exact_window.to(x.dtype))


@pytest.mark.parametrize("with_window", [False, True])
@pytest.mark.parametrize("l", [1, 2, 3, 7, 8, 9, 31, 32, 33, 70])
def test_lengths_around_the_blocks(l, with_window):
    x, weight, bias, window = inputs(2, l, 200, 4)
    check(x, weight, bias, initial_window_bvc=window if with_window else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l, with_window", [(1, True), (9, False), (33, True)])
def test_dtypes(l, with_window, dtype):
    x, weight, bias, window = inputs(2, l, 200, 4, dtype)
    check(x, weight, bias, initial_window_bvc=window if with_window else None)


@pytest.mark.parametrize("w", range(1, 9))
def test_any_number_of_taps(w):
    x, weight, bias, window = inputs(2, 11, 200, w)
    check(x, weight, None, initial_window_bvc=window)
    check(x, weight, bias, lengths_b=torch.tensor([4, 11]))


@pytest.mark.parametrize("l", [1, 2, 9, 40])
def test_rows_of_different_length(l):
    # Rows shorter than the window take the rest of theirs from the initial one.
    lengths = torch.tensor([0, 1, 2, 3, l])[:, None].minimum(torch.tensor(l)).flatten()
    x, weight, bias, window = inputs(5, l, 200, 4)
    for given in (None, window):
        given_lengths = lengths if given is None else lengths.int()
        check(x, weight, bias, initial_window_bvc=given, lengths_b=given_lengths)


def documents(*lengths_per_row):
    rows = [
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        for lengths in lengths_per_row
    ]
    return torch.stack(rows) * 3 + 5  # any numbers that do not decrease


@pytest.mark.parametrize(
    "w, dtype", [(1, DTYPES[0]), (2, DTYPES[2]), (4, DTYPES[1]), (8, DTYPES[0])]
)
def test_packed_documents(w, dtype):
    # Of 1 and 2 samples, shorter than the history, across a segment's border and at its edges.
    seq_idx = documents([1, 1, 2, 3, 23, 1, 8, 1], [40], [8, 24, 7, 1], [31, 2, 1, 6])
    x, weight, bias, window = inputs(4, 40, 100, w, dtype)
    for given in (None, window):
        check(x, weight, bias, initial_window_bvc=given, seq_idx_bl=seq_idx)


def test_packed_documents_of_rows_of_different_length():
    seq_idx = documents([1, 1, 2, 3, 3], [10], [4, 6], [9, 1]).repeat_interleave(4, dim=0)
    lengths = torch.tensor([0, 1, 2, 3, 0, 2, 5, 10, 0, 4, 5, 6, 0, 8, 9, 10])
    x, weight, bias, window = inputs(16, 10, 60, 4)
    for given in (None, window):
        check(
            x, weight, bias, initial_window_bvc=given, lengths_b=lengths, seq_idx_bl=seq_idx.int()
        )


def test_documents_do_not_hide_each_other():
    # What lies in another document may be anything at all.
    seq_idx = documents([5, 7])
    x, weight, bias, _ = inputs(1, 12, 24, 4)
    expected, _ = causal_conv1d(x, weight, bias, seq_idx_bl=seq_idx)
    x[:, :5] = torch.nan
    found, window = causal_conv1d(x, weight, bias, seq_idx_bl=seq_idx)
    assert torch.equal(found[:, 5:], expected[:, 5:]) and torch.equal(window, x[:, -3:])


def test_window_of_another_dtype_is_rounded():
    x, weight, bias, _ = inputs(2, 5, 24, 4, torch.float16)
    window = normal(2, 3, 24, seed=3)
    found = causal_conv1d(x, weight, bias, initial_window_bvc=window)
    expected = causal_conv1d(x, weight, bias, initial_window_bvc=window.half())
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_strided_and_offset_inputs():
    x, weight, bias, window = inputs(3, 10, 48, 4)
    seq_idx = documents([4, 6], [10], [2, 8])
    options = {"lengths_b": torch.tensor([10, 7, 1]), "seq_idx_bl": seq_idx}
    expected = causal_conv1d(x, weight, bias, initial_window_bvc=window, **options)
    options = {
        "lengths_b": torch.tensor([10, 0, 7, 0, 1, 0])[::2],
        "seq_idx_bl": seq_idx.T.contiguous().T,
    }
    for make in (*strided(x), lambda t: inside_projection(t, 16, 8)):
        found = causal_conv1d(
            make(x), make(weight), make(bias), initial_window_bvc=make(window), **options
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_rows_that_lie_2_to_the_30_apart():
    x, weight, bias, window = inputs(3, 3, 8, 4, torch.float16)
    expected = causal_conv1d(x, weight, bias, initial_window_bvc=window)
    far = causal_conv1d(far_apart(x), weight, bias, initial_window_bvc=far_apart(window))
    assert all(torch.equal(a, b) for a, b in zip(far, expected))
    x_far, window_far = (far_apart(t.transpose(0, 1)).transpose(0, 1) for t in (x, window))
    far = causal_conv1d(x_far, weight, bias, initial_window_bvc=window_far)
    assert all(torch.equal(a, b) for a, b in zip(far, expected))


@pytest.mark.parametrize("config", conv1d.CONFIGS, ids=lambda config: config.name)
def test_every_configuration_at_real_width(config):
    x, weight, bias, window = inputs(1, 35, 3584, 4, config.dtypes[0])
    x = inside_projection(x, 3072, 24)
    check(x, weight, bias, config.name, initial_window_bvc=window)


def test_default_configuration_of_long_stretches():
    check(*inputs(1, 1030, 16, 4, torch.bfloat16)[:3])


def test_nothing_to_do():
    x, weight, bias, window = inputs(0, 5, 8, 4)
    y, final = causal_conv1d(x, weight, bias)
    assert y.shape == (0, 5, 8) and final.shape == (0, 3, 8)
    y, final = causal_conv1d(normal(2, 0, 8), weight, bias, initial_window_bvc=normal(2, 3, 8))
    assert y.shape == (2, 0, 8) and torch.equal(final, normal(2, 3, 8))


def check_step(x, window, weight, bias=None, **extra):
    expected_window, exact_window = window.clone(), window.double()
    torchs = TORCH.causal_conv1d_step(x, expected_window, weight, bias)
    exact = REFERENCE.causal_conv1d_step(double(x), exact_window, double(weight), double(bias))
    found = causal_conv1d_step(x, window, weight, bias, **extra)
    assert_no_worse(found, torchs, exact)
    assert torch.equal(window, expected_window)


@pytest.mark.parametrize("w, dtype", [(w, DTYPES[w % 3]) for w in range(1, 9)] + [(4, DTYPES[0])])
def test_step_with_any_number_of_taps(w, dtype):
    x, weight, bias, window = inputs(3, 1, 300, w, dtype)
    check_step(x[:, 0], window.clone(), weight)
    check_step(x[:, 0], window, weight, bias)


@pytest.mark.parametrize("c", [1, 127, 128, 129, 300])
def test_step_with_channels_around_the_block(c):
    x, weight, bias, window = inputs(2, 1, c, 4)
    check_step(x[:, 0], window, weight, bias)


def test_step_on_a_layer_of_a_strided_cache():
    cache = normal(3, 2, 3, 40, seed=4, dtype=torch.bfloat16)
    before = cache.clone()
    x, weight, bias, _ = inputs(2, 1, 40, 4, torch.bfloat16)
    check_step(inside_projection(x, 16, 8)[:, 0], cache[1], weight, bias)
    assert torch.equal(cache[0], before[0]) and torch.equal(cache[2], before[2])
    for make in strided(cache[1]):
        check_step(x[:, 0], make(cache[1]), make(weight), make(bias))


def test_step_with_a_window_of_another_dtype():
    x, weight, bias, window = inputs(2, 1, 40, 4)
    check_step(x[:, 0].bfloat16(), window.bfloat16().float(), weight, bias)
    narrow, y = window.bfloat16(), x[:, 0]
    found = causal_conv1d_step(y, narrow, weight, bias)
    rounded = window.bfloat16()
    expected = causal_conv1d_step(y.bfloat16().float(), rounded, weight, bias)
    assert torch.equal(found, expected) and torch.equal(narrow, rounded)


def test_step_of_rows_that_lie_2_to_the_30_apart():
    x, weight, bias, window = inputs(3, 1, 8, 4, torch.float16)
    check_step(far_apart(x)[:, 0], far_apart(window), weight, bias)


def test_steps_continue_a_stretch():
    x, weight, bias, window = inputs(2, 9, 24, 4)
    expected, expected_window = causal_conv1d(x, weight, bias, initial_window_bvc=window)
    _, window = causal_conv1d(x[:, :4], weight, bias, initial_window_bvc=window)
    for t in range(4, 9):
        y = causal_conv1d_step(x[:, t], window, weight, bias)
        assert torch.allclose(y, expected[:, t], rtol=1e-6, atol=1e-7)
    assert torch.equal(window, expected_window)


@pytest.mark.parametrize("config", conv1d_step.CONFIGS, ids=lambda config: config.name)
def test_every_step_configuration_at_real_width(config):
    x, weight, bias, window = inputs(2, 1, 3584, 4, config.dtypes[0])
    x = inside_projection(x, 3072, 24)
    check_step(x[:, 0], window, weight, bias, config=config.name)


def test_operator_registration():
    x, weight, bias, window = inputs(2, 5, 8, 4)
    rest = (torch.tensor([5, 3]), documents([2, 3], [5, 0]), "")
    torch.library.opcheck(_causal_conv1d_op, (x, weight, bias, window, *rest))
    torch.library.opcheck(_causal_conv1d_op, (x, weight, None, None, None, None, ""))
    torch.library.opcheck(_causal_conv1d_step_op, (x[:, 0], window, weight, bias, ""))


def test_a_length_beyond_the_row_is_the_row():
    x, weight, bias, _ = inputs(2, 5, 8, 4)
    beyond = causal_conv1d(x, weight, bias, lengths_b=torch.tensor([9, 5]))
    whole = causal_conv1d(x, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(beyond, whole))


def test_refusals():
    x, weight, bias, window = inputs(2, 5, 8, 4)
    step = causal_conv1d_step
    for call, words in (
        (lambda: causal_conv1d(x, normal(8, 9)), "1 to 8 taps"),
        (lambda: causal_conv1d(x, normal(7, 4)), "expected \\(8, "),
        (lambda: causal_conv1d(x, weight, normal(7)), "bias is \\(7,\\)"),
        (lambda: causal_conv1d(x, weight, initial_window_bvc=x), "initial window is \\(2, 5"),
        (lambda: causal_conv1d(x, weight, lengths_b=torch.tensor([1])), "lengths is \\(1,\\)"),
        (lambda: causal_conv1d(x, weight, lengths_b=torch.ones(2)), "lengths is .* torch.float32"),
        (lambda: causal_conv1d(x, weight, seq_idx_bl=torch.ones(2, 4)), "seq_idx is \\(2, 4\\)"),
        (lambda: causal_conv1d(x[0], weight), "expected \\(b, l, c\\)"),
        (lambda: causal_conv1d(x.double(), weight), "float64"),
        (lambda: causal_conv1d(x, weight, config="segment8"), "there are: channels256"),
        (lambda: step(x[:, 0], x, weight), "window is \\(2, 5, 8\\)"),
        (lambda: step(x[:, 0], window.double(), weight), "float64"),
        (lambda: step(x[:, 0], window[:1].expand(2, -1, -1), weight), "window is expanded"),
        (lambda: step(x[:, 0].double(), window, weight), "float64"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
