"""The options of each job: groups that the rooms declare, with the job's own defaults."""

import dataclasses
from typing import Any, ClassVar, Optional

from data.common.options import PixelOptions, ReadingOptions
from data.detection.options import DetectionReadingOptions
from data.image.options import ImageOptions, ImageTestOptions
from data.segmentation.options import SegmentationReadingOptions, height_width
from data.video.options import ClipOptions, ClipTestOptions
from dataset.cub200 import MEAN as CUB_MEAN
from dataset.cub200 import STD as CUB_STD
from glore_common import UsageError
from glore_options import (
    JobOptions,
    Options,
    comma_list,
    count,
    group,
    number,
    option,
    pixels,
    positive_float,
    positive_int,
    seed,
    share,
)
from network.options import ArchitectureOptions, NetworkOptions
from network.symbol_detection import STYLES
from train.options import (
    CheckpointOptions,
    DeviceOptions,
    LoggingOptions,
    RunOptions,
    ScheduleOptions,
    TrainDeviceOptions,
    TrainOptions,
)

BACKENDS = ("mxnet", "onnx")


@dataclasses.dataclass
class TrainJobOptions(TrainOptions):
    """What every training job has besides the loop's options."""

    first: ClassVar = ("network", "source", "data", "pixels", "schedule")

    network: NetworkOptions = group(NetworkOptions)
    data: ReadingOptions = group(ReadingOptions)
    pixels: PixelOptions = group(PixelOptions)


# --- videos ---------------------------------------------------------------------------------------


def _foreign(instead: str) -> Optional[str]:
    return option(None, f"accepted, without effect: {instead}", metavar="X", compare=False)


@dataclasses.dataclass
class ForeignOptions(Options):
    """Upstream's options of torch.distributed."""

    title = "other"

    backend: Optional[str] = _foreign("MXNet's key-value store takes its place")
    world_size: Optional[str] = _foreign("run_dist.sh starts the workers of a distributed job")
    dist_url: Optional[str] = _foreign("run_dist.sh starts the workers of a distributed job")


@dataclasses.dataclass
class KineticsOptions(TrainJobOptions):
    """Options of ``train_kinetics.py``; what is None is the data set's."""

    network: NetworkOptions = group(NetworkOptions, network="RESNET50_GLORE")
    data: ClipOptions = group(ClipOptions)
    schedule: ScheduleOptions = group(
        ScheduleOptions, lr_base=None, lr_schedule=None, lr_steps=None, warmup_steps=None
    )
    run: RunOptions = group(RunOptions, epoch_div_factor=None)
    foreign: ForeignOptions = group(ForeignOptions)


# --- images ---------------------------------------------------------------------------------------

SOURCES = ("files", "folder", "cub200", "demo")


@dataclasses.dataclass
class ImageSourceOptions(Options):
    """Which images are trained on, validated on and tested on."""

    title = "source of the images"

    dataset: str = option(
        "files",
        "files: --data-train, --data-val or --folder; folder: --data-root is a folder of classes, "
        "or holds train/ and perhaps val/ and test/; cub200: CUB-200-2011; demo: made-up images",
        choices=SOURCES,
    )
    data_root: Optional[str] = option(
        None,
        "cub200: CUB_200_2011 or the folder that holds it (default: ./dataset); folder: see "
        "--dataset",
        metavar="DIR",
        compare=False,
    )
    folder: Optional[str] = option(
        None, "holds train/ and val/, folders of classes", metavar="DIR", compare=False
    )
    data_train: Optional[str] = option(
        None, "a .rec file of im2rec, or a folder of classes", metavar="PATH"
    )
    data_val: Optional[str] = option(
        None, "the same for validation (may be absent)", metavar="PATH"
    )
    data_train_idx: Optional[str] = option(
        None,
        "the .idx file, which must lie beside its .rec file",
        metavar="FILE",
        compare=False,
    )
    data_val_idx: Optional[str] = option(
        None,
        "the .idx file, which must lie beside its .rec file",
        metavar="FILE",
        compare=False,
    )
    cub_boxes: bool = option(
        False, "cub200: cut the images to the birds' bounding boxes (bounding_boxes.txt)"
    )
    num_classes: Optional[int] = option(
        None,
        "(default: counted in the training data, which for a .rec file takes a pass over it)",
        kind=positive_int,
    )
    num_examples: Optional[int] = option(
        None,
        "compared with what the training data hold, which is what counts",
        kind=positive_int,
        compare=False,
    )
    val_fraction: float = option(
        0.1,
        "part of the training images, of each class, that the epoch is chosen on, where the data "
        "have no such part",
        kind=number(float, high=0.9, above=0.0),
    )
    test_fraction: float = option(
        0.2,
        "part of a folder of classes without test/ that is for testing",
        kind=number(float, high=0.9, above=0.0),
    )
    split_seed: int = option(
        0, "which images are held out; --random-seed does not change it", kind=count
    )
    select_on_test: bool = option(
        False,
        "train on all training images and choose the epoch on the test part, as a public "
        "reproduction did: its accuracy is then too good",
    )


