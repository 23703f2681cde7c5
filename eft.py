"""The epipolar feature transformer (EFT): a feature and a color for every query ray, from a few images (Sec. 3.1).

A query ray is cut into `D` points. Each is projected into every input view and picks up the view's features there: the
points of one ray lie on the view's epipolar line. Three transformers then talk along one axis each:

    T1 `visual`    across the V views of a point          what do the views say about this point?
    T2 `epipolar`  along the D points of a ray in a view  at which depth is the surface? (softmax over D, weighted sum)
    T3 `views`     across the V views of a ray            which view to trust?           (softmax over V, weighted sum)

The three-stage layout is that of GPNR (Suhail et al., ECCV 2022). All geometry happens in the view frame of the query
camera, so for a given depth range the result does not depend on the world's origin, nor on the order of the inputs.

Differences from the released code (its `sparsefusion/eft.py`): the trunk ends after its third stage; the linear layer
that opens a transformer is applied to each part of its input, before the parts are sampled, broadcast and added, and
the linear layers of an attention that meet only as products are multiplied beforehand (`EncoderLayer`), which gives
the same numbers for less work; in evaluation mode dropout is off and the batch norms use their running
statistics, while the released demo stays in training mode [released: load_model.py:33-45, 179; distillation.py:97-109].

Shapes: `*` optional batch of query viewpoints, `V` input views, `R` rays, `D` points a ray, `B` images, `C` channels
of the trunk, `N` width of the transformers, `L` tokens that attend to each other, `T` others beside them, `n` numbers
in a part of a token, `H W` image rows and columns, `h w` those of a map.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cameras import Cameras, pixel_grid, relative_to
from common.machine import map_threads


@dataclass(frozen=True)
class EFTConfig:
    """The numbers of an EFT. [paper]: Sec. 3.1 and the supplement. Range of depths: [released: train.py:349-351]."""
    stem: int = 64                                 # channels of the trunk's first convolution, ResNet-18's
    stages: tuple[int, int, int] = (64, 128, 256)  # channels of the trunk's stages 1 to 3 [released: eft.py:96-106]
    blocks: int = 2                                # residual blocks of a stage, ResNet-18's
    width: int = 256                               # width of the transformers and of the feature handed on [paper]
    layers: int = 4                                # encoder layers of a transformer [paper]
    heads: int = 1                                 # attention heads of an encoder layer [released: eft.py:20-34]
    feedforward: int = 256                         # hidden width of the feed-forward part [released: eft.py:20-34]
    dropout: float = 0.1                           # dropout of the encoder layers in training [released: eft.py:20-34]
    depths: int = 20                               # points a ray [paper]
    harmonics: int = 6                             # frequencies 1, 2, ..., 2^5 of the harmonic embedding [paper]
    depth_margin: float = 5.0                      # rays run so far before and behind the mean camera distance


# ---------------------------------------------------------------------------------------------- encoder layers

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


# ---------------------------------------------------------------------------------------------- the trunk

class ResidualBlock(nn.Module):
    """ResNet's basic block (He et al., 2016): two 3x3 convolutions with batch norm, added to a (projected) shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

        # The shortcut is projected where channels or resolution change.
        self.downsample = nn.Identity()
        if stride != 1 or channels_in != channels:
            projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, h, w) -> (B, channels, h / stride, w / stride)."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + self.downsample(x))


class ResNetTrunk(nn.Module):
    """ResNet up to its third stage; the maps of stem and stages, brought to the stem's resolution and concatenated.

    [released: eft.py:180-205]
    """

    def __init__(self, config: EFTConfig):
        super().__init__()
        first, second, third = config.stages
        self.conv1 = nn.Conv2d(3, config.stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.stem)
        self.layer1 = resnet_stage(config.stem, first, config.blocks, stride=1)
        self.layer2 = resnet_stage(first, second, config.blocks, stride=2)
        self.layer3 = resnet_stage(second, third, config.blocks, stride=2)
        self.channels = config.stem + first + second + third

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> maps (B, C, H/2, W/2).

        The images are in [0, 1] on black, without ImageNet's mean and deviation [released: eft.py:164-178].
        """
        stem = F.relu(self.bn1(self.conv1(images)))                       # (B, ., H/2, W/2)
        stage1 = self.layer1(F.max_pool2d(stem, 3, stride=2, padding=1))  # (B, ., H/4, W/4)
        stage2 = self.layer2(stage1)                                      # (B, ., H/8, W/8)
        stage3 = self.layer3(stage2)                                      # (B, ., H/16, W/16)

        # Bring all maps to the stem's resolution, half the image's.
        maps = [stem]
        for stage in (stage1, stage2, stage3):
            maps.append(F.interpolate(stage, stem.shape[-2:], mode="bilinear", align_corners=True))
        return torch.cat(maps, dim=1)


def resnet_stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` residual blocks; the first one changes channels and resolution."""
    stage = nn.Sequential(ResidualBlock(channels_in, channels, stride))
    for _ in range(blocks - 1):
        stage.append(ResidualBlock(channels, channels, stride=1))
    return stage


