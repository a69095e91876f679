"""Instructions: every constraint followed and broken, the languages, and every IFEval row."""

import concurrent.futures
import json
import os
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from sdpo_jax.envs import language
from sdpo_jax.envs.ifeval import IFEval
from sdpo_jax.envs.ifeval_checks import CONSTRAINTS, OPTIONS, sentences
from sdpo_jax.records import Status, Task

_DATA = os.environ.get("SDPO_JAX_DATA")
needs_data = pytest.mark.skipif(_DATA is None, reason="SDPO_JAX_DATA is unset: no IFEval rows")

CASES = {  # constraint: (arguments, texts that follow it, texts that break it with what is said)
  "change_case:capital_word_frequency": (
    {"capital_frequency": 2, "capital_relation": "at least"},
    ["A BIG WELL-KNOWN fact", "NASA and the U.S. agree"],
    [("One BIG fact", "has 1 words in capital")],
  ),
  "change_case:english_capital": (
    {},
    ["THIS IS THE ANSWER."],
    [("This IS the ANSWER.", "small letters"), ("DAS IST NICHT DIE ANTWORT.", "in German")],
  ),
  "change_case:english_lowercase": (
    {},
    ["this is the answer."],
    [("this is the Answer.", "capital letters"), ("das ist nicht die antwort.", "in German")],
  ),
  "combination:repeat_prompt": (
    {"prompt_to_repeat": "Say (it)."},
    ["say (it).\nIt."],
    [("Sure: Say (it).", "does not begin with the request")],
  ),
  "combination:two_responses": (
    {},
    ["one\n******\ntwo", "******one******two******"],
    [
      ("one", "holds 1 answers"),
      ("a******a", "are the same"),
      ("a******b******c", "holds 3"),
      ("a************b", "nothing between"),
    ],
  ),
  "detectable_content:number_placeholders": (
    {"num_placeholders": 2},
    ["[name], [address]"],
    [("[name]", "has 1 placeholders")],
  ),
  "detectable_content:postscript": (
    {"postscript_marker": "P.P.S"},
    ["Bye.\nP.P.S. More", "p. p. s more"],
    [("Bye. P.S. More", "no postscript that begins with P.P.S")],
  ),
  "detectable_format:constrained_response": (
    {},
    ["My answer is maybe."],
    [("Maybe.", "none of: My answer is yes.")],
  ),
  "detectable_format:json_format": (
    {},
    ['```json\n{"a": 1}\n```', "[1, 2]"],
    [("{a: 1}", "not JSON"), ('Here: {"a": 1}', "not JSON"), ("[" * 100000, "not JSON")],
  ),
  "detectable_format:multiple_sections": (
    {"section_spliter": "SECTION", "num_sections": 2},
    ["SECTION 1\na\nSECTION 2\nb"],
    [("Section 1\nSECTION 2", "has 1 sections")],
  ),
  "detectable_format:number_bullet_lists": (
    {"num_bullets": 2},
    ["* a\n* b", "- a\n  * b"],
    [("* a", "has 1 bullet"), ("* a\n* b\n- c", "has 3 bullet")],
  ),
  "detectable_format:number_highlighted_sections": (
    {"num_highlights": 2},
    ["*a* and *b*", "**a** **b**"],
    [("*a* and b", "has 1 highlighted"), ("* * and *a*", "has 1 highlighted")],
  ),
  "detectable_format:title": (
    {},
    ["<<a title>>\ntext"],
    [("<<>> text", "no title"), ("<title>", "no title")],
  ),
  "keywords:existence": (
    {"keywords": ["mom", "C++"]},
    ["My Mom knows c++."],
    [("My mother knows C++", "contain 'mom'.")],
  ),
  "keywords:forbidden_words": (
    {"forbidden_words": ["rock", "sad"]},
    ["rocks, sadly"],
    [("A Rock.", "contains 'rock'.")],
  ),
  "keywords:frequency": (
    {"keyword": "war", "frequency": 2, "relation": "at least"},
    ["War and war"],
    [("war", "has 1 occurrences of 'war'; it must have at least 2")],
  ),
  "keywords:letter_frequency": (
    {"letter": "t", "let_frequency": 2, "let_relation": "less than"},
    ["The sea"],
    [("That", "has 2 occurrences of the letter 't'")],
  ),
  "language:response_language": (
    {"language": "de"},
    ["Das ist die Antwort."],
    [("This is the answer.", "in English; it must be in German")],
  ),
  "length_constraints:nth_paragraph_first_word": (
    {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "it"},
    ["One.\n\n\"It's two."],
    [("One.\n\nTwo.", "begins with 'two'"), ("It", "has 1 paragraphs")],
  ),
  "length_constraints:number_paragraphs": (
    {"num_paragraphs": 2},
    ["one\n***\ntwo", "***\none\n***\ntwo\n***"],
    [("one\n\ntwo", "has 1 paragraphs"), ("a\n***\n***\nb", "nothing between")],
  ),
  "length_constraints:number_sentences": (
    {"num_sentences": 2, "relation": "at least"},
    ["One. Two!", "Is it? Yes."],
    [("Mr. A. Smith of e.g. Rome paid 3.5 dollars.", "has 1 sentences")],
  ),
  "length_constraints:number_words": (
    {"num_words": 3, "relation": "less than"},
    ["two words"],
    [("now three words", "has 3 words; it must have less than 3")],
  ),
  "punctuation:no_comma": ({}, ["none; here"], [("one, two, three", "has 2 commas")]),
  "startend:end_checker": (
    {"end_phrase": "Any questions?"},
    ["So. Any questions?", '"So. any questions?"\n'],
    [("Any questions? No.", "does not end with: Any questions?")],
  ),
  "startend:quotation": (
    {},
    ['"all of it"'],
    [('"part" of it', "not wrapped"), ('"', "not wrapped")],
  ),
}
FLIPS = {  # constraint: a text that follows it, and one that differs in one character and does not
  "change_case:capital_word_frequency": ("NASA's plan, FBI's plan", "NASa's plan, FBI's plan"),
  "change_case:english_capital": ("THIS IS THE ANSWER.", "THIS IS ThE ANSWER."),
  "change_case:english_lowercase": ("this is the answer.", "this is thE answer."),
  "combination:repeat_prompt": ("Say (it). Yes.", "Say [it). Yes."),
  "combination:two_responses": ("a******b", "a******a"),
  "detectable_content:number_placeholders": ("[a] and [b]", "[a] and [ ]"),
  "detectable_content:postscript": ("Bye. P.P.S. x", "Bye. P.R.S. x"),
  "detectable_format:constrained_response": ("My answer is no.", "My answer is no!"),
  "detectable_format:json_format": ('{"a": 1}', '{"a": a}'),
  "detectable_format:multiple_sections": ("SECTION 1 a SECTION 2 b", "SECTION 1 a SECTION 1 b"),
  "detectable_format:number_bullet_lists": ("- a\n- b", "- a\n--b"),
  "detectable_format:number_highlighted_sections": ("*a* and **b**", "*a* and ** **"),
  "detectable_format:title": ("<<a>>", "<< >>"),
  "keywords:existence": ("mom writes C++", "mom writes C+-"),
  "keywords:forbidden_words": ("the rocks", "the rock."),
  "keywords:frequency": ("war and warm", "war and worm"),
  "keywords:letter_frequency": ("the sea", "the set"),
  # Most of the letters decide: three Latin ones of five, or two.
  "language:response_language": ("Jaa де", "Jaг де"),
  "length_constraints:nth_paragraph_first_word": ("\n\nOne.\n\nIt is.", "\n\nOne.\n\nIs is."),
  "length_constraints:number_paragraphs": ("a\n***\nb", "a\n**_\nb"),
  "length_constraints:number_sentences": ("It is. So be it.", "It is, So be it."),
  "length_constraints:number_words": ("two-words", "two-w rds"),
  "punctuation:no_comma": ("here; there", "here, there"),
  "startend:end_checker": ("So. Any questions?", "So. Any questions!"),
  "startend:quotation": ('"all of it"', '"all of it.'),
}
# Hostile texts: (constraint, arguments, text, is it followed?).
HOSTILE = [
  (name, arguments, text, followed)
  for name, arguments, texts in [
    (
      "length_constraints:nth_paragraph_first_word",
      {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "hi"},
      {
        "\n\nHi there.\n\nBye.": True,
        "Hi there.\n\n\n\n\nBye.": True,
        "Hi there.\n \t\nBye.": True,
        "Hi there.\r\n\r\nBye.": True,
        "**Hi** there.\n\nBye.": True,
        "# Hi\n\nBye.": True,
        "“Hi”\n\nBye.": True,
        "High.\n\nBye.": False,
        "Hi there.\nBye.": False,
        "\n\nBye.\n\nHi there.": False,
        "***\n\nHi.": False,
      },
    ),
    (
      "length_constraints:nth_paragraph_first_word",
      {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "don't"},
      {"Don't go.": True, "Don’t go.": True, "Don Quixote": False},
    ),
    (
      "length_constraints:number_paragraphs",
      {"num_paragraphs": 2},
      {"***Title***\na\n***\nb": True, "***Title***\nb": False, "a\n****\nb": False},
    ),
    (
      "length_constraints:number_words",
      {"num_words": 2, "relation": "less than"},
      {"नमस्ते": True, "می\u200cدود": True, "e\u0301te\u0301": True, "a b": False, "": True},
    ),
    (
      "length_constraints:number_sentences",
      {"num_sentences": 2, "relation": "at least"},
      {
        "你好。再见。": True,
        "यह है।वह है।": True,
        "هل أنت هنا؟ نعم.": True,
        "ہاں۔ نہیں۔": True,
        "Version 1.2.3 is out.": False,
        "Items:\n1. a": False,
        "?!?! ... !!!": False,
      },
    ),
    (
      "keywords:forbidden_words",
      {"forbidden_words": ["C++", "rock", "New York", "नम"]},
      {
        "C is old": True,
        "C++ is old": False,
        "(C++)": False,
        "ro\u200bck": False,
        "ro\u00adck": False,
        "ROCK": False,
        "bedrock": True,
        "rock_band": True,
        "New\nYork": False,
        "नमस्ते": True,
      },
    ),
    (
      "keywords:existence",
      {"keywords": ["café"]},
      {"A CAFÉ": True, "a cafe\u0301": True, "ca\u2060fé": True, "a cafe": False},
    ),
    (
      "keywords:frequency",
      {"keyword": ".", "frequency": 2, "relation": "at least"},
      {"a.b.": True, "abcd": False},
    ),
    (
      "change_case:capital_word_frequency",
      {"capital_frequency": 2, "capital_relation": "at least"},
      {
        "NASA's plan and the FBI's": True,
        "NASA’s and I’m": True,
        "DON'T": False,
        "O'Brien and McDONALD": False,
        "A B": True,
      },
    ),
    (
      "change_case:capital_word_frequency",
      {"capital_frequency": 1, "capital_relation": "less than"},
      {"NASA's plan": False, "nasa's plan": True, "12 34": True},
    ),
    (
      "change_case:english_capital",
      {},
      {"NO, ME FIRST!": True, "123": False, "ВСЕ НА МЕСТЕ": False},
    ),
    (
      "change_case:english_lowercase",
      {},
      {"come on, no drama: pizza, pasta, tea.": True, "!?": False, "όλα καλά": False},
    ),
    (
      "detectable_content:number_placeholders",
      {"num_placeholders": 1},
      {"[]": False, "[ ]": False, "[a\nb]": False, "[[a]]": True},
    ),
    (
      "detectable_content:postscript",
      {"postscript_marker": "P.S."},
      {
        "Bye.\nP.S. More": True,
        "bye p. s. more": True,
        "Bye.\nP.P.S. More": False,
        "Give me the map. S. waits.": False,
        "ps more": False,
      },
    ),
    (
      "detectable_content:postscript",
      {"postscript_marker": "PS:"},
      {"Bye. PS: x": True, "Tips: x": False},
    ),
    (
      "detectable_format:constrained_response",
      {},
      {" ".join(OPTIONS): False, OPTIONS[1] * 2: True},
    ),
    (
      "detectable_format:json_format",
      {},
      {
        "NaN": False,
        "[Infinity]": False,
        "1" * 5000: True,
        "```": False,
        "\ufeff[1]": True,
        '"\\ud800"': True,
      },
    ),
    (
      "detectable_format:multiple_sections",
      {"section_spliter": "Section", "num_sections": 2},
      {
        "Section 1 as Section 1 said": False,
        "Section 1 Section 2": True,
        "SubSection 1 Section 2": False,
        "Section1 Section2": True,
      },
    ),
    (
      "detectable_format:number_bullet_lists",
      {"num_bullets": 2},
      {
        "* a\n* b\n---\nend": True,
        "*Note* this:\n- a\n- b": True,
        "* *a*\n* **b**": True,
        "*a\n*b": True,
        "* \n* ": False,
        "-\n-": False,
        "*\n* a\n* b": True,
        "**a**\n**b**": False,
        "- - -\n* * *": False,
      },
    ),
    (
      "detectable_format:number_highlighted_sections",
      {"num_highlights": 2},
      {
        "* an item **a**": False,
        "***a***": False,
        "2 * 3 * 4 * 5": False,
        "* *a*\n* *b*": True,
        "**** ****": False,
        "*a\nb* *c*": False,
        "**a**b*c*": True,
      },
    ),
    (
      "detectable_format:title",
      {},
      {"<<>>": False, "<<a\nb>>": False, "<<<a>>>": True, ">>a<<": False},
    ),
    (
      "combination:two_responses",
      {},
      {"a******b******": True, "a *** b": False, "a******\u200b": False, "a****** a": False},
    ),
    (
      "combination:repeat_prompt",
      {"prompt_to_repeat": "Say\ncafé"},
      {"say\r\ncafe\u0301 yes": True, "say café": False},
    ),
    (
      "startend:end_checker",
      {"end_phrase": "all."},
      {"That is all.": True, "It is small.": False, '"That is all. "': True, "all": False},
    ),
    ("startend:end_checker", {"end_phrase": 'He said "no"'}, {'So he said "no"': True}),
    (
      "startend:quotation",
      {},
      {"“a”": True, "„a“": True, "“a“": False, '""': False, '" "': False, "'a'": False},
    ),
    (
      "punctuation:no_comma",
      {},
      {"a，b": False, "أ، ب": False, "一、二": False, "a; b's „c“": True},
    ),
    (
      "language:response_language",
      {"language": "hi"},
      {"Zyx qwv": False, "Γειά σου": False, "123": True, "Yes, of course I do.": False},
    ),
  ]
  for text, followed in texts.items()
]
SAYINGS = {
  "en": "The weather is nice and we are going to the park with our friends.",
  "es": "El tiempo es bueno y vamos al parque con los amigos para jugar.",
  "pt": "O tempo está bom e nós vamos ao parque com os amigos para jogar uma partida.",
  "fr": "Le temps est beau et nous allons au parc avec des amis pour jouer.",
  "de": "Das Wetter ist schön und wir gehen mit den Freunden in den Park.",
  "it": "Il tempo è bello e noi andiamo al parco con gli amici per giocare.",
  "pl": "Pogoda jest ładna i idziemy do parku z przyjaciółmi, bo to nie jest daleko.",
  "vi": "Thời tiết đẹp và chúng tôi đi đến công viên với những người bạn của tôi.",
  "sw": "Hali ya hewa ni nzuri na sisi tunakwenda katika bustani kwa ajili ya michezo.",
  "fi": "Sää on kaunis ja me menemme puistoon, mutta se ei ole kaukana.",
  "ru": "Погода хорошая, и мы идём в парк с друзьями, но это не так далеко, как кажется.",
  "bg": "Времето е хубаво и ние отиваме в парка с приятели, за да се разходим.",
  "uk": "Погода гарна, і ми йдемо до парку з друзями, але це не так далеко, як здається.",
  "ar": "الطقس جميل و نحن ذاهبون إلى الحديقة مع الأصدقاء من أجل هذا اليوم",
  "fa": "هوا خوب است و ما با دوستان به پارک می رویم که این روز را خوش باشیم",
  "ur": "موسم اچھا ہے اور ہم دوستوں کے ساتھ پارک میں جا رہے ہیں",
  "hi": "मौसम अच्छा है और हम दोस्तों के साथ पार्क में जा रहे हैं।",
  "mr": "हवामान छान आहे आणि आम्ही मित्रांसोबत उद्यानात जात आहोत, पण ते दूर नाही.",
  "ne": "मौसम राम्रो छ र हामी साथीहरूसँग पार्क जाँदै छौं तर यो टाढा छैन।",
  "bn": "আবহাওয়া ভালো এবং আমরা বন্ধুদের সাথে পার্কে যাচ্ছি।",
  "pa": "ਮੌਸਮ ਚੰਗਾ ਹੈ ਅਤੇ ਅਸੀਂ ਦੋਸਤਾਂ ਨਾਲ ਪਾਰਕ ਜਾ ਰਹੇ ਹਾਂ।",
  "gu": "હવામાન સારું છે અને અમે મિત્રો સાથે પાર્કમાં જઈ રહ્યા છીએ.",
  "ta": "வானிலை நன்றாக உள்ளது, நாங்கள் நண்பர்களுடன் பூங்காவிற்கு செல்கிறோம்.",
  "te": "వాతావరణం బాగుంది మరియు మేము స్నేహితులతో పార్కుకు వెళ్తున్నాము.",
  "kn": "ಹವಾಮಾನ ಚೆನ್ನಾಗಿದೆ ಮತ್ತು ನಾವು ಸ್ನೇಹಿತರೊಂದಿಗೆ ಉದ್ಯಾನವನಕ್ಕೆ ಹೋಗುತ್ತಿದ್ದೇವೆ.",
  "ml": "കാലാവസ്ഥ നല്ലതാണ്, ഞങ്ങൾ സുഹൃത്തുക്കളോടൊപ്പം പാർക്കിൽ പോകുന്നു.",
  "th": "อากาศดีและเราจะไปสวนสาธารณะกับเพื่อน",
  "he": "מזג האוויר יפה ואנחנו הולכים לפארק עם חברים.",
  "ko": "날씨가 좋아서 우리는 친구들과 공원에 갑니다.",
  "ja": "天気がいいので、友達と公園に行きます。",
  "zh": "天气很好，我们和朋友一起去公园。",
}


