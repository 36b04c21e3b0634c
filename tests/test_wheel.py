"""The wheel holds the package as git knows it, and nothing else in site-packages; it is built from the sdist alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MADE = {"PKG-INFO", "setup.cfg", "erasure_diffusion.egg-info"}  # by setuptools
SHIPPED = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}


def run(*command: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_is_the_package(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.fail("this test needs the git checkout")
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    source = tmp_path / "source"
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, folder=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    package = {name for name in files if name.startswith("erasure/")}
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    assert {name for name in held if name.split("/")[0] not in MADE} == package | SHIPPED
    wheel_command = ("pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(sdist))
    run(sys.executable, "-m", *wheel_command, folder=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == package
    assert wheel.stat().st_size < 62e6
