"""A tokenizer without transformers, whose import takes a third of a second."""

from collections.abc import Sequence
from pathlib import Path

from model.text.encoder import decode

CONTROL = ("bos_token", "eos_token", "unk_token")


class PlainTokenizer:
    """What this program asks of a `transformers` fast tokenizer, under the same names, from the `tokenizers` library.

    Args:
        folder: where it was loaded from.
        backend: a `tokenizers.Tokenizer`.
        config: its `tokenizer_config.json`, which names its CONTROL tokens, each a special token of the backend.
    """

    def __init__(self, folder: Path, backend, config: dict) -> None:
        self.name_or_path, self.backend_tokenizer = str(folder), backend
        self.special_tokens_map = {name: config[name] for name in CONTROL}
        self.bos_token, self.eos_token, self.unk_token = self.special_tokens_map.values()
        self.all_special_ids = [backend.token_to_id(token) for token in self.special_tokens_map.values()]
        self.bos_token_id, self.eos_token_id, self.unk_token_id = self.all_special_ids
        self.chat_template: str | None = config.get("chat_template")

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    @property
    def added_tokens_decoder(self) -> dict:
        """id -> `tokenizers.AddedToken`."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return self.backend_tokenizer.get_vocab()

    def get_chat_template(self) -> str | None:
        return self.chat_template

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.backend_tokenizer.id_to_token(index) for index in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included."""
        return decode(self.backend_tokenizer, ids)