def task(*names):
  return IFEval().task_from_row(
    {
      "idx": 0,
      "key": 1,
      "prompt": "Do it.",
      "instruction_id_list": list(names),
      "kwargs": [CASES[n][0] for n in names],
    },
    "test",
  )


def test_every_constraint_has_a_case():
  assert CASES.keys() == CONSTRAINTS.keys() and len(CASES) == 25


@pytest.mark.parametrize("name", CASES)
def test_followed_and_broken(name):
  _, follow, broken = CASES[name]
  for text in follow:
    assert IFEval().judge(task(name), text).reward == 1.0, text
    assert IFEval().judge(task(name), f"<think>{broken[0][0]}</think>{text}").reward == 1.0
  for text, says in broken:
    feedback = IFEval().judge(task(name), text)
    assert feedback.reward == 0.0 and feedback.status is Status.SCORED
    assert (
      feedback.text.startswith(f"1 of 1 constraints is not followed:\n- {name}: ")
      and says in feedback.text
    )
  for text, says in (
    ("", "The response is empty."),
    (" \n", "The response is empty."),
    (f"<think>{follow[0]}", "thinking"),
  ):
    feedback = IFEval().judge(task(name), text)
    assert feedback.reward == 0.0 and says in feedback.text


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_one_character_decides(name):
  follows, breaks = FLIPS[name]
  assert IFEval().judge(task(name), follows).reward == 1.0
  assert sum(a != b for a, b in zip(follows, breaks, strict=True)) == 1
  assert IFEval().judge(task(name), breaks).reward == 0.0


