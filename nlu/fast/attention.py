"""Softmax attention with the scores of relative positions, as one autograd function: what DeBERTa's and every other
attention on the CPU are computed with.

transformers' module for DeBERTa multiplies queries and keys with the embeddings of all `2·span` relative positions,
repeated for every sequence of the batch, and picks the wanted entries with two gathers whose index tensors are
(batch·heads, L, L). Two observations make that cheap:

* only the 2·L − 1 distances δ = i − j from −(L−1) to L−1 occur among L tokens, so only those are projected and
  multiplied, once for the whole batch;
* the score of query i and key j depends on the position through δ alone. With the positions ordered by δ, row r of the
  (rows, positions) product holds the wanted scores contiguously, shifted by one for each row, so a strided ("skewed")
  view *is* the gather.

The scores are those of DeBERTa (arXiv 2006.03654, eq. 4): c2p_ij = q_i · pos_k(δ), p2c_ij = k_j · pos_q(δ). The
function keeps one (heads, batch, L, L) tensor for the backward pass (a probability with its sign bit set where dropout
removed it), and works in blocks of rows so that a long sequence multiplies few positions more than it reads.
"""

import torch
from torch.autograd.function import once_differentiable

from loralib.fused import product, uses_onednn
from nlu.fast.dropout import drop_mask

_BLOCK = 128  # rows per block: L + _BLOCK − 1 positions are multiplied per row, in place of 2·L − 1


def _skew(product: torch.Tensor, length: int) -> torch.Tensor:
    """View (..., R, length + R − 1) as (..., R, length): out[r, c] = product[r, R − 1 − r + c]. No copy."""
    *lead, rows, width = product.shape
    strides = [*product.stride()[:-2], width - 1, 1]
    return product.as_strided([*lead, rows, length], strides, product.storage_offset() + rows - 1)


def _unskew(scores: torch.Tensor) -> torch.Tensor:
    """The adjoint of `_skew`: (..., R, L) into zeros of (..., R, L + R − 1)."""
    *lead, rows, length = scores.shape
    out = scores.new_zeros([*lead, rows, length + rows - 1])
    _skew(out, length).copy_(scores)
    return out


def _blocks(length: int) -> list[tuple[int, int, slice]]:
    """(first row, end row, the slice of the 2·L − 1 ordered positions that those rows use)."""
    starts = range(0, length, _BLOCK)
    ends = [min(start + _BLOCK, length) for start in starts]
    return [(s, e, slice(length - e, 2 * length - 1 - s)) for s, e in zip(starts, ends, strict=True)]


