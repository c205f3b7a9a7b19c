"""The words of the story world.

Three kinds of words have a place in the world's state and can be asked for in an instruction: OBJECTS, ANIMALS and
PLACES. All others (DECOR) only colour a sentence. Every entry is one word, so that a sentence can be parsed token by
token and so that a BPE of 2,048 entries makes most words one token. No word is of two of the three kinds, and no decor
word is one of them.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BOYS = _words(
    """Ben Tom Sam Tim Jack Leo Max Dan Joe Adam Noah Luke Finn Owen Paul Peter Hugo Oscar Fred Ned Bob Alex Eric
    Ivan Carl Toby Liam Jake Ryan Kevin"""
)
GIRLS = _words(
    """Ann Mia Lucy Sue Amy Eva Zoe Ella Kate Jane Mary Nina Anna Lily Ruby Sara Emma Ida Tina Nora Clara Julia Alice
    Molly Polly Betty Rosa Maya Jill Dora"""
)
HELD_OUT_NAMES = frozenset(_words("Hugo Ned Ivan Carl Toby Kevin Ida Nora Clara Polly Maya Dora"))
GENDER = {**dict.fromkeys(BOYS, "m"), **dict.fromkeys(GIRLS, "f")}
NAMES = BOYS + GIRLS
TRAIN_NAMES = tuple(name for name in NAMES if name not in HELD_OUT_NAMES)
TEST_NAMES = tuple(name for name in NAMES if name in HELD_OUT_NAMES)

OBJECTS = _words(
    """kite ball hat book key lamp drum bell cup rope ring map box coin doll boat flute basket blanket bucket button
    candle card clock crown feather flag fork spoon hammer horn jar jug letter mirror mask needle net pen pencil
    pillow plate pot puppet purse ribbon sack scarf shell shovel stick stone sword torch toy umbrella vase wagon
    wand whistle wheel bottle broom brush camera chain coat comb cape dish fan glove marble medal picture robot
    sled violin guitar arrow helmet lantern pebble"""
)
ANIMALS = _words(
    """fox dog cat bird frog duck bear rabbit mouse owl horse pig cow goat sheep hen bee turtle squirrel lion tiger
    monkey snake wolf deer fish crab ant bat donkey kitten puppy lamb pony snail spider swan seal penguin parrot
    beaver otter goose raven camel elephant zebra lizard"""
)
PLACES = _words(
    """river park lake forest garden beach farm school market hill bridge castle barn shop cave pond field tower mill
    well church harbor island library bakery museum station village yard meadow valley fountain gate zoo dock tent
    cabin kitchen cellar fair circus stable orchard palace"""
)
KIND_OF = {**dict.fromkeys(OBJECTS, "O"), **dict.fromkeys(ANIMALS, "A"), **dict.fromkeys(PLACES, "L")}
REQUIRED = OBJECTS + ANIMALS + PLACES
"""Every word that an instruction can ask for."""

ENDINGS = ("happy", "sad", "surprising")

DECOR_TEXT = {
    "kind": """kind brave clever shy quiet funny gentle curious lazy busy polite careful strong small young cheerful
        friendly helpful smart wise bold calm tall stubborn lively patient noisy lonely generous messy""",
    "color": "red blue green yellow pink purple orange brown black white gray",
    "look": """old new shiny pretty tiny big huge dusty soft round heavy wooden lovely strange special plain fancy
        rusty smooth bright broken cheap useful perfect dirty clean ancient""",
    "trait": """hungry fluffy wild tame sleepy playful fat thin furry wet muddy quick slow tired skinny spotted hairy
        grumpy greedy fierce""",
    "mood": """excited nervous bored thirsty ready cold warm sick better dizzy restless confused jealous scared worried
        angry grateful""",
    "weather": "sunny rainy windy cloudy snowy foggy stormy hot cool dry frosty misty",
    "daytime": "morning afternoon evening day night",
    "season": "spring summer autumn winter",
    "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April June July August October December",
    "land": "Spain France India China Egypt Peru Japan Italy Norway Mexico Brazil Cuba Africa Rome Paris London",
    "food": """bread cake soup cheese rice honey jam pie butter pudding pasta salad toast popcorn candy chocolate nuts
        cookies berries apples pears plums grapes cherries carrots beans peas potatoes noodles eggs pancakes
        muffins peaches melons""",
    "drink": "water milk juice tea lemonade cocoa coffee",
    "taste": "sweet sour salty bitter spicy tasty fresh yummy delicious creamy crunchy",
    "tree": "oak pine maple apple willow birch cherry fig palm",
    "flower": "roses daisies tulips lilies poppies violets",
    "relative": "mother father sister brother grandma grandpa aunt uncle cousin neighbor family parents",
    "job": """baker farmer doctor wizard sailor soldier painter singer dancer miller hunter driver pilot clown judge
        knight witch giant fairy pirate guard nurse tailor gardener postman shepherd captain butcher barber
        builder""",
    "body": "hand arm leg foot knee nose head finger toe ear elbow shoulder chin neck thumb tail",
    "manner": """slowly quickly quietly loudly softly carefully gently proudly bravely eagerly calmly nicely neatly
        wildly safely""",
    "moved": """ran walked jumped skipped hopped marched raced rolled crept wandered hurried rushed strolled limped
        sneaked dashed""",
    "rested": """slept rested waited drank sneezed yawned stretched blinked nodded shivered sniffed hid grinned turned
        stared trembled""",
    "said": "said shouted whispered called yelled sighed added muttered gasped giggled announced joked",
    "game": "tag chess catch soccer tennis baseball football hockey golf checkers",
    "lesson": "math music art history science spelling",
    "hobby": """swimming fishing painting reading singing dancing cooking running climbing jumping skating sailing
        hiking drawing camping baking knitting sewing riding""",
    "sight": "sky sun moon stars clouds rain snow grass leaves sand mud rocks waves mountains flowers shadows",
    "number": "two three four five six seven eight nine ten eleven twelve",
    "stuff": "wood gold silver glass paper clay wool cotton leather steel iron copper straw silk rubber",
    "wear": "shirt dress jacket sweater skirt vest belt apron hood cap suit",
    "feet": "shoes boots socks sandals slippers mittens",
    "spot": "bed chair table desk sofa bench shelf cupboard stove rug door window wall stairs fence bush log ladder",
    "ride": "bus train car truck bike plane ship taxi van tractor cart",
    "noise": "bang crash splash buzz thump click boom hiss squeak roar howl knock",
    "virtue": "courage patience luck hope kindness energy trust honor strength",
    "chore": "laundry dishes homework cleaning shopping packing dusting mopping",
    "part": "beginning middle end top bottom side corner edge",
    "length": "minute hour week month while moment",
    "royal": "king queen prince princess ghost spy star hero",
    "puzzle": "riddle secret puzzle joke trick poem song tale plan idea",
    "hurt": "bumped hurt scratched twisted cut burned bruised",
}
DECOR = {slot: _words(text) for slot, text in DECOR_TEXT.items()}

AGREE = {"he": ("he", "she"), "his": ("his", "her"), "boy": ("boy", "girl"), "child": ("son", "daughter")}
"""Words that follow the gender of the sentence's subject: slot → (masculine, feminine)."""


def with_article(word: str) -> str:
    """`kite` → `a kite`, `owl` → `an owl`."""
    vowel = (word[0] in "aeiou" and word != "useful") or word == "hour"
    return ("an " if vowel else "a ") + word