@pytest.mark.parametrize("name, arguments, text, followed", HOSTILE)
def test_hostile_texts(name, arguments, text, followed):
  row = {"idx": 0, "prompt": "p", "instruction_id_list": [name], "kwargs": [arguments]}
  feedback = IFEval().judge(IFEval().task_from_row(row, "test"), text or "?")
  assert (feedback.reward == 1.0) == followed, feedback


@pytest.mark.parametrize("text", ["\u200b", " \ufeff\u2060\n", "</think>\u00ad"])
def test_a_response_that_prints_nothing_is_empty(text):
  feedback = IFEval().judge(task("punctuation:no_comma"), text)
  assert feedback.reward == 0.0 and feedback.text == "The response is empty."


def test_all_constraints_must_be_followed_and_the_broken_ones_are_named():
  three = task("punctuation:no_comma", "detectable_format:title", "startend:quotation")
  feedback = IFEval().judge(three, "<<t>> a, b")
  assert feedback.reward == 0.0 and feedback.text.split("\n") == [
    "2 of 3 constraints are not followed:",
    "- punctuation:no_comma: the response has 1 commas; it must have none.",
    "- startend:quotation: the response is not wrapped in double quotation marks.",
  ]
  assert IFEval().judge(three, '"<<t>> a b"').reward == 1.0
  assert (
    IFEval().prompt(three) == [{"role": "user", "content": "Do it."}]
    and three.id == "ifeval/test/1"
  )


