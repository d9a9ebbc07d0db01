"""Builds a data folder from the official downloads of Cityscapes and ADE20K, at the paper's sizes.

- The official validation split becomes `test`; the official test splits have no public labels.
- Photos are written as PNG although JPEG would take a third of the room (about 0.9 GB for Cityscapes, 4 GB for ADE20K):
  JPEG artifacts would be learned as texture, and they shift every distance between features.
- Cityscapes becomes 512×256. ADE20K keeps its proportions: the longer side at most 384 and the shorter at least 256.
  Both cannot hold beyond 3:2; there the shorter side decides, since training cuts squares of 256 and would enlarge
  narrower images. A photo is enlarged only when its shorter side is below 256.
- Every id stays a class like any other, void included, as in the paper. Cityscapes draws nothing for license plates (id
  -1), so that the vehicle around them is seen; tools that write -1 into 8 bits make it 255, which becomes car here.
- Instance ids keep their meaning: Cityscapes class * 1000 + number, below 1000 the class; ADE20K 0 = none, 1, 2, 3, ...
  within the image, which `"instances": "numbered"` in labels.json says.
- labels.json is written last: a folder without it is not finished.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spmdeploy.errors import InputError, SpmDeployError, UsageError
from spmdeploy.files import TEMPORARY, atomic_write
from spmdeploy.imaging import files as images
from spmdeploy.imaging.resize import resize_labels, resize_photo
from spmdeploy.inputs import regular_file
from spmdeploy.labels import check_labels, class_table
from spmdeploy.types import Progress

Kind = Literal["cityscapes", "ade20k"]


CITYSCAPES_SIZE = (256, 512)
"""(height, width) of every prepared Cityscapes image (paper, section 4)."""
ADE20K_LONGER, ADE20K_SHORTER = 384, 256
# The 100 classes of the instance track of the Places Challenge 2017, by their ids among the 150.
# fmt: off
ADE20K_THINGS = (
    8, 9, 11, 13, 15, 16, 19, 20, 21, 23, 24, 25, 28, 31, 32, 33, 34, 36, 37, 38, 39, 40, 42, 43, 44, 45, 46, 48, 50,
    51, 54, 56, 57, 58, 59, 63, 65, 66, 67, 68, 70, 71, 72, 73, 74, 75, 76, 77, 79, 81, 82, 83, 84, 86, 87, 88, 89, 90,
    91, 93, 94, 96, 98, 99, 103, 104, 105, 108, 109, 111, 112, 113, 116, 117, 119, 120, 121, 122, 124, 125, 126, 127,
    128, 130, 131, 133, 134, 135, 136, 137, 138, 139, 140, 143, 144, 145, 147, 148, 149, 150,
)
# fmt: on
# person, rider, car, truck, bus, caravan, trailer, train, motorcycle, bicycle
CITYSCAPES_THINGS = tuple(range(24, 34))
LICENSE_PLATE, CAR = 255, 26
FOLDERS = ("images", "labels", "inst_map")
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class PrepareReport:
    """The result of `prepare`. Field names are those of the JSON report."""

    pictures: dict[str, int]
    """Split -> images in it."""
    made: int
    """Images written by this run; the others were complete."""
    notes: tuple[str, ...]
    """What was left out, a sentence each."""

    def to_json(self) -> dict[str, Any]:
        """The JSON report, schema spmdeploy.dataset-prepare/1."""
        return {"schema": "spmdeploy.dataset-prepare/1", **vars(self), "notes": list(self.notes)}


def prepare(
    kind: Kind, source: Path, target: Path, jobs: int | None = None, progress: Progress | None = None
) -> PrepareReport:
    """Writes TARGET/{train,test}/{images,labels,inst_map} and, when all are complete, TARGET/labels.json.

    Run it again after an interruption: complete images are kept. Two runs must not write to one target.

    Args:
        kind: Which download.
        source: For cityscapes the folder with leftImg8bit and gtFine; for ade20k the one with images, annotations and,
            optionally, annotations_instance.
        target: The data folder to write.
        jobs: Processes; None: one per core. With more than one, a calling script needs the usual
            `if __name__ == "__main__"`.
        progress: Called with the number of finished images and the total.

    Raises:
        InputError: Folders or files are missing (before anything is written) or damaged (after the others are done).
        UsageError: `jobs` is less than 1.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"{jobs} processes cannot prepare anything", "use 1 or more")
    sources, notes = _find(kind, source, target)
    _check_target(kind, target)
    _make_folders(target)
    left = [item for item in sources if not all(map(_is_complete, item.outputs().values()))]
    done = len(sources) - len(left)
    problems = []
    for problem in _prepare_all(left, jobs or os.cpu_count() or 1):
        done += 1
        if problem is not None:
            problems.append(problem)
        if progress is not None:
            progress(done, len(sources))
    if problems:
        raise InputError(
            f"{len(problems)} of {len(sources)} images cannot be prepared: {_format_list(problems)}",
            "the others are done; fix these and run it again",
        )
    _write_class_table(kind, target)
    return PrepareReport(dict(Counter(item.folder.name for item in sources)), len(left), notes)


