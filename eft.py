"""The epipolar feature transformer (EFT): a feature and a colour for every query ray, from two to six images (Sec. 3.1).

A query ray is cut into `D` points. Each is projected into every input view and picks up the view's features there: the points
of one ray lie on the view's epipolar line. Three transformers then talk along one axis each:

    T1 `visual`    across the V views of one point        what do the views say about this point?
    T2 `epipolar`  along the D points of one ray and view  at which depth is the surface? (softmax over D, weighted sum)
    T3 `views`     across the V views of one ray           which view to trust?           (softmax over V, weighted sum)

The three-stage layout is that of GPNR (Suhail et al., ECCV 2022). All geometry happens in the query camera's view frame, so the
result does not depend on where the world's origin is, nor on the order of the input views.

Differences from the released code: the trunk ends after its third stage (theirs carries a fourth and a classifier, unused);
the linear layer that opens a transformer is applied to each part of its input, before the parts are sampled, broadcast and
added, which gives the same numbers for less work; in evaluation mode dropout is off and the batch norms use their running
statistics (the released demo leaves the module in training mode).

Letters: `*` optional batch of query viewpoints, `V` input views, `R` rays, `D` points a ray, `C` channels of the trunk, `N` width
of the transformers, `n` numbers in an embedding, `H W` image rows and columns, `h w` those of a map.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cameras import Cameras, pixel_grid, relative_to


@dataclass(frozen=True)
class EFTConfig:
    """The numbers of an EFT. Sources: [P] the paper, Sec. 3.1 and supplement; [R] the released model."""
    stem: int = 64                                 # channels after the trunk's first convolution, ResNet-18 [R]
    stages: tuple[int, int, int] = (64, 128, 256)  # channels of the trunk's stages 1 to 3, ResNet-18 [R]
    blocks: int = 2                                # residual blocks a stage, ResNet-18 [R]
    width: int = 256                               # width of the three transformers, and of the feature handed on [P]
    layers: int = 4                                # encoder layers of each transformer [P]
    heads: int = 1                                 # attention heads [R]
    feedforward: int = 256                         # hidden width of an encoder layer's feed-forward part [R]
    dropout: float = 0.1                           # inside the encoder layers, while training [R]
    depths: int = 20                               # points a ray [P]
    harmonics: int = 6                             # frequencies 1, 2, ..., 2^5 of the harmonic embedding [P]
    depth_margin: float = 5.0                      # rays run from the mean camera distance minus to plus this, CO3D units [R]


PAPER = EFTConfig()
NANO = EFTConfig(stem=32, stages=(32, 64, 96), blocks=2, width=96, layers=2, feedforward=96, dropout=0.0)

# Names of the released state dict -> ours, as regular expressions for `re.sub`; a key belongs to exactly one rule or is unused.
RELEASED_KEYS = [
    (r"^encoder_model\.(conv1|bn1|layer[123])\.", r"trunk.\1."),
    (r"^t1\.pre\.0\.", "visual.input."),
    (r"^t2\.pre\.0\.", "epipolar.input."),
    (r"^t3\.pre\.0\.", "views.input."),
    (r"^t1\.encoder\.layers\.", "visual.encoder."),
    (r"^t2\.encoder\.layers\.", "epipolar.encoder."),
    (r"^t3\.encoder\.layers\.", "views.encoder."),
    (r"^t2_attn\.", "depth_logit."),
    (r"^t3_attn\.", "view_logit."),
    (r"^color_layer\.0\.", "colour."),
]
RELEASED_UNUSED = [r"^encoder_model\.layer4\.", r"^encoder_model\.fc\."]


class ResidualBlock(nn.Module):
    """ResNet's basic block (He et al., 2016): two 3x3 convolutions with batch norm, added to a (projected) shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.downsample(x))


