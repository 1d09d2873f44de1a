"""Exact attention for DeBERTa-v2 and -v3. Gains: ms per layer and step, float32 681 → 338, bfloat16 208 → 111.

Measured in benchmarks/README.md: DeBERTaV3-base, batch 32, length 64, two EPYC cores. It was not measured on a GPU.
`nlu.fast.attention` computes the scores; here are the positions that occur, and the modules.
"""

import functools
import math

import torch
from torch import nn
from transformers.models.deberta_v2 import modeling_deberta_v2 as stock

from nlu.fast.attention import DisentangledAttention


@functools.lru_cache(maxsize=1024)
def _bucket_rows(length: int, span: int, buckets: int, farthest: int, device: torch.device) -> torch.Tensor:
    """The row of the embeddings for each distance −(length−1) … length−1, (2·length − 1,).

    It is made on the host, from which the stock function takes its constants, and copied to the device once per length.
    Otherwise every layer would copy it in every step.
    """
    distances = torch.arange(1 - length, length, device="cpu")
    if buckets > 0:
        distances = stock.make_log_bucket_position(distances, buckets, farthest)
    return (distances.to(torch.long) + span).clamp(0, 2 * span - 1).to(device)


class FastDisentangledSelfAttention(stock.DisentangledSelfAttention):
    """`DisentangledSelfAttention` with the same parameters and results; see the module's docstring."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        output_attentions: bool = False,
        query_states: torch.Tensor | None = None,
        relative_pos: torch.Tensor | None = None,
        rel_embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the stock module. `relative_pos` is the ordered distances (1-D) that `FastDebertaV2Encoder` passes, or
        None. The stock method handles any other relative positions (a caller's own), queries of another length,
        requests for attention weights, and `torch.compile`."""
        queries = hidden_states if query_states is None else query_states
        ordered = relative_pos is None or relative_pos.dim() == 1
        whole = queries.size(-2) == hidden_states.size(-2)
        if output_attentions or not ordered or not whole or torch.compiler.is_compiling():
            relative_pos = None if ordered else relative_pos
            return super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        query, key, value = self.query_proj(queries), self.key_proj(hidden_states), self.value_proj(hidden_states)
        parts = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
        scale = 1 / math.sqrt(self.attention_head_size * parts)
        pos_key, pos_query = self._positions(rel_embeddings, hidden_states.size(-2), scale, query.dtype)
        mask = attention_mask.bool()
        mask = mask.view((1,) * (4 - mask.dim()) + mask.shape).transpose(0, 1)
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        heads = self.num_attention_heads
        return DisentangledAttention.apply(query, key, value, pos_key, pos_query, mask, heads, scale, dropout_p), None

    def _positions(
        self, rel_embeddings: torch.Tensor | None, length: int, scale: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The projected relative positions of a sequence of `length`, a row per head and distance (H, 2·length − 1, d):
        for c2p by falling distance, for p2c by rising distance and scaled; None if the model has none."""
        c2p, p2c = (self.relative_attention and kind in self.pos_att_type for kind in ("c2p", "p2c"))
        if not (c2p or p2c):
            return None, None
        first, last, index = self._occurring(length, rel_embeddings.device)
        rows = self.pos_dropout(rel_embeddings[first:last]).unsqueeze(0)

        def project(projection: nn.Module) -> torch.Tensor:
            projected = projection(rows).to(dtype).squeeze(0)
            projected = projected if index is None else projected.index_select(0, index)
            return projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(0, 1)

        pos_key = project(self.key_proj if self.share_att_key else self.pos_key_proj) if c2p else None
        pos_query = project(self.query_proj if self.share_att_key else self.pos_query_proj) if p2c else None
        return pos_key.flip(1) if c2p else None, (pos_query * scale).contiguous() if p2c else None

    def _occurring(self, length: int, device) -> tuple[int, int, torch.Tensor | None]:
        """Rows [first, last) of the embeddings hold every position that occurs among `length` tokens; the index picks
        the row, counted from `first`, of each distance −(length−1) … length−1, None if that is the row itself."""
        span, farthest = self.pos_ebd_size, length - 1
        exact = self.position_buckets // 2 if self.position_buckets > 0 else span - 1
        if farthest <= exact and farthest < span:
            return span - farthest, span + farthest + 1, None
        if self.position_buckets > 0:
            growth = math.log(farthest / exact) / math.log((self.max_relative_positions - 1) / exact)
            farthest = exact + math.ceil(growth * (exact - 1)) + 1  # one more, for float32 rounding
        first, last = max(0, span - farthest), min(2 * span, span + farthest + 1)
        index = _bucket_rows(length, span, self.position_buckets, self.max_relative_positions, device) - first
        return first, last, index


class FastDebertaV2Encoder(stock.DebertaV2Encoder):
    """The stock encoder without the (L, L) relative positions, which the fast attention does not need."""

    def get_rel_pos(self, hidden_states, query_states=None, relative_pos=None):
        if relative_pos is not None or not self.relative_attention or query_states is not None:
            return super().get_rel_pos(hidden_states, query_states, relative_pos)
        length = hidden_states.size(-2)
        return torch.arange(1 - length, length, device=hidden_states.device)


def _covers(module: nn.Module) -> bool:
    buckets = module.position_buckets if module.relative_attention else 0
    return (
        type(module) is stock.DisentangledSelfAttention
        and "forward" not in vars(module)
        and isinstance(module.dropout, nn.Dropout)
        and (buckets <= 0 or 2 <= buckets // 2 < module.max_relative_positions - 1)
    )


def enable_deberta_attention(model: nn.Module) -> int:
    """Replace the self-attention of every DeBERTa-v2/v3 encoder in `model`; returns the number of attention modules.

    Only the class of the modules changes, so parameters, hooks and the state dict stay as they are. An encoder with
    a subclass or configuration that is not covered keeps the stock implementation, and other models are left alone.
    """
    replaced = 0
    for encoder in model.modules():
        if type(encoder) is not stock.DebertaV2Encoder:
            continue
        attentions = [layer.attention.self for layer in encoder.layer]
        if all(map(_covers, attentions)):
            encoder.__class__ = FastDebertaV2Encoder
            for attention in attentions:
                attention.__class__ = FastDisentangledSelfAttention
            replaced += len(attentions)
    return replaced
