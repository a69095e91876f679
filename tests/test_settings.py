"""Settings from the command line: all can be set and seen, and a wrong one is named.

All are every argument of every part of a method, and of every environment.
"""

import inspect
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax import config, experiment, main, pretrain, ranges
from sdpo_jax.envs.base import ENVS, env_settings, make_env
from sdpo_jax.objectives import build, methods
from sdpo_jax.objectives.loss import normalisers, token_loss
from sdpo_jax.objectives.signals import Signals
from tests import fakes
from tests.my_env import ReverseWord

ROOT = pathlib.Path(__file__).parent.parent
TINYCODE = f"--config={ROOT}/configs/tinycode.py"
AGENTIC = f"--config={ROOT}/configs/agentic.py"
PRETRAIN = f"{ROOT}/configs/pretrain_tiny.py"
HOUSEHOLD = f"{ROOT}/configs/pretrain_household.py"
SAMPLES = {bool: True, int: 3, float: 0.25, str: "text", tuple: ("text",)}
PARTS = [(axis, name) for axis, table in build.AXES.items() for name in table]


def parse(*arguments):
  _, c = main.parse(["main", *arguments])
  return c


def checked(*arguments):
  c = parse(*arguments)
  config.validate(c)
  return c


@pytest.mark.parametrize("axis, name", PARTS)
def test_every_argument_of_every_part_can_be_set(axis, name):
  given = {}
  for key, parameter in build.settings_of(axis, name).items():
    if key == "templates":
      given["templates.solution"] = "{text} it is"
    else:
      kinds = build._kinds(parameter.annotation)
      fitting = [*kinds[-1:], type(parameter.default)]
      if parameter.default is None:
        fitting += kinds
      given[key] = next(sample for kind, sample in SAMPLES.items() if kind in fitting)
  c = parse(
    TINYCODE,
    f"--config.method.{axis}.name={name}",
    *(f"--config.method.{axis}.{key}={value}" for key, value in given.items()),
  )
  part = c.method[axis].to_dict()
  assert part.keys() == {"name", *build.settings_of(axis, name)}
  for key, value in given.items():
    first, _, last = key.partition(".")
    assert (part[first][last] if last else part[first]) == value


def test_what_may_be_none_can_be_set_and_unset():
  c = checked(
    TINYCODE, "--config.method.token_signal.top_k=20", "--config.method.token_weight.is_clip=None"
  )
  assert c.method.token_signal.top_k == 20
  assert c.method.token_weight.is_clip is None
  assert c.method.token_weight.rollout_is_clip == 2.0
  c = checked(f"--config={ROOT}/configs/math_qa.py", "--config.method.token_signal.top_k=None")
  assert c.method.token_signal.top_k is None
  assert checked(TINYCODE, "--config.optimizer.clip_norm=None").optimizer.clip_norm is None
  assert checked(TINYCODE, "--config.optimizer.clip_norm=2").optimizer.clip_norm == 2


@pytest.mark.parametrize("row", sorted(methods.METHODS.keys() - fakes.VARIANTS))
def test_another_part_makes_a_working_row_or_one_clear_line(row):
  """Every part in the place of every row's: what passes gives a loss that is a number."""
  r = np.random.default_rng(0)
  batch = fakes.toy_batch()
  each = [jnp.asarray(r.normal(size=batch.weight_BR.shape), jnp.float32) for _ in range(6)]
  signals = Signals(*each[:5], logp_rivals=(each[5],))
  worked = 0
  file = AGENTIC if build.reads_turns(methods.METHODS[row]) else TINYCODE
  for axis, name in PARTS:
    try:
      c = checked(
        f"{file}:method={row}",
        f"--config.method.{axis}.name={name}",
        *["--config.method.reduction.length=24"] * (name == "constant"),
      )
    except ValueError as error:
      assert "config.method." in str(error) and "\n" not in str(error)
      continue
    method = build.build_method(c.method.to_dict())
    readings = (signals,) * (1 + method.further_count)
    assert jnp.isfinite(token_loss(method, readings, batch, normalisers(method, batch))[0])
    worked += 1
  assert worked >= len(build.AXES)  # its own parts, at least