# ---------------------------------------------------------------------------------------------- rays and points

class Geometry(NamedTuple):
    """Query rays and their points, embedded, in the query camera's view frame."""
    query_rays: Tensor      # (*, R, n) lines of the query rays
    reference_rays: Tensor  # (*, V, R, D, n) lines from every input camera's center to every point
    depths: Tensor          # (*, 1, D, n) depths of the points
    xy_views: Tensor        # (*, V, R, D, 2) NDC of the points in the input views, not embedded


def harmonic(x: Tensor, harmonics: int) -> Tensor:
    """Harmonic embedding of (..., k): its sines at frequencies 1, 2, 4, ..., its cosines, and itself (NeRF, Sec. 5.1).

    Returns (..., k * (2 * harmonics + 1)). The sines of the first component come before those of the second, and so do
    the cosines [released: common_utils.py:120-151].
    """
    frequencies = 2.0 ** torch.arange(harmonics, device=x.device)
    angles = (x.unsqueeze(-1) * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos(), x], dim=-1)


def plucker(origins: Tensor, directions: Tensor) -> Tensor:
    """Plücker coordinates (d, o x d) of lines through `origins` along `directions`, (..., 3) each: (..., 6).

    `directions` may have any length; d is the unit vector [released: eft.py:208-214].
    """
    directions = F.normalize(directions, dim=-1)
    return torch.cat([directions, torch.linalg.cross(origins, directions)], dim=-1)


def sample_maps(maps: Tensor, xy: Tensor) -> Tensor:
    """Bilinear samples of maps (*, V, C, h, w) at NDC positions (*, V, R, D, 2): (*, V, R, D, C).

    The leading axes of the maps broadcast, so that many query views share the same maps. NDC +-1 is the center of a
    border pixel; outside, the border's values go on [released: eft.py:251-257, 289-296]. A sample is the weighted sum
    of four rows of a table, a row a pixel: on a CPU an eighth of `grid_sample`'s time, which goes channel by channel.
    """
    # NDC run left and up, columns and rows right and down. A point in a camera's plane has no place; it gets pixel 0.
    height, width = maps.shape[-2:]
    last = xy.new_tensor([width - 1, height - 1])
    place = ((1 - xy) * (last / 2)).nan_to_num(0).clamp(xy.new_zeros(2), last)  # (*, V, R, D, 2) column, row

    # The pixel to the upper left, of those that have neighbors to the right and below, and how far beyond it.
    corner = place.floor().clamp(max=(last - 1).clamp(min=0))
    column, row = (place - corner).unbind(-1)
    weights = torch.stack([(1 - row) * (1 - column), (1 - row) * column, row * (1 - column), row * column], -1)

    # The four pixels by their rows in the table.
    table = maps.movedim(-3, -1)  # (*, V, h, w, C)
    tables = table.shape[:-3]
    first = torch.arange(tables.numel(), device=xy.device).view(*tables, 1, 1) * (height * width)
    column, row = corner.long().unbind(-1)
    right = min(1, width - 1)
    below = width * min(1, height - 1)
    pixels = first + row * width + column  # (*, V, R, D)
    pixels = pixels.unsqueeze(-1) + torch.tensor([0, right, below, below + right], device=xy.device)

    rows = table.reshape(-1, table.shape[-1]).float()
    samples = F.embedding_bag(pixels.view(-1, 4), rows, mode="sum", per_sample_weights=weights.view(-1, 4))
    return samples.to(maps.dtype).view(*pixels.shape[:-1], rows.shape[-1])


# ---------------------------------------------------------------------------------------------- transformers

class Transformer(nn.Module):
    """Linear layer and GELU, then encoder layers; no positional encoding. A token is a concatenation of parts."""

    def __init__(self, config: EFTConfig, axis: int, **sizes: int):
        """axis: along which tokens attend to each other, -2 or -3."""
        super().__init__()
        self.axis = axis
        self.input = SplitLinear(config.width, **sizes)
        self.encoder = nn.ModuleList()
        for _ in range(config.layers):
            layer = EncoderLayer(config.width, config.heads, config.feedforward, config.dropout, batch_first=True)
            self.encoder.append(layer)

    def forward(self, products: Tensor) -> Tensor:
        """Tokens (..., L, N) or (..., L, T, N), as `input.multiply` left them: what the others told them, as many."""
        tokens = F.gelu(products + self.input.bias.to(products.dtype))
        for layer in self.encoder:
            tokens = layer(tokens, self.axis)
        return tokens


