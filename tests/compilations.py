"""How many programs XLA compiles meanwhile."""

import contextlib

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def counted():
    """A list that gets one entry for each compilation within."""
    compiled = []

    def note(event, *_, **__):
        if event == EVENT:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
