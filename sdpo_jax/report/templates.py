"""Renders the templates of assets/, whose values are escaped as they are printed."""

import base64
import hashlib
import pathlib

import jinja2

ASSETS = pathlib.Path(__file__).parent.parent / "assets"


def template(name: str) -> jinja2.Template:
  """Returns a page of assets/."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ASSETS),
    autoescape=True,
    finalize=printable,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(name)


def printable(value):
  """Replaces control characters, which HTML forbids, by their printable pictures."""
  if hasattr(value, "__html__"):  # markup already: what a macro returns
    return value
  return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(value))


def script(name: str) -> tuple[str, str]:
  """Returns a script of assets/, and the source that a page's policy allows: its digest.

  So a browser runs this script of the page and no other.
  """
  text = (ASSETS / name).read_text(encoding="utf-8")
  digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
  return text, f"'sha256-{digest}'"
