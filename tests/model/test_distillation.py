"""Losses with a teacher against plain torch, and the model's use of them."""

from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_examples import HIDDEN, NUM_ROWS, VOCAB, Products, example

from model.distillation import DistillationConfig, relation_loss, watched_projections
from model.init import initialize_
from model.loss import distillation_loss, linear_cross_entropy
from model.transformer import ModelConfig, Transformer

WIDTH = 9  # the teacher's own
MODEL = ModelConfig(
    vocab_size=61, hidden_size=24, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=40, loss_chunk_tokens=7,
    max_sequence_length=16,
)  # fmt: skip


def teacher_example(dtype=torch.float64, seed=5):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return hidden_ND.to(dtype), torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def oracle(hidden_ND, weight_VD, labels_N, teacher, z_loss, temperature, weight):
    logits_NV, counted = hidden_ND @ weight_VD.T, labels_N != -100
    nll = F.cross_entropy(logits_NV, labels_N)
    kl = F.kl_div(
        F.log_softmax(logits_NV[counted] / temperature, -1),
        F.softmax((teacher[0] @ teacher[1].T)[counted] / temperature, -1),
        reduction="batchmean",
    )
    z = logits_NV.logsumexp(-1)[counted].square().mean()
    return nll + z_loss * z + weight * temperature**2 * kl, nll, kl


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    chunk_tokens=st.integers(1, NUM_ROWS + 5),
    z_loss=st.sampled_from([0.0, 0.3]),
    temperature=st.sampled_from([0.5, 1.0, 5.0]),
    weight=st.sampled_from([0.0, 0.7, 10.0]),
)
def test_loss_and_gradients_are_those_of_autograd(seed, chunk_tokens, z_loss, temperature, weight):
    hidden_ND, weight_VD, labels_N = example(seed=seed)
    teacher = teacher_example(seed=seed)
    expected = oracle(hidden_ND, weight_VD, labels_N, teacher, z_loss, temperature, weight)
    actual = distillation_loss(
        hidden_ND, weight_VD, labels_N, chunk_tokens, z_loss, teacher=teacher, temperature=temperature, weight=weight
    )
    torch.testing.assert_close(actual, expected)
    assert [part.requires_grad for part in actual] == [True, False, False]
    gradients = [torch.autograd.grad(-2.5 * loss, (hidden_ND, weight_VD)) for loss in (actual[0], expected[0])]
    torch.testing.assert_close(*gradients)


def test_gradients_agree_with_finite_differences():
    hidden_ND, weight_VD, labels_N = example()
    teacher = teacher_example()
    assert torch.autograd.gradcheck(
        lambda h, w: distillation_loss(h, w, labels_N, 7, 0.1, teacher=teacher, temperature=2.0, weight=3.0)[0],
        (hidden_ND, weight_VD),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_0_is_bitwise_the_loss_without_a_teacher(dtype):
    hidden_ND, weight_VD, labels_N = example(dtype)
    plain = linear_cross_entropy(hidden_ND, weight_VD, labels_N, 7, 0.1)
    taught = distillation_loss(
        hidden_ND, weight_VD, labels_N, 7, 0.1, teacher=teacher_example(dtype), temperature=5.0, weight=0.0
    )[0]
    assert torch.equal(plain, taught)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden_ND, weight_VD)) for x in (plain, taught)), strict=True):
        assert torch.equal(ours, theirs)


def test_a_teacher_that_is_the_student_adds_nothing():
    hidden_ND, weight_VD, labels_N = example(torch.bfloat16)
    plain = linear_cross_entropy(hidden_ND, weight_VD, labels_N, 7, 0.1)
    total, _, kl = distillation_loss(
        hidden_ND, weight_VD, labels_N, 7, 0.1, teacher=(hidden_ND, weight_VD), temperature=5.0, weight=9.0
    )
    assert kl == 0
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden_ND, weight_VD)) for x in (plain, total)), strict=True):
        assert torch.equal(ours, theirs)


def test_no_label_that_counts_gives_zero():
    hidden_ND, weight_VD, labels_N = example()
    labels_N[:] = -100
    losses = distillation_loss(
        hidden_ND, weight_VD, labels_N, 7, 0.1, teacher=teacher_example(), temperature=5.0, weight=1.0
    )
    assert all(loss == 0 for loss in losses)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(losses[0], (hidden_ND, weight_VD)))


def test_a_teacher_of_another_vocabulary_is_refused():
    hidden_ND, weight_VD, labels_N = example()
    teacher = teacher_example()[0], teacher_example()[1][1:]
    with pytest.raises(ValueError, match=f"teacher has {VOCAB - 1} tokens, but the student has {VOCAB}"):
        distillation_loss(hidden_ND, weight_VD, labels_N, 7, 0.0, teacher=teacher, temperature=5.0, weight=1.0)