@dataclass(frozen=True)
class _FilePattern:
    """One kind of file of a download: FOLDER/SPLIT/.../STEM + suffix."""

    folder: str
    suffix: str
    origin: str
    """Where to download it."""


@dataclass(frozen=True)
class _Download:
    """The layout of an official download."""

    splits: dict[str, str]
    """Its name for a split -> ours."""
    photos: _FilePattern
    labels: _FilePattern
    instances: _FilePattern
    instances_needed: bool
    size: Callable[[int, int], tuple[int, int]]
    thing_ids: tuple[int, ...]
    """Classes with instances; for images without an instance map."""
    labels_json: dict[str, str]
    """Further entries of labels.json."""


def ade20k_size(height: int, width: int) -> tuple[int, int]:
    """The (height, width) that an ADE20K image is resized to, see the top of this module."""
    scale = min(1.0, ADE20K_LONGER / max(height, width))
    scale = max(scale, ADE20K_SHORTER / min(height, width))
    return round(height * scale), round(width * scale)


def cityscapes_size(height: int, width: int) -> tuple[int, int]:
    """Height and width to resize photos of Cityscapes to: 256×512 pixels.

    Raises:
        InputError: The image would be distorted or enlarged.
    """
    if width != 2 * height or height < CITYSCAPES_SIZE[0]:
        raise InputError(f"{width}×{height} is not a size of Cityscapes, whose photos are 2048×1024")
    return CITYSCAPES_SIZE


_GT_FINE = "gtFine_trainvaltest.zip on the Cityscapes site, after registration"
_SCENE_PARSING = "ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark"
_DOWNLOADS: dict[Kind, _Download] = {
    "cityscapes": _Download(
        splits={"train": "train", "val": "test"},
        photos=_FilePattern(
            "leftImg8bit",
            "_leftImg8bit.png",
            "leftImg8bit_trainvaltest.zip on the Cityscapes site, after registration",
        ),
        labels=_FilePattern("gtFine", "_gtFine_labelIds.png", _GT_FINE),
        instances=_FilePattern("gtFine", "_gtFine_instanceIds.png", _GT_FINE),
        instances_needed=True,
        size=cityscapes_size,
        thing_ids=CITYSCAPES_THINGS,
        labels_json={},
    ),
    "ade20k": _Download(
        splits={"training": "train", "validation": "test"},
        photos=_FilePattern("images", ".jpg", _SCENE_PARSING),
        labels=_FilePattern("annotations", ".png", _SCENE_PARSING),
        instances=_FilePattern("annotations_instance", ".png", "annotations_instance.tar of the Places Challenge 2017"),
        instances_needed=False,
        size=ade20k_size,
        thing_ids=ADE20K_THINGS,
        labels_json={"instances": "numbered"},
    ),
}


