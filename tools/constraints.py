"""Resolve constraints.txt anew for every Python that settings.ini admits: python tools/constraints.py (needs uv)"""

import subprocess
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).parent.parent
settings = ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
command = ["uv", "pip", "compile", "-", "--universal", "--python-version", cfg["min_python"], "--no-annotate", "--no-header"]
requirements = cfg["requirements"] + cfg["dev_requirements"]
resolved = subprocess.run(command, input=requirements, capture_output=True, text=True, check=True).stdout
header = f"# Pinned, tested versions for Python {cfg['min_python']} to {cfg['max_python']}; remade by `make constraints`.\n"
(root / "constraints.txt").write_text(header + resolved, encoding="utf-8")
