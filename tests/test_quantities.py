"""Answers that are equal or differ in numbers, quantities and words; one value in many ways."""

import fractions
import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

from sdpo_jax.envs import numerals, quantities
from sdpo_jax.envs.math_qa import MathQA
from sdpo_jax.envs.math_text import latex
from sdpo_jax.records import Feedback


@pytest.fixture(scope="module")
def env():
  env = MathQA(workers=1, time_s=20.0)
  yield env
  env.close()


# Decided without math-verify: reference, right answers, wrong answers.
DECIDED = [
  (r"7\text{ hours }20\text{ minutes}", ["440 minutes", "7 h 20 min"], ["7 hours 25 minutes", "7"]),
  ("6 feet 2 inches", ["74 in", r"6\text{ ft }2\text{ in}", "6'2\""], ["6 feet", "6 ft 3 in"]),
  (r"\$3\text{ million}", ["3000000", "$3M", "3 million dollars"], ["$3 billion", "$3", "3"]),
  ("2.5 billion", ["2,500,000,000", r"2.5\times10^9"], ["2.5 million", "2.5"]),
  ("9 AM", ["9:00 a.m.", "9 am", "09:00"], ["9 PM", "9", "21:00"]),
  ("9", ["9 PM"], ["8 PM"]),
  ("12 noon", ["12 PM", "noon"], ["12 AM", "midnight"]),
  ("2 cats and 5 dogs", ["5 dogs and 2 cats", r"2\text{ cats, }5\text{ dogs}"],
   ["2 cats and 6 dogs", "5 cats and 2 dogs", "2 and 5"]),
  ("30 miles east", ["30 mi east"], ["30 miles west", "30 miles", "30"]),
  ("30 miles", ["30 miles east", "30", "158400 feet"], ["30 km", "31 miles"]),
  ("24 pencils", ["24", "24 pencil", "24 blue pencils"], ["24 pens", "24 dollars"]),
  (r"15\text{ cm}^2", ["15 square centimetres", "15 cm²", r"15\,\mathrm{cm}^{2}", "15"],
   [r"15\text{ cm}^3", "15 cm", "15 m^2"]),
  ("45 mph", ["45 miles per hour", r"45\,\frac{\text{mi}}{\text{h}}"], ["45 km/h", "46 mph"]),
  (r"10\text{ m/s}", ["36 km/h", "10"], [r"10\text{ m/s}^2", "10 km/h"]),
  ("€40", ["40 euros", "40", "40€"], ["$40", "£40", "41"]),
  ("$0.75", ["75 cents", "0.75 dollars", r"\$0.75"], ["75 dollars", "0.75 cents"]),
  ("25%", [r"25\%", "0.25", "1/4", "25", "25 percent"], ["0.0025", "24%", "2.5"]),
  (r"0.5\%", ["0.005"], ["0.5", "5%", "50%"]),
  ("20 °C", ["20 degrees Celsius", r"20^\circ\text{C}", "20"], ["20 °F"]),
  ("at least 4", ["at least four"], ["4", "at most 4"]),
  ("4", ["the answer is 4", "four", r"\text{Four}", "4 cats"], ["4 or more", "fourteen"]),
  ("Nadia", ["nadia", r"\text{Nadia}", "Nadia."], ["Diana", "Aidan"]),
  ("no", ["No", r"\text{no}"], ["on", "yes"]),
  ("PQR", [r"\text{PQR}"], ["RQP", "PRQ"]),
  ("Ann and Tom", ["Tom and Ann"], ["Ann", "Ann and Tim"]),
  ("red, blue", ["Red, blue"], ["blue, red"]),
  ("no solutions", ["No solution", r"\text{no solution}"], ["one solution", "0"]),
  ("110_2", [r"110_{2}", "110", r"6_{10}", r"110_{\text{two}}"], ["110_3", "6", "111_2"]),
  ("3–7", ["3-7", r"3\text{ to }7"], ["-4", "3–8"]),
  ("3–7 days", [r"3\text{ to }7\text{ days}", "3-7 days"], ["3–8 days", "3–7 weeks"]),
  ("6", ["6 dogs"], ["minus 6", "6 squared", "6 tenths", "6 hundred", "twice 6", "not 6"]),
  ("-6", ["minus 6", "negative six", "−6"], ["6", "minus 7"]),
  ("0.6", ["6 tenths", "600 thousandths"], ["6 hundredths", "6"]),
  (r"\frac{1}{2}", ["one half", "half", r"\text{one half}"], ["one", "two halves"]),
  ("July 9", ["9 July", "9 Jul", "Jul. 9"], ["July 8", "June 9", "Jun 9"]),
  ("Friday", ["Fri", "Fri.", r"\text{Fri}", "friday"], ["Fried", "Thursday", "fr"]),
  ("Sept", ["September", "Sep", "Sep."], ["Aug", "seven"]),
  ("Tues", ["Tue", "Tuesday"], ["Thu", "Wed"]),
  ("Mon, Wed and Sat", ["Monday, Wednesday and Saturday"], ["Monday, Wednesday and Sunday"]),
  ("sun", ["Sun", "SUN"], ["Sunday", "son"]),
  ("True", ["T", "true", r"\text{T}"], ["F", "False", "yes"]),
  ("F", ["False", r"\text{false}", "FALSE."], ["True"]),
  (r"\text{No}", ["no"], ["F", "False"]),
  ("silent", ["Silent"], ["listen"]),
  ("5:1", ["10:2", "5 : 1", r"5\colon 1", "5∶1", "5:1 odds"], ["5", "5.0", "1:5", "5 to 1 odds"]),
  ("5", [], ["5:1", "5∶1", "10:2", "5:1 odds"]),
  ("2:3:4", ["4:6:8", "2 : 3 : 4"], ["1:2:3", "2:3", "4:3:2"]),
]  # fmt: skip