class Trunk(nn.Module):
    """ResNet up to its third stage; the stem's and the stages' maps, brought to the stem's resolution and concatenated."""

    def __init__(self, config: EFTConfig):
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.stem)
        sizes = (config.stem, *config.stages)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(ResidualBlock(sizes[i] if j == 0 else sizes[i + 1], sizes[i + 1], 2 if i > 0 and j == 0 else 1)
                            for j in range(config.blocks)))
            for i in range(3))
        self.channels = sum(sizes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], black background, not normalised -> maps (B, C, H/2, W/2)."""
        stem = F.relu(self.bn1(self.conv1(images)))           # /2
        stage1 = self.layer1(F.max_pool2d(stem, 3, 2, 1))     # /4
        stage2 = self.layer2(stage1)                          # /8
        stage3 = self.layer3(stage2)                          # /16
        resized = [F.interpolate(x, stem.shape[-2:], mode="bilinear", align_corners=True) for x in (stage1, stage2, stage3)]
        return torch.cat([stem, *resized], 1)


class EncoderLayer(nn.TransformerEncoderLayer):
    """PyTorch's post-norm encoder layer (Vaswani et al., 2017) with its attention written out.

    Here sequences are short (V views, D points) and there are up to a million of them: fused attention kernels waste most of a tile on
    them, and on a GPU the one for float32 refuses more than 65,535 sequences when dropout is on.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., L, N) -> (..., L, N); attention along L."""
        attention = self.self_attn
        qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).movedim(-2, -4).unbind(-2)  # (..., heads, L, N / heads) each
        weights = F.dropout((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1), attention.dropout, self.training)
        mixed = (weights @ v).transpose(-2, -3).flatten(-2)  # (..., L, N)
        x = normalise(self.norm1, x + self.dropout1(attention.out_proj(mixed)))
        return normalise(self.norm2, x + self.dropout2(self.linear2(self.dropout(F.relu(self.linear1(x))))))


def normalise(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer normalisation (Ba et al., 2016) of tokens (..., N) in their own precision, the statistics in float32.

    Autocast would return float32, and every later addition would read and write twice the bytes, which is what a layer on a million
    short tokens spends its time on.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


class Transformer(nn.Module):
    """Linear and GELU, then encoder layers along the second last axis; no positional encoding."""

    def __init__(self, parts: list[int], config: EFTConfig):
        super().__init__()
        self.parts = parts
        self.input = nn.Linear(sum(parts), config.width)
        self.encoder = nn.Sequential(*(
            EncoderLayer(config.width, config.heads, config.feedforward, config.dropout, batch_first=True)
            for _ in range(config.layers)))

    def weights(self) -> tuple[Tensor, ...]:
        """The input layer's columns for each part of a token, (N, n) each."""
        return self.input.weight.split(self.parts, 1)

    def forward(self, *parts: Tensor | None, done: Tensor | float = 0.0) -> Tensor:
        """The parts of a token, (..., L, n) each with axes that broadcast -> (..., L, N). A part that comes multiplied by its weights
        already is None, and `done` (..., L, N) is the product."""
        # W [a, b] = W_a a + W_b b: each part is multiplied at its own shape, then broadcast; the concatenation is never built.
        products = [F.linear(x, weight) for x, weight in zip(parts, self.weights(), strict=True) if x is not None]
        total = done + sum(products)
        return self.encoder(F.gelu(total + self.input.bias.to(total.dtype)))


def harmonic(x: Tensor, harmonics: int) -> Tensor:
    """(..., n) -> (..., n * (2 * harmonics + 1)): the sines of x at frequencies 1, 2, 4, ..., the cosines, and x (NeRF's encoding)."""
    angles = (x.unsqueeze(-1) * 2.0 ** torch.arange(harmonics, device=x.device)).flatten(-2)  # component by component
    return torch.cat([angles.sin(), angles.cos(), x], -1)


def plucker(origins: Tensor, directions: Tensor) -> Tensor:
    """Lines through `origins` along `directions` (..., 3), of any length -> (d, o x d) with d normalised, (..., 6)."""
    directions = F.normalize(directions, dim=-1)
    return torch.cat([directions, torch.linalg.cross(origins, directions)], -1)


def sample(maps: Tensor, xy: Tensor) -> Tensor:
    """Bilinear samples of maps (B, C, h, w) at NDC positions (B, R, D, 2): (B, R, D, C). NDC +-1 is the centre of a border pixel.

    NDC run left and up, images right and down: both signs flip. Outside the image the border is continued.
    """
    samples = F.grid_sample(maps.float(), -xy, mode="bilinear", padding_mode="border", align_corners=True)  # (B, C, R, D)
    return samples.permute(0, 2, 3, 1).to(maps.dtype)