@dataclass(frozen=True)
class _Source:
    """One image of a download with its annotations, and the folder it is written to."""

    kind: Kind
    photo: Path
    labels: Path
    instances: Path | None
    stem: str
    folder: Path
    """TARGET/SPLIT."""

    def outputs(self) -> dict[str, Path]:
        kinds = FOLDERS if self.instances is not None else FOLDERS[:2]
        return {kind: self.folder / kind / f"{self.stem}.png" for kind in kinds}


def _find(kind: Kind, source: Path, target: Path) -> tuple[list[_Source], tuple[str, ...]]:
    """The images of both splits, and notes. Raises InputError when folders, photos or annotations are missing."""
    download = _DOWNLOADS[kind]
    found = [
        _files(download, files, source, official)
        for official in download.splits
        for files in (download.photos, download.labels, download.instances)
    ]
    photos, labels, instances = ({k: v for split in found[at::3] for k, v in split.items()} for at in range(3))
    notes = []
    _require_all(photos, labels, source / download.labels.folder, download.labels)
    if download.instances_needed:
        _require_all(photos, instances, source / download.instances.folder, download.instances)
    elif missing := photos.keys() - instances.keys():
        notes.append(
            f"{len(missing)} of {len(photos)} photos have no instance map in {source / download.instances.folder}; "
            "there, the connected components of a class are its instances"
        )
    if unmatched := labels.keys() - photos.keys():
        names = _format_list(name for _, name in sorted(unmatched))
        notes.append(f"{len(unmatched)} label maps have no photo and are left out: {names}")
    return [
        _Source(kind, photo, labels[key], instances.get(key), Path(key[1]).name, target / download.splits[key[0]])
        for key, photo in sorted(photos.items())
    ], tuple(notes)


_Key = tuple[str, str]
"""(the download's name of the split, the path below it without suffix): the same for a photo and its annotations."""


def _files(download: _Download, files: _FilePattern, source: Path, split: str) -> dict[_Key, Path]:
    folder = source / files.folder / split
    needed = files is not download.instances or download.instances_needed
    if needed and not folder.is_dir():
        top = sorted({download.photos.folder, download.labels.folder})
        raise InputError(
            f"{folder}: no such folder",
            f"name the folder that holds {' and '.join(top)}; {files.folder} is in {files.origin}",
        )
    names = {path: path.relative_to(folder).as_posix() for path in _visible_files(folder, files.suffix)}
    if files is download.photos and not names:
        raise InputError(f"{folder} holds no *{files.suffix}", f"unpack {files.origin} again")
    return {(split, name.removesuffix(files.suffix)): path for path, name in names.items()}


def _visible_files(folder: Path, suffix: str) -> list[Path]:
    """Files below a folder by suffix, without hidden ones such as the ._NAME that macOS writes."""
    return sorted(path for path in folder.rglob(f"*{suffix}") if not path.name.startswith("."))


def _require_all(photos: dict[_Key, Path], others: dict[_Key, Path], folder: Path, files: _FilePattern) -> None:
    if missing := sorted(photos.keys() - others.keys()):
        raise InputError(
            f"{folder}: {len(missing)} of {len(photos)} photos have no *{files.suffix}: "
            f"{_format_list('/'.join(key) for key in missing)}",
            f"unpack {files.origin} again",
        )


def _check_target(kind: Kind, target: Path) -> None:
    """Raises InputError when the folder holds another data set: the two would be mixed."""
    if not (target / "labels.json").exists():
        return
    name = class_table(target / "labels.json").name
    if name != kind:
        raise InputError(f"{target} already holds {name}, not {kind}", "name another folder")


