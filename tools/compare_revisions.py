"""Compare the output bytes of two revisions of spmdeploy on one machine.

    git worktree add ../before REVISION
    python tools/compare_revisions.py ../before .

Each checkout runs in processes of its own, on the same inputs: the samples, the golden edits, a large edit (cascade), a
window shrunk to the model's size, changed labels, extensions, a prepared edit and a batch. Every image that is written
must be identical byte for byte. Results differ between processors, so no hashes are stored.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLES = ("car_away", "crossing_cleared", "tree_planted")

# Runs inside each checkout, through the Python API that both revisions have.
ARRAY_EDITS = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
import spmdeploy

output, case = Path(sys.argv[1]), Path(sys.argv[2])
model = Path(sys.argv[3]) if len(sys.argv) > 3 else spmdeploy.default_model()
read = lambda name: np.asarray(Image.open(case / name))
photo, labels, mask = read("photo.png"), read("labels.png"), read("mask.png") != 0
options = {"match_surroundings": False}

def save(name, image):
    Image.fromarray(image).save(output / name)

with spmdeploy.open_editor(model, backend="onnxruntime", device="cpu") as editor:
    for golden in sorted((model / "golden").iterdir()):
        inputs = [np.asarray(Image.open(golden / f"{name}.png")) for name in ("image", "labels", "mask")]
        save(f"golden-{golden.name}.png", editor.edit(*inputs, **options).image)
    small = np.s_[:300, :420]
    prepared = editor.prepare(labels[small], mask[small], tiling="crop", **options)
    save("prepared-1.png", prepared.edit(photo[small]).image)
    save("prepared-2.png", prepared.edit(photo[small][:, ::-1].copy()).image)
    for feather in (0, 7):
        save(f"feather-{feather}.png", editor.edit(photo[small], labels[small], mask[small], feather=feather,
                                                   batch_size=1, **options).image)
    square = np.s_[:256, :256]
    save("full.png", editor.edit(photo[square], labels[square], mask[square], tiling="off", **options).image)
    save("instances.png", editor.edit(photo[small], labels[small], mask[small],
                                      labels[small].astype(np.int64) * 1000 + 7, **options).image)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another checkout")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the dependencies of both")
    parser.add_argument("--model", type=Path, help="bundle for both; default: the built-in one of each")
    parser.add_argument("--keep", type=Path, help="folder for all inputs and outputs; default: temporary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.keep or Path(temporary)).resolve()
        inputs = work / "inputs"
        write_inputs(inputs, options.before / "spmdeploy")
        outputs = []
        for name, checkout in (("before", options.before), ("after", options.after)):
            print(f"{name}: {checkout}", file=sys.stderr)
            outputs.append(run_revision(checkout.resolve(), inputs, work / name, options))
        return report(*outputs)


def write_inputs(folder: Path, package: Path) -> None:
    """Samples of the first revision, and a large image with masks of several shapes made from one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = package / "assets" / "samples" if (package / "assets").exists() else package / "samples"
    for name in SAMPLES:
        for kind in ("photo.jpg", "labels.png", "mask.png"):
            (folder / f"{name}-{kind}").write_bytes((samples / name / kind).read_bytes())
    photo, labels = Image.open(samples / SAMPLES[0] / "photo.jpg"), Image.open(samples / SAMPLES[0] / "labels.png")
    size = (1300, 980)
    pixels = np.asarray(photo.convert("RGB").resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    noise = np.random.default_rng(0).normal(0, 6, pixels.shape)
    Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(folder / "photo.png")
    ids = np.asarray(labels.resize(size, Image.Resampling.NEAREST))
    Image.fromarray(ids).save(folder / "labels.png")
    mask = np.zeros(ids.shape, np.uint8)
    mask[60:150, 40:170] = mask[200:260, 300:400] = 255
    mask[300:820, 450:1100] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    changed = ids.copy()
    changed[500:560, 200:290] = 0
    Image.fromarray(changed).save(folder / "changed.png")
    for name, (top, left, bottom, right) in {"wide": (0, 40, 0, 330), "all": (50, 30, 60, 70)}.items():
        grown = np.pad(ids, ((top, bottom), (left, right)), mode="edge")
        Image.fromarray(grown).save(folder / f"labels-{name}.png")


def run_revision(checkout: Path, inputs: Path, output: Path, options: argparse.Namespace) -> Path:
    """All cases by one checkout; its images are in `output` afterwards."""
    output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "SPMDEPLOY_CACHE": str(output.with_name("cache"))}

    def run(*arguments: object) -> str:
        command = [options.python, *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=output, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        return done.stdout

    # Matching colors to the surroundings was off by default before it became automatic.
    tri_state = "no-match-surroundings" in run("-m", "spmdeploy", "edit", "--help")
    plain = ("--no-match-surroundings",) if tri_state else ()
    model = () if options.model is None else (options.model.resolve(),)
    common = ("--backend", "onnxruntime", "--device", "cpu", "--overwrite", *(("--model", *model) if model else ()))

    def edit(name: str, photo: str, *arguments: object, match: bool = False) -> None:
        matching = ("--match-surroundings",) if match else plain
        run("-m", "spmdeploy", "edit", inputs / photo, "-o", output / name, *common, *matching, *arguments)

    for name in SAMPLES:
        given = ("--labels", inputs / f"{name}-labels.png", "--mask", inputs / f"{name}-mask.png")
        edit(f"{name}.png", f"{name}-photo.jpg", *given)
    edit("matched.png", f"{name}-photo.jpg", *given, "--sheet", output / "sheet.png", match=True)
    mapped = ("--labels", inputs / "labels.png")
    extras = ("--sheet", output / "cascade-sheet.png", "--explain", output / "cascade-explain.png")
    edit("cascade.png", "photo.png", *mapped, "--mask", inputs / "mask.png", *extras)
    edit("cascade-matched.png", "photo.png", *mapped, "--mask", inputs / "mask.png", match=True)
    edit("crop.png", "photo.png", *mapped, "--mask", inputs / "mask.png", "--tiling", "crop")
    edit("fill.jpg", "photo.png", "--fill", "tree", "--mask", inputs / "mask.png", "--grow", "5", "--tiling", "crop")
    edit("changed.png", "photo.png", "--labels", inputs / "changed.png", "--edited-from", inputs / "labels.png")
    extended = ("--labels", inputs / "labels-wide.png", "--extend", "40,0,330,0", "--explain", output / "wide-plan.png")
    edit("wide.png", "photo.png", *extended)
    edit("all.png", "photo.png", "--labels", inputs / "labels-all.png", "--extend", "30,50,70,60", match=True)
    edit("all-crop.png", "photo.png", "--fill", "road", "--extend", "30,50,70,60", "--tiling", "crop")

    manifest = inputs / "manifest.csv"
    with open(manifest, "w", newline="") as stream:
        rows = csv.DictWriter(stream, ["image", "labels", "mask", "edited_from", "grow", "extend", "fill", "output"])
        rows.writeheader()
        for name in SAMPLES:
            photo, labels, mask = (f"{name}-{kind}" for kind in ("photo.jpg", "labels.png", "mask.png"))
            rows.writerow({"image": photo, "labels": labels, "mask": mask, "grow": 3, "output": f"batch-{name}.png"})
        rows.writerow({"image": photo, "fill": "road", "extend": "0,0,64,0", "output": "batch-extended.png"})
    run("-m", "spmdeploy", "batch", manifest, "--output-dir", output, "--jobs", "2", *common, *plain)
    run("-c", ARRAY_EDITS, output, inputs, *model)
    return output


def report(before: Path, after: Path) -> int:
    """Print one line for each image; 1 if any differs, else 0."""
    names = sorted({path.name for folder in (before, after) for path in folder.iterdir() if path.suffix != ".jsonl"})
    different = 0
    for name in names:
        contents = [folder / name for folder in (before, after)]
        missing = [str(path) for path in contents if not path.exists()]
        if missing:
            outcome = f"missing: {', '.join(missing)}"
        elif contents[0].read_bytes() == contents[1].read_bytes():
            outcome = "identical"
        else:
            outcome = f"DIFFERENT: {difference(*contents)}"
        different += outcome != "identical"
        print(f"{name:28} {outcome}")
    print(f"{len(names) - different} of {len(names)} images are identical")
    return int(different > 0)


def difference(before: Path, after: Path) -> str:
    with Image.open(before) as one, Image.open(after) as other:
        if one.size != other.size or one.mode != other.mode:
            return f"{one.size} {one.mode}, {other.size} {other.mode}"
        distance = np.abs(np.asarray(one).astype(np.int16) - np.asarray(other).astype(np.int16))
    return f"{np.count_nonzero(distance)} values, by up to {distance.max()} gray levels"


if __name__ == "__main__":
    sys.exit(main())
