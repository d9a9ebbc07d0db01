"""Options and files of one edit, each declared once for command line, batch, editor, report and service.

The annotation of a field holds its help text; the options of the command line and the columns of batch manifests are
made from the fields. Imports nothing heavy, so that help is printed, and a request refused, without delay.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from spmdeploy.errors import UsageError
from spmdeploy.inputs import LocalOrRemote, input_name, is_standard_input, is_stream
from spmdeploy.remote import RemotePath
from spmdeploy.types import MaskAlpha, Padding, Tiling

DEFAULT_DILATION = 8
"""Pixels by which a mask made from changed labels is dilated by default: label maps cut objects tightly, and remains of
an object's outline or shadow would show."""
MAX_DILATION = 1024
MAX_FEATHER = 1024


class Option(NamedTuple):
    """How a field appears on the command line and in batch manifests."""

    help: str
    flags: tuple[str, ...] = ()
    """Names on the command line; without them the field's name. The first one also names the manifest's column."""
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    """Text to value, for other types than text, paths, numbers, choices and flags."""
    is_column: bool = True
    """Whether a batch manifest may have a column for it."""
    is_argument: bool = False
    """Whether it is given without a flag."""


class OptionField(NamedTuple):
    """A field of `EditOptions` or `EditRequest` with its option."""

    field: Field[Any]
    option: Option
    type: Any
    """Without `Annotated`."""

    @property
    def column(self) -> str:
        """Name in a batch manifest."""
        return self.option.flags[0].lstrip("-").replace("-", "_") if self.option.flags else self.field.name


def option_fields(record: type) -> list[OptionField]:
    """The fields of a record that have an `Option`."""
    hints = get_type_hints(record, include_extras=True)
    found = []
    for one in fields(record):
        base, *extras = get_args(hints[one.name]) if hasattr(hints[one.name], "__metadata__") else (hints[one.name],)
        found += [OptionField(one, extra, base) for extra in extras if isinstance(extra, Option)]
    return found


def parse_padding(text: str) -> Padding:
    """Return "LEFT,TOP,RIGHT,BOTTOM" in pixels as `Padding`.

    Raises:
        UsageError: The text has another form.
    """
    numbers = text.replace(",", " ").split()
    if len(numbers) != 4 or not all(re.fullmatch(r"-?[0-9]{1,9}", number) for number in numbers):
        raise UsageError(
            f"extend is {text!r}, not four whole numbers",
            "give the pixels to add on the left, top, right and bottom, for example 0,0,256,0",
        )
    return Padding(*map(int, numbers))


@dataclass(frozen=True)
class EditOptions:
    """How an edit is made, whatever its inputs.

    Raises:
        UsageError: a value is out of its range.
    """

    tiling: Annotated[
        Tiling,
        Option(
            "off: whole photo at once; crop: windows around the mask, shrunk; cascade: in tiles at full resolution.",
            metavar="auto|off|crop|cascade",
        ),
    ] = "auto"
    feather: Annotated[
        int,
        Option(
            "Masked pixels at the mask's rim over which the known ones blend into the edit, in matched edits those of "
            "the same class; 0: hard border.",
            metavar="PIXELS",
        ),
    ] = 3
    match_surroundings: Annotated[
        bool | None,
        Option(
            "Match colors and noise of the edit to known pixels of the same classes; needs --labels. Default: where "
            "the labels fit the known pixels."
        ),
    ] = None
    """None: decided by `harmonize.decide_matching`."""
    dilate: Annotated[
        int | None,
        Option(
            f"Grow the mask by this many pixels. Default: {DEFAULT_DILATION} with --edited-from, else 0.",
            flags=("--grow", "--dilate"),
            metavar="PIXELS",
        ),
    ] = None
    """None: the default for the source of the mask, see `EditRequest.dilation`; 0 for arrays."""
    batch_size: Annotated[int, Option("Windows or tiles per call of the backend.", metavar="N")] = 4
    """4 fill a small GPU and fit into a CPU's memory."""

    def __post_init__(self) -> None:
        if self.tiling not in get_args(Tiling):
            raise UsageError(f"tiling {self.tiling!r} does not exist", f"choose one of {', '.join(get_args(Tiling))}")
        if self.feather < 0:
            raise UsageError(f"feather {self.feather} is negative", "give a number of pixels, 0 for none")
        if self.feather > MAX_FEATHER:
            raise UsageError(f"feather {self.feather} is too large", f"give at most {MAX_FEATHER} pixels")
        if self.dilate is not None and not 0 <= self.dilate <= MAX_DILATION:
            raise UsageError(f"grow is {self.dilate}, which is not within 0 and {MAX_DILATION} pixels")
        if self.batch_size < 1:
            raise UsageError(f"batch size {self.batch_size} is too small", "give 1 or more")


