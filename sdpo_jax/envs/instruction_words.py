"""Holds what `instructions.py` makes its questions of: topics, requests, constraints in words.

All texts are written for this project. `{}` in a request stands for the topic; names in braces in
a wording stand for arguments of the constraint, as its kind in KINDS draws them.
"""

from collections.abc import Callable
import random
from typing import NamedTuple

TOPICS = """
a rainy afternoon; an old lighthouse; a quiet library; a busy harbour; a mountain village; the moon
a village bakery; a small garden; a winter morning; a summer storm; a long train ride; a lost key
a new bicycle; a wooden boat; a stone bridge; an apple tree; a friendly dog; a curious cat
a clever crow; a shy fox; a honey bee; a sleepy owl; a garden snail; a wild horse; a blue whale
a desert camel; a mountain goat; a hungry squirrel; an old tortoise; a flock of geese; a spider web
bread; butter; honey; rice; lemons; onions; soup; pancakes; chocolate; green tea; coffee; cheese
tomatoes; salt; pepper; mushrooms; potatoes; olive oil; ice cream; a fruit salad; a picnic
walking; swimming; running; cycling; fishing; gardening; painting; singing; dancing; reading
knitting; chess; football; hiking; sailing; cooking; camping; drawing; juggling; bird watching
learning to swim; learning a language; writing a letter; keeping a diary; planting a tree
packing a suitcase; moving house; cleaning a kitchen; saving money; waking up early; sleeping well
making friends; saying sorry; telling a joke; waiting for a bus; crossing a river; flying a kite
baking a cake; fixing a chair; washing a car; building a sandcastle; watching the stars
a piano; a violin; a drum; a guitar; a flute; a choir; a brass band; a music box; a lullaby
a pencil; a notebook; a candle; a mirror; an umbrella; a clock; a compass; a map; a blanket
a ladder; a hammer; a needle; a basket; a lantern; a teapot; a pair of boots; a pair of glasses
a telescope; a microscope; a camera; a magnet; a battery; a light bulb; a radio; a printer; a robot
a wind turbine; a water mill; a steam engine; a hot air balloon; a submarine; a tram; a lift
a volcano; a glacier; a waterfall; a coral reef; a rain forest; an island; a cave; a swamp
a meadow; a sand dune; fog; snow; frost; a rainbow; thunder; a full moon; a comet; a sunrise
a sunset; spring; autumn; a teacher; a nurse; a farmer; a postman; a baker; a firefighter
a pilot; a carpenter; a tailor; a market stall; a birthday party; a school play; a wedding
a football match; a book club; a museum; a castle; a zoo; a playground; a railway station
""".replace("\n", ";").split(";")
TOPICS = tuple(topic.strip() for topic in TOPICS if topic.strip())

REQUESTS = (
  "Tell me about {}.",
  "Write a short note about {}.",
  "Describe {} briefly.",
  "Give me one thought about {}.",
  "Write something short about {}.",
  "What is worth knowing about {}?",
  "What would you tell a child about {}?",
  "What do people like about {}?",
  "Say something nice about {}.",
  "Write a small post about {}.",
)

# For the arguments of constraints.
KEYWORDS = tuple(
  """
  morning river silver bright window summer garden letter paper village winter yellow gentle music
  market animal family corner travel simple friend colour little number quiet season street water
  happy forest golden mountain evening story kitchen orange pocket circle
  """.split()
)
COMMON_WORDS = tuple(
  "very also many can will good great important most often you people make like with from".split()
)
FIRST_WORDS = tuple(
  "Today Imagine Often Surely Perhaps Sometimes Everyone Once Honestly Remember Nothing".split()
)
ENDINGS = (
  "That is all.",
  "Have a nice day.",
  "What do you think?",
  "The end.",
  "Thank you for reading.",
  "Try it yourself!",
  "Is there anything else?",
  "And so it goes.",
)

# Sentences beside the point, for the split `adversarial`.
DISTRACTIONS = (
  "My brother asked for a poem with ten verses, but I want none of that.",
  "Yesterday I got an answer in French. Please stay with English.",
  "I am asking from a train, so the connection may be slow.",
  "Others will answer this too. I will read all the answers tonight.",
  "You need not mention that you are an assistant.",
  "The last answer I got was about something else.",
  "My teacher says that such tasks are easy.",
  "I have a meeting at three. It has nothing to do with this.",
)


class Kind(NamedTuple):
  """Describes one kind of constraint."""

  constraint: str  # of ifeval_checks.CONSTRAINTS
  group: str  # a question has at most one of a group
  draw: Callable[[random.Random], dict]  # its arguments
  wordings: tuple[str, ...]
  # Wordings of the split `adversarial`, which are indirect or unusual.
  others: tuple[str, ...]


def _nothing(rng: random.Random) -> dict:
  return {}


def _fewer_words(rng: random.Random) -> dict:
  return {"relation": "less than", "num_words": rng.choice((15, 20, 25, 30, 40))}


def _more_words(rng: random.Random) -> dict:
  return {"relation": "at least", "num_words": rng.choice((15, 20, 25, 30, 35))}


def _fewer_sentences(rng: random.Random) -> dict:
  return {"relation": "less than", "num_sentences": rng.choice((2, 3, 4))}


def _keywords(rng: random.Random) -> dict:
  return {"keywords": rng.sample(KEYWORDS, rng.choice((1, 2)))}


def _repeated(rng: random.Random) -> dict:
  return {"relation": "at least", "keyword": rng.choice(KEYWORDS), "frequency": 2}


def _forbidden(rng: random.Random) -> dict:
  return {"forbidden_words": rng.sample(COMMON_WORDS, 2)}


def _ending(rng: random.Random) -> dict:
  return {"end_phrase": rng.choice(ENDINGS)}


