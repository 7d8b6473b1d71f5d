"""Where nnU-Net is not installed, its command says so and nothing else lacks it."""

import sys

from reference_models.nnunet.__main__ import main


def test_the_command_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nnunetv2", None)
    assert main(["-i", "images", "-o", "masks", "-d", "1", "-c", "3d_fullres"]) == 1
    assert capsys.readouterr() == (
        "",
        "nnU-Net is not installed here; run pip install '.[nnunet]'\n",
    )


def test_its_help_tells_of_attributes_all_the_same(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nnunetv2", None)
    main(["--help"])
    assert "attributes.csv beside the folder of images" in " ".join(capsys.readouterr().out.split())
