"""Pictures of what blocks do: a planted node, all kinds of blocks, clips, the report."""

import csv
import html.parser

import cv2
import numpy as np
import pytest
from videos import write_picture_video, write_video

from checkpoint import graph
from checkpoint.params import write_params
from glore_common import UsageError
from jobs.explain import find_inputs, main
from jobs.pictures import extent, frame_of, strides
from mxnet_compat import mx
from network.builder import get_symbol, logits
from network.initializer import DEFAULT_RULES, initial_params, xavier_uniform
from network.specs import MEAN, STD
from network.symbol_glore import GloRe_Unit

RULES = ((r"_(add|add-2|out)_conv_weight$", xavier_uniform), *DEFAULT_RULES)
SIDE, STRIDE = 64, 8


def png(path, pixels):
    cv2.imwrite(str(path), pixels[..., ::-1])
    return str(path)


def save(prefix, symbol, shape, rules=RULES, **planted):
    """Write a checkpoint of drawn parameters; return its prefix."""
    args, auxs = initial_params(logits(symbol), {"data": (1, *shape)}, 0, rules)
    args.update(planted)
    graph.save(str(prefix), 0, symbol, args, auxs)
    return str(prefix)


@pytest.fixture
def planted(tmp_path):
    """A network whose node 0 sees green, and nothing of black; node 1 half of that, negative."""
    data = mx.sym.Variable("data")
    # 1x1 with a stride: a cell sees the one pixel that it is centred on.
    small = mx.sym.Convolution(
        data, num_filter=3, kernel=(1, 1), stride=(STRIDE, STRIDE), no_bias=True, name="small"
    )
    unit = GloRe_Unit(
        small, num_in=3, name="conv4_B01_extra", num_state=2, num_node=3, flavour="video"
    )
    pool = mx.sym.Pooling(unit, kernel=(1, 1), pool_type="avg", global_pool=True, name="pool")
    out = mx.sym.FullyConnected(mx.sym.Flatten(pool), num_hidden=2, name="classifier")
    symbol = mx.sym.SoftmaxOutput(out, name="softmax")
    black = -np.array(MEAN) / np.array(STD)
    weight = np.zeros((3, 3, 1, 1), "float32")
    weight[0, 1], weight[1, 1] = 1, -0.5
    values = {
        "small_weight": np.eye(3, dtype="float32").reshape(3, 3, 1, 1),
        "conv4_B01_extra_conv-proj_conv_weight": weight,
        "conv4_B01_extra_conv-proj_conv_bias": -(weight[..., 0, 0] @ black).astype("float32"),
    }
    return save(tmp_path / "planted", symbol, (3, SIDE, SIDE), **values)


