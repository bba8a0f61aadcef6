"""Batches of images: our own loader, and MXNet's ``ImageRecordIter`` behind the same interface."""

import numpy as np

from glore_common import GloReError, UsageError
from mxnet_compat import mx

from ..common.loader import Loader
from ..common.samples import ORDER, generator
from .transforms import AREA, ASPECT, HLS, default_resize

BICUBIC = 2  # ImageRecordIter's inter_method


class ImageLoader(Loader):
    """Batches of images: a :class:`data.common.loader.Loader` that names their size."""

    @property
    def num_classes(self):
        """Number of classes that the labels are below."""
        return self.dataset.source.num_classes

    @property
    def class_names(self):
        """Names of the classes, or None."""
        return self.dataset.source.class_names


class NativeImageLoader:
    """MXNet's own reader of record files, in C++ threads, with the interface of :class:`Loader`.

    It differs from our loader:

    * A pass is repeatable: the iterator is made anew for each one with a seed drawn from (seed,
      epoch), and gave the same batches for 1, 2 and 4 threads of MXNet 1.9.1 (the tests pin that).
      Random numbers, and so order and crops, are others than our loader's.
    * Going to a batch within a pass reads all that come before it.
    * **A record that does not decode ends the process** (MXNet 1.9.1: a floating point exception),
      as does a damaged chain of records; nothing is replaced or named. A file that is cut off is
      found before.
    * Crops have an aspect ratio uniform in 3/4..4/3 and MXNet's way of rotating.

    Parameters
    ----------
    source : ImageSource
        Of a record file.
    crop_size : int
    mean, std : sequence of 3 float
        RGB, on the 0..1 scale.
    batch_size : int
    train : bool
        Shuffle, augment, leave out an incomplete last batch. Else every image once, in the file's
        order, with its index.
    augmentation, flip, rotation, resize
        As for :func:`data.image.transforms.image_train_transform`.
    seed : int
    num_workers : int
        Threads, at least 1.
    rank, num_ranks : int
        For ``train`` with an index file: this process's part of the file.
    """

    def __init__(
        self,
        source,
        crop_size,
        mean,
        std,
        batch_size,
        train,
        augmentation="none",
        flip=False,
        rotation=0,
        resize=None,
        seed=1,
        num_workers=1,
        rank=0,
        num_ranks=1,
        with_index=False,
    ):
        if not source.records:
            raise UsageError(f"reader='native' reads .rec files; {source.origin} is none.")
        if batch_size < 1 or not 0 <= rank < num_ranks:
            raise UsageError("batch_size must be at least 1 and rank in 0..num_ranks - 1.")
        if num_ranks > 1 and not (train and source.index_path):
            raise UsageError(
                f"reader='native' shares {source.origin} among {num_ranks} processes only for "
                "training and with an .idx file."
            )
        self.source = source
        self.batch_size = batch_size
        self._train = train
        self._seed = seed
        self._with_index = with_index
        if rotation != int(rotation):
            raise UsageError(f"reader='native' rotates by whole degrees, not {rotation}.")
        samples = len(source.samples) // num_ranks
        whole, rest = divmod(samples, batch_size)
        self._length = whole + (1 if rest and not train else 0)
        self._samples = whole * batch_size if train else samples
        if self._length == 0:
            raise UsageError(
                f"{source.origin} has {samples} samples, fewer than one batch of {batch_size}: use "
                "a smaller batch size."
            )
        self._options = {
            "path_imgrec": source.root,
            "data_shape": (3, crop_size, crop_size),
            "batch_size": batch_size,
            "preprocess_threads": max(1, num_workers),
            "inter_method": BICUBIC,
            "fill_value": 0,
            "round_batch": True,
            "verbose": False,
        }
        if source.index_path:
            self._options["path_imgidx"] = source.index_path
        if num_ranks > 1:
            self._options.update(num_parts=num_ranks, part_index=rank)
        for channel, middle, deviation in zip("rgb", mean, std):
            self._options[f"mean_{channel}"] = 255 * middle
            self._options[f"std_{channel}"] = 255 * deviation
        if not (train and augmentation == "reference"):
            self._options["resize"] = default_resize(crop_size) if resize is None else resize
        if train and augmentation != "none":
            self._options.update(rand_mirror=flip, max_rotate_angle=int(rotation))
        if train and augmentation == "crop":
            self._options.update(rand_crop=True)
        elif train and augmentation == "reference":
            hue, lightness, saturation = HLS
            self._options.update(
                random_resized_crop=True,
                min_random_area=AREA[0],
                max_random_area=AREA[1],
                min_aspect_ratio=ASPECT[0],
                max_aspect_ratio=ASPECT[1],
                random_h=hue,
                random_s=saturation,
                random_l=lightness,
            )
        if self._options.get("resize", crop_size) < crop_size:
            raise UsageError(
                f"a crop of {crop_size} pixels does not fit in images resized to a short side of "
                f"{self._options['resize']}."
            )
        self._next_position = (0, 0)
        self._iterator = None

    def __len__(self):
        return self._length

    @property
    def num_samples(self):
        """Number of samples of a pass."""
        return self._samples

    @property
    def num_classes(self):
        """Number of classes that the labels are below."""
        return self.source.num_classes

    @property
    def class_names(self):
        """Names of the classes, or None."""
        return self.source.class_names

    def set_position(self, epoch, batch=0):
        """Let the next ``iter()`` begin at ``batch`` (0 .. len) of ``epoch``."""
        if epoch < 0 or not 0 <= batch <= self._length:
            raise UsageError(
                f"no batch {batch} of epoch {epoch}: a pass has {self._length} batches."
            )
        self._next_position = (epoch, batch)

    def start(self):
        """Do nothing: MXNet's threads start with a pass."""

    def bad_files(self):
        """Return the bad files that were met: none, as the first one ends the process."""
        return []

    def close(self):
        """End MXNet's threads. Can be called again."""
        self._iterator = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __iter__(self):
        epoch, first = self._next_position
        self._next_position = (epoch + 1, 0)
        seeds = generator(self._seed, ORDER, epoch).integers(1 << 30, size=2)
        options = dict(self._options)
        if self._train:
            options.update(shuffle=True, seed=int(seeds[0]), seed_aug=int(seeds[1]))
        try:
            self._iterator = mx.io.ImageRecordIter(**options)
        except mx.base.MXNetError as error:
            reason = str(error).strip().splitlines()[-1]
            raise GloReError(f"MXNet cannot read {self.source.root}: {reason}") from error
        return self._batches(first, self._iterator)

    def _batches(self, first, iterator):
        for number in range(self._length):
            try:
                batch = iterator.next()
            except (mx.base.MXNetError, StopIteration) as error:
                raise GloReError(
                    f"MXNet's reader ended at batch {number} of {self._length} of "
                    f"{self.source.root} ({error}); reader='own' names what is wrong."
                ) from error
            if number < first:
                continue
            count = self.batch_size
            if not self._train:
                count = min(count, self._samples - number * self.batch_size)
            # A copy: the iterator fills the same memory, which is pinned, again.
            data = batch.data[0][:count].copyto(mx.cpu())
            label = batch.label[0][:count].copyto(mx.cpu())
            self._check_labels(label.asnumpy())
            if self._with_index:
                start = number * self.batch_size
                yield data, label, np.arange(start, start + count, dtype=np.int64)
            else:
                yield data, label

    def _check_labels(self, labels):
        wrong = labels[(labels < 0) | (labels >= self.num_classes) | (labels != np.floor(labels))]
        if wrong.size:
            raise GloReError(
                f"{self.source.root}: the label {wrong[0]:g} is no class in 0 to "
                f"{self.num_classes - 1}."
            )