@pytest.mark.parametrize(
  "change, says",
  [
    ({"instruction_id_list": ["no:such"]}, "'no:such' is unknown"),
    ({"instruction_id_list": []}, "'kwargs' has 1 entries for 0"),
    ({"kwargs": [{}, {}]}, "'kwargs' has 2 entries for 1"),
    ({"kwargs": [{}]}, "'kwargs' of length_constraints:number_words.*num_words"),
    ({"kwargs": [{"num_words": 3, "relation": "at most"}]}, "relation is 'at most'"),
    ({"kwargs": [{"num_words": 3, "relation": "at least", "x": 1}]}, "'kwargs'.*'x'"),
    ({"prompt": None}, "'prompt' is missing"),
    ({"kwargs": "{}"}, "'kwargs' is of type str"),
  ],
)
def test_a_malformed_row_names_its_field(change, says):
  row = {
    "idx": 0,
    "prompt": "p",
    "instruction_id_list": ["length_constraints:number_words"],
    "kwargs": [{"num_words": 3, "relation": "at least", "first_word": None}],
  }
  assert IFEval().task_from_row(row, "test").id == "ifeval/test/0"
  with pytest.raises(ValueError, match=says):
    IFEval().task_from_row(row | change, "test")


# Arguments that are refused: (constraint, change of CASES' arguments, what is said).
NAN = float("nan")
WRONG_ARGUMENTS = [
  *[
    ("length_constraints:number_words", {"num_words": value}, "num_words is .* whole number")
    for value in ("3", 0, -1, 2.5, True, float("inf"), [3], {}, "three")
  ],
  ("detectable_format:number_bullet_lists", {"num_bullets": -1}, "at least 0"),
  ("keywords:frequency", {"frequency": 0}, "frequency is 0"),
  ("length_constraints:number_words", {"num_words": NAN}, "missing .*'num_words'"),
  *[
    ("keywords:existence", {"keywords": value}, "keywords is .* a list|keywords is or holds")
    for value in ("abc", [], {"abc": 1}, [""], ["a", None], [" "], ["a", 3], 3, ["\u200b"])
  ],
  ("keywords:forbidden_words", {"forbidden_words": "abc"}, "not a list"),
  ("keywords:frequency", {"keyword": ""}, "keyword is or holds"),
  ("keywords:frequency", {"keyword": ["war"]}, "keyword is or holds"),
  ("keywords:frequency", {"relation": ["at least"]}, "relation is or holds"),
  ("keywords:letter_frequency", {"letter": "th"}, "not one character"),
  ("keywords:letter_frequency", {"letter": " "}, "letter is or holds"),
  ("keywords:letter_frequency", {"letter": 7}, "letter is or holds"),
  ("keywords:letter_frequency", {"let_relation": "more than"}, "let_relation is 'more than'"),
  ("language:response_language", {"language": "xx"}, "language is 'xx'; choose from .*'de'"),
  ("language:response_language", {"language": "German"}, "language is 'German'"),
  ("combination:repeat_prompt", {"prompt_to_repeat": " "}, "prompt_to_repeat is or holds"),
  ("startend:end_checker", {"end_phrase": ""}, "end_phrase is or holds"),
  ("detectable_content:postscript", {"postscript_marker": 1}, "postscript_marker is or holds"),
  ("length_constraints:nth_paragraph_first_word", {"nth_paragraph": 3}, "are to be 2 paragraphs"),
  ("length_constraints:nth_paragraph_first_word", {"nth_paragraph": 0}, "nth_paragraph is 0"),
  ("length_constraints:nth_paragraph_first_word", {"first_word": "in it"}, "not one word"),
  ("length_constraints:nth_paragraph_first_word", {"first_word": "***"}, "not one word"),
]