@pytest.mark.parametrize("name", ENVS)
def test_every_setting_of_every_environment_can_be_set(name):
  given = {
    key: {"level": "hard", "first_date": "2025-01-01", "last_date": "2025-01-02"}.get(
      key, SAMPLES[type(p.default)]
    )
    for key, p in env_settings(name).items()
  }
  c = parse(
    TINYCODE,
    f"--config.env.name={name}",
    *(f"--config.env.{key}={value}" for key, value in given.items()),
  )
  assert c.env.to_dict() == given | {"name": name}


def test_an_environment_of_ones_own_takes_its_own_settings():
  own = "--config.env.name=tests.my_env:ReverseWord"
  c = checked(TINYCODE, own, "--config.env.length=7")
  assert c.env.to_dict() == {"name": "tests.my_env:ReverseWord", "length": 7}
  env = make_env(sandbox=None, **c.env)
  assert len(env.task("train", 0).solution) == 7
  # what both have stays
  assert checked(f"{TINYCODE}:level=hard", "--config.env.name=arithmetic").env.level == "hard"
  with pytest.raises(
    main.UsageError,
    match=r"config.env.level='hard' is not a setting of tests.my_env:ReverseWord; "
    r"choose from \['length'\]",
  ):
    parse(f"{TINYCODE}:level=hard", own)


class Demanding(ReverseWord):
  """An environment with a setting that has no default."""

  def __init__(self, *, depth: int):
    self.depth = depth


def test_a_setting_without_a_default_must_be_given():
  own = "--config.env.name=tests.test_settings:Demanding"
  with pytest.raises(
    ValueError,
    match="config.env.depth is not set, and tests.test_settings:Demanding has no default",
  ):
    make_env(sandbox=None, **parse(TINYCODE, own).env)
  assert make_env(sandbox=None, **parse(TINYCODE, own, "--config.env.depth=2").env).depth == 2
  with pytest.raises(
    ValueError, match="config.method.reduction.length=None of 'constant' must be of type"
  ):
    checked(f"{TINYCODE}:method=grpo", "--config.method.reduction.name=constant")


