import pytest

from vs2_plugin.gallery.contents import GalleryContents, GalleryPart, RetrievalEncoder, split_name


def test_what_vs2_json_lists_has_the_keys_of_always():
    parts = GalleryPart("a", 3, None, contents={"digests": "cd"}), GalleryPart("b", 4, 2, "y")
    encoders = {"clip": RetrievalEncoder(6), "vit": RetrievalEncoder(5, "vit", None, "ab")}
    contents = GalleryContents(parts, ("visual",), encoders, labels=False)
    assert contents.count == 7
    assert contents.to_json() == {
        "parts": [
            {"dataset": "a", "count": 3, "classes": None, "contents": {"digests": "cd"}},
            {"dataset": "b", "count": 4, "classes": 2, "extraction": "y"},  # before version 0.2
        ],
        "sites": ["visual"],
        "encoders": {
            "clip": {"width": 6},
            "vit": {"width": 5, "model": "vit", "weights": None, "parameters": "ab"},
        },
        "labels": False,
    }


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("vit_small_patch14_dinov2", ("vit_small_patch14_dinov2", None)),
        ("vit_small_patch14_dinov2.lvd142m", ("vit_small_patch14_dinov2.lvd142m", None)),
        ("test_vit,", ("test_vit", "")),
        ("test_vit,a,b.pth", ("test_vit", "a,b.pth")),
    ],
)
def test_names_and_weights_are_told_apart(text, parts):
    assert split_name(text) == parts
