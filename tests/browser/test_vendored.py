"""The copy of the plot library is the package's, with its licence."""

import pathlib

import pytest

HERE = pathlib.Path(__file__).parent
VENDORED = HERE.parents[1] / "src" / "dashboard" / "vendor"
PACKAGE = HERE / "node_modules" / "uplot"

COPIES = {"uPlot.iife.min.js": "dist/uPlot.iife.min.js", "uPlot.min.css": "dist/uPlot.min.css",
          "uPlot.LICENSE": "LICENSE"}


@pytest.mark.parametrize("name", COPIES)
def test_the_copy_equals_the_package(name):
    assert (VENDORED / name).read_bytes() == (PACKAGE / COPIES[name]).read_bytes()


def test_nothing_else_is_vendored():
    assert sorted(path.name for path in VENDORED.iterdir()) == sorted(COPIES)