@pytest.mark.parametrize(
  "arguments, message",
  [
    (
      ["--config.method.token_signal.topk=20"],
      "config.method.token_signal.topk is not a setting; "
      "did you mean config.method.token_signal.top_k; choose from ['add_tail',",
    ),
    (
      ["--config.method.tokensignal.alpha=1"],
      "config.method.tokensignal is not a setting; did you mean config.method.token_signal",
    ),
    (
      ["--config.method.token_signal.top_k=many"],
      "config.method.token_signal.top_k='many' of 'divergence' must be of type int or None",
    ),
    (
      ["--config.method.advantage.name=mean"],
      "config.method.advantage.name='mean' is unknown; choose from ['group_mean'",
    ),
    (
      ["--config.optimizer.clip_norm=0"],
      "config.optimizer.clip_norm=0 must be above 0, or None: no clipping",
    ),
    (["--config.optimizer.clip_norm=-1.0"], "config.optimizer.clip_norm=-1.0 must be above 0"),
    (
      ["--config.optimizer.clip_norm=off"],
      "config.optimizer.clip_norm='off' must be above 0, or None",
    ),
    (["--config.optimizer.warmup_steps=-1"], "config.optimizer.warmup_steps=-1 must be at least 0"),
    (["--config.optimizer.b1=1.5"], "config.optimizer.b1=1.5 must be at least 0 and below 1"),
    (["--config.optimizer.b2=1.0"], "config.optimizer.b2=1.0 must be at least 0 and below 1"),
    (
      ["--config.total_steps=2", "--config.optimizer.decay_steps=2"],
      "config.optimizer.decay_steps=2 must be more than config.optimizer.warmup_steps=10",
    ),
    (["--config.rollout.judge_timeout_s=0"], "config.rollout.judge_timeout_s=0.0 must be above 0"),
    (
      ["--config.method=grpo"],
      "choose another row by the config file's argument, --config=FILE:method=grpo",
    ),
    (
      ["--config.method.name=grpo"],
      "choose another row by the config file's argument, --config=FILE:method=grpo",
    ),
    (
      ["--config.method.teacher_context.feedback=alway"],
      "config.method.teacher_context.feedback='alway' is unknown; did you mean 'always'; choose",
    ),
    (
      ["--config.method.name=sdop"],
      "config.method.name='sdop' is unknown; did you mean 'sdpo'; choose from ['adaptive_cringe'",
    ),
    (
      ["--config.method.reducton.name=constant"],
      "config.method.reducton is not a setting; did you mean config.method.reduction",
    ),
    (
      ["--config.env.name=tinycod"],
      "config.env.name='tinycod' is unknown; did you mean 'tinycode'; choose from ['alfworld'",
    ),
    (
      ["--config.method.teacher_context.templates.solution={answer}"],
      "asks for {answer}; choose from ['text']",
    ),
    (
      ["--config.method.reduction.name=sequence_mean"],
      "config.method.reduction.name='sequence_mean' would not be read",
    ),
    (
      ["--config.env.levle=hard"],
      "config.env.levle is not a setting; did you mean config.env.level; "
      "choose from ['level', 'name', 'stage_questions', 'stages', 'words_seed']",
    ),
    (
      ["--config.env.name=tests.my_env:Nothing"],
      "config.env.name='tests.my_env:Nothing' cannot be imported",
    ),
    (
      ["--config.env.name", "chess"],
      "config.env.name='chess' is unknown; choose from ['alfworld'",
    ),
    (
      ["--config.train.loss_implementation=xla", "--config.method.token_signal.top_k=20"],
      "loss_implementation='xla' would not be read: config.method.token_signal.top_k=20",
    ),
    (["--config.seed.more=1"], "config.seed has no parts"),
    (["left", "over"], "unknown argument 'left'"),
  ],
)
def test_a_wrong_setting_is_named(arguments, message):
  with pytest.raises(ValueError) as error:
    try:
      checked(TINYCODE, *arguments)
    except main.UsageError as usage:
      raise ValueError(str(usage)) from usage
  assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "argument, message",
  [
    ("method=sdop", "method='sdop' is unknown; did you mean 'sdpo'; choose from ['adaptive"),
    ("method=xyz", "method='xyz' is unknown; choose from"),
    ("mehtod=sdpo", "argument 'mehtod' of the config file is unknown; did you mean 'method'; "),
    ("level=hrd", "level='hrd' is unknown; did you mean 'hard'; choose from ['default'"),
    (
      "model=tinny",
      "no such directory, and not a hub id of the form owner/name; did you mean 'tiny'",
    ),
  ],
)
def test_the_closest_choice_is_named(argument, message):
  with pytest.raises((ValueError, main.UsageError)) as error:
    c = checked(f"{TINYCODE}:{argument}")
    make_env(sandbox=None, **c.env)
    config.model_location(c.model.path)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_what_may_be_a_model_is_left_as_it_is(tmp_path):
  assert config.model_location("tiny") == config.MODELS["tiny"]
  assert config.model_location(str(tmp_path)) == str(tmp_path)
  assert config.model_location("owner/name") == "owner/name"


NO_NUMBERS = (float("nan"), float("inf"), -float("inf"), True, "many")
PRETRAIN_RANGES = [key for key in ranges.RANGES if key.startswith("pretrain.")]
BASE_RANGES = [key for key in ranges.RANGES if not key.startswith(("method.", "env.", "pretrain."))]


