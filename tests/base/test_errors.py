"""A message is one line, whatever it quotes."""

import pytest

from fairway.base.errors import ArtifactError, DataError, RecipeError, one_line_errors


def test_line_ends_and_control_signs_that_a_message_quotes_are_escaped():
    error = DataError("two\nlines\x7f\x1b[31m.txt: no such file; name another")
    assert str(error) == r"two\nlines\x7f\x1b[31m.txt: no such file; name another"


def test_letters_of_every_script_stay_as_they_are():
    assert str(RecipeError("größe — 長さ ≤ 5: too long; shorten it")) == "größe — 長さ ≤ 5: too long; shorten it"


def test_a_file_name_that_is_no_text_can_still_be_printed(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise ArtifactError("caf\udce9.fw: damaged; fetch it again")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "ArtifactError: caf\\udce9.fw: damaged; fetch it again\n"
