"""The processes of a run: how they find each other."""

import contextlib
import dataclasses
import functools
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.extend

from jaxbn.cli import _watch
from jaxbn.cli._arguments import CommandError
from jaxbn.cli._mesh import Mesh
from jaxbn.cli._watch import Watch


@dataclasses.dataclass(frozen=True)
class Group:
    """What the flags say of devices and processes; by default there is one of each."""

    devices: int | None = None  # of each process
    coordinator: tuple[str, int] = ("", 0)  # host and port
    num_processes: int = 1
    process_id: int = 0

    @property
    def num_devices(self) -> int:
        """Devices of all processes together."""
        return (self.devices or 1) * self.num_processes


@contextlib.contextmanager
def joined(group: Group, flags: Mapping[str, Any]) -> Iterator[Mesh]:
    """Bring the processes together, and their devices into one mesh.

    Where there are several processes, an error in the block ends this one at once: an
    ordinary exit would wait for the others, which wait for this one.

    Args:
      group: This process, and how many there are.
      flags: What all of them must have been started with, by name.

    Raises:
      CommandError: There is no such group.
    """
    if group.devices:
        # Has come too late where JAX has its devices, and is then not needed.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", group.devices)
    if group.num_processes == 1:
        yield Mesh(_devices(group))
        return
    _check_that_coordinator_can_listen(group)
    watch = Watch(group.process_id, group.num_processes)
    try:
        client = _connect(group)
        watch.begin(client)
        _compare(group, client, flags)
        mesh = Mesh(_devices(group))
        with _no_stdout():  # gloo says there that it has connected
            mesh.any(False)
        yield mesh
        mesh.any(False)  # the last one has come to its end
    except BaseException as error:  # Ctrl-C too
        watch.fail(error)
    watch.stopped.set()


def _devices(group: Group) -> list[Any]:
    """The first devices of each process."""
    found = []
    for process in range(group.num_processes):
        own = [device for device in jax.devices() if device.process_index == process]
        if len(own) < (group.devices or 1):
            raise CommandError(
                f"argument --devices: {group.devices} of {len(own)} {own[0].platform} "
                "devices; with JAX_PLATFORMS=cpu there are as many as are asked for"
            )
        found += own[: group.devices or 1]
    return found


def _check_that_coordinator_can_listen(group: Group) -> None:
    """Say in one line what gRPC says in many."""
    if group.process_id == 0:
        host, port = group.coordinator
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            raise CommandError(
                f"argument --coordinator: cannot listen on {host} port {port}: {error}"
            ) from error


def _connect(group: Group) -> Any:
    """Join the other processes, by way of the coordinator's address and no other.

    Left to itself, JAX would ask a cloud's metadata server who it is, listen on every
    network of the machine, and go through a proxy, even to 127.0.0.1; and gloo, which
    adds the gradients, would listen where the machine's own name leads.

    Returns:
      The client of JAX's coordination service.
    """
    host, port = group.coordinator
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    os.environ["no_grpc_proxy"] = host  # noqa: SIM112 (gRPC's spelling)
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address,
        group.num_processes,
        group.process_id,
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
        # Much later than `Watch`, which says it in a line. JAX aborts.
        initialization_timeout=2 * _watch.JOIN_SECONDS,
        heartbeat_timeout_seconds=10 * _watch.SILENT_SECONDS,
        shutdown_timeout_seconds=2 * _watch.SILENT_SECONDS,
    )
    # JAX 0.10 to 0.12 have no public way to say where gloo listens.
    from jax._src import distributed, xla_bridge
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

    client = distributed.global_state.client
    with socket.create_connection(group.coordinator, _watch.JOIN_SECONDS) as connection:
        own_host = connection.getsockname()[0]
    collectives = _jax.make_gloo_tcp_collectives(client, hostname=own_host)
    jax.extend.backend.register_backend_factory(
        "cpu",
        functools.partial(xla_bridge.make_cpu_client, collectives),
        fail_quietly=False,
    )
    return client


def _compare(group: Group, client: Any, flags: Mapping[str, Any]) -> None:
    """Refuse, in all processes, to train something else in each."""
    flags = {
        "--num-processes": group.num_processes,
        "--devices": group.num_devices // group.num_processes,
        **flags,
    }
    client.key_value_set(f"jaxbn/flags/{group.process_id}", json.dumps(flags))
    own = json.loads(json.dumps(flags))
    for process in range(group.num_processes):
        other = json.loads(
            client.blocking_key_value_get(
                f"jaxbn/flags/{process}", 1000 * _watch.JOIN_SECONDS
            )
        )
        for name in own:
            if own[name] != other[name]:
                raise CommandError(
                    f"{name}: {own[name]} here, {other[name]} in process {process}"
                )


@contextlib.contextmanager
def _no_stdout() -> Iterator[None]:
    """Drop what is written to stdout, by C++ code too."""
    sys.stdout.flush()
    with open(os.devnull, "wb") as nothing:
        kept = os.dup(1)
        os.dup2(nothing.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
