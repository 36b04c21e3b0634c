"""The wheel holds the package as git knows it, and nothing else in site-packages; it is built from the sdist alone."""

from __future__ import annotations

import sys
import tarfile
import zipfile

import pytest

from tests.building import copied, listed, run, wheel_of

MADE = {"PKG-INFO", "setup.cfg", "erasure_diffusion.egg-info"}  # by setuptools
SHIPPED = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}


@pytest.mark.slow
def test_the_wheel_is_the_package(tmp_path):
    files = listed()
    source = copied(files, tmp_path / "source")
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, folder=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    package = {name for name in files if name.startswith("erasure/")}
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    assert {name for name in held if name.split("/")[0] not in MADE} == package | SHIPPED
    wheel = wheel_of(sdist, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == package
    assert wheel.stat().st_size < 62e6
