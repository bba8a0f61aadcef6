"""Counting parameters and multiply-adds: published figures, and small graphs by hand."""

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from golden_weights import read_table

from benchmark import block_cost
from glore_common import GloReError, UsageError
from mxnet_compat import mx
from network import get_spec, get_symbol, list_networks, summary
from network.picture import INPUT, INSERTED, PLAIN, places_of
from network.specs import PUBLISHED_TOP1
from network.summary import count

# name: parameters / M, parameters with statistics / M, multiply-adds / G at the default input.
# None: no figure to compare with. The figures were computed from the original graphs.
FIGURES = {
    "resnet50": (25.55, 25.60, 4.09),
    "resnet50_w-glore_0-3": (30.49, 30.56, 5.32),
    "resnet50_w-glore_2-3": (31.314216, 31.39, 5.96),
    "resnet200": (64.67, None, 15.01),
    "resnet200_w-glore_0-3": (69.61, 69.80, 16.23),
    "resnet200_w-glore_2-3": (70.43, 70.63, 16.88),
    "resnext101-32x4d": (44.17, None, 7.97),
    "resnext101-32x4d_w-glore_2-3": (49.93, 50.10, 9.84),
    "dpn98": (61.57, None, 11.67),
    "dpn131": (79.25, None, 16.01),
    "RESNET50_GLORE": (33.731952, None, 31.78),
    "RESNET101_GLORE": (57.44, None, 50.32),
}


def unit_params(width):
    """Parameters of a released unit on ``width`` channels."""
    mid = width // 4
    weights = width * 2 * mid + width * mid + mid * mid + 4 * mid * mid + 2 * mid * width
    return weights + 2 * (width + width + mid + 2 * mid + 2 * mid)


def same(value, figure):
    """Compare with a figure to the decimals it is printed with."""
    decimals = len(str(figure).partition(".")[2])
    return round(value, max(decimals, 2)) == figure


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_counts_equal_the_published_figures(name):
    counted = count(*get_symbol(name))
    params, with_stats, macs = FIGURES[name]
    assert same(counted.params / 1e6, params)
    assert with_stats is None or same(counted.params_with_stats / 1e6, with_stats)
    assert same(counted.macs / 1e9, macs)


@pytest.mark.parametrize("name", ["RESNET50_3D_GCN_X5", "RESNET101_3D_GCN_X5"])
def test_video_counts_equal_the_golden_tables(name):
    sizes = {"params": 0, "stats": 0}
    for parameter, shape in read_table(f"torch_{name}.tsv"):
        size = 1
        for side in shape:
            size *= side
        if not parameter.endswith("num_batches_tracked"):
            sizes["stats" if "running" in parameter else "params"] += size
    counted = count(*get_symbol(name))
    assert {"params": counted.params, "stats": counted.stats} == sizes


@pytest.mark.parametrize(
    ("base", "units"),
    [
        ("resnet50", "resnet50_w-glore_2-3"),
        ("resnet101", "resnet101_w-glore_2-3"),
        ("resnet152", "resnet152_w-glore_2-3"),
        ("resnet200", "resnet200_w-glore_2-3"),
        ("resnext101-32x4d", "resnext101-32x4d_w-glore_2-3"),
    ],
)
def test_units_add_the_same_to_every_backbone_of_these_widths(base, units):
    added = count(*get_symbol(units)).params - count(*get_symbol(base)).params
    assert added == 2 * unit_params(512) + 3 * unit_params(1024)