@dataclasses.dataclass
class ImageTrainingOptions(Options):
    """What training on images has beyond the loop's options."""

    title = "training on images"

    mixup: float = option(
        0.0,
        "blend pairs of images by shares of Beta(ALPHA, ALPHA); 0: off",
        kind=number(float, 0.0),
        metavar="ALPHA",
    )
    test_batch: Optional[int] = option(
        None,
        "images at a time in validation and testing (default: --batch-size)",
        kind=positive_int,
        compare=False,
    )
    no_decay_bn_bias: bool = option(
        False,
        "no weight decay of anything in a BatchNorm (by default its gamma decays, its beta and "
        "biases do not: as MXNet's Module has it)",
    )
    zero_init_units: bool = option(
        True,
        "GloRe units start as the identity: the last BatchNorm's gamma is 0 where a unit ends in "
        "one, else the last convolution's weight; residual blocks, which end in no BatchNorm, are "
        "left alone",
    )
    top_k: int = option(
        5,
        "accepted: top-1 and top-5 are always reported",
        choices=(0, 1, 5),
        compare=False,
    )
    benchmark: bool = option(
        False,
        "time --max-steps steps (default: 20) on made-up images and write nothing",
        compare=False,
    )


@dataclasses.dataclass
class ImageJobOptions(TrainJobOptions):
    """Options of the jobs that train on images."""

    source: ImageSourceOptions = group(ImageSourceOptions)
    data: ImageOptions = group(ImageOptions)
    images: ImageTrainingOptions = group(ImageTrainingOptions)


@dataclasses.dataclass
class ImagenetOptions(ImageJobOptions):
    """Options of ``train_imagenet.py``; the schedule's defaults are our choice."""

    network: NetworkOptions = group(NetworkOptions, network="resnet50_w-glore_2-3")
    schedule: ScheduleOptions = group(
        ScheduleOptions, lr_base=0.1, lr_schedule=None, warmup_steps=None, optimizer="sgd"
    )
    run: RunOptions = group(RunOptions, end_epoch=100)


@dataclasses.dataclass
class ClassifierNetworkOptions(NetworkOptions):
    """The network of ``train_classifier.py``: with units by the reproduction's names of stages."""

    glore: Optional[str] = option(
        "none",
        "a GloRe unit behind the last block of the stage with 256 (res3), 512 (res4) channels of "
        "a ResNet-18, or both (res3+res4); or places as in the other scripts",
        metavar="none|res3|res4|res3+res4|UNITS",
    )
    insert_after: Optional[str] = option(
        None,
        "units behind these blocks instead, e.g. '4:1;5:1,2' for block 1 of conv4 and both of "
        "conv5 (res3 is conv4, res4 is conv5)",
        metavar="STAGE:BLOCK;...",
    )


@dataclasses.dataclass
class ClassifierOutputOptions(Options):
    """Where the classifier's files go, and testing alone."""

    title = "output"

    output_dir: Optional[str] = option(
        None,
        "of all that a run writes (default: ./exps/classifier/TASK_NAME)",
        metavar="DIR",
        compare=False,
    )
    evaluate: str = option(
        "",
        "do not train: test this checkpoint of an earlier run",
        metavar="CHECKPOINT",
        compare=False,
    )