@dataclass(frozen=True)
class EditRequest:
    """The files of one edit: what to paint, where, and what to write.

    Either `labels` or `fill` gives the content; exactly one of `mask`, `edited_from` and `extend` gives the region.

    Raises:
        UsageError: the fields contradict each other, or an output would overwrite an input.
    """

    image: Annotated[
        LocalOrRemote, Option("The photo: 8-bit PNG, JPEG, WebP or BMP; - for standard input.", is_argument=True)
    ]
    output: Annotated[
        LocalOrRemote,
        Option(
            "The edited photo; .png keeps known pixels exactly. - writes a PNG to standard output.",
            flags=("--output", "-o"),
        ),
    ]
    labels: Annotated[LocalOrRemote | None, Option("Label map: the class of each pixel to paint.")] = None
    fill: Annotated[str | None, Option("One class for the whole mask, by name or id.")] = None
    mask: Annotated[LocalOrRemote | None, Option("White is edited, black is kept.")] = None
    mask_threshold: Annotated[
        int | None, Option("Edit where the mask has at least this value, 1 to 255.", metavar="N")
    ] = None
    """None: the mask must be clearly binary."""
    mask_alpha: Annotated[
        MaskAlpha | None, Option("Edit this part of the mask's alpha channel.", metavar="opaque|transparent")
    ] = None
    edited_from: Annotated[
        LocalOrRemote | None, Option("The labels before the change: the mask is where they differ.")
    ] = None
    extend: Annotated[
        Padding | None,
        Option(
            "Extend the photo by these pixels, which are the mask.",
            metavar="LEFT,TOP,RIGHT,BOTTOM",
            parse=parse_padding,
        ),
    ] = None
    """Labels and instances have the extended size then."""
    instances: Annotated[LocalOrRemote | None, Option("Instance map, for the outlines of objects.")] = None
    options: EditOptions = field(default_factory=EditOptions)
    sheet: Annotated[
        Path | None, Option("Also write before, labels, mask and after side by side.", is_column=False)
    ] = None
    explain: Annotated[
        Path | None, Option("Also write an image of the windows and tiles over the photo.", is_column=False)
    ] = None
    overwrite: Annotated[bool, Option("Replace existing files.", is_column=False)] = False

    def __post_init__(self) -> None:
        if (self.labels is None) == (self.fill is None):
            raise UsageError("give either labels or fill", "--labels FILE for a label map, --fill CLASS for one class")
        if sum(source is not None for source in (self.mask, self.edited_from, self.extend)) != 1:
            raise UsageError(
                "give one of mask, edited_from and extend",
                "--mask FILE, --edited-from FILE with the labels before the change, or --extend LEFT,TOP,RIGHT,BOTTOM "
                "(to edit and to extend are two steps)",
            )
        if self.edited_from is not None and self.labels is None:
            raise UsageError("edited_from needs labels to compare with", "add --labels FILE, or use --mask")
        if self.options.match_surroundings and self.labels is None:
            raise UsageError(
                "match_surroundings needs the labels of the photo's known pixels too",
                "give --labels FILE instead of --fill, or leave --match-surroundings out",
            )
        if self.mask is None and (self.mask_threshold is not None or self.mask_alpha is not None):
            raise UsageError("mask_threshold and mask_alpha are about a mask file", "add --mask FILE")
        if self.mask_threshold is not None and not 1 <= self.mask_threshold <= 255:
            raise UsageError(f"mask_threshold is {self.mask_threshold}, which is not within 1 and 255")
        if self.mask_alpha is not None and self.mask_alpha not in get_args(MaskAlpha):
            raise UsageError(f"mask_alpha is {self.mask_alpha!r}", f"choose {' or '.join(get_args(MaskAlpha))}")
        if self.options.dilate is not None and self.extend is not None:
            raise UsageError("grow enlarges a mask, and an extension has none", "leave one of them out")
        self._check_paths()

    def _check_paths(self) -> None:
        """An output may replace the photo, if overwriting is allowed, but no other input and no other output."""
        sources = (self.labels, self.mask, self.edited_from, self.instances)
        all_sources = (*sources, self.image, self.output)
        if sum(is_standard_input(path) for path in (self.image, *filter(None, sources))) > 1:
            raise UsageError(
                "standard input is given for more than one file", "pass the others by name, or as <(command) in bash"
            )
        for written, others in (
            (self.output, sources),
            (self.sheet, all_sources),
            (self.explain, (*all_sources, self.sheet)),
        ):
            same = written and next((other for other in others if other and _same_file(written, other)), None)
            if same:
                raise UsageError(f"{written} would be written over {same}, which is needed too", "choose another name")

    @property
    def inputs(self) -> list[LocalOrRemote]:
        """The files to read."""
        paths = (self.image, self.labels, self.mask, self.edited_from, self.instances)
        return [path for path in paths if path is not None]

    @property
    def dilation(self) -> int:
        """Pixels to dilate the mask by."""
        if self.options.dilate is not None:
            return self.options.dilate
        return 0 if self.edited_from is None else DEFAULT_DILATION

    @property
    def mask_description(self) -> str:
        """How messages name the mask."""
        if self.extend is not None:
            return "the extension"
        name = input_name(self.mask) if self.mask else f"the difference of {self.labels} and {self.edited_from}"
        return f"{name}, grown by {self.dilation}," if self.dilation else name


def _same_file(first: LocalOrRemote, second: LocalOrRemote) -> bool:
    if isinstance(first, RemotePath) or isinstance(second, RemotePath):
        return first == second
    if is_stream(first) or is_stream(second):
        return False
    try:
        if os.path.realpath(first) == os.path.realpath(second):
            return True
        return os.path.samefile(first, second)  # hard links, and other capitals where the file system ignores them
    except (OSError, ValueError):  # one does not exist; a zero byte in a name, which reading the file reports
        return False
