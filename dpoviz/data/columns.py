"""Find the prompt, the answers and the label of a row by its column names; refuse what is ambiguous.

No column that could change the prompt or the label is dropped silently: it is read, repeats what the prompt already
says, is ignored on the user's request, or is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import takewhile
from typing import Any, NamedTuple

import regex

from dpoviz.data.files import parse_json

FIELDS = ("prompt", "chosen", "rejected", "task")

ROLES = ("system", "user", "assistant", "tool")

OWN = ("prompt_ids", "chosen_ids", "rejected_ids", "line", "file")
"""Columns that later steps write, besides those that begin with ref_."""

RENAMED = (*FIELDS, "group", "system", "tools")
"""Names that --columns may assign."""

# --- column names ----------------------------------------------------------------------------------------------------

ANSWERS = (
    ("chosen", "rejected"),
    ("chosen", "reject"),
    ("accepted", "rejected"),
    ("preferred", "rejected"),
    ("preferred", "dispreferred"),
    ("preferred_output", "non_preferred_output"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("chosen_answer", "rejected_answer"),
    ("answer_chosen", "answer_rejected"),
    ("chosen_completion", "rejected_completion"),
    ("chosen_output", "rejected_output"),
    ("better", "worse"),
    ("good", "bad"),
    ("winner", "loser"),
    ("win", "lose"),
    ("positive", "negative"),
    ("pos", "neg"),
    ("y_w", "y_l"),
)
"""Pairs of column names that say which answer is better: (better, worse)."""

MARKERS = (("0", "1"), ("1", "2"), ("a", "b"), ("left", "right"), ("first", "second"), ("one", "two"))
"""Words that distinguish two answer columns where a label says which is better: response_0 and response_1."""

ANSWER_WORDS = frozenset(
    "response responses answer answers output completion candidate reply generation conversation summary continuation "
    "solution text message ref option".split()
)

SCORES = {"score": 1, "rating": 1, "reward": 1, "grade": 1, "points": 1, "votes": 1, "winner": 1, "wins": 1, "rank": -1}
"""Scores that each answer has; 1 where higher is better, -1 where lower is."""

LABELS = frozenset(
    "label labels winner preference preferences preferred prefer better best safer choice vote verdict judgement "
    "judgment".split()
)
MAYBE_LABELS = frozenset(
    "gold annotation annotations select selected selection favorite favourite outcome result target decision pick "
    "picked correct answer rank ranking feedback y".split()
)
"""Words that may name a label; beside ordered answers they as often name something else."""

NO_LABELS = frozenset("by model source statement reason explanation elaboration annotator type date confidence".split())
"""Words that show that a column is not the label itself: preference_statement."""

TIES = frozenset({"tie", "both", "neither", "equal", "same", "draw", "none"})

PROMPT_WORDS = frozenset(
    "prompt instruction instructions input inputs question query queries problem post context contexts passage "
    "passages document documents doc docs article articles paragraph paragraphs story premise request background "
    "knowledge evidence history dialogue dialog conversation conversations messages turns example examples shots "
    "demonstration demonstrations persona hint hints".split()
)
SYSTEM_WORDS = frozenset({"system", "sys"})
TOOL_WORDS = frozenset("tool tools function functions".split())
OTHER_WORDS = frozenset(
    "image images picture pictures audio audios video videos pixels thinking thought thoughts reasoning cot "
    "scratchpad".split()
)
"""Inputs other than text, and reasoning that a model writes before its answer."""

FILLERS = frozenset(
    "text texts content message msg str string full user human retrieved supporting shot list json definitions "
    "schema schemas available few chosen rejected prompt instruction instructions".split()
)
"""Words that do not change the meaning of a name: context_text."""

MESSAGE_KEYS = (("role", "content"), ("from", "value"))

SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
} | {role: role for role in ROLES}

CARRIED = ("thinking", "reasoning", "reasoning_content", "tool_calls", "tool_call_id", "name")
"""Message fields that chat templates read; they are kept in the prompt."""

IDLE = frozenset(
    "id index idx turn timestamp time date model score rating weight loss train language lang source author".split()
)
"""Message fields that no chat template reads."""


class Refused(ValueError):
    """A row that cannot be read; `column` is set if the problem is the column's and so the same in every row."""

    def __init__(self, message: str, column: str | None = None) -> None:
        super().__init__(message)
        self.column = column


