"""The synthetic tasks of the small world: prompts, answers, exact rewards, label reliability.

There are three families. *math* has one correct answer, which the program computes. *code* asks for a Python
expression; many are correct, and a restricted evaluator runs them on test inputs. *dialogue* has many acceptable
replies, scored by politeness, relevance and length.

A family's `reliability` scales the true reward in a Bradley-Terry labeller, P(a ≻ b) = σ(reliability·(r_a − r_b)):
large for math, small for dialogue. Entropy is not set anywhere; it results from training a model on the
demonstrations.
"""

from __future__ import annotations

import ast
import math
import operator
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

TASKS = ("math", "code", "dialogue")


@dataclass(frozen=True)
class Problem:
    """A prompt with the key to judge answers to it.

    Attributes:
        task: name of the family, one of `TASKS`.
        prompt: text that the model reads; ends with a newline.
        key: the worked solution (math), a correct expression (code), the topic (dialogue).
    """

    task: str
    prompt: str
    key: str


@dataclass(frozen=True)
class Family:
    """One task family.

    Attributes:
        reliability: scale of the reward difference, in nats of preference logit per unit of reward.
        problem: samples a problem.
        demonstrate: samples an answer for the training corpus.
        reward: true reward of an answer, in [0, 1].
    """

    reliability: float
    problem: Callable[[random.Random], Problem]
    demonstrate: Callable[[Problem, random.Random], str]
    reward: Callable[[Problem, str], float]


# ---------------------------------------------------------------------------------------------- math

_NAMES = ("Tom", "Ana", "Li", "Raj")
_ITEMS = ("apples", "coins", "books", "eggs")
_MATH_PROMPTS = {
    "+": (
        "What is {a} + {b}?",
        "Compute {a} + {b}.",
        "{name} has {a} {items} and buys {b} more. How many {items} now?",
    ),
    "-": (
        "What is {a} - {b}?",
        "Compute {a} - {b}.",
        "{name} has {a} {items} and gives away {b}. How many {items} are left?",
    ),
    "*": (
        "What is {a} * {b}?",
        "Compute {a} * {b}.",
        "{name} has {a} boxes with {b} {items} in each. How many {items} in all?",
    ),
    "*-": ("{name} fills {a} boxes with {b} {items} each and loses {c}. How many {items} are left?",),
    "*+": ("{name} fills {a} boxes with {b} {items} each and finds {c} more. How many {items} now?",),
}


def _math_problem(rng: random.Random) -> Problem:
    kind = rng.choice(tuple(_MATH_PROMPTS))
    if kind in ("+", "-"):
        a, b, c = rng.randint(2, 12), rng.randint(2, 12), 0
        if kind == "-":
            a += b  # no negative results
    else:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        c = rng.randint(1, 3)
    template = rng.choice(_MATH_PROMPTS[kind])
    text = template.format(a=a, b=b, c=c, name=rng.choice(_NAMES), items=rng.choice(_ITEMS))
    return Problem("math", text + "\n", _steps(kind, a, b, c))


def _steps(kind: str, a: int, b: int, c: int) -> str:
    """Return the worked solution; its last number is the answer."""
    value = {"+": a + b, "-": a - b}.get(kind, a * b)
    text = f"{a} {kind[0]} {b} = {value}"
    if len(kind) == 2:
        text += f", {value} {kind[1]} {c} = {value - c if kind[1] == '-' else value + c}"
    return text


def last_integer(text: str) -> int | None:
    """Return the last integer in `text`; None if there is none, or it has 12 characters or more."""
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found and len(found[-1]) < 12 else None


def _math_reward(problem: Problem, answer: str) -> float:
    return float(last_integer(answer) == last_integer(problem.key))


# ---------------------------------------------------------------------------------------------- code