def numeric_leaves(node, path=""):
  """Yields the path of every number among settings, and of tuples of numbers."""
  for key, value in node.items():
    if isinstance(value, dict):
      yield from numeric_leaves(value, f"{path}{key}.")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
      yield path + key


def senseless(allowed: ranges.Range):
  """Yields values that no setting of this range may have."""
  yield from NO_NUMBERS
  if None not in allowed.also:
    yield None
  yield allowed.least if allowed.above else allowed.least - 1
  yield -1e30
  if allowed.whole:
    yield allowed.least + 0.5
  if allowed.most < float("inf"):
    yield allowed.most if allowed.below else allowed.most + 1
    yield 10**30


def assert_refused(check, setting, value, allowed):
  """Asserts that one line names the setting, its value and its range."""
  with pytest.raises(ValueError) as error:
    check()
  message = str(error.value)
  assert f"{setting}={value!r}" in message and "\n" not in message, (setting, value, message)
  assert str(allowed.least) in message and allowed.remark in message, message
  assert allowed.most == float("inf") or str(allowed.most) in message, message


def test_every_numeric_setting_has_its_range():
  c = config.base().to_dict()
  del c["method"], c["env"]
  of_base = {*numeric_leaves(c), "discover.indices"}
  assert of_base == set(BASE_RANGES)
  of_parts = {"method.policy_share", "method.token_signal.ratio_bounds"} | {
    f"method.{axis}.{key}"
    for axis, name in PARTS
    for key, parameter in build.settings_of(axis, name).items()
    if {int, float} & set(build._kinds(parameter.annotation))
  }
  of_environments = {
    f"env.{name}.{key}"
    for name in ENVS
    for key, parameter in env_settings(name).items()
    if type(parameter.default) in (int, float)
  }
  of_pretraining = {"pretrain.corpus.lengths"}
  for file in (PRETRAIN, HOUSEHOLD):
    of_pretraining |= {*numeric_leaves(config.load(file).to_dict(), "pretrain.")}
  of_pretraining -= {f"pretrain.{key}" for key in BASE_RANGES if key.startswith("optimizer.")}
  assert of_pretraining == set(PRETRAIN_RANGES)
  others = set(ranges.RANGES) - set(BASE_RANGES) - set(PRETRAIN_RANGES)
  assert of_parts | of_environments == others


@pytest.mark.parametrize("key", PRETRAIN_RANGES)
def test_a_number_outside_the_range_of_pre_training_is_refused(key):
  allowed, path = ranges.RANGES[key], key.removeprefix("pretrain.")
  *sections, name = path.split(".")
  file = PRETRAIN
  if sections and name not in config.load(file)[sections[0]]:
    file = HOUSEHOLD
  for value in senseless(allowed):
    c = config.load(file)
    section = c[sections[0]] if sections else c
    with c.ignore_type():
      section[name] = (value,) if allowed.each else value
    if value is True and section[name] is not True:
      continue  # a ConfigDict makes 1.0 of it where a number with a fraction belongs
    assert_refused(lambda: pretrain.check_ranges(c), f"config.{path}", section[name], allowed)


def test_a_wrong_number_for_pre_training_is_told_before_it_begins():
  for setting in ("model.rope_theta=nan", "corpus.novel=inf", "batch.rows=0", "optimizer.lr=nan"):
    with pytest.raises(ValueError, match=f"config.{setting} must be"):
      pretrain.configuration(PRETRAIN, ["pretrain", f"--config.{setting}"])
  assert pretrain.configuration(f"{PRETRAIN}:local,start=tiny", ["pretrain"]).start == "tiny"


