"""Why a line is not a document: every reason that the rejects file names."""

from model.corpus.chats import CHAT_REASONS
from model.corpus.cleaning import FILTER_REASONS
from model.corpus.pairs import PAIR_REASONS

REASONS = {  # parts name them by their place: new ones go to the end
    "bad_utf8": "not UTF-8, or a text with a lone surrogate, which UTF-8 cannot hold",
    "bad_json": "not JSON",
    "not_an_object": "JSON, but not an object",
    "no_text": "an object without the text field, or whose text is not a string",
    "empty": "an empty line, or a text of nothing but white space, or of nothing after cleaning",
    "oversized": "a line longer than 64 MiB, which would not fit the bounded memory",
    **FILTER_REASONS,
    "over_max_length": "more than max_length tokens with long_documents drop, or in a chat's last turn with truncate",
    "duplicate": "exactly the text, or the chat, of an earlier line, after cleaning",
    "near_duplicate": "nearly the text, or the chat, of an earlier line (near_duplicates)",
    "not_sampled": "a source of a weight below 1: the line was not among those taken",
    **CHAT_REASONS,
    **PAIR_REASONS,
    "bad_row": "a row of CSV without a value for each column of the header, or with a misplaced quote",
}
# Reasons that lie in the text or the chat: the line itself was read.
TEXT_REASONS = {
    "empty",
    *FILTER_REASONS,
    "over_max_length",
    "duplicate",
    "near_duplicate",
    "not_sampled",
    *CHAT_REASONS,
    *PAIR_REASONS,
    "bad_row",
}
TEXT_REASONS -= {"no_chat", "no_pair", "bad_message"}
OTHER_KIND = {"no_text", "no_chat", "no_pair"}  # an object, but not of what is read
NAMES = list(REASONS)
NUMBERS = {name: number for number, name in enumerate(NAMES)}
