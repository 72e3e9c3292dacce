"""``python -m prefect_mlprojects`` is the command ``mlprojects``."""

from prefect_mlprojects.cli import main

main()
