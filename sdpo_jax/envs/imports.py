"""Imports of what a setting names, and of packages that are optional: one line where they fail."""

import importlib
import importlib.util

from sdpo_jax.errors import SettingError


def imported(setting: str, name: str, *, other: str = ""):
  """Imports "module.path:name". SettingError that names the setting if that cannot be done.

  other: what the setting may be instead, for the message.
  """
  module, _, attribute = name.partition(":")
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError) as error:
    raise SettingError(
      f"{setting}={name!r} cannot be imported: {error}; it must be {other}'module.path:name'"
    ) from error


def need(name: str, extra: str, modules: tuple[str, ...], remark: str = "") -> None:
  """Raises SettingError, with the extra that brings them, unless these modules are installed.

  name: of the environment that needs them. remark: on the installation.
  """
  missing = [module for module in modules if importlib.util.find_spec(module) is None]
  if missing:
    raise SettingError(
      f"config.env.name={name!r} needs the package {', '.join(missing)}, which is not installed: "
      f"pip install 'sdpo_jax[{extra}]'{remark}"
    )
