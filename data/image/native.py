"""MXNet's ``ImageRecordIter`` behind the interface of our own loader."""

from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np

from glore_common import GloReError, UsageError
from mxnet_compat import mx

from ..common.loader import BatchSource, LoaderConfig
from ..common.options import settled
from ..common.samples import ORDER, generator
from ..common.transforms import default_resize
from .dataset import ImageDataset
from .options import ImageOptions, ImageReadingOptions
from .transforms import AREA, ASPECT, HLS

BICUBIC = 2  # ImageRecordIter's inter_method


class NativeImageLoader(BatchSource):
    """MXNet's own reader of record files, in C++ threads, like a :class:`Loader`.

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
    dataset
        Of a record file; only what it says of the images is used.
    options
        With crop size settled.
    config
        With ``shuffle`` for training: augment, leave out an incomplete last batch. Else every
        image once, in the file's order. Workers are threads, at least 1; ranks can share a file
        that has an index file, in training.
    mean, std
        RGB, on the 0..1 scale.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        options: ImageReadingOptions,
        config: LoaderConfig,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(dataset, config)
        train, source = config.shuffle, dataset.source
        if not source.records:
            raise UsageError(f"reader='native' reads .rec files; {source.origin} is none.")
        if config.strict:
            raise UsageError("reader='native' does not know strict.")
        if config.num_ranks > 1 and not (train and source.index_path):
            raise UsageError(
                f"reader='native' shares {source.origin} among {config.num_ranks} processes only "
                "for training and with an .idx file."
            )
        self.source = source
        samples = len(source.samples)
        if config.num_ranks > 1:
            # MXNet gives all ranks but the last ones the share rounded up; all take as many steps.
            samples -= -(-samples // config.num_ranks) * (config.num_ranks - 1)
        whole, rest = divmod(samples, config.batch_size)
        self.batches = whole + (1 if rest and not train else 0)
        self.num_samples = whole * config.batch_size if train else samples
        if self.batches == 0:
            raise UsageError(
                f"{source.origin} has {samples} samples, fewer than one batch of "
                f"{config.batch_size}: use a smaller batch size."
            )
        crop_size = settled(options, "crop_size")
        resize = default_resize(crop_size) if options.resize is None else options.resize
        self._settings: dict[str, Any] = {
            "path_imgrec": source.root,
            "data_shape": (3, crop_size, crop_size),
            "batch_size": config.batch_size,
            "preprocess_threads": max(1, config.num_workers),
            "inter_method": BICUBIC,
            "fill_value": 0,
            "round_batch": True,
            "verbose": False,
            "resize": resize,
        }
        if source.index_path:
            self._settings["path_imgidx"] = source.index_path
        if config.num_ranks > 1:
            self._settings.update(num_parts=config.num_ranks, part_index=config.rank)
        for channel, middle, deviation in zip("rgb", mean, std):
            self._settings[f"mean_{channel}"] = 255 * middle
            self._settings[f"std_{channel}"] = 255 * deviation
        if train and isinstance(options, ImageOptions):
            self._augment(options)
        if self._settings.get("resize", crop_size) < crop_size:
            raise UsageError(
                f"a crop of {crop_size} pixels does not fit in images resized to a short side of "
                f"{resize}."
            )
        self._iterator: Any = None

    def _augment(self, options: ImageOptions) -> None:
        if options.augmentation == "none":
            return
        if options.rotation != int(options.rotation):
            raise UsageError(f"reader='native' rotates by whole degrees, not {options.rotation}.")
        self._settings.update(rand_mirror=options.flip, max_rotate_angle=int(options.rotation))
        if options.augmentation == "crop":
            self._settings.update(rand_crop=True)
            return
        del self._settings["resize"]
        hue, lightness, saturation = HLS
        self._settings.update(
            random_resized_crop=True,
            min_random_area=AREA[0],
            max_random_area=AREA[1],
            min_aspect_ratio=ASPECT[0],
            max_aspect_ratio=ASPECT[1],
            random_h=hue,
            random_s=saturation,
            random_l=lightness,
        )

    def close(self) -> None:
        """End MXNet's threads. Can be called again."""
        self._iterator = None

    def every_batch(self) -> Iterator[Optional[tuple]]:
        """Begin a pass; see :meth:`data.common.loader.BatchSource.every_batch`."""
        epoch, numbers = self._take_position()
        settings = dict(self._settings)
        if self.config.shuffle:
            seeds = generator(self.config.seed, ORDER, epoch).integers(1 << 30, size=2)
            settings.update(shuffle=True, seed=int(seeds[0]), seed_aug=int(seeds[1]))
        try:
            self._iterator = mx.io.ImageRecordIter(**settings)
        except mx.base.MXNetError as error:
            reason = str(error).strip().splitlines()[-1]
            raise GloReError(f"MXNet cannot read {self.source.root}: {reason}") from error
        return self._batches(numbers, self._iterator)

    def _batches(self, numbers, iterator):
        size, passed = self.config.batch_size, 0
        for number in numbers:
            while passed <= number:
                try:
                    batch = iterator.next()
                except (mx.base.MXNetError, StopIteration) as error:
                    raise GloReError(
                        f"MXNet's reader ended at batch {passed} of {self.batches} of "
                        f"{self.source.root} ({error}); reader='own' names what is wrong."
                    ) from error
                passed += 1
            start = number * size
            count = min(size, self.num_samples - start)
            # A copy: the iterator fills the same memory, which is pinned, again.
            data = batch.data[0][:count].copyto(mx.cpu())
            label = batch.label[0][:count].copyto(mx.cpu())
            self._check_labels(label.asnumpy())
            if self.config.with_index:
                yield data, label, np.arange(start, start + count, dtype=np.int64)
            else:
                yield data, label

    def _check_labels(self, labels):
        classes = self.source.num_classes
        wrong = labels[(labels < 0) | (labels >= classes) | (labels != np.floor(labels))]
        if wrong.size:
            raise GloReError(
                f"{self.source.root}: the label {wrong[0]:g} is no class in 0 to {classes - 1}."
            )