@pytest.mark.parametrize("name, change, says", WRONG_ARGUMENTS)
def test_arguments_of_wrong_type_or_sense_are_refused(name, change, says):
  row = {
    "idx": 0,
    "prompt": "p",
    "instruction_id_list": [name],
    "kwargs": [CASES[name][0] | change],
  }
  with pytest.raises(ValueError, match=f"'kwargs' of {name}: .*({says})"):
    IFEval().task_from_row(row, "test")


@pytest.mark.parametrize("kwargs", [["a"], [3], [["num_words"]], ["{}"]])
def test_arguments_that_are_no_object_are_refused(kwargs):
  row = {"idx": 0, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"]}
  with pytest.raises(ValueError, match="'kwargs' of punctuation:no_comma is no object"):
    IFEval().task_from_row(row | {"kwargs": kwargs}, "test")
  with pytest.raises(ValueError, match="'instruction_id_list': .* is unknown"):
    IFEval().task_from_row(row | {"instruction_id_list": [["a"]], "kwargs": [{}]}, "test")


WORDS, SENTENCES = "length_constraints:number_words", "length_constraints:number_sentences"
PARAGRAPHS = "length_constraints:number_paragraphs"
FIRST_WORD = "length_constraints:nth_paragraph_first_word"
CAPITAL, SMALL = "change_case:english_capital", "change_case:english_lowercase"
CAPITAL_WORDS = "change_case:capital_word_frequency"
NO_COMMA, FORBIDDEN = "punctuation:no_comma", "keywords:forbidden_words"
EXISTENCE, FREQUENCY = "keywords:existence", "keywords:frequency"
LETTERS, LANGUAGE = "keywords:letter_frequency", "language:response_language"
REPEAT, END, QUOTATION = "combination:repeat_prompt", "startend:end_checker", "startend:quotation"
OPTION, JSON = "detectable_format:constrained_response", "detectable_format:json_format"
SECTIONS, BULLETS = "detectable_format:multiple_sections", "detectable_format:number_bullet_lists"


def amount(name, relation, count):
  prefix = name.partition("_")[0] + "_" if name.endswith("_frequency") else ""
  return {name: count, f"{prefix}relation": relation}


def most(name, count):
  return amount(name, "less than", count)


def least(name, count):
  return amount(name, "at least", count)


# Two constraints with arguments, and arguments of the second with which both can be followed.
EXCLUDING = [
  (WORDS, least("num_words", 500), WORDS, most("num_words", 100), most("num_words", 501)),
  (WORDS, least("num_words", 9), WORDS, most("num_words", 9), most("num_words", 10)),
  (SENTENCES, least("num_sentences", 5), SENTENCES, most("num_sentences", 3),
   least("num_sentences", 3)),
  (SENTENCES, least("num_sentences", 9), WORDS, most("num_words", 9), most("num_words", 10)),
  (PARAGRAPHS, {"num_paragraphs": 3}, PARAGRAPHS, {"num_paragraphs": 4}, {"num_paragraphs": 3}),
  (BULLETS, {"num_bullets": 3}, BULLETS, {"num_bullets": 2}, {"num_bullets": 3}),
  (NO_COMMA, {}, EXISTENCE, {"keywords": ["a", "salt, pepper"]}, {"keywords": ["salt"]}),
  (NO_COMMA, {}, END, {"end_phrase": "Well, bye."}, {"end_phrase": "Bye."}),
  (NO_COMMA, {}, LETTERS, {"letter": ","} | least("let_frequency", 1),
   {"letter": ","} | most("let_frequency", 1)),
  (FORBIDDEN, {"forbidden_words": ["war", "end"]}, END, {"end_phrase": "The END"},
   {"end_phrase": "The ending"}),
  (FORBIDDEN, {"forbidden_words": ["war"]}, EXISTENCE, {"keywords": ["no war now"]},
   {"keywords": ["war"]}),
  (FORBIDDEN, {"forbidden_words": ["hi"]}, FIRST_WORD,
   {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "Hi"},
   {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "High"}),
  (FORBIDDEN, {"forbidden_words": ["answer"]}, OPTION, {}, None),
  (EXISTENCE, {"keywords": ["aha"]}, FREQUENCY, {"keyword": "Aha"} | most("frequency", 1),
   {"keyword": "Aha"} | most("frequency", 2)),
  (EXISTENCE, {"keywords": ["banana"]}, LETTERS, {"letter": "a"} | most("let_frequency", 3),
   {"letter": "a"} | most("let_frequency", 4)),
  (FREQUENCY, {"keyword": "oo"} | least("frequency", 3), LETTERS,
   {"letter": "O"} | most("let_frequency", 6), {"letter": "O"} | most("let_frequency", 7)),
  (LETTERS, {"letter": "q"} | least("let_frequency", 4), LETTERS,
   {"letter": "q"} | most("let_frequency", 4), {"letter": "k"} | most("let_frequency", 4)),
  (END, {"end_phrase": "one two three"}, WORDS, most("num_words", 3), most("num_words", 4)),
  (CAPITAL, {}, SMALL, {}, None),
  (CAPITAL, {}, OPTION, {}, None),
  (SMALL, {}, OPTION, {}, None),
  (CAPITAL, {}, SECTIONS, {"section_spliter": "Section", "num_sections": 2},
   {"section_spliter": "SECTION", "num_sections": 2}),
  (SMALL, {}, SECTIONS, {"section_spliter": "Section", "num_sections": 2},
   {"section_spliter": "section", "num_sections": 2}),
  (SMALL, {}, CAPITAL_WORDS, least("capital_frequency", 1), most("capital_frequency", 1)),
  (CAPITAL, {}, CAPITAL_WORDS, most("capital_frequency", 1), least("capital_frequency", 1)),
  (CAPITAL_WORDS, least("capital_frequency", 8), WORDS, most("num_words", 8),
   most("num_words", 9)),
  (LANGUAGE, {"language": "de"}, LANGUAGE, {"language": "fr"}, {"language": "de"}),
  (LANGUAGE, {"language": "de"}, CAPITAL, {}, None),
  (SMALL, {}, LANGUAGE, {"language": "hi"}, {"language": "en"}),
  (END, {"end_phrase": "Bye."}, END, {"end_phrase": "Good day."}, {"end_phrase": "Good bye."}),
  (REPEAT, {"prompt_to_repeat": "Do it."}, REPEAT, {"prompt_to_repeat": "Do that."},
   {"prompt_to_repeat": "do it. Now."}),
  (REPEAT, {"prompt_to_repeat": "Write it."}, QUOTATION, {}, None),
  (REPEAT, {"prompt_to_repeat": "Write it."}, JSON, {}, None),
  (REPEAT, {"prompt_to_repeat": "Write it."}, FIRST_WORD,
   {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "it"},
   {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "write"}),
  (FIRST_WORD, {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "it"}, FIRST_WORD,
   {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "we"},
   {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "we"}),
  (FIRST_WORD, {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "it"}, FIRST_WORD,
   {"num_paragraphs": 3, "nth_paragraph": 1, "first_word": "it"},
   {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "it's"}),
]  # fmt: skip


@pytest.mark.parametrize("first, arguments, second, excluded, possible", EXCLUDING)
def test_constraints_that_exclude_each_other_are_refused(
  first, arguments, second, excluded, possible
):
  for turn in (1, -1):
    names = [first, second][::turn] + ["detectable_format:title"]
    row = {"idx": 0, "prompt": "p", "instruction_id_list": names}
    with pytest.raises(ValueError, match="no response can follow both") as error:
      IFEval().task_from_row(row | {"kwargs": [arguments, excluded][::turn] + [{}]}, "test")
    assert "'instruction_id_list'" in str(error.value) and "\n" not in str(error.value)
    assert first in str(error.value) and second in str(error.value)
    if possible is not None:
      IFEval().task_from_row(row | {"kwargs": [arguments, possible][::turn] + [{}]}, "test")


@pytest.mark.parametrize(
  "name, arguments, rest, breaks",
  [
    (NO_COMMA, {}, "Salt and rice.", "Salt, rice."),
    (FORBIDDEN, {"forbidden_words": ["sugar"]}, "Salt.", "Sugar."),
    (FREQUENCY, {"keyword": "salt"} | most("frequency", 1), "Rice.", "Salt."),
    (WORDS, most("num_words", 6), "Three short words.", "More than six words are too many."),
  ],
)
def test_what_a_repeated_request_breaks_holds_for_the_rest(name, arguments, rest, breaks):
  request = "Name food without commas, salt or sugar."
  row = {"idx": 0, "prompt": "p", "instruction_id_list": [name, "combination:repeat_prompt"]}
  row["kwargs"] = [arguments, {"prompt_to_repeat": request}]
  task_of_row = IFEval().task_from_row(row, "test")
  assert IFEval().judge(task_of_row, f"{request}\n{rest}").reward == 1.0
  assert f"- {name}" in IFEval().judge(task_of_row, f"{request}\n{breaks}").text
  assert IFEval().judge(task_of_row, rest).reward == 0.0
  # a request that breaks nothing leaves the constraint as it is
  row["kwargs"][1] = {"prompt_to_repeat": "Name it."}
  other_task = IFEval().task_from_row(row, "test")
  assert "of_the_rest" not in other_task.data
  assert IFEval().judge(other_task, f"Name it.\n{breaks}").reward == 0.0


def test_what_a_table_makes_of_arguments_is_read():
  arguments = {"num_words": 3.0, "relation": "at least", "keywords": NAN, "first_word": None}
  row = {"idx": 5, "key": NAN, "prompt": "p", "kwargs": [arguments, NAN]}
  row |= {"instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"]}
  result = IFEval().task_from_row(row, "test")
  assert result.id == "ifeval/test/5"
  assert result.data["constraints"] == [
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}),
    ("punctuation:no_comma", {}),
  ]