@pytest.mark.parametrize("reference, right, wrong", DECIDED, ids=[row[0] for row in DECIDED])
def test_words_and_units_count(reference, right, wrong):
  assert [a for a in right if quantities.compare(reference, a) is not True] == []
  assert [a for a in wrong if quantities.compare(reference, a) is not False] == []


@pytest.mark.parametrize(
  "text, value",
  [
    ("12,34,567", 1234567),
    (latex(r"11,\! 111,\! 100"), 11111100),
    (latex("１２３"), 123),
    (latex("٤٥"), 45),
    (r"\text{12}", 12),
    ("1 080", 1080),
    ("3/4", fractions.Fraction(3, 4)),
    (r"-2\frac{1}{2}", fractions.Fraction(-5, 2)),
    ("2 1/2", fractions.Fraction(5, 2)),
    (r"\frac34", fractions.Fraction(3, 4)),
    ("1.5E-3", fractions.Fraction(3, 2000)),
    (r"10^{-2}", fractions.Fraction(1, 100)),
    (r"0.1\overline{6}", fractions.Fraction(1, 6)),
    ("0.333...", fractions.Fraction(1, 3)),
    ("1.234,5", fractions.Fraction(2469, 2)),
    ("(-5)", -5),
    ("2-1/2", None),
    ("1/0", None),
    ("1 2", None),
    ("1e99999", None),
    ("--5", None),
    ("(1,080)", None),
    ("x", None),
  ],
)
def test_notations_of_numbers(text, value):
  read = numerals.value(text)
  assert (read and read.exact) == value


def test_numbers_in_words():
  words = {
    "zero": 0, "twenty-one": 21, "minus three": -3, "one hundred and five": 105, "half": 0.5,
    "two million three hundred thousand and six": 2300006,
  }  # fmt: skip
  assert {text: numerals.spoken(text.split()) for text in words} == words
  for text in ("twenty eleven", "one two", "thousand", "five and", "", "no one"):
    assert numerals.spoken(text.split()) is None


def test_a_decimal_equals_the_fraction_that_it_rounds_and_no_other_decimal():
  equal = [("1/3", "0.333333"), ("2/3", "0.666667"), ("2/3", "0.666666"), ("-1/3", "-0.3333333")]
  different = [
    ("1/3", "0.33333"),
    ("1/3", "0.333334"),
    ("0.3333333", "0.333333"),
    ("1/3000000", "0.000000"),
  ]
  assert [quantities.compare(a, b) for a, b in equal] == [True] * len(equal)
  assert [quantities.compare(a, b) for a, b in different] == [False] * len(different)