@dataclasses.dataclass
class ClassifierOptions(ImageJobOptions):
    """Options of ``train_classifier.py``: those of a public reproduction on CUB-200-2011."""

    network: ClassifierNetworkOptions = group(
        ClassifierNetworkOptions, network="resnet18_v1", num_node=16, fresh_units=True
    )
    source: ImageSourceOptions = group(ImageSourceOptions, dataset="cub200")
    data: ImageOptions = group(ImageOptions, augmentation="crop", rotation=10.0, batch_size=32)
    images: ImageTrainingOptions = group(ImageTrainingOptions, test_batch=32, zero_init_units=False)
    pixels: PixelOptions = group(
        PixelOptions,
        rgb_mean=tuple(255 * value for value in CUB_MEAN),
        rgb_std=tuple(255 * value for value in CUB_STD),
    )
    schedule: ScheduleOptions = group(
        ScheduleOptions, lr_base=0.01, weight_decay=5e-4, optimizer="sgd"
    )
    run: RunOptions = group(RunOptions, end_epoch=10)
    checkpoints: CheckpointOptions = group(CheckpointOptions, model_dir="", keep=1)
    logging: LoggingOptions = group(LoggingOptions, log_frequency=10)
    output: ClassifierOutputOptions = group(ClassifierOutputOptions)


# --- segmentation -------------------------------------------------------------------------------

PIXEL_SETS = ("cityscapes", "voc", "ade20k", "folders", "demo")


@dataclasses.dataclass
class SegmentationNetworkOptions(NetworkOptions):
    """Which network, and what its head is like."""

    context: Optional[str] = option(
        None,
        "block before the classifier, with settings if need be: glore, 'gc:ratio=1/4', nl, snl, "
        "se, or none (default: the network's own)",
        metavar="BLOCK",
    )
    output_stride: Optional[int] = option(
        None,
        "how much smaller than the input the last map is (default: 8)",
        choices=(8, 16, 32),
    )
    auxiliary: Optional[bool] = option(
        None, "an auxiliary head on conv4 helps training (default: true)"
    )

    def overrides(self) -> dict[str, Any]:
        """Return the keywords for ``get_symbol`` that are asked for."""
        own = {name: getattr(self, name) for name in ("context", "output_stride", "auxiliary")}
        return {**super().overrides(), **{n: v for n, v in own.items() if v is not None}}


@dataclasses.dataclass
class SegmentationSourceOptions(Options):
    """Which images and masks are trained on and validated on."""

    title = "source of images and masks"

    dataset: str = option(
        "cityscapes",
        "cityscapes: leftImg8bit/ and gtFine/; voc: Pascal VOC 2012; ade20k: scene parsing; "
        "folders: --images, --masks or --data-root with {train,val}/{images,masks}; demo: made-up "
        "streets",
        choices=PIXEL_SETS,
    )
    data_root: Optional[str] = option(
        None, "folder of the data set (default: ./dataset/NAME)", metavar="DIR", compare=False
    )
    images: Optional[str] = option(None, "folders: training images", metavar="DIR")
    masks: Optional[str] = option(None, "folders: their masks", metavar="DIR")
    val_images: Optional[str] = option(None, "folders: validation images", metavar="DIR")
    val_masks: Optional[str] = option(None, "folders: their masks", metavar="DIR")
    classes: Optional[str] = option(
        None,
        "folders: a file of lines 'id name' or 'id name r g b'; the name - is what is not "
        "labelled (default: masks hold 0, 1, 2, … and 255 for what is not labelled)",
        metavar="FILE",
    )
    num_classes: Optional[int] = option(
        None, "folders: without --classes (default: found in the masks)", kind=positive_int
    )


