"""Published limits of accelerators, and what a compiled program asks of them.

Counts are read from the text of the optimised HLO, whose shapes are those of one device. The body
of a loop counts as often as the text says that it runs, else once.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One chip. Rates are published peaks; the link is the sum of all links, one way."""

    flops: float  # bfloat16 FLOP/s, dense
    memory: float  # bytes a program may use
    bandwidth: float  # bytes/s of the memory
    link: float  # bytes/s
    source: str


_TPU_DOCS = "https://cloud.google.com/tpu/docs"
# Memory of a TPU is what its compiler accepts, of a GPU what the data sheet says. The one-way rate
# of the links is half of the published two-way rate.
DEVICES: Mapping[str, Device] = {
    "v4": Device(275e12, 30.75 * _GIB, 1200e9, 300e9, f"{_TPU_DOCS}/v4, links: arXiv 2304.01433"),
    "v5e": Device(197e12, 15.75 * _GIB, 819e9, 200e9, f"{_TPU_DOCS}/v5e"),
    "v5p": Device(459e12, 95.74 * _GIB, 2765e9, 600e9, f"{_TPU_DOCS}/v5p"),
    "v6e": Device(918e12, 31.25 * _GIB, 1638e9, 400e9, f"{_TPU_DOCS}/v6e"),
    "h100": Device(989.4e12, 80e9, 3350e9, 450e9, "https://www.nvidia.com/en-us/data-center/h100"),
    "h200": Device(989.4e12, 141e9, 4800e9, 450e9, "https://www.nvidia.com/en-us/data-center/h200"),
}

# The name that JAX gives a chip begins with one of these; the first that fits counts.
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p"}
KINDS |= {"TPU v6 lite": "v6e", "TPU v6e": "v6e", "NVIDIA H100": "h100", "NVIDIA H200": "h200"}

COLLECTIVES = "all-gather reduce-scatter all-reduce all-to-all collective-permute".split()
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\{\s*$")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%([\w.\-]+)"
)
# No traffic of their own: names for values, and calls whose insides are counted.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"}
_FREE |= {"conditional", "call", "partition-id", "replica-id", "iota", "opt-barrier", "async-start"}


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str  # as printed, of the result
    operands: tuple[str, ...]
    argument: str  # all that stands in the brackets
    attributes: str
    is_root: bool


Computations = Mapping[str, list[Instruction]]


@dataclass
class Collective:
    """All collectives of one kind in a program."""

    count: float = 0  # executions
    bytes: float = 0  # that a device sends

    def add(self, times: float, size: float) -> None:
        self.count, self.bytes = self.count + times, self.bytes + times * size


@dataclass(frozen=True)
class Demand:
    """What one call of a program asks of a device."""

    collectives: Mapping[str, Collective] = field(default_factory=dict)
    bytes: float = 0  # read from and written to memory
    loops_counted_once: int = 0  # loops whose trip count XLA does not know


def utilisation(row: Mapping[str, Any], kind: str, count: int) -> dict[str, float]:
    """`mfu` of a metrics row with an update: the share of the peak of `count` chips.

    `kind` is the `device_kind` of JAX; nothing where its peak is not known.
    """
    name = next((name for prefix, name in KINDS.items() if kind.startswith(prefix)), None)
    if name is None or "update/flops_per_token" not in row:
        return {}
    flops = row["update/flops_per_token"] * row["tokens/trained"]
    return {"mfu": flops / (row["time/update_s"] * count * DEVICES[name].flops)}


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a printed HLO shape; on-chip memory (`S(1)`) counts as none."""
    total = 0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if "S(1)" in layout:
            continue
        digits = re.search(r"\d+", dtype)
        bits = _BITS[dtype] if dtype in _BITS else int(digits.group()) if digits else 0
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def parse_hlo(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation by its name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and " = " not in line.split("->")[0]:
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif " = " in line:
            instruction = _instruction(line)
            current += [instruction] if instruction else []
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    left, _, right = line.partition(" = ")
    opcode = _OPCODE.search(" " + right)
    if opcode is None:
        return None
    start, depth = opcode.end() - 1, 1  # the leading blank shifts by one
    end = start
    while depth and end < len(right):
        depth += {"(": 1, ")": -1}.get(right[end], 0)
        end += 1
    name = left.replace("ROOT", "").strip().lstrip("%")
    shape, argument, attributes = right[: start - 1], right[start : end - 1], right[end:]
    operands = tuple(_NAME.findall(argument))
    return Instruction(name, opcode.group(1), shape, operands, argument, attributes, "ROOT" in left)


def trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int | None:
    """How often a `while` runs, where its text says so.

    TPU compilers print no `known_trip_count`: there a counter that must stay below a constant is
    taken to go from 0 in steps of 1.
    """
    known = re.search(r'known_trip_count\\?"?:\s*\{\\?"n\\?":\\?"(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%([\w.\-]+)", loop.attributes)
    body = computations.get(condition.group(1), []) if condition else []
    constants = {i.name: i.argument for i in body if i.opcode == "constant"}
    for root in (i for i in body if i.is_root and i.opcode == "compare"):
        limit = constants.get(root.operands[1], "")
        if "direction=LT" in root.attributes and limit.isdigit():
            return int(limit)
    return None


def group_size(attributes: str, devices: int) -> int:
    """How many devices take part in one group of a collective."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
    if named:  # axes with sizes, and those of the group; `'a':(2)4` is a part of size 4
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if iota:
        return int(iota.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed.group(1).split(",")) if listed else devices


