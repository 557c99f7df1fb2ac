"""Threads, warps, blocks and memories of the PTX machine, and every mistake that it finds."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_machine import (
    AbsentLane,
    Deadlock,
    DivergentBarrier,
    Misaligned,
    Module,
    OutOfBounds,
    PtxError,
    Race,
    Trap,
    Uninitialised,
)
from ptx_machine.races import PASSED_BY_BLOCK, PASSED_BY_WARP, Shadow, first_stamps

THREADS = 64
HEAD = """
.version 8.0
.target sm_80
.file 1 "/somewhere/source.cu"
.extern .shared .align 16 .b8 dynamic[];
.visible .entry test(.param .u64 out, .param .u32 n) {
  .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
  .shared .align 16 .b8 line[256];
  ld.param.u64 %rd0, [out];
  ld.param.u32 %r9, [n];
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, %ctaid.x;
  mad.wide.u32 %rd1, %r0, 4, %rd0;  // out + thread
  shl.b32 %r2, %r0, 2;
  mov.u32 %r3, line;
  add.u32 %r4, %r3, %r2;  // line + thread
  mov.u32 %r5, %laneid;
  .loc 1 42 3
"""


def run(
    body: str, blocks: int = 1, threads: int = THREADS, n: int = 0, words: int = THREADS
) -> np.ndarray:
    """Run instructions between which and the end of the kernel there is nothing; return `out`."""
    out = np.zeros(words, np.uint32)
    kernel = Module(HEAD + body + "\nDONE: ret; }")["test"]
    buffers = [(out.ctypes.data, out.nbytes)]
    kernel.launch((blocks,), (threads,), kernel.arguments(out.ctypes.data, n), buffers, 64)
    return out


STORE = "st.global.u32 [%rd1], %r8;"
REVERSED = "xor.b32 %r6, %r2, 252; add.u32 %r6, %r3, %r6;"  # line + 63 - thread
LANES = np.arange(THREADS) % 32


def test_lanes_part_and_meet_again() -> None:
    body = (
        """mov.u32 %r8, 0; mov.u32 %r6, 0;
        LOOP: setp.ge.u32 %p0, %r6, %r0; @%p0 bra OUT;
        add.u32 %r8, %r8, %r6; add.u32 %r6, %r6, 1; bra.uni LOOP;
        OUT: bar.sync 0;"""
        + STORE
    )
    assert run(body).tolist() == [t * (t - 1) // 2 for t in range(THREADS)]


def test_blocks_know_where_they_are() -> None:
    body = (
        """mov.u32 %r6, %ntid.x; mad.lo.u32 %r7, %r1, %r6, %r0; mov.u32 %r8, %nctaid.x;
        mad.lo.u32 %r8, %r8, 1000, %r7; mad.wide.u32 %rd1, %r7, 4, %rd0;"""
        + STORE
    )
    # More lanes than a wave has, and blocks that do not fill their last warp.
    assert run(body, blocks=150, threads=40, words=6000).tolist() == [
        150_000 + i for i in range(6000)
    ]


def test_registers_of_an_inner_scope_are_its_own() -> None:
    body = "mov.u32 %r8, 5; { .reg .b32 %r8; mov.u32 %r8, 7; } " + STORE
    assert set(run(body)) == {5}


def test_the_launch_adds_to_shared_memory() -> None:
    body = (
        "mov.u32 %r6, dynamic; st.shared.u32 [%r6+60], 3; bar.sync 0; ld.shared.u32 %r8, [%r6+60];"
    )
    assert set(run(body + STORE)) == {3}
    with pytest.raises(OutOfBounds, match="4 bytes at 320 of 320"):
        run("mov.u32 %r6, dynamic; st.shared.u32 [%r6+64], 3;")


@pytest.mark.parametrize("text, expected", [
    ("shfl.sync.bfly.b32 %r8, %r0, 3, 31, -1;", np.arange(THREADS) ^ 3),
    ("shfl.sync.idx.b32 %r8, %r0, 5, 31, -1;", np.arange(THREADS) // 32 * 32 + 5),
    ("shfl.sync.up.b32 %r8, %r0, 2, 0, -1;", np.arange(THREADS) - 2 * (LANES >= 2)),
    ("shfl.sync.down.b32 %r8, %r0, 7, 31, -1;", np.arange(THREADS) + 7 * (LANES < 25)),
    # Segments of eight lanes.
    ("shfl.sync.down.b32 %r8, %r0, 3, 0x181f, -1;", np.arange(THREADS) + 3 * (LANES % 8 < 5)),
    ("shfl.sync.idx.b32 %r8, %r0, 6, 0x181f, -1;", np.arange(THREADS) // 8 * 8 + 6),
    ("shfl.sync.up.b32 %r8|%p0, %r0, 1, 0x1800, -1; selp.b32 %r8, 1, 0, %p0;", LANES % 8 >= 1),
    ("setp.lt.u32 %p0, %r0, 40; vote.sync.ballot.b32 %r8, %p0, -1;",
     [0xFFFFFFFF] * 32 + [0xFF] * 32),
    ("setp.lt.u32 %p0, %r0, 40; vote.sync.all.pred %p1, %p0, -1; selp.b32 %r8, 1, 0, %p1;",
     [1] * 32 + [0] * 32),
    ("setp.eq.u32 %p0, %r0, 40; vote.sync.any.pred %p1, !%p0, -1; selp.b32 %r8, 1, 0, %p1;",
     [1] * 64),
    ("redux.sync.add.s32 %r8, %r0, -1;", [496] * 32 + [496 + 1024] * 32),
    ("redux.sync.max.u32 %r8, %r0, -1;", [31] * 32 + [63] * 32),
    ("and.b32 %r6, %r0, 1; match.any.sync.b32 %r8, %r6, -1;", [0x55555555, 0xAAAAAAAA] * 32),
    ("setp.lt.u32 %p0, %r5, 3; mov.u32 %r8, 0; @%p0 activemask.b32 %r8;",
     np.where(LANES < 3, 7, 0)),
    # Two halves of a warp with masks of their own.
    ("setp.lt.u32 %p0, %r5, 16; selp.b32 %r6, 0xffff, 0xffff0000, %p0;"
     "redux.sync.min.u32 %r8, %r0, %r6;", np.arange(THREADS) // 16 * 16),
    ("mov.u32 %r8, %lanemask_lt; popc.b32 %r8, %r8;", LANES),
])  # fmt: skip
def test_collectives(text: str, expected) -> None:
    assert run(text + STORE).tolist() == np.asarray(expected).astype(int).tolist()


def test_lanes_wait_for_each_other_at_a_collective() -> None:
    """The upper lanes take a longer way; all still meet."""
    body = (
        """mov.u32 %r6, 0; setp.lt.u32 %p0, %r5, 16; @%p0 bra VOTE;
        LOOP: add.u32 %r6, %r6, 1; setp.lt.u32 %p1, %r6, %r0; @%p1 bra LOOP;
        VOTE: redux.sync.add.u32 %r8, 1, -1;"""
        + STORE
    )
    assert set(run(body)) == {32}


@pytest.mark.parametrize("text, expected", [
    ("st.global.v2.u32 [%rd1], {%r0, 7};", [0, 7, 2, 7]),
    ("st.global.u16 [%rd1+2], 0xfffe; ld.global.s16 %r8, [%rd1+2];" + STORE, [2**32 - 2] * 4),
    ("st.global.u8 [%rd1+1], 200; ld.global.s8 %h0, [%rd1+1]; cvt.s32.s16 %r8, %h0;" + STORE,
     [2**32 - 56] * 4),
    ("st.global.u8 [%rd1], 200; ld.global.u8 %r8, [%rd1]; add.u32 %r8, %r8, 1;" + STORE, [201] * 4),
    ("atom.global.add.u32 %r7, [%rd0+12], 2; st.global.u32 [%rd1+16], %r7;", [0, 0, 0, 8]),
    ("red.global.max.s32 [%rd0], %r0; red.global.or.b32 [%rd0+4], %r0;", [3, 3, 0, 0]),
    ("atom.global.cas.b32 %r7, [%rd0], 0, 9; red.global.add.f32 [%rd0+4], 0f3F800000;",
     [9, 0x40800000, 0, 0]),
    ("atom.global.exch.b32 %r7, [%rd0], 5; atom.global.inc.u32 %r7, [%rd0+4], 2;", [5, 1, 0, 0]),
    ("cvta.to.global.u64 %rd2, %rd1; st.u32 [%rd2], 6;", [6] * 4),
])  # fmt: skip
def test_memory(text: str, expected: list[int]) -> None:
    threads = 2 if "v2" in text else 4
    text = text.replace("[%rd1], {", "[%rd3], {")
    body = "mad.wide.u32 %rd3, %r0, 8, %rd0; shl.b32 %r0, %r0, 1;" if "v2" in text else ""
    assert run(body + text, threads=threads)[:4].tolist() == expected


def test_atomics_of_one_place_follow_each_other() -> None:
    found = run("atom.global.add.u32 %r8, [%rd0], 1; mad.wide.u32 %rd1, %r8, 4, %rd0;"
                "st.global.u32 [%rd1+4], %r0;", words=65)  # fmt: skip
    assert found[0] == THREADS
    assert sorted(found[1:]) == list(range(THREADS))


def test_shared_memory_is_reached_by_generic_addresses() -> None:
    body = (
        """cvt.u64.u32 %rd2, %r4; cvta.shared.u64 %rd3, %rd2; st.u32 [%rd3], %r0;
        bar.sync 0; ld.u32 %r8, [%rd3];"""
        + STORE
    )
    assert run(body).tolist() == list(range(THREADS))


EXCHANGE = f"st.shared.u32 [%r4], %r0; bar.sync 0; {REVERSED} ld.shared.u32 %r8, [%r6];" + STORE
TWICE = EXCHANGE + "bar.sync 0; st.shared.u32 [%r4], 1;"
IN_WARP = f"""st.shared.u32 [%r4], %r0; bar.warp.sync -1; xor.b32 %r6, %r2, 124;
    add.u32 %r6, %r3, %r6; ld.shared.u32 %r8, [%r6];{STORE}"""
COUNT = f"""and.b32 %r6, %r2, 28; add.u32 %r6, %r3, %r6; st.shared.u32 [%r6], 0; bar.sync 0;
    atom.shared.add.u32 %r7, [%r6], 1; bar.sync 0; ld.shared.u32 %r8, [%r6];{STORE}"""
COPY = f"""cp.async.ca.shared.global [%r4], [%rd1], 4; cp.async.commit_group;
    cp.async.wait_group 0; bar.sync 0; {REVERSED} ld.shared.u32 %r8, [%r6]; bar.sync 0;{STORE}"""
GUARDED = "setp.ge.u32 %p0, %r0, %r9; @%p0 bra DONE; st.global.u32 [%rd1], 1;"
VOTE = "setp.eq.u32 %p0, %r5, 31; redux.sync.add.u32 %r8, 1, -1; @%p0 bra DONE;" + STORE
PLAIN = "ld.global.u32 %r8, [%rd0]; add.u32 %r8, %r8, 1; st.global.u32 [%rd0], %r8;"
ATOMIC = "red.global.add.u32 [%rd0], 1;"
FIRST = "setp.ne.u32 %p0, %r0, 0; @%p0 bra DONE;"
BOTH = (
    """setp.lt.u32 %p0, %r0, 7; @%p0 bra LOW; bar.sync 0; bra REST; LOW: bar.sync 0;
    REST: mov.u32 %r8, 1;"""
    + STORE
)

# What is right, how it is made wrong, and what must be found. Where the name speaks of blocks there
# are two.
MISTAKES: dict[str, tuple[str, str, str, type[PtxError], str]] = {
    "no barrier after a write": (EXCHANGE, " bar.sync 0;", "", Race, "reads memory that was"),
    "no barrier after a read": (TWICE, "bar.sync 0; st", "st", Race, "writes memory that was"),
    "a barrier of the warp for the block": (
        EXCHANGE, " bar.sync 0;", "bar.warp.sync -1;", Race, "written by thread",
    ),
    "no barrier in a warp": (IN_WARP, "bar.warp.sync -1;", "", Race, "reads memory"),
    "a barrier of half a warp": (
        IN_WARP, "bar.warp.sync -1;", "bar.warp.sync 0xffff;", AbsentLane, "does not name",
    ),
    "no barrier before counting": (COUNT, "bar.sync 0;\n", "", Race, "atomically updates"),
    "no barrier after counting": (COUNT, "; bar.sync 0; ld", "; ld", Race, "reads memory"),
    "counting without atomics": (
        COUNT, "atom.shared.add.u32 %r7, [%r6], 1;",
        "ld.shared.u32 %r7, [%r6]; add.u32 %r7, %r7, %r0; st.shared.u32 [%r6], %r7;",
        Race, "writes",
    ),
    "different writes at once": (
        EXCHANGE, "[%r4], %r0", "[%r3], %r0", Race, "different numbers to one place",
    ),
    "a copy that is not waited for": (
        COPY, "cp.async.wait_group 0;", "", Race, "has not been waited for",
    ),
    "a copy that is waited for too late": (
        COPY, "wait_group 0", "wait_group 1", Race, "has not been waited for",
    ),
    "a copy that others do not wait for": (COPY, " bar.sync 0; xor", " xor", Race, "reads memory"),
    "shared memory that nobody wrote": (
        EXCHANGE, "st.shared.u32 [%r4], %r0;", "", Uninitialised, "nobody has written",
    ),
    "shared memory past the end": (
        EXCHANGE, "st.shared.u32 [%r4]", "st.shared.u32 [%r4+68]", OutOfBounds, "of 320 of shared",
    ),
    "shared memory before the start": (
        EXCHANGE, "st.shared.u32 [%r4]", "st.shared.u32 [%r4+-4]", OutOfBounds, "at -4 of 320",
    ),
    "a misaligned vector in shared memory": (
        EXCHANGE, "ld.shared.u32 %r8,", "ld.shared.v2.u32 {%r8, %r7},", Misaligned, "8 bytes",
    ),
    "one thread too many": (GUARDED, "setp.ge", "setp.gt", OutOfBounds, "in no buffer"),
    "no guard": (GUARDED, "@%p0 bra DONE;", "", OutOfBounds, "256 bytes"),
    "before the start": (GUARDED, "[%rd1], 1", "[%rd1+-4], 1", OutOfBounds, "-4 bytes from"),
    "a misaligned number": (GUARDED, "[%rd1], 1", "[%rd1+2], 1", Misaligned, "4 bytes at"),
    "a misaligned vector": (
        GUARDED, "st.global.u32 [%rd1], 1", "st.global.v4.u32 [%rd1], {1, 1, 1, 1}",
        Misaligned, "16 bytes at",
    ),
    "an update by blocks without atomics": (ATOMIC, ATOMIC, FIRST + PLAIN, Race, "of block"),
    "a read by blocks of what others update": (
        ATOMIC, ATOMIC, ATOMIC + FIRST + "ld.global.u32 %r8, [%rd0];", Race, "of block",
    ),
    "writes by blocks of one place": (
        ATOMIC, ATOMIC, FIRST + "st.global.u32 [%rd0], 1;", Race, "writes memory that was written",
    ),
    "an update by a block without atomics": (
        ATOMIC, ATOMIC, "and.b32 %r8, %r0, 0; ld.global.u32 %r8, [%rd0]; st.global.u32 [%rd0], 1;",
        Race, "writes memory that was",
    ),
    "a lane leaves before a collective": (
        VOTE, "redux.sync.add.u32 %r8, 1, -1; @%p0 bra DONE;",
        "@%p0 bra DONE; redux.sync.add.u32 %r8, 1, -1;", AbsentLane, "lane 31, which has left",
    ),
    "a collective under a condition": (
        VOTE, "redux.sync", "@%p0 redux.sync", AbsentLane, "which has left",
    ),
    "the caller is not in the mask": (VOTE, ", 1, -1", ", 1, 0xffff", AbsentLane, "does not name"),
    "different masks": (
        VOTE, "redux.sync.add.u32 %r8, 1, -1",
        "selp.b32 %r7, -1, 0x7fffffff, %p0; redux.sync.add.u32 %r8, 1, %r7",
        AbsentLane, "different masks",
    ),
    "different collectives": (
        VOTE, "redux.sync.add.u32 %r8, 1, -1;",
        "@%p0 bra LAST; redux.sync.add.u32 %r8, 1, -1; bra AFTER; LAST: bar.warp.sync -1; AFTER:",
        AbsentLane, "different collectives",
    ),
    "a shuffle from a lane outside": (
        VOTE, "redux.sync.add.u32 %r8, 1, -1; @%p0 bra DONE;",
        "setp.ge.u32 %p0, %r5, 16; @%p0 bra DONE; shfl.sync.idx.b32 %r8, %r0, 20, 31, 0xffff;",
        AbsentLane, "reads lane 20, which takes no part",
    ),
    "different barriers": (BOTH, "bra REST;", "bra REST;", DivergentBarrier, "different barriers"),
    "a barrier against a collective": (
        EXCHANGE, " bar.sync 0;",
        "setp.lt.u32 %p0, %r5, 7; @%p0 bra LOW; bar.sync 0; LOW: bar.warp.sync -1;",
        Deadlock, "which waits at a barrier",
    ),
    "a loop without an end": (
        GUARDED, "setp.ge", "AGAIN: bra AGAIN; setp.ge", Deadlock, "for ever",
    ),
    "a trap": (GUARDED, "@%p0 bra DONE;", "trap;", Trap, "traps"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx_machine.wave.MOST_STEPS", 20_000)
    right, before, after, error, diagnosis = MISTAKES[name]
    blocks, n = (2 if "blocks" in name else 1), (THREADS if "too many" in name else 40)
    threads = 80 if "one thread" in name or name == "no guard" else THREADS
    if name != "different barriers":
        run(right, blocks=blocks, threads=threads, n=n)
    assert right.count(before) == 1
    with pytest.raises(error, match=diagnosis) as caught:
        run(right.replace(before, after), blocks=blocks, threads=threads, n=n)
    text = str(caught.value)
    assert "in test (source.cu:42): " in text, "it says in which kernel, and of which line"
    assert "block" in text
    assert "thread" in text


def test_what_warps_write_alike_is_no_race() -> None:
    """Compilers let several warps write the same numbers; only different ones are wrong."""
    body = "st.shared.u32 [%r3], 5; bar.sync 0; ld.shared.u32 %r8, [%r3];" + STORE
    assert set(run(body)) == {5}


def test_copies_fill_up_with_zeros() -> None:
    body = """st.global.u32 [%rd1], %r0; and.b32 %r6, %r0, 1; shl.b32 %r6, %r6, 2;
        cp.async.ca.shared.global [%r4], [%rd1], 4, %r6; cp.async.wait_all;
        ld.shared.u32 %r8, [%r4];"""
    assert run(body + STORE).tolist() == [t * (t % 2) for t in range(THREADS)]


def shadow_of(*events: tuple[str, int, int, int, int]) -> list[bool]:
    """List which accesses race: (kind, thread, barriers of the block, of the warp, granule)."""
    shadow = Shadow(4, warps=2, lenient=False)
    found = []
    for kind, thread, block, warp, granule in events:
        stamp = first_stamps(np.array([thread])) + block * PASSED_BY_BLOCK + warp * PASSED_BY_WARP
        at = np.array([[granule]])
        if kind == "read":
            found.append(bool(shadow.read(at, stamp)[0]))
        else:
            changed = np.array([True])
            found.append(bool(shadow.write(at, stamp, changed, kind == "atomic")[0]))
    return found


@pytest.mark.parametrize("second, ordered", [
    ((0, 0, 0), True),  # the same thread
    ((1, 0, 0), False), ((1, 0, 1), True), ((1, 1, 0), True),  # of its warp
    ((40, 0, 0), False), ((40, 0, 1), False), ((40, 1, 0), True),  # of its block
    ((64, 0, 0), False), ((64, 1, 0), False), ((64, 1, 1), False),  # of another block
])  # fmt: skip
@pytest.mark.parametrize("kinds", [("write", "read"), ("read", "write"), ("write", "write"),
                                   ("atomic", "read"), ("write", "atomic")])  # fmt: skip
def test_what_orders_two_accesses(kinds, second, ordered: bool) -> None:
    assert shadow_of((kinds[0], 0, 0, 0, 1), (kinds[1], *second, 1)) == [False, not ordered]
    assert shadow_of((kinds[0], 0, 0, 0, 1), (kinds[1], *second, 2)) == [False, False]


def test_the_first_of_several_readers_is_not_forgotten() -> None:
    assert shadow_of(("read", 0, 0, 0, 0), ("read", 40, 0, 0, 0), ("write", 40, 0, 0, 0))[2]
    assert shadow_of(("read", 0, 0, 0, 0), ("read", 1, 0, 0, 0), ("write", 1, 0, 0, 0))[2]
    assert not shadow_of(("read", 0, 0, 0, 0), ("read", 1, 0, 0, 0), ("write", 1, 0, 1, 0))[2]
    assert shadow_of(("read", 0, 0, 0, 0), ("read", 64, 5, 0, 0), ("write", 64, 6, 0, 0))[2]
    assert not any(shadow_of(("atomic", 0, 0, 0, 0), ("atomic", 70, 0, 0, 0)))
    assert shadow_of(("atomic", 0, 0, 0, 0), ("atomic", 70, 0, 0, 0), ("read", 70, 0, 0, 0))[2]


def test_buffers_have_to_be_aligned_and_launches_valid() -> None:
    kernel = Module(HEAD + "DONE: ret; }")["test"]
    with pytest.raises(ValueError, match="invalid launch"):
        kernel.launch((1,), (1025,), bytes(12), [])
    with pytest.raises(ValueError, match="multiple of 16"):
        kernel.launch((1,), (32,), bytes(12), [(8, 8)])
