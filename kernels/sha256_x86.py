"""SHA-256 on x86's SHA instructions, one stream or two at once.

A round waits for the round before it (4 cycles on Zen and Ice Lake), and a core can begin another in between. Two
streams whose rounds take turns are therefore hashed in little more time than one (``tests/benchmarks/bench_hash.py``).
LLVM compiles it when first needed; calls release the GIL.

Source: FIPS 180-4, section 6.2, and Intel's SHA extensions (the two halves of the state lie as F E B A and H G D C).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

BLOCK_BYTES = 64
_NEVER = ctypes.c_int32(0)
NEVER = ctypes.addressof(_NEVER)
"""What to pass for ``stop`` by who means all of it."""


@cache
def _constants() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The fractions of square roots of the first 8 primes, and of cube roots of the first 64, in 32 bits."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, n))]
    return tuple(_root_bits(p, 2) for p in primes[:8]), tuple(_root_bits(p, 3) for p in primes)


def _root_bits(prime: int, degree: int) -> int:
    low, high = 0, prime << 32
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= prime << 32 * degree else (low, middle)
    return low & 0xFFFFFFFF


def initial_state() -> tuple[int, ...]:
    """The state of no bytes, in the order in which the instructions take it."""
    a, b, c, d, e, f, g, h = _constants()[0]
    return f, e, b, a, h, g, d, c


def digest_of(state: Iterable[int]) -> bytes:
    """The digest that a state stands for."""
    f, e, b, a, h, g, d, c = state
    return b"".join(word.to_bytes(4, "big") for word in (a, b, c, d, e, f, g, h))


class Compiled:
    """The machine code. All arguments are addresses, but for the number of blocks, which is at least 1.

    Attributes:
        one: ``(state, data, blocks, stop)`` takes so many blocks of 64 bytes into a state of 8 U32, or fewer if the I32
            at ``stop`` becomes other than 0 meanwhile. Returns how many.
        two: ``(state, data, state, data, blocks, stop)`` takes as many of each stream into its own state.
    """

    def __init__(self) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_default_triple()
        # What instructions there are, in the order that is best on Ice Lake: on AMD a tenth faster than in its own.
        features = llvm.get_host_cpu_features().flatten()
        machine = target.create_target_machine(cpu="icelake-server", features=features, opt=3)
        module = llvm.parse_assembly(_module(target.triple))
        module.verify()
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self.one = self._function("one", 1)
        self.two = self._function("two", 2)

    def _function(self, name: str, streams: int) -> Callable[..., int]:
        arguments = [ctypes.c_void_p] * (2 * streams) + [ctypes.c_int64, ctypes.c_void_p]
        return ctypes.CFUNCTYPE(ctypes.c_int64, *arguments)(self._engine.get_function_address(name))


_lock = threading.Lock()


def _forget() -> None:
    """In a forked process, whose parent may have been compiling."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)


def compiled() -> Compiled | None:
    """The machine code, compiled at the first call; None on a processor without these instructions."""
    with _lock:
        return _compiled()


@cache
def _compiled() -> Compiled | None:
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return None
    if not llvm.get_process_triple().startswith("x86_64") or not llvm.get_host_cpu_features().get("sha"):
        return None
    code = Compiled()
    return code if _is_right(code) else None


