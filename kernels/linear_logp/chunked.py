"""linear_logp over row chunks: logits of one chunk live at a time, and the gradient is explicit. For every backend.

With u = one head GEMM over all rows, given that the user's loss is only known after the forward:
- nothing to differentiate: 1u, nothing kept;
- frozen head: 2u; the forward forms d W and the backward scales its rows;
- trained head, one block (a chunk, or several whose d is kept in 16 bits, `Head.block_rows`): 3u; the forward turns
  the logits into d and keeps it;
- trained head, several blocks: 4u; the backward computes each chunk's logits again.
Where W is frozen and its LoRA or bias is trained, the GEMM for dW falls away: 2u and 3u.
Legend: n rows of a chunk, h hidden size, v vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from macpo.kernels.linear_logp.head import Gradient, Gradients, Head, Needs, chunks
from macpo.kernels.linear_logp.scaling import scale_rows


def forward(
    head: Head, hidden: Tensor, target: Tensor, chunk_rows: int, needs: Needs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Log-probs and logsumexps [N]; what `keeps` names for the backward: d W [N, H], d [N, V], and its factors [N]."""
    num_rows = hidden.shape[0]
    keep_dx, keep_d = keeps(head, needs, num_rows, chunk_rows)
    if keep_d:
        block = head.block(num_rows, chunk_rows, needs)
        buffer = head.chunk_buffer(block, min(chunk_rows, num_rows))
        found = head.differentiate(hidden, target, buffer, block)
        return found.logp_n, found.lse_n, None, found.d_nv, found.factor_n
    logp_n, lse_n = (hidden.new_empty(num_rows, dtype=head.dtype) for _ in range(2))
    if not keep_dx:
        chunk_rows = head.score_rows(chunk_rows)
    buffer = head.buffer(min(chunk_rows, num_rows), score=not keep_dx)
    grads = Gradients(head, hidden, Needs(keep_dx, False, False, False, False))
    for part in chunks(0, num_rows, chunk_rows):
        if keep_dx:
            found = head.differentiate(hidden[part], target[part], buffer)
            logp_n[part], lse_n[part] = found.logp_n, found.lse_n
            grads.add(part, found)
        else:
            logp_n[part], lse_n[part] = head.score(hidden[part], target[part], buffer)
    return logp_n, lse_n, grads.hidden, None, grads.factor_n


def keeps(head: Head, needs: Needs, num_rows: int, chunk_rows: int) -> tuple[bool, bool]:
    """Whether the forward keeps d W (frozen head), and d (trained head, one block)."""
    return needs.hidden and not needs.head, needs.head and num_rows <= head.block_rows(num_rows, chunk_rows, needs)


def backward(
    head: Head, hidden: Tensor, target: Tensor, lse_n: Tensor, d_nv: Tensor | None, grad_n: Tensor, needs: Needs,
    chunk_rows: int, factor_n: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients from grad_n [N] = d loss / d logp; d_nv is all rows' d where it was kept, and factor_n its factors."""
    num_rows = hidden.shape[0]
    grads = Gradients(head, hidden, needs, whole=d_nv is not None)
    if d_nv is not None:
        grads.add(slice(0, num_rows), Gradient(lse_n, lse_n, d_nv, factor_n), grad_n)
    else:
        buffer = head.buffer(min(chunk_rows, num_rows))
        for part in chunks(0, num_rows, chunk_rows):
            found = head.differentiate_again(hidden[part], target[part], lse_n[part], buffer)
            grads.add(part, found, grad_n[part])
    if grads.hidden is not None:
        scale_rows(grads.hidden, grads.row_factors(grad_n), in_place=True)
    return grads
