"""Log-probability, entropy and top-k mean against float64, beside torch in float32."""

import interpret
import pytest
import torch
from checks import DTYPES, FACTOR, ROUNDOFF, assert_same, normal, strided
from falcon_h1r_kernels.logprob import CONFIGS, MAX_VOCABULARY, LogProb, _logprob_op, logprob
from layouts import far_apart

NAMES = [config.name for config in CONFIGS]


def reference(logits_mv, chosen_m, *, k=20, multiplier=1.0, dtype=torch.float64):
    """The three numbers by their definitions, in `dtype`."""
    logp = (logits_mv.to(dtype) * multiplier).log_softmax(1)
    entropy = torch.special.entr(logp.exp()).sum(1)
    return LogProb(
        logp.gather(1, chosen_m.long()[:, None])[:, 0], entropy, logp.topk(k).values.mean(1)
    )


def draw(m, v, scale=3.0, dtype=torch.float32):
    chosen = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(3))
    return (normal(m, v) * scale).to(dtype), chosen


def check(logits, chosen, config="", **options):
    """At most twice torch's error at the worst row.

    A few rows can be lucky, so two roundoffs of the largest number that enters the differences are
    allowed in any case.
    """
    found = logprob(logits, chosen, config=config, **options)
    exact = reference(logits, chosen, **options)
    plain = reference(logits, chosen, **options, dtype=torch.float32)
    largest = logits[logits.isfinite()].abs().max() * options.get("multiplier", 1.0)
    floor = FACTOR * ROUNDOFF[torch.float32] * max(1.0, float(largest))
    for name, a, b, c in zip(LogProb._fields, found, plain, exact):
        assert a.dtype is torch.float32 and a.shape == c.shape, name
        finite = c.isfinite()
        assert torch.equal(a[~finite].double(), c[~finite]), name
        a, b, c = a[finite].double(), b[finite].double(), c[finite]
        allowed = max(FACTOR * float((b - c).abs().max()), floor) if len(c) else 0
        assert ((a - c).abs() <= allowed).all(), name
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 2, 63, 64, 65, 1023, 1024, 1025, 9000])
def test_vocabularies(v, dtype):
    check(*draw(3, v, dtype=dtype), k=min(20, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 33, 64])
