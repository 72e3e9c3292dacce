"""Environment managers: a project's files -> an environment that is ready to use."""