def weighted_sum(tokens: Tensor, logit: nn.Linear, axis: int) -> Tensor:
    """The mean of tokens along an axis, which goes, weighted by the softmax of what `logit` says of each."""
    weights = logit(tokens).softmax(axis)
    return (weights * tokens).sum(axis)


# ---------------------------------------------------------------------------------------------- the whole

class Prediction(NamedTuple):
    """What the EFT says about query rays."""
    features: Tensor  # (*, R, N), or (*, N, size, size) of a whole view
    color: Tensor     # (*, R, 3), or (*, 3, size, size) of a whole view; in [0, 1]


class EFT(nn.Module):
    """The epipolar feature transformer (Sec. 3.1) [released: eft.py:117-138, 406-452]."""

    def __init__(self, config: EFTConfig):
        super().__init__()
        self.config = config
        self.trunk = ResNetTrunk(config)

        # A token of T1, T2 and T3 is the concatenation of these parts: 606, 425 and 412 numbers in the paper's preset.
        depth_size = 2 * config.harmonics + 1
        ray_size = 6 * depth_size
        channels = self.trunk.channels
        width = config.width
        self.visual = Transformer(config, -3, reference_ray=ray_size, depth=depth_size, features=channels, color=3)
        self.epipolar = Transformer(config, -2, query_ray=ray_size, reference_ray=ray_size, depth=depth_size,
                                    visual=width)
        self.views = Transformer(config, -3, query_ray=ray_size, reference_ray=ray_size, epipolar=width)

        self.depth_logit = nn.Linear(width, 1)
        self.view_logit = nn.Linear(width, 1)
        self.color = nn.Linear(width, 3)

    def ray_bytes(self, views: int) -> int:
        """Bytes of all tokens of a ray in float32: how much memory goes with a ray, and with every input view."""
        return 4 * views * self.config.depths * self.config.width

    def encode(self, images: Tensor) -> Tensor:
        """Feature maps of the input images (*, V, 3, H, W) in [0, 1], black background: (*, V, N, H/2, W/2).

        Bilinear sampling and T1's input layer are both linear, so the layer multiplies the trunk's maps here, once, and
        not every sample of them.
        """
        trunk_maps = self.trunk(images.flatten(0, -4))     # (* V, C, H/2, W/2)
        columns = self.visual.input.columns()["features"]  # (N, C)
        maps = F.conv2d(trunk_maps, columns[..., None, None])
        return maps.unflatten(0, images.shape[:-3])

    def forward(self, maps: Tensor, images: Tensor, cameras: Cameras, query: Cameras, xy: Tensor,
                near: float | Tensor, far: float | Tensor) -> Prediction:
        """Features (*, R, N) and colors (*, R, 3) of query rays.

        maps (*, V, N, h, w) from `encode`, images (*, V, 3, H, W) in [0, 1]; `cameras` (*, V) of the inputs and `query`
        (*) in the world; xy (R, 2) or (*, R, 2): NDC of the rays in the query view; near, far: depth range, CO3D units,
        numbers or (*,).
        """
        with torch.autocast(xy.device.type, enabled=False):  # positions and angles need float32
            geometry = self.geometry(cameras, query, xy, near, far)

        # Every point picks up features and a color where the input views see it.
        sampled_features = sample_maps(maps, geometry.xy_views)  # (*, V, R, D, N)
        sampled_colors = sample_maps(images, geometry.xy_views)  # (*, V, R, D, 3)

        # T1, across the views of a point: tokens (*, V, R D, .). `encode` has multiplied the features already.
        grid = sampled_features.shape[-3:-1]             # (R, D)
        depth = geometry.depths.unsqueeze(-3)            # (*, 1, 1, D, n)
        products = self.visual.input.multiply(depth=depth, color=sampled_colors, reference_ray=geometry.reference_rays)
        visual = self.visual((sampled_features + products).flatten(-3, -2)).unflatten(-2, grid)

        # T2, along the points of a ray in a view: tokens (*, V, R, D, .), of which (*, V, R, N) remains.
        query_ray = geometry.query_rays[..., None, :, None, :]
        products = self.epipolar.input.multiply(query_ray=query_ray, depth=depth,
                                                reference_ray=geometry.reference_rays, visual=visual)
        epipolar = weighted_sum(self.epipolar(products), self.depth_logit, axis=-2)

        # T3, across the views of a ray: tokens (*, V, R, .), of which (*, R, N) remains. The reference ray of the
        # middle point stands for those of all [released: eft.py:445-448].
        query_ray = geometry.query_rays.unsqueeze(-3)
        reference_ray = geometry.reference_rays[..., self.config.depths // 2, :]
        products = self.views.input.multiply(query_ray=query_ray, reference_ray=reference_ray, epipolar=epipolar)
        features = weighted_sum(self.views(products), self.view_logit, axis=-3)

        color = self.color(features).float().sigmoid()
        return Prediction(features.float(), color)

    def geometry(self, cameras: Cameras, query: Cameras, xy: Tensor, near: float | Tensor,
                 far: float | Tensor) -> Geometry:
        """Query rays, their points, and how the input views see them. Arguments as in `forward`."""
        # The world's origin and axes become the query camera's.
        leading = query.T.shape[:-1]
        cameras = relative_to(cameras, query.unsqueeze(len(leading)))
        query = relative_to(query, query)

        # Cut every ray into points, equally spaced in depth, both ends included.
        near = torch.as_tensor(near, dtype=xy.dtype, device=xy.device).expand(leading)
        far = torch.as_tensor(far, dtype=xy.dtype, device=xy.device).expand(leading)
        fractions = torch.linspace(0, 1, self.config.depths, device=xy.device)
        depths = near[..., None, None] + (far - near)[..., None, None] * fractions   # (*, 1, D)
        rays_o, rays_d = query.rays(xy.expand(*leading, *xy.shape[-2:]))             # (*, R, 3) each
        points = rays_o.unsqueeze(-2) + depths.unsqueeze(-1) * rays_d.unsqueeze(-2)  # (*, R, D, 3)

        # Project the points into every input view, and draw lines to them from its camera's center.
        grid = points.shape[-3:-1]                            # (R, D)
        points = points.flatten(-3, -2).unsqueeze(-3)         # (*, 1, R D, 3)
        xy_views, _ = cameras.project(points)                 # (*, V, R D, 2)
        centers = cameras.centers().unsqueeze(-2)             # (*, V, 1, 3)
        reference_lines = plucker(centers, points - centers)  # (*, V, R D, 6)

        # Embed the lines and the depths.
        harmonics = self.config.harmonics
        query_rays = harmonic(plucker(rays_o, rays_d), harmonics)
        reference_rays = harmonic(reference_lines, harmonics).unflatten(-2, grid)
        embedded_depths = harmonic(depths.unsqueeze(-1), harmonics)
        return Geometry(query_rays, reference_rays, embedded_depths, xy_views.unflatten(-2, grid))

    def image(self, maps: Tensor, images: Tensor, cameras: Cameras, query: Cameras, size: int, near: float | Tensor,
              far: float | Tensor, chunk: int = 128, where: Tensor | None = None) -> Prediction:
        """Feature map (*, N, size, size) and color image (*, 3, size, size) of whole query views.

        `size` is the conditioning map's (H / 8) or the image's own, H; the outer rays pass through the outermost pixels
        of the full image. `chunk` rays of every view go at a time: 128 fit a CPU's caches, a GPU wants thousands.
        `where` (size, size): the rays to ask about, boolean; the others get zeros.
        """
        grid = pixel_grid(size, size, full=images.shape[-1], device=images.device)
        if where is not None:
            grid = grid[where.flatten()]

        def ask(xy: Tensor) -> Prediction:
            """What the network says about the rays at NDC (R, 2)."""
            return self(maps, images, cameras, query, xy, near, far)

        # Dropout draws from one stream of random numbers, so its chunks have an order.
        chunks = grid.split(chunk)
        if self.training or images.is_cuda:
            parts = [ask(xy) for xy in chunks]
        else:
            parts = map_threads(ask, chunks)
        features = torch.cat([part.features for part in parts], dim=-2)  # (*, R, N)
        color = torch.cat([part.color for part in parts], dim=-2)        # (*, R, 3)
        return Prediction(as_map(features, size, where), as_map(color, size, where))


def as_map(rays: Tensor, size: int, where: Tensor | None = None) -> Tensor:
    """Values of the rays of a grid (*, R, C), row by row -> (*, C, size, size). If not of all, of those `where` (size,
    size) is true; the others get zeros.
    """
    if where is not None:
        all_rays = rays.new_zeros(*rays.shape[:-2], size * size, rays.shape[-1])
        all_rays[..., where.flatten(), :] = rays
        rays = all_rays
    return rays.transpose(-1, -2).unflatten(-1, (size, size))
