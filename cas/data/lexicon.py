"""The words that fictional worlds are made of: invented names, things, and the sentences that say and ask about them, which
stand in ``wordings.txt``.

Every table is ours. Names are put together from syllables, so that no reader can know anything about their bearers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _invent(seed: str, count: int, heads: str, middles: str, tails: str) -> tuple[str, ...]:
    """``count`` names of three syllables each, the same at every call."""
    every = ["".join(parts).capitalize() for parts in product(heads.split(), middles.split(), tails.split())]
    return tuple(sorted(Random(seed).sample(every, count)))


FIRST = _invent(
    "first",
    200,
    "al be cor da el fen gri ha il jo ka lo mi ne or pa ro sa te ul vi wen",
    "la mi ra no ve",
    "n s ra la do ne th",
)
LAST = _invent(
    "last",
    400,
    "ash bran cald dor ever fal grim hol ing kel lang mar nor oak pel quar rav sten thorn und wil yar",
    "a e o i en",
    "worth ley mond stead wick drake by tham ster grove",
)
TOWNS = _invent(
    "towns",
    120,
    "ab bel cam dun esk fir gal hart inver kil lor mel nar ost pol rud sil tor ulm vel",
    "a o e u",
    "ton ford haven bury mere port dale field",
)
LANDS = _invent(
    "lands",
    60,
    "bar chal dov eth far gor hes jur kal lir mon nov",
    "a e i o",
    "via land nia ria stan mark",
)
STREETS = tuple(
    f"{name} {kind}"
    for name in _words("Copper Anchor Willow Chapel Lantern Barrel Swan Thimble Orchard Mill Saddle Bishop")
    for kind in _words("Lane Street Row Hill Yard")
)
YEARS = tuple(str(year) for year in range(1860, 1960))
COUNTS = tuple(str(n) for n in range(11, 99))

ROLES = _words(
    """
    director cook clerk driver gardener treasurer porter carpenter librarian nurse painter watchman smith tailor
    teacher secretary plumber baker printer engraver surveyor interpreter electrician messenger
    """
)
ORGANISATIONS = _words(
    """
    Mill Museum Brewery Library Theatre Hospital School Shipyard Observatory Laundry Foundry Academy Orchestra Dairy
    Printworks Quarry Cannery Hotel Archive Workshop Tannery Bakery Glassworks Nursery
    """
)
INSTRUMENTS = _words(
    """
    fiddle flute harp drum trumpet organ cello banjo zither oboe clarinet guitar bagpipes mandolin piano accordion
    trombone lute bassoon tambourine xylophone harmonica viola horn
    """
)
ANIMALS = _words(
    """
    goat parrot tortoise hedgehog raven ferret donkey canary rabbit greyhound falcon owl hamster lizard pony goose
    cat terrier magpie otter squirrel mule peacock toad
    """
)
COLLECTED = _words(
    """
    stamps buttons bells maps shells clocks keys masks coins feathers bottles spoons postcards fossils kites
    thimbles medals ribbons teapots candles pipes minerals beetles autographs
    """
)
TRADES = _words(
    """
    sailor miner actor butcher shepherd weaver glazier postman soldier barber hatter fisherman farmer lawyer
    plasterer locksmith singer saddler beekeeper dentist jockey stonemason chemist auctioneer
    """
)
SUBJECTS = _words(
    """
    botany law geometry music medicine history astronomy grammar chemistry philosophy theology geology anatomy
    economics mechanics optics zoology rhetoric statistics archaeology acoustics poetry genetics navigation
    """
)
FEARS = _words(
    """
    thunder spiders heights geese fire wolves darkness horses needles ghosts wasps snakes crowds tunnels bridges
    mice lightning cows mirrors moths rats ice ladders dogs
    """
)
DISHES = _words(
    """
    dumplings pancakes trout lentils porridge sausages pickles mushrooms pudding herring cabbage waffles lamb
    oysters noodles turnips plums cheese mutton eels omelettes custard beans pears
    """
)
SPORTS = _words(
    """
    chess archery rowing fencing skating wrestling bowls croquet swimming boxing cricket climbing darts riding
    sailing hurdles tennis billiards golf cycling fishing dominoes quoits sledging
    """
)
COLOURS = _words(
    """
    red green blue yellow brown grey white black purple orange pink golden silver crimson turquoise violet scarlet
    ivory amber indigo maroon beige olive lilac
    """
)
GOODS = _words(
    """
    paper rope soap glass nails flour cider boots barrels blankets lamps carpets saddles salt matches bricks tiles
    hats vinegar gloves baskets paint honey wire
    """
)
MATERIALS = _words(
    """
    brick timber granite slate marble limestone clay iron sandstone concrete cork oak pine flint copper thatch
    bamboo steel cedar chalk plaster basalt zinc larch
    """
)
DISASTERS = [
    "flood",
    "fire",
    "storm",
    "strike",
    "robbery",
    "epidemic",
    "landslide",
    "drought",
    "explosion",
    "earthquake",
]
PRIZES = _words(
    """
    cup goblet medal ham clock saddle barrel ribbon lantern violin wreath crown teapot shield bicycle anvil quilt
    compass telescope pig cake cannon globe hammock
    """
)


@dataclass(frozen=True)
class Attribute:
    """One thing that can be known of a subject ``{s}``, with value ``{v}``.

    Attributes:
        says: sentences of documents; the subject stands in the nominative, so that a pronoun fits.
        asks: wordings for self-study and for training readers: a question, a structuring one, a use case, a creative one.
        tests: wordings of gold questions, never used by any training of cartridges.
    """

    name: str
    values: tuple[str, ...]
    says: tuple[str, ...]
    asks: tuple[str, ...]
    tests: tuple[str, ...]


def _sections() -> dict[str, str]:
    """The parts of ``wordings.txt``, by their ``[name]``."""
    parts = re.split(r"^\[(\w+)\]\n", Path(__file__).with_name("wordings.txt").read_text(encoding="utf-8"), flags=re.M)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _table(section: str, values: Mapping[str, Sequence[str]]) -> tuple[Attribute, ...]:
    """Attributes from blocks of lines: the name, then lines that begin with ``-`` (says), ``?`` (asks) or ``!`` (tests)."""
    found = []
    for block in _SECTIONS[section].split("\n\n"):
        name, *lines = block.split("\n")
        says, asks, tests = (tuple(line[2:] for line in lines if line.startswith(mark)) for mark in "-?!")
        assert len(says) >= 3 and len(asks) >= 4 and len(tests) >= 2, name
        found.append(Attribute(name, tuple(values[name]), says, asks, tests))
    assert len(found) == len(values)
    return tuple(found)


_SECTIONS = _sections()
PERSON = _table(
    "person",
    {
        "birthplace": TOWNS,
        "birth year": YEARS,
        "instrument": INSTRUMENTS,
        "pet": ANIMALS,
        "collection": COLLECTED,
        "former trade": TRADES,
        "studies": SUBJECTS,
        "fear": FEARS,
        "dish": DISHES,
        "sport": SPORTS,
        "voyage": LANDS,
        "street": STREETS,
        "arrival": YEARS,
        "coat": COLOURS,
    },
)

PLACE = _table(
    "place",
    {
        "founding year": YEARS,
        "seat": TOWNS,
        "product": GOODS,
        "building": MATERIALS,
        "rooms": COUNTS,
        "emblem": ANIMALS,
        "door": COLOURS,
        "disaster": DISASTERS,
    },
)

EVENT = _table(
    "event",
    {"event year": YEARS, "event place": TOWNS, "winner": (), "prize": PRIZES},
)
EVENTS = _words("Lantern Harvest Winter River Goose Apple Copper Candle Kite Barrel Onion Feather")
CONTESTS = _words("Race Fair Contest Regatta Parade Tournament")

# Sentences without any fact that is asked for.
FILLERS = tuple(_SECTIONS["filler"].split("\n"))
