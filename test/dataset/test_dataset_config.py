"""dataset/config.py: names, places, and what is said when data are missing."""

import os
import subprocess
import sys

import pytest

import dataset
from dataset.config import recipe_for
from glore_common import GloReError, UsageError


def test_kinetics_is_where_upstream_has_it(root):
    config = dataset.get_config("Kinetics")
    raw = os.path.join(root, "dataset", "Kinetics", "raw")
    assert config.num_classes == 400
    assert config.train_list == os.path.join(raw, "list_cvt", "kinetics_train_avi.txt")
    assert config.val_list == os.path.join(raw, "list_cvt", "kinetics_val_avi.txt")
    assert config.train_root == os.path.join(raw, "data", "train_avi-288p")
    assert config.val_root == os.path.join(raw, "data", "val_avi-288p")
    assert config.mapping_table == os.path.join(raw, "list_cvt", "mapping_table.txt")
    assert config.epoch_div_factor == 4
    assert config.flip


@pytest.mark.parametrize(
    ("name", "split", "classes", "train", "val"),
    [
        ("UCF101", 2, 101, "trainlist02.txt", "testlist02.txt"),
        ("HMDB51", 3, 51, "hmdb51_split3_train.txt", "hmdb51_split3_test.txt"),
    ],
)
def test_splits(name, split, classes, train, val):
    config = dataset.get_config(name.lower(), "/there", split=split)
    assert (config.name, config.num_classes, config.split) == (name, classes, split)
    assert config.train_list == f"/there/{name}/raw/list_cvt/{train}"
    assert config.val_list == f"/there/{name}/raw/list_cvt/{val}"
    assert config.train_root == config.val_root == f"/there/{name}/raw/data"
    assert config.epoch_div_factor == 1
    with pytest.raises(UsageError, match=f"{name} has no split 4; it has 1 to 3"):
        dataset.get_config(name, split=4)


def test_demo_must_not_be_mirrored():
    config = dataset.get_config("demo")
    assert not config.flip
    assert (config.num_classes, config.clip_length, config.train_frame_interval) == (8, 8, 2)
    assert config.crop_size == 64


def test_unknown_name_lists_the_nearest_first():
    assert dataset.list_datasets() == ["Kinetics", "UCF101", "HMDB51", "Demo"]
    with pytest.raises(UsageError, match=r"'UCF-101'; known \(nearest first\): UCF101, .*Kinetics"):
        dataset.get_config("UCF-101")


def test_check_names_every_path_and_the_commands(tmp_path):
    config = dataset.get_config("Kinetics", tmp_path / "my data")
    os.makedirs(config.val_root)
    os.makedirs(os.path.dirname(config.val_list))
    with open(config.val_list, "w"):
        pass
    config.check(parts=["val"])
    with pytest.raises(GloReError) as caught:
        config.check()
    lines = str(caught.value).splitlines()
    state = {line.split()[-1]: line.split()[0] for line in lines if line.startswith("  ")}
    for path, expected in [
        ("kinetics_train_avi.txt", "MISSING"),
        ("train_avi-288p", "MISSING"),
        ("kinetics_val_avi.txt", "found"),
        ("val_avi-288p", "found"),
        ("mapping_table.txt", "MISSING"),
    ]:
        found = [value for key, value in state.items() if key.endswith(path)]
        assert found == [expected], path
    text = str(caught.value)
    assert f"prepare_videos --dataset Kinetics --data-root '{tmp_path}/my data'" in text
    assert "--csv" in text
    os.makedirs(config.train_root)
    with open(config.train_list, "w"):
        pass
    config.check()  # the mapping table only names the classes


def test_check_of_demo_names_the_generator(tmp_path):
    with pytest.raises(GloReError, match=r"python -m dataset\.demo --data-root "):
        dataset.get_config("Demo", tmp_path).check()


def test_mapping_table(tmp_path):
    path = tmp_path / "mapping_table.txt"
    path.write_text("1\tair drumming\n0\tabseiling\n\n2\tça va (sport)\n", encoding="utf-8")
    assert dataset.read_mapping_table(path) == ["abseiling", "air drumming", "ça va (sport)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\ta\n1 b\n", "line 2: expected 'label<TAB>class name', found '1 b'"),
        ("0\ta\n0\tb\n", "line 2: label 0 occurs a second time"),
        ("0\ta\n1\ta\n", "line 2: class 'a' occurs a second time"),
        ("0\ta\n2\tb\n", "label 1 is missing"),
        ("", "no classes"),
    ],
)
def test_malformed_mapping_table(tmp_path, text, message):
    path = tmp_path / "mapping_table.txt"
    path.write_text(text)
    with pytest.raises(GloReError, match=message.replace("(", r"\(")):
        dataset.read_mapping_table(path)


def test_class_names_must_fit_the_data_set(tmp_path):
    config = dataset.get_config("Demo", tmp_path)
    with pytest.raises(GloReError, match="cannot read the mapping table"):
        config.class_names()
    os.makedirs(os.path.dirname(config.mapping_table))
    with open(config.mapping_table, "w") as stream:
        stream.write("0\ta\n")
    with pytest.raises(GloReError, match="names 1 classes, Demo has 8"):
        config.class_names()


def test_the_package_is_light(root):
    code = (
        "import sys, dataset; dataset.get_config('Kinetics');"
        "print([m for m in ('mxnet', 'cv2', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_installed_package_keeps_out_of_site_packages(root, tmp_path):
    # As a wheel has it: everything below glore.
    (tmp_path / "glore" / "dataset").mkdir(parents=True)
    (tmp_path / "glore" / "__init__.py").touch()
    for name in ("dataset/__init__.py", "dataset/config.py", "glore_common.py"):
        with open(os.path.join(root, name), encoding="utf-8") as stream:
            source = stream.read().replace("from glore_common", "from glore.glore_common")
        (tmp_path / "glore" / name).write_text(source, encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    code = "from glore import dataset; c = dataset.get_config('UCF101'); print(c.root); c.check()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == str(work / "dataset" / "UCF101")
    assert "python -m glore.dataset.prepare_videos --dataset UCF101 \\" in result.stderr


@pytest.mark.parametrize(
    ("videos", "batch", "factor", "epochs", "warmup"),
    [
        (1, 1, 1, 30, 1),
        (30, 2, 1, 30, 22),
        (1_000, 32, 1, 30, 46),
        (20_000, 64, 1, 30, 468),
        (240_000, 64, 4, 400, 1500),
    ],
)
def test_the_recipe_follows_the_size(videos, batch, factor, epochs, warmup):
    recipe = recipe_for(videos)
    assert recipe["batch_size"] == batch
    assert recipe["lr_base"] == pytest.approx(0.05 * batch / 64)
    assert (recipe["epoch_div_factor"], recipe["end_epoch"]) == (factor, epochs)
    assert recipe["warmup_steps"] == warmup


def test_a_mapping_table_with_a_mark_of_byte_order(root):
    path = os.path.join(root, "test", "inputs", "videos", "mapping_table_bom.txt")
    assert dataset.read_mapping_table(path) == ["abseiling", "air drumming"]