class EFT(nn.Module):
    """The epipolar feature transformer (Sec. 3.1, Fig. 3)."""

    def __init__(self, config: EFTConfig):
        super().__init__()
        self.config = config
        harmonics = 2 * config.harmonics + 1
        ray, depth, width = 6 * harmonics, harmonics, config.width
        self.trunk = Trunk(config)
        self.visual = Transformer([ray, depth, self.trunk.channels, 3], config)
        self.epipolar = Transformer([ray, ray, depth, width], config)
        self.views = Transformer([ray, ray, width], config)
        self.depth_logit = nn.Linear(width, 1)
        self.view_logit = nn.Linear(width, 1)
        self.colour = nn.Linear(width, 3)

    def encode(self, images: Tensor) -> Tensor:
        """Feature maps of the input images (*, V, 3, H, W) in [0, 1], black background: (*, V, N, H/2, W/2).

        Bilinear sampling and T1's input layer are both linear, so the layer is applied here, once to the trunk's maps, instead of
        to every sample.
        """
        maps = F.conv2d(self.trunk(images.flatten(0, -4)), self.visual.weights()[2][..., None, None])
        return maps.unflatten(0, images.shape[:-3])

    def forward(self, maps: Tensor, images: Tensor, cameras: Cameras, query: Cameras, xy: Tensor,
                near: float | Tensor, far: float | Tensor) -> tuple[Tensor, Tensor]:
        """Features (*, R, N) and colours (*, R, 3) in [0, 1] of query rays.

        maps (*, V, N, h, w) from `encode`, images (*, V, 3, H, W); `cameras` (*, V) of the inputs and `query` (*) in the world;
        xy (R, 2) or (*, R, 2): NDC of the rays in the query view; near, far: depth range, CO3D units, numbers or (*,).
        """
        with torch.autocast(xy.device.type, enabled=False):  # positions and angles need float32
            query_ray, reference_rays, depth, xy_views = self.geometry(cameras, query, xy, near, far)
        flat = xy_views.flatten(0, -4)  # (* V, R, D, 2)
        samples, colours = (sample(x.flatten(0, -4), flat).unflatten(0, images.shape[:-3]) for x in (maps, images))  # (*, V, R, D, .)

        # Tokens (*, R, D, V, .), then (*, R, V, D, .), then (*, R, V, .): attention runs along the second last axis.
        visual = self.visual(reference_rays.movedim(-4, -2), depth.unsqueeze(-2), None, colours.movedim(-4, -2),
                             done=samples.movedim(-4, -2))
        epipolar = self.epipolar(query_ray[..., None, None, :], reference_rays.movedim(-4, -3), depth.unsqueeze(-3),
                                 visual.transpose(-2, -3))
        epipolar = (self.depth_logit(epipolar).softmax(-2) * epipolar).sum(-2)  # (*, R, V, N)
        middle = reference_rays[..., self.config.depths // 2, :].transpose(-2, -3)  # (*, R, V, n)
        views = self.views(query_ray.unsqueeze(-2), middle, epipolar)
        features = (self.view_logit(views).softmax(-2) * views).sum(-2)  # (*, R, N)
        return features.float(), self.colour(features).float().sigmoid()

    def geometry(self, cameras: Cameras, query: Cameras, xy: Tensor, near: float | Tensor,
                 far: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embedded query rays (*, R, n), embedded reference rays (*, V, R, D, n), embedded depths (*, 1, D, n), and the
        NDC of the points in the input views (*, V, R, D, 2). Arguments as in `forward`."""
        cameras, query = relative_to(cameras, query.unsqueeze(query.T.ndim - 1)), relative_to(query, query)
        lead, (R, D) = query.T.shape[:-1], (xy.shape[-2], self.config.depths)
        near, far = (torch.as_tensor(x, dtype=xy.dtype, device=xy.device).expand(lead)[..., None, None] for x in (near, far))
        depths = near + (far - near) * torch.linspace(0, 1, D, device=xy.device)  # (*, 1, D), both ends included

        rays_o, rays_d = query.rays(xy.expand(*lead, R, 2))  # (*, R, 3)
        points = rays_o.unsqueeze(-2) + depths.unsqueeze(-1) * rays_d.unsqueeze(-2)  # (*, R, D, 3)
        points = points.flatten(-3, -2).unsqueeze(-3)  # (*, 1, R D, 3)
        xy_views, _ = cameras.project(points)  # (*, V, R D, 2)
        centers = cameras.centers().unsqueeze(-2)  # (*, V, 1, 3)

        query_ray, reference = plucker(rays_o, rays_d), plucker(centers, points - centers).unflatten(-2, (R, D))
        embedded = (harmonic(x, self.config.harmonics) for x in (query_ray, reference, depths.unsqueeze(-1)))
        return *embedded, xy_views.unflatten(-2, (R, D))

    def image(self, maps: Tensor, images: Tensor, cameras: Cameras, query: Cameras, size: int, near: float | Tensor,
              far: float | Tensor, chunk: int = 128) -> tuple[Tensor, Tensor]:
        """Feature map (*, N, size, size) and colour image (*, 3, size, size) in [0, 1] of a whole query view.

        `size` is the conditioning map's (H / 8) or the image's own, H; the outer rays pass through the outermost pixels of the full
        image. `chunk` rays go at a time: 128 fit a CPU's caches, a GPU wants thousands.
        """
        grid = pixel_grid(size, size, full=images.shape[-1], device=images.device)
        parts = [self(maps, images, cameras, query, xy, near, far) for xy in grid.split(chunk)]
        return tuple(torch.cat(x, -2).transpose(-1, -2).unflatten(-1, (size, size)) for x in zip(*parts))