def test_a_node_that_sees_the_left_half_shows_just_that(planted, tmp_path):
    # Of 73 pixels, to which a crop of 64 is resized, 4 are cut off; 29 columns are green.
    picture = np.zeros((73, 73, 3), "uint8")
    picture[:, : 4 + 29, 1] = 255
    out = tmp_path / "out"
    main([planted, "--crop-size", str(SIDE), "--inputs", png(tmp_path / "half.png", picture),
          "--output", str(out), "--maps", "2"])  # fmt: skip
    drawn = cv2.imread(str(out / "00_half_conv4_B01_extra.png"))[..., ::-1].astype(int)
    red = (drawn[..., 0] > drawn[..., 1] + 40) & (drawn[..., 0] > drawn[..., 2] + 40)
    blue = (drawn[..., 2] > drawn[..., 0] + 40) & (drawn[..., 2] > drawn[..., 1])
    # Cell i is centred on pixel 8 i: the cells 0 to 3 are green, and reach to pixel 28.
    right_end = (SIDE // 2 - STRIDE / 2) / SIDE
    for mask in (red, blue):
        _, _, boxes, _ = cv2.connectedComponentsWithStats(mask.astype("uint8"))
        left, top, width, height, _ = max(boxes[1:], key=lambda box: box[4])
        assert width / height == pytest.approx(right_end, abs=0.04)
        # The other half has no colour.
        rest = drawn[top + 2 : top + height - 2, left + width + 3 : left + int(0.97 * height)]
        assert rest.size
        assert (rest.max(-1) - rest.min(-1)).max() <= 12
    numbers = np.load(out / "00_half.npz")
    maps = numbers["conv4_B01_extra/weights"].reshape(3, *numbers["conv4_B01_extra/shape"])
    green = 1 / STD[1]
    np.testing.assert_allclose(maps[0][:, :4], green, rtol=1e-5)
    np.testing.assert_allclose(maps[0][:, 4:], 0, atol=1e-5)
    np.testing.assert_allclose(maps[1], -maps[0] / 2, atol=1e-5)
    rows = list(csv.DictReader((out / "maps.csv").open()))
    assert [row["map"] for row in rows] == ["node 0", "node 1", "node 2"]
    assert float(rows[0]["share"]) == pytest.approx(0.8, abs=1e-6)
    assert float(rows[0]["uniform"]) == pytest.approx(1 / 64)


class Sources(html.parser.HTMLParser):
    """What a page loads."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, value) for name, value in attrs if name in ("src", "href")]


def sources(path):
    reader = Sources()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader.found


def test_every_kind_of_block_in_one_report(tmp_path):
    block = "gc@4:1/after:ratio=1/4,snl@3:1,se@5:1:ratio=1/4,nl@4:1:sub_sample=true,glore@5:1"
    symbol, conf = get_symbol("local39", 2, block=block)
    prefix = save(tmp_path / "all", symbol, conf.data_shape)
    pixels = np.random.default_rng(0).integers(0, 256, (80, 70, 3)).astype("uint8")
    folder = tmp_path / "images"
    folder.mkdir()
    png(folder / "a.png", pixels)
    out = tmp_path / "out"
    main([prefix, "--crop-size", "64", "--inputs", str(folder), "--output", str(out)])
    names = ["conv3_B01_snl", "conv4_B01_gc", "conv4_B01_nl", "conv5_B01_se", "conv5_B01_extra"]
    assert all((out / f"00_a_{name}.png").stat().st_size > 5000 for name in names)
    assert (out / "relation_conv5_B01_extra.png").is_file()
    found = sources(out / "report.html")
    assert len(found) == len(names) + 1
    assert all(value.startswith("data:image/png;base64,") for _, value in found)


def test_a_clip_gets_a_row_per_time_slice_and_a_film(tmp_path):
    symbol, conf = get_symbol("TINY_GLORE", 3)
    args, auxs = initial_params(logits(symbol), {"data": (1, *conf.data_shape)}, 0)
    path = str(tmp_path / "net-0000.params")
    write_params(path, {**args, **auxs})
    video = write_picture_video(tmp_path / "v.avi", 40)
    out = tmp_path / "out"
    main([path, "--network", "TINY_GLORE", "--inputs", str(video), "--frame-interval", "2",
          "--output", str(out), "--maps", "3"])  # fmt: skip
    film = cv2.VideoCapture(str(out / "00_v_conv3_B01_extra.mp4"))
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) == conf.data_shape[1]
    kinds = {tag for tag, _ in sources(out / "report.html")}
    assert kinds == {"img", "video"}


def test_cells_lie_where_their_centres_are():
    assert strides((14, 14), (224, 224)) == (16, 16)
    assert strides((15, 15), (225, 225)) == (16, 16)
    assert strides((4, 8, 8), (8, 64, 64)) == (2, 8, 8)
    assert extent((8, 8), (64, 64)) == (-4, 60, 60, -4)
    # Windows of two cells: the first holds pixels -2 to 5, for a stride of 4.
    assert extent((8, 8), (64, 64), offset=0.25) == (-2, 62, 62, -2)
    assert [frame_of(row, 4, 8) for row in range(4)] == [0, 2, 4, 6]


def test_files_of_a_folder_are_spread_over_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.JPG").touch()
    found = find_inputs([str(tmp_path)], video=False, limit=2)
    assert [path[-7:] for path in found] == ["a/0.JPG", "b/0.JPG"]
    assert len(find_inputs([str(tmp_path)], video=False, limit=9)) == 6


def test_wrong_requests_are_named(planted, tmp_path):
    with pytest.raises(UsageError, match="name images"):
        main([planted])
    with pytest.raises(UsageError, match="this network reads images"):
        main([planted, "--inputs", str(write_video(tmp_path / "v.avi", 3))])
    symbol, conf = get_symbol("local39", 2)
    bare = save(tmp_path / "bare", symbol, conf.data_shape)
    with pytest.raises(UsageError, match="no GloRe unit and no context block"):
        main([bare, "--crop-size", "64", "--inputs", str(tmp_path)])