UNCLEAR = [  # a few words, and words of several languages, tell no language
  ("NO, ME FIRST!", "en"),
  ("Come on, no drama: pizza, pasta, tea.", "en"),
  ("STOP! DO NOT ENTER.", "en"),
  ("Roses are red, violets are blue.", "en"),
  ("Hello, world!", "en"),
  ("Никой не знае отговора.", "bg"),
  ("Никто не знает ответа.", "ru"),
  ("Nessuno conosce la risposta.", "it"),
  ("Bonjour, madame !", "fr"),
  ("Usisahau kufunga mlango unapoondoka.", "sw"),
]
LONGER = [  # few or no function words of the table stand in these
  ("Кучето тича бързо през гората и вижда малка котка там.", "bg"),
  ("Эта книга понравилась мне гораздо больше фильма.", "ru"),
  ("Минулого тижня я купив собі нову червону машину.", "uk"),
  ("MY DOG ATE MY HOMEWORK AGAIN, SO I AM IN TROUBLE.", "en"),
  ("Wakulima walipanda mahindi na maharage shambani.", "sw"),
  ("Voitko auttaa minua näiden laukkujen kanssa?", "fi"),
  ("Mi puoi aiutare a portare queste valigie pesanti?", "it"),
  ("我们昨天在京都吃了优の良品的点心，味道很好。", "zh"),
  ("이 프로그램은 SET TRANSACTION을 먼저 호출해야 합니다", "ko"),
  ("𝐓𝐡𝐞 𝐰𝐞𝐚𝐭𝐡𝐞𝐫 𝐢𝐬 𝐧𝐢𝐜𝐞 𝐚𝐧𝐝 𝐰𝐞 𝐚𝐫𝐞 𝐠𝐨𝐢𝐧𝐠 𝐨𝐮𝐭.", "en"),
]