# phrase: expressions for it; {e} is the expression so far, in parentheses if needed, {k} a number
_STEPS_OF_X = {
    "double it": ("2 * {e}", "{e} * 2", "{e} + {e}"),
    "triple it": ("3 * {e}", "{e} * 3", "{e} + {e} + {e}"),
    "square it": ("{e} * {e}", "{e} ** 2"),
    "negate it": ("-{e}", "0 - {e}", "-1 * {e}"),
    "add {k}": ("{e} + {k}", "{k} + {e}"),
    "subtract {k}": ("{e} - {k}", "-{k} + {e}"),
    "multiply it by {k}": ("{k} * {e}", "{e} * {k}"),
    "take the remainder by {k}": ("{e} % {k}", "{e} - {e} // {k} * {k}"),
}
_OF_XS = {
    "the sum of xs": ("sum(xs)", "sum(x for x in xs)", "sum([x for x in xs])"),
    "the largest number in xs": ("max(xs)", "sorted(xs)[-1]", "-min(-x for x in xs)"),
    "the smallest number in xs": ("min(xs)", "sorted(xs)[0]", "-max(-x for x in xs)"),
    "the sum of the squares of xs": (
        "sum(x * x for x in xs)",
        "sum(x ** 2 for x in xs)",
        "sum([x * x for x in xs])",
    ),
    "the spread of xs": ("max(xs) - min(xs)", "-min(xs) + max(xs)", "sorted(xs)[-1] - sorted(xs)[0]"),
    "the sum of the first and last of xs": ("xs[0] + xs[-1]", "xs[-1] + xs[0]", "sum([xs[0], xs[-1]])"),
    "how many of xs are above {k}": (
        "sum(x > {k} for x in xs)",
        "len([x for x in xs if x > {k}])",
        "sum(1 for x in xs if x > {k})",
    ),
    "how many of xs are below {k}": (
        "sum(x < {k} for x in xs)",
        "len([x for x in xs if x < {k}])",
        "sum(1 for x in xs if x < {k})",
    ),
    "the sum of {k} times each of xs": (
        "{k} * sum(xs)",
        "sum({k} * x for x in xs)",
        "sum([x * {k} for x in xs])",
    ),
    "the largest of xs plus {k}": ("max(xs) + {k}", "{k} + max(xs)", "sorted(xs)[-1] + {k}"),
    "the smallest of xs minus {k}": ("min(xs) - {k}", "-{k} + min(xs)", "sorted(xs)[0] - {k}"),
}
_CODE_OPENINGS = ("Write an expression: ", "In Python: ", "Give code for this: ")
_INPUTS: tuple[Mapping[str, object], ...] = tuple(
    {"x": x, "xs": xs}
    for x, xs in zip(
        (-7, -2, 0, 1, 3, 5, 10, 23),
        ([3], [2, 9], [-4, 1, 7], [5, 5, 2], [0, -1, 8, 6], [10, 3, 4, 4], [-6, -2, -9], [1, 2, 3, 12, 7]),
        strict=True,
    )
)


def _code_problem(rng: random.Random) -> Problem:
    if rng.random() < 0.35:
        phrase = rng.choice(tuple(_OF_XS))
        k = rng.randint(2, 9)
        text, key = phrase.format(k=k), _OF_XS[phrase][0].format(k=k)
    else:
        steps = [(phrase, rng.randint(2, 9)) for phrase in rng.sample(tuple(_STEPS_OF_X), rng.randint(1, 2))]
        text = "take x, " + ", then ".join(phrase.format(k=k) for phrase, k in steps)
        key = "x"
        for phrase, k in steps:
            key = _STEPS_OF_X[phrase][0].format(e=_operand(key), k=k)
    return Problem("code", f"{rng.choice(_CODE_OPENINGS)}{text}.\n", key)


def _operand(expression: str) -> str:
    return expression if re.fullmatch(r"\w+", expression) else f"({expression})"


def _code_demonstration(problem: Problem, rng: random.Random) -> str:
    text = next(problem.prompt.removeprefix(o) for o in _CODE_OPENINGS if problem.prompt.startswith(o))
    text = text.rstrip(".\n")
    if not text.startswith("take x, "):
        phrase, k = _read(text, _OF_XS)
        return rng.choice(_OF_XS[phrase]).format(k=k)
    expression = "x"
    for step in text.removeprefix("take x, ").split(", then "):
        phrase, k = _read(step, _STEPS_OF_X)
        expression = rng.choice(_STEPS_OF_X[phrase]).format(e=_operand(expression), k=k)
    return expression


