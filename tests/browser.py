"""Drives a Chromium that is installed, without a network, and takes the screenshots of the report.

  python -m tests.browser PAGE [--out=results]

writes report_1280.png and report_390.png: the top of the page as a desktop and as a phone show it.
Needs `apt install chromium chromium-driver` and `pip install selenium`.
"""

import argparse
import contextlib
import io
import json
import pathlib
import shutil
import time
from typing import Iterator

from PIL import Image

WIDE, NARROW = 1280, 390  # CSS pixels
COLOURS = 128  # of a screenshot
# What a page measures of itself: its widths, and the smallest letters that it shows.
MEASURES = """
const sizes = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const box = node.parentElement;
  if (node.data.trim() && box.getClientRects().length) {
    sizes.push([parseFloat(getComputedStyle(box).fontSize), box.tagName + '.' + box.className]);
  }
}
sizes.sort((a, b) => a[0] - b[0]);
return {scroll: document.documentElement.scrollWidth, inner: window.innerWidth, least: sizes[0]};
"""


def missing() -> str:
  """Says what a browser lacks here; "" for nothing."""
  for program in ("chromium", "chromedriver"):
    if not shutil.which(program):
      return f"{program} is not on the PATH"
  try:
    import selenium  # noqa: F401
  except ImportError:
    return "selenium is not installed"
  return ""


@contextlib.contextmanager
def opened() -> Iterator["Browser"]:
  """Yields a browser without a window."""
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  options.binary_location = shutil.which("chromium")
  for flag in ("headless=new", "no-sandbox", "hide-scrollbars", "disable-dev-shm-usage"):
    options.add_argument(f"--{flag}")
  # whatever a page asks of a network fails, and is seen
  options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
  options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
  service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
  driver = webdriver.Chrome(options=options, service=service)
  driver.set_page_load_timeout(300)
  driver.set_script_timeout(300)
  try:
    yield Browser(driver)
  finally:
    driver.quit()


class Browser:
  """A page in a browser, and what it asked for."""

  def __init__(self, driver):
    self.driver = driver

  def resize(self, width: int, height: int = 900, scale: float = 1.0) -> None:
    """Shows pages as a screen of so many CSS pixels does; narrow ones are phones."""
    settings = {"width": width, "height": height, "deviceScaleFactor": scale}
    settings["mobile"] = width < 600
    self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", settings)
    self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 600})

  def open(self, path: pathlib.Path) -> float:
    """Opens a file; returns the seconds until its scripts had run."""
    for kind in ("performance", "browser"):
      self.driver.get_log(kind)
    begun = time.monotonic()
    self.driver.get(path.resolve().as_uri())
    self.run("return document.readyState")
    return time.monotonic() - begun

  def run(self, script: str, *arguments):
    """Runs a script in the page, and returns what it returns."""
    return self.driver.execute_script(script, *arguments)

  def requests(self) -> set[str]:
    """Returns the addresses that were asked for since the page was opened."""
    events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    return {event["params"]["request"]["url"] for event in sent}

  def errors(self) -> list[str]:
    """Returns what the console has said since the page was opened, but for plain words."""
    return [e["message"] for e in self.driver.get_log("browser") if e["level"] != "INFO"]

  def screenshot(self, path: pathlib.Path, top: int = 0) -> None:
    """Writes what is seen below a place of the page, with few colours."""
    self.run("window.scrollTo(0, arguments[0])", top)
    with Image.open(io.BytesIO(self.driver.get_screenshot_as_png())) as image:
      few = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(path, "png", optimize=True)


def main(argv=None) -> None:
  """Takes the screenshots."""
  parser = argparse.ArgumentParser(prog="python -m tests.browser")
  parser.add_argument("page", type=pathlib.Path)
  parser.add_argument("--out", type=pathlib.Path, default="results")
  flags = parser.parse_args(argv)
  with opened() as browser:
    for width, height, scale in ((WIDE, 1500, 1.0), (NARROW, 844, 2.0)):
      browser.resize(width, height, scale)
      browser.open(flags.page)
      browser.screenshot(flags.out / f"report_{width}.png")


if __name__ == "__main__":
  main()