class Tie(Exception):
    """A row whose label prefers neither answer."""


class _Pair(NamedTuple):
    """Two columns that hold two answers, and the words that distinguish their names."""

    first: str
    second: str
    markers: tuple[str, str]


@cache  # the rows of a data set share a few names
def words(name: str) -> tuple[str, ...]:
    """Return the lower-case words of a column name: betterResponse_id → (better, response, id)."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name))


@cache
def _means(name: str, meaning: frozenset[str]) -> bool:
    """Return whether a name contains a word of `meaning` and otherwise only fillers."""
    own = set(words(name))
    return bool(own & meaning) and own <= meaning | FILLERS


def is_system(name: str) -> bool:
    return _means(name, SYSTEM_WORDS)


def is_context(name: str) -> bool:
    """Return whether a column's name says that the model reads it."""
    return _means(name, PROMPT_WORDS | SYSTEM_WORDS | TOOL_WORDS | OTHER_WORDS)


def is_label(name: str, value: Any) -> bool:
    """Return whether a column, by name and value, says which of two answers is better."""
    own = set(words(name))
    which = own & LABELS or (own & {"chosen", "rejected"} and own & {"id", "index", "idx", "position"})
    return bool(which) and not own & NO_LABELS and _short(value)


def _short(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (isinstance(value, str) and 0 < len(value.split()) <= 3)


# --- a row -----------------------------------------------------------------------------------------------------------


class Reader:
    """Reader of rows that counts what the user should be told.

    Attributes:
        counts: number of rows per observation.
        seen: ignored columns and message fields that occurred; the others are mistyped.
    """

    def __init__(self, columns: Mapping[str, str], ignored: Iterable[str]) -> None:
        self.columns, self.ignored = dict(columns), frozenset(ignored)
        self.counts: Counter[str] = Counter()
        self.seen: set[str] = set()

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row with those of `prompt`, `chosen`, `rejected` and `tools` that it contains.

        Raises:
            Refused: a column cannot be used, labels disagree, or no prompt can be read from the answers.
            Tie: the label prefers neither answer.
        """
        left = self._set_aside(self._named_as_ours(row))
        given = "prompt" in left
        answers = self._answers(left)
        found = self._prompt(left, answers)
        if answers:
            self._require_said(left, found)
        if not given and found["prompt"] is None:
            del found["prompt"]
        return left | found

    def without_ignored(self, row: Mapping[str, Any]) -> dict[str, Any]:
        self.seen |= self.ignored & set(row)
        return {name: value for name, value in row.items() if name not in self.ignored}

    def _named_as_ours(self, row: Mapping[str, Any]) -> dict[str, Any]:
        missing = [theirs for theirs in self.columns if theirs not in row]
        if missing:
            raise Refused(f"columns names {', '.join(missing)}; the record has {', '.join(row)}")
        row = self.without_ignored(row)
        for theirs, ours in self.columns.items():
            if ours in row and ours not in self.columns and not _empty(row[ours]):
                raise Refused(
                    f"column {ours!r}: there is one beside {theirs!r}, which --columns names {ours!r}; "
                    + _leave_out(ours),
                    ours,
                )
        renamed = {self.columns.get(name, name): value for name, value in row.items() if name in self.columns}
        kept = {name: value for name, value in row.items() if name not in self.columns}
        return {name: _unpacked(name, value) for name, value in {**kept, **renamed}.items()}

    def _set_aside(self, row: dict[str, Any]) -> dict[str, Any]:
        """Rename columns whose names later steps write."""
        ours = {name: f"own_{name}" for name in row if name in OWN or name.startswith("ref_")}
        for name, other in ours.items():
            if other in row:
                raise Refused(f"columns {name!r} and {other!r}: dpoviz writes the first; {_leave_out(name)}", name)
            self.counts[f"have a column {name!r}, a name that is written here later: it is kept as {other!r}"] += 1
        return {ours.get(name, name): value for name, value in row.items()}

    # --- answers and label

    def _answers(self, row: dict[str, Any]) -> dict[str, Any]:
        """Remove the better and the worse answer from a row and return them; empty if it has none."""
        named = next((pair for pair in ANSWERS if pair[0] in row and pair[1] in row), None)
        if named is not None:
            self._require_no_label(row, named)
            self._require_scores(row, *named)
        else:
            pair = _two_answers(row)
            if pair is None:
                return {}
            named = (pair.first, pair.second) if _preferred(row, pair) > 0 else (pair.second, pair.first)
        return {"chosen": row.pop(named[0]), "rejected": row.pop(named[1])}

    def _require_no_label(self, row: Mapping[str, Any], named: tuple[str, str]) -> None:
        """Refuse a label beside answers that are already ordered: it may contradict the order."""
        theirs = {ours: name for name, ours in self.columns.items()}
        marked = [_stem_and_marker(theirs[ours]) for ours in ("chosen", "rejected") if ours in theirs]
        markers = tuple(own[1] for own in marked if own is not None)
        for name, value in row.items():
            if name in named or value is None:
                continue
            if is_label(name, value) or (len(markers) == 2 and _may_be_label(row, name, markers)):
                raise Refused(
                    f"column {name!r}: looks like a label, got {value!r}, beside answers that are ordered already; a "
                    "label that names one of two answers is read without --columns, else order them in Python; where "
                    f"it says something else, {_leave_out(name)}",
                    name,
                )

    def _require_scores(self, row: Mapping[str, Any], chosen: str, rejected: str) -> None:
        """Refuse a row whose scores prefer the rejected answer."""
        apart = [pair for pair in zip(words(chosen), words(rejected), strict=False) if pair[0] != pair[1]]
        better, worse = apart[0]
        for name in row:
            if not _score_of(name) or better not in words(name):
                continue
            theirs = tuple(worse if word == better else word for word in words(name))
            other = next((own for own in row if words(own) == theirs), name)
            good, bad = _number(row[name]), _number(row[other])
            if other == name or good is None or bad is None:
                continue
            difference = _score_of(name) * (good - bad)
            if difference < 0:
                raise Refused(
                    f"column {name!r}: got {row[name]}, and {other!r} is {row[other]}: they prefer the rejected "
                    f"answer; where they mean something else, leave them out (--ignore-columns {name} {other})"
                )
            if difference == 0:
                self.counts["have two equal scores, by which neither answer is the better one"] += 1

    # --- prompt

    def _prompt(self, row: dict[str, Any], answers: dict[str, Any]) -> dict[str, Any]:
        """Return `prompt`, `chosen`, `rejected` and `tools`; remove the columns used from the row."""
        answers = {name: self._chat(value) for name, value in answers.items()}
        whole = bool(answers) and all(isinstance(own, list) and len(own) > 1 for own in answers.values())
        prompt = self._given_prompt(row, whole)
        system, tools = self._system(row), _tools(row.pop("tools", None))
        if whole and (prompt is None or isinstance(prompt, str) or _begin(answers, prompt)):
            if isinstance(prompt, str):
                row["prompt"] = prompt  # checked later: the chat must contain it
            prompt, answers = _shared_messages(answers)
        elif prompt is None and answers and all(isinstance(own, str) for own in answers.values()):
            prompt, answers = _shared_text(answers)
            if prompt is not None:
                _require_no_other_prompt(row)
        elif isinstance(prompt, str) and any(isinstance(own, list) for own in answers.values()):
            prompt = [{"role": "user", "content": prompt}]
        prompt = _with_system(prompt, system)
        if tools and not isinstance(prompt, list):
            raise Refused(
                f"column 'tools': got a prompt that is a text, expected a chat; {_leave_out('tools')}", "tools"
            )
        answers = self._without_prompt(prompt, answers)
        return {"prompt": prompt, **answers} | ({"tools": json.dumps(tools, ensure_ascii=False)} if tools else {})

    def _system(self, row: dict[str, Any]) -> str | None:
        """Remove the system message from a row and return it: "" if its column is empty, None if there is none."""
        name = next((own for own in row if is_system(own)), None)
        if name is None:
            return None
        value = row[name]
        if not _empty(value) and not isinstance(value, str):
            raise Refused(
                f"column {name!r}: got {type(value).__name__}, expected the system's text; {_leave_out(name)}"
            )
        del row[name]
        return value.strip() and value if isinstance(value, str) else ""

    def _given_prompt(self, row: dict[str, Any], whole: bool) -> Any:
        """Remove the prompt from a row and return it: a text, a chat, or None if no column holds it."""
        there = [name for name in row if _means(name, PROMPT_WORDS | {"prompt"}) and not _empty(row[name])]
        if "prompt" in row and (_empty(row["prompt"]) <= (not there)):
            own = self._chat(row.pop("prompt"))
            lists = [name for name in there if isinstance(own, str) and isinstance(row.get(name), list)]
            chats = [name for name in lists if self._is_rendered(row[name], own, row.get("tools"))]
            return self._chat(row.pop(chats[0])) if chats else own
        if isinstance(row.get("instruction"), str) and {"input", "history"} & set(row):
            return _alpaca(row)
        if whole:
            return None
        if len(there) > 1:  # the column that contains all the others
            there = [name for name in there if all(_said(row[o], _texts(row[name])) for o in there)][:1] or there
        if len(there) > 1:
            raise Refused(
                f"columns {', '.join(map(repr, there))}: look like parts of the prompt, expected one; join them in a "
                f"column 'prompt', or name one and ignore the rest: --columns {there[0]}=prompt --ignore-columns "
                + " ".join(there[1:]),
                there[0],
            )
        if not there:
            return None
        value = row[there[0]]
        if isinstance(value, str) and not any(is_system(name) for name in row):
            raise Refused(
                f"column {there[0]!r}: looks like the prompt, and there is no column 'prompt'; say so with columns= "
                f"(--columns {there[0]}=prompt)",
                there[0],
            )
        del row[there[0]]
        if isinstance(value, dict) and isinstance(value.get("messages"), list):  # OpenAI's layout
            row |= {name: own for name, own in value.items() if name != "messages"}
            value = value["messages"]
        return self._chat(value)

    def _is_rendered(self, value: list, text: Any, tools: Any) -> bool:
        """Return whether the text is this chat as `as_text` writes it: a saved record that is read again."""
        chat = [self._message(message) for message in value]
        return not any(_message_flaw(message) for message in chat) and as_text(chat, tools) == text

    def _without_prompt(self, prompt: Any, answers: dict[str, Any]) -> dict[str, Any]:
        """Cut the prompt off answers that repeat it; a prompt of one or two words may match by chance and is kept."""
        last = prompt[-1] if isinstance(prompt, list) and prompt else prompt
        text = last.get("content") if isinstance(last, dict) else last
        texts = {name: own[0]["content"] if _is_answer(own) else own for name, own in answers.items()}
        if not isinstance(text, str) or not all(isinstance(own, str) for own in texts.values()):
            return answers
        repeating = [name for name, own in texts.items() if own.startswith(text)]
        if not repeating or len(_pieces(text)) < 3:
            return answers
        if len(repeating) == 1:
            self.counts["have one answer that begins with the prompt; it is kept as it is"] += 1
        if len(repeating) < 2:
            return answers
        cut = {name: own[len(text) :] for name, own in texts.items()}
        if not all(own.strip() for own in cut.values()):
            raise Refused("fields 'chosen' and 'rejected' repeat the prompt, and one holds nothing else")
        self.counts["have answers that both repeat the prompt at their beginning; it is cut off"] += 1
        return {name: own.lstrip() if isinstance(prompt, list) else own for name, own in cut.items()}

    def _require_said(self, row: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Refuse a column that the model should read, unless it is empty or repeats the record."""
        for name, value in row.items():
            # numbers are not read; a text must occur in the prompt, a conversation may contain the answers too
            if isinstance(value, (bool, int, float)) or _empty(value):
                continue
            if not is_context(name) and not _is_media(value):
                continue
            says = [found["prompt"]] if isinstance(value, str) else [found[own] for own in FIELDS[:3]]
            if not (_means(name, PROMPT_WORDS | SYSTEM_WORDS) and _said(value, _texts(says))):
                raise Refused(
                    f"column {name!r}: looks like something that the model should read, and is not in the prompt; put "
                    f"it there, or {_leave_out(name)}",
                    name,
                )

    # --- chats

    def _chat(self, value: Any) -> Any:
        """Return messages with the keys role and content; return anything else unchanged."""
        if isinstance(value, dict) and any(role in value for role, _ in MESSAGE_KEYS):
            value = [value]
        if not isinstance(value, list):
            return value
        return [self._message(message) for message in value]

    def _message(self, message: Any) -> Any:
        keys = next((pair for pair in MESSAGE_KEYS if isinstance(message, dict) and pair[0] in message), None)
        if keys is None or not isinstance(message, dict):
            return message
        speaker, content = message[keys[0]], message.get(keys[1])
        more = {name: value for name, value in message.items() if name not in keys and not _empty(value)}
        self.seen |= self.ignored & set(more)
        more = {name: _filled(value) for name, value in more.items() if name not in self.ignored and name not in IDLE}
        unknown = [name for name in more if name not in CARRIED]
        if unknown:
            raise Refused(f"a message has {unknown[0]!r}, which no prompt here is made of; {_leave_out(unknown[0])}")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text") or "") for part in content)
        if speaker == "function_call":
            more["tool_calls"], content = _calls(content), ""
        if content is None and "tool_calls" in more:
            content = ""
        role = SPEAKERS.get(speaker.lower(), speaker) if isinstance(speaker, str) else speaker
        return {"role": role, "content": content, **more}


def _leave_out(name: str) -> str:
    return f"leave it out with ignore_columns (--ignore-columns {name})"


def _empty(value: Any) -> bool:
    return value is None or (
        isinstance(value, (str, list, dict)) and not (value.strip() if isinstance(value, str) else value)
    )


def _number(value: Any) -> float | None:
    """Return a value as a number, also from text, as CSV has it; None if it is not a number."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


_CODED = re.compile(r"\s*(\[\s*)?\{\s*['\"](role|content|from|value)['\"]\s*:")


def _unpacked(name: str, value: Any) -> Any:
    """Return the value; parse it if it is a chat as JSON text."""
    if name == "chat_template_kwargs" and isinstance(value, dict):
        return json.dumps(_filled(value), ensure_ascii=False)  # Arrow would fill a column of objects with None
    if not isinstance(value, str) or not _CODED.match(value):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        if not is_context(name) and not any(name in pair for pair in ANSWERS):
            return value
        raise Refused(f"field {name!r}: begins like a chat in JSON and is none ({error})") from error


def _filled(value: Any) -> Any:
    """Return a value without the None entries that Arrow adds to objects."""
    if isinstance(value, dict):
        return {name: _filled(own) for name, own in value.items() if own is not None}
    return [_filled(own) for own in value] if isinstance(value, list) else value


# --- labels ----------------------------------------------------------------------------------------------------------


def _stem_and_marker(name: str) -> tuple[tuple[str, ...], str] | None:
    """Return the stem and the marker of a name: response_0 → (("response",), "0")."""
    own = words(name)
    for i in (-1, 0):
        if len(own) > 1 and (len(own[i]) == 1 or any(own[i] in pair for pair in MARKERS)):
            return tuple(own[:-1] if i else own[1:]), own[i]
    return None


def _two_answers(row: Mapping[str, Any]) -> _Pair | None:
    """Return the two columns that hold answers whose names do not say which is better.

    Raises:
        Refused: there are more than two.
    """
    of_stem: dict[tuple[str, ...], dict[str, str]] = {}
    for name, value in row.items():
        parts = _stem_and_marker(name)
        if parts and set(parts[0]) & ANSWER_WORDS and isinstance(value, (str, list, dict)):
            of_stem.setdefault(parts[0], {})[parts[1]] = name
    for marked in of_stem.values():
        for first, second in MARKERS:
            if first in marked and second in marked:
                if len(marked) > 2:
                    names = ", ".join(map(repr, marked.values()))
                    raise Refused(
                        f"columns {names}: got {len(marked)} answers, expected two; make pairs of them in Python"
                    )
                return _Pair(marked[first], marked[second], (first, second))
    return None


def _preferred(row: Mapping[str, Any], pair: _Pair) -> int:
    """Return 1 if the first answer is better and -1 if the second is.

    Raises:
        Tie: neither is.
        Refused: no column says which, one is ambiguous, or two disagree.
    """
    votes = {}
    for name, value in row.items():
        if name in (pair.first, pair.second) or value is None:
            continue
        scores = _by_scores(row, name, pair.markers)
        if scores is not None:
            votes[name] = scores
        elif is_label(name, value) and not _other_marker(row, name, pair.markers):
            vote = _by_label(name, value, pair.markers)
            if vote is None:
                raise Refused(
                    f"column {name!r}: got {value!r}, expected the name of {pair.first!r} or {pair.second!r}; write "
                    "'chosen' and 'rejected' in Python by what it means, and give load_pairs the datasets.Dataset"
                )
            if vote or not (TIES & set(words(name))):
                votes[name] = vote
    others = [name for name, value in row.items() if value is not None and _may_be_label(row, name, pair.markers)]
    if not votes and others:
        raise Refused(
            f"column {others[0]!r}: got {row[others[0]]!r}, and may say which of {pair.first!r} and {pair.second!r} is "
            "better; order them in Python, as 'chosen' and 'rejected', and give load_pairs the datasets.Dataset"
        )
    if not votes:
        raise Refused(
            f"columns {pair.first!r} and {pair.second!r}: hold two answers, and no column says which is better; where "
            f"it is the first in every row: --columns {pair.first}=chosen {pair.second}=rejected"
        )
    if len(set(votes.values())) > 1:
        said = ", ".join(
            f"{name!r} ({'neither' if not v else pair[0] if v > 0 else pair[1]})" for name, v in votes.items()
        )
        raise Refused(f"labels disagree: {said}; keep one and name the rest in ignore_columns (--ignore-columns)")
    vote = next(iter(votes.values()))
    if not vote:
        raise Tie
    return vote


def _may_be_label(row: Mapping[str, Any], name: str, markers: tuple[str, str]) -> bool:
    """Return whether a column may be the label of two answers although its name does not say how to read it."""
    value, own = row[name], set(words(name))
    other = _other_marker(row, name, markers)
    if not own.isdisjoint(IDLE - SCORES.keys()):
        return False
    if other is not None:
        return _number(value) is not None and _number(row[other]) is not None
    names_one = isinstance(value, str) and bool(_by_label(name, value, markers))
    return names_one or (bool(own & MAYBE_LABELS) and _short(value))


def _other_marker(row: Mapping[str, Any], name: str, markers: tuple[str, str]) -> str | None:
    """Return the counterpart of a column for the other answer: score_b for score_a."""
    own = list(words(name))
    here = [i for i, word in enumerate(own) if word in markers]
    if len(here) != 1:
        return None
    own[here[0]] = markers[own[here[0]] == markers[0]]
    return next((other for other in row if list(words(other)) == own), None)


def _by_scores(row: Mapping[str, Any], name: str, markers: tuple[str, str]) -> int | None:
    """Compare the scores of both answers: 1 if the first is better, -1 if the second, 0 if equal, None if no scores."""
    other, sign = _other_marker(row, name, markers), _score_of(name)
    if other is None or not sign:
        return None
    a, b = (_number(row[own]) for own in ((name, other) if markers[0] in words(name) else (other, name)))
    return None if a is None or b is None else sign * ((a > b) - (a < b))


def _score_of(name: str) -> int:
    return next((SCORES[word] for word in words(name) if word in SCORES), 0)


def _by_label(name: str, value: Any, markers: tuple[str, str]) -> int | None:
    """Return the answer that a label names: 1 for the first, -1 for the second, 0 for neither, None if unclear."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    own = words(str(value)) if isinstance(value, (str, int)) and not isinstance(value, bool) else ()
    if TIES & set(own):
        return 0
    if TIES & set(words(name)):  # winner_tie = 1
        return 0
    named = [marker for marker in markers if marker in own]
    if len(named) == 1 and set(own) <= {named[0]} | ANSWER_WORDS | _ABOUT and not str(value).strip().startswith("-"):
        return 1 if named[0] == markers[0] else -1
    about = [marker for marker in markers if marker in words(name)]
    if len(about) == 1 and (isinstance(value, bool) or value in (0, 1)):  # is_a_better = True
        return 1 if (about[0] == markers[0]) == bool(value) else -1
    return None


_ABOUT = frozenset("model assistant system id is the better human wins win won preferred".split())
"""Words that may accompany the marker in a label: "model_a", "assistant B wins"."""


# --- prompts ---------------------------------------------------------------------------------------------------------


def _alpaca(row: dict[str, Any]) -> Any:
    """Remove Alpaca's prompt from a row and return it, joined as in LLaMA-Factory: instruction, newline, input."""
    parts = [row.pop("instruction"), row.pop("input", None)]
    history = row.pop("history", None)
    if any(part is not None and not isinstance(part, str) for part in parts):
        raise Refused("columns 'instruction' and 'input': expected texts")
    text = "\n".join(part for part in parts if part)
    if history is None:
        return text
    if not isinstance(history, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in history):
        raise Refused("column 'history': expected a list of pairs, what the user said and what the answer was")
    turns = [{"role": role, "content": own} for turn in history for role, own in zip(ROLES[1:], turn, strict=False)]
    return [*turns, {"role": "user", "content": text}]


def _with_system(prompt: Any, system: str | None) -> Any:
    """Return the prompt with the system message prepended; a system column turns a text into a user message."""
    if system is None or _empty(prompt):
        if system:
            raise Refused("column 'system': there is no prompt that it could stand before", "system")
        return prompt
    if isinstance(prompt, str):
        if system and system in prompt:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not system:
        return prompt
    first = prompt[0] if isinstance(prompt[0], dict) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *prompt]
    if first.get("content") != system:
        raise Refused(
            f"column 'system': got {system[:60]!r}, and the chat begins with another system message; "
            + _leave_out("system")
        )
    return prompt


