"""Empty space and volume rendering: where a field is evaluated, and the integral along a ray (Sec. 3.2).

`Occupancy` is a coarse grid of cells: some are ruled out by the input masks, whose views leave the visual hull
(`carve`), some because the field is empty there (`update`). Only in cells that may hold something is the field ever
evaluated (Instant NGP, appendix E.2).

Rays are integrated as in NeRF (Mildenhall et al. 2020): stratified samples, importance samples, and before a black
background. Samples in empty cells are never evaluated; for many sharp pictures none is placed there
(`occupied_strata`).

Different from the released code: depth is in units of t along the ray, and 0 for a ray that misses the cube; theirs
is a fraction of the ray's interval in the cube, and NaN [released: nerf/renderer_df.py:442-456].

How many samples are in occupied cells is known only when they are placed, and a program that reads the number waits for
the GPU. So that it need not, a `SampleBuffer` has a fixed capacity for them.

Shapes: `G` occupancy cells per side, `K` some of the cells, `V` views, `R` rays, `D` samples per ray, `I` importance
samples per ray, `N` = R D, `H W` rows and columns. Rays are not normalized: `o + t d` lies at depth t of the camera,
and density is per unit of t [released: nerf/renderer_df.py:414-418].
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cameras import Cameras, pixel_grid
from common.machine import map_threads, rand
from ngp import Field, FieldConfig, cube, in_chunks

# Rays of a picture that are rendered at once: what fits a CPU's caches; what fills a GPU, but not its memory.
CHUNK = {"cpu": 2**11, "cuda": 2**14}
DENSEST = math.exp(15)  # the largest density that an occupancy cell stores
MASK_GAP = 2  # pixels that a mask may end before the picture's border and still count as touching it


# ---------------------------------------------------------------------------------------------- empty space

class Occupancy(nn.Module):
    """Which of the G^3 cells of the cube may hold something (Instant NGP, appendix E.2); belongs in checkpoints."""

    def __init__(self, config: FieldConfig):
        super().__init__()
        self.config = config
        self.cell = 2 * config.bound / config.occupancy_cells  # side length
        self.threshold = -math.log(1 - config.occupancy_alpha) / self.cell  # density of a cell with that opacity

        # A cell starts at twice the threshold: it is empty only after several updates without density.
        shape = (config.occupancy_cells,) * 3
        self.register_buffer("possible", torch.ones(shape, dtype=torch.bool))  # not ruled out by the masks
        self.register_buffer("density", torch.full(shape, 2 * self.threshold))  # running maximum
        self.register_buffer("occupied", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("box", cube(config))  # (2, 3) around the occupied cells: least and greatest corner

    def forward(self, x: Tensor) -> Tensor:
        """Are points (*, 3) in occupied cells? (*,) boolean; one outside the cube counts as in its nearest cell."""
        g = self.config.occupancy_cells
        cell = ((x + self.config.bound) / self.cell).int().clamp(0, g - 1)
        index = (cell[..., 0] * g + cell[..., 1]) * g + cell[..., 2]
        return self.occupied.flatten()[index]

    def set_occupied(self, occupied: Tensor) -> None:
        """Store which cells are occupied, (G, G, G) boolean, and their bounding box. Raises `FloatingPointError` where
        none is: the field has died.
        """
        cells = occupied.nonzero()  # (K, 3)
        if len(cells) == 0:
            raise FloatingPointError("the field is empty everywhere and cannot recover from that; lower learning rates "
                                     "or a smaller weight_opacity may help")
        self.occupied.copy_(occupied)
        self.box[0] = cells.amin(0) * self.cell - self.config.bound
        self.box[1] = (cells.amax(0) + 1) * self.cell - self.config.bound

    @torch.no_grad()
    def carve(self, masks: Tensor, cameras: Cameras, valid: Tensor | None = None) -> None:
        """Rule out the cells that some view shows to be empty: the visual hull (Laurentini 1994), conservatively.

        masks (V, 1, H, W) in [0, 1] and the V cameras they belong to; valid (V, 1, H, W) is 1 where an image shows
        anything (default: everywhere). A view votes against a cell if no pixel of its footprint is in the mask. What
        lies outside the image is unknown and gets no such vote if the mask touches the image's border, or ends up to
        `MASK_GAP` pixels before it; where it does not, the view shows the whole object, so nothing is there. The
        tolerance is one vote per `config.forgiven_views` views; where it is not 0, more views than that must have a
        cell in their masks. Without `config.carve` nothing is ruled out. Raises `ValueError` where no cell is left.
        """
        config = self.config
        if not config.carve:
            return
        valid = torch.ones_like(masks) if valid is None else valid

        # One vote against a cell is enough where there are few views. What has more has no say in further views.
        tolerance = len(masks) // config.forgiven_views
        centers = self.centers().view(-1, 3)
        index = torch.arange(len(centers), device=centers.device)
        votes_against = torch.zeros_like(index)
        votes_for = torch.zeros_like(index)
        for mask, valid_pixels, camera in zip(masks > config.mask_threshold, valid > 0.5, cameras):
            pixels = possible_pixels(mask, valid_pixels)
            cells = _footprints(centers[index], self.cell, camera, *mask.shape[1:])
            votes_against += ~_footprint_hits(pixels, cells)
            votes_for += _footprint_hits(F.pad((mask & valid_pixels)[0], (1, 1, 1, 1)), cells)
            left = votes_against <= tolerance
            index, votes_against, votes_for = index[left], votes_against[left], votes_for[left]

        # What hardly any of many views shows is unknown, and no loss would determine it.
        if tolerance:
            index = index[votes_for > tolerance]
        self.possible &= torch.zeros_like(self.possible).flatten().index_fill(0, index, True).view_as(self.possible)

        if not self.possible.any():
            raise ValueError(f"masks and cameras: no part of the cube of half side {config.bound:g} round the world "
                             "origin lies in every mask; the object must be inside the cube")
        self.set_occupied(self.possible)

    @torch.no_grad()
    def silhouette(self, camera: Cameras, size: int) -> Tensor:
        """The pixels from which a camera () may see something, (size, size) boolean: the footprints of all possible
        cells.
        """
        cells = _footprints(self.centers()[self.possible], self.cell, camera, size, size)
        cells = _Footprints(*(x[cells.front] for x in cells))

        # One more rectangle begins, or ends, at each of its corners: sums over rows and columns count them.
        side = size + 3
        changes = self.possible.new_zeros(side * side, dtype=torch.int32)
        for row, column, change in ((cells.top, cells.left, 1), (cells.bottom, cells.right, 1),
                                    (cells.top, cells.right, -1), (cells.bottom, cells.left, -1)):
            index = row * side + column
            changes.index_add_(0, index, torch.full_like(index, change, dtype=torch.int32))
        count = changes.view(side, side).cumsum(0).cumsum(1)
        return count[1:size + 1, 1:size + 1] > 0

    def silhouettes(self, cameras: Cameras, size: int) -> Tensor:
        """The same of cameras (V,): (V, size, size) boolean."""
        return torch.stack([self.silhouette(camera, size) for camera in cameras])

    def centers(self) -> Tensor:
        """Of all cells: (G, G, G, 3)."""
        g = self.config.occupancy_cells
        axis = (torch.arange(g, device=self.occupied.device) + 0.5) * self.cell - self.config.bound
        return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)

    @torch.no_grad()
    def update(self, field: Field, generator: torch.Generator | None = None) -> None:
        """Evaluate the field at one point of every possible cell, and empty the cells that absorb nothing.

        The points are jittered by the generator; without one they are the centers.
        """
        cells = self.possible.nonzero()  # (K, 3)
        jitter = 0.5
        if generator is not None:
            jitter = rand(*cells.shape, generator=generator, device=cells.device)
        points = (cells + jitter) * self.cell - self.config.bound

        # The running maximum decays slowly, and an infinite density would never decay.
        decayed = self.density[self.possible] * self.config.occupancy_decay
        current = in_chunks(field.density, points).clamp(max=DENSEST)
        density = torch.maximum(decayed, current)
        self.density[self.possible] = density

        # Half the mean as well (Instant NGP: the mean), so that a field that is thin everywhere stays visible.
        threshold = (density.mean() / 2).clamp(max=self.threshold)
        self.set_occupied(self.possible & (self.density >= threshold))


def possible_pixels(mask: Tensor, valid: Tensor) -> Tensor:
    """Pixels of a view that may be object, (H + 2, W + 2) boolean; mask, valid (1, H, W).

    One more pixel around the image stands for everything outside of it.
    """
    unknown = F.pad(~valid, (1, 1, 1, 1), value=True)
    mask = F.pad(mask & valid, (1, 1, 1, 1))

    # Masks of cut objects often end a pixel or two too early: those pixels may be object, too.
    gap = dilate(unknown, MASK_GAP) & dilate(mask, MASK_GAP)

    # Where the mask touches what the view does not show, the object may continue there.
    if (mask & dilate(unknown, MASK_GAP + 1)).any():
        mask = mask | gap | unknown
    return mask[0]


def dilate(mask: Tensor, pixels: int) -> Tensor:
    """A mask (1, H, W), boolean, grown by some pixels to all sides."""
    return F.max_pool2d(mask.float(), 2 * pixels + 1, stride=1, padding=pixels) > 0


class _Footprints(NamedTuple):
    """The pixels that cells (K,) may cover in a view: rectangles, wrong only by being too large."""
    left: Tensor    # first column, in an image with one pixel around it that stands for all outside
    top: Tensor
    right: Tensor   # the column behind the last
    bottom: Tensor
    front: Tensor   # whether any of the cell is in front of the camera


def _footprints(centers: Tensor, cell: float, camera: Cameras, height: int, width: int) -> _Footprints:
    """Of cells with these centers, (K, 3), and a side length, in an image of so many pixels."""
    # Bounds of X, Y, Z over each cell, in view coordinates, (3, K) each.
    view = camera.to_view(centers).T
    reach = cell / 2 * camera.R.abs().sum(0)[:, None]
    low = view - reach
    high = view + reach

    # Bounds of the projection, NDC (2, K): the extremes of X / Z and Y / Z over these intervals.
    near = low[2].clamp(min=1e-6)
    far = high[2].clamp(min=1e-6)
    focal = camera.focal[:, None]
    principal = camera.principal[:, None]
    xy_low = focal * torch.minimum(low[:2] / near, low[:2] / far) + principal
    xy_high = focal * torch.maximum(high[:2] / near, high[:2] / far) + principal

    # NDC +x is left and +y is up: the largest are the first pixel.
    left, top = _padded_pixel(xy_high, height, width)
    right, bottom = _padded_pixel(xy_low, height, width) + 1
    return _Footprints(left, top, right, bottom, high[2] > 0)


def _footprint_hits(pixels: Tensor, cells: _Footprints) -> Tensor:
    """Do these rectangles have any of the given pixels in them? (K,) boolean.

    pixels (H + 2, W + 2) as `possible_pixels` returns them.
    """
    # How many there are in each, by a summed area table.
    total = F.pad(pixels.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    above = total[cells.top, cells.right] - total[cells.top, cells.left]
    count = total[cells.bottom, cells.right] - total[cells.bottom, cells.left] - above

    # What is behind the camera is outside the image, too.
    outside = bool(pixels[0, 0])
    return torch.where(cells.front, count > 0, outside)


def _padded_pixel(xy: Tensor, height: int, width: int) -> Tensor:
    """Columns and rows (2, K) of NDC (2, K) in an image with one pixel around it; 0 is before the image."""
    size = torch.tensor([width, height], device=xy.device)[:, None]
    pixel = ((1 - xy) / 2 * size).floor().clamp(min=-1).minimum(size)
    return pixel.long() + 1


# ---------------------------------------------------------------------------------------------- rays and samples

class Rendering(NamedTuple):
    """R rays before a black background."""
    color: Tensor    # (R, 3) in [0, 1], premultiplied
    opacity: Tensor  # (R,) in [0, 1]
    depth: Tensor    # (R,) sum of weight * t: the mean depth times the opacity


class Image(NamedTuple):
    """A view before a black background."""
    color: Tensor    # (3, H, W) in [0, 1], premultiplied
    opacity: Tensor  # (1, H, W) in [0, 1]
    depth: Tensor    # (1, H, W) the mean depth times the opacity


class SampleBuffer:
    """A fixed capacity for the samples of a rendering that are in occupied cells, for renderings whose shapes must be
    fixed, as in a CUDA graph.

    Samples beyond the capacity `size` count as empty. `most` is the largest number that a rendering has had so far:
    where it exceeds the capacity, a larger buffer is needed.
    """

    def __init__(self, size: int, device: torch.device | str):
        self.size = size
        self.most = torch.zeros((), dtype=torch.long, device=device)  # samples in occupied cells of one rendering

    def pack(self, occupied: Tensor) -> Tensor:
        """Indices of the True in a mask (N,), the rest of the buffer filled with N: (size,)."""
        torch.maximum(self.most, occupied.sum(), out=self.most)
        return torch.nonzero_static(occupied, size=self.size, fill_value=len(occupied)).squeeze(-1)


def sampled_box(field: Field, occupancy: Occupancy | None) -> Tensor:
    """Where samples are placed, (2, 3): the box around the occupied cells, or else the whole cube."""
    if occupancy is None:
        return cube(field.config).to(field.encoding.table)
    return occupancy.box


def ray_box_intersection(rays_o: Tensor, rays_d: Tensor, box: Tensor, near: float) -> tuple[Tensor, Tensor]:
    """Entry (at least `near`) and exit t of rays (R, 3) through a box (2, 3): (R,) each. Missed where exit <= entry."""
    # Reciprocals, as a division is rounded otherwise and moves fine features [released: raymarching.cu:110-144].
    rays_d = torch.where(rays_d.abs() < 1e-12, 1e-12, rays_d)
    t = (box[:, None] - rays_o) * rays_d.reciprocal()  # (2, R, 3)
    entry = t.amin(0).amax(-1).clamp(min=near)
    return entry, t.amax(0).amin(-1)


def uniform_draws(config: FieldConfig, rays: int, generator: torch.Generator | None,
                  like: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform numbers that place the samples, (rays, D) and (rays, I); without a generator the middles of strata."""
    if generator is None:
        u = like.new_full((rays, config.samples_per_ray), 0.5)
        centers = torch.arange(config.importance_samples).to(like) + 0.5
        centers = centers / max(config.importance_samples, 1)
        return u, centers.expand(rays, -1)

    u = rand(rays, config.samples_per_ray, generator=generator, device=like.device)
    u_importance = rand(rays, config.importance_samples, generator=generator, device=like.device)
    return u.to(like), u_importance.to(like)


