"""Pictures of docs/ are what the tables say."""

import runpy

from support.launches import REPOSITORY


def test_the_picture_of_layers_is_of_the_tables():
    drawn = runpy.run_path(str(REPOSITORY / "docs" / "pictures" / "draw.py"))
    text = drawn["PICTURE"].read_text(encoding="utf-8")
    assert text == drawn["picture"](), "python docs/pictures/draw.py"
    assert all(f">{title}<" in text for title in drawn["SYSTEMS"].values())
