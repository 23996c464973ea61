"""Makes cafe.jsonl (to train on) and cafe_test.jsonl: reviews of cafés, put together from clauses that each say one thing of one aspect.

    python3 examples/design/cafe.py

The last clauses and the last names of every list are for the test only, where half of the clauses come from them: what is
measured is then not only what was learned by heart. Some sentences name an aspect and judge nothing, which is the trap of the task.
"""

import json
import random
from pathlib import Path

HELD_OUT = 2  # of each list
NAMES = {
    "dish": [
        "soup",
        "coffee",
        "apple pie",
        "omelette",
        "cheese cake",
        "lentil stew",
        "toast",
        "fish",
        "porridge",
        "lemon tart",
        "salad",
        "tea",
    ],
    "who": ["waiter", "owner", "girl at the counter", "cook", "new boy", "barista", "manager", "old lady at the till"],
    "room": ["room", "terrace", "corner by the window", "back room", "garden", "long hall", "bar", "upper floor"],
}
CLAUSES = {
    ("taste", "positive"): [
        "the {dish} was wonderful", "I could eat the {dish} every day", "the {dish} tasted like my grandmother's",
        "nobody makes a better {dish}", "the {dish} was gone in a minute, that good it was", "the {dish} was fresh and full of flavour",
        "we fought over the last of the {dish}", "the {dish} is worth the journey",
    ],
    ("taste", "neutral"): [
        "the {dish} was all right", "the {dish} was neither good nor bad", "the {dish} was what you expect",
        "the {dish} filled me up, no more", "the {dish} was average", "I have had better and worse than the {dish}",
        "the {dish} was okay", "the {dish} was decent, nothing special",
    ],
    ("taste", "negative"): [
        "the {dish} was cold", "the {dish} tasted of nothing", "I left half of the {dish}", "the {dish} was burnt",
        "the {dish} was so salty that I could not finish it", "the {dish} had gone off", "the {dish} was like cardboard",
        "the dog would not have touched the {dish}",
    ],
    ("service", "positive"): [
        "the {who} was kind to us", "the {who} remembered my name", "the {who} brought the children crayons",
        "the {who} found us a chair at once", "the {who} smiled all evening", "the {who} called us a taxi without being asked",
        "the {who} could not have been more helpful", "the {who} ran after us with my forgotten scarf",
    ],
    ("service", "neutral"): [
        "the {who} did what had to be done", "the {who} was neither friendly nor rude", "the {who} took the order and that was it",
        "the {who} was correct, if a little distant", "the {who} was busy but managed", "the {who} was fine",
        "the {who} was polite enough", "I have no strong feelings about the {who}",
    ],
    ("service", "negative"): [
        "the {who} ignored us for half an hour", "the {who} was rude", "the {who} brought the wrong order twice",
        "the {who} sighed at our questions", "the {who} forgot us", "the {who} argued with a guest over a spoon",
        "the {who} shouted at my mother", "the {who} looked at the phone all the time",
    ],
    ("price", "positive"): [
        "it was cheap", "we paid next to nothing", "you get a lot for your money", "the bill was a pleasant surprise",
        "two of us ate for ten euros", "the lunch menu is a bargain", "it costs half of what the others ask", "students can afford it",
    ],
    ("price", "neutral"): [
        "it costs what it costs elsewhere", "the prices are usual for the town", "neither cheap nor dear",
        "the bill was about what I expected", "prices are average", "the bill was in order",
        "it was no bargain and no robbery", "prices are okay",
    ],
    ("price", "negative"): [
        "it was far too dear", "nine euros for that is a joke", "they even charge for tap water", "the bill made us gasp",
        "you pay for the name", "I will have to save up before I come again", "it is a rip-off", "our wallets wept",
    ],
    ("place", "positive"): [
        "the {room} is lovely", "the {room} is full of light and flowers", "you can hear the birds in the {room}",
        "the {room} feels like home", "I could have sat in the {room} for hours", "the {room} was spotless",
        "the {room} has the best view of the river", "the {room} is as cosy as it gets",
    ],
    ("place", "neutral"): [
        "the {room} is plain", "the {room} looks like any other", "the {room} is neither pretty nor ugly",
        "the {room} is what it is", "there is not much to say about the {room}", "the {room} was average",
        "the {room} is all right", "the {room} does its job",
    ],
    ("place", "negative"): [
        "the {room} was dirty", "the {room} smelled of old fat", "one could not hear a word in the {room}",
        "the {room} was dark and draughty", "the tables in the {room} were sticky", "the {room} was freezing",
        "the {room} is falling apart", "flies were everywhere in the {room}",
    ],
}  # fmt: skip
BESIDE = [  # names an aspect, judges nothing
    "We came in because of the rain", "We ordered the {dish} and tea", "It was a Tuesday", "A friend had told us about the {dish}",
    "The {who} comes from Porto", "We sat in the {room}", "They take cards", "My sister had the {dish}",
    "The {who} wore a green apron", "The {room} seats thirty",
]  # fmt: skip
JOINED = ["{}, but {}", "{}, and {}", "{}; {}", "{}. Also, {}", "Although {}, {}"]


def one(draw: random.Random, held_out: bool) -> dict:
    """A record: one to three aspects are judged, one of twenty none."""

    def pick(items: list[str]) -> str:
        unseen = held_out and draw.random() < 0.5
        return draw.choice(items[-HELD_OUT:] if unseen else items[:-HELD_OUT])

    def filled(text: str) -> str:
        return text.format(**{key: pick(items) for key, items in NAMES.items()})

    aspects = draw.sample(["taste", "service", "price", "place"], draw.choices([0, 1, 2, 3], [1, 5, 9, 5])[0])
    said = {aspect: draw.choice(["positive", "neutral", "negative"]) for aspect in aspects}
    reasons = {aspect: filled(pick(CLAUSES[aspect, label])) for aspect, label in said.items()}
    clauses = list(reasons.values())
    sentences = [draw.choice(JOINED).format(*clauses[:2]), *clauses[2:]] if len(clauses) > 1 else clauses
    if not sentences or draw.random() < 0.4:
        sentences.insert(draw.randint(0, len(sentences)), filled(pick(BESIDE)))
    review = " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)
    return {"review": review, "said": said, "reasons": reasons}


def make(train: int = 240, test: int = 100) -> dict[str, str]:
    """The text of each file; no review occurs twice."""
    draw, found = random.Random(1), {}
    while len(found) < train + test:
        record = one(draw, held_out=len(found) >= train)
        found.setdefault(record["review"], json.dumps(record, ensure_ascii=False) + "\n")
    lines = list(found.values())
    return {"cafe.jsonl": "".join(lines[:train]), "cafe_test.jsonl": "".join(lines[train:])}


if __name__ == "__main__":
    for name, text in make().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
