"""Tells which language a text is in, by its script, by langdetect and by its function words.

It is deterministic. It knows the languages of IFEval, and Chinese; a text in another language is
unclear, or counts as the nearest relative.

A script that one language alone uses decides. Where several languages share a script, langdetect
decides between them (the library that IFEval's release asks, there without regard to the script or
to what it is sure of). It needs some length: on fewer than SHORT letters the function words have
to agree with it, or the text is unclear. Single words do not tell a language.
"""

import collections
import functools
import re
import unicodedata

from langdetect import LangDetectException, detector_factory

# A shorter text, in letters, needs two witnesses: "Come on, no drama: pizza, pasta, tea."
SHORT = 30
# langdetect's probability is the part of its seven samples that agree: all of them have to.
_SURE = 0.9
# Fewer letters tell nothing, not even a script: pi may stand in any text.
_FEWEST = 3
# It reads no more characters of a text than this.
_LONGEST = 10_000

# ISO 639-1 code: name in English.
NAMES = {
  "en": "English",
  "es": "Spanish",
  "pt": "Portuguese",
  "ar": "Arabic",
  "hi": "Hindi",
  "fr": "French",
  "ru": "Russian",
  "de": "German",
  "ja": "Japanese",
  "it": "Italian",
  "bn": "Bengali",
  "uk": "Ukrainian",
  "th": "Thai",
  "ur": "Urdu",
  "ta": "Tamil",
  "te": "Telugu",
  "bg": "Bulgarian",
  "ko": "Korean",
  "pl": "Polish",
  "he": "Hebrew",
  "fa": "Persian",
  "vi": "Vietnamese",
  "ne": "Nepali",
  "sw": "Swahili",
  "kn": "Kannada",
  "mr": "Marathi",
  "gu": "Gujarati",
  "pa": "Punjabi",
  "ml": "Malayalam",
  "fi": "Finnish",
  "zh": "Chinese",
}
# First and last code point of a block: its script, or the one language that uses it.
_SCRIPTS = {
  (0x41, 0x24F): "latin",
  (0x1E00, 0x1EFF): "latin",
  (0x400, 0x52F): "cyrillic",
  (0x590, 0x5FF): "he",
  (0x600, 0x6FF): "arabic",
  (0x750, 0x77F): "arabic",
  (0x900, 0x97F): "devanagari",
  (0x980, 0x9FF): "bn",
  (0xA00, 0xA7F): "pa",
  (0xA80, 0xAFF): "gu",
  (0xB80, 0xBFF): "ta",
  (0xC00, 0xC7F): "te",
  (0xC80, 0xCFF): "kn",
  (0xD00, 0xD7F): "ml",
  (0xE00, 0xE7F): "th",
  (0x3040, 0x30FF): "kana",
  (0x31F0, 0x31FF): "kana",
  (0x3400, 0x4DBF): "han",
  (0x4E00, 0x9FFF): "han",
  (0x20000, 0x3FFFF): "han",
  (0xAC00, 0xD7FF): "ko",
  (0x1100, 0x11FF): "ko",
  (0x3130, 0x318F): "ko",
}
# One letter of these is worth as much of a text as so many of another script.
_WEIGHTS = {"han": 3, "kana": 2, "ko": 3}
_OTHER = "other"
_URL = re.compile(r"https?://\S+")


def _words(*lines: str) -> frozenset[str]:
  return frozenset(" ".join(lines).split())


# Script: language: its commonest function words.
_WORDS = {
  "latin": {
    "en": _words(
      "the and of to is in that it for you with was this are not have be on as by or from",
      "at an we they i my your can will has its but if",
    ),
    "es": _words(
      "el la de que y los las en por con una un para es del se no como más pero está su",
      "lo al son muy todo este esta yo mi ser hay",
    ),
    "pt": _words(
      "o a os as de que e do da em um uma não para com é por mais são você dos ao no na",
      "se como seu sua muito eu isso foi das",
    ),
    "fr": _words(
      "le la les des et est une un que dans pour qui pas vous nous sur avec ce au du de",
      "il elle je en à plus sont ne cette se mais",
    ),
    "de": _words(
      "der die das und ist nicht ein eine zu den mit von für auf ich sie es im auch dem",
      "wir wie oder sich werden sind als bei aus wenn des",
    ),
    "it": _words(
      "il di che la e un una per non sono con del della è i gli le si nel anche più ma",
      "questo come da in ho mi ci lo al dei",
    ),
    "pl": _words(
      "i w nie na się jest do to że z jak ale są dla o przez jego od co tak po był być",
      "oraz który lub czy tego ma",
    ),
    "vi": _words(
      "và là của có không được cho một các những với trong người này đã để bạn tôi khi",
      "như từ đó hoặc nếu vào ra nhiều rất cũng",
    ),
    "sw": _words(
      "na ya wa ni kwa katika la za cha kama hii yake watu kuwa lakini pia sana yangu",
      "hiyo huo au mimi wewe kila hivyo baada vya yako",
    ),
    "fi": _words(
      "ja on ei se että hän oli mutta joka ovat myös kun niin tämä olen sinä minä mukaan",
      "ole voi kuin tai jos sen hänen sitä mitä ne",
    ),
  },
  "cyrillic": {
    "ru": _words(
      "и в не на что с как это по но для из он у к от я мы вы они его её то же или если",
      "так быть есть был которые при бы ты",
    ),
    "bg": _words(
      "и на да се за е от не в са че като с по ще до или това които може си този тази",
      "бъде при аз ние има но във със към",
    ),
    "uk": _words(
      "і в не на що з як це та до для у він є але я ми ви вони його або якщо так бути від",
      "про при за й також який ця",
    ),
  },
  "arabic": {
    "ar": _words(
      "في من على إلى هذا أن التي ما لا هو و كان عن مع هذه الذي كل أو هي إن قد بين لم ذلك",
      "أنا نحن بعد يمكن كما إذا",
    ),
    "fa": _words(
      "و در به از که این است را با برای می آن یک های تا بر هم من ما شما خود نیز یا اگر",
      "بود شود کرد هر دارد اما",
    ),
    "ur": _words(
      "اور کے میں کی کا سے کو ہیں ہے یہ نہیں ایک پر نے کہ وہ بھی تو ہم آپ اس کر لیے تھا",
      "یا جو گا گی ہو اپنے",
    ),
  },
  "devanagari": {
    "hi": _words(
      "है और के में की का से को हैं यह नहीं एक पर भी था कि हम आप वह इस तो लिए कर या जो हो",
      "अपने मैं थे थी",
    ),
    "mr": _words(
      "आहे आणि हे ते नाही एक आहेत तो होते या करून साठी मी तुम्ही आम्ही मध्ये पण की ही",
      "होता असे आपण किंवा जर काही आपल्या त्या खूप व",
    ),
    "ne": _words(
      "छ र को मा हो छन् पनि यो गर्न लागि भएको गर्नुहोस् तपाईं एक छैन म हामी त्यो थियो भने",
      "वा गरेको तर हुन्छ साथ सबै धेरै हुनेछ यस",
    ),
  },
}
# Script: word: how many of the script's languages have it.
_LANGUAGES_WITH = {
  script: collections.Counter(word for words in languages.values() for word in words)
  for script, languages in _WORDS.items()
}
_BREAKS = re.compile(r"[\s\d.,;:!?()\[\]{}<>\"'«»“”‘’„*#_|/\\~`+=%&@–—।॥،؛؟-]+")


