"""The epipolar feature transformer (EFT): a feature and a color for every query ray, from a few images (Sec. 3.1).

A query ray is cut into `D` points. Each is projected into every input view and picks up the view's features there: the
points of one ray lie on the view's epipolar line. Three transformers then talk along one axis each:

    T1 `visual`    across the V views of a point          what do the views say about this point?
    T2 `epipolar`  along the D points of a ray in a view  at which depth is the surface? (softmax over D, weighted sum)
    T3 `views`     across the V views of a ray            which view to trust?           (softmax over V, weighted sum)

The three-stage layout is that of GPNR (Suhail et al., ECCV 2022). All geometry happens in the view frame of the query
camera, so for a given depth range the result does not depend on the world's origin, nor on the order of the inputs.

Our own `relative` form knows no units either, so that it may be asked about any scene. The sphere round the object is
the unit sphere: points lie in it, depths count from where a ray is nearest to its center, and the moments of lines are
about the center. Points lie in the visual hull of the input masks, too; of rays that miss it nobody asks.

Differences from the released code (its `sparsefusion/eft.py`): the trunk ends after its third stage; the linear layer
that opens a transformer is applied to each part of its input, before the parts are sampled, broadcast and added
(`SplitLinear`), and in evaluation mode the linear layers of an attention are multiplied beforehand
(`EncoderLayer.attend_folded`), which gives the same numbers for less work; in evaluation mode dropout is off and the
batch norms use their running statistics, while the released demo stays in training mode [released:
load_model.py:33-45, 179; distillation.py:97-109].

Shapes: `*` optional batch of query viewpoints, `V` input views, `R` rays, `D` points per ray, `B` images, `C` channels
of the trunk, `N` width of the transformers, `L` tokens that attend to each other, `d` numbers per head, `n` numbers in
a part of a token, `H W` image rows and columns, `h w` those of a map.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cameras import Cameras, pixel_grid, relative_to
from common.machine import map_threads
from common.settings import check_numbers, check_ranges
from gpu.layernorm import layer_norm

MASK_THRESHOLD = 0.1  # above it a pixel of a mask may be object, as in carving
FORGIVEN_VIEWS = 6    # one view of so many may be wrong about a point, as in carving
HULL_STEPS = 64       # points of a ray at which its way through the visual hull is looked for


@dataclass(frozen=True)
class EFTConfig:
    """The numbers of an EFT. [paper]: Sec. 3.1 and the supplement. Range of depths: [released: train.py:349-351]."""
    stem: int = 64                                 # channels of the trunk's first convolution, ResNet-18's
    stages: tuple[int, int, int] = (64, 128, 256)  # channels of the trunk's stages 1 to 3 [released: eft.py:96-106]
    blocks: int = 2                                # residual blocks per stage, ResNet-18's
    width: int = 256                               # width of the transformers and of the feature handed on [paper]
    layers: int = 4                                # encoder layers per transformer [paper]
    heads: int = 1                                 # attention heads per encoder layer [released: eft.py:20-34]
    feedforward: int = 256                         # hidden width of the feed-forward part [released: eft.py:20-34]
    dropout: float = 0.1                           # dropout of the encoder layers in training [released: eft.py:20-34]
    depths: int = 20                               # points per ray [paper]
    harmonics: int = 6                             # frequencies 1, 2, ..., 2^5 of the harmonic embedding [paper]
    depth_margin: float = 5.0                      # rays run so far before and behind the mean camera distance
    relative: bool = False                         # lengths in radii of the sphere round the object, points in its hull

    def __post_init__(self):
        check_numbers(self)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of {self.heads} heads")
        check_ranges(self, {"blocks": (1, 64), "layers": (1, 64), "dropout": (0, 0.999), "depth_margin": (1e-6, 1e6)})


# ---------------------------------------------------------------------------------------------- encoder layers

class SplitLinear(nn.Linear):
    """A linear layer on a concatenation that is never built: W [a, b] = W_a a + W_b b.

    Every part is multiplied at its own shape and then broadcast: a query ray once, not once per view and point. Called
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

    Here sequences are short (V views, D points) and there are up to millions of them: fused attention kernels waste
    most of a tile on them, and on a GPU the one for float32 refuses more than 65,535 sequences when dropout is on.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., L, N) attend to each other along L. The same shape."""
        dropped = self.training and self.self_attn.dropout > 0
        attended = self.attend(x) if dropped else self.attend_folded(x)
        x = layer_norm(self.norm1, x + self.dropout1(attended))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return layer_norm(self.norm2, x + self.dropout2(self.linear2(hidden)))

    def attend(self, x: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V of every head (Vaswani et al., Eq. 1): (..., L, N) -> (..., L, N)."""
        attention = self.self_attn
        projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        projected = projected.unflatten(-1, (3, attention.num_heads, -1))      # (..., L, 3, heads, d)
        query, key, value = projected.movedim(-4, -2).unbind(-4)               # (..., heads, L, d) each

        scores = query @ key.mT / math.sqrt(query.shape[-1])                   # (..., heads, L, L)
        weights = F.dropout(scores.softmax(-1), attention.dropout, self.training)
        mixed = weights @ value                                                # (..., heads, L, d)
        return attention.out_proj(mixed.transpose(-2, -3).flatten(-2))

    def attend_folded(self, x: Tensor) -> Tensor:
        """`attend` without dropout, for half the work: (..., L, N) -> (..., L, N).

        (W_q x + b_q) (W_k y + b_k) is (W_k^T W_q x + W_k^T b_q) y and what is the same for all y, which drops out of
        the softmax. Values are mixed with weights that add up to one, so W_v and W_o can wait until after it.
        """
        fold, fold_bias, unfold, unfold_bias = self.folded_layers()
        query = F.linear(x, fold, fold_bias)
        query = query.unflatten(-1, (self.self_attn.num_heads, -1)).transpose(-2, -3)  # (..., heads, L, N)

        tokens = x.unsqueeze(-3)                                                       # (..., 1, L, N)
        if x.shape[-2] == 2:
            # A softmax of two numbers is the logistic function of their difference. For two views this takes a tenth
            # of the network's time less than matrices of two rows.
            first, second = tokens.split(1, dim=-2)
            share = (query * (second - first)).sum(-1, keepdim=True).sigmoid()         # (..., heads, 2, 1)
            mixed = torch.lerp(first, second, share.to(x.dtype))                       # (..., heads, 2, N)
        else:
            mixed = (query @ tokens.mT).softmax(-1) @ tokens                           # (..., heads, L, N)
        return F.linear(mixed.transpose(-2, -3).flatten(-2), unfold, unfold_bias)

    def folded_layers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The linear layers of `attend_folded`, multiplied in float32 whatever the tokens are in: W_k^T W_q / sqrt(d)
        of every head (heads * N, N) and its bias (heads * N,), W_o W_v of every head (N, heads * N) and its bias (N,).
        """
        attention = self.self_attn
        heads = attention.num_heads
        with torch.autocast(attention.in_proj_weight.device.type, enabled=False):
            query, key, value = attention.in_proj_weight.unflatten(0, (3, heads, -1))  # (heads, d, N) each
            query_bias, _, value_bias = attention.in_proj_bias.unflatten(0, (3, heads, -1))
            out = attention.out_proj.weight.unflatten(1, (heads, -1))                  # (N, heads, d)

            key = key / math.sqrt(key.shape[1])
            fold = torch.einsum("hdn,hdm->hnm", key, query).flatten(0, 1)
            fold_bias = torch.einsum("hdn,hd->hn", key, query_bias).flatten()
            unfold = torch.einsum("nhd,hdm->nhm", out, value).flatten(1)
            return fold, fold_bias, unfold, attention.out_proj(value_bias.flatten())


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
    depths: Tensor          # (*, 1 or R, D, n) depths of the points
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
    border pixel; outside, the border's values continue [released: eft.py:251-257, 289-296].
    """
    views = xy.shape[:-3]
    images = maps.expand(*views, *maps.shape[-3:]).flatten(0, -4).to(xy.dtype)
    grid = -xy.flatten(0, -4)  # NDC run left and up, columns and rows right and down
    samples = F.grid_sample(images, grid, padding_mode="border", align_corners=True)  # (* V, C, R, D)
    return samples.movedim(1, -1).unflatten(0, views).to(maps.dtype)