@pytest.mark.parametrize("key", BASE_RANGES)
def test_a_number_outside_the_range_of_a_setting_is_refused(key):
  allowed = ranges.RANGES[key]
  for value in senseless(allowed):
    c = config.base()
    *sections, name = key.split(".")
    section = c
    for part in sections:
      section = section[part]
    given = (value,) if allowed.each else value
    with c.ignore_type():
      section[name] = given
    if value is True and section[name] is not True:
      continue  # a ConfigDict makes 1.0 of it where a number with a fraction belongs
    assert_refused(lambda: config.validate(c), f"config.{key}", section[name], allowed)


@pytest.mark.parametrize("axis, name", PARTS)
def test_a_number_outside_the_range_of_a_part_is_refused(axis, name):
  for key in build.settings_of(axis, name):
    allowed = ranges.RANGES.get(f"method.{axis}.{key}")
    for value in senseless(allowed) if allowed else ():
      row = build.method_row("sdpo") | {axis: {"name": name, key: value}}
      setting = f"method.{axis}.{key}"
      assert_refused(lambda: build.build_method(row), setting, value, allowed)


@pytest.mark.parametrize("name", ENVS)
def test_a_number_outside_the_range_of_an_environment_is_refused(name):
  for key in env_settings(name):
    allowed = ranges.RANGES.get(f"env.{name}.{key}")
    for value in senseless(allowed) if allowed else ():
      c = config.base()
      c.env = {"name": name, key: value}
      setting = f"config.env.{key}"
      assert_refused(lambda: config.validate(c), setting, value, allowed)
      assert_refused(lambda: make_env(sandbox=None, **c.env), setting, value, allowed)


@pytest.mark.parametrize("share", [*NO_NUMBERS, None, -0.1, 1.1])
def test_a_share_is_a_number_or_its_one_word(share):
  row = build.method_row("sdpo_blend") | {"policy_share": share}
  with pytest.raises(ValueError, match=r"policy_share=.* must lie in \[0, 1\], or be 'routed'"):
    build.build_method(row)
  # a row whose share is the word can be given a number, and the reverse
  srpo = f"{TINYCODE}:method=srpo"
  assert checked(srpo, "--config.method.policy_share=0.25").method.policy_share == 0.25
  blend = f"{TINYCODE}:method=sdpo_blend"
  assert checked(blend, "--config.method.policy_share=routed").method.policy_share == "routed"


