"""The sheet that compares methods, the pictures of the views, the turntable's."""
import torch
from PIL import Image

from export.pictures import TEXT, Views, comparison, save_animation, save_views, to_image
from tests.support.small import ball


def test_many_inputs_are_many_rows():
    """A hundred inputs beside three columns: eight a row; the first column below is the truth."""
    scene = ball(104, 32)
    views = Views(scene.images[[101, 102, 103]], None)
    sheet = comparison(scene, list(range(100)), [101, 102, 103], {"ngp": views, "nearest": views})
    assert sheet.size == (8 * 32, (13 + 3) * (32 + TEXT))
    top = 13 * (32 + TEXT) + TEXT
    for column in range(3):
        tile = sheet.crop((column * 32, top, column * 32 + 32, top + 32))
        assert tile.tobytes() == to_image(scene.images[101]).tobytes()


def test_pictures_of_views_are_called_by_their_frames(tmp_path):
    """Whatever the data call these; those of another run's views go, what somebody else put there stays."""
    scene = ball(3, 32)
    views = {"ngp": Views(1 - scene.images, None)}
    folder = tmp_path / "views"
    save_views(views, scene.images, ["1", "2", "../../3"], folder)
    for frame, i in (("1", 0), ("2", 1)):
        for method, images in (("truth", scene.images), ("ngp", 1 - scene.images)):
            picture = Image.open(folder / f"{frame}_{method}.png")
            assert picture.tobytes() == to_image(images[i]).tobytes()
    names = sorted(path.name for path in folder.iterdir())
    assert names[2:] == ["2_ngp.png", "2_truth.png", *names[4:]] and len(names) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["views"]
    (folder / "mine.png").write_bytes(b"")
    save_views(views, scene.images[:1], ["7"], folder)
    assert sorted(path.name for path in folder.iterdir()) == ["7_ngp.png", "7_truth.png", "mine.png"]


def test_an_animation_has_all_frames_in_their_order(tmp_path):
    levels = [0.2, 0.9, 0.0, 0.6]
    save_animation(torch.stack([torch.full((3, 8, 8), level) for level in levels]), tmp_path / "t.gif")
    with Image.open(tmp_path / "t.gif") as animation:
        assert animation.n_frames == len(levels) and animation.info["loop"] == 0
        for i, level in enumerate(levels):
            animation.seek(i)
            assert animation.convert("RGB").getpixel((4, 4)) == (round(255 * level),) * 3
