"""A session without Spark."""


class SparkSession:
    """Is there, and can do nothing."""

    class builder:
        @staticmethod
        def getOrCreate() -> "SparkSession":
            return SparkSession()