@pytest.mark.parametrize(
  "setting, value, allowed",
  [
    ("total_steps", "nan", "at least 1"),
    ("rollout.group", "1e3", "at least 1 and at most 2147483647 (a whole number)"),
    ("rollout.temperature", "warm", "at least 0.001 and at most 100"),
    ("rollout.temperature", "nan", "at least 0.001 and at most 100"),
    ("eval.temperature", "-inf", "at least 0.001 and at most 100, or 0"),
    ("optimizer.lr", "inf", "at least 0 and at most 1"),
    ("optimizer.weight_decay", "-1", "at least 0 and at most 100"),
    ("optimizer.clip_norm", "True", "above 0, or None: no clipping"),
    ("model.lora.alpha", "nan", "above 0 and at most 1000000"),
    ("discover.below_pass_at_64", "nan", "above 0 and at most 1"),
    ("seed", "4294967296", "at least 0 and at most 4294967295"),
    ("method.token_signal.clip", "nan", "above 0, or None: no clipping"),
    ("method.teacher_context.success_threshold", "nan", "above 0 and at most 1"),
    ("env.words_seed", "1.5", "at least 0"),
  ],
)
def test_a_number_on_the_command_line_is_answered_with_its_range(setting, value, allowed, capsys):
  assert main.main(["main", TINYCODE, f"--config.{setting}={value}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert f"config.{setting}=" in line and value.lower() in line.lower() and allowed in line


def test_numbers_of_an_environment_of_ones_own_are_finite():
  own = "--config.env.name=tests.my_env:ReverseWord"
  c = parse(TINYCODE, own)
  with c.ignore_type():
    c.env.length = float("nan")
  with pytest.raises(ValueError, match="config.env.length=nan must be a finite number"):
    config.validate(c)


def test_the_implementation_of_the_loss_is_for_methods_that_read_it():
  # the latter two read the kernel's other results
  for signal in ("divergence", "sampled_token", "sequence"):
    assert (
      checked(
        TINYCODE,
        "--config.train.loss_implementation=xla",
        f"--config.method.token_signal.name={signal}",
      ).train.loss_implementation
      == "xla"
    )
  with pytest.raises(
    ValueError,
    match="loss_implementation='xla' would not be read: config.method.token_signal.name is 'none'",
  ):
    checked(f"{TINYCODE}:method=grpo", "--config.train.loss_implementation=xla")


@pytest.mark.parametrize(
  "text, message",
  [
    (None, "no such file"),
    ("x = 1\n", "it has no get_config()"),
    ("def get_grid(): return {}\n", "a grid of runs is for python -m sdpo_jax.experiment"),
    ("def get_config():\n  return 1\n", "get_config() returns int, not a ConfigDict"),
    ("def get_config(\n", "SyntaxError"),
    (
      "def get_config(arg=''):\n  return missing\n",
      "line 2: NameError: name 'missing' is not defined",
    ),
  ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_a_file_that_is_no_configuration(text, message, joined, tmp_path, capsys):
  path = tmp_path / "own.py"
  if text is not None:
    path.write_text(text)
  assert main.main(["main", *([f"--config={path}"] if joined else ["--config", str(path)])]) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
  "text, message",
  [
    (None, "no such file"),
    ("def get_config(): return 1\n", "a single run is for python -m sdpo_jax.main"),
    ("(\n", "SyntaxError"),
    ("def get_grid():\n  return missing\n", "line 2: NameError: name 'missing' is not defined"),
    ("def get_grid(): return ['--config=x']\n", "get_grid() returns list, not a dict"),
    ("def get_grid(): return {'a': '--config=x'}\n", "lists of arguments"),
  ],
)
def test_a_file_that_is_no_grid(text, message, tmp_path, capsys):
  path = tmp_path / "own.py"
  if text is not None:
    path.write_text(text)
  assert experiment.main([f"--config={path}", f"--workdir={tmp_path}"]) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
  "file, message",
  [
    ("science_mcq.py:local,subject=physics", "argument subject='physics'"),
    ("coding.py:local,tasks=mbpp", "argument tasks='mbpp'"),
    ("math_qa.py:method=grpo,top_k=20", "argument top_k=20"),
    ("tool_use.py:method=dapo,top_k=0", "argument top_k=0"),
  ],
)
def test_an_argument_of_a_file_that_nothing_reads_is_refused(file, message):
  with pytest.raises(main.UsageError, match="would not be read") as error:
    parse(f"--config={ROOT}/configs/{file}")
  assert message in str(error.value)


@pytest.mark.parametrize("name", ["science_mcq", "tool_use", "math_qa", "coding"])
def test_own_data_is_read_in_every_combination(name):
  sources = parse(f"--config={ROOT}/configs/{name}.py:data=own,local").data.sources
  assert all("own" in source for source in sources)
  c = parse(f"--config={ROOT}/configs/{name}.py:method=opsd,top_k=7")
  assert c.method.token_signal.top_k == 7


def test_rows_hold_every_argument():
  for name in methods.METHODS:
    for axis in build.AXES:
      part = build.method_row(name)[axis]
      assert part.keys() == {"name", *build.settings_of(axis, part["name"])}
  assert all(
    p.kind is inspect.Parameter.KEYWORD_ONLY
    for axis, name in PARTS
    for p in build.settings_of(axis, name).values()
  )


def test_one_setting_says_what_a_success_is():
  row = build.method_row("sc_sdpo")
  row["teacher_context"]["success_threshold"] = 0.9
  spread = build.build_method(row).advantage
  np.testing.assert_allclose(spread(np.array([[1.0, 0.6], [0.95, 0.92]])), [[0.5, 0.5], [0.0, 0.0]])
