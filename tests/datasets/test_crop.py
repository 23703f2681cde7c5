"""Scenes, and the released arithmetic of crop, resize and intrinsics (`co3d.npz`)."""
import numpy as np
import pytest
import torch

from cameras import Cameras, Scene, evenly_spaced
from datasets.crop import box_of_crop, box_of_mask, context_box, crop_and_resize, pixel_camera
from tests.support import parity

CLOSE = dict(rtol=1e-4, atol=1e-5)
CAMERA = Cameras(*(torch.as_tensor(x, dtype=torch.float64) for x in (np.eye(3), np.zeros(3), [10, 10], [10, 10])))


@pytest.fixture(scope="module")
def recorded():
    return parity.load("co3d")


@pytest.fixture(scope="module")
def crops(recorded):
    size = int(recorded["in_out_size"])
    crops = []
    for i, units in enumerate(recorded["in_format"]):
        image, mask = recorded[f"in_image{i}"].numpy(), recorded[f"in_mask{i}"].numpy()
        parts = (recorded[f"in_{name}"][i].double() for name in ("R", "T", "focal", "pp"))
        camera = pixel_camera(Cameras(*parts), str(units), *mask.shape)
        crops.append(crop_and_resize(image, mask, camera, size))
    return crops


def test_boxes_masks_and_valid_regions_are_exact(recorded, crops):
    for i, crop in enumerate(crops):
        probability = recorded[f"in_mask{i}"].float() / 255
        mask_box = box_of_mask(probability)
        assert list(mask_box) == recorded["mid_mask_bbox_xywh"][i].tolist()
        assert list(box_of_crop(mask_box, *probability.shape)) == recorded["mid_crop_bbox_xywh"][i].tolist()
        assert torch.equal(crop.valid, recorded["out_valid_region"][i].float())
        assert torch.equal((crop.mask * 255).round(), recorded["out_masks_u8"][i].float())
        rows, columns = (crop.valid[0].amax(axis).sum().int().item() for axis in (1, 0))
        assert [rows, columns] == recorded["mid_resized_hw"][i].tolist()


def test_cameras_and_images(recorded, crops):
    cameras = Cameras.stack([c.camera for c in crops])
    for value, name in zip((cameras.R, cameras.T, cameras.focal, cameras.principal), ("R", "T", "focal", "pp")):
        parity.assert_close(value, recorded[f"out_{name}"], **CLOSE)
    full = torch.stack([c.image for c in crops])
    masked = full * torch.stack([c.mask for c in crops])
    parity.assert_close(full[..., 3::8, 3::8], recorded["out_images_full_strided"], **CLOSE)
    parity.assert_close(masked[..., 3::8, 3::8], recorded["out_images_strided"], **CLOSE)
    parity.assert_close(masked[recorded["out_images_select_index"]], recorded["out_images_select"], **CLOSE)


def test_context_box(recorded):
    name, = (k for k in recorded if k.startswith("out_helper_box"))
    height, width = map(int, name.rsplit("_", 1)[1].split("x"))
    for box, expected in zip(recorded["mid_helper_box_xywh"], recorded[name]):
        grown = context_box(box)
        parity.assert_close(grown, expected[:4], **CLOSE)
        clamped = torch.minimum(grown.clamp(min=0), torch.tensor([width, height, width, height])).round()
        assert clamped.tolist() == expected[4:].tolist()


def test_threshold_of_the_mask_box():
    """A byte of 102 is exactly 0.4 and not over it; fainter masks lower the threshold; one pixel is no mask."""
    mask = np.zeros((20, 20), np.uint8)

    def box():
        return box_of_mask(torch.from_numpy(mask).float() / 255)

    mask[2:18, 2:18], mask[5:10, 6:9] = 102, 103
    assert box() == (6, 5, 3, 5)
    mask[:] = 0
    mask[2:18, 2:18], mask[5:10, 6:9] = 10, 40
    assert box() == (6, 5, 3, 5)
    mask[:] = 0
    mask[4, 4] = 255
    with pytest.raises(ValueError, match="empty"):
        box()
    mask[4, 5] = 200
    assert box() == (4, 4, 2, 1)


def test_very_long_objects_keep_at_least_a_line():
    mask = np.zeros((4, 700), np.uint8)
    mask[1, 10:690] = 255
    crop = crop_and_resize(np.full((4, 700, 3), 255, np.uint8), mask, CAMERA, 32)
    assert crop.valid.sum() == 32 and crop.image.max() == 1


def test_evenly_spaced():
    assert evenly_spaced(202, 32) == torch.linspace(0, 201, 32).long().tolist()
    assert evenly_spaced(32, 32) == list(range(32)) and evenly_spaced(11, 32) == list(range(11))
    assert evenly_spaced(10, 2) == [0, 9] and evenly_spaced(10, 1) == [0]


def test_units_of_ndc():
    """Half the photograph's own sides, or half the shorter one for both axes; +x to the left, +y up."""
    focal, principal = torch.tensor([2.0, 3.0]), torch.tensor([0.5, -0.25])
    camera = Cameras(torch.eye(3), torch.zeros(3), focal, principal).to(torch.float64)
    own = pixel_camera(camera, "ndc_norm_image_bounds", 60, 100)
    shorter = pixel_camera(camera, "ndc_isotropic", 60, 100)
    assert own.focal.tolist() == [100, 90] and own.principal.tolist() == [25, 37.5]
    assert shorter.focal.tolist() == [60, 90] and shorter.principal.tolist() == [35, 37.5]
    with pytest.raises(ValueError, match="format 'mm' is neither"):
        pixel_camera(camera, "mm", 60, 100)


def test_scenes_move_whatever_the_order_of_their_fields():
    cameras = Cameras(torch.eye(3).expand(2, 3, 3), torch.zeros(2, 3), torch.ones(2, 2), torch.zeros(2, 2))
    scene = Scene(torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4), torch.ones(2, 1, 4, 4), cameras, ["3", "6"], "a")
    moved = scene.to("meta")
    parts = (moved.images, moved.masks, moved.valid, moved.cameras.R, moved.cameras.focal)
    assert {x.device.type for x in parts} == {"meta"}
    assert moved.names == ["3", "6"] and moved.sequence == "a"
