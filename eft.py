"""The epipolar feature transformer (EFT): a feature and a color for every query ray, from a few images (Sec. 3.1).

A query ray is cut into `D` points. Each is projected into every input view and picks up the view's features there: the
points of one ray lie on the view's epipolar line. Three transformers then talk along one axis each:

    T1 `visual`    across the V views of a point          what do the views say about this point?
    T2 `epipolar`  along the D points of a ray in a view  at which depth is the surface? (softmax over D, weighted sum)
    T3 `views`     across the V views of a ray            which view to trust?           (softmax over V, weighted sum)

The three-stage layout is that of GPNR (Suhail et al., ECCV 2022). All geometry happens in the view frame of the query
camera, so for a given depth range the result does not depend on the world's origin, nor on the order of the inputs.

Differences from the released code (its `sparsefusion/eft.py`): the trunk ends after its third stage; the linear layer
that opens a transformer is applied to each part of its input, before the parts are sampled, broadcast and added, which
gives the same numbers for less work; in evaluation mode dropout is off and the batch norms use their running
statistics, while the released demo stays in training mode [released: load_model.py:33-45, 179; distillation.py:97-109].

Letters: `*` optional batch of query viewpoints, `V` input views, `R` rays, `D` points a ray, `B` images, `C` channels
of the trunk, `N` width of the transformers, `L` tokens that attend to each other, `n` numbers in a part of a token,
`H W` image rows and columns, `h w` those of a map.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cameras import Cameras, pixel_grid, relative_to


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


PAPER = EFTConfig()
NANO = EFTConfig(stem=32, stages=(32, 64, 96), width=96, layers=2, feedforward=96, dropout=0.0)


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

    NDC +-1 is the center of a border pixel; outside, the border's values go on [released: eft.py:251-257, 289-296].
    """
    # NDC run left and up, images right and down: both signs flip.
    flat_maps = maps.flatten(0, -4).float()  # (* V, C, h, w)
    flat_xy = -xy.flatten(0, -4)             # (* V, R, D, 2)
    samples = F.grid_sample(flat_maps, flat_xy, mode="bilinear", padding_mode="border", align_corners=True)
    samples = samples.permute(0, 2, 3, 1).to(maps.dtype)
    return samples.unflatten(0, maps.shape[:-3])


# ---------------------------------------------------------------------------------------------- transformers

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


