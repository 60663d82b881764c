"""The loss in chunks against torch's cross-entropy on full logits."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy

from fmcore.training import loss as loss_module
from fmcore.training.loss import next_token_loss

B, T, D, V = 3, 7, 8, 11
ROWS = B * T


@pytest.fixture(params=[1, 4, 10, ROWS, ROWS + 1, 512])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Boundaries that divide the 21 rows, that do not, and one chunk larger than all."""
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", request.param)
    return request.param


def given(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (B, T, D), head (V, D), labels (B, T) of which six are out of the loss."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :4] = labels[2, 5:] = -100
    return hidden, head, labels


def reference(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy((hidden @ head.T).reshape(-1, V), labels.reshape(-1), ignore_index=-100)


def test_loss_and_gradients_equal_cross_entropy(chunk: int) -> None:
    hidden, head, labels = given()
    want = torch.autograd.grad(reference(hidden, head, labels), (hidden, head))
    loss = next_token_loss(hidden, head, labels, int((labels != -100).sum()))
    got = torch.autograd.grad(loss, (hidden, head))
    torch.testing.assert_close(loss, reference(hidden, head, labels), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert got[0][0, :4].abs().max() == 0  # positions out of the loss get no gradient


def test_gradcheck(chunk: int) -> None:
    hidden, head, labels = given(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: next_token_loss(h, w, labels, 15.0), (hidden, head))


def test_upstream_gradient_scales(chunk: int) -> None:
    hidden, head, labels = given()
    plain = torch.autograd.grad(next_token_loss(hidden, head, labels, 15), (hidden, head))
    scaled = torch.autograd.grad(3 * next_token_loss(hidden, head, labels, 15), (hidden, head))
    torch.testing.assert_close(scaled, tuple(3 * g for g in plain))


def test_tied_head_gets_both_gradients(chunk: int) -> None:
    """Embedding and head are one parameter: its gradient is the sum of both uses."""
    _, head, labels = given()
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(5))

    def gradient(loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.autograd.grad(loss(torch.tanh(head[ids])), head)[0]

    want = gradient(lambda hidden: reference(hidden, head, labels))
    got = gradient(lambda hidden: next_token_loss(hidden, head, labels, 15))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_frozen_head_is_not_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient, as large as the head, is not even allocated."""
    hidden, head, labels = given()
    frozen = head.detach()
    saved: list[tuple[torch.Tensor | None, ...]] = []
    original = loss_module._ChunkedCrossEntropy.forward

    class Spy:
        def __init__(self, ctx: object) -> None:
            self.ctx = ctx

        needs_input_grad = property(lambda self: self.ctx.needs_input_grad)

        def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
            saved.append(tensors)
            self.ctx.save_for_backward(*tensors)

    monkeypatch.setattr(
        loss_module._ChunkedCrossEntropy, "forward", staticmethod(lambda ctx, *given: original(Spy(ctx), *given))
    )
    loss = next_token_loss(hidden, frozen, labels, 15)
    got = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(
        got, torch.autograd.grad(reference(hidden, frozen, labels), hidden), atol=1e-6, rtol=1e-6
    )
    assert saved[0][0] is not None
    assert saved[0][1] is None


def test_frozen_hidden_still_trains_the_head() -> None:
    hidden, head, labels = given()
    got = torch.autograd.grad(next_token_loss(hidden.detach(), head, labels, 15), head)
    want = torch.autograd.grad(reference(hidden, head, labels), head)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_two_processes_sum_to_one(chunk: int) -> None:
    """Each with its rows and the global batch's denominator."""
    hidden, head, labels = given()
    total = int((labels != -100).sum())
    whole = next_token_loss(hidden, head, labels, total)
    parts = [next_token_loss(hidden[rows], head, labels[rows], total) for rows in (slice(0, 2), slice(2, 3))]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=1e-6)
    got = torch.autograd.grad(sum(parts), (hidden, head))
    torch.testing.assert_close(got, torch.autograd.grad(whole, (hidden, head)), atol=1e-6, rtol=1e-6)
    # a mean of the two means is another number, since they have unequally many labels
    means = [reference(hidden[rows], head, labels[rows]) for rows in (slice(0, 2), slice(2, 3))]
    assert abs((sum(means) / 2 - whole).item()) > 1e-4


def test_no_label_at_all_is_zero() -> None:
    hidden, head, _ = given()
    loss = next_token_loss(hidden, head, torch.full((B, T), -100), 1)
    loss.backward()
    assert loss.item() == 0
    assert float(hidden.grad.abs().max()) == 0