def sample_pdf(middle: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    """Samples distributed like the weights: inverse of their cumulative distribution at u (NeRF, Sec. 5.2).

    middle (R, D - 1): t between neighboring samples, weights (R, D - 2): of the inner samples, u (R, I) in [0, 1)
    -> t (R, I) [released: nerf/renderer_df.py:15-49].
    """
    weights = weights + 1e-5  # never all zero
    pdf = weights / weights.sum(-1, keepdim=True)
    cdf = F.pad(pdf.cumsum(-1), (1, 0))  # (R, D - 1)

    # The interval that u falls into, and the two ends of it.
    above = torch.searchsorted(cdf, u.contiguous(), right=True)
    below = (above - 1).clamp(min=0)
    above = above.clamp(max=cdf.shape[-1] - 1)
    low = cdf.gather(-1, below)
    high = cdf.gather(-1, above)
    start = middle.gather(-1, below)
    end = middle.gather(-1, above)

    span = torch.where(high - low < 1e-5, 1, high - low)
    return start + (u - low) / span * (end - start)


def occupied_strata(rays_o: Tensor, rays_d: Tensor, near: Tensor, far: Tensor, u: Tensor,
                    occupancy: Occupancy) -> tuple[Tensor, Tensor]:
    """Stratified samples of the part of rays (R, 3) that lies in occupied cells: t (R, D), and the length (R, 1) that
    each stands for.

    The interval from near to far, (R, 1) each, is divided into bins; a bin is occupied if its middle lies in an
    occupied cell. u (R, D) in [0, 1) places the samples in their strata.
    """
    bins = occupancy.config.bins_per_ray
    step = (far - near) / bins
    middle = near + step * (torch.arange(bins, device=u.device) + 0.5)
    occupied = occupancy(points_along(rays_o, rays_d, middle)).view(middle.shape)

    # Strata of the occupied bins, as if they lay one behind the other.
    end = occupied.cumsum(-1, dtype=u.dtype)  # of each bin
    total = end[:, -1:]
    place = (torch.arange(u.shape[1], device=u.device) + u) / u.shape[1] * total

    # Which of the bins that is, and where in it.
    chosen = torch.searchsorted(end, place, right=True).clamp(max=bins - 1)
    inside = place - (end.gather(1, chosen) - 1)
    return near + step * (chosen + inside), step * total / u.shape[1]


def compositing_weights(density: Tensor, t: Tensor, last: Tensor) -> Tensor:
    """Weights T_i (1 - exp(-density_i length_i)) of the samples in the integral along the ray (NeRF, Eq. 3).

    density (R, D), increasing t (R, D), last (R, 1): length that the last sample stands for -> (R, D).
    """
    return weights_of_lengths(density, torch.cat([t.diff(dim=-1), last], -1))


def weights_of_lengths(density: Tensor, length: Tensor) -> Tensor:
    """The same of samples in order along the ray that stand for these lengths, (R, D) or (R, 1).

    Density may be infinite: such a sample hides what is behind it.
    """
    # Optical depth. An infinite density times a length of 0 must be 0, so the largest finite number stands for it.
    largest = torch.finfo(density.dtype).max
    depth = density.clamp(max=largest) * length

    # How much gets through to a sample: exponents summed, rather than factors multiplied, of all samples before it.
    before = depth.cumsum(-1)[:, :-1]
    transmittance = torch.exp(-F.pad(before, (1, 0)))
    return transmittance * -torch.expm1(-depth)


def points_along(rays_o: Tensor, rays_d: Tensor, t: Tensor) -> Tensor:
    """The points `o + t d` of rays (R, 3) at t (R, D): (R * D, 3)."""
    # Three long rows are faster than many short ones.
    x = rays_o.t()[..., None] + rays_d.t()[..., None] * t  # (3, R, D)
    return x.reshape(3, -1).t()


def evaluate_samples(field: Field, rays_o: Tensor, rays_d: Tensor, t: Tensor, occupancy: Occupancy | None,
                     buffer: SampleBuffer | None = None) -> tuple[Tensor, Tensor]:
    """Density (R, D) and color (R, D, 3) at `o + t d`; 0 in empty cells, where the field is not evaluated."""
    x = points_along(rays_o, rays_d, t).clamp(-field.config.bound, field.config.bound)

    # Indices of the samples in occupied cells, (K,). A buffer is filled up with N.
    if occupancy is None:
        index = torch.arange(len(x), device=x.device)
    elif buffer is None:
        index = occupancy(x).nonzero().squeeze(-1)
    else:
        index = buffer.pack(occupancy(x))

    # The field at these samples, in the directions of their rays.
    samples = index.clamp(max=len(x) - 1)
    density, color = field(x[samples], rays_d[samples // t.shape[1]])
    density = scatter(density, index, len(x))
    color = scatter(color, index, len(x))
    return density.reshape(t.shape), color.reshape(*t.shape, 3)


def scatter(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Values (K, ...) at the rows `index` (K,) of (count, ...), zero elsewhere; at the row `count` they are dropped."""
    rows = values.new_zeros(count + 1, *values.shape[1:])
    return rows.index_copy(0, index, values)[:count]


def render(field: Field, rays_o: Tensor, rays_d: Tensor, generator: torch.Generator | None = None,
           occupancy: Occupancy | None = None, draws: tuple[Tensor, Tensor] | None = None,
           buffer: SampleBuffer | None = None) -> Rendering:
    """Render rays (R, 3) before a black background (NeRF, Sec. 4 and 5.2).

    With a generator the samples are jittered. With an occupancy, samples lie in the box around the occupied cells and
    those in empty cells are skipped. `draws` overrides the generator's numbers with given ones (see `uniform_draws`).
    Rays that miss are 0. With a `buffer`, which needs an occupancy, no shape depends on the field.
    """
    box = sampled_box(field, occupancy).to(rays_o)
    near, far = ray_box_intersection(rays_o, rays_d, box, field.config.near)
    if buffer is not None:
        draws = draws or uniform_draws(field.config, len(rays_o), generator, rays_o)
        far = torch.maximum(near, far)  # of rays that miss: their samples have no length
        return _integrate(field, rays_o, rays_d, near, far, draws, occupancy, buffer)

    # Only rays that meet the box are rendered.
    hit = (far > near).nonzero().squeeze(-1)
    if draws is None:
        draws = uniform_draws(field.config, len(hit), generator, rays_o)
    else:
        draws = draws[0][hit], draws[1][hit]
    rendering = _integrate(field, rays_o[hit], rays_d[hit], near[hit], far[hit], draws, occupancy, None)

    # The other rays are black.
    return Rendering(*(scatter(part, hit, len(rays_o)) for part in rendering))


def _integrate(field: Field, rays_o: Tensor, rays_d: Tensor, near: Tensor, far: Tensor, draws: tuple[Tensor, Tensor],
               occupancy: Occupancy | None, buffer: SampleBuffer | None) -> Rendering:
    """Render rays (R, 3) from t = near to far, (R,) each."""
    config = field.config
    u, u_importance = draws
    near = near[:, None]  # (R, 1)
    far = far[:, None]
    stratum = (far - near) / config.samples_per_ray

    # Stratified samples, all of them in occupied cells.
    if config.bins_per_ray and occupancy is not None:
        t, length = occupied_strata(rays_o, rays_d, near, far, u, occupancy)
        density, color = evaluate_samples(field, rays_o, rays_d, t, occupancy, buffer)
        return _composite(weights_of_lengths(density, length), color, t.clamp(near, far))

    # Or in the whole interval, both ends included [released: nerf/renderer_df.py:356-412].
    grid = near + (far - near) * torch.linspace(0, 1, config.samples_per_ray, device=u.device, dtype=u.dtype)
    t = grid + (u - 0.5) * stratum

    # Importance samples, where the stratified ones have weight.
    if config.importance_samples:
        with torch.no_grad():
            density, _ = evaluate_samples(field, rays_o, rays_d, t, occupancy, buffer)
            weights = compositing_weights(density, t, stratum)
            middle = (t[:, 1:] + t[:, :-1]) / 2
            more = sample_pdf(middle, weights[:, 1:-1], u_importance)
            t = torch.cat([t, more], -1).sort(-1).values

    density, color = evaluate_samples(field, rays_o, rays_d, t, occupancy, buffer)
    return _composite(compositing_weights(density, t, stratum), color, t.clamp(near, far))


def _composite(weights: Tensor, color: Tensor, t: Tensor) -> Rendering:
    """The integral along the rays: weights (R, D), color (R, D, 3) and t (R, D) of their samples."""
    color = (weights[..., None] * color).sum(1)
    depth = (weights * t).sum(-1)
    return Rendering(color, weights.sum(-1), depth)


def render_image(field: Field, camera: Cameras, size: int, full: int, generator: torch.Generator | None = None,
                 occupancy: Occupancy | None = None, chunk: int | None = None) -> Image:
    """A whole view, size x size, on rays that `cameras.pixel_grid` lays through an image of `full` pixels per side.

    `chunk` rays are rendered at once: by default what fits a CPU's caches or fills a GPU. See `render` for the
    generator and the occupancy.
    """
    chunk = chunk or CHUNK[camera.T.device.type]
    xy = pixel_grid(size, size, full, device=camera.T.device)
    rays_o, rays_d = camera.rays(xy)

    def part(rays: tuple[Tensor, Tensor]) -> Rendering:
        """What some of the rays see."""
        return render(field, *rays, generator, occupancy)

    # Draws of one generator have an order.
    rays = list(zip(rays_o.split(chunk), rays_d.split(chunk)))
    if generator is not None or xy.is_cuda:
        parts = [part(some) for some in rays]
    else:
        parts = map_threads(part, rays)
    color = torch.cat([part.color for part in parts])  # (size * size, 3)
    opacity = torch.cat([part.opacity for part in parts])
    depth = torch.cat([part.depth for part in parts])
    color = color.t().reshape(3, size, size)
    return Image(color, opacity.reshape(1, size, size), depth.reshape(1, size, size))