@dataclasses.dataclass
class SegmentationTrainingOptions(Options):
    """What training on masks has beyond the loop's options."""

    title = "training on masks"

    aux_weight: float = option(
        0.4, "of the auxiliary head's loss beside the main one's", kind=number(float, 0.0)
    )
    ohem: float = option(
        0.0,
        "online hard example mining: learn only pixels whose class has a probability below 0.7, "
        "but at least this share of an image's; 0: learn all",
        kind=number(float, 0.0, 1.0),
    )
    head_lr: float = option(
        1.0, "learning rate of what is not the backbone, times the others'", kind=positive_float
    )


@dataclasses.dataclass
class SegmentationOptions(TrainJobOptions):
    """Options of ``train_segmentation.py``; what is None depends on the data set."""

    network: SegmentationNetworkOptions = group(SegmentationNetworkOptions)
    source: SegmentationSourceOptions = group(SegmentationSourceOptions)
    data: SegmentationReadingOptions = group(SegmentationReadingOptions)
    schedule: ScheduleOptions = group(
        ScheduleOptions, lr_base=None, lr_schedule="poly", optimizer="sgd", weight_decay=4e-5
    )
    run: RunOptions = group(RunOptions)
    segmentation: SegmentationTrainingOptions = group(SegmentationTrainingOptions)


@dataclasses.dataclass
class PixelViewOptions(Options):
    """How often, at which sizes and in which parts a segmentation network sees an image."""

    title = "views of an image (segmentation)"

    window: Optional[tuple[int, int]] = option(
        None,
        "slide a window over the image and average (default: the whole image at once)",
        kind=height_width,
        metavar="HEIGHT,WIDTH",
    )
    overlap: float = option(
        0.333, "share of a window that the next one covers too", kind=number(float, 0.0, 0.9)
    )
    flip_test: bool = option(False, "average with the mirrored image")
    scales: tuple[float, ...] = option(
        (1.0,),
        "average over these sizes of the image, e.g. 0.75,1,1.25,1.5,1.75,2",
        kind=comma_list(positive_float),
        metavar="LIST",
    )
    memory_limit: float = option(
        8.0,
        "GB that an image may take; one that would take more is seen in windows",
        kind=positive_float,
    )


@dataclasses.dataclass
class PartOptions(Options):
    """What a network that segments or detects is tested on, and what is written."""

    title = "images with masks or objects"

    part: str = option("val", "of the data set: val, train or test")
    images: Optional[str] = option(
        None, "folder of images instead of the training's data set", metavar="DIR"
    )
    masks: Optional[str] = option(None, "segmentation: folder of their masks", metavar="DIR")
    annotations: Optional[str] = option(
        None, "detection: their objects, a file of COCO's format", metavar="FILE"
    )
    pictures: int = option(8, "images of which pictures of the results are written", kind=count)
    submit: str = option(
        "",
        "write results as servers take them: masks of Cityscapes' ids into this folder, or "
        "detections into this JSON file",
        metavar="DIR|FILE",
    )


# --- detection ------------------------------------------------------------------------------------

BOX_SETS = ("coco", "json", "demo")


@dataclasses.dataclass
class DetectionNetworkOptions(NetworkOptions):
    """Which network, and whose form its heads have."""

    style: Optional[str] = option(
        None,
        "gcnet: heads, anchors, proposals and schedule of GCNet; gluoncv: of gluoncv's "
        "mask_rcnn_fpn networks, whose trained weights need it (default: gcnet)",
        choices=tuple(STYLES),
    )

    def overrides(self) -> dict[str, Any]:
        """Return the keywords for ``get_symbol`` that are asked for."""
        return {**super().overrides(), **({"style": self.style} if self.style else {})}


@dataclasses.dataclass
class DetectionSourceOptions(Options):
    """Which images and objects are trained on and validated on."""

    title = "source of images and objects"

    dataset: str = option(
        "coco",
        "coco: train2017/, val2017/ and annotations/; json: --images, --annotations, files of "
        "COCO's format with classes of your own; demo: made-up harbours",
        choices=BOX_SETS,
    )
    data_root: Optional[str] = option(
        None, "folder of the data set (default: ./dataset/COCO)", metavar="DIR", compare=False
    )
    images: Optional[str] = option(None, "json: folder of the training images", metavar="DIR")
    annotations: Optional[str] = option(None, "json: their objects", metavar="FILE")
    val_images: Optional[str] = option(
        None, "json: folder of the validation images (default: --images)", metavar="DIR"
    )
    val_annotations: Optional[str] = option(None, "json: their objects", metavar="FILE")


