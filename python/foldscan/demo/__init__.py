"""The main job, ``foldscan demo``: learn real text in minutes, and say honestly how well."""

from foldscan.demo.run import run_demo

__all__ = ["run_demo"]