class EncoderLayer(nn.TransformerEncoderLayer):
    """PyTorch's post-norm encoder layer (Vaswani et al., 2017) with its attention written out.

    Here sequences are short (V views, D points) and there are up to a million of them: fused attention kernels waste
    most of a tile on them, and on a GPU the one for float32 refuses more than 65,535 sequences when dropout is on.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., L, N) -> (..., L, N)."""
        x = normalize(self.norm1, x + self.dropout1(self.attend(x)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return normalize(self.norm2, x + self.dropout2(self.linear2(hidden)))

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention along L: (..., L, N) -> (..., L, N)."""
        attention = self.self_attn

        # Project the tokens to queries, keys and values of every head.
        projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = projected.chunk(3, dim=-1)
        query = split_heads(query, attention.num_heads)  # (..., heads, L, N / heads)
        key = split_heads(key, attention.num_heads)
        value = split_heads(value, attention.num_heads)

        # Every token takes the mean of the values, weighted by how well its query fits their keys.
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = F.dropout(scores.softmax(-1), attention.dropout, self.training)  # (..., heads, L, L)
        mixed = weights @ value
        return attention.out_proj(mixed.transpose(-2, -3).flatten(-2))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., L, N) -> (..., heads, L, N / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def normalize(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer normalization (Ba et al., 2016) of tokens (..., N) in their own precision, the statistics in float32.

    Autocast would return float32, and every later addition would read and write twice the bytes, which is what a layer
    on a million short tokens spends its time on.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


class Transformer(nn.Module):
    """Linear layer and GELU, then encoder layers; no positional encoding. A token is a concatenation of parts."""

    def __init__(self, config: EFTConfig, **sizes: int):
        super().__init__()
        self.input = SplitLinear(config.width, **sizes)
        self.encoder = nn.Sequential()
        for _ in range(config.layers):
            layer = EncoderLayer(config.width, config.heads, config.feedforward, config.dropout, batch_first=True)
            self.encoder.append(layer)

    def forward(self, products: Tensor) -> Tensor:
        """Tokens that attend to each other along L: (..., L, N), as `input.multiply` left them -> (..., L, N)."""
        tokens = products + self.input.bias.to(products.dtype)
        return self.encoder(F.gelu(tokens))


def weighted_sum(tokens: Tensor, logit: nn.Linear) -> Tensor:
    """Tokens (..., L, N) -> their mean over L, (..., N), weighted by the softmax of what `logit` says of each."""
    weights = logit(tokens).softmax(-2)  # (..., L, 1)
    return (weights * tokens).sum(-2)


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
        self.visual = Transformer(config, reference_ray=ray_size, depth=depth_size, features=channels, color=3)
        self.epipolar = Transformer(config, query_ray=ray_size, reference_ray=ray_size, depth=depth_size, visual=width)
        self.views = Transformer(config, query_ray=ray_size, reference_ray=ray_size, epipolar=width)

        self.depth_logit = nn.Linear(width, 1)
        self.view_logit = nn.Linear(width, 1)
        self.color = nn.Linear(width, 3)

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

        # T1, across the views of a point: tokens (*, R, D, V, .). `encode` has multiplied the features already.
        reference_ray = geometry.reference_rays.movedim(-4, -2)
        depth = geometry.depths.unsqueeze(-2)
        color = sampled_colors.movedim(-4, -2)
        products = self.visual.input.multiply(reference_ray=reference_ray, depth=depth, color=color)
        visual = self.visual(sampled_features.movedim(-4, -2) + products)

        # T2, along the points of a ray in a view: tokens (*, R, V, D, .), of which (*, R, V, N) remains.
        query_ray = geometry.query_rays[..., None, None, :]
        reference_ray = geometry.reference_rays.movedim(-4, -3)
        depth = geometry.depths.unsqueeze(-3)
        visual = visual.transpose(-2, -3)
        products = self.epipolar.input.multiply(query_ray=query_ray, reference_ray=reference_ray, depth=depth,
                                                visual=visual)
        epipolar = weighted_sum(self.epipolar(products), self.depth_logit)

        # T3, across the views of a ray: tokens (*, R, V, .), of which (*, R, N) remains. The reference ray of the
        # middle point stands for those of all [released: eft.py:445-448].
        query_ray = geometry.query_rays.unsqueeze(-2)
        reference_ray = geometry.reference_rays[..., self.config.depths // 2, :].transpose(-2, -3)
        products = self.views.input.multiply(query_ray=query_ray, reference_ray=reference_ray, epipolar=epipolar)
        features = weighted_sum(self.views(products), self.view_logit)

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
              far: float | Tensor, chunk: int = 128) -> Prediction:
        """Feature map (*, N, size, size) and color image (*, 3, size, size) of a whole query view.

        `size` is the conditioning map's (H / 8) or the image's own, H; the outer rays pass through the outermost pixels
        of the full image. `chunk` rays go at a time: 128 fit a CPU's caches, a GPU wants thousands.
        """
        grid = pixel_grid(size, size, full=images.shape[-1], device=images.device)
        parts = [self(maps, images, cameras, query, xy, near, far) for xy in grid.split(chunk)]
        features = torch.cat([part.features for part in parts], dim=-2)  # (*, size^2, N)
        color = torch.cat([part.color for part in parts], dim=-2)        # (*, size^2, 3)
        return Prediction(as_map(features, size), as_map(color, size))


def as_map(rays: Tensor, size: int) -> Tensor:
    """Values of the rays of a grid (*, size^2, C), row by row -> (*, C, size, size)."""
    return rays.transpose(-1, -2).unflatten(-1, (size, size))