@dataclasses.dataclass
class DetectionTrainingOptions(Options):
    """What training on objects has beyond the loop's options."""

    title = "training on objects"

    frozen_stages: Optional[int] = option(
        None,
        "stages of the backbone, the first convolution included, that keep their weights and "
        "statistics (default: 2 with --pretrained, else 0)",
        kind=number(int, 0, 5),
    )
    train_proposals: Optional[int] = option(
        None,
        "boxes of an image that are proposed to the heads in training (default: 2000; demo: 200)",
        kind=positive_int,
    )
    anchor_samples: Optional[int] = option(
        None,
        "anchors of an image that are learnt from (default: 256; demo: 128)",
        kind=positive_int,
    )
    roi_samples: Optional[int] = option(
        None,
        "proposals of an image that are learnt from (default: 512; demo: 64)",
        kind=positive_int,
    )


@dataclasses.dataclass
class FindOptions(Options):
    """Which of the boxes that a detector makes are objects."""

    title = "objects (detection)"

    min_score: Optional[float] = option(
        None, "lowest score of an object (default: 0.05; gluoncv's networks: 0.001)", kind=share
    )
    max_overlap: float = option(
        0.5, "of two objects of a class that overlap by more, the better stays", kind=share
    )
    max_objects: int = option(100, "most objects of an image", kind=positive_int)
    proposals: int = option(1000, "boxes of an image that the heads look at", kind=positive_int)


@dataclasses.dataclass
class DetectionOptions(TrainJobOptions):
    """Options of ``train_detection.py``; what is None depends on the data set and the style."""

    network: DetectionNetworkOptions = group(DetectionNetworkOptions)
    source: DetectionSourceOptions = group(DetectionSourceOptions)
    data: DetectionReadingOptions = group(DetectionReadingOptions)
    schedule: ScheduleOptions = group(
        ScheduleOptions,
        lr_base=None,
        lr_schedule=None,
        lr_steps=None,
        warmup_steps=None,
        warmup_factor=1 / 3,
        optimizer="sgd",
        clip_norm=None,
    )
    devices: TrainDeviceOptions = group(TrainDeviceOptions, batch_norm=None)
    detection: DetectionTrainingOptions = group(DetectionTrainingOptions)


# --- testing --------------------------------------------------------------------------------------


@dataclasses.dataclass
class WeightsOptions(ArchitectureOptions):
    """Which weights are tested, and in which network where they do not say so themselves."""

    title = "checkpoint"

    weights: Optional[str] = option(
        None,
        "checkpoint of a training (TASK_ep: its newest), .params, prefix, .pth, or the name of a "
        "released network",
        positional=True,
        metavar="CHECKPOINT",
    )
    epoch: Optional[int] = option(None, "of a prefix (default: the newest)", kind=count)
    style: Optional[str] = option(
        None,
        "of a detector without a manifest: gluoncv for weights of its mask_rcnn_fpn networks",
        choices=tuple(STYLES),
    )
    model_root: str = option("./exps/models", "folder of --model-subpath")
    model_subpath: str = option("", "upstream's name of the weights: a file in --model-root")

    def overrides(self) -> dict[str, Any]:
        """Return the keywords for ``get_symbol`` that are asked for."""
        return {**super().overrides(), **({"style": self.style} if self.style else {})}


@dataclasses.dataclass
class ViewOptions(ClipTestOptions, ImageTestOptions):
    """What a network is shown of a video or an image, whatever its task."""

    title = "views"

    crops: Optional[str] = option(
        None,
        "clips: centre, spatial (3 along the longer side), mixed (the centre and random ones); "
        "images: centre, ten (corners and centre, also mirrored), full (the whole image) "
        "(default: centre, or what fits --num-crops)",
        choices=("centre", "spatial", "mixed", "ten", "full"),
    )
    random_seed: int = option(0, "of random crops", kind=seed)


