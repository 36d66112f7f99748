import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_examples import NUM_ROWS, VOCAB, Products, example

from model.loss import gradient_of_logits, linear_cross_entropy, token_nll


def oracle(hidden_ND, weight_VD, labels_N, z_loss):
    logits_NV = hidden_ND @ weight_VD.T
    z = logits_NV.logsumexp(-1)[labels_N != -100].square().mean()
    return F.cross_entropy(logits_NV, labels_N) + z_loss * z


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    chunk_tokens=st.integers(1, NUM_ROWS + 5),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    scale=st.sampled_from([1.0, -2.5, 0.125]),
    body=st.sampled_from([None, gradient_of_logits]),
)
def test_loss_and_gradients_are_those_of_autograd(seed, chunk_tokens, z_loss, scale, body):
    hidden_ND, weight_VD, labels_N = example(seed=seed)
    expected = oracle(hidden_ND, weight_VD, labels_N, z_loss)
    actual = linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk_tokens, z_loss, body)
    torch.testing.assert_close(actual, expected)
    expected_gradients = torch.autograd.grad(scale * expected, (hidden_ND, weight_VD))
    torch.testing.assert_close(torch.autograd.grad(scale * actual, (hidden_ND, weight_VD)), expected_gradients)


def test_gradients_agree_with_finite_differences():
    hidden_ND, weight_VD, labels_N = example()
    assert torch.autograd.gradcheck(linear_cross_entropy, (hidden_ND, weight_VD, labels_N, 7, 0.1))


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_of_the_two_may_be_frozen(wanted):
    hidden_ND, weight_VD, labels_N = example()
    (weight_VD if wanted == "hidden" else hidden_ND).requires_grad_(False)
    tensor = hidden_ND if wanted == "hidden" else weight_VD
    actual = torch.autograd.grad(linear_cross_entropy(hidden_ND, weight_VD, labels_N, 7, 0.1), tensor)
    torch.testing.assert_close(actual, torch.autograd.grad(oracle(hidden_ND, weight_VD, labels_N, 0.1), tensor))


def test_tied_weight_collects_both_gradients():
    weight_VD, labels_N = example()[1:]
    tokens_N = torch.arange(NUM_ROWS)
    actual = torch.autograd.grad(linear_cross_entropy(weight_VD[tokens_N], weight_VD, labels_N, 7, 0.1), weight_VD)
    torch.testing.assert_close(
        actual, torch.autograd.grad(oracle(weight_VD[tokens_N], weight_VD, labels_N, 0.1), weight_VD)
    )


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("body", [None, gradient_of_logits])
def test_bfloat16_loses_no_more_than_bfloat16_logits_do(z_loss, body):
    hidden_ND, weight_VD, labels_N = example(torch.bfloat16)
    loss = linear_cross_entropy(hidden_ND, weight_VD, labels_N, 4, z_loss, body)
    gradients = torch.autograd.grad(loss, (hidden_ND, weight_VD))
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)

    logits_NV = (hidden_ND @ weight_VD.T).float()
    z = logits_NV.logsumexp(-1)[labels_N != -100].square().mean()
    whole_loss = F.cross_entropy(logits_NV, labels_N) + z_loss * z
    whole_gradients = torch.autograd.grad(whole_loss, (hidden_ND, weight_VD))
    torch.testing.assert_close(loss, whole_loss)

    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, weight_VD)]
    exact_gradients = torch.autograd.grad(oracle(*wide, labels_N, z_loss), wide)
    for ours, whole, exact in zip(gradients, whole_gradients, exact_gradients, strict=True):
        assert (ours.double() - exact).norm() < 1.1 * (whole.double() - exact).norm()


def test_the_weights_gradient_is_summed_in_float32():
    """Many chunks that add the same small number: a bfloat16 sum would stop growing at 256 of them."""
    num_rows = 2048
    hidden_ND = torch.ones(num_rows, 1, dtype=torch.bfloat16)
    weight_VD = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels_N = torch.zeros(num_rows, dtype=torch.int64)
    linear_cross_entropy(hidden_ND, weight_VD, labels_N, 1, 0.0).backward()
    assert weight_VD.grad.flatten().tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_of_every_row(dtype):
    hidden_ND, weight_VD, labels_N = example(dtype)
    nll_N = token_nll(hidden_ND, weight_VD, labels_N, 7)
    assert nll_N.dtype == dtype
    assert not nll_N.requires_grad
    torch.testing.assert_close(nll_N, F.cross_entropy(hidden_ND @ weight_VD.T, labels_N, reduction="none"))
    assert (nll_N[labels_N == -100] == 0).all()


