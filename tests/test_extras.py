"""A package that is missing is named, with what to install."""

import importlib
import inspect
import pydoc
import sys

import pytest

import torchfilm as tf
from torchfilm.extras import MissingError, needed

IN_NEED = {
    "torchfilm.data.clevr.files": ("PIL", "CLEVR's images need Pillow"),
    "torchfilm.data.clevr.shards": ("PIL", "CLEVR's images need Pillow"),
    "torchfilm.data.clevr.features": ("h5py", "files of image features need h5py"),
    "torchfilm.systems.visual_reasoning.pictures": ("PIL", "(pictures|CLEVR's images) need Pillow"),
    "torchfilm.systems.diffusion_policy.inspect_figures": ("PIL", "pictures need Pillow"),
}


@pytest.mark.parametrize("module", IN_NEED)
def test_a_module_names_the_extra_that_it_needs(module: str, monkeypatch: pytest.MonkeyPatch):
    package, need = IN_NEED[module]
    importlib.import_module("torchfilm.canvas")  # matplotlib itself needs Pillow
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=rf"^{need}: pip install 'torchfilm\[systems\]' \(Mod.*{package}"):
        importlib.import_module(module)


def test_whatever_goes_through_the_names_does_so_without_matplotlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    for name in ("canvas", "charts", "plot"):
        monkeypatch.delitem(sys.modules, f"torchfilm.{name}", raising=False)
        monkeypatch.delitem(vars(tf), name, raising=False)
    assert not hasattr(tf, "plot")
    assert "gamma * x + beta" in pydoc.render_doc(tf)
    assert "condition" in dict(inspect.getmembers(tf))
    with pytest.raises(AttributeError, match=r"^figures need matplotlib: pip install 'torchfilm\[systems\]'"):
        tf.plot  # noqa: B018
    with pytest.raises(MissingError, match=r"^figures need matplotlib: pip install 'torchfilm\[systems\]'"):
        importlib.import_module("torchfilm.plot")


def test_the_nearest_need_is_named():
    with (
        pytest.raises(MissingError, match=r"^boats need oars: pip install 'torchfilm\[sea\]' \(.*no oars\)$"),
        needed("the trip needs more", "sea,land"),
        needed("boats need oars", "sea"),
    ):
        raise ModuleNotFoundError("no oars")


def test_a_name_that_the_package_itself_lacks_is_told_as_it_is():
    with (
        pytest.raises(ImportError, match="cannot import name 'boat' from 'torchfilm") as raised,
        needed("boats need oars", "sea"),
    ):
        exec("from torchfilm.naming import boat")
    assert not isinstance(raised.value, MissingError)