# Judged by math-verify, once words and notation are out of the way.
ASKED = [
  (r"\sqrt{5}", ["√5", r"\sqrt 5", "5^{1/2}", "$√5$"], ["√6", "5"]),
  ("y^3", ["y³", "y * y * y"], ["y²", "3y"]),
  (r"\infty", ["∞", "infinity"], ["-∞"]),
  (r"\frac{1}{4}", ["¼", "1⁄4", "0.25", "25%"], ["½"]),
  (r"(-\infty, 2]", ["(−∞, 2]"], ["(−∞, 2)"]),
  ("xy", ["yx"], ["xz"]),
  (r"36\pi\text{ cm}^2", [r"36\pi", "36π cm²", "36 pi"], ["36", r"36\pi\text{ cm}^3"]),
  (r"2\sqrt{3}\text{ m}", [r"200\sqrt{3}\text{ cm}"], [r"2\sqrt{3}\text{ cm}"]),
  ("7t", ["7 t"], ["7"]),
  ("x=4", ["4", "x = 4 cm", r"x=4\text{ or }x=4"], ["x=5"]),
  ("x = 2 or x = -2", ["x = -2 or x = 2", "x=±2", "2, -2"], ["x = 2"]),
  (r"\sin 30^\circ", ["1/2", "sin 30°"], ["sin 60°"]),
  (r"(30^\circ, 60^\circ)", ["(30, 60)", "(30°, 60°)"], ["(30°, 45°)"]),
  ("5 - 3x", ["5–3x", "-3x+5"], ["3x - 5"]),
  (r"\pi\times 10^{-20}", [r"\frac{\pi}{10^{20}}"], [r"2\pi\times 10^{-20}", "0", "0.0"]),
  (r"\pi\times 10^{-9}", ["3.14159265e-09"], ["0.000000004", "0"]),
  ("(0.0000001, 2)", [r"(10^{-7}, 2)", "(1e-7, 2)"], ["(0.0000003, 2)"]),
  (r"\frac{5\text{ ft}}{6\text{ s}}", [r"\frac{10\text{ ft}}{12\text{ s}}"],
   [r"\frac{5\text{ ft}}{7\text{ s}}"]),
  (
    r"\begin{pmatrix} 1 \\ 1/2 \end{pmatrix}",
    [r"\begin{bmatrix}1\\\frac12\end{bmatrix}"],
    [r"\begin{pmatrix}1/2\\1\end{pmatrix}"],
  ),
  (r"\text{(B)}", ["B", "(B)", "Option B", "b"], ["C"]),
  (
    "D",
    [r"\text{(D)}\ 5", r"\textbf{(D) } 5", r"\mathrm{(D)}\ \frac{1}{2}", "(D) 5", "[D] 5",
     "D. 5", r"\text{D. }5", r"\text{(D) red and blue}", r"\textbf{(D)}\ -5", "D. cats, dogs"],
    [r"\text{(A)}\ 5", "5D", "D 5", "D5", "D.5", "(D)^2", "(D) + 5", "(D) -5", r"(D)\cdot 5",
     "(D), 5", "(D)(5)", "(D) or (A)", "(A) or (D)", "(D), (A)", "D. or A.", "(D) not D",
     r"\text{(D) or (A)}", r"\text{(D)}\ 5\text{ or (A)}\ 6", r"\text{(D)} = 5",
     r"\text{(D)} - 5", "(D) / 2", "(D)/(2)"],
  ),
  (r"\text{(D)}\ 5", [r"\textbf{(D)}\ 5"], [r"\text{(D)}\ 6", r"\text{(A)}\ 5", "5"]),
  ("x", [], [r"\text{(x)}\ 5", "(x) 5", "x. 5"]),
  ("T", ["t", "x = T"], ["F", "2T"]),
  (r"\text{(F)}", ["F"], ["False", "T"]),
  (r"\frac{2}{3}", ["2:3", "4:6"], ["3:2", "2:3:1"]),
  ("2:10:20", ["02:10:20", "13:65:130"], ["4:20:40", "1:05:10", "2:20:10", "3:10:20"]),
  ("10:00:00", [], ["11:00:00", "10:00:01"]),
  ("1:2:3", ["10:20:30", "0.5:1:1.5"], ["1:3:2"]),
  ("0:1:2", ["0:2:4"], ["0:2:1", "0:0:0", "1:2:4"]),
  (r"\emptyset", [r"\varnothing", "∅"], [r"\{0\}", "0"]),
  (r"\{1, 2\}", [r"\lbrace 2, 1\rbrace"], [r"\lbrace 1, 3\rbrace"]),
  (r"\sqrt{3}:1", [r"3:\sqrt{3}", r"\frac{\sqrt{3}}{1}"], [r"\sqrt{3}", r"1:\sqrt{3}"]),
  (r"90^\circ", ["90", "90°", "90 degrees"], [r"\frac{\pi}{2}", "91°"]),
  (r"\frac{\pi}{2}", ["π/2"], [r"90^\circ", "90"]),
  ("60", ["60°", "€60", "$60"], ["61°"]),
  (r"\{x : x > 2\}", [r"\{x: x>2\}"], [r"\{x : x > 3\}"]),
  ("6", ["5 + 1", "x = 6"], ["6 or 7", "6, maybe 7", "7 - 6"]),
  ("5!", ["120"], ["5"]),
  ("3e+2", ["2 + 3e"], ["302"]),
  ("e^{-100}", [r"\frac{1}{e^{100}}"], ["e^{-101}", "0"]),
  (r"\frac{1}{50!}", [r"\frac{51}{51!}"], [r"\frac{1}{52!}"]),
  (r"\{10^{-20}\pi, 1\}", [r"\{1, \pi\cdot 10^{-20}\}"], [r"\{2\cdot 10^{-20}\pi, 1\}"]),
  (r"10^{-20}x", [r"\frac{x}{10^{20}}"], [r"2\cdot 10^{-20}x"]),
  (r"1 - \frac{1}{\mathrm{e}}", [r"1-\frac1e", "1 - e^{-1}"], [r"1+\frac1e"]),
  (r"\text{A, C}", ["A, C", "C and A"], ["A, B", "A"]),
  (r"x_1 + x_2", ["x₁ + x₂"], ["x₁ + x₃"]),
  (r"\alpha\beta", ["αβ", "βα"], ["αγ"]),
]  # fmt: skip


