"""The language of a text, by its most common words. Pure. The names are those of PostgreSQL's stemmers."""

from __future__ import annotations

import re
from collections import Counter

DEFAULT = "english"
# Words that tell the languages apart; each of them is among the 50 most common ones of its language.
_COMMON = {
    "english": "the of and to in is that it for was on are with as be this by from or which you not have",
    "german": "der die und das den von zu mit sich des auf für ist nicht ein eine dem auch als wird sie oder werden im",
    "french": "le la les des et du une est que pour dans qui sur au pas vous par avec ce cette aux ou sont être",
    "spanish": "el la los las de que y en un una por con para del se no es al lo como más su pero usted",
    "italian": "il la di che e un per una non del della sono con le si dei nel alla gli come questo da al più è",
    "portuguese": "o a os as de que e do da em um uma para com não por dos das no na se é ao você mais",
    "dutch": "de het een van en in is dat op te voor met zijn niet aan er om ook als bij worden u wordt naar",
    "swedish": "och att det som en på är av för med den till inte om ett har de kan du ska från eller",
    "danish": "og at det som en på er af for med den til ikke der et har de kan du skal fra eller være",
    "norwegian": "og at det som en på er av for med den til ikke om et har de kan du skal fra eller være",
    "finnish": "ja on ei se että oli joka myös ovat tai kun mutta voi sen ole kuin jos niin tämä voit",
    "russian": "и в не на что с по как это для из от при или а но вы если к его будет можно не",
    "turkish": "ve bir bu da de için ile çok daha olarak ne gibi kadar var olan ancak veya sonra en ya",
    "hungarian": "a az és hogy nem is egy meg van vagy de ha ez el csak már lehet kell mint minden",
}
LANGUAGES = tuple(_COMMON)
_OF_WORD = {
    word: [language for language, words in _COMMON.items() if word in words.split()]
    for word in " ".join(_COMMON.values()).split()
}
_WORD = re.compile(r"[^\W\d_]+")
# Fewer common words than these are chance.
_LEAST = 3


def language(text: str) -> str:
    """The language with the most common words in the text; english for a text with few of them."""
    counts: Counter[str] = Counter()
    for word in _WORD.findall(text.lower()):
        for name in _OF_WORD.get(word, ()):
            counts[name] += 1
    best = max(counts, key=lambda name: (counts[name], name == DEFAULT), default=DEFAULT)
    return best if counts[best] >= _LEAST else DEFAULT