@pytest.mark.parametrize("text, code", UNCLEAR)
def test_short_texts_have_their_own_language_or_none(text, code):
  assert language.detect(text) in (code, None) and language.mismatch(text, code) == ""
  other_script = "hi" if code != "hi" else "en"
  assert language.mismatch(text, other_script)  # the script is clear, however short the text


@pytest.mark.parametrize("text, code", LONGER)
def test_languages_of_texts_without_common_words(text, code):
  assert language.detect(text) == code
  assert language.mismatch(text, "en" if code != "en" else "fr") == language.NAMES[code]


def test_scripts_of_no_known_language():
  for text in ("Καλημέρα σε όλους τους φίλους μου", "გამარჯობა მეგობრებო"):
    assert language.detect(text) is None and language.mismatch(text, "en") == "another script"
  assert language.mismatch("E = mc² and π", "en") == ""
  assert language.mismatch("π ≈ 3.14", "de") == ""  # a single letter tells nothing


def test_languages_are_told_the_same_in_every_thread():
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    texts = [text for text, _ in LONGER] * 4
    assert list(pool.map(language.detect, texts)) == [code for _, code in LONGER] * 4


def test_languages():
  assert {code: language.detect(text) for code, text in SAYINGS.items()} == {
    code: code for code in SAYINGS
  }
  assert SAYINGS.keys() == language.NAMES.keys()
  assert (
    language.detect("123 !?") is None
    and language.detect("") is None
    and language.detect("Zyx qwv") is None
  )


