"""PyTorch's side of :mod:`benchmark.speed`; runs with another Python, which has PyTorch only.

The networks that the PyTorch original (facebookresearch/GloRe) has are built by it. For others
PyTorch computes this project's graph node by node, in training form as people write it in PyTorch:
its own modules for convolutions, BatchNorm and fully connected layers.
"""

import collections
import contextlib
import json
import sys
import time
from typing import Any, Callable

ORIGINALS = {
    "RESNET50_GLORE": "RESNET50_3D_GCN_X5",
    "RESNET101_GLORE": "RESNET101_3D_GCN_X5",
}


def peak_memory() -> int:
    """Return the most bytes that this process has held at once; 0 where Linux does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def answer(call: Callable[[], Any], warm_up: int = 2) -> None:
    """Time a call for each line that comes in; answer with a line of JSON.

    The first line that goes out says that the call is ready.
    """
    for _ in range(warm_up):
        call()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        call()
        result = {
            "wall": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
            "peak": peak_memory(),
        }
        print(json.dumps(result), flush=True)


def _numbers(text: str) -> tuple:
    return tuple(int(part) for part in text.strip("()[] ").split(",") if part.strip())


def _module(node: dict, shapes: dict, torch: Any) -> Any:
    """Return the module of a node with parameters; None for others."""
    nn, attrs = torch.nn, node.get("attrs", {})
    if node["op"] == "BatchNorm":
        (channels,) = shapes[node["weights"][0]]
        kinds = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        return kinds[node["ndim"]](channels, eps=float(attrs.get("eps", 1e-3)))
    if node["op"] == "FullyConnected":
        out, inner = shapes[node["weights"][0]]
        return nn.Linear(inner, out, bias=len(node["weights"]) > 1)
    if node["op"] != "Convolution":
        return None
    weight = shapes[node["weights"][0]]
    kernel = _numbers(attrs["kernel"])
    groups = int(attrs.get("num_group", 1))
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1](
        weight[1] * groups,
        weight[0],
        kernel,
        stride=_numbers(attrs.get("stride", "")) or 1,
        padding=_numbers(attrs.get("pad", "")) or 0,
        groups=groups,
        bias=len(node["weights"]) > 1,
    )


def _reshaped(x: Any, shape: tuple) -> Any:
    sizes, place = [], 0
    for number in shape:
        if number == -3:
            sizes.append(x.shape[place] * x.shape[place + 1])
            place += 2
        else:
            sizes.append(x.shape[place] if number == 0 else number)
            place += 1
    return x.reshape(sizes)


def _apply(op: str, attrs: dict, inputs: list, torch: Any, alone: bool) -> Any:
    """Compute a node without parameters; ``alone``: nobody else reads its first input."""
    x = inputs[0]
    if op in ("Activation", "sigmoid"):
        kind = attrs.get("act_type", "sigmoid")
        if kind == "relu":
            return torch.relu_(x) if alone else torch.relu(x)
        return torch.sigmoid(x)
    if op in ("elemwise_add", "broadcast_add", "_plus", "add_n"):
        return sum(inputs[1:], x)
    if op in ("broadcast_mul", "elemwise_mul"):
        return x * inputs[1]
    if op == "batch_dot":
        left, right = (
            value.transpose(1, 2) if attrs.get(f"transpose_{side}") in ("True", "1") else value
            for value, side in zip(inputs, "ab")
        )
        return torch.bmm(left, right)
    if op == "transpose":
        return x.permute(*_numbers(attrs["axes"]))
    if op == "Reshape":
        return _reshaped(x, _numbers(attrs["shape"]))
    if op == "reshape_like":
        return x.reshape(inputs[1].shape)
    if op == "Flatten":
        return x.flatten(1)
    if op == "Dropout":
        return x
    if op == "Pooling":
        if attrs.get("global_pool") in ("True", "1"):
            return x.mean(tuple(range(2, x.dim())), keepdim=True)
        functional = torch.nn.functional
        name = f"{attrs.get('pool_type', 'max')}_pool{x.dim() - 2}d"
        kernel = _numbers(attrs["kernel"])
        stride = _numbers(attrs.get("stride", "")) or 1
        return getattr(functional, name)(x, kernel, stride, _numbers(attrs.get("pad", "")) or 0)
    raise NotImplementedError(f"the operator {op}")


def graph_net(path: str, torch: Any) -> Any:
    """Return a module that computes a graph: a file with its nodes, shapes and number of axes."""
    with open(path, encoding="utf-8") as stream:
        content = json.load(stream)
    shapes, nodes = content["shapes"], content["nodes"]
    read = collections.Counter(source for node in nodes for source, _, _ in node["inputs"])

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleDict()
            for index, node in enumerate(nodes):
                names = [nodes[source]["name"] for source, _, _ in node["inputs"]]
                node["weights"] = [name for name in names[1:] if name in shapes]
                part = _module(node, shapes, torch)
                if part is not None:
                    self.parts[str(index)] = part

        def forward(self, x: Any) -> Any:
            values: list = []
            for index, node in enumerate(nodes):
                inputs = [values[source] for source, _, _ in node["inputs"]]
                if node["op"] == "null":
                    values.append(x if node["name"] == "data" else None)
                elif str(index) in self.parts:
                    first = inputs[0]
                    if node["op"] == "FullyConnected" and node.get("attrs", {}).get(
                        "flatten"
                    ) not in ("False", "0"):
                        first = first.flatten(1)
                    values.append(self.parts[str(index)](first))
                else:
                    alone = read[node["inputs"][0][0]] == 1
                    values.append(_apply(node["op"], node.get("attrs", {}), inputs, torch, alone))
            return values[content["head"]]

    return Net()


def main() -> None:
    """Answer for the case in the arguments: a form, its network, and how it is called."""
    case = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    original = ORIGINALS.get(case["network"])
    if original is not None:
        sys.path.insert(0, case["checkout"])
        from network.symbol_builder import get_symbol

        net, _ = get_symbol(original, num_classes=case["classes"])
    else:
        net = graph_net(case["graph"], torch)
    form = case["form"]
    data = torch.randn(*case["shape"])
    low = torch.autocast("cpu", dtype=torch.bfloat16, enabled=form == "bf16")
    if case["task"] == "training":
        net.train()
        labels = torch.arange(len(data)) % case["classes"]
        optimizer = torch.optim.SGD(
            net.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4
        )

        def step() -> None:
            with low:
                loss = torch.nn.functional.cross_entropy(net(data), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        answer(step)
        return
    net.eval()
    with torch.no_grad():
        if form == "frozen":
            net = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(net, data)))
        with low:
            answer(lambda: net(data))


if __name__ == "__main__":
    main()