def _read(text: str, phrases: Mapping[str, object]) -> tuple[str, int | None]:
    """Return the phrase that `text` is an instance of, and its number."""
    number = re.search(r"\d+", text)
    phrase = text if number is None else text.replace(number.group(), "{k}")
    if phrase not in phrases:
        raise ValueError(f"not a prompt of the code family: {text!r}")
    return phrase, number and int(number.group())


def _code_reward(problem: Problem, answer: str) -> float:
    wanted = _values(problem.key)
    try:
        got = [evaluate_expression(answer, inputs) for inputs in _INPUTS]
    except ValueError:
        return 0.0
    # True counts as 1 inside a sum, but a bool or a list is not an answer
    return float(all(type(g) is int and g == w for g, w in zip(got, wanted, strict=True)))


@lru_cache(maxsize=4096)
def _values(expression: str) -> tuple[object, ...]:
    return tuple(evaluate_expression(expression, inputs) for inputs in _INPUTS)


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "len": len,
    "max": max,
    "min": min,
    "sorted": sorted,
    "sum": sum,
}
_MAX_CHARS, _MAX_STEPS, _MAX_INT, _MAX_LIST = 200, 2_000, 10**9, 1_000


def evaluate_expression(source: str, inputs: Mapping[str, object]) -> object:
    """Evaluate a small Python expression without `eval`.

    The syntax tree is interpreted: integers, lists, the names in `inputs`, + - * // % **, comparisons, conditional
    expressions, indexing, comprehensions over one list, and abs, len, max, min, sorted and sum. The length of the
    text, the number of steps, and the size of integers and lists are bounded, so evaluation always ends quickly.

    Args:
        source: the expression, at most 200 characters.
        inputs: values of the names that the expression may read.

    Raises:
        ValueError: `source` is not an expression, uses other syntax, exceeds a bound, or fails when evaluated.
    """
    if len(source) > _MAX_CHARS:
        raise ValueError(f"expression of {len(source)} characters, at most {_MAX_CHARS} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # parsing a model's text may warn, such as about its escapes
            tree = ast.parse(source.strip(), mode="eval")
        return _Walk(inputs).value(tree.body)
    except ValueError:
        raise
    except (SyntaxError, ArithmeticError, TypeError, LookupError, RecursionError, MemoryError) as error:
        raise ValueError(f"{source!r} fails: {error}") from error


class _Walk:
    """Interpreter of one expression, with the names in scope and the steps left."""

    def __init__(self, names: Mapping[str, object]) -> None:
        self.names = dict(names)
        self.steps = _MAX_STEPS

    def value(self, node: ast.expr) -> Any:
        self.steps -= 1
        if self.steps < 0:
            raise ValueError(f"more than {_MAX_STEPS} steps")
        result = self._value(node)
        if isinstance(result, int) and abs(result) > _MAX_INT:
            raise ValueError(f"an integer beyond {_MAX_INT}")
        if isinstance(result, list) and len(result) > _MAX_LIST:
            raise ValueError(f"a list of more than {_MAX_LIST}")
        return result

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(value)) if type(value) is int:
                return value
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.value(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return self._binary(type(op), self.value(left), self.value(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                return _COMPARE[type(op)](self.value(left), self.value(right))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.value(test) else orelse)
            case ast.List(elts=elements):
                return [self.value(element) for element in elements]
            case ast.Subscript(value=sequence, slice=index):
                return self.value(sequence)[self.value(index)]
            case ast.ListComp() | ast.GeneratorExp():
                return list(self._comprehension(node))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*[self.value(argument) for argument in arguments])
        raise ValueError(f"not allowed here: {type(node).__name__}")

    def _binary(self, op: type[ast.operator], left: Any, right: Any) -> Any:
        # numbers only: list arithmetic would allocate before the size check
        if not (isinstance(left, int) and isinstance(right, int)):
            raise ValueError("arithmetic on something that is not a number")
        if op is ast.Pow and not 0 <= right <= 8:
            raise ValueError("a power outside 0 to 8")
        return _BINARY[op](left, right)

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp) -> Iterator[object]:
        match node.generators:
            case [ast.comprehension(target=ast.Name(id=name), iter=source, ifs=conditions, is_async=0)]:
                pass
            case _:
                raise ValueError("only one plain `for` in a comprehension")
        outer = dict(self.names)
        for item in self.value(source):
            self.names = {**outer, name: item}
            if all(self.value(condition) for condition in conditions):
                yield self.value(node.elt)
        self.names = outer


