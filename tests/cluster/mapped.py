"""Ray's AWS provider, for whom every machine is one of the test's own hosts (cloud.py). It runs on laptop and head."""

from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

HOST = "mixmo-host"
"""Tag of a machine: the address of the host that stands for it."""


class Mapped(AWSNodeProvider):  # type: ignore[misc]
    """moto gives machines addresses that are anybody's. None of them leaves this class."""

    def create_node(self, node_config: Any, tags: Any, count: int) -> Any:
        """One at a time: of those between MinCount, which Ray has at 1, and MaxCount, moto launches the least."""
        made: dict[str, Any] = {}
        for _ in range(count):
            made |= super().create_node(node_config, tags, 1)
        return made

    def internal_ip(self, node_id: str) -> str | None:
        return self._host(node_id)

    def external_ip(self, node_id: str) -> str | None:
        return self._host(node_id)

    def _host(self, node_id: str) -> str | None:
        """None until the host has booted: Ray then asks again, as of a machine that has no address yet. Raises
        AssertionError for a machine that there never was.
        """
        node: Any = self._get_node(node_id)
        return next((str(tag["Value"]) for tag in node.tags if tag["Key"] == HOST), None)