def hull_maps(masks: Tensor, valid: Tensor) -> Tensor:
    """Where images may show the object, at half their size: (*, V, 1, H/2, W/2) of 0 and 1.

    masks, valid (*, V, 1, H, W): of the object, and 1 where an image shows anything. A mask that touches what its image
    does not show may continue there.
    """
    leading = masks.shape[:-3]
    masks = F.max_pool2d((masks.flatten(0, -4) > MASK_THRESHOLD).float(), 2)
    unknown = F.max_pool2d((valid.flatten(0, -4) < 0.5).float(), 2)
    touching = F.max_pool2d(masks, 3, stride=1, padding=1) * unknown
    cut_off = touching.amax((-2, -1), keepdim=True)
    return torch.maximum(masks, cut_off * unknown).unflatten(0, leading)


# ---------------------------------------------------------------------------------------------- transformers

class Transformer(nn.Module):
    """Linear layer and GELU, then encoder layers; no positional encoding. A token is a concatenation of parts."""

    def __init__(self, config: EFTConfig, **sizes: int):
        """A name and a number of components for every part of a token."""
        super().__init__()
        self.input = SplitLinear(config.width, **sizes)
        self.encoder = nn.ModuleList()
        for _ in range(config.layers):
            layer = EncoderLayer(config.width, config.heads, config.feedforward, config.dropout, batch_first=True)
            self.encoder.append(layer)

    def forward(self, products: Tensor) -> Tensor:
        """Tokens (..., L, N) as `input.multiply` left them -> (..., L, N), after they have attended along L."""
        tokens = F.gelu(products + self.input.bias.to(products.dtype)).contiguous()
        for layer in self.encoder:
            tokens = layer(tokens)
        return tokens