def test_k(k, dtype):
    for v in (64, 2500):
        check(*draw(2, v, dtype=dtype), k=k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", NAMES)
def test_every_configuration(config, dtype):
    check(*draw(2, 20000, dtype=dtype), config=config, multiplier=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_vocabulary(dtype):
    check(*draw(2, 130048, dtype=dtype), multiplier=5 / 384)


@pytest.mark.parametrize("rows", [16, 17, 32, 33])
def test_rows(rows):
    check(*draw(rows, 4200))


@pytest.mark.parametrize("multiplier", [1e-3, 0.5, 1.0, 1.7, 30.0])
def test_multiplier(multiplier):
    check(*draw(4, 1500), multiplier=multiplier)


@pytest.mark.parametrize("dtype", DTYPES)
def test_distributions_from_flat_to_certain(dtype):
    logits, chosen = draw(5, 3000, dtype=dtype)
    logits[0] = 2.5
    logits[1] *= 50
    logits[2] -= 300
    logits[3] += 300
    logits[4] = -20
    logits[4, chosen[4]] = 20
    check(logits, chosen)
    check(logits, (chosen + 1) % 3000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_k_largest_wherever_they_stand(dtype):
    """All in one segment of 64, one per segment, at the very ends, equal, in descending order."""
    logits = normal(5, 5000).clamp(-2, 2).to(dtype)
    heights = torch.linspace(3, 9, 20).to(dtype)
    logits[0, 1300:1320] = heights
    logits[1, 7 : 7 + 64 * 20 : 64] = heights
    logits[2, :10], logits[2, -10:] = heights[:10], heights[10:]
    logits[3] = -4
    logits[3, 100:4000:90] = 1.5
    logits[4, 40:60] = heights.flip(0)
    chosen = torch.tensor([1319, 3, 4999, 0, 70])
    for k in (1, 20, 30, 64):
        check(logits, chosen, k=k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zero_and_tiny_logits(dtype):
    logits, chosen = draw(3, 200, dtype=dtype)
    logits[0] = -logits[0].abs() - 1
    logits[1] = torch.where(torch.arange(200) % 2 == 0, 0.0, -0.0)
    logits[2] *= torch.finfo(dtype).tiny / 8
    for k in (1, 20, 64):
        check(logits, chosen, k=k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forbidden_tokens(dtype):
    logits, chosen = draw(5, 9000, dtype=dtype)
    allowed = torch.zeros(5, 9000, dtype=torch.bool)
    allowed[0, 8000:8020] = True  # just k of them, in one tile
    allowed[1, 5000:5019] = True  # one too few
    allowed[2, 77] = True
    allowed[3, ::7] = True
    allowed[4, :8999] = True
    logits[~allowed] = -torch.inf
    chosen = torch.tensor([8001, 3, 77, 700, 8999])
    found = check(logits, chosen)
    assert found.top_k_mean_m.isinf().tolist() == [False, True, True, False, False]
    assert found.chosen_m.isinf().tolist() == [False, True, False, False, True]
    assert found.entropy_m[2] == 0 and found.chosen_m[2] == 0


def test_no_token_allowed_and_not_a_number():
    logits, chosen = draw(4, 3000)
    logits[0] = -torch.inf
    logits[1, 2000] = torch.nan
    logits[2, 5] = torch.inf
    found = logprob(logits, chosen)
    for values in found:
        assert values.isnan().tolist() == [True, True, True, False]
    expected = logprob(logits[3:], chosen[3:])
    assert all(torch.equal(a[3:], b) for a, b in zip(found, expected))


def test_tokens_outside_the_vocabulary():
    logits, _ = draw(4, 100)
    found = logprob(logits, torch.tensor([-1, 100, 2**40, 99]))
    assert found.chosen_m.isnan().tolist() == [True, True, True, False]
    assert found.entropy_m.isfinite().all() and found.top_k_mean_m.isfinite().all()


def test_strided_and_offset_inputs():
    logits, chosen = draw(3, 1500)
    expected = logprob(logits, chosen)
    for make in strided(logits):
        found = logprob(make(logits), torch.stack([chosen, chosen + 1], 1)[:, 0])
        for a, b in zip(found, expected):
            assert_same(a, b)
    assert all(torch.equal(a, b) for a, b in zip(logprob(logits, chosen.int()), expected))


def test_offsets_beyond_32_bits():
    logits, chosen = draw(3, 1500)
    found = logprob(far_apart(logits), chosen)
    for a, b in zip(found, logprob(logits, chosen)):
        assert_same(a, b)
    logits, chosen = draw(2, 3)
    found = logprob(far_apart(logits.T).T, chosen, k=2)
    for a, b in zip(found, logprob(logits, chosen, k=2)):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_read_once(dtype):
    logits, chosen = draw(2, 20000, dtype=dtype)
    with interpret.counted() as launches:
        logprob(logits, chosen, k=20)
    first, second = launches
    assert first.issued_load_bytes == first.unique_load_bytes == logits.nbytes
    segments = -(-20000 // 64)
    assert first.programs == 2 * 20 and second.programs == 2
    assert first.issued_store_bytes == 2 * (20 * 3 * 4 + segments * logits.element_size())
    again = 20 * 64 * logits.element_size() * 2
    small = first.issued_store_bytes + 2 * (8 + logits.element_size())
    assert second.issued_load_bytes <= again + small


def test_no_rows():
    logits, chosen = draw(2, 30)
    assert [t.shape for t in logprob(logits[:0], chosen[:0])] == [(0,)] * 3


def test_operator_registration():
    logits, chosen = draw(2, 100)
    torch.library.opcheck(_logprob_op, (logits, chosen, 20, 0.5, ""))


def test_refusals():
    logits, chosen = draw(2, 100)
    for call, words in (
        (lambda: logprob(logits.double(), chosen), "float64"),
        (lambda: logprob(logits[0], chosen), "expected \\(rows, vocabulary\\)"),
        (lambda: logprob(logits[:, :0], chosen), "vocabulary of 1 to"),
        (lambda: logprob(torch.zeros(1, 1).expand(1, MAX_VOCABULARY + 1), chosen), "524288"),
        (lambda: logprob(logits, chosen[:1]), "chosen_m is \\(1,\\)"),
        (lambda: logprob(logits, chosen.float()), "chosen_m is .* torch.float32"),
        (lambda: logprob(logits, chosen, k=0), "k is 0, expected 1 to 64"),
        (lambda: logprob(logits, chosen, k=65), "k is 65"),
        (lambda: logprob(logits[:, :9], chosen), "k is 20, expected 1 to 9"),
        (lambda: logprob(logits, chosen, multiplier=0.0), "multiplier is 0.0"),
        (lambda: logprob(logits, chosen, multiplier=-1.0), "multiplier is -1.0"),
        (lambda: logprob(logits, chosen, multiplier=float("nan")), "multiplier is nan"),
        (lambda: logprob(logits, chosen, config="fast"), "there are: tile8192, tile4096"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
