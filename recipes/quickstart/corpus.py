"""The pretraining text of the quickstart's base model: small generated pages of plain English.

A page is a few lines long: parcels that people send and questions about them, words that are copied or spelled
backwards, lists, sums. It teaches a small decoder to copy, to look things up and to count. It holds no JSON record:
that is the task kept back for the fine-tuning (task.py). Every page is a function of (seed, index).

    python recipes/quickstart/corpus.py 5        # print five pages
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ONSETS = (
    "b", "br", "d", "dr", "f", "g", "h", "j", "k", "kr", "l",
    "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w", "z",
)  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("", "", "", "l", "n", "r", "s")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey")
THINGS = ("boxes", "books", "lamps", "apples", "chairs", "cups", "bags", "stones", "keys", "coats", "pens", "shirts")
NUMBER_WORDS = {
    2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven",
    8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve",
}  # fmt: skip
PARCEL_FORMS = (
    "{sender} sends {amount} {colour} {thing} to {receiver}.",
    "{receiver} gets {amount} {colour} {thing} from {sender}.",
    "{amount} {colour} {thing} go from {sender} to {receiver}.",
    "{sender} has {amount} {colour} {thing} for {receiver}.",
    "For {receiver}, {sender} packs {amount} {colour} {thing}.",
    "{receiver} waits for {amount} {colour} {thing} of {sender}.",
)
QUESTIONS = {
    "sender": ("Who sends them?", "Whom are they from?", "from:", "sender:"),
    "receiver": ("Who gets them?", "Whom are they for?", "to:", "receiver:"),
    "count": ("How many?", "What is the number?", "count:", "number:"),
    "colour": ("Which colour?", "What colour are they?", "colour:"),
    "thing": ("What are they?", "Which things?", "thing:"),
    "item": ("What is sent?", "What does the note name?", "item:"),
}
EVAL_WORDS_ONE_IN = 5


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """Who sends how many of what to whom; the world that the corpus and the task share."""

    sender: str
    receiver: str
    count: int
    colour: str
    thing: str
    form: str
    in_words: bool

    @property
    def item(self) -> str:
        """Return what is sent, such as "red boxes"."""
        return f"{self.colour} {self.thing}"

    def sentence(self) -> str:
        """Tell the parcel as one sentence, with small numbers sometimes written out."""
        amount = NUMBER_WORDS[self.count] if self.in_words else str(self.count)
        text = self.form.format(
            sender=self.sender, receiver=self.receiver, amount=amount, colour=self.colour, thing=self.thing
        )
        return text[0].upper() + text[1:]

    def answer(self, field: str) -> str:
        """Answer one key of QUESTIONS."""
        answers = {
            "sender": self.sender,
            "receiver": self.receiver,
            "count": str(self.count),
            "colour": self.colour,
            "thing": self.thing,
            "item": self.item,
        }
        return answers[field]


def kept_for_eval(word: str) -> bool:
    """Tell whether a word in lower case is for evaluation only: in no pretraining page and in no training row."""
    return zlib.crc32(word.encode()) % EVAL_WORDS_ONE_IN == 0


def draw_word(rng: random.Random, *, for_eval: bool = False) -> str:
    """Draw a pronounceable word of two syllables, seldom three, from the evaluation's words or from all the others."""
    while True:
        syllables = 3 if rng.random() < 0.1 else 2
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))
        if kept_for_eval(word) == for_eval:
            return word


def draw_name(rng: random.Random, *, for_eval: bool = False) -> str:
    """Draw a word and capitalise it."""
    return draw_word(rng, for_eval=for_eval).capitalize()


def draw_parcel(rng: random.Random, *, for_eval: bool = False) -> Parcel:
    """Draw one parcel; sender and receiver differ."""
    sender = draw_name(rng, for_eval=for_eval)
    receiver = draw_name(rng, for_eval=for_eval)
    while receiver == sender:
        receiver = draw_name(rng, for_eval=for_eval)
    count = rng.randint(2, 12) if rng.random() < 0.5 else rng.randint(13, 99)
    return Parcel(
        sender=sender,
        receiver=receiver,
        count=count,
        colour=rng.choice(COLOURS),
        thing=rng.choice(THINGS),
        form=rng.choice(PARCEL_FORMS),
        in_words=count in NUMBER_WORDS and rng.random() < 0.7,
    )


def ask(rng: random.Random, parcel: Parcel, *, count: int) -> list[tuple[str, str]]:
    """Draw `count` questions about a parcel, each with its answer."""
    fields = rng.sample(sorted(QUESTIONS), count)
    return [(rng.choice(QUESTIONS[field]), parcel.answer(field)) for field in fields]