@dataclasses.dataclass
class InferenceOptions(DeviceOptions):
    """What a network runs on when it is used."""

    backend: str = option(
        "mxnet",
        "onnx: by onnxruntime on the CPU, where it is installed",
        choices=BACKENDS,
        compare=False,
    )
    fused: bool = option(
        True,
        "mxnet on a CPU: join operations and fold BatchNorms into convolutions; the scores are the "
        "same to 1e-5",
        compare=False,
    )
    int8: bool = option(
        False,
        "mxnet on a CPU: compute in 8-bit whole numbers, with the ranges quantize.py has found",
        compare=False,
    )

    def engine(self, task: str) -> str:
        """Return the backend, or 'plain' for MXNet without fusing, or 'int8'.

        Parameters
        ----------
        task
            Of the network.

        Raises
        ------
        UsageError
            If options exclude each other, or are not for such networks.
        """
        if task in ("segmentation", "detection"):
            if self.int8 or self.backend != "mxnet":
                flag = "--int8" if self.int8 else f"--backend {self.backend}"
                raise UsageError(f"{flag} is for networks that classify, this one is for {task}")
            return "plain"
        if self.int8 and (self.backend != "mxnet" or not self.fused):
            other = "--fused false" if self.backend == "mxnet" else f"--backend {self.backend}"
            raise UsageError(f"give --int8 or {other}, not both")
        if self.int8:
            return "int8"
        return "plain" if self.backend == "mxnet" and not self.fused else self.backend


@dataclasses.dataclass
class EvaluationDataOptions(ViewOptions):
    """What is tested on; nothing given: what the training validated on, or its test part."""

    title = "data"

    dataset: Optional[str] = option(None, "of videos (default: the training's)")
    data_root: Optional[str] = option(None, "folder of the data set (default: the training's)")
    split: Optional[int] = option(
        None, "official split of UCF101, HMDB51 (default: the training's)", kind=positive_int
    )
    rec: Optional[str] = option(None, "images: .rec file of im2rec", metavar="FILE")
    folder: Optional[str] = option(None, "images: folder of classes", metavar="DIR")
    labels: Optional[str] = option(
        None,
        "of a --folder without class folders, as ILSVRC's val: file that has the images' classes "
        "(default: the development kit's or another known one near the folder)",
        metavar="FILE",
    )
    max_samples: Optional[int] = option(
        None,
        "stop after so many videos or images",
        kind=positive_int,
        aliases=("--max-videos", "--max-images"),
    )


@dataclasses.dataclass
class EvaluationOutputOptions(Options):
    """Where results go."""

    title = "output"

    output: str = option(
        "", "beginning of the names of the results (default: ./exps/results/…)", metavar="PREFIX"
    )
    per_class: str = option("", "write a table of the classes (CSV)", metavar="FILE")
    log_file: str = option("", "log file (default: none)")
    debug_mode: bool = option(False, "log more")


@dataclasses.dataclass
class EvaluateOptions(JobOptions):
    """Options of ``evaluate.py``."""

    network: WeightsOptions = group(WeightsOptions)
    data: EvaluationDataOptions = group(EvaluationDataOptions)
    parts: PartOptions = group(PartOptions)
    segmentation: PixelViewOptions = group(PixelViewOptions)
    detection: FindOptions = group(FindOptions)
    pixels: PixelOptions = group(PixelOptions)
    devices: InferenceOptions = group(InferenceOptions)
    output: EvaluationOutputOptions = group(EvaluationOutputOptions)


# --- what blocks do -------------------------------------------------------------------------------


def query(text: str) -> tuple[float, float]:
    """Return 'X,Y' as shares of the width and height."""
    return comma_list(number(float, 0.0, 1.0), 2)(text)


