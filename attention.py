"""What the EFT's transformers are made of: linear layers on concatenations, encoder layers for many short sequences.

Letters: `L` tokens that attend to each other, `T` others beside them, `N` width of a token, `n` numbers in a part of
one.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SplitLinear(nn.Linear):
    """A linear layer on a concatenation that is never built: W [a, b] = W_a a + W_b b.

    Every part is multiplied at its own shape and then broadcast: a query ray once, not once a view and point. Called
    with a concatenation, it is the ordinary layer.
    """

    def __init__(self, width: int, **sizes: int):
        """A name and a number of components for every part, in the order of the concatenation."""
        super().__init__(sum(sizes.values()), width)
        self.sizes = sizes

    def columns(self) -> dict[str, Tensor]:
        """The columns of the weight that multiply each part, (N, n)."""
        blocks = self.weight.split(list(self.sizes.values()), dim=1)
        return dict(zip(self.sizes, blocks))

    def multiply(self, **parts: Tensor) -> Tensor:
        """What the given parts (..., n) add to the result (..., N), without the bias; their leading axes broadcast."""
        columns = self.columns()
        products = [F.linear(x, columns[name]) for name, x in parts.items()]
        return sum(products[1:], start=products[0])


class Folded(NamedTuple):
    """The linear layers of an attention, multiplied where they meet only as products."""
    query: Tensor        # (heads * N, N) W_k^T W_q of every head, scaled: a token as what the others are multiplied by
    query_bias: Tensor   # (heads * N,) W_k^T b_q, scaled
    value: Tensor        # (N, heads * N) W_o W_v of every head: a mean of tokens as what the layer returns
    value_bias: Tensor   # (N, heads) W_o b_v


class EncoderLayer(nn.TransformerEncoderLayer):
    """PyTorch's post-norm encoder layer (Vaswani et al., 2017) with its attention written out.

    Here sequences are short (V views, D points) and there are up to millions of them: fused attention kernels waste
    most of a tile on them, and on a GPU the one for float32 refuses more than 65,535 sequences when dropout is on.
    """

    def forward(self, x: Tensor, axis: int = -2) -> Tensor:
        """Tokens attend to each other along an axis: (..., L, N) along -2, (..., L, T, N) along -3. The same shape."""
        x = normalize(self.norm1, x + self.dropout1(self.attend(x, axis)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return normalize(self.norm2, x + self.dropout2(self.linear2(hidden)))

    def attend(self, x: Tensor, axis: int) -> Tensor:
        """Self-attention along an axis. Shapes as in `forward`."""
        heads = self.self_attn.num_heads
        bias = self.self_attn.out_proj.bias
        dropout = self.self_attn.dropout if self.training else 0.0
        folded = self.folded()

        # A token, asked by every head. Its products with the tokens say how well they fit.
        query = F.linear(x, folded.query, folded.query_bias)
        query = query.unflatten(-1, (heads, -1)).movedim(-2, 0)  # (heads, ..., N)
        mixed, total = MIXERS[axis](query, x, dropout)
        mixed = mixed.movedim(0, -2).flatten(-2)  # (..., heads * N)

        # The weights add up to one, unless some of them were dropped.
        if dropout == 0:
            bias = bias + folded.value_bias.sum(1)
            return F.linear(mixed, folded.value, bias)
        bias = F.linear(total.movedim(0, -1), folded.value_bias, bias)
        return F.linear(mixed, folded.value) + bias

    def folded(self) -> Folded:
        """Half the work: (W_q x + b_q) (W_k y + b_k) = (W_k^T W_q x + W_k^T b_q) y + what is the same for all y.

        What is the same for all y drops out of the softmax. Values are mixed with weights that add up to one, so
        W_v and W_o can wait until after it. The products of weights are in float32, whatever the tokens are in.
        """
        attention = self.self_attn
        heads = attention.num_heads
        with torch.autocast(attention.in_proj_weight.device.type, enabled=False):
            # The layers of every head.
            query, key, value = attention.in_proj_weight.unflatten(0, (3, heads, -1))  # (heads, N / heads, N) each
            query_bias, _, value_bias = attention.in_proj_bias.unflatten(0, (3, heads, -1))
            out = attention.out_proj.weight.unflatten(1, (heads, -1))                  # (N, heads, N / heads)
            out = out.transpose(0, 1)

            # Queries and keys, divided by the root of their length.
            key = key.mT * key.shape[1] ** -0.5
            joint_query = key @ query  # (heads, N, N)
            joint_query_bias = key @ query_bias.unsqueeze(-1)

            # Values and what the layer returns.
            joint_value = out @ value  # (heads, N, N)
            joint_value = joint_value.transpose(0, 1)
            joint_value_bias = out @ value_bias.unsqueeze(-1)
            joint_value_bias = joint_value_bias.squeeze(-1).t()
        return Folded(joint_query.flatten(0, 1), joint_query_bias.flatten(), joint_value.flatten(1), joint_value_bias)


class Mixed(NamedTuple):
    """What attention makes of tokens (..., L, N) or (..., L, T, N), for every head."""
    tokens: Tensor  # (heads, ..., N) their weighted means
    total: Tensor   # (heads, ...) sums of the weights: 1, unless some were dropped


def mix_along_rows(query: Tensor, x: Tensor, dropout: float) -> Mixed:
    """Attention of queries (heads, ..., L, N) along L of tokens (..., L, N), as matrix products."""
    scores = query @ x.transpose(-1, -2)  # (heads, ..., L, L)
    weights = F.dropout(scores.softmax(-1), dropout)
    weights = weights.to(x.dtype)
    return Mixed(weights @ x, weights.sum(-1))


def mix_across_views(query: Tensor, x: Tensor, dropout: float) -> Mixed:
    """Attention of queries (heads, ..., L, T, N) along L of tokens (..., L, T, N)."""
    if x.shape[-3] == 2 and dropout == 0:
        return mix_pairs(query, x)

    # The axis becomes that of a matrix's rows.
    query = query.transpose(-2, -3)
    tokens, total = mix_along_rows(query, x.transpose(-2, -3), dropout)
    return Mixed(tokens.transpose(-2, -3), total.transpose(-1, -2))


def mix_pairs(query: Tensor, x: Tensor) -> Mixed:
    """The same for L = 2, as products of matrices of two rows would be mostly overhead."""
    first, second = x.split(1, dim=-3)
    difference = (query * (second - first)).sum(-1, keepdim=True)  # (heads, ..., 2, T, 1)

    # A softmax of two numbers is the logistic function of their difference.
    share = difference.sigmoid().to(x.dtype)
    total = torch.ones_like(share[..., 0])
    return Mixed(torch.lerp(first, second, share), total)


# By the axis along which tokens attend to each other.
MIXERS = {-2: mix_along_rows, -3: mix_across_views}


def normalize(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer normalization (Ba et al., 2016) of tokens (..., N) in their own precision, the statistics in float32.

    Autocast would return float32, and every later addition would read and write twice the bytes, which is what a layer
    on a million short tokens spends its time on.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