def test_mathematics_in_every_writing(env):
  wrong_verdicts = []
  for reference, right, wrong in ASKED:
    wrong_verdicts += [(reference, a) for a in right if env.same(reference, a) is not True]
    wrong_verdicts += [
      (reference, a, "wrong") for a in wrong if env.same(reference, a) is not False
    ]
  assert wrong_verdicts == []


# One value in many ways. Each writer returns None for a value that it does not write.


def _decimal(value: fractions.Fraction) -> str | None:
  """Writes a number in full; None if it has no end."""
  denominator = value.denominator
  places = 0
  while denominator != 1 and places < 400:
    denominator = (value * 10**places).denominator
    places += denominator != 1
  if denominator != 1:
    return None
  digits = f"{abs(value) * 10**places}".rjust(places + 1, "0")
  text = digits[: len(digits) - places] + ("." + digits[len(digits) - places :] if places else "")
  return ("-" if value < 0 else "") + text


def _scientific(value, form: str) -> str | None:
  text = _decimal(value)
  digits = None if text is None else text.lstrip("-").replace(".", "").strip("0")
  if not digits:
    return None
  exponent = 0
  while abs(value) >= fractions.Fraction(10) ** (exponent + 1):
    exponent += 1
  while abs(value) < fractions.Fraction(10) ** exponent:
    exponent -= 1
  mantissa = digits[0] + ("." + digits[1:] if digits[1:] else "")
  raised = str(exponent).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
  sign = "-" if value < 0 else ""
  return sign + form.format(m=mantissa, e=exponent, raised=raised, signed=f"{exponent:+03d}")


def _grouped(value, comma: str) -> str | None:
  text = _decimal(value)
  if text is None:
    return None
  whole, point, decimals = text.partition(".")
  return f"{int(whole):,}".replace(",", comma) + point + decimals if int(whole) else None


