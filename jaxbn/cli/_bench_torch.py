"""The process in which PyTorch is timed: requests on stdin, answers on stdout, in JSON.

PyTorch's threads spin for a while after their work and can slow down whatever else runs
in their process twentyfold; in here, they are only awake when they are asked something.
The file is run by its path and imports nothing of jaxbn, and so no JAX.

    {"build": {"shape": [8, 4, 4, 3], "axis": -1, "dtype": "float32",
               "mode": "forward", "num_layers": 1, "seed": 0}}  ->  {}
    {"time": {"calls": 10}}                                     ->  {"seconds": 0.1}

What goes wrong with a request is answered {"error": "..."}; at the end of stdin, and
only then, the process ends.
"""

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

MOMENTUM, EPSILON = 0.1, 1e-5  # PyTorch's momentum is the share of the new value


def step(x: Any, dy: Any, mode: str, axis: int, num_layers: int) -> Callable[[], Any]:
    """What is timed, for inputs whose features are on `axis`.

    Returns:
      A function that returns y, in modes with gradients followed by those of x and of
      the parameters in the order of the layers. The running statistics are updated in
      place, as PyTorch does.
    """
    torch: Any = importlib.import_module("torch")
    nn = torch.nn
    if axis == -1:
        # As PyTorch's users have it: a channels-last tensor whose features are on axis
        # 1 all the same. The bytes stay where they are.
        order = (0, x.ndim - 1, *range(1, x.ndim - 1))
        x, dy = x.permute(order), dy.permute(order)
    kinds = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    norm = kinds[x.ndim]
    layers = [
        norm(x.shape[1], eps=EPSILON, momentum=MOMENTUM) for _ in range(num_layers)
    ]
    if mode == "conv":
        convolution = {4: nn.Conv2d, 5: nn.Conv3d}[x.ndim]
        first, second = (
            convolution(x.shape[1], x.shape[1], 1, bias=False, dtype=x.dtype)
            for _ in range(2)
        )
        layers = [first, *layers, nn.ReLU(), second]
    net = nn.Sequential(*layers).train(mode != "inference")
    if mode in ("forward", "inference"):

        def without_gradients() -> Any:
            with torch.no_grad():
                return (net(x),)

        return without_gradients

    x = x.detach().requires_grad_()
    inputs = (x, *net.parameters())

    def with_gradients() -> Any:
        y = net(x)
        return (y.detach(), *torch.autograd.grad(y, inputs, dy))

    return with_gradients


def build(
    shape: list[int], dtype: str, seed: int, mode: str, axis: int, num_layers: int
) -> Callable[[], Any]:
    """`step` for random inputs, called once."""
    torch: Any = importlib.import_module("torch")
    generator = torch.Generator().manual_seed(seed)
    x, dy = (
        torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        for _ in range(2)
    )
    run = step(2 * x + 1, dy, mode, axis, num_layers)
    run()
    return run


def seconds(run: Callable[[], Any], calls: int) -> float:
    """How long some calls take, the freeing of the last result not included."""
    result = None
    begun = time.perf_counter()
    for _ in range(calls):
        result = run()
    elapsed = time.perf_counter() - begun
    del result
    return elapsed


def main() -> None:
    """Answer until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    # Whatever a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if "build" in request:
                run = None  # frees its arrays first
                run = build(**request["build"])
                answer = {}
            elif run is None:
                raise RuntimeError("nothing was built")
            else:
                answer = {"seconds": seconds(run, **request["time"])}
        except Exception as error:  # told, whatever it is
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
