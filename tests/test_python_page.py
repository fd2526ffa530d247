"""docs/python.md: its snippets run as they stand, one after the other, and it names what is public."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import unfold
from tests.conftest import ROOT
from tests.model.gist_exports import LLAMA, make_model, write_export
from unfold.model.layers import BuildContext

PAGE = (ROOT / "docs" / "python.md").read_text()
NO_GROUPS = "import torch.distributed\nassert not torch.distributed.is_initialized()\n"


def test_the_snippets_run(tmp_path):
    write_export(tmp_path / "exported", make_model(LLAMA, BuildContext.alone()), unfold.GistConfig((4, 2), recall="suffix"))
    script = tmp_path / "page.py"
    script.write_text("\n".join([*re.findall(r"```python\n(.*?)```", PAGE, re.S), NO_GROUPS]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_public_names_are_those_of_the_page():
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(unfold.__all__)
    assert all(getattr(unfold, name) for name in unfold.__all__)
