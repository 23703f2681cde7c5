"""Metrics by hand, SSIM and LPIPS against plain references written here, and what must be refused."""
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common import files
from evaluation.attributes import AttributeNet, load_attribute_net
from metrics import VGG16LPIPS, iou, perceptual_distance, psnr, ssim
from tests.support.helpers import Evil, same
from tests.support.parity import assert_close
from tests.support.released_files import CONVS, lpips_states


def images(n=2, size=24, seed=0, channels=3):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def blurred(x, sigma):
    t = torch.arange(-9.0, 10)
    k = (-t.square() / (2 * sigma ** 2)).exp()
    k = (k / k.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (9, 9, 9, 9), mode="reflect"), k, groups=x.shape[1])
    return F.conv2d(x, k.transpose(-1, -2), groups=x.shape[1])


# --- by hand ---

def test_psnr_by_hand():
    a = torch.zeros(3, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), v) for v in (0.1, 1.0, 0.0)])
    assert_close(psnr(a, b)[:2], torch.tensor([20.0, 0.0]), atol=1e-5)
    assert psnr(a, b)[2] == math.inf


def test_ssim_of_constant_images():
    """No variance: (2 x y + c1) / (x^2 + y^2 + c1)."""
    a, b = torch.full((1, 3, 12, 15), 0.3, dtype=torch.float64), torch.full((1, 3, 12, 15), 0.8, dtype=torch.float64)
    assert_close(ssim(a, b), torch.tensor([(2 * 0.24 + 1e-4) / (0.09 + 0.64 + 1e-4)], dtype=torch.float64), atol=1e-9)


def test_ssim_of_a_negative():
    """Zero-mean noise and its negative around 1/2: almost the same luminance, opposite structure."""
    a = images(1, 40).double()
    value = float(ssim(a, 1 - a))
    assert -1 < value < -0.9


def test_iou_by_hand():
    opacity, mask = torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 4, 4)
    opacity[0, 0, :, :2], mask[0, 0, :2] = 0.9, 0.51        # 8 and 8 pixels, 4 shared
    opacity[1, 0, 0, 0] = 0.5                               # not over the threshold: both empty
    opacity[2], mask[2, 0, 0, 0] = 1.0, 1.0
    assert_close(iou(opacity, mask), torch.tensor([4 / 12, 1.0, 1 / 16]), atol=1e-7)


def test_perceptual_distance_by_hand():
    """Perpendicular unit vectors are 2 apart, opposite ones 4; length does not matter; weights choose channels."""
    a = torch.tensor([[3.0, 0.0]]).reshape(1, 2, 1, 1).expand(1, 2, 1, 2)
    b = torch.tensor([[[0.0, -5.0], [7.0, 0.0]]]).reshape(1, 2, 1, 2)
    assert_close(perceptual_distance(list, [a], [b]), torch.tensor([3.0]), atol=1e-6)
    assert_close(perceptual_distance(list, [a, a], [b, 2 * a]), torch.tensor([3.0]), atol=1e-6)
    assert_close(perceptual_distance(list, [a], [b], [torch.tensor([1.0, 0.0])]), torch.tensor([2.5]), atol=1e-6)


# --- against a plain reference ---

def test_ssim_against_a_loop_over_windows():
    a, b = images(2, 14, 0, 2).double(), images(2, 14, 1, 2).double()
    b = 0.6 * a + 0.4 * b
    expected = np.zeros(2)
    for n in range(2):
        values = []
        for c in range(2):
            for i in range(14 - 6):
                for j in range(14 - 6):
                    x, y = a[n, c, i:i + 7, j:j + 7].numpy(), b[n, c, i:i + 7, j:j + 7].numpy()
                    mx, my = x.mean(), y.mean()
                    (vx, cxy), (_, vy) = np.cov(x.ravel(), y.ravel())  # of a sample: divided by n - 1
                    luminance = (2 * mx * my + 1e-4) / (mx ** 2 + my ** 2 + 1e-4)
                    values.append(luminance * (2 * cxy + 9e-4) / (vx + vy + 9e-4))
        expected[n] = np.mean(values)
    assert_close(ssim(a, b), expected, atol=1e-10)
    assert_close(ssim(a.float(), b.float()), expected, atol=1e-4)


def test_ssim_does_not_care_how_a_picture_is_held():
    """Turned, mirrored, with its channels in another order: the same number."""
    a, b = images(2, 20, 0).double(), images(2, 20, 1).double()
    b = 0.5 * (a + b)
    for move in (lambda x: x.flip(-1), lambda x: x.rot90(1, (-2, -1)), lambda x: x.flip(1), lambda x: x[:, :, 0:20]):
        assert_close(ssim(move(a), move(b)), ssim(a, b), atol=1e-12)
    channels = torch.stack([ssim(a[:, c:c + 1], b[:, c:c + 1]) for c in range(3)])
    assert_close(ssim(a, b), channels.mean(0), atol=1e-12)


@pytest.fixture(scope="module")
def lpips():
    """LPIPS with pseudo-random weights."""
    vgg, lin = lpips_states()
    net = VGG16LPIPS()
    net.features.load_state_dict({k.removeprefix("features."): x for k, x in vgg.items() if k.startswith("features.")})
    net.channel_weights.load_state_dict({str(i): lin[f"lin{i}.model.1.weight"] for i in range(5)})
    return net


