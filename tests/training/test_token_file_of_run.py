"""What train.py says of the token file that it is given."""

import train
from model.training.settings import Settings
from tests.conftest import corpus_lines


def test_an_existing_token_file_says_what_it_was_made_from(tmp_path, capsys):
    (tmp_path / "poems.jsonl").write_bytes(b"".join(corpus_lines(40)))
    settings = Settings()
    settings.data.train_data_path, settings.data.raw_data_path = str(tmp_path / "t.bin"), str(tmp_path / "poems.jsonl")
    train.prepare_data_if_missing(settings)
    capsys.readouterr()

    train.prepare_data_if_missing(settings)
    message = capsys.readouterr().err
    assert f"{tmp_path / 't.bin'}, " in message and "tokens of poems.jsonl" in message and "warning" not in message

    with open(tmp_path / "poems.jsonl", "ab") as file:
        file.write(corpus_lines(41)[-1])
    train.prepare_data_if_missing(settings)
    message = capsys.readouterr().err
    assert "poems.jsonl is not read, since" in message and "was made before that was changed" in message

    settings.data.raw_data_path = str(tmp_path / "mine.jsonl")
    train.prepare_data_if_missing(settings)
    message = capsys.readouterr().err
    assert "mine.jsonl is not read, since" in message and "was made from other data" in message
