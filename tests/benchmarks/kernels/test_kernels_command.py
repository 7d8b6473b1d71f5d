"""``python -m benchmarks.kernels``, asked for help, compiles nothing."""

import pytest

from benchmarks.kernels import __main__ as command


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["--fast"], 2)])
def test_help_and_unknown_words_compile_nothing(words, status, monkeypatch, capsys):
    monkeypatch.setattr(command, "kernel_rows", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == status
    said = capsys.readouterr()
    assert "usage: python -m benchmarks.kernels" in said.out + said.err
