"""Conda environments without conda: py-rattler solves and installs what a ``conda.yaml`` asks for."""
