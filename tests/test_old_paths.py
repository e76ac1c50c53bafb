"""Paths that documents named before the modules moved: they lead to the new places until the next release."""

from __future__ import annotations

from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest

import quantkit


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("quantkit.parallel", "quantkit.runs.ranks", "joined"),
        ("quantkit.chatting", "quantkit.verbs.chat", "Person"),
        ("quantkit.model.whole", "quantkit.blocks.whole", "load_model"),
        ("quantkit.harness", "quantkit.verbs.eval.register", "register"),
        ("quantkit.cli", "quantkit.cli.app", "main"),
    ],
)
def test_an_old_path_leads_to_the_new_one(old: str, new: str, name: str) -> None:
    found, moved = getattr(import_module(old), name), getattr(import_module(new), name)
    assert found is moved or (found.__doc__ == moved.__doc__ and found.__doc__)


def test_the_cards_templates_are_where_they_were() -> None:
    for name in ("default.md.j2", "thebloke-2023.md.j2"):
        old = files("quantkit.publishing") / "templates" / name
        assert old.read_bytes() == (files("quantkit.verbs.card") / "templates" / name).read_bytes()


def test_no_folder_of_the_package_is_a_link() -> None:
    """A wheel takes a folder once: where a link to it comes first, it would lack the folder itself."""
    package = Path(quantkit.__file__).parent
    assert not [path for path in package.rglob("*") if path.is_dir() and path.is_symlink()]