@pytest.mark.parametrize("body", [None, gradient_of_logits])
def test_a_label_that_is_no_token_is_an_error(body):
    hidden_ND, weight_VD, labels_N = example()
    for wrong in (-1, VOCAB):
        labels_N[3] = wrong
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            linear_cross_entropy(hidden_ND, weight_VD, labels_N, 7, 0.1, body)
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            token_nll(hidden_ND, weight_VD, labels_N, 7)


def test_no_row_has_no_loss():
    hidden_ND, weight_VD, labels_N = example()
    assert token_nll(hidden_ND[:0], weight_VD, labels_N[:0], 7).shape == (0,)


def test_no_label_that_counts_gives_zero():
    hidden_ND, weight_VD, labels_N = example()
    labels_N[:] = -100
    loss = linear_cross_entropy(hidden_ND, weight_VD, labels_N, 7, 0.1)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden_ND, weight_VD)))


def test_a_second_derivative_is_refused():
    hidden_ND, weight_VD, labels_N = example()
    loss = linear_cross_entropy(hidden_ND, weight_VD, labels_N, 7, 0.0)
    (gradient,) = torch.autograd.grad(loss.square(), hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("chunk_tokens", [1, 5, 8])
def test_logits_exist_for_one_chunk_at_a_time(chunk_tokens):
    hidden_ND, weight_VD, labels_N = example()
    with Products() as seen:
        linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk_tokens, 0.1).backward()
    assert seen.most_rows == chunk_tokens
    assert seen.num_products == 3 * -(-NUM_ROWS // chunk_tokens)
    with Products() as seen, torch.no_grad():
        linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk_tokens, 0.1)
    assert seen.most_rows == chunk_tokens
    assert seen.num_products == -(-NUM_ROWS // chunk_tokens), "without a gradient there is one product a chunk"


@pytest.mark.parametrize("chunk_tokens", [1, 5, 8, 100])
def test_only_rows_that_count_meet_the_head_in_products_of_one_shape(chunk_tokens):
    """The last bits of a product depend on its shape; so that must not depend on what else counts."""
    hidden_ND, weight_VD, labels_N = example(torch.float32)
    rows = min(chunk_tokens, -(-NUM_ROWS // 8))
    everything = token_nll(hidden_ND, weight_VD, labels_N.clamp(min=0), chunk_tokens)
    for count in (0, 1, 7, NUM_ROWS):
        labels_N = torch.randint(VOCAB, (NUM_ROWS,)).index_fill(0, torch.randperm(NUM_ROWS)[count:], -100)
        with Products() as seen:
            found = token_nll(hidden_ND, weight_VD, labels_N, chunk_tokens)
        assert seen.shapes == {(rows, VOCAB)} if count else not seen.shapes
        assert seen.num_products == -(-count // rows)
        expected = F.cross_entropy(hidden_ND @ weight_VD.T, labels_N, reduction="none")
        torch.testing.assert_close(found, expected.detach())
    for row in range(NUM_ROWS):
        alone = torch.full_like(labels_N, -100)
        alone[row] = example(torch.float32)[2].clamp(min=0)[row]
        assert token_nll(hidden_ND, weight_VD, alone, chunk_tokens)[row] == everything[row]


def test_several_labels_of_a_row_have_the_losses_that_each_has_alone():
    hidden_ND, weight_VD, _ = example(torch.float32)
    columns = [example(torch.float32, seed)[2] for seed in range(3)]
    together_NA = token_nll(hidden_ND, weight_VD, torch.stack(columns, 1), 7)
    alone = [token_nll(hidden_ND, weight_VD, labels_N, 7) for labels_N in columns]
    assert torch.equal(together_NA, torch.stack(alone, 1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_is_the_one_that_is_done_step_by_step(dtype):
    tensors = example(dtype)
    compiled = torch.compile(gradient_of_logits, dynamic=False)
    for z_loss in (0.0, 0.1):
        expected, actual = (linear_cross_entropy(*tensors, NUM_ROWS, z_loss, body) for body in (None, compiled))
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, tensors[:2]), torch.autograd.grad(expected, tensors[:2]))