def test_squeeze_and_excitation_adds_two_layers_per_block():
    added = count(*get_symbol("resnet50_w-se")).params - count(*get_symbol("resnet50")).params
    blocks = dict(zip((256, 512, 1024, 2048), (3, 4, 6, 3)))
    expected = sum(n * (2 * c * (c // 16) + c + c // 16) for c, n in blocks.items())
    assert added == expected


@pytest.mark.parametrize("name", list_networks(study=True))
def test_every_network_infers_its_shapes_and_costs(name):
    counted = count(*get_symbol(name))
    assert counted.params > 0
    assert counted.stats > 0
    assert counted.macs > counted.macs_of["classifier"] > 0
    assert all(macs > 0 for macs in counted.macs_of.values())


def test_macs_of_each_kind_of_node():
    data = mx.sym.Variable("data")
    out = mx.sym.Convolution(
        data, kernel=(3, 5), num_filter=8, num_group=2, pad=(1, 2), stride=(2, 1), name="conv"
    )
    flat = mx.sym.Reshape(out, shape=(0, 0, -1), name="flat")
    product = mx.sym.batch_dot(flat, flat, transpose_b=True, name="product")
    turned = mx.sym.batch_dot(flat, flat, transpose_a=True, name="turned")
    dense = mx.sym.FullyConnected(product, num_hidden=10, name="dense")
    rows = mx.sym.FullyConnected(turned, num_hidden=3, flatten=False, name="rows")
    counted = count(mx.sym.Group([dense, rows]), {"data": (2, 4, 6, 7)})
    # conv: (2, 4, 6, 7) -> (2, 8, 3, 7), 21 positions; a filter sees 2 channels x 3 x 5.
    assert counted.macs_of == {
        "conv": 2 * 8 * 21 * 2 * 15,
        "product": 2 * 8 * 8 * 21,
        "turned": 2 * 21 * 21 * 8,
        "dense": 2 * 10 * 64,
        "rows": 2 * 21 * 3 * 21,
    }
    assert counted.params == (8 * 2 * 15 + 8) + (10 * 64 + 10) + (3 * 21 + 3)
    assert counted.stats == 0


def test_macs_follow_the_input_size():
    symbol, _ = get_symbol("resnet18")
    sizes = [
        count(symbol, {"data": (1, 3, side, side)}).macs_of["conv1_conv"] for side in (64, 128)
    ]
    assert sizes == [32 * 32 * 64 * 147, 64 * 64 * 64 * 147]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"dta": (1, 3, 64, 64)}, "no input dta"),
        ({}, "does not follow from"),
        ({"data": (1, 3, 64)}, "does not take inputs of shapes"),
        ((1, 3, 64, 64), "given as an InputConf or as a mapping"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    symbol, _ = get_symbol("resnet18")
    with pytest.raises(UsageError, match=message):
        count(symbol, shapes)


def test_table_has_counts_and_published_accuracy():
    rows = summary.table(["resnet50_3d_gcn_x5", "resnet18"]).splitlines()
    assert rows[2] == (
        "| `RESNET50_GLORE` | 8 x 224 x 224 | 5 GloRe | 33.73 | 33.79 | 31.78 | 68.0 |"
    )
    assert rows[3].startswith("| `resnet18` | 224 x 224 |  | 11.6")
    assert rows[3].endswith("|  |")


def test_every_published_figure_belongs_to_a_row():
    assert set(PUBLISHED_TOP1) <= set(list_networks())


# Parts, reports and comparisons -----------------------------------------------------------------


def test_parts_add_up_to_the_whole():
    for name, block in (("resnet18", "gc,nl,glore"), ("dpn92", "nl"), ("TINY_GLORE", "se")):
        symbol, conf = get_symbol(name, block=block)
        stages, blocks = summary.parts(symbol, conf)
        counted = count(symbol, conf)
        assert list(stages) == ["stem", "conv2", "conv3", "conv4", "conv5", "head"]
        assert sum(part.params for part in stages.values()) == counted.params
        assert sum(part.macs for part in stages.values()) == counted.macs
        assert all(part.params > 0 and part.macs > 0 for part in blocks.values())


def test_inserted_blocks_are_counted_by_themselves():
    symbol, conf = get_symbol("resnet50", block="nl@4:5", glore="4:1")
    _, blocks = summary.parts(symbol, conf)
    assert sorted(blocks) == ["conv4_B01_extra", "conv4_B05_nl"]
    assert blocks["conv4_B01_extra"].params == unit_params(1024)
    # Four 1x1 layers between 1024 and 512 channels; 14 x 14 positions, and two products of all.
    assert blocks["conv4_B05_nl"].params == 4 * 1024 * 512 + 3 * 512 + 1024
    assert blocks["conv4_B05_nl"].macs == 4 * 1024 * 512 * 196 + 2 * 196 * 196 * 512
    plain = count(*get_symbol("resnet50"))
    added = sum(part.macs for part in blocks.values())
    assert count(symbol, conf).macs == plain.macs + added


def test_report_has_layers_stages_blocks_and_memory():
    symbol, conf = get_symbol("resnet18", block="nl")
    text = summary.report("resnet18", symbol, conf)
    assert "# resnet18, input 3 x 224 x 224" in text
    assert "| conv1_conv | Convolution | 1 x 64 x 112 x 112 | 9,408 | 118,013,952 |" in text
    assert "| conv1_relu | Activation | 1 x 64 x 112 x 112 |  |  |" in text
    assert "| stem | 0.010 | 118.014 |" in text
    assert "| conv4_B01_nl | 0.132 | 35.525 |" in text
    # 196 x 196 scores of 4 bytes.
    assert "0.1 MiB are Non-local scores" in text
    assert "Multiply-adds: 1,849,597,952." in text
    assert "Non-local" not in summary.report("resnet18", *get_symbol("resnet18"))


def test_comparison_tells_what_blocks_add():
    rows = summary.compare(["resnet18", "resnet18+nl"], (3, 64, 64)).splitlines()
    assert rows[0] == "|  | `resnet18` | `resnet18+nl` |"
    cells = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in rows}
    assert cells["input"] == ["64 x 64", "64 x 64"]
    assert cells["added to the first, M"] == ["+0.000", "+0.132"]
    assert cells["inserted blocks"] == ["0", "1"]


def test_picture_has_every_operation_once_and_frames_the_blocks():
    symbol, conf = get_symbol("TINY_GLORE")
    dot = summary.to_dot(symbol, conf)
    nodes = [node.name for node in summary.operations(symbol, conf)]
    assert all(dot.count(f'"{name}" [label=') == 1 for name in nodes)
    assert dot.count("subgraph") == 2
    assert 'label="conv3_B01_extra"' in dot
    assert '"data" -> "conv1_conv"' in dot
    assert "_weight" not in dot


def test_pictures_are_drawn_by_graphviz(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "dot"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$1" > "$3"\n/bin/cat >> "$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    picture = tmp_path / "net.png"
    summary.main(["TINY_3D", "--graph", str(picture)])
    assert picture.read_text().startswith("-Tpng\ndigraph")
    program.write_text("#!/bin/sh\necho no such format >&2; exit 1\n")
    with pytest.raises(GloReError, match="cannot draw .*net.xyz: no such format"):
        summary.main(["TINY_3D", "--graph", str(tmp_path / "net.xyz")])
    assert not (tmp_path / "net.xyz").exists()
    program.unlink()
    summary.main(["TINY_3D", "--graph", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_study_is_listed_when_asked_for(capsys):
    assert "resnet18_v1_slim" not in list_networks()
    assert list_networks(study=True)[: len(list_networks())] == list_networks()
    assert get_spec("ResNet18_v1_slim").name == list_networks(study=True)[-1]
    summary.main(["--markdown"])
    table = capsys.readouterr().out
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == list_networks()
    assert summary.table(list_networks()) == table.rstrip("\n")
    summary.main(["--study"])
    assert "`resnet18_v1_slim`" in capsys.readouterr().out


def test_table_tells_what_is_inserted():
    assert summary.inserted_in(get_spec("resnet50_w-se_w-glore_0-3")) == "16 SE, 3 GloRe"
    assert summary.inserted_in(get_spec("RESNET50_SLOWONLY_NL5")) == "5 NL"
    assert summary.inserted_in(get_spec("dpn92")) == ""


def test_command_line(capsys, tmp_path):
    path = tmp_path / "graph.dot"
    summary.main(["resnet18", "--block", "gc@4:1:ratio=1/4", "--graph", str(path)])
    out = capsys.readouterr().out
    assert "| conv4_B01_gc_add-1_conv | Convolution | 1 x 64 x 1 x 1 | 16,448 | 16,384 |" in out
    assert path.read_text().startswith("digraph")
    summary.main(["--compare", "resnet18", "resnet18+se", "--input", "3,96,64"])
    assert "96 x 64 | 96 x 64" in capsys.readouterr().out
    summary.main(["resnet18", "resnet34"])
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18", "--input", "3,8,64,64"], "this network reads 3,height,width"),
        (["resnet18", "resnet34", "--block", "gc"], "for one NAME"),
        (["--input", "3,64,64"], "--input is for one NAME"),
        (["resnet18", "--markdown"], "the table of all networks"),
        (["resnet18", "--compare", "resnet34"], "either before or after --compare"),
        (["--compare", "resnet34+cg"], "'cg' is not one of"),
    ],
)
def test_wrong_command_lines_are_explained(arguments, message):
    with pytest.raises(UsageError, match=message):
        summary.main(arguments)


def test_a_picture_needs_no_graphviz(tmp_path, monkeypatch):
    monkeypatch.setattr(summary.shutil, "which", lambda name: None)
    symbol, conf = get_symbol("resnet18_w-glore_1-1", crop_size=64)
    nodes, inputs = summary.operations(symbol, conf), ["data"]
    places = places_of(nodes, inputs)
    assert len(set(places.values())) == len(places) == len(nodes) + 1
    for node in nodes:
        for source in set(node.inputs) & set(places):
            (x, y), (to_x, to_y) = places[source], places[node.name]
            # Below, or in a later column.
            assert to_y > y or to_x > x + 0.9
    for ending, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")):
        path = tmp_path / f"x{ending}"
        summary.draw(symbol, conf, str(path))
        assert path.read_bytes().startswith(start)
    pixels = matplotlib.image.imread(tmp_path / "x.png")
    # The network's and the units' boxes, and the input's.
    for colour in (PLAIN, INSERTED, INPUT):
        rgb = matplotlib.colors.to_rgb(colour)
        assert (np.abs(pixels[..., :3] - rgb) < 0.01).all(axis=-1).sum() > 3000
    for name in ("x", "x.bmp"):
        with pytest.raises(UsageError, match=r"give \.png, \.svg, \.pdf or \.dot"):
            summary.draw(symbol, conf, str(tmp_path / name))


@pytest.mark.parametrize("network", ["TINY_GLORE", "resnet18", "RESNET50_GLORE", "dpn92"])
def test_block_costs_have_blocks_for_every_network(network):
    for block in block_cost.blocks_for(network):
        assert get_symbol(network, block=block)


def test_block_costs_of_a_resnet50():
    assert block_cost.blocks_for("resnet50") == [
        *("gc", "gc@4:5/after", "se", "snl", "nl", "nl@4:1,3,5", "glore@0-3", "glore@2-3")
    ]


def test_block_costs_are_measured_side_by_side(capsys):
    block_cost.main(["TINY_3D", "--blocks", "gc", "nl", "--input", "3,4,32,32", "--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Input 1 x 3 x 4 x 32 x 32, 2 rounds, cpu(0)."
    assert [line.split("`")[1] for line in lines[4:]] == ["TINY_3D", "TINY_3D+gc", "TINY_3D+nl"]
    assert lines[4].count("(1.00)") == 2
    assert block_cost.ratios([[1.0, 2.0], [10.0, 10.0], [2.0, 6.0]]) == [1.0, 2.0]


def test_block_costs_of_a_detector_are_those_of_its_trunk(capsys):
    block_cost.main(
        ["mask_rcnn_tiny", "--input", "3,64,96", "--blocks", "gc", "--rounds", "1", "--memory"]
    )
    header, _, plain, blocks = capsys.readouterr().out.strip().splitlines()[-4:]
    assert header.endswith("memory in inference, MB (ratio) | memory in training, MB (ratio) |")
    assert plain.startswith("| `mask_rcnn_tiny` | 0.12 | +0.00 |")
    symbol, conf = get_symbol("mask_rcnn_tiny", crop_size=(64, 96))
    trunk = block_cost.measured_part(symbol, "mask_rcnn_tiny")
    alone = count(trunk, {"data": (1, 3, 64, 96)})
    # The heads are not in it.
    assert alone.params < count(symbol, conf).params / 2
    assert blocks.startswith("| `mask_rcnn_tiny+gc` |")