def weighted_sum(tokens: Tensor, logit: nn.Linear) -> Tensor:
    """The mean of tokens (..., L, N) along L, weighted by the softmax of their logits: (..., N)."""
    weights = logit(tokens).softmax(-2)
    return (weights * tokens).sum(-2)


# ---------------------------------------------------------------------------------------------- the whole

class Prediction(NamedTuple):
    """Features and colors of query rays."""
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

    def ray_bytes(self, views: int) -> int:
        """Bytes of all tokens of a ray in float32, with so many input views."""
        return 4 * views * self.config.depths * self.config.width

    def encode(self, images: Tensor) -> Tensor:
        """Feature maps of the input images (*, V, 3, H, W) in [0, 1], black background: (*, V, N, H/2, W/2).

        T1's tokens are GELU(W [reference ray, depth, feature, color] + b). Bilinear sampling and W are both linear, so
        W's columns for the feature multiply the trunk's maps here, once, and not every sample of them; the other
        columns multiply in `forward`, b and GELU follow in `Transformer.forward`.
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
        numbers, (*,) or (*, R); in the relative form, whose unit sphere is round the object, of `see_hull` or -1 to 1.
        """
        with torch.autocast(xy.device.type, enabled=False):  # positions and angles need float32
            geometry = self.geometry(cameras, query, xy, near, far)

        # Features and a color of every point, from where the input views see it.
        sampled_features = sample_maps(maps, geometry.xy_views)  # (*, V, R, D, N)
        sampled_colors = sample_maps(images, geometry.xy_views)  # (*, V, R, D, 3)

        # T1, across the views of a point: tokens (*, R, D, V, N). `encode` has multiplied the features already.
        depth = geometry.depths.unsqueeze(-4)                    # (*, 1, 1 or R, D, n)
        products = self.visual.input.multiply(depth=depth, color=sampled_colors, reference_ray=geometry.reference_rays)
        visual = self.visual((sampled_features + products).movedim(-4, -2))

        # T2, along the points of a ray in a view: tokens (*, V, R, D, N), of which (*, V, R, N) remains.
        query_ray = geometry.query_rays[..., None, :, None, :]   # (*, 1, R, 1, n)
        products = self.epipolar.input.multiply(query_ray=query_ray, depth=depth, reference_ray=geometry.reference_rays,
                                                visual=visual.movedim(-2, -4))
        epipolar = weighted_sum(self.epipolar(products), self.depth_logit)

        # T3, across the views of a ray: tokens (*, R, V, N), of which (*, R, N) remains. The reference ray of the
        # middle point stands for those of all [released: eft.py:445-448].
        query_ray = geometry.query_rays.unsqueeze(-3)            # (*, 1, R, n)
        reference_ray = geometry.reference_rays[..., self.config.depths // 2, :]
        products = self.views.input.multiply(query_ray=query_ray, reference_ray=reference_ray, epipolar=epipolar)
        features = weighted_sum(self.views(products.transpose(-2, -3)), self.view_logit)

        color = self.color(features).float().sigmoid()
        return Prediction(features.float(), color)

    def geometry(self, cameras: Cameras, query: Cameras, xy: Tensor, near: float | Tensor,
                 far: float | Tensor) -> Geometry:
        """Query rays, their points, and how the input views see them. Arguments as in `forward`."""
        cameras, rays_o, rays_d = self.rays(cameras, query, xy)
        near, far = self.interval(rays_o, near, far)

        # Cut every ray into points, equally spaced in depth, both ends included.
        fractions = torch.linspace(0, 1, self.config.depths, device=xy.device)
        depths = near.unsqueeze(-1) + (far - near).unsqueeze(-1) * fractions         # (*, 1 or R, D)
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

    def rays(self, cameras: Cameras, query: Cameras, xy: Tensor) -> tuple[Cameras, Tensor, Tensor]:
        """In the query camera's view frame the input cameras (*, V) and the origins and directions of the query rays,
        (*, R, 3) each. Arguments as in `forward`.
        """
        # The world's axes become the query camera's, and so does its origin; in the relative form that is the object.
        leading = query.T.shape[:-1]
        relative = self.config.relative
        cameras = relative_to(cameras, query.unsqueeze(len(leading)), not relative)
        query = relative_to(query, query, not relative)
        rays_o, rays_d = query.rays(xy.expand(*leading, *xy.shape[-2:]))

        # There a ray begins where it is nearest to the center.
        if relative:
            rays_d = F.normalize(rays_d, dim=-1)
            rays_o = rays_o - (rays_o * rays_d).sum(-1, keepdim=True) * rays_d
        return cameras, rays_o, rays_d

    def interval(self, rays_o: Tensor, near: float | Tensor, far: float | Tensor) -> tuple[Tensor, Tensor]:
        """The range of the points' depths, (*, 1) or of every ray, (*, R): `near` to `far`, numbers, (*,) or (*, R). In
        the relative form no more of it than is in the unit sphere; rays beside that reach as far as just inside.
        """
        leading = rays_o.shape[:-2]
        near, far = (x if isinstance(x, Tensor) else rays_o.new_full((), x) for x in (near, far))
        near, far = (x if x.ndim > len(leading) else x.expand(leading).unsqueeze(-1) for x in (near, far))
        if not self.config.relative:
            return near, far
        half = (1 - rays_o.square().sum(-1)).clamp(min=0.01).sqrt()
        return near.maximum(-half), far.minimum(half)

    @torch.no_grad()
    def see_hull(self, possible: Tensor, cameras: Cameras, query: Cameras, xy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In the relative form the part of every query ray in the visual hull of the input masks (Laurentini 1994): the
        depths of its ends, and whether there is any, (*, R) each. It is wrong only by being too large, by a pixel or
        two of `possible` and a step along the ray.

        possible (*, V, 1, h, w) from `hull_maps`; the others as in `forward`.
        """
        # Which of the points along a ray do the views allow?
        cameras, rays_o, rays_d = self.rays(cameras, query, xy)
        near, far = self.interval(rays_o, -1.0, 1.0)
        depths = far.unsqueeze(-1) * torch.linspace(-1, 1, HULL_STEPS, device=xy.device)  # (*, R, HULL_STEPS)
        points = rays_o.unsqueeze(-2) + depths.unsqueeze(-1) * rays_d.unsqueeze(-2)
        xy_views, _ = cameras.project(points.flatten(-3, -2).unsqueeze(-3))
        allowed = sample_maps(possible, xy_views.unflatten(-2, depths.shape[-2:])) > 0    # (*, V, R, HULL_STEPS, 1)
        refusals = (~allowed).sum(-4).squeeze(-1)
        inside = refusals <= possible.shape[-4] // FORGIVEN_VIEWS

        # From one step before the first to one behind the last.
        step = far * (2 / (HULL_STEPS - 1))
        first = depths.masked_fill(~inside, math.inf).amin(-1) - step
        last = depths.masked_fill(~inside, -math.inf).amax(-1) + step
        sees = inside.any(-1)
        return torch.where(sees, first, near), torch.where(sees, last, far), sees

    def image(self, maps: Tensor, images: Tensor, cameras: Cameras, query: Cameras, size: int, near: float | Tensor,
              far: float | Tensor, chunk: int = 128, where: Tensor | None = None) -> Prediction:
        """Feature map (*, N, size, size) and color image (*, 3, size, size) of whole query views.

        `size` is the conditioning map's, the preset's `map_size`, or the image's own, H; the outer rays pass through
        the outermost pixels of the full image. `chunk` rays of every view go at a time: 128 fit a CPU's caches, a GPU
        wants thousands.
        `where` (size, size): the rays to evaluate, boolean; the others get zeros. near, far as in `forward`, (*, R) of
        those rays.
        """
        grid = pixel_grid(size, size, full=images.shape[-1], device=images.device)
        if where is not None:
            grid = grid[where.flatten()]

        def evaluate(rays: slice) -> Prediction:
            """Features and colors of some of the rays."""
            ends = [x[..., rays] if torch.is_tensor(x) and x.ndim == query.T.ndim else x for x in (near, far)]
            return self(maps, images, cameras, query, grid[rays], *ends)

        # Dropout draws from one stream of random numbers, so its chunks have an order.
        chunks = [slice(first, first + chunk) for first in range(0, len(grid) or 1, chunk)]
        if self.training or images.is_cuda:
            parts = [evaluate(rays) for rays in chunks]
        else:
            parts = map_threads(evaluate, chunks)
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
