"""Short reviews of three kinds of things: real words, written here, that never change.

Every review is put together from sentences below. Most of it is about its own kind, but some says
nothing of the kind, some strays to another one, and a few reviews are filed under the wrong one, so
that nothing can be told for certain. The same arguments give the same texts on every machine.
"""

import numpy as np

# What the sentences are about: a film, a restaurant, a hotel.
_SUBJECTS = [
    ["the leading actor", "the camera work", "the final scene", "the soundtrack"]
    + ["the director", "the cast", "the opening sequence", "the dialogue on screen"],
    ["the soup", "our waiter", "the grilled fish", "the wine list"]
    + ["the dessert", "the kitchen", "the table by the door", "the bread"],
    ["the bed", "the front desk", "our room", "the bathroom"]
    + ["the view from the balcony", "the pool", "the lift", "the breakfast hall"],
]
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


def reviews(n_per_class, n_classes=3, seed=0):
    """Write texts, all different and in no order, and say under which kind each is filed."""
    random = np.random.RandomState(seed)  # its numbers are the same in every NumPy

    def one_of(options):
        return options[random.randint(len(options))]

    def opinion(kind):
        sentence = one_of(one_of([_PRAISE, _BLAME]))
        return sentence.format(one_of(_SUBJECTS[kind]))

    def review(kind):
        sentences = [opinion(kind)]
        for _ in range(random.randint(1, 4)):
            chance = random.random_sample()
            if chance < 0.4:
                sentences.append(opinion(kind))
            elif chance < 0.9:
                sentences.append(one_of(_ASIDES))
            else:
                sentences.append(opinion(random.randint(n_classes)))
        order = random.permutation(len(sentences))
        return " ".join(f"{sentences[i][0].upper()}{sentences[i][1:]}." for i in order)

    filed = {}
    for kind in np.repeat(np.arange(n_classes), n_per_class):
        while (text := review(kind)) in filed:
            pass
        filed[text] = int((kind + (random.random_sample() < 0.04)) % n_classes)
    order = random.permutation(len(filed))
    texts, kinds = list(filed), np.array(list(filed.values()))
    return [texts[i] for i in order], kinds[order]