def _require_no_other_prompt(row: Mapping[str, Any]) -> None:
    """Refuse to use the common beginning of the answers as the prompt if another column may hold it."""
    for name, value in row.items():
        if is_context(name) and not _empty(value):
            continue  # `_require_said` refuses it, unless the answers contain it
        if name not in ("task", "group") and isinstance(value, str) and len(_pieces(value)) >= 3:
            raise Refused(
                f"column {name!r}: may hold the prompt, which is else what both answers begin with; name it (--columns "
                f"{name}=prompt), or leave it out (--ignore-columns {name})",
                name,
            )


def _pieces(text: str) -> list[str]:
    """Return the words of a text; an ideograph counts as one."""
    return [piece for piece in _BOUNDARY.split(text) if piece[:1].isalnum()]


def _begin(answers: Mapping[str, Any], prompt: Any) -> bool:
    """Return whether both answers, as whole chats, begin with the prompt's messages."""
    if not isinstance(prompt, list):
        return False
    return all(isinstance(own, list) and own[: len(prompt)] == prompt for own in answers.values())


def _shared_messages(answers: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    chosen, rejected = answers["chosen"], answers["rejected"]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if not same:
        return None, dict(answers)
    _require_two(chosen[same:], rejected[same:], chosen == rejected)
    return chosen[:same], {"chosen": chosen[same:], "rejected": rejected[same:]}


def _shared_text(answers: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Split two texts after their common words; a space between prompt and answer belongs to the answer."""
    chosen, rejected = answers["chosen"], answers["rejected"]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    _require_two(chosen[same:].strip(), rejected[same:].strip(), chosen == rejected)
    same = min(_boundary(chosen, same), _boundary(rejected, same))
    same -= chosen[:same].endswith(" ")
    if not chosen[:same].strip():
        return None, dict(answers)
    return chosen[:same], {"chosen": chosen[same:], "rejected": rejected[same:]}


def _require_two(chosen: Sequence, rejected: Sequence, identical: bool) -> None:
    if identical:
        raise Refused("fields 'chosen' and 'rejected' are identical: no preference can be learned from them")
    if not (chosen and rejected):
        raise Refused(
            "fields 'chosen' and 'rejected': one answer begins with the whole other, so that no prompt can be read "
            "from what they share; give the prompt in a column 'prompt'"
        )


_BOUNDARY = regex.compile(r"\b", regex.WORD)  # Unicode's: none inside 3.50 or don't, one between ideographs


def _boundary(text: str, at: int) -> int:
    """Return the last position up to `at` that is not inside a word."""
    if at in (0, len(text)) or text[at - 1].isspace() or text[at].isspace():
        return at
    begin = at - 1
    while begin and not text[begin - 1].isspace():
        begin -= 1
    places = takewhile(lambda place: place <= at, (found.start() for found in _BOUNDARY.finditer(text, begin)))
    return max(places, default=begin)


def _tools(value: Any) -> list | None:
    """Return the tool schemas from a list or its JSON text; None if there are none."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as error:
            raise Refused(f"column 'tools': not JSON ({error}), expected a list of schemas") from error
    if _empty(value):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Refused(f"column 'tools': got {type(value).__name__}, expected a list of schemas; {_leave_out('tools')}")
    return [_filled(tool) for tool in value]


def _calls(content: Any) -> list[dict]:
    """Return the tool calls of ShareGPT's function_call, one object or a list of them, maybe as JSON text."""
    try:
        calls = parse_json(content) if isinstance(content, str) else content
        calls = calls if isinstance(calls, list) else [calls]
        return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(
            f"a function_call is no JSON with name and arguments ({type(error).__name__}: {error})"
        ) from error


def _is_answer(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 1
        and isinstance(value[0], dict)
        and set(value[0]) == {"role", "content"}
    )


def _is_media(value: Any) -> bool:
    """Return whether a value is an image or audio in the representation of `datasets`."""
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, dict) and {"bytes", "path"} <= set(item) for item in items)


