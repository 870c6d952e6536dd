"""Short reviews of five kinds of things: real words, written here, that never change.

Every review is put together from sentences below. Most of it is about its own kind, but some says
nothing of the kind, some strays to another one, and a few reviews are filed under the wrong one, so
that nothing can be told for certain. The same arguments give the same texts on every machine.
"""

from __future__ import annotations

import numpy as np

KINDS = ("film", "restaurant", "hotel", "book", "phone")

# For each kind: what the sentences are about, and what can be said of it.
_SUBJECTS = {
    "film": ["the leading actor", "the camera work", "the final scene", "the soundtrack"]
    + ["the director", "the cast", "the opening sequence", "the dialogue on screen"],
    "restaurant": ["the soup", "our waiter", "the grilled fish", "the wine list"]
    + ["the dessert", "the kitchen", "the table by the door", "the bread"],
    "hotel": ["the bed", "the front desk", "our room", "the bathroom"]
    + ["the view from the balcony", "the pool", "the lift", "the breakfast hall"],
    "book": ["the first chapter", "the author", "the plot", "the narrator"]
    + ["the last page", "the translation", "the main character", "the prose"],
    "phone": ["the battery", "the screen", "the charger", "the camera"]
    + ["the latest update", "the speaker", "the keyboard", "the signal"],
}
_PRAISE = [
    "{} was better than I had hoped",
    "{} is simply excellent",
    "I have rarely been so pleased with {}",
    "{} made up for everything else",
    "I could not stop talking about {}",
    "{} deserves every bit of praise",
    "everyone agreed that {} was lovely",
]
_BLAME = [
    "{} was a great disappointment",
    "{} is not worth the money",
    "I still cannot forgive {}",
    "{} let the rest down",
    "I expected much more from {}",
    "{} got worse the longer it went on",
    "nobody had a good word for {}",
]
_ASIDES = [
    "I had waited for this since spring",
    "my sister had told me to try it",
    "it was raining, which may have clouded my judgement",
    "the price is what one would expect",
    "I will keep this short",
    "we were four, and two of us were tired",
    "others may well see it differently",
    "this is the second time I write about it",
    "I went back in October to make sure",
]


def reviews(n_per_class: int, n_classes: int = 3, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Write reviews.

    Returns
    -------
    texts : list of str of length n_per_class * n_classes
        All different, in an order that tells nothing.
    kinds : ndarray of shape (n_texts,), int
        What each is filed under, a number below ``n_classes``; see `KINDS`.
    """
    random = np.random.RandomState(seed)  # its numbers are the same in every NumPy
    written: dict[str, int] = {}
    for kind in np.repeat(np.arange(n_classes), n_per_class):
        while (text := _review(random, kind, n_classes)) in written:
            pass
        stray = random.random_sample() < 0.04
        written[text] = int((kind + stray) % n_classes)
    order = random.permutation(len(written))
    texts, kinds = list(written), np.array(list(written.values()))
    return [texts[i] for i in order], kinds[order]


def _review(random: np.random.RandomState, kind: int, n_classes: int) -> str:
    sentences = [_opinion(random, kind)]
    for _ in range(random.randint(1, 4)):
        chance = random.random_sample()
        if chance < 0.4:
            sentences.append(_opinion(random, kind))
        elif chance < 0.9:
            sentences.append(_one_of(random, _ASIDES))
        else:
            sentences.append(_opinion(random, random.randint(n_classes)))
    order = random.permutation(len(sentences))
    return " ".join(f"{sentences[i][0].upper()}{sentences[i][1:]}." for i in order)


def _opinion(random: np.random.RandomState, kind: int) -> str:
    opinion = _one_of(random, _one_of(random, [_PRAISE, _BLAME]))
    return opinion.format(_one_of(random, _SUBJECTS[KINDS[kind]]))


def _one_of(random: np.random.RandomState, options: list):
    return options[random.randint(len(options))]
