"""The instance field: parity of encoding, field and renderer; gradients; analytic renderings; carving; surfaces; one scene overfitted."""
import dataclasses
import json

import numpy as np
import pytest
import torch

import ngp
import parity

CONFIGS = ["small_tiled", "small_hash", "official_tiled", "official_hash"]


@pytest.mark.parametrize("tag", CONFIGS)
def test_grid_encoding_agrees_with_the_released_kernel(tag):
    f = parity.load("grid")
    c = json.loads(str(f["in_configs"]))[tag]
    config = dataclasses.replace(ngp.PAPER, levels=c["L"], features=c["C"], base_resolution=c["base"], log2_table=c["log2"],
                                 finest_resolution=c["desired"], hashed=not c["gt"], bound=float(f["in_bound"]))
    encoding = ngp.GridEncoding(config)
    levels, offsets = f[f"mid_{tag}_levels"], f[f"out_{tag}_offsets"]
    assert encoding.scale[:, 0].tolist() == levels[:, 0].tolist()
    assert encoding.rows[:, 0].tolist() == levels[:, 2].tolist()
    if c["gt"]:  # of a hashed level every coordinate enters
        assert [(row != 0).sum().item() for row in encoding.stride] == levels[:, 3].tolist()
    assert encoding.hashed_from == c["L"] - int(levels[:, 4].sum())
    assert encoding.offset[:, 0].tolist() + [len(encoding.table)] == offsets.tolist()
    encoding.table.data = parity.weight(f"gridencoder.{tag}.embeddings", encoding.table.shape)
    parity.assert_close(encoding.table[:4], f[f"mid_{tag}_emb_head"])
    parity.assert_close(encoding(f["in_x"]), f[f"out_{tag}"], atol=5e-5 if tag.startswith("small") else 2e-3)


def released_field() -> tuple[ngp.Field, dict]:
    """The released field with rule-made weights, under its own names, and the fixture."""
    f = parity.load("ngp")
    field = ngp.Field(dataclasses.replace(ngp.PAPER, hashed=False, samples=f["in_rand_z"].shape[1],
                                          importance=f["in_rand_pdf"].shape[1]))
    released = parity.weights("ngp")
    field.load_state_dict({"encoding.table": released["encoder.embeddings"]} | {
        f"mlp.{2 * layer}.{leaf}": released[f"sigma_net.net.{layer}.{leaf}"] for layer in range(3) for leaf in ("weight", "bias")})
    return field, f


def test_field_agrees_with_the_released_one():
    field, f = released_field()
    density, colour = field(f["in_x"])
    parity.assert_close(field.encoding(f["in_x"]), f["mid_encoding"], std=1e-3)
    parity.assert_close(field.blob(f["in_x"]), f["out_blob"], std=1e-3)
    parity.assert_close(density, f["out_sigma"], std=1e-3)
    parity.assert_close(field.density(f["in_x"]), f["out_sigma"], std=1e-3)
    parity.assert_close(colour, f["out_albedo"], std=1e-3)


@pytest.mark.parametrize("mode", ["eval_noperturb", "eval_perturb", "train_perturb"])
def test_renderer_agrees_with_the_released_one(mode):
    field, f = released_field()
    rays_o, rays_d, near, far = f["mid_rays_o"][0], f["mid_rays_d"][0], f["mid_near"], f["mid_far"]
    rays = len(rays_o)
    box = torch.tensor([[-field.config.bound], [field.config.bound]]).expand(2, 3)
    our_near, our_far = ngp.ray_interval(rays_o, rays_d, box, field.config.near)
    hit = near < 1e30  # the released code marks a miss with the largest float
    assert torch.equal(our_far > our_near, hit) and not hit.all()
    parity.assert_close(our_near[hit], near[hit], std=1e-3)
    parity.assert_close(our_far[hit], far[hit], std=1e-3)

    middle = ngp.uniform_draws(field.config, rays, None, rays_o)
    draws = {"eval_noperturb": middle, "eval_perturb": (f["in_rand_z"], middle[1]), "train_perturb": (f["in_rand_z"], f["in_rand_pdf"])}
    seen = ngp.render(field, rays_o, rays_d, draws=draws[mode])
    depth = (seen.depth - near * seen.opacity) / (far - near)  # as a fraction of the ray's interval, as released
    parity.assert_close(seen.colour[hit], f[f"out_{mode}_image"][hit], std=1e-3)
    parity.assert_close(seen.opacity[hit], f[f"out_{mode}_weights_sum"][hit], std=1e-3)
    parity.assert_close(depth[hit], f[f"out_{mode}_depth"][hit], std=1e-3)
    assert not torch.cat([seen.colour[~hit].flatten(), seen.opacity[~hit], seen.depth[~hit]]).any()
    if mode == "eval_noperturb":
        assert all(torch.equal(a, b) for a, b in zip(seen, ngp.render(field, rays_o, rays_d)))