def _is_right(code: Compiled) -> bool:
    """Whether both functions give what OpenSSL gives; a compiler that errs must not decide what a checksum is."""
    size = 4 * BLOCK_BYTES
    padding = b"\x80" + bytes(55) + (8 * size).to_bytes(8, "big")
    contents = [bytes((seed * n * n + n) % 251 for n in range(size)) for seed in (1, 2, 3)]
    datas = [(ctypes.c_uint8 * (size + BLOCK_BYTES)).from_buffer_copy(content + padding) for content in contents]
    states = [(ctypes.c_uint32 * 8)(*initial_state()) for _ in datas]
    places = [(ctypes.addressof(state), ctypes.addressof(data)) for state, data in zip(states, datas, strict=True)]
    code.two(*places[0], *places[1], len(datas[0]) // BLOCK_BYTES, NEVER)
    code.one(*places[2], len(datas[2]) // BLOCK_BYTES, NEVER)
    found = [digest_of(state) for state in states]
    return found == [hashlib.sha256(content).digest() for content in contents]


def _module(triple: str) -> str:
    from llvmlite import ir

    module = ir.Module()
    module.triple = triple
    _Function(module, "one", 1)
    _Function(module, "two", 2)
    return str(module)


class _Function:
    """Builds one function: a loop over blocks, and in it 16 times 4 rounds of every stream in turn."""

    def __init__(self, module: Any, name: str, streams: int) -> None:
        from llvmlite import ir

        self._ir, self._module = ir, module
        self._words = ir.VectorType(ir.IntType(32), 4)
        self._count, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        kind = ir.FunctionType(self._count, [pointer, pointer] * streams + [self._count, word.as_pointer()])
        function = ir.Function(module, kind, name)
        *places, blocks, stop = function.args
        entry, loop, end = (function.append_basic_block(label) for label in ("entry", "loop", "end"))
        self._build = build = ir.IRBuilder(entry)
        states, datas = places[0::2], places[1::2]
        begin = [(self._load(state, 0), self._load(state, 16)) for state in states]
        build.branch(loop)

        build.position_at_end(loop)
        number = build.phi(self._count)
        before = [(build.phi(self._words), build.phi(self._words)) for _ in states]
        offset = build.mul(number, self._count(BLOCK_BYTES))
        after = self._block(before, [build.gep(data, [offset]) for data in datas])
        following = build.add(number, self._count(1))
        number.add_incoming(self._count(0), entry)
        number.add_incoming(following, loop)
        for halves, first, last in zip(before, begin, after, strict=True):
            for half, value, result in zip(halves, first, last, strict=True):
                half.add_incoming(value, entry)
                half.add_incoming(result, loop)
        may_go_on = build.icmp_signed("==", build.load_atomic(stop, "monotonic", 4), word(0))
        build.cbranch(build.and_(build.icmp_signed("<", following, blocks), may_go_on), loop, end)

        build.position_at_end(end)
        for state, halves in zip(states, after, strict=True):
            for place, half in zip((0, 16), halves, strict=True):
                self._store(half, state, place)
        build.ret(following)

    def _block(self, before: Sequence[tuple[Any, Any]], datas: Sequence[Any]) -> list[tuple[Any, Any]]:
        """The states after one block of each stream."""
        build, constants = self._build, _constants()[1]
        states = list(before)
        schedules: list[list[Any]] = [[] for _ in datas]
        for quarter in range(16):
            fours = self._words([self._ir.IntType(32)(k) for k in constants[4 * quarter : 4 * quarter + 4]])
            for stream, (data, schedule) in enumerate(zip(datas, schedules, strict=True)):
                if quarter < 4:
                    word = self._call("llvm.bswap.v4i32", self._load(data, 16 * quarter))
                else:
                    a, b, c, d = schedule[-4:]
                    word = build.add(self._call("llvm.x86.sha256msg1", a, b), self._shuffle(c, d, [1, 2, 3, 4]))
                    word = self._call("llvm.x86.sha256msg2", word, d)
                schedule.append(word)
                keyed = build.add(word, fours)
                feba, hgdc = states[stream]
                hgdc = self._call("llvm.x86.sha256rnds2", hgdc, feba, keyed)
                feba = self._call("llvm.x86.sha256rnds2", feba, hgdc, self._shuffle(keyed, keyed, [2, 3, 0, 0]))
                states[stream] = feba, hgdc
        return [(build.add(old[0], new[0]), build.add(old[1], new[1])) for old, new in zip(before, states, strict=True)]

    def _call(self, name: str, *values: Any) -> Any:
        known = self._module.globals.get(name)
        if known is None:
            known = self._ir.Function(
                self._module, self._ir.FunctionType(self._words, [self._words] * len(values)), name
            )
        return self._build.call(known, values)

    def _shuffle(self, first: Any, second: Any, lanes: Sequence[int]) -> Any:
        lane = self._ir.IntType(32)
        return self._build.shuffle_vector(first, second, self._ir.VectorType(lane, 4)([lane(n) for n in lanes]))

    def _at(self, pointer: Any, offset: int) -> Any:
        place = self._build.gep(pointer, [self._count(offset)])
        return self._build.bitcast(place, self._words.as_pointer())

    def _load(self, pointer: Any, offset: int) -> Any:
        return self._build.load(self._at(pointer, offset), align=1)

    def _store(self, value: Any, pointer: Any, offset: int) -> None:
        self._build.store(value, self._at(pointer, offset), align=1)