def _bullets(rng: random.Random) -> dict:
  return {"num_bullets": rng.choice((2, 3, 4))}


def _first_word(rng: random.Random) -> dict:
  return {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": rng.choice(FIRST_WORDS)}


KINDS = {
  "small_letters": Kind(
    "change_case:english_lowercase",
    "case",
    _nothing,
    (
      "Your entire response should be in lowercase letters.",
      "Use only lowercase letters. No capital letters are allowed.",
    ),
    (
      "Answer as somebody types whose shift key is broken: not a single capital letter.",
      "Even names and the beginnings of sentences stay small: no upper case anywhere.",
    ),
  ),
  "capitals": Kind(
    "change_case:english_capital",
    "case",
    _nothing,
    (
      "Your entire response should be in capital letters.",
      "Write everything in uppercase letters only.",
    ),
    (
      "Answer as if the caps lock key were stuck: no small letter may appear.",
      "Shout the whole answer, so that every single letter is upper case.",
    ),
  ),
  "no_comma": Kind(
    "punctuation:no_comma",
    "marks",
    _nothing,
    ("Do not use any commas.", "Your response must not contain a comma."),
    (
      "The comma key of your keyboard is missing, so do without it.",
      "Of all punctuation marks only the comma is forbidden.",
    ),
  ),
  "few_words": Kind(
    "length_constraints:number_words",
    "length",
    _fewer_words,
    ("Use less than {num_words} words.", "Answer with fewer than {num_words} words."),
    (
      "From word number {num_words} on nobody reads: stop earlier.",
      "I pay for each word, and for {num_words} of them my money is not enough.",
    ),
  ),
  "many_words": Kind(
    "length_constraints:number_words",
    "length",
    _more_words,
    ("Use at least {num_words} words.", "Your response should have at least {num_words} words."),
    (
      "Anything with a word count below {num_words} is too short for me.",
      "The minimum is {num_words} words.",
    ),
  ),
  "few_sentences": Kind(
    "length_constraints:number_sentences",
    "length",
    _fewer_sentences,
    (
      "Your response should have less than {num_sentences} sentences.",
      "Use fewer than {num_sentences} sentences.",
    ),
    (
      "Stop before you begin sentence number {num_sentences}.",
      "If I can count {num_sentences} sentences, that is one too many.",
    ),
  ),
  "bullets": Kind(
    "detectable_format:number_bullet_lists",
    "length",
    _bullets,
    (
      "Your answer must contain exactly {num_bullets} bullet points. Use markdown bullets such as: "
      "* This is a point.",
      "Answer with exactly {num_bullets} bullet points, each on a line that begins with *.",
    ),
    (
      "I want a list: {num_bullets} lines that begin with a star and a blank, no more and no less.",
      "Make it a markdown list of {num_bullets} items with stars in front.",
    ),
  ),
  "keywords": Kind(
    "keywords:existence",
    "words",
    _keywords,
    ("Include the following in your response: {keywords}.", "Use these words: {keywords}."),
    (
      "Somewhere in the text a reader should come across this: {keywords}.",
      "I will search your text for {keywords}, and I want to find it.",
    ),
  ),
  "repeated": Kind(
    "keywords:frequency",
    "words",
    _repeated,
    (
      "The word {keyword} should appear at least {frequency} times.",
      "Use the word {keyword} at least {frequency} times.",
    ),
    (
      "Let the word {keyword} come back: once is not enough.",
      "I want to read {keyword} more than once.",
    ),
  ),
  "forbidden": Kind(
    "keywords:forbidden_words",
    "words",
    _forbidden,
    ("Do not use the words {forbidden_words}.", "The words {forbidden_words} are not allowed."),
    (
      "I am tired of reading {forbidden_words}: avoid them.",
      "A filter deletes every text with one of these in it: {forbidden_words}.",
    ),
  ),
  "quotation": Kind(
    "startend:quotation",
    "frame",
    _nothing,
    (
      "Wrap your entire response with double quotation marks.",
      "Put double quotation marks around your whole response.",
    ),
    (
      'The first and the last character of your answer should both be ".',
      "Write the answer as direct speech: double quotation marks open and close it.",
    ),
  ),
  "ending": Kind(
    "startend:end_checker",
    "frame",
    _ending,
    (
      "Finish your response with this exact phrase: {end_phrase}",
      "Your response must end with the words: {end_phrase}",
    ),
    (
      "These should be the last words that I read: {end_phrase}",
      "Say goodbye with nothing but this, and add nothing after it: {end_phrase}",
    ),
  ),
  "title": Kind(
    "detectable_format:title",
    "frame",
    _nothing,
    (
      "Your answer must contain a title, wrapped in double angular brackets, such as "
      "<<a good day>>.",
      "Give it a title in double angular brackets, such as <<my title>>.",
    ),
    (
      "It needs a headline, and two < stand before the headline and two > behind it.",
      "Put << and >> around the name that you give your text.",
    ),
  ),
  "first_word": Kind(
    "length_constraints:nth_paragraph_first_word",
    "frame",
    _first_word,
    (
      "Write one paragraph that begins with the word {first_word}.",
      "Answer in a single paragraph. Its first word must be {first_word}.",
    ),
    (
      "Without a blank line anywhere, and {first_word} is how it starts.",
      "Open with {first_word}, and do not break the text into paragraphs.",
    ),
  ),
}

# What every question demands besides: a word of its topic, so that no text answers them all.
TOPIC_WORD = Kind(
  "keywords:existence",
  "topic",
  _nothing,  # the topic itself gives the word
  ("Use the word {keywords}.", "The word {keywords} must be in it."),
  (
    "I stop reading where {keywords} is not mentioned by name.",
    "It only counts if {keywords} turns up in it.",
  ),
)