def test_logits_of_both_exist_for_one_chunk_at_a_time():
    hidden_ND, weight_VD, labels_N = example()
    assert WIDTH != HIDDEN
    with Products() as seen:
        teacher = teacher_example()
        seen.most_rows = 0
        distillation_loss(hidden_ND, weight_VD, labels_N, 5, 0.1, teacher=teacher, temperature=5.0, weight=1.0)[
            0
        ].backward()
    # (The teacher's head itself, with rows over its own width, is no tensor of logits.)
    assert seen.most_rows <= max(5, WIDTH)
    assert seen.num_products == 4 * -(-NUM_ROWS // 5)


# Attention relations


def plain_relations(student, teacher, heads):
    """Equations 10 to 12 written out head by head and token by token."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        batch, tokens, _ = ours.shape
        for b in range(batch):
            for head in range(heads):
                rows = []
                for x in (ours, theirs):
                    width = x.shape[-1] // heads
                    part = x[b, :, head * width : (head + 1) * width]
                    rows.append(F.softmax(part @ part.T / sqrt(width), -1))
                p, q = rows
                total = total + sum((q[t] * (q[t] / p[t]).log()).sum() for t in range(tokens)) / (
                    heads * tokens * batch
                )
    return total


def test_relation_loss_is_the_papers():
    generator = torch.Generator().manual_seed(0)

    def states(*widths):
        return tuple(torch.randn(2, 5, w, generator=generator, dtype=torch.float64).requires_grad_() for w in widths)

    student, teacher = states(12, 6, 6), states(16, 8, 8)  # 2 key-value heads, and 4 of the teacher's
    all_count = torch.ones(2, 5, dtype=torch.bool)
    actual = relation_loss(student, teacher, (2, 4), all_count)
    expected = plain_relations(student, teacher, 2)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, student), torch.autograd.grad(expected, student))
    assert relation_loss(student, student, (2, 2), all_count) == 0
    assert torch.autograd.gradcheck(lambda *s: relation_loss(s, teacher, (2, 4), all_count), student)


def test_relations_are_of_a_document_and_of_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        tuple(torch.randn(2, 6, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
        for _ in range(2)
    )
    first = torch.tensor([[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 1, 1]])  # documents of 3, 2, 1 and 1, 5 tokens
    counts = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 0, 1, 0, 0, 1]]).bool()
    actual = relation_loss(student, teacher, (2, 2), counts, first)
    total = 0
    for row, begin, end in ((0, 0, 3), (0, 3, 5), (0, 5, 6), (1, 0, 1), (1, 1, 6)):
        for place in counts[row, begin:end].nonzero().flatten().tolist():
            parts = [[each[row : row + 1, begin:end] for each in states] for states in (student, teacher)]
            total = total + relation_loss(*parts, (2, 2), F.one_hot(torch.tensor([place]), end - begin).bool())
    expected = total / counts.sum()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, student), torch.autograd.grad(expected, student))
    of_rows = 0
    for row in (slice(0, 1), slice(1, 2)):
        parts = [[each[row] for each in states] for states in (student, teacher)]
        of_rows = of_rows + relation_loss(*parts, (2, 2), counts[row], first[row]) * counts[row].sum()
    torch.testing.assert_close(of_rows / counts.sum(), actual)  # so that it is the same in any micro-batches
    alone = torch.tensor([[0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0]]).bool()  # as padding is
    assert relation_loss(student, teacher, (2, 2), alone, first) == 0
    assert relation_loss(student, teacher, (2, 2), torch.zeros_like(counts), first) == 0
    assert torch.autograd.gradcheck(lambda *s: relation_loss(s, teacher, (2, 2), counts, first), student)


# In the model


def model_and_batch(config=MODEL, seed=0):
    model = Transformer(config)
    initialize_(model, seed)
    tokens = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    return model, tokens[:, :-1], tokens[:, 1:]


def test_the_model_returns_the_total_and_its_parts():
    student, tokens_BT, labels_BT = model_and_batch()
    other = ModelConfig(
        vocab_size=61, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=20, tie_embeddings=False,
        max_sequence_length=16,
    )  # fmt: skip
    teacher = model_and_batch(other, seed=3)[0]
    config = DistillationConfig(temperature=2.0, weight=0.5, relation_weight=3.0)
    lesson = teacher.teach(tokens_BT, config, MODEL.num_layers)
    assert not any(tensor.requires_grad for tensor in (lesson.hidden, *lesson.relations))
    output = student(tokens_BT, labels_BT, teacher=lesson)

    attention, teachers_attention = student.model.layers[3].self_attn, teacher.model.layers[1].self_attn
    with watched_projections(attention) as ours, watched_projections(teachers_attention) as theirs:
        logits, teacher_logits = student(tokens_BT).logits, teacher(tokens_BT).logits
    nll = F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten())
    kl = F.kl_div(
        F.log_softmax(logits / 2, -1).flatten(0, 1),
        F.softmax(teacher_logits / 2, -1).flatten(0, 1),
        reduction="batchmean",
    )
    relation = plain_relations(ours, theirs, 2)
    expected = torch.stack([nll + 0.5 * 4 * kl + 3 * relation, nll, kl, relation])
    torch.testing.assert_close(torch.stack([output.loss, *output.parts]), expected)
    assert not output.parts.requires_grad
    parameters = [p for p in student.parameters() if p.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected[0], parameters), rtol=1e-4, atol=1e-6
    )
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


@pytest.mark.parametrize(
    ("chosen", "student_layers", "teacher_layers", "expected"),
    [(None, 28, 28, 21), (None, 4, 4, 3), (None, 1, 1, 0), (6, 12, 24, 12), (11, 12, 4, 3), (0, 4, 2, 0)],
)
def test_the_compared_block_is_at_the_same_depth(chosen, student_layers, teacher_layers, expected):
    config = DistillationConfig(relation_weight=1.0, relation_layer=chosen)
    assert config.layer_of(teacher_layers, student_layers) == expected


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"temperature": 0.0}, {"temperature": "is 0.0; must be above 0"}),
        ({"weight": -1.0}, {"weight": "is -1.0; must be 0 or more"}),
        ({"relation_layer": 1}, {"relation_layer": "is 1, but has no effect while relation_weight is 0"}),
    ],
)
def test_wrong_values_are_refused(keys, problem):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        DistillationConfig(**keys)
    assert caught.value.args[0] == problem
