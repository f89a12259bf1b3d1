"""Changes to instances come back off as they went on."""

import pytest

from hf_amp.patch_log import PatchLog


class Gadget:
    """Something to change."""

    colour = "class red"

    def __init__(self) -> None:
        self.size = 1


@pytest.fixture
def gadget() -> Gadget:
    return Gadget()


@pytest.fixture
def changes() -> PatchLog:
    return PatchLog()


def test_undo_gives_back_the_former_value(changes, gadget):
    """An attribute of the instance gets the very object that it held."""
    gadget.size = former = [1]
    changes.set_attribute(gadget, "size", [2])
    assert gadget.size == [2]
    changes.undo()
    assert gadget.size is former


def test_undo_removes_what_was_not_there(changes, gadget):
    """An attribute that the instance did not have is gone, not None."""
    changes.set_attribute(gadget, "weight", 5)
    changes.undo()
    assert vars(gadget) == {"size": 1}


def test_undo_uncovers_the_class_attribute(changes, gadget):
    """A class's attribute or method is covered on one instance only, and shows again."""
    changes.set_attribute(gadget, "colour", "blue")
    assert (gadget.colour, Gadget.colour, Gadget().colour) == ("blue", "class red", "class red")
    changes.undo()
    assert "colour" not in vars(gadget)
    assert gadget.colour == "class red"


def test_a_former_none_comes_back_as_none(changes, gadget):
    """None is a value, not absence."""
    gadget.size = None
    changes.set_attribute(gadget, "size", 2)
    changes.undo()
    assert vars(gadget) == {"size": None}


def test_layers_come_off_newest_first(changes, gadget):
    """Two changes to one attribute are undone to what was before both."""
    changes.set_attribute(gadget, "size", 2)
    changes.set_attribute(gadget, "size", 3)
    changes.undo()
    assert gadget.size == 1


def test_what_somebody_else_has_set_since_stays(changes, gadget):
    """A value that replaced ours is not ours to take away."""
    changes.set_attribute(gadget, "size", 2)
    gadget.size = theirs = [99]
    changes.undo()
    assert gadget.size is theirs


def test_what_somebody_else_has_removed_stays_removed(changes, gadget):
    """Undoing does not bring back an attribute that was deleted since."""
    changes.set_attribute(gadget, "size", 2)
    del gadget.size
    changes.undo()
    assert vars(gadget) == {}


def test_registered_calls_run_in_reverse_order(changes):
    """What was done last is undone first."""
    order = []
    for name in ("first", "second", "third"):
        changes.on_undo(lambda name=name: order.append(name))
    changes.undo()
    assert order == ["third", "second", "first"]


def test_undoing_twice_is_harmless(changes, gadget):
    """The second undo does nothing, even when the attribute was set again in between."""
    calls = []
    changes.set_attribute(gadget, "size", 2)
    changes.on_undo(lambda: calls.append("once"))
    changes.undo()
    gadget.size = 2
    changes.undo()
    assert (calls, gadget.size) == (["once"], 2)