def detect(text: str) -> str | None:
  """Returns the ISO 639-1 code of the language that most of the text is in; None if unclear."""
  letters = _letters(text)
  script = _main_script(letters)
  if script in NAMES:
    return script
  if script not in _WORDS:
    return None
  guess = _library_guess(letters, script)
  count = sum(_script(c) == script for c in letters)
  if count < SHORT and guess != _function_word_guess(letters, script):
    return None
  return guess


def mismatch(text: str, language: str) -> str:
  """Names what a text is in if that is clearly not the language; "" if it may be the language."""
  detected = detect(text)
  if detected == language:
    return ""
  if detected is not None:
    return NAMES[detected]
  script = _main_script(_letters(text))
  if script is None or language in _WORDS.get(script, ()):
    return ""
  return "another script" if script == _OTHER else f"the {script.capitalize()} script"


def _letters(text: str) -> str:
  """Returns the text in small letters, with every letter in its plain form and without URLs."""
  return _URL.sub(" ", unicodedata.normalize("NFKC", text).lower())


def _main_script(letters: str) -> str | None:
  """Returns the script of most of the text, or the one language that uses it; None if unclear."""
  counts = collections.Counter(_script(c) for c in letters if c.isalpha())
  if counts.total() < _FEWEST:
    return None
  weights = collections.Counter(
    {script: count * _WEIGHTS.get(script, 1) for script, count in counts.items()}
  )
  # Japanese mixes its own letters with Chinese ones; Chinese quotes a Japanese one now and then.
  is_japanese = counts["kana"] * 10 >= counts["han"]
  weights["ja" if is_japanese else "zh"] = weights.pop("kana", 0) + weights.pop("han", 0)
  return weights.most_common(1)[0][0]


@functools.lru_cache(maxsize=4096)
def _script(letter: str) -> str:
  """Returns what _SCRIPTS holds for a letter; _OTHER for one of no known script."""
  code = ord(letter)
  for (first, last), script in _SCRIPTS.items():
    if first <= code <= last:
      return script
  return _OTHER


@functools.cache
def _library():
  """Loads langdetect's profiles once; its own loader has no lock for threads that come at once."""
  factory = detector_factory.DetectorFactory()
  factory.load_profile(detector_factory.PROFILES_DIRECTORY)
  factory.seed = 0  # It samples the text: the same text gives the same answer.
  return factory


def _library_guess(letters: str, script: str) -> str | None:
  """Returns which of a script's languages langdetect is sure of; None if of none."""
  detector = _library().create()
  detector.set_prior_map(dict.fromkeys(_WORDS[script], 1.0))
  # Letters of other scripts would count for languages that are not among them.
  kept = [c if _script(c) == script or unicodedata.combining(c) else " " for c in letters]
  detector.append("".join(kept)[:_LONGEST])
  try:
    best = detector.get_probabilities()[0]
  except (LangDetectException, IndexError):  # It knows none of the text's letters.
    return None
  return best.lang if best.prob >= _SURE else None


def _function_word_guess(letters: str, script: str) -> str | None:
  """Returns the language with the most function words; None for a tie or for a single word.

  A word that several languages have counts for each of them in equal parts.
  """
  counts = collections.Counter(_BREAKS.split(letters))
  languages_with = _LANGUAGES_WITH[script]
  scores, words_found = {}, {}
  for code, words in _WORDS[script].items():
    present = [word for word in words if word in counts]
    scores[code] = sum(counts[word] / languages_with[word] for word in present)
    words_found[code] = len(present)
  best, second = sorted(scores, key=scores.get, reverse=True)[:2]
  if scores[best] == scores[second] or words_found[best] < 2:
    return None
  return best