@pytest.mark.parametrize(
  "text, count",
  [
    ("", 0),
    ("No end", 1),
    ("One. Two. Three.", 3),
    ("Wait... what? Yes!", 3),
    ('He said "Go." Then he left.', 2),
    ("Dr. Who met Prof. X in the U.S. in 1999. It rained.", 2),
    ("1. First item.\n2. Second item.", 2),
    ("A line\nand its end. Next", 2),
    ("It costs 3.50. Buy!", 2),
    ("So do I. You too.", 2),
    ("यह है। वह है।", 2),
    ("I live in the U.S. It rains.", 2),
    ("The U.S. Army left. It had won.", 2),
    ("We woke at 5 a.m. The sun rose.", 2),
    ("John F. Kennedy spoke of plan B. It failed.", 2),
    ("A. The cat sleeps.\nB. The dog barks.", 2),
    ("I said no. See No. 5 for more.", 2),
    ("Nuts, figs, etc. are sold by Acme Inc. Everyone likes them.", 1),
    ("one fish. two fish. red fish.", 3),
    ("we live in the u.s. it rains. mr. brown left.", 3),
    ("WE LIVE IN THE U.S. IT RAINS. MR. BROWN LEFT.", 3),
    ("It was approx. five. Good.", 2),
  ],
)
def test_sentences(text, count):
  assert len(sentences(text)) == count, sentences(text)


@pytest.mark.parametrize(
  "piece", [".", ". a", ".)", "[", "[a", "*", "* ", "<<", "<<a", " ", "\n", "- ", "a-", "SECTION"]
)
def test_no_check_takes_quadratic_time(piece):
  text = piece * (30_000 // len(piece)) + "a"
  for name, (arguments, _, _) in CASES.items():
    begun = time.monotonic()
    CONSTRAINTS[name](text, **arguments)
    assert time.monotonic() - begun < 1.0, name


def responses():
  """Random texts, and texts that follow or break a constraint with random changes."""
  known = [text for pair in FLIPS.values() for text in pair] + list(SAYINGS.values())
  known += [case[2] for case in HOSTILE] + ["<think>", "</think>", "\ud800", "\0", "*" * 40]
  mixed = st.lists(st.one_of(st.sampled_from(known), st.text(max_size=8)), max_size=6)
  changed = st.builds(
    lambda text, at, cut, new: text[:at] + new + text[at + cut :],
    st.sampled_from(known),
    st.integers(0, 40),
    st.integers(0, 3),
    st.text(max_size=3),
  )
  return st.one_of(mixed.map(" ".join), changed)


def judges_anything(examples):
  constraints = [constraint for name in CASES for constraint in task(name).data["constraints"]]
  everything = Task("all", "Do it.", data={"constraints": constraints})

  @settings(max_examples=examples, deadline=None, database=None)
  @given(responses(), st.sampled_from(sorted(CASES)))
  def check(response, name):
    for judged in (task(name), everything):
      feedback = IFEval().judge(judged, response)
      assert feedback.reward in (0.0, 1.0) and feedback.status is Status.SCORED
      assert (feedback.text == "") == (feedback.reward == 1.0)

  check()


def test_any_response_ends_in_feedback():
  judges_anything(100)


@pytest.mark.slow
def test_ten_thousand_responses_end_in_feedback():
  judges_anything(10_000)


@needs_data
def test_every_row_is_accepted():
  env, rows, seen = IFEval(), 0, set()
  with open(os.path.join(_DATA, "ifeval.jsonl"), encoding="utf-8") as lines:
    for index, line in enumerate(lines):
      row = {"idx": index} | json.loads(line)
      task_of_row = env.task_from_row(row, "test")
      rows += 1
      seen |= {name for name, _ in task_of_row.data["constraints"]}
      for response in ("", "<think>unfinished", "</think>\n"):
        feedback = env.judge(task_of_row, response)
        assert feedback.reward == 0.0 and feedback.text and feedback.status is Status.SCORED
      for name, arguments in task_of_row.data["constraints"]:
        if name == "language:response_language":
          assert arguments["language"] in language.NAMES
        feedback = env.judge(task_of_row, "x, y.")  # every check runs with the arguments of the row
        assert feedback.status is Status.SCORED and (feedback.reward == 1.0) == (
          feedback.text == ""
        )
  assert rows == 541 and seen == CONSTRAINTS.keys()
