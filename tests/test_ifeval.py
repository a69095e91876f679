"""Instructions: every constraint followed and broken, the languages, and every IFEval row."""

import json
import os
import time

import pytest

from sdpo_jax.envs import language
from sdpo_jax.envs.ifeval import CONSTRAINTS, IFEval, sentences
from sdpo_jax.records import Status

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