# ------------------------------------------------------------------------------------------ dialogue

_TOPICS = tuple(
    "tea coffee chess hiking jazz football rain trains cooking cycling history poetry films dogs cats birds "
    "music running winter bread dancing travel soup rivers".split()
)
_OPENERS = (
    "Do you like {t}?",
    "Hello! Shall we talk about {t}?",
    "Can you tell me something about {t}?",
    "I am so tired of {t} today.",
    "My sister loves {t}. What about you?",
    "I tried {t} yesterday and it went badly.",
    "Good morning! I was thinking of {t}.",
    "What should I know about {t}?",
    "Everybody here talks of {t}.",
    "I miss {t} so much.",
    "Is {t} worth my time?",
    "Tell me what is good about {t}.",
    "People say {t} is for the old.",
    "I never understood {t}.",
    "Today is all about {t}!",
    "Would you recommend {t}?",
)
_POLITE_STARTS = (
    "Thank you for asking!",
    "I am glad you asked.",
    "Thanks for telling me.",
    "I am sorry to hear that.",
    "You are welcome here!",
    "How kind of you to share this.",
    "I am happy to talk.",
    "Please go on.",
)
_PLAIN_STARTS = ("Well,", "Hm.", "Oh!", "Yes.", "No.", "Maybe.", "Right,", "So,", "Look,")
_BODIES = (
    "{t} {is_} {a} and {b}",
    "I find {t} {a}",
    "many people think {t} {is_} {a}",
    "{t} can be {a} on a {w} day",
    "there is something {a} in {t}",
    "I would not call {t} {a}, but it is {b}",
    "a friend of mine says {t} {is_} {b}",
    "with {t} I always feel {f}",
    "nothing beats {t} in the {d}",
)
_ENDS = (
    "What do you think?",
    "How did you begin?",
    "Please tell me more.",
    "Have a good day!",
    "Thank you!",
    "I hope that helps.",
    "Do you do it often?",
    "Who taught you?",
    "Take care.",
)
_CURT = ("No.", "Whatever.", "I do not care.", "Ask someone else.", "Boring.", "Not now.", "Who knows.", "So what?")
_WORDS = {
    "a": ("lovely", "calm", "hard", "strange", "cheap", "bright", "slow", "noble", "noisy", "gentle", "clever"),
    "b": ("useful", "old", "simple", "warm", "dull", "rich", "honest", "wild", "quiet", "healthy", "fine"),
    "f": ("free", "small", "happy", "young", "sleepy", "alive", "lucky", "safe"),
    "w": ("cold", "rainy", "long", "sunny", "lazy", "grey"),
    "d": ("morning", "evening", "autumn", "city", "garden", "company of friends"),
}
_POLITE = re.compile(r"\b(please|thank|thanks|glad|sorry|welcome|kind|happy|hope|care|good day)\b", re.IGNORECASE)


def _dialogue_problem(rng: random.Random) -> Problem:
    topic = rng.choice(_TOPICS)
    return Problem("dialogue", rng.choice(_OPENERS).format(t=topic) + "\n", topic)


def _dialogue_demonstration(problem: Problem, rng: random.Random) -> str:
    style = rng.random()
    if style < 0.15:
        return rng.choice(_CURT)
    # people sometimes drift from the topic
    topic = problem.key if rng.random() < 0.8 else rng.choice(_TOPICS)
    words = {slot: rng.choice(choices) for slot, choices in _WORDS.items()}
    body = rng.choice(_BODIES).format(t=topic, is_=_is(topic), **words)
    parts = [rng.choice(_POLITE_STARTS if style > 0.5 else _PLAIN_STARTS)] if rng.random() < 0.7 else []
    parts.append((body if parts and parts[-1].endswith(",") else body[0].upper() + body[1:]) + ".")
    if rng.random() < 0.6:
        parts.append(rng.choice(_ENDS))
    return " ".join(parts)


def _is(topic: str) -> str:
    return "are" if topic in {"trains", "films", "dogs", "cats", "birds", "rivers"} else "is"


