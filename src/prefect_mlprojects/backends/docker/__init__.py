"""Docker: projects with a ``docker_env``, and calls that name an image, run in a container of it."""