def _by_head(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x (H, n, k) times y (H, k, m) for large n and few heads: (H, n, m). MKL's batched product takes twice as long as
    a product for each head where oneDNN is the faster library."""
    if uses_onednn(x[0], y[0]):
        return torch.stack([product(of_x, of_y.T) for of_x, of_y in zip(x, y, strict=True)])
    return torch.bmm(x, y)


def _position_scores(content: torch.Tensor, positions: torch.Tensor, rows: tuple[int, int, slice]) -> torch.Tensor:
    """content (H, B, L, d), positions (H, 2L−1, d) -> (H, B, R, L) skewed view of the products of a block of rows."""
    start, end, span = rows
    heads, batch, length, _ = content.shape
    part = content[:, :, start:end].reshape(heads, batch * (end - start), -1)
    scores = _by_head(part, positions[:, span].transpose(1, 2))
    return _skew(scores.view(heads, batch, end - start, -1), length)


def _position_grads(
    grad: torch.Tensor, content: torch.Tensor, positions: torch.Tensor, grad_content, grad_positions
) -> None:
    """Add the gradients of `_position_scores` over all blocks; grad is (H, B, rows, L), either target may be None."""
    heads, batch, length, _ = content.shape
    for start, end, span in _blocks(length):
        by_position = _unskew(grad[:, :, start:end]).view(heads, batch * (end - start), -1)
        if grad_positions is not None:
            part = content[:, :, start:end].reshape(heads, batch * (end - start), -1)
            grad_positions[:, span] += torch.bmm(by_position.transpose(1, 2), part)
        if grad_content is None:
            continue
        if end - start == length and not uses_onednn(by_position[0], positions[0, span].T):
            grad_content.view(heads, batch * length, -1).baddbmm_(by_position, positions[:, span])
        else:
            added = _by_head(by_position, positions[:, span])
            grad_content[:, :, start:end] += added.view(heads, batch, end - start, -1)


def _split_heads(x: torch.Tensor, heads: int, scale: float = 1.0) -> torch.Tensor:
    """(B, L, H·d) -> (H, B, L, d) times `scale`: heads outermost, so that a position product is one matrix per head."""
    return _scaled_copy(x.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3), scale)


def _merge_heads(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """(H, B, L, d) -> (B, L, H·d) times `scale`."""
    return _scaled_copy(x.permute(1, 2, 0, 3), scale).flatten(2)


def _scaled_copy(view: torch.Tensor, scale: float) -> torch.Tensor:
    """A contiguous copy of a strided view times `scale`; a copy alone takes half as long."""
    return view.contiguous() if scale == 1 else torch.mul(view, scale, out=view.new_empty(view.shape))


class DisentangledAttention(torch.autograd.Function):
    """softmax(scale·q kᵀ + scale·skew(q pkᵀ) + skew(k pqᵀ)ᵀ, masked) with dropout, times v; pq is scaled already."""

    @staticmethod
    def forward(ctx, query, key, value, pos_key, pos_query, mask, heads, scale, dropout_p):
        """query, key, value (B, L, H·d); pos_key (H, 2L−1, d) by falling δ, pos_query by rising δ, or None; mask
        (H or 1, B or 1, L or 1, L) bool, True where a key may be attended to. Returns the context (B, L, H·d)."""
        with torch.autocast(query.device.type, enabled=False):
            query, key, value = (_split_heads(x, heads, s) for x, s in ((query, scale), (key, 1.0), (value, 1.0)))
            pos_key, pos_query = (None if p is None else p.contiguous() for p in (pos_key, pos_query))
            probs = torch.softmax(_scores(query, key, pos_key, pos_query, mask), dim=-1)
            if dropout_p > 0:
                probs.addcmul_(probs, drop_mask(probs, dropout_p), value=-2)  # sign bit: dropped
            kept = probs.relu() if dropout_p > 0 else probs
            context = torch.bmm(kept.flatten(0, 1), value.flatten(0, 1)).view_as(value)
            ctx.save_for_backward(query, key, value, pos_key, pos_query, mask, probs)
            ctx.scale, ctx.dropout_p = scale, dropout_p
            return _merge_heads(context, 1 / (1 - dropout_p))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, pos_key, pos_query, mask, probs = ctx.saved_tensors
        need_query, need_key, need_value, need_pos_key, need_pos_query = ctx.needs_input_grad[:5]
        with torch.autocast(grad.device.type, enabled=False):
            grad = _split_heads(grad, query.size(0), 1 / (1 - ctx.dropout_p)).flatten(0, 1)
            kept = probs.relu() if ctx.dropout_p > 0 else probs
            grad_value = torch.bmm(kept.flatten(0, 1).transpose(1, 2), grad).view_as(value) if need_value else None
            del kept
            grad_scores = torch.bmm(grad, value.flatten(0, 1).transpose(1, 2)).view_as(probs)
            if ctx.dropout_p > 0:
                grad_scores = torch.ops.aten.threshold_backward(grad_scores, probs, 0)
                probs = probs.abs()
            grad_scores = torch._softmax_backward_data(grad_scores, probs, -1, probs.dtype)
            # A query that may attend to nothing gets the uniform distribution, which does not depend on its scores.
            grad_scores *= mask.any(-1, keepdim=True).to(grad_scores.dtype)
            flat = grad_scores.flatten(0, 1)
            grad_query = torch.bmm(flat, key.flatten(0, 1)).view_as(query) if need_query else None
            grad_key = torch.bmm(flat.transpose(1, 2), query.flatten(0, 1)).view_as(key) if need_key else None
            grad_pos_key = torch.zeros_like(pos_key) if need_pos_key else None
            grad_pos_query = torch.zeros_like(pos_query) if need_pos_query else None
            if pos_key is not None and (need_query or need_pos_key):
                _position_grads(grad_scores, query, pos_key, grad_query, grad_pos_key)
            if pos_query is not None and (need_key or need_pos_query):
                _position_grads(grad_scores.transpose(-1, -2), key, pos_query, grad_key, grad_pos_query)
            grads = ((grad_query, ctx.scale), (grad_key, 1.0), (grad_value, 1.0))
            merged = [None if g is None else _merge_heads(g, s) for g, s in grads]
        return *merged, grad_pos_key, grad_pos_query, None, None, None, None


def _scores(query, key, pos_key, pos_query, mask) -> torch.Tensor:
    """The masked attention scores (H, B, L, L), summed in place in one buffer."""
    heads, batch, length, _ = query.shape
    scores = query.new_empty(heads, batch, length, length)
    for rows in _blocks(length) if pos_query is not None else ():
        scores[..., rows[0] : rows[1]].copy_(_position_scores(key, pos_query, rows).transpose(-1, -2))
    for rows in _blocks(length) if pos_key is not None else ():
        block = scores[:, :, rows[0] : rows[1]]
        positional = _position_scores(query, pos_key, rows)
        block.copy_(positional) if pos_query is None else block.add_(positional)
    content = (query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
    if pos_key is None and pos_query is None:
        torch.bmm(*content, out=scores.flatten(0, 1))
    else:
        scores.flatten(0, 1).baddbmm_(*content)
    lowest = torch.finfo(scores.dtype).min
    if scores.dtype == torch.float16:  # its range is so narrow that a sum would overflow
        return scores.masked_fill_(~mask, lowest)
    # lowest + score == lowest in a wide-exponent type, so adding is filling; a masked_fill_ costs 20 times as much.
    return scores.add_(mask.to(scores.dtype).sub_(1).mul_(-lowest))
