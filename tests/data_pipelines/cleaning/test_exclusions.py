"""Exclusions written and read back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.cleaning.exclusions import Exclusions, read_exclusions, write_exclusions
from facenet_jax.errors import BadInput

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(images=st.dictionaries(names, names, max_size=5), people=st.dictionaries(names, names, max_size=5))
def test_exclusions_come_back(tmp_path_factory, images, people):
    """Whatever the names: the same exclusions, or an error that says why not."""
    path = tmp_path_factory.mktemp("list") / "exclude.txt"
    images = {f"{key}x": reason for key, reason in images.items()}
    odd = [name for name in (*images, *people) if "\t" in name or len(f"{name}/".splitlines()) > 1]
    if odd:
        with pytest.raises(BadInput, match="rename it"):
            write_exclusions(path, Exclusions(images, people))
        assert not path.exists()
        return
    write_exclusions(path, Exclusions(images, people))
    found = read_exclusions(path)
    assert set(found.images) == set(images) and set(found.people) == set(people)
    assert all(found.images[key] == " ".join(reason.split()) for key, reason in images.items())


def test_exclusions_by_hand(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffada/1\r\n\r\nZoë Ö./\n".encode())
    (tmp_path / "b.txt").write_text("bob/2\tblurred\nada/1\tblurred too")
    found = read_exclusions(tmp_path / "a.txt", tmp_path / "b.txt")
    assert found == Exclusions({"ada/1": "blurred too", "bob/2": "blurred"}, {"Zoë Ö.": ""})
    asked = [("ada/1", "ada"), ("ada/2", "ada"), ("x/9", "Zoë Ö."), ("bob/2", "other"), ("Zoë Ö./1", "Zoe")]
    assert [found.excluded(*one) for one in asked] == [True, False, True, True, False]
    assert found.unmatched(["ada/1", "ada/2"], ["ada"]) == ["bob/2", "Zoë Ö./"]
    assert read_exclusions() == Exclusions()


def test_exclusions_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="no such list of exclusions"):
        read_exclusions(tmp_path / "none.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8 text"):
        read_exclusions(tmp_path / "bad.txt")