def _fraction(value, form: str) -> str | None:
  if value.denominator == 1 and value >= 0:
    return form.format(sign="", top=2 * value.numerator, bottom=2)
  return form.format(
    sign="-" if value < 0 else "", top=abs(value.numerator), bottom=value.denominator
  )


def _mixed(value) -> str | None:
  whole, rest = divmod(abs(value), 1)
  if not whole or not rest or value.denominator > 10**6:
    return None
  return f"{'-' if value < 0 else ''}{whole}\\frac{{{rest.numerator}}}{{{rest.denominator}}}"


def _million(value) -> str | None:
  text = _decimal(value / 10**6)
  return f"{text} million" if text and abs(value) >= 10**4 else None


def _of(form: str):
  """Returns a writer that puts the number in full into a form."""

  def write(value):
    text = _decimal(value)
    return None if text is None else form.replace("{x}", text)

  return write


def _with(change):
  """Returns a writer that changes the number in full."""

  def write(value):
    text = _decimal(value)
    return None if text is None else change(text)

  return write


def _call(function, argument):
  def write(value):
    return function(value, argument)

  return write


WIDE = str.maketrans("0123456789", "０１２３４５６７８９")
WRITERS = [
  _of("{x}"),
  _of("${x}$"),
  _of(r"\({x}\)"),
  _of(r"\$ {x}"),
  _of("**{x}**"),
  _of("{x}."),
  _of(r"\text{{x}}"),
  _of(r"\mathbf{{x}}"),
  _of(r"\left({x}\right)"),
  _of("{x} eggs"),
  _of(r"{x}\text{ eggs}"),
  _of("The answer is {x}"),
  _with(lambda text: None if text.startswith("-") else "+" + text),
  _of(r"\boxed{{x}}"),
  _with(lambda text: text.replace("-", "−")),
  _with(lambda text: text.replace("-", "–")),
  _with(lambda text: text.translate(WIDE)),
  _with(lambda text: text + "00" if "." in text else text + ".000"),
  _with(lambda text: text.replace("0.", ".") if text.lstrip("-").startswith("0.") else None),
  _with(
    lambda text: text.replace(".", "{,}") if len(text.partition(".")[2]) not in (0, 3) else None
  ),
  *(_call(_grouped, comma) for comma in (",", "{,}", r"\,", "~", " ", "\u202f", "\u00a0", "'")),
  *(
    _call(_scientific, form)
    for form in (
      "{m}e{signed}",
      "{m}E{e}",
      "{m} \\times 10^{{{e}}}",
      "{m} \\cdot 10^{{{e}}}",
      "{m}×10{raised}",
      "{m} * 10^{{{e}}}",
      "{m} x 10^{e}",
    )
  ),
  *(
    _call(_fraction, form)
    for form in ("{sign}\\frac{{{top}}}{{{bottom}}}", "{sign}\\dfrac{{{top}}}{{{bottom}}}",
                 "{sign}{top}/{bottom}", "{sign}{top}⁄{bottom}")
  ),
  _mixed,
  _million,
]  # fmt: skip
# Those that math-verify has to work out.
EXPRESSIONS = [
  "{x}\\pi", "π·{x}", "{x} \\times \\pi", "\\frac{{x}\\pi}{1}", "\\frac{2\\pi}{2} \\cdot {x}",
]  # fmt: skip


def _values(rng: random.Random) -> tuple[fractions.Fraction, fractions.Fraction]:
  """Draws a value of any size, and another one that is nearly the same."""
  exponent = rng.choice(
    [0, 0, 0, rng.randint(-12, 12), rng.randint(-60, 60), rng.randint(-250, 250)]
  )
  digits = rng.randint(1, 10 ** rng.randint(1, 9))
  unit = fractions.Fraction(10) ** (exponent - len(str(digits)) + 1)
  value = digits * unit * rng.choice([1, 1, -1])
  if rng.random() < 0.15:
    value = fractions.Fraction(rng.randint(-500, 500) or 1, rng.choice([2, 3, 6, 7, 8, 11, 13]))
    unit = fractions.Fraction(1, value.denominator)
  near = rng.choice([value + unit, value - unit, -value, value * 10, value / 10, value + 10 * unit])
  return value, near if near != 0 else value + unit