def _dialogue_reward(problem: Problem, answer: str) -> float:
    """Return 0.4·politeness (0, 1 or 2 polite words) + 0.4·relevance (names the topic) + 0.2·length (6 to 16 words)."""
    words = len(answer.split())
    polite = min(len(_POLITE.findall(answer)), 2) / 2
    relevant = float(re.search(rf"\b{problem.key}\b", answer, re.IGNORECASE) is not None)
    length = max(0.0, 1.0 - max(6 - words, words - 16, 0) / 6)
    return 0.4 * polite + 0.4 * relevant + 0.2 * length


# ------------------------------------------------------------------------------------- all families

FAMILIES: Mapping[str, Family] = {
    "math": Family(6.0, _math_problem, lambda problem, rng: problem.key, _math_reward),
    "code": Family(2.5, _code_problem, _code_demonstration, _code_reward),
    "dialogue": Family(1.5, _dialogue_problem, _dialogue_demonstration, _dialogue_reward),
}


def _family(task: str) -> Family:
    if task not in FAMILIES:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[task]


def sample_problems(task: str, n: int, seed: int) -> list[Problem]:
    """Sample `n` problems of a family with distinct prompts.

    Raises:
        ValueError: the task is unknown, or the family has fewer prompts.
    """
    family, rng = _family(task), random.Random(f"problems {task} {seed}")
    problems: dict[str, Problem] = {}
    repeated = 0
    while len(problems) < n:
        problem = family.problem(rng)
        repeated = repeated + 1 if problem.prompt in problems else 0
        problems.setdefault(problem.prompt, problem)
        # one prompt that is missing among N equally likely ones escapes 10 N draws with probability exp(-10)
        if repeated > 1000 + 10 * len(problems):
            raise ValueError(f"n: got {n}, but the {task} family gave only {len(problems)} different prompts")
    return list(problems.values())


def corpus(n: int, seed: int) -> list[tuple[str, str]]:
    """Sample `n` demonstrations (prompt, answer), cycling through the families, to train a reference model on."""
    rng = random.Random(f"corpus {seed}")
    pairs = []
    for i in range(n):
        family = FAMILIES[TASKS[i % len(TASKS)]]
        problem = family.problem(rng)
        pairs.append((problem.prompt, family.demonstrate(problem, rng)))
    return pairs


def reward(problem: Problem, answer: str) -> float:
    """Return the true reward of an answer, in [0, 1]: 0 or 1 for math and code, graded for dialogue."""
    return _family(problem.task).reward(problem, answer)


def preference_probability(task: str, reward_a: float, reward_b: float) -> float:
    """Return P(a ≻ b) = σ(reliability·(r_a − r_b)), Bradley-Terry on the true reward."""
    logit = _family(task).reliability * (reward_a - reward_b)
    return 1.0 / (1.0 + math.exp(-logit))


def label_pairs(problem: Problem, answers: Sequence[str], n: int, rng: random.Random) -> list[dict[str, Any]]:
    """Sample labelled pairs of answers to one problem.

    Only distinct, non-empty answers of different reward are paired: between equal rewards there is no preference.
    The chosen one is sampled with `preference_probability`.

    Args:
        problem: the problem that was answered.
        answers: texts, for example sampled from a model.
        n: maximum number of pairs.
        rng: random generator.

    Returns:
        At most `n` records with prompt, chosen, rejected, task, group, reward_chosen and reward_rejected; none if all
        answers have the same reward.
    """
    rewards = {answer: reward(problem, answer) for answer in answers if answer.strip()}
    texts = sorted(rewards)
    pairs = [(a, b) for i, a in enumerate(texts) for b in texts[i + 1 :] if rewards[a] != rewards[b]]
    records = []
    for a, b in rng.sample(pairs, min(n, len(pairs))):
        wins = rng.random() < preference_probability(problem.task, rewards[a], rewards[b])
        chosen, rejected = (a, b) if wins else (b, a)
        records.append(
            {
                "prompt": problem.prompt,
                "chosen": chosen,
                "rejected": rejected,
                "task": problem.task,
                "group": problem.prompt,
                "reward_chosen": rewards[chosen],
                "reward_rejected": rewards[rejected],
            }
        )
    return records