def test_lpips_against_a_plain_reference(lpips):
    vgg, lin = lpips_states()
    a, b = images(2, 40, 0), images(2, 40, 1)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected = torch.zeros(2)
    x = torch.cat([a, b])
    x = ((2 * x - 1).permute(0, 2, 3, 1) - shift) / scale
    x, layer = x.permute(0, 3, 1, 2), 0
    for i in CONVS:
        x = F.conv2d(x, vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"], padding=1).clamp(min=0)
        if i in (2, 7, 14, 21, 28):
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            difference = (unit[:2] - unit[2:]) ** 2
            expected += F.conv2d(difference, lin[f"lin{layer}.model.1.weight"]).mean((1, 2, 3))
            x, layer = F.max_pool2d(x, 2), layer + 1
    assert layer == 5
    assert_close(lpips(a, b), expected, rtol=1e-5)


def test_lpips_has_a_gradient_in_both_images_and_none_in_its_weights(lpips):
    a, b = images(1, 16, 0).requires_grad_(), images(1, 16, 1).requires_grad_()
    lpips(a, b).sum().backward()
    assert a.grad.abs().max() > 0 and b.grad.abs().max() > 0
    assert not any(p.requires_grad for p in lpips.parameters()) and not lpips.training


# --- properties of all of them ---

def distances(lpips):
    torch.manual_seed(0)
    net = AttributeNet(7).eval()
    return {"ssim": lambda a, b: 1 - ssim(a, b), "mse": lambda a, b: -psnr(a, b), "lpips": lpips,
            "attributes": lambda a, b: perceptual_distance(net.layers, a, b)}


def test_symmetric_zero_for_equal_images_and_growing_with_blur(lpips):
    x = blurred(images(2, 48, 3), 0.6)
    b = images(2, 48, 4)
    for name, distance in distances(lpips).items():
        with torch.no_grad():
            assert_close(distance(x, b), distance(b, x), rtol=1e-5)
            if name != "mse":
                assert_close(distance(x, x), torch.zeros(2), atol=1e-6)
            grows = torch.stack([distance(blurred(x, s), x) for s in (0.5, 1.0, 2.0, 4.0)])
        assert (grows[1:] > grows[:-1]).all(), (name, grows)


def test_distance_of_a_batch_is_that_of_its_images(lpips):
    a, b = images(3, 32, 0), images(3, 32, 1)
    for name, distance in distances(lpips).items():
        with torch.no_grad():
            assert_close(distance(a, b), torch.cat([distance(a[i:i + 1], b[i:i + 1]) for i in range(3)]), rtol=1e-4)


def test_equal_black_images_have_a_finite_gradient():
    """All features zero: the unit vector of a zero vector must not divide by zero."""
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    perceptual_distance(list, [x], [torch.ones(1, 4, 2, 2)]).sum().backward()
    assert x.grad.isfinite().all()


def test_attribute_net_learns_and_has_the_announced_size():
    torch.manual_seed(0)
    net = AttributeNet(3)
    assert 0.3e6 < sum(p.numel() for p in net.parameters()) < 0.6e6
    assert [tuple(x.shape) for x in net.layers(images(1, 128))] == [
        (1, c, s, s) for c, s in zip((16, 32, 64, 96, 128), (64, 32, 16, 8, 4))]
    x = images(16, 32) * torch.linspace(0.1, 1, 16)[:, None, None, None]
    target = x.mean((2, 3))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(60):
        loss = F.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * target.var(0).mean().item()
    net.eval()
    with torch.no_grad():
        assert_close(net(x)[3:4], net(x[3:4]), atol=1e-5)  # an image's attributes do not depend on its company


# --- bad input ---

def refused(error, *words):
    message = str(error.value)
    assert "\n" not in message and all(w in message for w in words), message


def test_small_images_are_refused_by_ssim():
    with pytest.raises(ValueError) as error:
        ssim(torch.zeros(1, 3, 6, 20), torch.zeros(1, 3, 6, 20))
    refused(error, "6 x 20", "7 x 7")
    assert ssim(torch.ones(1, 3, 7, 7), torch.ones(1, 3, 7, 7)) == 1


# --- the file of the attribute network ---

def test_attribute_net_survives_a_file(tmp_path):
    torch.manual_seed(0)
    net = AttributeNet(5)
    net(images(4, 32))  # moves the statistics of the batch norms
    files.save_tensors({"weights": net.state_dict()}, tmp_path / "net.pt")
    loaded = load_attribute_net(tmp_path / "net.pt")
    assert same(loaded, net) and not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("case", [
    "absent", "garbage", "pickle", "no weights", "no head", "missing", "surplus", "shape", "word"])
def test_bad_attribute_files_are_refused_in_one_line(tmp_path, case):
    weights, bad = AttributeNet(5).state_dict(), tmp_path / "bad.pt"
    changes = {"no head": lambda: weights.pop("head.bias"), "missing": lambda: weights.pop("stages.0.0.bias"),
               "surplus": lambda: weights.update(extra=torch.zeros(1)),
               "shape": lambda: weights.update({"stages.0.0.bias": torch.zeros(3)}),
               "word": lambda: weights.update({"head.bias": "word"})}
    if case in changes:
        changes[case]()
    data = {"no weights": {"x": weights}, "pickle": {"weights": Evil(open, str(tmp_path / "ran"), "w")}}
    if case == "garbage":
        bad.write_bytes(b"not weights at all")
    elif case != "absent":
        torch.save(data.get(case, {"weights": weights}), bad)
    with pytest.raises(FileNotFoundError if case == "absent" else ValueError) as error:
        load_attribute_net(bad)
    refused(error, "bad.pt")
    assert not (tmp_path / "ran").exists()
