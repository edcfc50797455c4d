"""Log-probabilities against plain Python and unchunked float64 twins; in float64 and to 1e-12 unless said."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning.functional import gather_logprobs, linear_argmax, linear_logprobs, sequence_logprobs
from rlhf_lightning.functional.logprobs import linear_entropies

EXACT = {"rtol": 0, "atol": 1e-12}
IDENTICAL = {"rtol": 0, "atol": 0}
HALF = [torch.float16, torch.bfloat16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ids(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(9))


def log_softmax_at(row: list[float], target: int, temperature: float) -> float:
    scaled = [x / temperature for x in row]
    return scaled[target] - math.log(sum(math.exp(x) for x in scaled))


# ---- gather_logprobs ---------------------------------------------------------------------------------------


def test_the_logprob_of_three_equal_logits_is_minus_ln_3():
    assert gather_logprobs(torch.zeros(1, 3), torch.tensor([1])).item() == pytest.approx(-math.log(3))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_the_logprob_equals_a_loop(temperature):
    logits, targets = 3 * random(4, 5, 7), ids(7, 4, 5)
    rows = zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True)
    expected = torch.tensor([log_softmax_at(*row, temperature) for row in rows], dtype=torch.float64)
    found = gather_logprobs(logits, targets, temperature=temperature)
    torch.testing.assert_close(found, expected.view(4, 5), **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_one_hot_minus_softmax_over_the_temperature(temperature):
    logits, targets = random(6, 7).requires_grad_(), ids(7, 6)
    gather_logprobs(logits, targets, temperature=temperature).sum().backward()
    one_hot = torch.nn.functional.one_hot(targets, 7)
    expected = (one_hot - (logits.detach() / temperature).softmax(dim=-1)) / temperature
    torch.testing.assert_close(logits.grad, expected, **EXACT)


def test_gather_logprobs_passes_gradcheck():
    targets = ids(5, 3)
    leaf = random(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_logprobs(x, targets, temperature=0.7), leaf)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_logits_get_a_float32_log_softmax(dtype):
    logits, targets = (5 * random(50, 100)).to(dtype), ids(100, 50)
    logprobs = gather_logprobs(logits, targets)
    assert logprobs.dtype == torch.float32
    # The log-softmax in half precision would be off by 1e-3 (fp16) or 1e-2 (bf16) per token.
    torch.testing.assert_close(logprobs.double(), gather_logprobs(logits.double(), targets), rtol=0, atol=5e-6)


def test_a_response_of_500_tokens_in_float32_is_within_1e_4_of_float64():
    logits, targets = 4 * random(1, 500, 300), ids(300, 1, 500)
    mask = torch.ones(1, 500, dtype=torch.bool)
    wide = sequence_logprobs(gather_logprobs(logits, targets), mask)
    # Summed in float64: the sum is near -7000, where float32 itself counts in steps of 5e-4.
    narrow = sequence_logprobs(gather_logprobs(logits.float(), targets).double(), mask)
    torch.testing.assert_close(narrow, wide, rtol=0, atol=1e-4)


def test_an_offset_of_ten_thousand_on_all_logits_changes_nothing():
    logits = torch.tensor([[1e4, 1e4 + 1, 1e4 + 2]])
    expected = gather_logprobs(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0]))
    torch.testing.assert_close(gather_logprobs(logits, torch.tensor([0])), expected, rtol=0, atol=1e-6)


def test_logits_twenty_thousand_apart_give_a_finite_logprob_and_gradient():
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    logprobs = gather_logprobs(logits, torch.tensor([0, 1]))
    logprobs.sum().backward()
    assert logprobs.tolist() == [0, -2e4]
    assert logits.grad.tolist() == [[0, 0], [-1, 1]]


def test_a_target_outside_the_vocabulary_is_refused():
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        gather_logprobs(torch.zeros(2, 3), torch.tensor([1, -100]))


# ---- sequence_logprobs -------------------------------------------------------------------------------------

MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize("average", [False, True])
def test_the_logprob_of_a_response_equals_a_loop(average):
    tokens = random(3, 4)
    expected = []
    for row in range(3):
        entries = [tokens[row, t].item() for t in range(4) if MASK[row, t]]
        expected.append(sum(entries) / (len(entries) if average else 1))
    found = sequence_logprobs(tokens, MASK, average=average)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(sequence_logprobs(tokens, MASK.long(), average=average), found, **IDENTICAL)


def test_the_sum_is_the_default():
    tokens = random(3, 4)
    torch.testing.assert_close(sequence_logprobs(tokens, MASK), (tokens * MASK).sum(dim=1), **EXACT)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("garbage", [math.nan, -math.inf])
def test_padding_reaches_neither_the_logprob_of_a_response_nor_its_gradient(average, garbage):
    tokens = torch.where(MASK, random(3, 4), garbage).requires_grad_()
    total = sequence_logprobs(tokens, MASK, average=average)
    total.sum().backward()
    clean = sequence_logprobs(random(3, 4), MASK, average=average)
    torch.testing.assert_close(total.detach(), clean, **IDENTICAL)
    share = MASK / MASK.sum(dim=1, keepdim=True).double() if average else MASK.double()
    torch.testing.assert_close(tokens.grad, share, **EXACT)


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprobs_pass_gradcheck(average):
    leaf = random(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_logprobs(x, MASK, average=average), leaf)


def test_a_response_without_tokens_has_a_sum_but_no_average():
    mask = torch.tensor([[True, True], [False, False]])
    assert sequence_logprobs(-torch.ones(2, 2), mask).tolist() == [-2, 0]
    with pytest.raises(ValueError, match=r"no True in row\(s\) \[1\]"):
        sequence_logprobs(-torch.ones(2, 2), mask, average=True)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_logprobs_are_summed_in_float32(average, dtype):
    tokens, mask = random(2, 500).to(dtype), torch.ones(2, 500, dtype=torch.bool)
    total = sequence_logprobs(tokens, mask, average=average)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, sequence_logprobs(tokens.float(), mask, average=average), **IDENTICAL)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    ("tokens", "mask"),
    [(torch.zeros(4, 3), torch.ones(4, 1)), (torch.zeros(4), torch.ones(4)), (torch.zeros(4, 3), torch.ones(3))],
)
def test_sequence_logprobs_refuse_other_shapes(average, tokens, mask):
    with pytest.raises(ValueError, match=r"token_logprobs \[B, T\], mask \[B, T\]"):
        sequence_logprobs(tokens, mask.bool(), average=average)


@pytest.mark.parametrize("average", [False, True])
def test_a_float_mask_is_refused(average):
    with pytest.raises(ValueError, match="mask has the dtype"):
        sequence_logprobs(torch.zeros(3, 4), MASK.float(), average=average)


# ---- linear_logprobs ---------------------------------------------------------------------------------------

N, V, H = 10, 13, 4


def head(*, with_bias: bool, dtype: torch.dtype = torch.float64, n: int = N, v: int = V) -> dict[str, Tensor | None]:
    return {
        "hidden": random(n, H).to(dtype).requires_grad_(),
        "weight": random(v, H, seed=1).to(dtype).requires_grad_(),
        "bias": random(v, seed=2).to(dtype).requires_grad_() if with_bias else None,
    }


def chunked(head: dict[str, Tensor | None], targets: Tensor, **options) -> Tensor:
    return linear_logprobs(head["hidden"], head["weight"], targets, bias=head["bias"], **options)


def unchunked(head: dict[str, Tensor | None], targets: Tensor, temperature: float = 1.0) -> Tensor:
    logits = torch.nn.functional.linear(head["hidden"], head["weight"], head["bias"])
    return (logits / temperature).log_softmax(dim=-1)[torch.arange(len(targets)), targets]


def as_float64(head: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {k: None if x is None else x.detach().double().requires_grad_() for k, x in head.items()}


def gradients(logprobs: Tensor, head: dict[str, Tensor | None]) -> list[Tensor]:
    weights = random(len(logprobs), seed=5)  # a different cotangent for every token
    (logprobs * weights.to(logprobs.dtype)).sum().backward()
    return [x.grad for x in head.values() if x is not None]


every_chunk_size = pytest.mark.parametrize("chunk_size", [1, 3, 5, 10, 1000])


@every_chunk_size
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_change_neither_value_nor_gradient(chunk_size, with_bias, temperature):
    targets = ids(V, N)
    ours, twin = head(with_bias=with_bias), head(with_bias=with_bias)
    found = chunked(ours, targets, temperature=temperature, chunk_size=chunk_size)
    expected = unchunked(twin, targets, temperature)
    torch.testing.assert_close(found, expected, **EXACT)
    for mine, wanted in zip(gradients(found, ours), gradients(expected, twin), strict=True):
        torch.testing.assert_close(mine, wanted, **EXACT)


def test_the_head_equals_a_loop():
    example, targets = head(with_bias=True), ids(V, N)
    hidden, weight, bias = (x.tolist() for x in example.values())
    expected = []
    for state, target in zip(hidden, targets.tolist(), strict=True):
        logits = [sum(w * x for w, x in zip(row, state, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        expected.append(log_softmax_at(logits, target, 0.7))
    found = chunked(example, targets, temperature=0.7, chunk_size=3)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_logprobs_pass_gradcheck(with_bias):
    example, targets = head(with_bias=with_bias, n=4, v=5), ids(5, 4)
    leaves = [x for x in example.values() if x is not None]

    def function(hidden, weight, bias=None):
        return linear_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, chunk_size=3)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(trained):
    targets = ids(V, N)
    ours, twin = head(with_bias=True), head(with_bias=True)
    for example in (ours, twin):
        for name, tensor in example.items():
            tensor.requires_grad_(name == trained)
    gradients(chunked(ours, targets, chunk_size=3), ours)
    gradients(unchunked(twin, targets), twin)
    torch.testing.assert_close(ours[trained].grad, twin[trained].grad, **EXACT)
    assert all(ours[name].grad is None for name in ours if name != trained)


@pytest.fixture
def products(monkeypatch):
    """The shapes of the operands of each product that is made, in order."""
    made: list[tuple[torch.Size, torch.Size]] = []

    def multiply(left: Tensor, right: Tensor) -> Tensor:
        made.append((left.shape, right.shape))
        return left @ right

    monkeypatch.setattr("rlhf_lightning.functional.logprobs._matmul", multiply)
    return made


@pytest.mark.parametrize(
    ("trained", "chunk_size", "forward", "backward"),
    [
        (("hidden", "weight", "bias"), 3, 4, 4 + 2 * 4),
        (("hidden", "weight", "bias"), N, 1, 2),
        (("hidden",), 3, 2 * 4, 0),
        (("hidden",), N, 2, 0),
        (("weight",), 3, 4, 4 + 4),
        (("weight",), N, 1, 1),
        ((), 3, 4, 0),
    ],
)
def test_logits_of_one_chunk_are_made_once_and_with_a_frozen_weight_all_are(
    products, trained, chunk_size, forward, backward
):
    example = head(with_bias=True)
    for name, tensor in example.items():
        tensor.requires_grad_(name in trained)
    found = chunked(example, ids(V, N), chunk_size=chunk_size)
    assert len(products) == forward
    if trained:
        gradients(found, example)
    assert len(products) == forward + backward


def test_with_a_frozen_half_precision_weight_the_least_probabilities_count(monkeypatch):
    """The target has 0.99 and each of 65,535 other tokens 1.5e-7, which float16 alone rounds up by 17 %."""

    def as_tensor_cores_do(left: Tensor, right: Tensor) -> Tensor:
        return left.to(right.dtype).float() @ right.float()

    monkeypatch.setattr("rlhf_lightning.functional.logprobs._matmul", as_tensor_cores_do)
    hidden = torch.zeros(1, H, dtype=torch.float16, requires_grad=True)
    weight, bias = torch.ones(65_536, H, dtype=torch.float16), torch.zeros(65_536)
    weight[7], bias[7] = 0, math.log(99 * 65_535)
    linear_logprobs(hidden, weight, torch.tensor([7]), bias=bias).backward()
    torch.testing.assert_close(hidden.grad, torch.full_like(hidden, -0.01), rtol=0.04, atol=0)  # torch's own sum: 3 %


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_no_tensor_of_n_times_v_is_made_forward_or_backward(dtype, temperature):
    example, targets = head(with_bias=True, dtype=dtype, n=64, v=50), ids(50, 64)
    with LargestTensor() as watched:
        gradients(chunked(example, targets, temperature=temperature, chunk_size=8), example)
    assert watched.elements <= 8 * 50
    with LargestTensor() as watched:
        gradients(unchunked(example, targets, temperature), example)
    assert watched.elements == 64 * 50  # the watch does see it where it is made


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_heads_are_multiplied_and_normalized_in_float32(dtype):
    example, targets = head(with_bias=True, dtype=dtype, n=300), ids(V, 300)
    twin = as_float64(example)
    found, expected = chunked(example, targets, chunk_size=7), unchunked(twin, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-6)  # logits rounded to bf16: 2e-2
    half_a_step = torch.finfo(dtype).eps / 2
    for mine, wanted in zip(gradients(found, example), gradients(expected, twin), strict=True):
        assert mine.dtype == dtype
        # One rounding at the very end; sums of 43 chunks kept in bf16 would be off by several steps.
        torch.testing.assert_close(mine.double(), wanted, rtol=1.01 * half_a_step, atol=1e-6)


def test_a_half_precision_hidden_state_meets_a_float32_weight_in_float32():
    example, targets = head(with_bias=True, dtype=torch.float32), ids(V, N)
    example["hidden"] = example["hidden"].detach().bfloat16().requires_grad_()
    twin = as_float64(example)
    found = chunked(example, targets, chunk_size=3)
    torch.testing.assert_close(found.double(), unchunked(twin, targets), rtol=0, atol=5e-6)
    assert gradients(found, example)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_rounds_the_operands_and_nothing_else(backward_inside):
    example, targets = head(with_bias=True, dtype=torch.float32), ids(V, N)
    rounded = {name: x if name == "bias" else x.detach().bfloat16() for name, x in example.items()}
    twin = as_float64(rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked(example, targets, chunk_size=3)
        if backward_inside:
            mine = gradients(found, example)
    if not backward_inside:
        mine = gradients(found, example)
    expected = unchunked(twin, targets)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-6)
    for gradient, wanted in zip(mine, gradients(expected, twin), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=5e-6)


def test_autocast_leaves_float64_alone():
    example, targets = head(with_bias=True), ids(V, N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked(example, targets, chunk_size=3)
    torch.testing.assert_close(found, unchunked(example, targets), **EXACT)


def test_the_head_is_finite_and_right_at_logits_of_ten_thousand():
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4]])
    logprobs = linear_logprobs(hidden, weight, torch.tensor([0, 1]))
    logprobs.sum().backward()
    assert logprobs.tolist() == [0, -2e4]
    assert hidden.grad.tolist() == [[0], [-2e4]]


def test_no_tokens_give_no_logprobs_and_zero_gradients():
    example = head(with_bias=True, n=0)
    logprobs = chunked(example, ids(V, 0))
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert (example["weight"].grad == 0).all()


def test_a_detached_head_gives_a_detached_logprob():
    example = {name: x.detach() for name, x in head(with_bias=True).items()}
    assert not chunked(example, ids(V, N)).requires_grad


def test_int32_targets_are_taken():
    example, targets = head(with_bias=False), ids(V, N)
    torch.testing.assert_close(chunked(example, targets.int()), unchunked(example, targets), **EXACT)


@pytest.mark.parametrize("wrong", ["hidden", "weight", "targets", "bias"])
def test_the_head_refuses_other_shapes(wrong):
    arguments = {
        "hidden": torch.zeros(N, H),
        "weight": torch.zeros(V, H),
        "targets": torch.zeros(N, dtype=torch.long),
        "bias": torch.zeros(V),
    }
    arguments[wrong] = arguments[wrong][:3, ..., None]
    with pytest.raises(ValueError, match=r"hidden \[N, H\], weight \[V, H\], targets \[N\], bias \[V\]"):
        linear_logprobs(**arguments)


@pytest.mark.parametrize("size", ["N", "V", "H"])
def test_the_head_refuses_sizes_that_do_not_agree(size):
    n, v, h = N + (size == "N"), V + (size == "V"), H + (size == "H")
    with pytest.raises(ValueError, match="one size per letter"):
        linear_logprobs(torch.zeros(N, H), torch.zeros(V, h), torch.zeros(n, dtype=torch.long), bias=torch.zeros(v))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_heads_on_a_gpu_equal_the_float64_twin(dtype, trained):
    example, targets = head(with_bias=True, dtype=dtype, n=300), ids(V, 300)
    twin = as_float64(example)
    moved = {name: x.detach().cuda().requires_grad_() for name, x in example.items()}
    for name in ("weight", "bias"):
        twin[name].requires_grad_(trained)
        moved[name].requires_grad_(trained)
    found, expected = chunked(moved, targets.cuda(), chunk_size=7), unchunked(twin, targets)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=1e-5)
    (found * random(300, seed=5).float().cuda()).sum().backward()
    for x, wanted in zip(moved.values(), gradients(expected, twin), strict=True):
        if wanted is None:
            assert x.grad is None
            continue
        # The tensor cores take the gradient of the logits rounded to half precision, each by 1 in 2^9 (bf16).
        torch.testing.assert_close(x.grad.double().cpu(), wanted, rtol=2e-2, atol=5e-2)


# ---- both ways to a token's logprob ------------------------------------------------------------------------


def through_gather(logits: Tensor, targets: Tensor, **options) -> Tensor:
    return gather_logprobs(logits, targets, **options)


def through_the_head(logits: Tensor, targets: Tensor, **options) -> Tensor:
    """The logits as hidden states of an identity head."""
    return linear_logprobs(logits, torch.eye(logits.shape[-1], dtype=logits.dtype), targets, **options)


@pytest.mark.parametrize("function", [through_gather, through_the_head])
class TestBothWays:
    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
    def test_a_temperature_that_is_not_positive_is_refused(self, function, temperature):
        with pytest.raises(ValueError, match=f"temperature is {temperature}"):
            function(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), temperature=temperature)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
    def test_targets_that_are_no_ids_are_refused(self, function, dtype):
        with pytest.raises(ValueError, match=f"targets has the dtype {dtype}"):
            function(torch.zeros(2, 3), torch.zeros(2, dtype=dtype))

    def test_a_column_of_targets_is_refused(self, function):
        with pytest.raises(ValueError, match=r"targets.* \[4, 1\]"):
            function(torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.long))

    def test_the_inputs_are_left_alone(self, function):
        logits, targets = random(4, 3), ids(3, 4)
        function(logits.requires_grad_(), targets, temperature=0.7).sum().backward()
        torch.testing.assert_close(logits.detach(), random(4, 3), **IDENTICAL)
        torch.testing.assert_close(targets, ids(3, 4), **IDENTICAL)

    def test_the_temperature_divides_the_logits(self, function):
        logits, targets = random(4, 3), ids(3, 4)
        torch.testing.assert_close(function(logits, targets, temperature=0.5), function(2 * logits, targets), **EXACT)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_without_tokens_is_refused(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size is {chunk_size}"):
        through_the_head(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 3, 1024])
def test_linear_argmax_is_the_argmax_of_the_logits(chunk_size):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (7, 30))
    bias = 3 * torch.randn(30, generator=generator, dtype=torch.float64)
    for given in (None, bias):
        logits = hidden @ weight.T + (0 if given is None else given)
        assert torch.equal(linear_argmax(hidden, weight, bias=given, chunk_size=chunk_size), logits.argmax(-1))
    assert linear_argmax(hidden[:0], weight).shape == (0,)


def test_linear_argmax_refuses_another_width():
    with pytest.raises(ValueError, match="hidden"):
        linear_argmax(torch.zeros(2, 3), torch.zeros(5, 4))


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_entropies_and_their_gradients_equal_those_of_whole_logits(chunk_size):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((7, 4), (9, 4), (9,))
    )
    made = linear_entropies(hidden, weight, bias=bias, temperature=0.7, chunk_size=chunk_size)
    expected = torch.distributions.Categorical(logits=(hidden @ weight.T + bias) / 0.7).entropy()
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    seeds = torch.arange(7.0, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((each * seeds).sum(), (hidden, weight, bias)) for each in (made, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    even = linear_entropies(torch.zeros(2, 4), torch.ones(9, 4))
    torch.testing.assert_close(even, torch.full((2,), 9.0).log())
    assert linear_entropies(torch.zeros(0, 4), torch.ones(9, 4)).shape == (0,)
    with pytest.raises(ValueError, match="hidden"):
        linear_entropies(torch.zeros(2, 3), torch.ones(9, 4))
