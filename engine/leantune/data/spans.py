"""Which characters of a rendered chat the model is to write, and whose words the others are.

Nothing here searches for markup. Trained spans are generation blocks where the template marks them; otherwise
they lie between two renderings: of the messages before a turn with the generation prompt, and of the messages
up to and with the turn. Both must be the beginning of the whole text, or the template is refused.
"""

from dataclasses import dataclass
from typing import Any, Literal

from leantune.data.records import Message
from leantune.data.tokenizer import Span, Tokenizer
from leantune.errors import DataError

TrainOn = Literal["assistant", "last", "all"]
RoleSpan = tuple[str, int, int]  # (role, start, end) in characters


@dataclass(slots=True)
class Chat:
    """A rendered chat: its text, the spans to train on, and the spans of each role's words.

    exact: the trained spans need no trimming, since the template marks them or everything is trained.
    """

    text: str
    labels: list[Span]
    roles: list[RoleSpan]
    exact: bool = True


class _Turns:
    """One conversation, rendered whole and in part; each part is rendered at most once."""

    def __init__(self, tokenizer: Tokenizer, messages: list[Message], tools: list[Any] | None) -> None:
        self.tokenizer = tokenizer
        self.messages = messages
        self.tools = tools
        self.text, self.marks = tokenizer.render_with_generation_spans(messages, tools=tools)
        self._parts = {(len(messages), False): self.text}

    def part(self, count: int, generation_prompt: bool = False) -> str:
        """The first `count` messages, rendered on their own."""
        key = (count, generation_prompt)
        if key not in self._parts:
            self._parts[key] = self.render(self.messages[:count], generation_prompt)
        return self._parts[key]

    def render(self, messages: list[Message], generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, generation_prompt, tools=self.tools)

    def opens_text(self, part: str, turn: int) -> int:
        """Length of a part that the whole text begins with; it marks where something starts or ends."""
        if self.text.startswith(part):
            return len(part)
        at = _common(part, self.text)
        raise DataError(
            f"the chat template writes messages[{turn}] differently on its own ({part[at : at + 30]!r}) than "
            f"inside the whole chat ({self.text[at : at + 30]!r}), so its turns cannot be told apart; put "
            "{% generation %} and {% endgeneration %} around what the model writes in chat_template.jinja, "
            'make one record per turn and use train_on="last", or use train_on="all"'
        )


def render_chat(tokenizer: Tokenizer, messages: list[Message], tools: list[Any] | None, train_on: TrainOn) -> Chat:
    """Render messages once whole, and in part as often as the spans need.

    Raises DataError when the template fails or its turns cannot be told apart.
    """
    turns = _Turns(tokenizer, messages, tools)
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "all":
        return Chat(turns.text, [(0, len(turns.text))], _spoken(turns, range(len(messages))))
    if not assistants:
        raise DataError('there is no assistant message to train on; add one, or use train_on="all"')
    trained = assistants[-1:] if train_on == "last" else assistants
    marked = tokenizer.has_generation_marks(tools)
    if marked:
        first = turns.opens_text(turns.part(trained[0]), trained[0]) if train_on == "last" else 0
        labels = [span for span in turns.marks if span[0] >= first]
        silent = set(assistants)
    else:
        labels = [_written(turns, i) for i in trained]
        silent = set(trained)
    roles = _spoken(turns, [i for i in range(len(messages)) if i not in silent])
    for start, end in turns.marks if marked else labels:
        roles.append(("assistant", start, start + len(turns.text[start:end].rstrip())))
    return Chat(turns.text, labels, roles, exact=marked)


def _written(turns: _Turns, turn: int) -> Span:
    """What the model writes in an assistant turn: from the end of its prompt to the end of the turn."""
    start = turns.opens_text(turns.part(turn, True), turn)
    end = turns.opens_text(turns.part(turn + 1), turn)
    begins_with_markup = turns.text.startswith(turns.tokenizer.special_texts, start)
    if begins_with_markup and turns.part(turn, True) == turns.part(turn):
        raise DataError(
            "the chat template ignores add_generation_prompt, so the header of an assistant turn would be "
            "trained on as if the model wrote it; end chat_template.jinja with the header under "
            "{% if add_generation_prompt %}, or use generation marks"
        )
    return start, end


def _spoken(turns: _Turns, indices: "range | list[int]") -> list[RoleSpan]:
    """Spans of the words of some messages, for display, never for labels; rewritten words have none."""
    spans = []
    for i in indices:
        words = str(turns.messages[i].get("content", "")).strip()
        start = _find(turns, i, words) if words else -1
        if start >= 0:
            spans.append((turns.messages[i]["role"], start, start + len(words)))
    return spans


def _find(turns: _Turns, turn: int, words: str) -> int:
    """Where the words of a message stand, -1 if nowhere; its own rendering settles words that occur twice."""
    if turns.text.count(words) <= 1:
        return turns.text.find(words)
    blank = {**turns.messages[turn], "content": ""}
    try:
        whole, without = turns.part(turn + 1), turns.render([*turns.messages[:turn], blank])
    except DataError:
        return -1  # the template wants more context than this turn; the words stay unattributed
    if not turns.text.startswith(whole):
        return -1
    tail = _common(whole[::-1], without[::-1])
    return whole.find(words, max(0, len(without) - tail))


def _common(a: str, b: str) -> int:
    """Number of characters that two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