def _texts(value: Any) -> list[str]:
    """Return all texts in a value except the names of speakers."""
    if isinstance(value, str):
        return [" ".join(value.split())]
    if isinstance(value, dict):
        value = [own for name, own in value.items() if name not in ("role", "from")]
    return [text for own in value for text in _texts(own)] if isinstance(value, list) else []


def _said(value: Any, texts: Sequence[str]) -> bool:
    """Return whether every text of a value occurs in one of `texts` as whole words."""
    if not isinstance(value, (str, list, dict)):
        return False
    return all(any(_stands_in(own, text) for text in texts) for own in _texts(value) if own)


def _stands_in(own: str, text: str) -> bool:
    """Return whether `own` occurs in a text as whole words."""
    at = text.find(own)
    while at >= 0:
        if not (text[at - 1 : at] + own[:1]).isalnum() or at == 0:
            end = at + len(own)
            if end == len(text) or not (own[-1:] + text[end]).isalnum():
                return True
        at = text.find(own, at + 1)
    return False


def as_text(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
    """Return a chat as text that identifies it; tools and further fields are written as JSON."""
    said = [f"tools: {tools}"] if tools else []
    for message in messages:
        more = {name: value for name, value in message.items() if name not in ("role", "content")}
        said.append(
            f"{message['role']}: {message['content']}" + (f" {json.dumps(more, ensure_ascii=False)}" if more else "")
        )
    return "\n\n".join(said)


def _message_flaw(message: Any) -> str | None:
    """Return the problem of a message; None if there is none."""
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        return f"got {str(message)[:60]!r}, expected an object with role and content"
    if message["role"] not in ROLES:
        return f"got the role {message['role']!r}, expected one of {', '.join(ROLES)}"
    if not isinstance(message["content"], str):
        return "its content is no text"
    if not message["content"].strip() and "tool_calls" not in message:
        return "its content is empty"
    return None


def chat_flaws(messages: list, field: str) -> list[str]:
    """Return the problems of the messages of a prompt or an answer."""
    if not messages:
        return ["got no messages"]
    found = []
    for i, message in enumerate(messages, start=1):
        flaw = _message_flaw(message)
        if flaw:
            found.append(f"message {i}: {flaw}")
        elif field == "prompt" and i == len(messages) and message["role"] not in ("user", "tool"):
            found.append(f"ends with the {message['role']}'s message, expected the user's")
        elif field != "prompt" and message["role"] != "assistant":
            found.append(f"got the {message['role']}'s message, expected an answer: one assistant's message")
        elif field != "prompt" and set(message) > {"role", "content"}:
            name = next(name for name in message if name not in ("role", "content"))
            found.append(f"its message has {name!r}, which is not read in an answer; {_leave_out(name)}")
    if field != "prompt" and len(messages) > 1:
        found.append(f"got {len(messages)} messages, expected an answer of one")
    return found
