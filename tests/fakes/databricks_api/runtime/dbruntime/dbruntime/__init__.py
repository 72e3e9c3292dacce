"""What a driver of today's runtimes has: `databricks.sdk.runtime` takes `dbutils` from here."""

from databricks.sdk.dbutils import RemoteDbUtils


class UserNamespaceInitializer:
    """Gives what notebooks find in their namespace."""

    @staticmethod
    def getOrCreate() -> "UserNamespaceInitializer":
        return UserNamespaceInitializer()

    def get_namespace_globals(self) -> dict[str, object]:
        return {"dbutils": RemoteDbUtils()}