@dataclasses.dataclass
class ExplainDataOptions(Options):
    """What is looked at."""

    title = "data"

    inputs: tuple[str, ...] = option(
        (), "images or videos, or folders of them", kind=str, several=True, metavar="PATH"
    )
    limit: int = option(12, "of the files in folders, take so many", kind=positive_int)
    crop_size: Optional[int] = option(
        None,
        "side of the input in pixels (default: the training's); a larger one makes finer maps",
        kind=positive_int,
    )
    clip_length: Optional[int] = option(
        None, "frames of a clip (default: the training's)", kind=positive_int
    )
    frame_interval: Optional[int] = option(
        None, "from one frame of a clip to the next (default: the training's)", kind=positive_int
    )


@dataclasses.dataclass
class ExplainOutputOptions(Options):
    """What is drawn, and where it goes."""

    title = "output"

    output: str = option(
        "",
        "folder of the report, pictures and numbers (default: ./exps/explain/CHECKPOINT)",
        metavar="DIR",
    )
    maps: int = option(6, "GloRe: nodes that are drawn, those of most energy", kind=positive_int)
    queries: tuple[tuple[float, float], ...] = option(
        ((0.5, 0.5), (0.2, 0.2), (0.8, 0.8)),
        "Non-local: points X,Y whose attention is drawn, as shares of width and height (default: "
        "0.5,0.5 0.2,0.2 0.8,0.8)",
        kind=query,
        several=True,
        metavar="X,Y",
    )
    smooth: bool = option(
        False, "interpolate maps between cells, which shows detail that is not there"
    )


@dataclasses.dataclass
class ExplainOptions(JobOptions):
    """Options of ``explain.py``."""

    network: WeightsOptions = group(WeightsOptions)
    data: ExplainDataOptions = group(ExplainDataOptions)
    pixels: PixelOptions = group(PixelOptions)
    output: ExplainOutputOptions = group(ExplainOutputOptions)


# --- comparison with the released weights ---------------------------------------------------------


@dataclasses.dataclass
class ComparisonOptions(Options):
    """What is compared with what."""

    title = "comparison"
    exclusive = (("rec", "folder"),)

    checkpoint: str = option(
        "",
        "PREFIX-symbol.json with PREFIX-NNNN.params, a tar of them, or the name of a released "
        "network",
        positional=True,
        metavar="PREFIX|TAR|NAME",
    )
    epoch: Optional[int] = option(None, "of a PREFIX (default: the newest)", kind=count)
    network: Optional[str] = option(
        None, "name in the table of networks (default: found from the parameters)"
    )
    root: Optional[str] = option(None, "of downloads (default: the cache)", metavar="FOLDER")
    images: tuple[str, ...] = option(
        (), "run on these, not on random data", kind=str, several=True, metavar="FILE"
    )
    crop_size: Optional[int] = option(
        None, "side of the input in pixels (default: the network's)", kind=pixels
    )
    tolerance: float = option(
        1e-5,
        "largest difference of logits that is equal, as a share of the largest logit",
        kind=positive_float,
    )
    batch_size: int = option(8, "inputs at a time", kind=positive_int)
    seed: int = option(0, "of the random data", kind=count)
    rec: Optional[str] = option(
        None, "accuracy: validation images packed by im2rec", metavar="FILE"
    )
    folder: Optional[str] = option(
        None, "accuracy: validation images, a folder per class", metavar="FOLDER"
    )
    resize: int = option(256, "shorter side before the crop", kind=pixels)
    max_images: Optional[int] = option(None, "stop after so many", kind=positive_int)
    num_workers: Optional[int] = option(None, "decoding processes", kind=count)
    ours: Optional[str] = option(
        None,
        "checkpoint of your own training, to be compared with the released one",
        metavar="PREFIX",
    )
    ours_epoch: Optional[int] = option(None, "of --ours (default: the newest)", kind=count)
    output: str = option(
        "",
        "of PREFIX.md and PREFIX.json (default: ./exps/results/compare_CHECKPOINT)",
        metavar="PREFIX",
    )


@dataclasses.dataclass
class CompareOptions(JobOptions):
    """Options of ``compare_released.py``."""

    comparison: ComparisonOptions = group(ComparisonOptions)
    devices: DeviceOptions = group(DeviceOptions)
