"""The commands of README.md and docs/editing.md succeed in order."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.imaging.files import read_labels, write_image

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages use. Its generator has one stage, which is exported and built quickly."""
    pytest.importorskip("torch", reason="weights are saved with torch, which an edge install lacks")
    from spmdeploy.model.checkpoint import save_generator
    from spmdeploy.model.generator import Generator, GeneratorConfig

    sample = SAMPLE_EDITS[0]
    for source, name in ((sample.photo, "photo.jpg"), (sample.labels, "labels.png"), (sample.mask, "mask.png")):
        shutil.copy(source, tmp_path / name)
    before = read_labels(sample.labels).copy()
    before[220:300, 415:470] = 8
    write_image(tmp_path / "labels_before.png", before)
    (tmp_path / "edits.csv").write_text("image,mask,fill\nphoto.jpg,mask.png,road\n", encoding="utf-8")
    save_generator(Generator(GeneratorConfig(12, width=2, hidden=8, stages=1)), tmp_path / "generator.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "count"), [("README.md", 7), ("docs/editing.md", 9)])
def test_page_commands_succeed_in_order(
    page: str, count: int, reader: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"^\$ spmdeploy (.+)$", text, re.MULTILINE)
    assert len(commands) == count
    for command in commands:
        assert cli.main(command.split()) == 0, (command, capsys.readouterr().err)
    for output in re.findall(r"--output (\S+)", " ".join(commands)):
        assert (reader / output).exists(), output


def test_readme_python_example_keeps_known_pixels(reader: Path) -> None:
    from spmdeploy.imaging.files import read_photo
    from spmdeploy.imaging.mask_files import read_mask

    example = re.search(r"```python\n(.+?)```", README, re.DOTALL)
    assert example is not None
    names = {
        "image": read_photo("photo.jpg").pixels,
        "labels": read_labels("labels.png"),
        "mask": read_mask("mask.png"),
    }
    exec(example[1], names)
    result = names["result"]
    assert (result.image[~names["mask"]] == names["image"][~names["mask"]]).all()


def test_readme_links_and_targets_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for part in re.findall(r"[├└]── ([\w/]+)", README):
        assert list((ROOT / "spmdeploy").glob(f"{part.rstrip('/')}*")), part