def _make_folders(target: Path) -> None:
    for folder in (target / split / kind for split in ("train", "test") for kind in FOLDERS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise InputError(f"{folder} cannot be created: {exc.strerror}") from exc
        for leftover in folder.glob(f".*{TEMPORARY}"):  # of a run that was killed
            leftover.unlink(missing_ok=True)


def _is_complete(path: Path) -> bool:
    """Whether a file has the first and the last bytes of a PNG."""
    try:
        with regular_file(path).open("rb") as stream:
            start = stream.read(len(PNG_START))
            stream.seek(-len(PNG_END), os.SEEK_END)
            return start == PNG_START and stream.read() == PNG_END
    except OSError:  # missing, or shorter than the end of a PNG
        return False


def _write_class_table(kind: Kind, target: Path) -> None:
    table, download = class_table(kind), _DOWNLOADS[kind]
    fields = {
        "dataset": kind,
        "void_id": table.void_id,
        "thing_ids": download.thing_ids,
        **download.labels_json,
        "labels": table.to_json()["classes"],
    }
    with atomic_write(target / "labels.json") as stream:
        stream.write((json.dumps(fields, indent=1) + "\n").encode())


def _prepare_all(sources: Sequence[_Source], jobs: int) -> Iterator[str | None]:
    """Prepares the images in order; yields the results of `_prepare_one`."""
    jobs = min(jobs, len(sources))
    if jobs <= 1:
        yield from map(_prepare_one, sources)
        return
    # Not forked: the caller may run threads (PyTorch does), whose locks a fork would copy as they are.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(jobs, context, _start_worker) as pool:
            yield from pool.map(_prepare_one, sources)
    except BrokenProcessPool as exc:
        raise SpmDeployError(
            "a worker process was killed, perhaps because memory ran out",
            "run it again with fewer jobs; it continues where it stopped",
        ) from exc


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, which stops the pool; ends when the parent has ended for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare_one(source: _Source) -> str | None:
    """Writes the files of one image; returns what is wrong with its sources, or None.

    Raises InputError when the target cannot be written, since that would fail for every image.
    """
    try:
        photo, labels, instances = _read(source)
        height, width = _target_size(source, labels)
    except InputError as exc:
        return exc.problem
    outputs = source.outputs()
    images.write_image(outputs["images"], resize_photo(photo, height, width), overwrite=True)
    images.write_image(outputs["labels"], resize_labels(labels, height, width), overwrite=True)
    if instances is not None:
        images.write_instances(outputs["inst_map"], resize_labels(instances, height, width), overwrite=True)
    return None


def _read(source: _Source) -> tuple[images.Pixels, images.Pixels, npt.NDArray[np.int32] | None]:
    """The image at its full size: uint8 (H, W, 3), uint8 (H, W), int32 (H, W) or None."""
    photo, labels = images.read_photo(source.photo).pixels, images.read_labels(source.labels)
    _check_same_size(source.labels, labels, source.photo, photo)
    if source.kind == "cityscapes":
        labels = np.where(labels == LICENSE_PLATE, np.uint8(CAR), labels)
    check_labels(labels, class_table(source.kind), str(source.labels))
    if source.instances is None:
        return photo, labels, None
    instances = images.read_instances(source.instances)
    _check_same_size(source.instances, instances, source.photo, photo)
    return photo, labels, instances


def _target_size(source: _Source, labels: images.Pixels) -> tuple[int, int]:
    try:
        return _DOWNLOADS[source.kind].size(*labels.shape)
    except InputError as exc:
        raise InputError(f"{source.photo}: {exc.problem}") from exc


def _check_same_size(path: Path, values: npt.NDArray[Any], photo_path: Path, photo: images.Pixels) -> None:
    if values.shape != photo.shape[:2]:
        raise InputError(
            f"{path} is {values.shape[1]}×{values.shape[0]}, {photo_path.name} is {photo.shape[1]}×{photo.shape[0]}"
        )


def _format_list(items: Iterable[str], limit: int = 8) -> str:
    """The first few, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more
