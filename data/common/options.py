"""Options of reading that clips and images have in common."""

import dataclasses
from typing import Any, Optional

from glore_common import UsageError
from glore_options import Options, count, number, option, positive_int, three

Triple = tuple[float, float, float]


def settled(options: Options, name: str) -> Any:
    """Return an option that is None until it is settled (by the data set, say), but must not be.

    Raises
    ------
    UsageError
        It still is None.
    """
    value = getattr(options, name)
    if value is None:
        raise UsageError(f"{name} was not given: its default depends on data set or network.")
    return value


@dataclasses.dataclass
class ReadingOptions(Options):
    """How samples are read, by how many processes, and what becomes of unreadable files."""

    batch_size: Optional[int] = option(
        None, "samples per step", kind=positive_int, aliases=("--train-batch",)
    )
    num_workers: Optional[int] = option(
        None,
        "decoding processes; 0: none (default: the physical cores, at most 8)",
        kind=count,
        aliases=("--data-nthreads", "--workers"),
        compare=False,
    )
    max_failures: int = option(
        10, "distinct unreadable files in a row that stop the run", kind=positive_int, compare=False
    )
    strict_data: bool = option(False, "stop at the first unreadable file", compare=False)


@dataclasses.dataclass
class PixelOptions(Options):
    """What is subtracted from pixels and what they are divided by."""

    title = "pixels"
    exclusive = (("rgb_std", "scale"),)

    rgb_mean: Optional[Triple] = option(
        None,
        "what is subtracted, of pixels 0..255 (default: the network's, 124,117,104)",
        kind=three(number(float, 0.0, 255.0)),
        metavar="R,G,B",
    )
    rgb_std: Optional[Triple] = option(
        None,
        "what is then divided by (default: the network's, 1 / 0.0167)",
        kind=three(number(float, above=0.0, high=1e4)),
        metavar="R,G,B",
    )
    scale: Optional[float] = option(
        None, "what is multiplied by in place of --rgb-std", kind=number(float, above=0.0, high=1e4)
    )

    def normalisation(self, mean: Triple, std: Triple) -> tuple[Triple, Triple]:
        """Return mean and std on the scale 0..1: those asked for, else those given."""
        if self.rgb_mean is not None:
            mean = tuple(value / 255 for value in self.rgb_mean)  # type: ignore[assignment]
        if self.rgb_std is not None:
            std = tuple(value / 255 for value in self.rgb_std)  # type: ignore[assignment]
        if self.scale is not None:
            std = (1 / (255 * self.scale),) * 3
        return mean, std
