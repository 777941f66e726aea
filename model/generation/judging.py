"""How good answers are, measured on those that were expected: exact, ended, repeated, leaked, and how long."""

from collections.abc import Sequence

from model.errors import counted

ROLES = ("system\n", "user\n", "assistant\n", "<s>", "</s>", "<|im_start|>", "<|im_end|>")  # of templates, in an answer
REPEATED_CHARACTERS = 8  # in a run that occurs twice


def judge_answers(answers: Sequence[str], ends: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Shares of answers, as metrics.jsonl has them.

    Args:
        answers: generated greedily.
        ends: why each ended, as `Event.end`.
        expected: the answers of the held-out chats.

    Returns:
        `answers`, how many; the shares `exact` (but for white space around), `stopped` (ended by the model itself),
        `repeated` (a run of 8 characters occurs twice), `leaked` (a role's name or a control token is spelled out);
        and the mean `answer_characters` and `expected_characters`.
    """
    count = max(1, len(answers))
    return {
        "answers": len(answers),
        "exact": sum(is_exact(a, e) for a, e in zip(answers, expected, strict=True)) / count,
        "stopped": sum(end == "eos" for end in ends) / count,
        "repeated": sum(map(repeats, answers)) / count,
        "leaked": sum(any(role in answer for role in ROLES) for answer in answers) / count,
        "answer_characters": sum(map(len, answers)) / count,
        "expected_characters": sum(map(len, expected)) / count,
    }


def is_exact(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, but for white space around."""
    return answer.strip() == expected.strip()


def repeats(text: str) -> bool:
    """Whether a run of 8 characters occurs twice."""
    runs = [text[begin : begin + REPEATED_CHARACTERS] for begin in range(len(text) - REPEATED_CHARACTERS + 1)]
    return len(set(runs)) < len(runs)


def judged_text(judged: dict[str, float]) -> str:
    """One line on the shares."""
    return (
        f"of {counted(judged['answers'], 'answer')} {judged['exact']:.1%} exact, {judged['stopped']:.1%} stop by"
        f" themselves, {judged['repeated']:.1%} repeat themselves, {judged['leaked']:.1%} leak the template;"
        f" {judged['answer_characters']:.1f} characters on average, {judged['expected_characters']:.1f} expected"
    )