def sent_bytes(kind: str, result: float, operand: float, size: int) -> float:
    """Bytes that a device of a group sends at least: the bandwidth-optimal algorithms.

    Args:
      kind: of the collective.
      result: bytes of its result on one device.
      operand: bytes of its operand on one device.
      size: of the group.
    """
    share = (size - 1) / size
    if kind == "all-gather":
        return result * share
    if kind == "all-reduce":
        return 2 * operand * share
    return operand if kind == "collective-permute" else operand * share


def demand(text: str, devices: int) -> Demand:
    """Collectives and memory traffic of the program in an optimised HLO module."""
    computations, entry = parse_hlo(text)
    collectives = {kind: Collective() for kind in COLLECTIVES}
    total, unknown, chains = 0.0, 0, set()
    for name, times, in_fusion in _executions(computations, entry):
        shapes = {i.name: i.shape for i in computations[name]}
        scattering = "all-reduce-scatter" in name  # how TPUs write a reduce-scatter
        for item in computations[name]:
            unknown += item.opcode == "while" and trip_count(item, computations) is None
            kind = item.opcode.removesuffix("-start")
            # On TPUs one collective in steps is several instructions of one chain.
            chain = re.findall(r'chain_id="\d+"|channel_id=\d+', item.attributes)
            if kind in COLLECTIVES and not (len(chain) == 2 and tuple(chain) in chains):
                chains.add(tuple(chain))
                kind, sent = _sent(item, shapes, devices, scattering)
                collectives[kind].add(times if sent else 0, sent)
            if not in_fusion:
                total += times * _traffic(item, shapes, computations)
    return Demand({k: c for k, c in collectives.items() if c.count}, total, unknown)


def _sent(
    item: Instruction, shapes: Mapping[str, str], devices: int, scattering: bool
) -> tuple[str, float]:
    """The kind of a collective, and the bytes that a device sends; 0 where it is alone."""
    kind = item.opcode.removesuffix("-start")
    kind = "reduce-scatter" if kind == "all-reduce" and scattering else kind
    # Where an array lies is of no matter here, so on-chip memory counts as well.
    operand = sum(shape_bytes(shapes.get(o, "").replace("S(1)", "")) for o in item.operands)
    result = shape_bytes(item.shape.replace("S(1)", ""))
    if item.opcode == "all-gather-start":  # its result names the operands too
        result -= operand
    return kind, sent_bytes(kind, result, operand, group_size(item.attributes, devices))


def _executions(computations: Computations, entry: str) -> Iterator[tuple[str, float, bool]]:
    """Computations that run, how often, and whether inside a fusion; one for each call."""
    pending = [(entry, 1.0, False)]
    while pending:
        name, times, in_fusion = pending.pop()
        yield name, times, in_fusion
        for item in computations[name]:
            inner = in_fusion or item.opcode in ("fusion", "reduce", "scatter", "sort", "map")
            loop = (trip_count(item, computations) or 1) if item.opcode == "while" else 1
            branches = re.search(r"branch_computations=\{([^}]*)\}", item.attributes)
            called = [called for _, called in _CALLED.findall(item.attributes)]
            called += _NAME.findall(branches.group(1)) if branches else []
            if item.opcode.removesuffix("-start") not in COLLECTIVES:
                pending += [(c, times * loop, inner) for c in called if c in computations]


def _traffic(item: Instruction, shapes: Mapping[str, str], computations: Computations) -> float:
    """Bytes that one execution reads and writes; of an array that is sliced, only the slice."""
    if item.opcode in _FREE or item.opcode.endswith("-done"):
        return 0
    sizes = [shape_bytes(shapes.get(o, "")) for o in item.operands]
    result = shape_bytes(item.shape)
    if item.opcode in ("slice-start", "dynamic-slice-start"):  # (operands), slice, context
        taken = item.shape.partition("), ")[2]
        return shape_bytes(taken.replace("S(1)", "")) + shape_bytes(taken)
    if item.opcode.endswith("-start"):  # its result names the operands too
        return result
    if item.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * result
    if item.opcode == "dynamic-update-slice":
        return 2 * sizes[1]
    called = re.search(r"calls=%([\w.\-]+)", item.attributes)
    if item.opcode != "fusion" or called is None or called.group(1) not in computations:
        return result + sum(sizes)
    body = computations[called.group(1)]
    inner = {i.name: i for i in body}
    parameters = [i for i in body if i.opcode == "parameter"]
    reads = sum(min(_read(p, body), shape_bytes(p.shape)) for p in parameters)
    root = next(i for i in body if i.is_root)
    written = [inner[o] for o in root.operands] if root.opcode == "tuple" else [root]
    updates = [i for i in written if i.opcode == "dynamic-update-slice"]
    result -= sum(shape_bytes(i.shape) - shape_bytes(inner[i.operands[1]].shape) for i in updates)
    return reads + max(result, 0) - sum(shape_bytes(i.shape) for i in written if i in parameters)


def _read(parameter: Instruction, body: list[Instruction]) -> float:
    """Bytes of a fusion's parameter that its body reads."""
    users = [i for i in body if parameter.name in i.operands]
    whole, total = shape_bytes(parameter.shape), 0
    for user in users:
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += shape_bytes(user.shape)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
            return whole
    return total


def floors(device: Device, flops: float, memory: float, network: float) -> dict[str, float]:
    """Least seconds that computing, memory and network each need, at the published peaks."""
    return {
        "compute": flops / device.flops,
        "memory": memory / device.bandwidth,
        "network": network / device.link,
    }
