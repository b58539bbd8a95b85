"""docs/planner.md says what the planner computes today."""

import re
import sys
from pathlib import Path

from foldscan.cli.main import build_parser
from foldscan.parallel.planner import load_constants
from foldscan.parallel.planner.calibration import calibration, calibration_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")


def test_calibration_table_is_the_computed_one() -> None:
    found = re.search(r"<!-- calibration: [^>]*-->\n(.*)\n<!-- end -->", PAGE, re.S)
    assert found and found[1] == calibration_table(calibration(), calibration(load_constants("hand-set")))


def test_the_script_would_not_change_the_page() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from planner_page import page
    finally:
        sys.path.pop(0)
    assert page(PAGE) == PAGE
    assert page(PAGE.replace("| 33 of 33 |", "| 30 of 33 |")) == PAGE


def test_commands_of_the_page_parse() -> None:
    commands = re.findall(r"^foldscan (plan [^#\n]*)", PAGE, re.M)
    assert len(commands) == 4
    for command in commands:
        assert build_parser().parse_args(command.split()).command == "plan"