def parcel_page(rng: random.Random) -> str:
    """Tell a parcel and answer questions about it, one a line."""
    parcel = draw_parcel(rng)
    lines = [f"{question} {answer}" for question, answer in ask(rng, parcel, count=rng.randint(4, 6))]
    return "\n".join([parcel.sentence(), *lines])


def quoted_page(rng: random.Random) -> str:
    """Tell a parcel and answer on one line, between quotation marks or commas."""
    parcel = draw_parcel(rng)
    pairs = ask(rng, parcel, count=rng.randint(2, 5))
    if rng.random() < 0.5:
        return parcel.sentence() + " " + ", ".join(f'{question} "{answer}"' for question, answer in pairs)
    return f'{draw_name(rng)} says: "{parcel.sentence()}"\n' + ", ".join(f"{q} {a}" for q, a in pairs)


def chat_page(rng: random.Random) -> str:
    """Ask about a parcel as a conversation, written the way the tokenizer's chat template writes one."""
    parcel = draw_parcel(rng)
    pairs = ask(rng, parcel, count=2)
    first = f"<user>{parcel.sentence()} {pairs[0][0]}<eos><assistant>{pairs[0][1]}<eos>"
    return first + f"<user>{pairs[1][0]}<eos><assistant>{pairs[1][1]}"


def word_page(rng: random.Random) -> str:
    """Copy a word, write it in capitals, spell it, spell it backwards, sort its letters."""
    word = draw_word(rng)
    tricks = {
        "copy": word,
        "twice": f"{word} {word}",
        "name": word.capitalize(),
        "quote": f'"{word}"',
        "spell": " ".join(word),
        "reverse": " ".join(reversed(word)),
        "sort": " ".join(sorted(word)),
    }
    return "\n".join(f"{trick} {word}: {tricks[trick]}" for trick in rng.sample(sorted(tricks), 3))


def list_page(rng: random.Random) -> str:
    """Give a set in braces and pick from it."""
    items = [draw_word(rng) for _ in range(rng.randint(3, 5))]
    if rng.random() < 0.4:
        items = [str(rng.randint(2, 99)) for _ in items]
    lines = [f"{{{', '.join(items)}}}", f"first: {items[0]}", f"last: {items[-1]}", f"size: {len(items)}"]
    lines.append(f"reverse: {{{', '.join(reversed(items))}}}")
    lines.append(f"in quotes: {{{', '.join(repr_quoted(item) for item in items)}}}")
    return "\n".join([lines[0], *rng.sample(lines[1:], 3)])


def repr_quoted(text: str) -> str:
    """Put a word between double quotation marks."""
    return f'"{text}"'


def lookup_page(rng: random.Random) -> str:
    """Give pairs of words, then ask for some of the partners again."""
    pairs = [(draw_word(rng), draw_word(rng)) for _ in range(rng.randint(2, 4))]
    table = "; ".join(f"{key}: {value}" for key, value in pairs)
    asked = [rng.choice(pairs) for _ in range(2)]
    return "\n".join([table, *(f"{key}: {value}" for key, value in asked)])


def number_page(rng: random.Random) -> str:
    """Add, compare, and name numbers."""
    lines = []
    for _ in range(3):
        left, right = rng.randint(2, 12), rng.randint(2, 12)
        lines.append(f"{left} + {right} = {left + right}")
        lines.append(f"{NUMBER_WORDS[left]} is {left}, the larger of {{{left}, {right}}} is {max(left, right)}")
    return "\n".join(rng.sample(lines, 3))


PAGE_KINDS: tuple[tuple[Callable[[random.Random], str], float], ...] = (
    (parcel_page, 0.35),
    (quoted_page, 0.25),
    (chat_page, 0.10),
    (word_page, 0.05),
    (list_page, 0.10),
    (lookup_page, 0.10),
    (number_page, 0.05),
)


def page(seed: int, index: int) -> str:
    """Write one page; the same (seed, index) gives the same text everywhere."""
    rng = random.Random(f"{seed}/{index}")
    makers, weights = zip(*PAGE_KINDS, strict=True)
    maker: Callable[[random.Random], str] = rng.choices(makers, weights)[0]
    return maker(rng)


def pages(seed: int, count: int, *, start: int = 0) -> Iterator[str]:
    """Write `count` pages, the first of them with index `start`."""
    return (page(seed, index) for index in range(start, start + count))


if __name__ == "__main__":
    print("\n---\n".join(pages(0, int(sys.argv[1]) if len(sys.argv) > 1 else 3)))