def _judge_pairs(env, seed: int, count: int) -> list:
  """Judges pairs of texts of one value, and of two; returns those that are judged wrongly."""
  rng = random.Random(seed)
  wrong = []
  done = 0
  while done < count:
    value, near = _values(rng)
    is_equal = rng.random() < 0.5
    if rng.random() < 0.1:
      forms = rng.sample(EXPRESSIONS, 2)
      exponent = rng.randint(-30, 30)
      scale = f"10^{{{exponent}}}"
      numbers = [str(rng.randint(2, 999))] * 2
      if not is_equal:
        numbers[1] = str(int(numbers[0]) + rng.choice([1, 2, 10]))
      texts = [
        form.replace("{x}", f"({n} \\times {scale})")
        for form, n in zip(forms, numbers, strict=True)
      ]
    else:
      texts = [rng.choice(WRITERS)(value), rng.choice(WRITERS)(value if is_equal else near)]
    if None in texts or texts[0] == texts[1]:
      continue
    if any("eggs" in text for text in texts) and any("\\$" in text for text in texts):
      continue  # Dollars are no eggs.
    done += 1
    if env.same(*texts) is not is_equal:
      wrong.append((*texts, is_equal))
  return wrong


def test_no_pair_of_300_is_judged_wrongly(env):
  assert _judge_pairs(env, 0, 300) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_no_pair_of_6000_is_judged_wrongly(env, seed):
  assert _judge_pairs(env, seed, 1000) == []


PIECES = [
  *r"\boxed{ \boxed } { ( ) [ ] \ \\ $ \$ \text{ \frac{ \frac1 \sqrt √ ½ ² ^ _ _{ ^{ °".split(),
  *r"% \% , ; {,} \, \! . ... : / + - − – \times e E 10^ 1e5 1e999999 0. 12 x \pi and".split(),
  *"million feet inches PM per a to five hundred minus square cm € ∞ & = < ! | ' \" é 中 ٣".split(),
  *r"\circ \overline{ \begin{cases} \end{cases} \le </think> <think> \left \right ** ~".split(),
  *(
    "\\fbox {",
    "#### ",
    "(D) ",
    "D. ",
    "Fri",
    "T",
    "\n",
    " ",
    " or ",
    "9" * 400,
    "\x00",
    "\ud800",
    "\u200b",
  ),
]
GOLDS = ["5", r"\frac{1}{2}", r"5\text{ feet }6\text{ inches}", "Alice", "x^2+1", "8 PM", "(1, 2)"]
GOLDS += ["True", "D", r"\text{(D)}\ 5", "Friday", "5:1"]


def _responses():
  """Draws responses from random text, LaTeX in pieces, and right answers that are damaged."""
  pieces = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join)
  boxed = pieces.map(lambda text: f"\\boxed{{{text}}}")
  damaged = st.builds(
    lambda gold, at, piece: f"\\boxed{{{gold[: at % len(gold)]}{piece}{gold[at % len(gold) :]}}}",
    st.sampled_from(GOLDS),
    st.integers(0, 100),
    st.sampled_from(PIECES),
  )
  return st.text() | pieces | boxed | damaged


@pytest.fixture(scope="module")
def impatient_env():
  env = MathQA(workers=1, time_s=1.0, tell_correctness=True)
  yield env
  env.close()


def _judges_every_response(env, examples: int) -> None:
  tasks = [env.task_from_row({"idx": 0, "question": "Q", "answer": gold}, "t") for gold in GOLDS]

  @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
  @given(st.sampled_from(tasks), _responses())
  def judge(task, response):
    feedback = env.judge(task, response)
    assert isinstance(feedback, Feedback) and feedback.reward in (0.0, 1.0)

  judge()


def test_no_response_makes_the_judge_raise(impatient_env):
  _judges_every_response(impatient_env, 100)


@pytest.mark.slow
def test_10000_responses_do_not_make_the_judge_raise(impatient_env):
  _judges_every_response(impatient_env, 10_000)


@pytest.mark.slow
def test_10000_texts_do_not_make_the_comparison_raise():
  """Without the worker it is fast enough for both sides to be damaged."""

  @settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
  @given(_responses(), _responses())
  def compare(reference, answer):
    assert isinstance(quantities.compare(reference, answer), (bool, list))

  compare()
