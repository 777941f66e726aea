"""The model card: README.md with the header in YAML that both hubs read."""

from dataclasses import dataclass

import yaml

from model.convert import describe
from model.publish.history import History
from model.training.recipe import duration_text
from model.weights import Weights

HAN_SHARE = 0.2  # of the characters, from which on Chinese is named as a language of the model
HUBS = {
    "hf": ("transformers", "hf download {repository} --local-dir {name}"),
    "ms": ("modelscope", "modelscope download --model {repository} --local_dir {name}"),
}
UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Publication:
    """Where a model goes, and what only its maker knows."""

    hub: str  # a key of HUBS
    repository: str  # OWNER/NAME
    license: str = "unknown"

    @property
    def name(self) -> str:
        return self.repository.partition("/")[2]


def model_card(publication: Publication, weights: Weights, history: History) -> str:
    """The text of README.md.

    Args:
        history: what a run's folder says; an empty one where the weights come from elsewhere.
    """
    is_chat = bool(weights.chat)
    parts = [
        f"---\n{yaml.safe_dump(_header(publication, history), allow_unicode=True, sort_keys=False)}---\n",
        f"# {publication.name}\n",
        f"A small language model{' that answers in chats' if is_chat else ''}, "
        f"{'written' if history == History() else 'trained'} with MateConv ({describe(weights)}).\n",
        _training(weights, history),
        _usage(publication, history, is_chat),
        _limits(weights, history, is_chat),
        _license(publication),
    ]
    return "\n".join(parts)


def license_of(card: str) -> str | None:
    """The license that a card's header names; None: it names none, or cannot be read."""
    begin, _, rest = card.partition("---\n")
    try:
        header = yaml.safe_load(rest.partition("\n---")[0]) if not begin.strip() else None
    except (ValueError, RecursionError, yaml.YAMLError):
        return None
    found = header.get("license") if isinstance(header, dict) else None
    return found if isinstance(found, str) else None


def _header(publication: Publication, history: History) -> dict:
    header: dict = {"license": publication.license}
    if _is_chinese(history):
        header["language"] = ["zh"]
    header |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["mateconv"]}
    if publication.hub == "ms":
        header |= {"tasks": ["text-generation"], "frameworks": ["pytorch"]}
    prefix = {"hf": "datasets:", "ms": "ms:"}[publication.hub]
    of_hub = [source.name.removeprefix(prefix) for source in history.sources if source.name.startswith(prefix)]
    if datasets := [name for name in of_hub if "/" in name]:
        header["datasets"] = datasets
    return header


def _is_chinese(history: History) -> bool:
    return history.han_share is not None and history.han_share >= HAN_SHARE


def _training(weights: Weights, history: History) -> str:
    held_out = UNKNOWN
    if history.bits_per_byte is not None:
        held_out = f"{history.bits_per_byte:.4f} (validation loss {history.val_loss:.4f})"
    elif history.val_loss is not None:
        held_out = f"{UNKNOWN} (validation loss {history.val_loss:.4f})"
    facts = {
        "Parameters": describe(weights).partition(" ")[0],
        "Context": f"{weights.config.max_seq_len:,} tokens",
        "Vocabulary": f"{weights.config.vocab_size:,} tokens",
        "Trained on": _count(history.tokens, "tokens")
        + (f", in {history.step:,} steps" if history.step is not None else ""),
        "Tokens in the data": _count(history.data_tokens),
        "Time": UNKNOWN if history.seconds is None else duration_text(history.seconds),
        "Hardware": history.hardware or UNKNOWN,
        "Held-out bits per byte": held_out,
    }
    if history.base is not None:
        facts["Began with the weights"] = f"`{history.base}`"
    lines = ["## Training\n", *_table(("", ""), facts.items()), ""]
    if history.sources:
        lines += ["The data:\n"]
        rows = [(f"`{s.name}`", _count(s.documents), _count(s.tokens)) for s in history.sources]
        lines += [*_table(("source", "documents", "tokens"), rows), ""]
    else:
        lines += ["The sources of the data are not recorded.", ""]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows) -> list[str]:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _count(number, unit: str = "") -> str:
    return f"{number:,} {unit}".strip() if isinstance(number, int) else UNKNOWN


def _usage(publication: Publication, history: History, is_chat: bool) -> str:
    library, download = HUBS[publication.hub]
    where = {"repository": publication.repository, "name": publication.name}
    prompt = "春风" if _is_chinese(history) else "Once upon a time"
    question = "你好" if _is_chinese(history) else "Hello"
    command = "--interactive" if is_chat else f'--prompt "{prompt}"'
    if is_chat:
        encode = (
            f'messages = [{{"role": "user", "content": "{question}"}}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
            ")\n"
        )
        decode = 'tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)'
    else:
        encode = f'inputs = tokenizer("{prompt}", return_tensors="pt")\n'
        decode = "tokenizer.decode(ids[0], skip_special_tokens=True)"
    return (
        "## Use\n\n"
        "With MateConv:\n\n"
        f"```bash\n{download.format(**where)}\n"
        f"python inference.py --model_path {publication.name} {command}\n```\n\n"
        f"With {library}:\n\n"
        f"```python\nfrom {library} import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{publication.repository}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{publication.repository}")\n'
        f"{encode}"
        "ids = model.generate(**inputs, max_new_tokens=100)\n"
        f"print({decode})\n```\n"
    )


def _limits(weights: Weights, history: History, is_chat: bool) -> str:
    lines = [
        "It is small. It makes things up, and what it says is no source of facts.",
        "It repeats what its data holds, errors and prejudices included; nothing filters what it writes.",
        f"It reads at most {weights.config.max_seq_len:,} tokens, and writes in the language and style of its data.",
    ]
    if not is_chat:
        lines.append("It was not tuned on chats: it continues a text and does not follow instructions.")
    if history.val_loss is None:
        lines.append("No evaluation is recorded.")
    else:
        lines.append("Apart from the held-out loss above, it was not evaluated.")
    return "## Limits\n\n" + "".join(f"- {line}\n" for line in lines)


def _license(publication: Publication) -> str:
    if publication.license == "unknown":
        text = "Unknown: whoever published this model has not named a license. Ask before you use it."
    else:
        text = f"`{publication.license}`, as named by whoever published this model."
    return f"## License\n\n{text} The data has licenses of its own.\n"
